// Entropy coding of trellis levels: interleaved range asymmetric numeral systems (Duda, 2013) with static tables.
//
// The table of a context follows from a class (a standard deviation in quarter octaves), the quantizer and four bytes of
// shape, in integer arithmetic only, so that it is the same on every machine. docs/format.md has the rules.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "rans_decode.hpp"
#include "trellis.hpp"

namespace tenpak {

constexpr int kClasses = 64;                      // class g: a standard deviation of 2^((g - 12) / 4) steps
constexpr int kReach = 62;                        // symbols are -62 … 62 at most, and an escape

struct Shape {
    std::uint8_t zero0, zero1, one1, tail;  // weights of level 0 in Q0 and Q1 and of ±1 in Q1, /64; of wide tails, /256
};

struct Table {
    int reach = 0;                                        // symbol i stands for i - reach; the last one is the escape
    unsigned shift = 0;                                   // low bits of k that are coded uniformly
    std::array<std::uint16_t, 2 * kReach + 3> start{};    // cumulative frequencies
    [[nodiscard]] unsigned symbols() const { return 2 * static_cast<unsigned>(reach) + 2; }
};

Table table_of(int cls, int q, const Shape& shape);

struct Layout {
    std::size_t rows, columns, lanes, segment;
    unsigned states;
    const std::int32_t* row_class;     // [rows]
    const std::int32_t* column_class;  // [columns]
    Shape shape;
};

// Levels [rows][columns] to 16-bit words.
std::vector<std::uint16_t> rans_encode(const Layout& layout, const std::int32_t* levels);

// How often each |k| occurs by class and quantizer, [64][2][sizes]; larger ones count as the last.
std::vector<std::int64_t> histogram(const Layout& layout, const std::int32_t* levels, std::size_t sizes);

// False where the words are not what an encoder writes for this layout. `decode` is one of the variants.
bool rans_decode(const Layout& layout, const std::uint16_t* words, std::size_t count, std::int32_t* levels,
                 bool (*decode)(const Decoding&));

// Bytes of any origin, with tables that are given: one of 256 frequencies per class of rows, adding up to 2^12.
struct Grid {
    std::size_t rows, columns, lanes, classes;
    const std::int32_t* row_class;      // [rows], each below classes
    const std::uint16_t* frequencies;   // [classes][256], each below 2^12
};

// Symbols [rows][columns], none of frequency zero, to 16-bit words.
std::vector<std::uint16_t> symbols_encode(const Grid& grid, const std::uint8_t* symbols);

// False where the words are not what an encoder writes for this grid. `decode` is one of the variants.
bool symbols_decode(const Grid& grid, const std::uint16_t* words, std::size_t count, std::uint8_t* symbols,
                    bool (*decode)(const Decoding&));

}  // namespace tenpak
