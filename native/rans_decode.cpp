// Compiled once per instruction set, with TENPAK_ISA naming the namespace.
//
// Lanes of a row share the words: each takes, in the order of lanes, none or one for its symbol and then those of an
// escape and of low bits. So many lanes can be decoded at a time unless one of them has such bits; those that do, and
// the last words of the stream, go through `careful`, which is the rule, spelled out.
#include "rans_decode.hpp"

#include <algorithm>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tenpak::TENPAK_ISA {
namespace {

struct Words {
    const std::uint16_t *at, *end;
    bool broken = false;
    std::uint16_t take() {
        if (at == end) {
            broken = true;
            return 0;
        }
        return *at++;
    }
};

struct Lane {
    std::uint32_t& x;
    Words& words;
    void drop(std::uint32_t place, std::uint32_t frequency, unsigned precision) {
        x = frequency * (x >> precision) + place;
        if (x < kLower) x = (x << 16) | words.take();
    }
    // Twelve at a time, the highest first, in what is left of twelve.
    std::uint32_t bits(unsigned count) {
        std::uint32_t value = 0;
        while (count > 0) {
            const unsigned width = (count - 1) % 12 + 1;
            const std::uint32_t part = x & ((1u << width) - 1);
            drop(0, 1, width);
            value = (value << width) | part;
            count -= width;
        }
        return value;
    }
};

// A group of lanes: columns side by side.
class Group {
  public:
    Group(const Decoding& decoding, Words& words)
        : d_(decoding), words_(words), x_(decoding.lanes), state_(decoding.lanes), class_(decoding.lanes),
          table_(decoding.lanes) {
        for (std::uint32_t& x : x_) {
            const std::uint32_t high = words_.take();
            x = (high << 16) | words_.take();
            words_.broken |= x < kLower;
        }
    }

    bool decode(std::size_t first, std::size_t width) {
        for (std::size_t lane = 0; lane < width; ++lane)  // unsigned: sums may be anything and are cut
            class_[lane] =
                static_cast<std::uint32_t>(d_.column_class[first + lane]) - static_cast<std::uint32_t>(d_.first);
        return fast(first, width);
    }

    [[nodiscard]] bool finished() const {
        return !words_.broken && words_.at == words_.end &&
               std::all_of(x_.begin(), x_.end(), [](std::uint32_t x) { return x == kLower; });
    }

  private:
    bool careful(std::size_t lane, std::int32_t& level);
    bool row(std::size_t i, std::size_t from, std::size_t to, std::int32_t* levels);
    bool plain(std::size_t first, std::size_t width);
    bool fast(std::size_t first, std::size_t width);
    template <std::size_t vectors>
    bool wide(std::size_t first);

