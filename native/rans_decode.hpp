// The decoder's inner loop, one variant per instruction set; all give the same levels and refuse the same words.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

namespace tenpak {

constexpr unsigned kPrecision = 12;               // frequencies of a table add up to 2^12
constexpr std::uint32_t kLower = 1u << 16;        // states stay in [2^16, 2^32), renewed by 16 bits
constexpr unsigned kEscapeBits = 20;              // of what an escape codes
constexpr std::int32_t kLargest = 1 << 20;        // of |k|
constexpr std::int32_t kRare = -128;              // k of a slot that more than its symbol is to be read of

struct Context {
    int reach;       // symbol i stands for i - reach; 2 · reach + 1 is the escape
    unsigned shift;  // low bits of k that are coded uniformly
};

struct Decoding {
    std::size_t rows, columns, lanes, segment;
    const std::int32_t* row_class;     // [rows]
    const std::int32_t* column_class;  // [columns]
    // Tables of the classes first … last, each of Q0 and Q1. A slot is packed: k (8 bits), frequency - 1 (12), place
    // within the frequency (12); k is kRare for escapes and wherever low bits follow.
    std::int32_t first, last;
    const Context* contexts;      // [class - first][q]
    const std::uint32_t* slots;   // [class - first][q][2^12]
    const std::uint8_t* symbols;  // the same: symbol i
    // What follows from the trellis: state s and the parity of k give the next one, Q and k mod 256 the level of k.
    std::uint32_t h0, h1;
    unsigned doubled;  // 1 of a trellis; 0 of a uniform quantizer, whose h0 and h1 are 0 too
    std::array<std::array<std::uint8_t, 2>, 256> next;
    std::array<std::array<std::int16_t, 256>, 2> level;
    const std::uint16_t* words;
    std::size_t count;
    std::int32_t* levels;  // [rows][columns]
};

namespace generic { bool decode(const Decoding&); }
namespace avx2 { bool decode(const Decoding&); }
namespace avx512 { bool decode(const Decoding&); }

}  // namespace tenpak
