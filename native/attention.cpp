// The kernel of attention.h. No other header than those of the compiler: this file is compiled for AVX2, and an inline
// function of the standard library that the linker took from here would crash other CPUs.
//
// Lanes of vectors are items (rows of heads that share keys and values), so a score, a weight and a sum of values need
// no horizontal step, and keys and values, converted once for all items, are broadcast. ggml's own kernel computes row
// after row and converts them for each; its tiled one takes over at 64 rows, and rounds differently.
//
// Softmax is summed online (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"), chunk by chunk,
// and chunks are added in their order. Each item's sums are made of the same operations in the same order whatever is
// computed beside it, by however many threads, and however many masked positions follow: so verifying a guess gives
// the bits of computing it alone.

#include "attention.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)

#include <immintrin.h>

namespace swarmcpp {

namespace {

constexpr int64_t BLOCK = ATTENTION_BLOCK;
constexpr int64_t PARTS = 4;             // sums of weights of a block that are kept apart, position by position
constexpr uint16_t HALF_NEVER = 0xFC00;  // minus infinity

// Floats of 8 * V items.
template <int V>
struct Lanes {
    static constexpr int64_t WIDTH = 8 * V;
    // Positions, or dimensions of values, that are computed together: with as many sums the multiply-adds of 4 to 5
    // cycles never wait, and two operands have registers as well.
    static constexpr int64_t TOGETHER = 8 / V;

    __m256 part[V];

    template <typename F>
    static inline __attribute__((always_inline)) Lanes each(F function) {
        Lanes made;
        for (int v = 0; v < V; ++v) {
            made.part[v] = function(v);
        }
        return made;
    }
    static Lanes load(const float *at) {
        return each([&](int v) { return _mm256_loadu_ps(at + 8 * v); });
    }
    static Lanes same(float value) {
        return each([&](int) { return _mm256_set1_ps(value); });
    }
    void store(float *at) const {
        for (int v = 0; v < V; ++v) {
            _mm256_storeu_ps(at + 8 * v, part[v]);
        }
    }
    Lanes operator+(const Lanes &other) const {
        return each([&](int v) { return _mm256_add_ps(part[v], other.part[v]); });
    }
    Lanes operator-(const Lanes &other) const {
        return each([&](int v) { return _mm256_sub_ps(part[v], other.part[v]); });
    }
    Lanes operator*(const Lanes &other) const {
        return each([&](int v) { return _mm256_mul_ps(part[v], other.part[v]); });
    }
    Lanes largest(const Lanes &other) const {
        return each([&](int v) { return _mm256_max_ps(part[v], other.part[v]); });
    }
};

// e^x for x <= 0, 0 below -87 (floats would soon be denormal). x = n ln 2 + r, |r| <= ln 2 / 2, and e^r by the first
// eight terms of its series: off by less than 1e-8. ln 2 is taken off in two parts (Cody and Waite), the first with few
// bits.
inline __m256 exponential(__m256 x) {
    constexpr int NEAREST = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), NEAREST);
    const __m256 bounded = _mm256_max_ps(n, _mm256_set1_ps(-126.0f));
    __m256 r = _mm256_fnmadd_ps(bounded, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(bounded, _mm256_set1_ps(-2.12194440e-4f), r);
    constexpr float TERMS[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
    __m256 sum = _mm256_set1_ps(1.0f / 5040);
    for (const float term : TERMS) {
        sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(term));
    }
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(bounded), _mm256_set1_epi32(127)), 23);
    const __m256 found = _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
    return _mm256_and_ps(found, _mm256_cmp_ps(x, _mm256_set1_ps(-87.0f), _CMP_NLT_UQ));
}

template <int V>
inline Lanes<V> exponential(const Lanes<V> &x) {
    return Lanes<V>::each([&](int v) { return exponential(x.part[v]); });
}

// 0 where nothing has a weight yet: what is taken off minus infinity must be finite.
template <int V>
inline Lanes<V> finite(const Lanes<V> &most) {
    const __m256 never = _mm256_set1_ps(-__builtin_inff());
    return Lanes<V>::each([&](int v) {
        return _mm256_andnot_ps(_mm256_cmp_ps(most.part[v], never, _CMP_EQ_OQ), most.part[v]);
    });
}

template <int V>
inline bool all_ones(const Lanes<V> &factors) {
    int ones = 0xFF;
    for (int v = 0; v < V; ++v) {
        ones &= _mm256_movemask_ps(_mm256_cmp_ps(factors.part[v], _mm256_set1_ps(1.0f), _CMP_EQ_OQ));
    }
    return ones == 0xFF;
}