    const Decoding& d_;
    Words& words_;
    std::vector<std::uint32_t> x_, state_, class_, table_;  // by lane; class - first of the column, and of the level
};

// One level of the class in table_[lane].
bool Group::careful(std::size_t lane, std::int32_t& level) {
    const std::uint32_t q = state_[lane] & 1, context = table_[lane] * 2 + q;
    const Context& coded = d_.contexts[context];
    const std::size_t at = (std::size_t{context} << kPrecision) + (x_[lane] & ((1u << kPrecision) - 1));
    const std::uint32_t slot = d_.slots[at];
    const int place = d_.symbols[at];
    Lane reader{x_[lane], words_};
    reader.drop(slot & 0xFFF, ((slot >> 12) & 0xFFF) + 1, kPrecision);
    std::int32_t symbol = place - coded.reach;
    if (place == 2 * coded.reach + 1) {
        const unsigned bits = reader.bits(5);
        if (bits > kEscapeBits) return false;
        const auto beyond = static_cast<std::int32_t>((1u << bits) | reader.bits(bits));
        symbol = reader.bits(1) ? -(coded.reach + beyond) : coded.reach + beyond;
    }
    const std::int32_t k = (symbol * (1 << coded.shift)) | static_cast<std::int32_t>(reader.bits(coded.shift));
    if (k < -kLargest || k > kLargest) return false;
    level = k * (1 << d_.doubled) - static_cast<std::int32_t>(q) * ((k > 0) - (k < 0));
    state_[lane] = d_.next[state_[lane]][k & 1];
    return true;
}

// Some lanes of a row, one after another.
bool Group::row(std::size_t i, std::size_t from, std::size_t to, std::int32_t* levels) {
    const auto row_class = static_cast<std::uint32_t>(d_.row_class[i]);
    const std::int32_t last = d_.last - d_.first;
    for (std::size_t lane = from; lane < to; ++lane)
        table_[lane] =
            static_cast<std::uint32_t>(std::clamp(static_cast<std::int32_t>(class_[lane] + row_class), 0, last));
    const std::uint16_t* at = words_.at;
    for (std::size_t lane = from; lane < to; ++lane) {
        const std::uint32_t x = x_[lane], state = state_[lane], q = state & 1;
        const std::uint32_t slot = d_.slots[((table_[lane] * 2 + q) << kPrecision) + (x & 0xFFF)];
        const std::uint32_t k = slot >> 24;
        if (at == words_.end || k == (kRare & 0xFF)) [[unlikely]] {
            words_.at = at;
            if (!careful(lane, levels[lane])) return false;
            at = words_.at;
            continue;
        }
        const std::uint32_t moved = (((slot >> 12) & 0xFFF) + 1) * (x >> kPrecision) + (slot & 0xFFF);
        const std::uint32_t renew = moved < kLower;  // without a branch: it is as good as random
        x_[lane] = (moved << (16 * renew)) | (*at & (0u - renew));
        at += renew;
        levels[lane] = d_.level[q][k];
        state_[lane] = d_.next[state][k & 1];
    }
    words_.at = at;
    return !words_.broken;
}

bool Group::plain(std::size_t first, std::size_t width) {
    for (std::size_t i = 0; i < d_.rows; ++i) {
        if (i % d_.segment == 0) std::fill(state_.begin(), state_.end(), 0u);
        if (!row(i, 0, width, d_.levels + i * d_.columns + first)) return false;
    }
    return true;
}

#if defined(__AVX512F__)

struct Wide {
    static constexpr std::size_t width = 16;
    using Register = __m512i;
    static Register load(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
    static void store(void* to, Register a) { _mm512_storeu_si512(to, a); }
    static Register all(std::int32_t a) { return _mm512_set1_epi32(a); }
    static Register both(Register a, Register b) { return _mm512_and_si512(a, b); }
    static Register differ(Register a, Register b) { return _mm512_xor_si512(a, b); }
    static Register plus(Register a, Register b) { return _mm512_add_epi32(a, b); }
    static Register minus(Register a, Register b) { return _mm512_sub_epi32(a, b); }
    static Register times(Register a, Register b) { return _mm512_mullo_epi32(a, b); }
    static Register cut(Register a, Register last) {
        return _mm512_min_epi32(_mm512_max_epi32(a, _mm512_setzero_si512()), last);
    }
    template <int bits> static Register left(Register a) { return _mm512_slli_epi32(a, bits); }
    static Register left(Register a, unsigned bits) {
        return _mm512_sll_epi32(a, _mm_cvtsi32_si128(static_cast<int>(bits)));
    }
    template <int bits> static Register right(Register a) { return _mm512_srli_epi32(a, bits); }
    template <int bits> static Register signed_right(Register a) { return _mm512_srai_epi32(a, bits); }
    static Register gather(const std::uint32_t* from, Register at) { return _mm512_i32gather_epi32(at, from, 4); }
    static bool any(Register a, Register b) { return _mm512_cmpeq_epi32_mask(a, b) != 0; }
    // Words into the states below 2^16, in order; reads 16 words.
    static Register renew(Register x, const std::uint16_t*& at) {
        const __mmask16 low = _mm512_cmplt_epu32_mask(x, _mm512_set1_epi32(1 << 16));
        const Register words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
        at += __builtin_popcount(low);
        return _mm512_mask_or_epi32(x, low, _mm512_slli_epi32(x, 16), _mm512_maskz_expand_epi32(low, words));
    }
};

#elif defined(__AVX2__)

// For each set of lanes, which word a lane gets.
constexpr auto kOrder = [] {
    std::array<std::array<std::uint8_t, 8>, 256> order{};
    for (unsigned set = 0; set < 256; ++set)
        for (unsigned lane = 0, word = 0; lane < 8; ++lane)
            if (set >> lane & 1) order[set][lane] = static_cast<std::uint8_t>(word++);
    return order;
}();

struct Wide {
    static constexpr std::size_t width = 8;
    using Register = __m256i;
    static Register load(const std::uint32_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
    static void store(void* to, Register a) { _mm256_storeu_si256(static_cast<__m256i*>(to), a); }
    static Register all(std::int32_t a) { return _mm256_set1_epi32(a); }
    static Register both(Register a, Register b) { return _mm256_and_si256(a, b); }
    static Register differ(Register a, Register b) { return _mm256_xor_si256(a, b); }
    static Register plus(Register a, Register b) { return _mm256_add_epi32(a, b); }
    static Register minus(Register a, Register b) { return _mm256_sub_epi32(a, b); }
    static Register times(Register a, Register b) { return _mm256_mullo_epi32(a, b); }
    static Register cut(Register a, Register last) {
        return _mm256_min_epi32(_mm256_max_epi32(a, _mm256_setzero_si256()), last);
    }
    template <int bits> static Register left(Register a) { return _mm256_slli_epi32(a, bits); }
    static Register left(Register a, unsigned bits) {
        return _mm256_sll_epi32(a, _mm_cvtsi32_si128(static_cast<int>(bits)));
    }
    template <int bits> static Register right(Register a) { return _mm256_srli_epi32(a, bits); }
    template <int bits> static Register signed_right(Register a) { return _mm256_srai_epi32(a, bits); }
    static Register gather(const std::uint32_t* from, Register at) {
        return _mm256_i32gather_epi32(reinterpret_cast<const int*>(from), at, 4);
    }
    static bool any(Register a, Register b) { return _mm256_movemask_epi8(_mm256_cmpeq_epi32(a, b)) != 0; }
    // Words into the states below 2^16, in order; reads 8 words.
    static Register renew(Register x, const std::uint16_t*& at) {
        const Register low = _mm256_cmpeq_epi32(_mm256_srli_epi32(x, 16), _mm256_setzero_si256());
        const auto set = static_cast<unsigned>(_mm256_movemask_ps(_mm256_castsi256_ps(low)));
        const Register order =
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kOrder[set].data())));
        const Register words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
        at += __builtin_popcount(set);
        const Register renewed = _mm256_or_si256(_mm256_slli_epi32(x, 16), _mm256_permutevar8x32_epi32(words, order));
        return _mm256_blendv_epi8(x, renewed, low);
    }
};

