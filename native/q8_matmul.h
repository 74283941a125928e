// Products of Q8_0 matrices with rows of floats, for CPUs with AVX-512 VNNI.

#pragma once

#include <cstddef>
#include <cstdint>

namespace swarmcpp {

constexpr int Q8_BLOCK = 32;        // ggml's QK8_0: values that share a scale
constexpr size_t Q8_BLOCK_BYTES = 34;  // a half scale, then 32 bytes (ggml's block_q8_0)
constexpr int PANEL = 16;           // matrix rows that are computed side by side, one in each lane of a vector
constexpr int TILE = 16;            // columns whose sums stay in registers

// 32 values of a row of activations: `scale * quants[i]`, rounded as ggml's quantize_row_q8_0 rounds them.
struct Q8Activation {
    int8_t quants[Q8_BLOCK];
    float scale;
    int32_t bias;  // -128 * sum(quants): what the unsigned weights of the kernel have too much
};

// 16 matrix rows of one block, byte by byte across the rows, and their scales.
struct alignas(64) Q8Panel {
    uint8_t quants[8][64];
    float scales[PANEL];
};

struct Q8Matrix {
    const uint8_t *data;
    size_t row_bytes;
    int64_t n_rows;
    int64_t n_blocks;  // of each row
};

struct Columns {
    const Q8Activation *activations;  // n_blocks of the first column, then those of the next
    float *out;                       // of the first column; out[row] for each matrix row
    int64_t out_stride;               // floats from one column to the next
    int64_t count;
};

// Whether this CPU has what the kernel needs, and the compiler could build it.
bool q8_matmul_supported();

// `n_blocks` * 32 floats. What is not finite gets the scale NaN, so that it is in the result, too.
void q8_quantize(const float *values, int64_t n_blocks, Q8Activation *out);

// out[column][row] for the 16 matrix rows from `first_row` (fewer at the end). `scratch` holds n_blocks panels.
void q8_multiply_panel(const Q8Matrix &matrix, int64_t first_row, const Columns &columns, Q8Panel *scratch);

}  // namespace swarmcpp
