// One decoder layer for a few tokens, on the model's own weights: norms, projections, rotary positions, attention and
// MLP in one call, so that a decoded token costs little more than reading the weights once.
//
// Arithmetic is in float32 throughout; states, keys and values are rounded to the model's type where they are stored.
// The structs are mirrored in structs.py.

#include <omp.h>

#include "products.h"

enum Norm : int32_t { RMS = 0, LAYER = 1 };
enum Rotary : int32_t { NONE = 0, HALVES = 1, PAIRS = 2 };
enum Activation : int32_t { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };
enum Residual : int32_t { SEQUENTIAL = 0, PARALLEL_ONE_NORM = 1, PARALLEL_TWO_NORMS = 2 };

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
    const int32_t* kept;  // [B, kept_stride], the slots that a row's new token sees, kept_count [B] of them; null for all
    const int32_t* kept_count;
    float* scratch;       // what NativeLayer.floats says for each token, then used + LANES for each thread
    int64_t row_stride, head_stride, mask_stride, kept_stride, start;
    int32_t count, used, threads;
};

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

// The slots that a token's attention looks at: those listed for its row, or all up to a number.
struct Seen {
    const int32_t* list;
    int count;
    int64_t operator[](int s) const { return list ? list[s] : s; }
};

static Seen seen_by(const Tokens& tokens, int m) {
    int64_t row = tokens.row[m];
    if (tokens.kept) return {tokens.kept + row * tokens.kept_stride, tokens.kept_count[row]};
    return {nullptr, tokens.mask ? tokens.used : int(tokens.start + tokens.column[m]) + 1};
}

// The query's products with the keys it sees, times `scale`, plus the mask; returns the largest.
template <class T>
static float match(const T* keys, const T* mask, Seen seen, const float* query, int dim, float scale, float* scores) {
    vec most = vec{} - INFINITY;
    for (int s = 0; s < seen.count; s += LANES) {
        const T* rows[LANES];
        for (int k = 0; k < LANES; k++) rows[k] = keys + seen[std::min(s + k, seen.count - 1)] * dim;
        vec sums[LANES] = {};
        int i = 0;
        for (; i + LANES <= dim; i += LANES) {
            vec q = load(query + i);
#pragma GCC unroll 16
            for (int k = 0; k < LANES; k++) sums[k] += load(rows[k] + i) * q;
        }
        vec found = sums_of(sums);
        for (; i < dim; i++)
            for (int k = 0; k < LANES; k++) found[k] += widen(rows[k][i]) * query[i];
        found *= scale;
        int some = std::min(LANES, seen.count - s);
        for (int k = 0; mask && k < some; k++) found[k] += widen(mask[s + k]);
        for (int k = some; k < LANES; k++) found[k] = -INFINITY;
        *(vec*)(scores + s) = found;
        most = found > most ? found : most;
    }
    float top = most[0];
    for (int k = 1; k < LANES; k++) top = std::max(top, most[k]);
    return top;
}

// The sum of the seen values, weighted by `scores`, for 16 N of a head's numbers.
template <int N, class T>
static void mix(const T* values, Seen seen, const float* scores, int dim, float factor, float* out) {
    vec sums[N] = {};
    for (int s = 0; s < seen.count; s++) {
        const T* value = values + seen[s] * dim;
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sums[n] += load(value + n * LANES) * scores[s];
    }
    for (int n = 0; n < N; n++) *(vec*)(out + n * LANES) = sums[n] * factor;
}

// Attention of one query head over the slots of one row; `scores` has room for all of them.
template <class T>
static void attend(const Layer& layer, const Tokens& tokens, int m, int head, const float* query, float* out,
                   float* scores) {
    int dim = layer.head_dim, kv_head = head / (layer.heads / layer.kv_heads);
    int64_t base = tokens.row[m] * tokens.row_stride + kv_head * tokens.head_stride;
    const T *keys = (const T*)tokens.keys + base, *values = (const T*)tokens.values + base;
    const T* mask = tokens.mask ? (const T*)tokens.mask + tokens.place[m] * tokens.mask_stride : nullptr;
    Seen seen = seen_by(tokens, m);
    float most = match(keys, mask, seen, query, dim, layer.scale, scores);
    vec totals = {};
    for (int s = 0; s < seen.count; s += LANES) {
        vec weights = exponential(load(scores + s) - most);
        for (int k = seen.count - s; k < LANES; k++) weights[k] = 0;
        *(vec*)(scores + s) = weights;
        totals += weights;
    }
    float factor = 1.0f / sum(totals);
    int i = 0;
    for (; i + 8 * LANES <= dim; i += 8 * LANES) mix<8>(values + i, seen, scores, dim, factor, out + i);
    for (; i + 4 * LANES <= dim; i += 4 * LANES) mix<4>(values + i, seen, scores, dim, factor, out + i);
    for (; i + LANES <= dim; i += LANES) mix<1>(values + i, seen, scores, dim, factor, out + i);
    for (; i < dim; i++) {
        float total = 0;
        for (int s = 0; s < seen.count; s++) total += widen(values[seen[s] * dim + i]) * scores[s];
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

template <class T>
static void norm_states(const NormWeights& norm, const T* x, T* y, int tokens, int width, float* scratch) {
    for (int m = 0; m < tokens; m++) {
        normalise<T>(norm, x + int64_t(m) * width, scratch, width);
        for (int i = 0; i < width; i++) store(y + int64_t(m) * width + i, scratch[i]);
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

// y [M, width] = norm(x [M, width]), in a model of `kind`; scratch has `width` floats.
void anee_norm(const NormWeights* norm, const void* x, void* y, int32_t tokens, int32_t width, int32_t kind,
               float* scratch) {
    kind == BFLOAT16 ? norm_states(*norm, (const bf16*)x, (bf16*)y, tokens, width, scratch)
                     : norm_states(*norm, (const float*)x, (float*)y, tokens, width, scratch);
}

// y [M, outputs] = x [M, inputs] W^T + b, in a model of `kind`; scratch has M * (inputs + outputs + 32) floats.
void anee_linear(const Matrix* matrix, const void* x, void* y, int32_t tokens, int32_t kind, float* scratch,
                 int32_t threads) {
    kind == BFLOAT16 ? linear(*matrix, (const bf16*)x, (bf16*)y, tokens, scratch, threads)
                     : linear(*matrix, (const float*)x, (float*)y, tokens, scratch, threads);
}
}
