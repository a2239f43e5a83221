// One decoder layer for a few tokens, on the model's own weights: norms, projections, rotary positions, attention and
// MLP in one call, so that a decoded token costs little more than reading the weights once.
//
// Arithmetic is in float32 throughout; states, keys and values are rounded to the model's type where they are stored.
// The structs are mirrored in structs.py.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <type_traits>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

struct bf16 { uint16_t bits; };
struct int4 { uint8_t pair; };  // numbers i and i + 16 of 32

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t vec_bits __attribute__((vector_size(64), aligned(4)));
typedef int32_t vec_int __attribute__((vector_size(64), aligned(4)));
typedef uint16_t vec_half __attribute__((vector_size(32), aligned(2)));
typedef int8_t vec_byte __attribute__((vector_size(16), aligned(1)));
constexpr int LANES = 16;
constexpr int64_t AHEAD = 3072;  // bytes that are fetched ahead, at least

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
enum Norm : int32_t { RMS = 0, LAYER = 1 };
enum Rotary : int32_t { NONE = 0, HALVES = 1, PAIRS = 2 };
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum Residual : int32_t { SEQUENTIAL = 0, PARALLEL_ONE_NORM = 1, PARALLEL_TWO_NORMS = 2 };

// A linear map. Output r lies in row (r / group) * group_stride + r % group of the weight, and so do its bias and scale;
// if transposed, in column r.
struct Matrix {
    const void* weight;
    const void* bias;     // null for none
    const float* scale;   // for INT8 a float of each output; for INT4 a scale and an offset of each 32 inputs
    int64_t stride;       // elements between rows of the weight; pairs of them for INT4
    int32_t outputs, inputs;
    int32_t group, group_stride;
    int32_t transposed;
    int32_t kind;

    int64_t row(int output) const {
        return output < group ? output : int64_t(output / group) * group_stride + output % group;
    }
};

struct NormWeights {
    const void* weight;
    const void* bias;
    float eps;
    int32_t kind;
};

struct Layer {
    NormWeights input_norm, mlp_norm, query_norm, key_norm;  // weight null: there is none
    Matrix query, key, value, output, gate, up, down;        // gate.weight null: the MLP is not gated
    int32_t kind;  // of norms, biases, states, keys and values
    int32_t width, heads, kv_heads, head_dim;
    int32_t rotary, rotary_width, activation, residual;
    float scale;
};

// The tokens of one call: token m of `count` lies at place[m] of states, cos, sin and mask; its keys and values belong
// into slot start + column[m] of row row[m] of the cache.
struct Tokens {
    const void* states;   // [P, D]
    void* result;         // [count, D]
    const void* cos;      // [P, rotary_width]
    const void* sin;
    const void* mask;     // [P, mask_stride], additive, or null: a token sees all slots up to its own
    void* keys;           // [B, H, capacity, Dh]
    void* values;
    const int64_t* place;
    const int64_t* row;
    const int64_t* column;
    float* scratch;       // what NativeLayer.floats says for each token, then used + LANES for each thread
    int64_t row_stride, head_stride, mask_stride, start;
    int32_t count, used, threads;
};

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline void store(float* at, float x) { *at = x; }
static inline void store(bf16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) { return (vec)(__builtin_convertvector(*(const vec_half*)p, vec_bits) << 16); }
static inline vec load(const int8_t* p) {
#ifdef __AVX512F__  // compilers make sixteen single conversions of the other
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#else
    return __builtin_convertvector(*(const vec_byte*)p, vec);
#endif
}
static inline float widen(int8_t x) { return x; }
// The 32 numbers whose pairs are at p.
static inline void load(const int4* p, vec& low, vec& high) {
#ifdef __AVX512F__
    __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    low = (vec)_mm512_cvtepi32_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
    high = (vec)_mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 4));
#else
    for (int i = 0; i < LANES; i++) low[i] = p[i].pair & 15, high[i] = p[i].pair >> 4;