void to_floats(const char *halves, float *out, int64_t count) {
    const auto *at = reinterpret_cast<const __m128i *>(halves);
    for (int64_t i = 0; i < count; i += 8) {
        _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(at + i / 8)));
    }
}

// sums[j][lane] += sum over i of factors[i * step + j * stride] * items[i][lane], for TOGETHER values of j.
template <int V>
inline __attribute__((always_inline)) void accumulate(const float *factors, int64_t step, int64_t stride,
                                                      const float *items, int64_t count, Lanes<V> *sums) {
    for (int64_t i = 0; i < count; ++i) {
        const auto item = Lanes<V>::load(items + i * Lanes<V>::WIDTH);
        for (int64_t j = 0; j < Lanes<V>::TOGETHER; ++j) {
            const __m256 factor = _mm256_broadcast_ss(factors + i * step + j * stride);
            for (int v = 0; v < V; ++v) {
                sums[j].part[v] = _mm256_fmadd_ps(factor, item.part[v], sums[j].part[v]);
            }
        }
    }
}

enum class Mask { none, some, all };

// What the mask says of BLOCK positions (fewer at the end) for one row.
Mask kind(const uint16_t *row, int64_t count) {
    uint16_t any = 0;
    bool all = true;
    for (int64_t i = 0; i < count; ++i) {
        any |= row[i];
        all &= row[i] == HALF_NEVER;
    }
    return all ? Mask::all : any || count < BLOCK ? Mask::some : Mask::none;
}

struct Scratch {
    float *keys, *values, *mask, *queries;

    Scratch(const Attention &call, float *at)
        : keys(at),
          values(keys + BLOCK * call.dk),
          mask(values + BLOCK * call.dv),
          queries(mask + BLOCK * Lanes<2>::WIDTH) {}
};

struct State {
    float *most, *weights, *sums;

    State(const float *at, int64_t lanes)
        : most(const_cast<float *>(at)), weights(most + lanes), sums(weights + lanes) {}
};

const uint16_t *mask_row(const Attention &call, const AttentionItems &items, int64_t item, int64_t position) {
    const int64_t row = (items.first + item) / call.group(), stream = items.stream % call.mask_streams;
    return reinterpret_cast<const uint16_t *>(call.mask.data + static_cast<size_t>(row) * call.mask.row +
                                              static_cast<size_t>(stream) * call.mask.stream) +
           position;
}

// The mask of `width` items from `from`, by position and lane.
void turn_mask(const Attention &call, const AttentionItems &items, int64_t from, int64_t width, int64_t position,
               int64_t count, float *out) {
    float row[BLOCK];
    int64_t known = -1;
    for (int64_t lane = 0; lane < width; ++lane) {
        const int64_t item = from + lane;
        // Lanes without an item are as the last one: nobody reads them.
        const int64_t which = item < items.count ? (items.first + item) / call.group() : known;
        if (which != known) {
            known = which;
            const uint16_t *halves = call.mask.data ? mask_row(call, items, item, position) : nullptr;
            for (int64_t i = 0; i < BLOCK; ++i) {
                row[i] = _cvtsh_ss(i >= count ? HALF_NEVER : halves ? halves[i] : uint16_t{0});
            }
        }
        for (int64_t i = 0; i < BLOCK; ++i) {
            out[i * width + lane] = row[i];
        }
    }
}

Mask kind_of_all(const Attention &call, const AttentionItems &items, int64_t position, int64_t count) {
    if (!call.mask.data) {
        return count < BLOCK ? Mask::some : Mask::none;
    }
    bool none = true, all = true;
    const int64_t group = call.group(), last = (items.first + items.count - 1) / group;
    for (int64_t row = items.first / group; row <= last; ++row) {
        const int64_t item = row * group < items.first ? 0 : row * group - items.first;
        const Mask each = kind(mask_row(call, items, item, position), count);
        none &= each == Mask::none;
        all &= each == Mask::all;
    }
    return all ? Mask::all : none ? Mask::none : Mask::some;
}

