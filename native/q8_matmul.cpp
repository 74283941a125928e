// The kernel of q8_matmul.h. No other header than those of the compiler: this file is compiled for AVX-512, and an
// inline function of the standard library that the linker took from here would crash other CPUs.
//
// A panel of 16 matrix rows is turned so that each lane of a vector belongs to one row: 4 bytes of each row side by side
// are one operand of VPDPBUSD, 4 bytes of the activations in all lanes the other. So the sum of a block needs no
// horizontal step, and an activation costs 8 multiply-adds and 3 more instructions for 512 products. VPDPBUSD takes
// unsigned times signed bytes: 128 is added to the weights (by xor), and 128 * sum(activations) taken off the start.
//
// Each sum is made of the same operations in the same order for every number of columns, so a row of activations gives
// the same bits whatever is computed beside it.

#include "q8_matmul.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__) && defined(__F16C__)

#if defined(__GNUC__) && !defined(__clang__)
// gcc 12's own headers make vectors "undefined" by initialising them with themselves, and it warns of that.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include <immintrin.h>

namespace swarmcpp {

namespace {

inline uint64_t load_scale(const uint8_t *block) {
    uint16_t half;
    __builtin_memcpy(&half, block, sizeof half);
    return half;
}

// Scales of 4 rows. In general registers: those of vectors have enough to do.
inline int64_t four_scales(const uint8_t *const rows[PANEL], int first, size_t offset) {
    return static_cast<int64_t>(load_scale(rows[first] + offset) | load_scale(rows[first + 1] + offset) << 16 |
                                load_scale(rows[first + 2] + offset) << 32 | load_scale(rows[first + 3] + offset) << 48);
}

inline __m512i two_rows(const uint8_t *low, const uint8_t *high) {
    const __m512i first = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(low)));
    return _mm512_inserti64x4(first, _mm256_loadu_si256(reinterpret_cast<const __m256i *>(high)), 1);
}

struct Turned {
    __m512i quants[8];
    __m512 scales;
};

// The block at `offset` of 16 rows.
inline __attribute__((always_inline)) Turned turn(const uint8_t *const rows[PANEL], size_t offset) {
    const size_t at = offset + 2;
    __m512i a[8], t[8], u[8];
    for (int r = 0; r < 4; ++r) {
        a[r] = two_rows(rows[r] + at, rows[r + 4] + at);
        a[r + 4] = two_rows(rows[r + 8] + at, rows[r + 12] + at);
    }
    for (int r = 0; r < 8; r += 2) {
        t[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        t[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
    for (int r = 0; r < 8; r += 4) {
        u[r] = _mm512_unpacklo_epi64(t[r], t[r + 2]);
        u[r + 1] = _mm512_unpackhi_epi64(t[r], t[r + 2]);
        u[r + 2] = _mm512_unpacklo_epi64(t[r + 1], t[r + 3]);
        u[r + 3] = _mm512_unpackhi_epi64(t[r + 1], t[r + 3]);
    }
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    Turned turned;
    for (int g = 0; g < 4; ++g) {
        turned.quants[g] = _mm512_xor_si512(_mm512_shuffle_i32x4(u[g], u[g + 4], 0x88), sign);
        turned.quants[g + 4] = _mm512_xor_si512(_mm512_shuffle_i32x4(u[g], u[g + 4], 0xDD), sign);
    }
    turned.scales = _mm512_cvtph_ps(_mm256_set_epi64x(four_scales(rows, 12, offset), four_scales(rows, 8, offset),
                                                      four_scales(rows, 4, offset), four_scales(rows, 0, offset)));
    return turned;
}

inline Turned load(const Q8Panel &panel) {
    Turned turned;
    for (int g = 0; g < 8; ++g) {
        turned.quants[g] = _mm512_load_si512(panel.quants[g]);
    }
    turned.scales = _mm512_load_ps(panel.scales);
    return turned;
}

inline __m512i four_bytes(const int8_t *quants) {
    int32_t word;
    __builtin_memcpy(&word, quants, sizeof word);
    return _mm512_set1_epi32(word);
}

inline __attribute__((always_inline)) __m512 accumulate(__m512 sum, const Turned &weights, const Q8Activation &block) {
    __m512i product = _mm512_set1_epi32(block.bias);
    for (int g = 0; g < 8; ++g) {
        product = _mm512_dpbusd_epi32(product, weights.quants[g], four_bytes(block.quants + 4 * g));
    }
    const __m512 scale = _mm512_mul_ps(weights.scales, _mm512_set1_ps(block.scale));
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(product), scale, sum);
}

// N columns from `first` against the panel that `source(block)` gives.
template <int N, typename Source>
inline __attribute__((always_inline)) void tile(Source source, int64_t n_blocks, const Columns &columns, int64_t first,
                                                int64_t row, __mmask16 there) {
    const Q8Activation *blocks = columns.activations + first * n_blocks;
    __m512 sums[N];
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) {
        sums[c] = _mm512_setzero_ps();
    }
    for (int64_t b = 0; b < n_blocks; ++b) {
        const Turned weights = source(b);
#pragma GCC unroll 16
        for (int c = 0; c < N; ++c) {
            sums[c] = accumulate(sums[c], weights, blocks[c * n_blocks + b]);
        }
    }
    float *out = columns.out + first * columns.out_stride + row;
#pragma GCC unroll 16
    for (int c = 0; c < N; ++c) {
        _mm512_mask_storeu_ps(out + c * columns.out_stride, there, sums[c]);
    }
}

template <typename Source>
inline __attribute__((always_inline)) void any_tile(Source source, int64_t n_blocks, const Columns &columns,
                                                    int64_t first, int64_t count, int64_t row, __mmask16 there) {
    switch (count) {
#define SWARMCPP_TILE(N) \
    case N: return tile<N>(source, n_blocks, columns, first, row, there);
        SWARMCPP_TILE(1) SWARMCPP_TILE(2) SWARMCPP_TILE(3) SWARMCPP_TILE(4) SWARMCPP_TILE(5) SWARMCPP_TILE(6)
        SWARMCPP_TILE(7) SWARMCPP_TILE(8) SWARMCPP_TILE(9) SWARMCPP_TILE(10) SWARMCPP_TILE(11) SWARMCPP_TILE(12)
        SWARMCPP_TILE(13) SWARMCPP_TILE(14) SWARMCPP_TILE(15) SWARMCPP_TILE(16)
#undef SWARMCPP_TILE
    }
}

}  // namespace