#endif

#if defined(__AVX512F__) || defined(__AVX2__)

// All lanes, a register of them at a time.
template <std::size_t vectors>
bool Group::wide(std::size_t first) {
    using V = Wide;
    using Register = V::Register;
    const Register one = V::all(1), slot_mask = V::all(0xFFF), rare = V::all(kRare), zero = V::all(0);
    const Register h0 = V::all(static_cast<std::int32_t>(d_.h0)), h1 = V::all(static_cast<std::int32_t>(d_.h1));
    const Register last = V::all(d_.last - d_.first);
    Register x[vectors], state[vectors], column[vectors];
    for (std::size_t v = 0; v < vectors; ++v) {
        x[v] = V::load(x_.data() + v * V::width);
        column[v] = V::load(class_.data() + v * V::width);
        state[v] = zero;
    }
    const std::uint16_t *words = words_.at, *const end = words_.end;
    std::int32_t* levels = d_.levels + first;
    for (std::size_t i = 0, until = 0; i < d_.rows; ++i, levels += d_.columns) {
        if (i == until) {
            until += d_.segment;
            for (Register& s : state) s = zero;
        }
        const Register row_class = V::all(d_.row_class[i]);
#pragma GCC unroll 8
        for (std::size_t v = 0; v < vectors; ++v) {
            const Register q = V::both(state[v], one);
            const Register context = V::plus(V::left<1>(V::cut(V::plus(column[v], row_class), last)), q);
            const Register at = V::plus(V::left<kPrecision>(context), V::both(x[v], slot_mask));
            const Register slot = V::gather(d_.slots, at), k = V::signed_right<24>(slot);
            if (V::any(k, rare) || end - words < static_cast<std::ptrdiff_t>(V::width)) [[unlikely]] {
                std::uint32_t *const lanes = x_.data() + v * V::width, *const states = state_.data() + v * V::width;
                V::store(lanes, x[v]);
                V::store(states, state[v]);
                words_.at = words;
                if (!row(i, v * V::width, (v + 1) * V::width, levels)) return false;
                x[v] = V::load(lanes);
                state[v] = V::load(states);
                words = words_.at;
                continue;
            }
            const Register frequency = V::plus(V::both(V::right<12>(slot), slot_mask), one);
            const Register moved = V::plus(V::times(frequency, V::right<kPrecision>(x[v])), V::both(slot, slot_mask));
            x[v] = V::renew(moved, words);
            const Register below = V::minus(zero, q);  // all bits where Q is 1
            const Register sign = V::minus(V::right<31>(V::minus(zero, k)), V::right<31>(k));
            V::store(levels + v * V::width, V::minus(V::left(k, d_.doubled), V::both(sign, below)));
            const Register odd = V::minus(zero, V::both(k, one));
            state[v] = V::differ(V::right<1>(state[v]), V::differ(V::both(below, h0), V::both(odd, h1)));
        }
    }
    words_.at = words;
    for (std::size_t v = 0; v < vectors; ++v) V::store(x_.data() + v * V::width, x[v]);
    return true;
}

bool Group::fast(std::size_t first, std::size_t width) {
    if (width == 32) return wide<32 / Wide::width>(first);
    if (width == 16) return wide<16 / Wide::width>(first);
    return plain(first, width);
}

#else

bool Group::fast(std::size_t first, std::size_t width) { return plain(first, width); }

#endif

}  // namespace

bool decode(const Decoding& d) {
    Words words{d.words, d.words + d.count};
    Group group(d, words);
    for (std::size_t first = 0; first < d.columns && !words.broken; first += d.lanes)
        if (!group.decode(first, std::min(d.lanes, d.columns - first))) return false;
    return group.finished();
}

}  // namespace tenpak::TENPAK_ISA
