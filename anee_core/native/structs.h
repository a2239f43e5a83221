// One decoder layer, and the tokens that it is run for. Mirrored in structs.py.

#pragma once

#include <omp.h>

#include "products.h"

enum Norm : int32_t { RMS = 0, LAYER = 1, RMS_FROM_ONE = 2 };  // the last scales by 1 + weight
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
    // weight null: there is none. The last two stand behind attention and MLP, before what they give is added.
    NormWeights input_norm, mlp_norm, query_norm, key_norm, attended_norm, changed_norm;
    Matrix query, key, value, output, gate, up, down;  // gate.weight null: the MLP is not gated
    int32_t kind;  // of norms, biases, states, keys and values
    int32_t width, heads, kv_heads, head_dim;
    int32_t rotary, rotary_width, activation, residual;
    float scale, cap;  // of attention scores; no cap if it is 0
};

// The tokens of one call: token m of `count` lies at place[m] of states, cos, sin and mask; its keys and values belong
// into slot start + column[m] of row row[m] of the cache.
struct Tokens {
    const void* states;   // [P, D]
    void* result;         // [count, D]
    const void* cos;      // [P, rotary_width]
    const void* sin;
    const void* mask;     // [P, mask_stride], additive, of the slots up to a token's own; null: it sees them all
    void* keys;           // [B, H, capacity, Dh]
    void* values;
    const int64_t* place;
    const int64_t* row;
    const int64_t* column;
    const int32_t* kept;  // [B, kept_stride], the slots that a row's new token sees, kept_count [B] of them; null for all
    const int32_t* kept_count;
    double* seconds;      // [2], to which is added what attention and what decisions take; null if nobody wants to know
    float* scratch;       // what NativeLayer.floats says for each token, then QUERIES (used + LANES) for each thread
    int64_t row_stride, head_stride, mask_stride, kept_stride, start;
    int32_t count, used, threads;
};

enum Part : int32_t { ATTENTION = 0, DECISIONS = 1 };

// Adds the time since then to what a part takes; for one thread, between barriers.
static inline void took(const Tokens& tokens, Part part, double since) {
    if (tokens.seconds) tokens.seconds[part] += omp_get_wtime() - since;
}