// Scores of a block, then weights, of Lanes<V> items; `scores` holds as many floats for each position.
template <int V>
inline void weigh(const Attention &call, const float *keys, const float *queries, const float *mask, float *scores,
                  float *most, float *weights, float *sums) {
    using L = Lanes<V>;
    const L scale = L::same(call.scale);
    L top = L::same(-__builtin_inff());
    for (int64_t at = 0; at < BLOCK; at += L::TOGETHER) {
        L found[L::TOGETHER];
        for (L &each : found) {
            each = L::same(0);
        }
        accumulate<V>(keys + at * call.dk, 1, call.dk, queries, call.dk, found);
        for (int64_t j = 0; j < L::TOGETHER; ++j) {
            L score = found[j] * scale;
            if (mask) {
                score = score + L::load(mask + (at + j) * L::WIDTH);
            }
            top = top.largest(score);
            score.store(scores + (at + j) * L::WIDTH);
        }
    }
    const L before = L::load(most), after = before.largest(top), taken = finite(after);
    const L shrink = exponential(before - taken);
    L all[PARTS];
    for (L &each : all) {
        each = L::same(0);
    }
    for (int64_t at = 0; at < BLOCK; at += PARTS) {
        for (int64_t j = 0; j < PARTS; ++j) {
            float *place = scores + (at + j) * L::WIDTH;
            const L weight = exponential(L::load(place) - taken);
            weight.store(place);
            all[j] = all[j] + weight;
        }
    }
    after.store(most);
    (L::load(weights) * shrink + ((all[0] + all[1]) + (all[2] + all[3]))).store(weights);
    if (!all_ones(shrink)) {
        for (int64_t d = 0; d < call.dv; ++d) {
            (L::load(sums + d * L::WIDTH) * shrink).store(sums + d * L::WIDTH);
        }
    }
}

template <int V>
inline void sum_values(const Attention &call, const float *values, const float *scores, float *sums) {
    using L = Lanes<V>;
    for (int64_t d = 0; d < call.dv; d += L::TOGETHER) {
        L found[L::TOGETHER];
        for (int64_t j = 0; j < L::TOGETHER; ++j) {
            found[j] = L::load(sums + (d + j) * L::WIDTH);
        }
        accumulate<V>(values + d, call.dv, 1, scores, BLOCK, found);
        for (int64_t j = 0; j < L::TOGETHER; ++j) {
            found[j].store(sums + (d + j) * L::WIDTH);
        }
    }
}

// How many lanes lie side by side: all of a few, else those of two vectors.
int64_t width_of(int64_t lanes) { return lanes < Lanes<2>::WIDTH ? Lanes<1>::WIDTH : Lanes<2>::WIDTH; }

const char *place(const Strided &tensor, int64_t row, int64_t head, int64_t stream) {
    return tensor.data + static_cast<size_t>(row) * tensor.row + static_cast<size_t>(head) * tensor.head +
           static_cast<size_t>(stream) * tensor.stream;
}

// The queries of all items, by dimension and lane.
void turn_queries(const Attention &call, const AttentionItems &items, float *out) {
    const int64_t group = call.group(), width = width_of(items.lanes);
    __builtin_memset(out, 0, static_cast<size_t>(items.lanes * call.dk) * sizeof(float));
    for (int64_t item = 0; item < items.count; ++item) {
        float *to = out + item / width * width * call.dk + item % width;
        const int64_t index = items.first + item;
        const auto *from = reinterpret_cast<const float *>(
            place(call.queries, index / group, items.kv_head * group + index % group, items.stream));
        for (int64_t d = 0; d < call.dk; ++d) {
            to[d * width] = from[d];
        }
    }
}

void convert(const Attention &call, const AttentionItems &items, int64_t position, int64_t count, const Scratch &scratch) {
    for (int64_t i = 0; i < BLOCK; ++i) {
        float *keys = scratch.keys + i * call.dk, *values = scratch.values + i * call.dv;
        if (i < count) {
            to_floats(place(call.keys, position + i, items.kv_head, items.stream), keys, call.dk);
            to_floats(place(call.values, position + i, items.kv_head, items.stream), values, call.dv);
        } else {
            __builtin_memset(keys, 0, static_cast<size_t>(call.dk) * sizeof(float));
            __builtin_memset(values, 0, static_cast<size_t>(call.dv) * sizeof(float));
        }
    }
}

template <int V>
void chunk_of(const Attention &call, const AttentionItems &items, int64_t chunk, const Scratch &scratch, float *at) {
    constexpr int64_t WIDTH = Lanes<V>::WIDTH;
    const State state(at, items.lanes);
    const int64_t first = chunk * ATTENTION_CHUNK;
    const int64_t end = first + ATTENTION_CHUNK < call.n_positions ? first + ATTENTION_CHUNK : call.n_positions;
    float scores[BLOCK * WIDTH];
    for (int64_t position = first; position < end; position += BLOCK) {
        const int64_t count = end - position < BLOCK ? end - position : BLOCK;
        const Mask masked = kind_of_all(call, items, position, count);
        if (masked == Mask::all) {
            continue;
        }
        convert(call, items, position, count, scratch);
        for (int64_t from = 0; from < items.count; from += WIDTH) {
            if (masked == Mask::some) {
                turn_mask(call, items, from, WIDTH, position, count, scratch.mask);
            }
            float *sums = state.sums + from * call.dv;
            weigh<V>(call, scratch.keys, scratch.queries + from * call.dk, masked == Mask::some ? scratch.mask : nullptr,
                     scores, state.most + from, state.weights + from, sums);
            sum_values<V>(call, scratch.values, scores, sums);
        }
    }
}

