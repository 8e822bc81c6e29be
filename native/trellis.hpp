// Trellis-coded quantization of one block of columns with exact feedback between them.
//
// The trellis runs along the rows of a column. Its state selects one of two scalar quantizers, Q0 = {2k} and
// Q1 = {2k - sgn k}, k the index that is coded, in units of the step; the parity of k moves the state. The state
// machines are Ungerboeck's codes for amplitude modulation ("Channel coding with multilevel/phase signals", 1982, table
// I) in systematic feedback form, as entropy-coded trellis quantization uses them (Fischer and Wang, 1992; Joshi and
// Fischer, 1995).
#pragma once

#include <cstddef>
#include <cstdint>

namespace tenpak {

// The state machine of a power-of-two number of states: Q of a state is its lowest bit, and parity b moves state s to
// (s >> 1) ^ (Q ? h0 : 0) ^ (b ? h1 : 0).
struct Machine {
    unsigned states, h0, h1;
};

// Null where there is no machine with so many states.
const Machine* machine_of(unsigned states);

struct Block {
    std::size_t rows, columns;
    const float* weight;         // [columns][rows]
    float* target;               // [columns][rows]: weight and the feedback of earlier blocks; used up
    float* error;                // [columns][rows]: weight minus reconstruction
    std::int32_t* levels;        // [columns][rows]: reconstruction in steps
    const float* feedback;       // [columns][columns]: [k][j] is what the error of column j adds to k > j
    const float* row_step;       // [rows]
    const float* column_step;    // [columns]
    const float* rates;          // [classes][2][symbols]: cost of coding |k|, in squared steps; null for none
    const std::int32_t* row_class;     // [rows]
    const std::int32_t* column_class;  // [columns]
    std::size_t classes, symbols;
    unsigned states;             // 1: a uniform quantizer
    std::size_t segment;         // rows after which the trellis starts anew
};

// One variant per instruction set; all give the same results to the bit.
namespace generic { void quantize(const Block&); }
namespace avx2 { void quantize(const Block&); }
namespace avx512 { void quantize(const Block&); }

}  // namespace tenpak
