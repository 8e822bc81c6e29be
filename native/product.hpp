// Products with a weight that stays in its levels: y = (x · column scale) · levelsᵀ · row scale.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tenpak {

template <typename Level>
struct Product {
    std::size_t count, rows, columns;
    const float* x;             // [count][columns]
    const Level* levels;        // [rows][columns]; a uint8 is 128 more than its level
    const float* row_scale;     // [rows]
    const float* column_scale;  // [columns]
    float* y;                   // [count][rows]
    std::size_t threads;
};

// Each y is added up in an order of its own variant's, whatever the number of threads.
namespace generic {
void product(const Product<std::uint8_t>&);
void product(const Product<std::int8_t>&);
void product(const Product<std::int16_t>&);
void product(const Product<std::int32_t>&);
}
namespace avx2 {
void product(const Product<std::uint8_t>&);
void product(const Product<std::int8_t>&);
void product(const Product<std::int16_t>&);
void product(const Product<std::int32_t>&);
}
namespace avx512 {
void product(const Product<std::uint8_t>&);
void product(const Product<std::int8_t>&);
void product(const Product<std::int16_t>&);
void product(const Product<std::int32_t>&);
}

}  // namespace tenpak
