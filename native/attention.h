// Attention of some rows over a cache of halves, for CPUs with AVX2, F16C and FMA.

#pragma once

#include <cstddef>
#include <cstdint>

namespace swarmcpp {

constexpr int64_t ATTENTION_LANES = 8;      // items that one vector has side by side
constexpr int64_t ATTENTION_BLOCK = 64;     // positions whose keys and values are converted at a time
constexpr int64_t ATTENTION_CHUNK = 128;    // positions that are summed apart, so that threads can share one row
constexpr int64_t ATTENTION_MAX_DIM = 256;  // of a head

// Where a tensor of floats or halves is; strides in bytes.
struct Strided {
    const char *data;
    size_t row, head, stream;
};

// Queries [stream][head][row][dk] of floats, keys and values [stream][kv head][position][dk or dv] of halves, a mask
// [stream][row][position] of halves that is added (data null: none), and the result [stream][row][head][dv] of floats.
// Each kv head serves n_heads / n_kv_heads neighbouring heads.
struct Attention {
    int64_t dk, dv, n_positions, n_rows, n_heads, n_kv_heads, n_streams;
    float scale;
    Strided queries, keys, values, mask;
    int64_t mask_streams;  // the mask's streams, which repeat
    float *out;

    int64_t group() const { return n_heads / n_kv_heads; }
    int64_t items() const { return n_rows * group(); }  // a row of one head, of those that share keys and values
    int64_t chunks() const { return (n_positions + ATTENTION_CHUNK - 1) / ATTENTION_CHUNK; }
};

// `count` items from `first` of one kv head in one stream; `count` is at most `lanes`, which is
// ATTENTION_LANES or a multiple of twice that.
struct AttentionItems {
    int64_t stream, kv_head, first, count, lanes;
};

// Whether this CPU has what the kernel needs, and the compiler could build it.
bool attention_supported();

// Whether the kernel can compute heads of these sizes.
bool attention_fits(int64_t dk, int64_t dv);

// Floats of what is known of `lanes` items: their largest scores, the sums of weights, the sums of values.
size_t attention_state(const Attention &call, int64_t lanes);

// Floats that `attention_chunk` and `attention_whole` need for a while.
size_t attention_scratch(const Attention &call, int64_t lanes);

// The state of these items after the positions of one chunk alone.
void attention_chunk(const Attention &call, const AttentionItems &items, int64_t chunk, float *scratch, float *state);

// `total`, to which the chunk after those before is added.
void attention_add(const Attention &call, int64_t lanes, float *total, const float *state);

// A state of no position.
void attention_begin(const Attention &call, int64_t lanes, float *state);

// The items' results.
void attention_end(const Attention &call, const AttentionItems &items, const float *total);

// All chunks of these items, one after another.
void attention_whole(const Attention &call, const AttentionItems &items, float *scratch);

}  // namespace swarmcpp