void any_chunk_of(const Attention &call, const AttentionItems &items, int64_t chunk, const Scratch &scratch, float *at) {
    attention_begin(call, items.lanes, at);
    if (width_of(items.lanes) == Lanes<1>::WIDTH) {
        chunk_of<1>(call, items, chunk, scratch, at);
    } else {
        chunk_of<2>(call, items, chunk, scratch, at);
    }
}

}  // namespace

bool attention_supported() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool attention_fits(int64_t dk, int64_t dv) {
    return dk > 0 && dv > 0 && dk % 8 == 0 && dv % 8 == 0 && dk <= ATTENTION_MAX_DIM && dv <= ATTENTION_MAX_DIM;
}

size_t attention_state(const Attention &call, int64_t lanes) { return static_cast<size_t>(lanes * (2 + call.dv)); }

size_t attention_scratch(const Attention &call, int64_t lanes) {
    return static_cast<size_t>(BLOCK * (call.dk + call.dv + Lanes<2>::WIDTH) + lanes * call.dk) +
           2 * attention_state(call, lanes);
}

void attention_begin(const Attention &call, int64_t lanes, float *state) {
    __builtin_memset(state, 0, attention_state(call, lanes) * sizeof(float));
    for (int64_t lane = 0; lane < lanes; ++lane) {
        state[lane] = -__builtin_inff();
    }
}

void attention_chunk(const Attention &call, const AttentionItems &items, int64_t chunk, float *scratch, float *state) {
    const Scratch parts(call, scratch);
    turn_queries(call, items, parts.queries);
    any_chunk_of(call, items, chunk, parts, state);
}

void attention_add(const Attention &call, int64_t lanes, float *total, const float *state) {
    using L = Lanes<1>;
    const State whole(total, lanes), part(state, lanes);
    const int64_t width = width_of(lanes);
    for (int64_t from = 0; from < lanes; from += L::WIDTH) {
        const L before = L::load(whole.most + from), own = L::load(part.most + from), most = before.largest(own);
        const L old_share = exponential(before - finite(most)), own_share = exponential(own - finite(most));
        const auto join = [&](float *to, const float *other) {
            (L::load(to) * old_share + L::load(other) * own_share).store(to);
        };
        most.store(whole.most + from);
        join(whole.weights + from, part.weights + from);
        const int64_t begin = from / width * width * call.dv + from % width;
        for (int64_t d = 0; d < call.dv; ++d) {
            join(whole.sums + begin + d * width, part.sums + begin + d * width);
        }
    }
}

void attention_end(const Attention &call, const AttentionItems &items, const float *total) {
    const State state(total, items.lanes);
    const int64_t group = call.group(), width = width_of(items.lanes);
    for (int64_t item = 0; item < items.count; ++item) {
        const int64_t index = items.first + item, head = items.kv_head * group + index % group;
        float *out = call.out + ((items.stream * call.n_rows + index / group) * call.n_heads + head) * call.dv;
        const float *sums = state.sums + item / width * width * call.dv + item % width;
        const float share = state.weights[item] == 0.0f ? 0.0f : 1.0f / state.weights[item];
        for (int64_t d = 0; d < call.dv; ++d) {
            out[d] = sums[d * width] * share;
        }
    }
}

void attention_whole(const Attention &call, const AttentionItems &items, float *scratch) {
    const Scratch parts(call, scratch);
    float *total = parts.queries + items.lanes * call.dk, *state = total + attention_state(call, items.lanes);
    turn_queries(call, items, parts.queries);
    attention_begin(call, items.lanes, total);
    for (int64_t chunk = 0; chunk < call.chunks(); ++chunk) {
        any_chunk_of(call, items, chunk, parts, state);
        attention_add(call, items.lanes, total, state);
    }
    attention_end(call, items, total);
}

}  // namespace swarmcpp

#else

namespace swarmcpp {

bool attention_supported() { return false; }
bool attention_fits(int64_t, int64_t) { return false; }
size_t attention_state(const Attention &, int64_t) { return 0; }
size_t attention_scratch(const Attention &, int64_t) { return 0; }
void attention_begin(const Attention &, int64_t, float *) {}
void attention_chunk(const Attention &, const AttentionItems &, int64_t, float *, float *) {}
void attention_add(const Attention &, int64_t, float *, const float *) {}
void attention_end(const Attention &, const AttentionItems &, const float *) {}
void attention_whole(const Attention &, const AttentionItems &, float *) {}

}  // namespace swarmcpp

#endif
