// Compiled once per instruction set, with TENPAK_ISA naming the namespace; multiply-adds are fused where it has them.
//
// A panel of levels, some rows by kDepth columns, is expanded to FP32 in a buffer that stays in the cache, and multiplied
// with one group of inputs after another: kRows rows by kInputs inputs of sums are kept in registers.
#include "product.hpp"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace tenpak::TENPAK_ISA {
namespace {

#if defined(__AVX512F__)
constexpr std::size_t kWidth = 16, kInputs = 4;
#elif defined(__AVX2__)
constexpr std::size_t kWidth = 8, kInputs = 2;
#else
constexpr std::size_t kWidth = 4, kInputs = 2;
#endif
constexpr std::size_t kRows = 4;
constexpr std::size_t kPanel = 64;    // rows of a panel for many inputs
constexpr std::size_t kDepth = 1024;  // kRows rows and kInputs inputs of it fit the first-level cache
// Rows that begin a multiple of 4096 bytes apart would share its sets.
constexpr std::size_t kSpare = 16;
constexpr std::size_t kWorth = 1 << 19;  // products that a thread is started for

using Floats = float __attribute__((vector_size(4 * kWidth)));

inline Floats load(const float* from) {
    Floats value;
    __builtin_memcpy(&value, from, sizeof value);
    return value;
}

inline float total(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps(v);
#else
    float part[kWidth];
    __builtin_memcpy(part, &v, sizeof v);
    for (std::size_t half = kWidth / 2; half > 0; half /= 2)
        for (std::size_t i = 0; i < half; ++i) part[i] += part[i + half];
    return part[0];
#endif
}

// Adds the products of kRows rows and some inputs to sums[input][row].
template <std::size_t inputs>
void multiply(const float* weight, std::size_t weight_stride, const float* x, std::size_t x_stride, std::size_t depth,
              float* sums, std::size_t sums_stride) {
    Floats sum[inputs][kRows] = {};
    for (std::size_t k = 0; k < depth; k += kWidth) {
        Floats w[kRows];
#pragma GCC unroll 8
        for (std::size_t r = 0; r < kRows; ++r) w[r] = load(weight + r * weight_stride + k);
#pragma GCC unroll 8
        for (std::size_t j = 0; j < inputs; ++j) {
            const Floats v = load(x + j * x_stride + k);
#pragma GCC unroll 8
            for (std::size_t r = 0; r < kRows; ++r) sum[j][r] += w[r] * v;
        }
    }
    for (std::size_t j = 0; j < inputs; ++j)
        for (std::size_t r = 0; r < kRows; ++r) sums[j * sums_stride + r] += total(sum[j][r]);
}

using Multiply = void (*)(const float*, std::size_t, const float*, std::size_t, std::size_t, float*, std::size_t);
constexpr Multiply kMultiply[] = {nullptr, multiply<1>, multiply<2>
#if defined(__AVX512F__)
                                  , multiply<3>, multiply<4>
#endif
};

template <typename Level>
float value(Level level) {
    return static_cast<float>(level);
}
inline float value(std::uint8_t code) { return static_cast<float>(code - 128); }

std::size_t up(std::size_t value, std::size_t step) { return (value + step - 1) / step * step; }

// Rows first … last, with inputs that are scaled and filled up with zeros.
template <typename Level>
void some_rows(const Product<Level>& p, const std::vector<float>& x, std::size_t x_stride, std::size_t first,
               std::size_t last) {
    // Few inputs: what is expanded is used at once, from the first-level cache.
    const std::size_t panel = p.count <= kInputs ? kRows : kPanel, stride = kDepth + kSpare;
    std::vector<float> weight(panel * stride), sums(p.count * panel);
    for (std::size_t row = first; row < last; row += panel) {
        const std::size_t rows = std::min(panel, last - row);
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (std::size_t start = 0; start < p.columns; start += kDepth) {
            const std::size_t filled = std::min(kDepth, p.columns - start), depth = up(filled, kWidth);
            for (std::size_t r = 0; r < up(rows, kRows); ++r) {
                float* __restrict to = weight.data() + r * stride;
                const std::size_t known = r < rows ? filled : 0;
                const Level* __restrict from = p.levels + std::min(row + r, last - 1) * p.columns + start;
                for (std::size_t k = 0; k < known; ++k) to[k] = value(from[k]);
                std::fill(to + known, to + depth, 0.0f);
            }
            for (std::size_t j = 0; j < p.count; j += kInputs)
                for (std::size_t r = 0; r < rows; r += kRows)
                    kMultiply[std::min(kInputs, p.count - j)](weight.data() + r * stride, stride,
                                                              x.data() + j * x_stride + start, x_stride, depth,
                                                              sums.data() + j * panel + r, panel);
        }
        for (std::size_t j = 0; j < p.count; ++j)
            for (std::size_t r = 0; r < rows; ++r)
                p.y[j * p.rows + row + r] = sums[j * panel + r] * p.row_scale[row + r];
    }
}

template <typename Level>
void all_rows(const Product<Level>& p) {
    const std::size_t x_stride = up(p.columns, kWidth) + kSpare;
    std::vector<float> x(p.count * x_stride);
    for (std::size_t j = 0; j < p.count; ++j)
        for (std::size_t k = 0; k < p.columns; ++k) x[j * x_stride + k] = p.x[j * p.columns + k] * p.column_scale[k];
    const std::size_t worth = std::max<std::size_t>(p.count * p.rows * p.columns / kWorth, 1);
    const std::size_t threads = std::clamp<std::size_t>(p.threads, 1, worth);
    const std::size_t share = up((p.rows + threads - 1) / threads, kRows);
    std::vector<std::thread> others;
    others.reserve(threads);
    for (std::size_t first = share; first < p.rows; first += share) {
        const auto work = [&, first] { some_rows(p, x, x_stride, first, std::min(first + share, p.rows)); };
        try {
            others.emplace_back(work);
        } catch (const std::system_error&) {  // the system gives no more threads
            work();
        }
    }
    some_rows(p, x, x_stride, 0, std::min(share, p.rows));
    for (std::thread& other : others) other.join();
}

}  // namespace

void product(const Product<std::uint8_t>& p) { all_rows(p); }
void product(const Product<std::int8_t>& p) { all_rows(p); }
void product(const Product<std::int16_t>& p) { all_rows(p); }
void product(const Product<std::int32_t>& p) { all_rows(p); }

}  // namespace tenpak::TENPAK_ISA
