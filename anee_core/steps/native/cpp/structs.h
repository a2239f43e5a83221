// Everything that is handed over from Python, field by field as in structs.py. What the library says of their sizes is
// compared when it is loaded (see `anee_layout`), and the names of the fields in a test.

#pragma once

#include <cstdint>

constexpr int QUERIES = 4;   // tokens of one row whose attention is worked out together
constexpr int PORTION = 64;  // tokens that all layers take at once, at most

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
enum Norm : int32_t { RMS = 0, LAYER = 1, RMS_FROM_ONE = 2 };  // the last scales by 1 + weight
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

enum State : uint8_t { PADDING = 0, SKIPPED = 1, RUNS = 2, DEFERRED = 3 };

// Where one layer's keys and values are, [B, H, capacity, Dh], and its mask, if it has one. If tokens are dropped, also
// its interaction keys [B, capacity, r], what tells the slots that are held, and which slots are the block's.
struct Storage {
    void* keys;
    void* values;
    const void* mask;
    void* interactions;
    int64_t* died;  // [B, capacity]: HELD, or else the slot holds nothing
    int64_t row_stride, head_stride, interaction_stride, died_stride, start;
    int32_t used;
};

constexpr int64_t HELD = INT64_MAX;

// Interactions (see LinearInteraction), for one new token in each row: it keeps the slots with
// (query x) . (key x_j) * scale + bias > 0.
struct Interaction {
    const Matrix* query;  // of each layer, [r, D]
    const Matrix* key;
    const float* bias;    // [L]
    int32_t* held;        // [L, B]: how many slots each token leaves, written
    int64_t now;          // put into `died` of what is dropped
    float scale;
    int32_t rank;
};

// A gate (see LinearGate), for P = B T new tokens: T in each row, one after another.
struct Gate {
    const float* weight;      // [L, D], of the state at unit norm
    const float* bias;        // [L]
    const float* mean;        // [L], of the scores on the text of the fit
    const float* spread;      // [L], their standard deviation
    const float* shares;      // [P, L], of the tokens that are to skip each layer; below 0: it runs, and does not count
    float* scores;            // [B, S, L], NaN for tokens that do not count; the new ones are written
    const float* run_share;   // [L, P] of a dense token's FLOPs
    const float* skip_share;
    float* wanted;            // [P], what the layers wanted so far would take; null if there is no limit
    const uint8_t* always;    // [L]
    int64_t row_stride;       // of the scores
    int64_t seen;             // earlier tokens
    int64_t window;           // how many of those that count a token is compared with
    float prior;              // tokens that the fit counts for
    float limit;              // of what a token may spend, with what rounding may add
};

struct Layers {
    const Layer* const* layers;
    const Storage* storage;
    const int32_t* threads;
    const Matrix* down;  // of each layer's shortcut, null for none
    const Matrix* up;
    const Gate* gate;    // null: `states` says who runs
    const Interaction* interaction;  // null: nothing is dropped
    uint8_t* states;     // [L, P]
    void* inputs;        // [L, P, D], what each layer gets; null if nobody wants to know
    int32_t count;
};