#endif
}
static inline float sum(vec v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    eight h[2];
    std::memcpy(h, &v, sizeof v);
    h[0] += h[1];
    quarter q[2];
    std::memcpy(q, &h[0], sizeof q);
    q[0] += q[1];
    return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

// exp, to about two units in the last place (range reduction to |r| <= ln2/2 and a polynomial).
static inline vec exponential(vec x) {
    x = x < -87.0f ? (vec{} - 87.0f) : x;
    x = x > 88.0f ? (vec{} + 88.0f) : x;
    vec t = x * 1.44269504f;
    vec_int whole = __builtin_convertvector(t + (t < 0.0f ? (vec{} - 0.5f) : (vec{} + 0.5f)), vec_int);
    vec n = __builtin_convertvector(whole, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((whole + 127) << 23);
}

struct Range { int first, last; };

// A vector for each token. The space between them keeps the vectors of many tokens from competing for one place in the cache.
struct Rows {
    float* data;
    int64_t stride;
    float* operator[](int64_t m) const { return data + m * stride; }
};

// Takes vectors of some width for `count` tokens from the scratch.
static inline Rows take(float*& scratch, int64_t count, int64_t width) {
    Rows rows = {scratch, width + LANES};
    scratch += count * rows.stride;
    return rows;
}

// The part of `count` things that falls to a thread, in multiples of `unit`.
static inline Range share(int count, int unit, int thread, int threads) {
    int64_t units = (count + unit - 1) / unit;
    return {int(std::min<int64_t>(count, units * thread / threads * unit)),
            int(std::min<int64_t>(count, units * (thread + 1) / threads * unit))};
}

// Rows times tokens. On the first pass over some rows, those `ahead` numbers further on are fetched, which are the next:
// rows are too short for the processor to notice by itself where it will go on. Loops over rows and tokens are unrolled,
// so that the sums stay in registers.
template <class W, int R, int M, bool FIRST>
static inline void dots(const W* const* rows, int64_t ahead, const float* x, int64_t x_stride, int inputs,
                        float (&out)[R][M]) {
    vec sums[R][M] = {};
    int i = 0;
    for (; i + LANES <= inputs; i += LANES) {
        vec w[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            w[r] = load(rows[r] + i);
            if (FIRST) __builtin_prefetch(rows[r] + ahead + i);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            vec v = load(x + m * x_stride + i);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sums[r][m] += w[r] * v;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            float total = sum(sums[r][m]);
            for (int j = i; j < inputs; j++) total += widen(rows[r][j]) * x[m * x_stride + j];
            out[r][m] = total;
        }
}

// The same for rows of 4-bit numbers; `scales` points to scale and offset of each 32 numbers of each row.
template <int R, int M, bool FIRST>
static inline void dots(const int4* const* rows, const float* const* scales, int64_t ahead, const float* x,
                        int64_t x_stride, int inputs, float (&out)[R][M]) {
    vec sums[R][M] = {};
    for (int g = 0; g < inputs / (2 * LANES); g++) {
        vec low[R], high[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            load(rows[r] + g * LANES, low[r], high[r]);
            float scale = scales[r][2 * g], offset = scales[r][2 * g + 1];
            low[r] = low[r] * scale + offset;
            high[r] = high[r] * scale + offset;
            if (FIRST && g % 4 == 0) __builtin_prefetch(rows[r] + ahead + g * LANES);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float* at = x + m * x_stride + g * 2 * LANES;
            vec first = load(at), second = load(at + LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) sums[r][m] += low[r] * first + high[r] * second;
        }
    }
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) out[r][m] = sum(sums[r][m]);
}

template <class W, int R>
static void rows_product(const Matrix& matrix, int first, Rows x, int tokens, Rows y) {
    constexpr bool grouped = std::is_same<W, int4>::value;
    const W* rows[R];
    const float* groups[R];
    float scales[R];
    for (int r = 0; r < R; r++) {
        int64_t row = matrix.row(first + r);
        rows[r] = (const W*)matrix.weight + row * matrix.stride;
        groups[r] = matrix.scale + row * (matrix.inputs / LANES);
        scales[r] = matrix.kind == INT8 ? matrix.scale[row] : 1.0f;
    }
    // Far enough for memory to answer in time: rows of small numbers are over soon.
    const int64_t ahead = std::max<int64_t>(R * matrix.stride, AHEAD / sizeof(W));
    int m = 0;
    auto run = [&](auto width) {
        constexpr int M = decltype(width)::value;
        for (; m + M <= tokens; m += M) {
            float out[R][M];
            if constexpr (grouped) {
                if (m == 0)
                    dots<R, M, true>(rows, groups, ahead, x[m], x.stride, matrix.inputs, out);
                else
                    dots<R, M, false>(rows, groups, 0, x[m], x.stride, matrix.inputs, out);
            } else if (m == 0) {
                dots<W, R, M, true>(rows, ahead, x[m], x.stride, matrix.inputs, out);
            } else {
                dots<W, R, M, false>(rows, 0, x[m], x.stride, matrix.inputs, out);
            }
            for (int r = 0; r < R; r++)
                for (int k = 0; k < M; k++) y[m + k][first + r] = out[r][k] * scales[r];
        }
    };
    if constexpr (R <= 3) run(std::integral_constant<int, 8>{});  // as many sums as there are registers
    run(std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
}

// The thread's columns of x W for a weight [inputs, outputs], read row after row. The sums of as many columns as fit into
// the nearest cache are kept up to date.
template <class W>
static void columns_product(const Matrix& matrix, Range range, Rows x, int tokens, Rows y) {
    const W* weight = (const W*)matrix.weight;
    int64_t stride = matrix.stride;
    int tile = std::max(8 * LANES, 4096 / tokens / LANES * LANES);
    for (int first = range.first; first < range.last; first += tile) {
        int last = std::min(range.last, first + tile), i = 0;
        for (int m = 0; m < tokens; m++) std::fill(y[m] + first, y[m] + last, 0.0f);
        auto run = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            for (; i + R <= matrix.inputs; i += R) {
                int at = first;
                for (; at + LANES <= last; at += LANES) {
                    vec w[R];
#pragma GCC unroll 8
                    for (int r = 0; r < R; r++) {
                        w[r] = load(weight + (i + r) * stride + at);
                        __builtin_prefetch(weight + (i + r + R) * stride + at);
                    }
                    for (int m = 0; m < tokens; m++) {
                        vec total = load(y[m] + at);
#pragma GCC unroll 8
                        for (int r = 0; r < R; r++) total += w[r] * x[m][i + r];
                        *(vec*)(y[m] + at) = total;
                    }
                }
                for (; at < last; at++)
                    for (int m = 0; m < tokens; m++)
                        for (int r = 0; r < R; r++) y[m][at] += widen(weight[(i + r) * stride + at]) * x[m][i + r];
            }
        };
        run(std::integral_constant<int, 8>{});
        run(std::integral_constant<int, 1>{});
    }
}

// The thread's share of x W^T + b, for vectors x of as many tokens. Returns that share.
template <class W, class T>
static Range product_of(const Matrix& matrix, Rows x, int tokens, Rows y, int thread, int threads) {
    Range range = share(matrix.outputs, matrix.transposed ? 4 * LANES : 12, thread, threads);
    if (matrix.transposed) {
        if constexpr (!std::is_same<W, int4>::value) columns_product<W>(matrix, range, x, tokens, y);
    } else {
        int r = range.first;
        auto run = [&](auto rows) {
            constexpr int R = decltype(rows)::value;
            for (; r + R <= range.last; r += R) rows_product<W, R>(matrix, r, x, tokens, y);
        };
        if (tokens >= 8) run(std::integral_constant<int, 3>{});
        if (tokens >= 4 || std::is_same<W, int4>::value) run(std::integral_constant<int, 4>{});
        run(std::integral_constant<int, 2>{});
        run(std::integral_constant<int, 1>{});
    }
    if (matrix.bias)
        for (int m = 0; m < tokens; m++)
            for (int r = range.first; r < range.last; r++) y[m][r] += widen(((const T*)matrix.bias)[matrix.row(r)]);
    return range;
}

template <class T>
static Range product(const Matrix& matrix, Rows x, int tokens, Rows y, int thread, int threads) {
    if (matrix.kind == INT4) return product_of<int4, T>(matrix, x, tokens, y, thread, threads);
    if (matrix.kind == INT8) return product_of<int8_t, T>(matrix, x, tokens, y, thread, threads);
    return product_of<T, T>(matrix, x, tokens, y, thread, threads);
}

template <class T, class X>
static void normalise(const NormWeights& norm, const X* x, float* y, int width) {
    const T *weight = (const T*)norm.weight, *bias = (const T*)norm.bias;
    float mean = 0, squares = 0;
    if (norm.kind == LAYER) {
        for (int i = 0; i < width; i++) mean += widen(x[i]);
        mean /= width;
    }
    for (int i = 0; i < width; i++) {
        float d = widen(x[i]) - mean;
        squares += d * d;
    }
    float factor = 1.0f / std::sqrt(squares / width + norm.eps);
    for (int i = 0; i < width; i++)
        y[i] = (widen(x[i]) - mean) * factor * (weight ? widen(weight[i]) : 1.0f) + (bias ? widen(bias[i]) : 0.0f);
}

template <class T>
static void rotate(const Layer& layer, float* head, const T* cos, const T* sin) {
    int half = layer.rotary_width / 2;
    for (int i = 0; i < half; i++) {
        int a = layer.rotary == PAIRS ? 2 * i : i, b = layer.rotary == PAIRS ? 2 * i + 1 : i + half;
        float x = head[a], y = head[b];
        head[a] = x * widen(cos[a]) - y * widen(sin[a]);
        head[b] = y * widen(cos[b]) + x * widen(sin[b]);
    }
}

// Norm over the head and rotary positions, in place.
template <class T>
static void place_head(const Layer& layer, const NormWeights& norm, const Tokens& tokens, int64_t place, float* head) {
    if (norm.weight) normalise<T>(norm, head, head, layer.head_dim);
    if (layer.rotary == NONE) return;
    int64_t at = place * layer.rotary_width;
    rotate(layer, head, (const T*)tokens.cos + at, (const T*)tokens.sin + at);
}

// Attention of one query head over the slots of one row; `scores` has room for all of them.
template <class T>
static void attend(const Layer& layer, const Tokens& tokens, int m, int head, const float* query, float* out,
                   float* scores) {
    int dim = layer.head_dim, kv_head = head / (layer.heads / layer.kv_heads);
    int64_t base = tokens.row[m] * tokens.row_stride + kv_head * tokens.head_stride;
    const T *keys = (const T*)tokens.keys + base, *values = (const T*)tokens.values + base;
    const T* mask = tokens.mask ? (const T*)tokens.mask + tokens.place[m] * tokens.mask_stride : nullptr;
    int slots = mask ? tokens.used : int(tokens.start + tokens.column[m]) + 1;
    float most = -INFINITY;
    for (int s = 0; s < slots; s++) {
        const T* key = keys + int64_t(s) * dim;
        vec sums = {};
        int i = 0;
        for (; i + LANES <= dim; i += LANES) sums += load(key + i) * load(query + i);
        float score = sum(sums);
        for (; i < dim; i++) score += widen(key[i]) * query[i];
        score = score * layer.scale + (mask ? widen(mask[s]) : 0.0f);
        scores[s] = score;
        most = std::max(most, score);
    }
    for (int s = slots; s % LANES; s++) scores[s] = -INFINITY;
    vec totals = {};
    for (int s = 0; s < slots; s += LANES) {
        vec weights = exponential(load(scores + s) - most);
        for (int i = 0; s + LANES > slots && i < LANES; i++)
            if (s + i >= slots) weights[i] = 0;
        *(vec*)(scores + s) = weights;
        totals += weights;
    }
    float factor = 1.0f / sum(totals);
    std::fill(out, out + dim, 0.0f);
    for (int i = 0; i + LANES <= dim; i += LANES) {
        vec sums = {};
        for (int s = 0; s < slots; s++) sums += load(values + int64_t(s) * dim + i) * scores[s];
        *(vec*)(out + i) = sums * factor;
    }
    for (int i = dim / LANES * LANES; i < dim; i++) {
        float total = 0;
        for (int s = 0; s < slots; s++) total += widen(values[int64_t(s) * dim + i]) * scores[s];
        out[i] = total * factor;
    }
}

static void activate(Activation kind, float* x, int count) {
    int i = 0;
    for (; i < count && kind == RELU; i++) x[i] = std::max(x[i], 0.0f);
    for (; i < count && kind == GELU; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
    for (; i < count; i += LANES) {
        vec v = {};
        int some = std::min(LANES, count - i);
        std::memcpy(&v, x + i, some * sizeof(float));
        // tanh(z) = 1 - 2 / (exp(2 z) + 1): both are v times a sigmoid.
        vec z = kind == SILU ? v : 1.5957691216f * (v + 0.044715f * v * v * v);
        v = v / (1.0f + exponential(-z));
        std::memcpy(x + i, &v, some * sizeof(float));
    }
}

// Keys and values of all tokens from their normed states, into the cache. Has barriers: all threads call it.
template <class T>
static void write_cache(const Layer& layer, const Tokens& tokens, Rows normed, Rows keys, Rows values, int thread,
                        int threads) {
    int dim = layer.head_dim;
    product<T>(layer.key, normed, tokens.count, keys, thread, threads);
    product<T>(layer.value, normed, tokens.count, values, thread, threads);
#pragma omp barrier
    Range range = share(tokens.count * layer.kv_heads, 1, thread, threads);
    for (int task = range.first; task < range.last; task++) {
        int m = task / layer.kv_heads, head = task % layer.kv_heads;
        float* key = keys[m] + head * dim;
        const float* value = values[m] + head * dim;
        place_head<T>(layer, layer.key_norm, tokens, tokens.place[m], key);
        int64_t slot = tokens.start + tokens.column[m];
        int64_t at = tokens.row[m] * tokens.row_stride + head * tokens.head_stride + slot * dim;
        for (int i = 0; i < dim; i++) {
            store((T*)tokens.keys + at + i, key[i]);
            store((T*)tokens.values + at + i, value[i]);
        }
    }
#pragma omp barrier
}

// States of all tokens behind a norm. Has a barrier.
template <class T>
static void norm_all(const Layer& layer, const NormWeights& norm, const Tokens& tokens, Rows normed, int thread,
                     int threads) {
    Range range = share(tokens.count, 1, thread, threads);
    for (int m = range.first; m < range.last; m++)
        normalise<T>(norm, (const T*)tokens.states + tokens.place[m] * layer.width, normed[m], layer.width);
#pragma omp barrier
}

template <class T>
static void project(const Layer& layer, const Tokens& tokens) {
    float* scratch = tokens.scratch;
    Rows normed = take(scratch, tokens.count, layer.width);
    Rows keys = take(scratch, tokens.count, layer.kv_heads * layer.head_dim);
    Rows values = take(scratch, tokens.count, layer.kv_heads * layer.head_dim);
#pragma omp parallel num_threads(tokens.threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        norm_all<T>(layer, layer.input_norm, tokens, normed, thread, threads);
        write_cache<T>(layer, tokens, normed, keys, values, thread, threads);
    }
}

template <class T>
static void run(const Layer& layer, const Tokens& tokens) {
    int count = tokens.count, width = layer.width, dim = layer.head_dim, inner = layer.up.outputs;
    float* scratch = tokens.scratch;
    Rows normed = take(scratch, count, width), summed = take(scratch, count, width), changed = take(scratch, count, width);
    Rows keys = take(scratch, count, layer.kv_heads * dim), values = take(scratch, count, layer.kv_heads * dim);
    Rows queries = take(scratch, count, layer.heads * dim), attended = take(scratch, count, layer.heads * dim);
    Rows gates = take(scratch, count, inner), ups = take(scratch, count, inner);
    Rows scores = {scratch, (tokens.used + LANES - 1) / LANES * LANES};
    const T* states = (const T*)tokens.states;
    T* result = (T*)tokens.result;
#pragma omp parallel num_threads(tokens.threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        norm_all<T>(layer, layer.input_norm, tokens, normed, thread, threads);
        product<T>(layer.query, normed, count, queries, thread, threads);
        write_cache<T>(layer, tokens, normed, keys, values, thread, threads);

        Range range = share(count * layer.heads, 1, thread, threads);
        for (int task = range.first; task < range.last; task++) {
            int m = task / layer.heads, head = task % layer.heads;
            float* query = queries[m] + head * dim;
            place_head<T>(layer, layer.query_norm, tokens, tokens.place[m], query);
            attend<T>(layer, tokens, m, head, query, attended[m] + head * dim, scores[thread]);
        }
#pragma omp barrier
        range = product<T>(layer.output, attended, count, summed, thread, threads);
        for (int m = 0; m < count; m++)
            for (int r = range.first; r < range.last; r++) summed[m][r] += widen(states[tokens.place[m] * width + r]);
#pragma omp barrier
        if (layer.residual != PARALLEL_ONE_NORM) {
            range = share(count, 1, thread, threads);
            for (int m = range.first; m < range.last; m++) {
                if (layer.residual == SEQUENTIAL)
                    normalise<T>(layer.mlp_norm, summed[m], normed[m], width);
                else
                    normalise<T>(layer.mlp_norm, states + tokens.place[m] * width, normed[m], width);
            }
#pragma omp barrier
        }
        range = product<T>(layer.up, normed, count, ups, thread, threads);
        if (layer.gate.weight) product<T>(layer.gate, normed, count, gates, thread, threads);
        for (int m = 0; m < count; m++) {
            int some = range.last - range.first;
            float *up = ups[m] + range.first, *gate = gates[m] + range.first;
            activate(Activation(layer.activation), layer.gate.weight ? gate : up, some);
            for (int i = 0; layer.gate.weight && i < some; i++) up[i] *= gate[i];
        }
#pragma omp barrier
        range = product<T>(layer.down, ups, count, changed, thread, threads);
        for (int m = 0; m < count; m++)
            for (int r = range.first; r < range.last; r++)
                store(result + int64_t(m) * width + r, summed[m][r] + changed[m][r]);
    }
}

template <class T>
static void linear(const Matrix& matrix, const T* x, T* y, int tokens, float* scratch, int most) {
    Rows wide = take(scratch, tokens, matrix.inputs), out = take(scratch, tokens, matrix.outputs);
    for (int m = 0; m < tokens; m++)
        for (int i = 0; i < matrix.inputs; i++) wide[m][i] = widen(x[int64_t(m) * matrix.inputs + i]);
#pragma omp parallel num_threads(most)
    {
        Range range = product<T>(matrix, wide, tokens, out, omp_get_thread_num(), omp_get_num_threads());
        for (int m = 0; m < tokens; m++)
            for (int r = range.first; r < range.last; r++) store(y + int64_t(m) * matrix.outputs + r, out[m][r]);
    }
}

extern "C" {

// Run the layer for the tokens: their keys and values go into the cache, their new states into `result`.
void anee_run(const Layer* layer, const Tokens* tokens) {
    layer->kind == BFLOAT16 ? run<bf16>(*layer, *tokens) : run<float>(*layer, *tokens);
}

// Write the tokens' keys and values alone.
void anee_project(const Layer* layer, const Tokens* tokens) {
    layer->kind == BFLOAT16 ? project<bf16>(*layer, *tokens) : project<float>(*layer, *tokens);
}

// y [M, outputs] = x [M, inputs] W^T + b, in a model of `kind`; scratch has M * (inputs + outputs + 32) floats.
void anee_linear(const Matrix* matrix, const void* x, void* y, int32_t tokens, int32_t kind, float* scratch,
                 int32_t threads) {
    kind == BFLOAT16 ? linear(*matrix, (const bf16*)x, (bf16*)y, tokens, scratch, threads)
                     : linear(*matrix, (const float*)x, (float*)y, tokens, scratch, threads);
}
}
