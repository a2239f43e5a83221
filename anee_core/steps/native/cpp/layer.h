// One decoder layer for a few tokens, on the model's own weights: norms, projections, rotary positions, attention and
// MLP in one call, so that a decoded token costs little more than reading the weights once.
//
// Arithmetic is in float32 throughout; states, keys and values are rounded to the model's type where they are stored.

#pragma once

#include <omp.h>

#include "attention.h"

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
    float factor = 1.0f / std::sqrt(squares / width + norm.eps), base = norm.kind == RMS_FROM_ONE ? 1.0f : 0.0f;
    for (int i = 0; i < width; i++)
        y[i] = (widen(x[i]) - mean) * factor * (weight ? base + widen(weight[i]) : 1.0f) + (bias ? widen(bias[i]) : 0.0f);
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

// Norms vectors of which each thread has made some numbers of all, if there is a norm. It has a barrier then.
template <class T>
static void norm_whole(const NormWeights& norm, Rows rows, int count, int width, int thread, int threads) {
    if (!norm.weight) return;
#pragma omp barrier
    Range range = share(count, 1, thread, threads);
    for (int m = range.first; m < range.last; m++) normalise<T>(norm, rows[m], rows[m], width);
}

// Calls a function for the numbers that are a thread's own: whole vectors behind a norm, or else some numbers of all.
template <class F>
static void each_number(const NormWeights& norm, Range own, int count, int width, int thread, int threads, F work) {
    Range vectors = norm.weight ? share(count, 1, thread, threads) : Range{0, count};
    Range numbers = norm.weight ? Range{0, width} : own;
    for (int m = vectors.first; m < vectors.last; m++)
        for (int r = numbers.first; r < numbers.last; r++) work(m, r);
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
    Rows scores = {scratch, QUERIES * ((tokens.used + LANES - 1) / LANES * LANES)};
    const T* states = (const T*)tokens.states;
    T* result = (T*)tokens.result;
#pragma omp parallel num_threads(tokens.threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        norm_all<T>(layer, layer.input_norm, tokens, normed, thread, threads);
        product<T>(layer.query, normed, count, queries, thread, threads);
        write_cache<T>(layer, tokens, normed, keys, values, thread, threads);

        double since = tokens.seconds ? omp_get_wtime() : 0;
        Range range = share((count + QUERIES - 1) / QUERIES * layer.heads, 1, thread, threads);
        for (int task = range.first; task < range.last; task++) {
            int first = task / layer.heads * QUERIES, head = task % layer.heads, some = std::min(QUERIES, count - first);
            for (int m = first; m < first + some; m++)
                place_head<T>(layer, layer.query_norm, tokens, tokens.place[m], queries[m] + head * dim);
            attend_some<T>(layer, tokens, first, some, head, queries, attended, scores[thread]);
        }
#pragma omp barrier
        if (thread == 0) took(tokens, ATTENTION, since);
        range = product<T>(layer.output, attended, count, summed, thread, threads);
        norm_whole<T>(layer.attended_norm, summed, count, width, thread, threads);
        each_number(layer.attended_norm, range, count, width, thread, threads, [&](int m, int r) {
            summed[m][r] += widen(states[tokens.place[m] * width + r]);
        });
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
        norm_whole<T>(layer.changed_norm, changed, count, width, thread, threads);
        each_number(layer.changed_norm, range, count, width, thread, threads, [&](int m, int r) {
            store(result + int64_t(m) * width + r, summed[m][r] + changed[m][r]);
        });
    }
}
