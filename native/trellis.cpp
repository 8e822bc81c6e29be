// Compiled once per instruction set, with TENPAK_ISA naming the namespace. No fused multiply-add and no reassociation
// (-ffp-contract=off), so that every variant, and the plain reference, gives the same bits.
#include "trellis.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tenpak::TENPAK_ISA {
namespace {

constexpr float kRounder = 12582912.0f;  // 1.5 · 2^23: adding and subtracting it rounds to the nearest integer
constexpr float kLimit = 1048576.0f;     // levels stay below 2^20

constexpr float kInnermost[4] = {0.0f, 2.0f, 0.0f, 1.0f};  // sizes of levels, by quantizer and parity

inline float nearest(float x) { return (x + kRounder) - kRounder; }

// For one column: of each quantizer and parity the best level and what it costs.
struct Candidates {
    std::vector<float> level[4], cost[4];  // 2·Q + parity

    explicit Candidates(std::size_t rows) {
        for (int set = 0; set < 4; ++set) level[set].resize(rows), cost[set].resize(rows);
    }
};

inline std::int32_t index_of(float level, int q) {
    const auto v = static_cast<std::int32_t>(std::fabs(level));
    return q ? (v + 1) / 2 : v / 2;
}

void find(const float* __restrict u, std::size_t rows, Candidates& found) {
    float* __restrict level[4] = {found.level[0].data(), found.level[1].data(), found.level[2].data(),
                                  found.level[3].data()};
    float* __restrict cost[4] = {found.cost[0].data(), found.cost[1].data(), found.cost[2].data(),
                                 found.cost[3].data()};
    for (int parity = 0; parity < 2; ++parity) {  // Q0: 4Z, 4Z + 2
        const float shift = 2.0f * static_cast<float>(parity);
        for (std::size_t i = 0; i < rows; ++i) {
            const float v = nearest((u[i] - shift) * 0.25f) * 4.0f + shift, d = u[i] - v;
            level[parity][i] = v;
            cost[parity][i] = d * d;
        }
    }
    for (std::size_t i = 0; i < rows; ++i) {  // Q1: even k are 0, ±3, ±7 …
        const float size = std::fabs(u[i]);
        const float outer = std::max(nearest((size - 3.0f) * 0.25f), 0.0f) * 4.0f + 3.0f;
        const float v = size < 1.5f ? 0.0f : outer, d = size - v;
        level[2][i] = std::copysign(v, u[i]);
        cost[2][i] = d * d;
    }
    for (std::size_t i = 0; i < rows; ++i) {  // odd k are ±1, ±5 …
        const float size = std::fabs(u[i]);
        const float v = std::max(nearest((size - 1.0f) * 0.25f), 0.0f) * 4.0f + 1.0f, d = size - v;
        level[3][i] = std::copysign(v, u[i]);
        cost[3][i] = d * d;
    }
}

// Add the rates; a level nearer to zero may then be the better one of its set.
void weigh(const Block& block, std::size_t column, const float* u, std::size_t start, Candidates& found) {
    const auto last = static_cast<std::int32_t>(block.symbols) - 1;
    const auto classes = static_cast<std::int32_t>(block.classes);
    for (std::size_t i = start; i < block.rows; ++i) {
        const auto cls = std::clamp(block.row_class[i] + block.column_class[column], 0, classes - 1);
        const float* rates = block.rates + static_cast<std::size_t>(cls) * 2 * block.symbols;
        for (int set = 0; set < 4; ++set) {
            const int q = set >> 1;
            const float* rate = rates + static_cast<std::size_t>(q) * block.symbols;
            const float v = found.level[set][i];
            float best = found.cost[set][i] + rate[std::min(index_of(v, q), last)];
            // The next level towards zero, of the same parity.
            float inner = std::fabs(v) - 4.0f;
            if (set == 2 && inner < 0.0f) inner = std::fabs(v) >= 3.0f ? 0.0f : -1.0f;
            if (inner >= kInnermost[set]) {
                const float w = std::copysign(inner, v), d = u[i] - w;
                const float other = d * d + rate[std::min(index_of(w, q), last)];
                if (other < best) best = other, found.level[set][i] = w;
            }
            found.cost[set][i] = best;
        }
    }
}

#if defined(__AVX512F__) || defined(__AVX2__)

#if defined(__AVX512F__)
constexpr std::size_t kWidth = 16;
#else
constexpr std::size_t kWidth = 8;
#endif
using Floats = float __attribute__((vector_size(4 * kWidth)));
using Integers = std::int32_t __attribute__((vector_size(4 * kWidth)));

inline Floats gather(const float* from, Integers at) {
#if defined(__AVX512F__)
    return _mm512_i32gather_ps(reinterpret_cast<__m512i>(at), from, 4);
#else
    return _mm256_i32gather_ps(from, reinterpret_cast<__m256i>(at), 4);
#endif
}

template <typename T, typename V>
inline V load(const T* from) {
    V value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

// The same for as many rows as registers hold at a time; returns at which row it stopped.
std::size_t weigh_wide(const Block& block, std::size_t column, const float* u, Candidates& found) {
    const auto symbols = static_cast<std::int32_t>(block.symbols), last = symbols - 1;
    const auto top = static_cast<std::int32_t>(block.classes) - 1;
    std::size_t i = 0;
    for (; i + kWidth <= block.rows; i += kWidth) {
        Integers cls = load<std::int32_t, Integers>(block.row_class + i) + block.column_class[column];
        cls = cls < 0 ? Integers{} : cls;
        cls = cls > top ? Integers{} + top : cls;
        const Floats target = load<float, Floats>(u + i);
        for (int set = 0; set < 4; ++set) {
            const std::int32_t q = set >> 1;
            const Integers rates = (cls * 2 + q) * symbols;
            const auto rate = [&](Floats size) {  // of a level of this size
                const Integers k = (__builtin_convertvector(size, Integers) + q) >> 1;
                return gather(block.rates, rates + (k > last ? Integers{} + last : k));
            };
            const Floats v = load<float, Floats>(found.level[set].data() + i);
            const Integers sign = reinterpret_cast<Integers>(v) & std::numeric_limits<std::int32_t>::min();
            const Floats size = reinterpret_cast<Floats>(reinterpret_cast<Integers>(v) ^ sign);
            const Floats best = load<float, Floats>(found.cost[set].data() + i) + rate(size);
            Floats inner = size - 4.0f;
            if (set == 2) inner = (inner < 0.0f) & (size >= 3.0f) ? Floats{} : inner;
            const Integers exists = inner >= kInnermost[set];
            inner = exists ? inner : Floats{};
            const Floats w = reinterpret_cast<Floats>(reinterpret_cast<Integers>(inner) | sign), d = target - w;
            const Floats other = d * d + rate(inner);
            const Integers better = exists & (other < best);
            const Floats level = better ? w : v, cost = better ? other : best;
            __builtin_memcpy(found.level[set].data() + i, &level, sizeof level);
            __builtin_memcpy(found.cost[set].data() + i, &cost, sizeof cost);
        }
    }
    return i;
}

#else

std::size_t weigh_wide(const Block&, std::size_t, const float*, Candidates&) { return 0; }

#endif

// Survivor decisions of the Viterbi search: bit s of a row's mask says with which parity state s was entered.
class Viterbi {
  public:
    Viterbi(const Machine& machine, std::size_t rows)
        : machine_(machine), words_((machine.states + 15) / 16), decisions_(rows * words_), path_(machine.states) {
        next_.resize(machine.states);
    }

    void run(const Candidates& found, std::size_t start, std::size_t stop, float* levels) {
        std::fill(path_.begin(), path_.end(), 1e30f);
        path_[0] = 0.0f;
        forward(found, start, stop);
        unsigned state = static_cast<unsigned>(std::min_element(path_.begin(), path_.end()) - path_.begin());
        const unsigned half = machine_.states / 2;
        for (std::size_t i = stop; i-- > start;) {
            const unsigned parity = (decisions_[(i - start) * words_ + state / 16] >> (state % 16)) & 1u;
            const unsigned q = state >= half;
            levels[i] = found.level[2 * q + parity][i];
            state = ((state ^ (q ? machine_.h0 : 0u) ^ (parity ? machine_.h1 : 0u)) << 1) | q;
        }
    }

  private:
    void forward(const Candidates& found, std::size_t start, std::size_t stop);
    void step(const float* cost, std::uint16_t* decisions);

    const Machine machine_;
    const std::size_t words_;
    std::vector<std::uint16_t> decisions_;
    std::vector<float> path_, next_;
};

// One row: state s is entered from ((s ^ q·h0 ^ b·h1) << 1) | q, where q is the highest bit of s.
void Viterbi::step(const float* cost, std::uint16_t* decisions) {
    const unsigned half = machine_.states / 2;
    for (unsigned w = 0; w < words_; ++w) decisions[w] = 0;
    for (unsigned s = 0; s < machine_.states; ++s) {
        const unsigned q = s >= half, from = s ^ (q ? machine_.h0 : 0u);
        const float even = path_[(from << 1) | q] + cost[2 * q];
        const float odd = path_[((from ^ machine_.h1) << 1) | q] + cost[2 * q + 1];
        const bool take = odd < even;
        next_[s] = take ? odd : even;
        decisions[s / 16] = static_cast<std::uint16_t>(decisions[s / 16] | (unsigned{take} << (s % 16)));
    }
    path_.swap(next_);
}

#if defined(__AVX512F__)

void Viterbi::forward(const Candidates& found, std::size_t start, std::size_t stop) {
    const float* cost[4] = {found.cost[0].data(), found.cost[1].data(), found.cost[2].data(), found.cost[3].data()};
    if (machine_.states < 32) {
        for (std::size_t i = start; i < stop; ++i) {
            const float row[4] = {cost[0][i], cost[1][i], cost[2][i], cost[3][i]};
            step(row, decisions_.data() + (i - start) * words_);
        }
        return;
    }
    // 16 states at a time. The 32 of two neighbouring registers and those of the two whose number differs by h1 are all
    // that four registers of next states follow from.
    const unsigned pairs = machine_.states / 32, apart = machine_.h1 >> 4;
    __m512i lanes[2][2];
    unsigned moved[2];
    for (unsigned q = 0; q < 2; ++q) {
        moved[q] = (q ? machine_.h0 : 0u) >> 4;  // h0 sets the highest bit: states with q = 1 become the upper half
        for (unsigned b = 0; b < 2; ++b) {
            const unsigned change = (q ? machine_.h0 : 0u) ^ (b ? machine_.h1 : 0u);
            alignas(64) int index[16];
            for (unsigned lane = 0; lane < 16; ++lane) index[lane] = static_cast<int>(((lane ^ (change & 15)) << 1) | q);
            lanes[q][b] = _mm512_load_si512(index);
        }
    }
    float *path = path_.data(), *next = next_.data();
    for (std::size_t i = start; i < stop; ++i) {
        std::uint16_t* decisions = decisions_.data() + (i - start) * words_;
        __m512 costs[4];
        for (unsigned set = 0; set < 4; ++set) costs[set] = _mm512_set1_ps(cost[set][i]);
        for (unsigned p = 0; p < pairs; ++p) {
            const unsigned other = p ^ apart;
            if (other < p) continue;
            const __m512 from[2][2] = {{_mm512_loadu_ps(path + 32 * p), _mm512_loadu_ps(path + 32 * p + 16)},
                                       {_mm512_loadu_ps(path + 32 * other), _mm512_loadu_ps(path + 32 * other + 16)}};
            const auto enter = [&](unsigned q, unsigned v, const __m512* a, const __m512* b) {
                const __m512 even = _mm512_add_ps(_mm512_permutex2var_ps(a[0], lanes[q][0], a[1]), costs[2 * q]);
                const __m512 odd = _mm512_add_ps(_mm512_permutex2var_ps(b[0], lanes[q][1], b[1]), costs[2 * q + 1]);
                decisions[v] = _mm512_cmp_ps_mask(odd, even, _CMP_LT_OQ);
                _mm512_storeu_ps(next + 16 * v, _mm512_min_ps(odd, even));
            };
            for (unsigned q = 0; q < 2; ++q) {
                enter(q, p ^ moved[q], from[0], from[1]);
                enter(q, other ^ moved[q], from[1], from[0]);
            }
        }
        std::swap(path, next);
    }
    if (path != path_.data()) path_.swap(next_);
}

#elif defined(__AVX2__)

inline __m256 every_other(__m256 low, __m256 high, unsigned q) {
    return q ? _mm256_shuffle_ps(low, high, 0xDD) : _mm256_shuffle_ps(low, high, 0x88);
}

void Viterbi::forward(const Candidates& found, std::size_t start, std::size_t stop) {
    const float* cost[4] = {found.cost[0].data(), found.cost[1].data(), found.cost[2].data(), found.cost[3].data()};
    if (machine_.states < 16) {
        for (std::size_t i = start; i < stop; ++i) {
            const float row[4] = {cost[0][i], cost[1][i], cost[2][i], cost[3][i]};
            step(row, decisions_.data() + (i - start) * words_);
        }
        return;
    }
    // 8 states at a time. The 16 of two neighbouring registers and those of the two whose number differs by h1 are all
    // that four registers of next states follow from.
    const unsigned pairs = machine_.states / 16, apart = machine_.h1 >> 3;
    __m256i lanes[2][2];
    unsigned moved[2];
    for (unsigned q = 0; q < 2; ++q) {
        moved[q] = (q ? machine_.h0 : 0u) >> 3;  // h0 sets the highest bit: states with q = 1 become the upper half
        for (unsigned b = 0; b < 2; ++b) {
            const unsigned change = (q ? machine_.h0 : 0u) ^ (b ? machine_.h1 : 0u);
            // shuffle_ps leaves sources 0 1 4 5 2 3 6 7 of the eight; the permutation puts them right
            constexpr int place[8] = {0, 1, 4, 5, 2, 3, 6, 7};
            alignas(32) int index[8];
            for (unsigned lane = 0; lane < 8; ++lane) index[lane] = place[lane ^ (change & 7)];
            lanes[q][b] = _mm256_load_si256(reinterpret_cast<const __m256i*>(index));
        }
    }
    float *path = path_.data(), *next = next_.data();
    for (std::size_t i = start; i < stop; ++i) {
        auto* decisions = reinterpret_cast<std::uint8_t*>(decisions_.data() + (i - start) * words_);
        __m256 costs[4];
        for (unsigned set = 0; set < 4; ++set) costs[set] = _mm256_set1_ps(cost[set][i]);
        for (unsigned p = 0; p < pairs; ++p) {
            const unsigned other = p ^ apart;
            if (other < p) continue;
            const auto enter = [&](unsigned q, unsigned v, __m256 a, __m256 b) {
                const __m256 even = _mm256_add_ps(_mm256_permutevar8x32_ps(a, lanes[q][0]), costs[2 * q]);
                const __m256 odd = _mm256_add_ps(_mm256_permutevar8x32_ps(b, lanes[q][1]), costs[2 * q + 1]);
                const __m256 take = _mm256_cmp_ps(odd, even, _CMP_LT_OQ);
                decisions[v] = static_cast<std::uint8_t>(_mm256_movemask_ps(take));
                _mm256_storeu_ps(next + 8 * v, _mm256_min_ps(odd, even));
            };
            const __m256 low[2] = {_mm256_loadu_ps(path + 16 * p), _mm256_loadu_ps(path + 16 * other)};
            const __m256 high[2] = {_mm256_loadu_ps(path + 16 * p + 8), _mm256_loadu_ps(path + 16 * other + 8)};
            for (unsigned q = 0; q < 2; ++q) {
                const __m256 from[2] = {every_other(low[0], high[0], q), every_other(low[1], high[1], q)};
                enter(q, p ^ moved[q], from[0], from[1]);
                enter(q, other ^ moved[q], from[1], from[0]);
            }
        }
        std::swap(path, next);
    }
    if (path != path_.data()) path_.swap(next_);
}

#else

// to[i] = from[i ^ change], four at a time in a way that compilers turn into shuffles.
template <unsigned within>
void exchange(const float* __restrict from, unsigned count, unsigned change, float* __restrict to) {
    for (unsigned i = 0; i < count; i += 4) {
        const float* source = from + (i ^ (change & ~3u));
        for (unsigned lane = 0; lane < 4; ++lane) to[i + lane] = source[lane ^ within];
    }
}

void Viterbi::forward(const Candidates& found, std::size_t start, std::size_t stop) {
    constexpr void (*exchanges[4])(const float*, unsigned, unsigned, float*) = {exchange<0>, exchange<1>, exchange<2>,
                                                                                exchange<3>};
    const unsigned states = machine_.states, half = states / 2;
    std::vector<float> entered(states), even(half), odd(half);
    std::vector<std::uint8_t> taken(states);
    for (std::size_t i = start; i < stop; ++i) {
        const float row[4] = {found.cost[0][i], found.cost[1][i], found.cost[2][i], found.cost[3][i]};
        std::uint16_t* decisions = decisions_.data() + (i - start) * words_;
        if (states < 16) { step(row, decisions); continue; }
        for (unsigned s = 0; s < half; ++s) entered[s] = path_[2 * s], entered[half + s] = path_[2 * s + 1];
        for (unsigned q = 0; q < 2; ++q) {
            const unsigned stay = q ? machine_.h0 ^ half : 0u, move = stay ^ machine_.h1;  // h0 sets the highest bit
            exchanges[stay & 3](entered.data() + q * half, half, stay, even.data());
            exchanges[move & 3](entered.data() + q * half, half, move, odd.data());
            float* __restrict next = next_.data() + q * half;
            std::uint8_t* __restrict take = taken.data() + q * half;
            for (unsigned s = 0; s < half; ++s) {
                const float a = even[s] + row[2 * q], b = odd[s] + row[2 * q + 1];
                next[s] = b < a ? b : a;
                take[s] = b < a;
            }
        }
        for (unsigned w = 0; w < words_; ++w) {
            unsigned bits[2];
            for (unsigned h = 0; h < 2; ++h) {  // the product gathers the lowest bits of eight bytes in the highest byte
                std::uint64_t bytes;
                __builtin_memcpy(&bytes, taken.data() + 16 * w + 8 * h, sizeof bytes);
                bits[h] = static_cast<unsigned>((bytes * 0x0102040810204080u) >> 56);
            }
            decisions[w] = static_cast<std::uint16_t>(bits[0] | (bits[1] << 8));
        }
        path_.swap(next_);
    }
}

#endif

}  // namespace

void quantize(const Block& block) {
    const std::size_t rows = block.rows;
    std::vector<float> u(rows), levels(rows);
    Candidates found(rows);
    Viterbi viterbi(*machine_of(block.states == 1 ? 4 : block.states), std::min(rows, block.segment));
    for (std::size_t j = 0; j < block.columns; ++j) {
        float* __restrict target = block.target + j * rows;
        const float step = block.column_step[j];
        for (std::size_t i = 0; i < rows; ++i)
            u[i] = std::clamp(target[i] / (block.row_step[i] * step), -kLimit, kLimit);
        if (block.states == 1) {
            for (std::size_t i = 0; i < rows; ++i) levels[i] = nearest(u[i]);
        } else {
            find(u.data(), rows, found);
            if (block.rates != nullptr) weigh(block, j, u.data(), weigh_wide(block, j, u.data(), found), found);
            for (std::size_t start = 0; start < rows; start += block.segment)
                viterbi.run(found, start, std::min(start + block.segment, rows), levels.data());
        }
        const float* __restrict weight = block.weight + j * rows;
        float* __restrict error = block.error + j * rows;
        std::int32_t* __restrict out = block.levels + j * rows;
        for (std::size_t i = 0; i < rows; ++i) {
            error[i] = weight[i] - levels[i] * (block.row_step[i] * step);
            out[i] = static_cast<std::int32_t>(levels[i]);
        }
        for (std::size_t k = j + 1; k < block.columns; ++k) {
            const float feed = block.feedback[k * block.columns + j];
            float* __restrict other = block.target + k * rows;
            for (std::size_t i = 0; i < rows; ++i) other[i] += error[i] * feed;
        }
    }
}

}  // namespace tenpak::TENPAK_ISA