bool q8_matmul_supported() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
}

void q8_quantize(const float *values, int64_t n_blocks, Q8Activation *out) {
    for (int64_t b = 0; b < n_blocks; ++b, values += Q8_BLOCK, ++out) {
        const __m512 low = _mm512_loadu_ps(values), high = _mm512_loadu_ps(values + 16);
        const float largest = _mm512_reduce_max_ps(_mm512_max_ps(_mm512_abs_ps(low), _mm512_abs_ps(high)));
        // Of a NaN the largest value knows nothing.
        const bool numbers = _mm512_cmp_ps_mask(low, high, _CMP_UNORD_Q) == 0;
        const __m512 inverse = _mm512_set1_ps(largest != 0.0F ? 127.0F / largest : 0.0F);
        const __m512i first = _mm512_cvtps_epi32(_mm512_mul_ps(low, inverse));
        const __m512i second = _mm512_cvtps_epi32(_mm512_mul_ps(high, inverse));
        auto *quants = reinterpret_cast<__m128i *>(out->quants);
        _mm_storeu_si128(quants, _mm512_cvtsepi32_epi8(first));
        _mm_storeu_si128(quants + 1, _mm512_cvtsepi32_epi8(second));
        const float scale = _cvtsh_ss(_cvtss_sh(largest / 127.0F, _MM_FROUND_TO_NEAREST_INT));
        out->scale = numbers && largest < __builtin_inff() ? scale : __builtin_nanf("");
        out->bias = -128 * _mm512_reduce_add_epi32(_mm512_add_epi32(first, second));
    }
}

void q8_multiply_panel(const Q8Matrix &matrix, int64_t first_row, const Columns &columns, Q8Panel *scratch) {
    const int64_t left = matrix.n_rows - first_row;
    const auto there = static_cast<__mmask16>(left >= PANEL ? 0xFFFF : (1U << left) - 1);
    const uint8_t *rows[PANEL];
    for (int r = 0; r < PANEL; ++r) {
        rows[r] = matrix.data + static_cast<size_t>(first_row + (r < left ? r : 0)) * matrix.row_bytes;
    }
    // Rows lie behind one another, and are read side by side: the next panel is fetched in the order of the memory.
    const uint8_t *ahead = matrix.data + static_cast<size_t>(first_row + PANEL) * matrix.row_bytes;
    const uint8_t *end = matrix.data + static_cast<size_t>(matrix.n_rows) * matrix.row_bytes;
    const size_t step = matrix.row_bytes * PANEL / static_cast<size_t>(matrix.n_blocks);
    const auto raw = [&](int64_t b) __attribute__((always_inline)) {
        const uint8_t *next = ahead + static_cast<size_t>(b) * step;
        for (size_t line = 0; line < step && next + line < end; line += 64) {
            _mm_prefetch(reinterpret_cast<const char *>(next + line), _MM_HINT_T1);
        }
        return turn(rows, static_cast<size_t>(b) * Q8_BLOCK_BYTES);
    };
    if (columns.count <= TILE) {
        return any_tile(raw, matrix.n_blocks, columns, 0, columns.count, first_row, there);
    }
    for (int64_t b = 0; b < matrix.n_blocks; ++b) {
        const Turned turned = raw(b);
        for (int g = 0; g < 8; ++g) {
            _mm512_store_si512(scratch[b].quants[g], turned.quants[g]);
        }
        _mm512_store_ps(scratch[b].scales, turned.scales);
    }
    const auto packed = [&](int64_t b) __attribute__((always_inline)) { return load(scratch[b]); };
    for (int64_t first = 0; first < columns.count; first += TILE) {
        const int64_t rest = columns.count - first;
        any_tile(packed, matrix.n_blocks, columns, first, rest < TILE ? rest : TILE, first_row, there);
    }
}

}  // namespace swarmcpp

#else

namespace swarmcpp {

bool q8_matmul_supported() { return false; }
void q8_quantize(const float *, int64_t, Q8Activation *) {}
void q8_multiply_panel(const Q8Matrix &, int64_t, const Columns &, Q8Panel *) {}

}  // namespace swarmcpp

#endif
