// All decoder layers for some tokens in one call: who runs which layer is known, or decided on the way by a linear gate.
//
// The structs are mirrored in structs.py.

#include "layer.cpp"

#include <vector>

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
    float limit;              // of what a token may spend
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

constexpr int FEW = 16;  // tokens with which one thread is done before others would have begun

// Calls a function for each of the tokens' numbers.
template <class F>
static void each(const Tokens& tokens, F work) {
#pragma omp parallel for num_threads(tokens.count < FEW ? 1 : tokens.threads)
    for (int m = 0; m < tokens.count; m++) work(m);
}

template <class T>
static float mean_square(const T* x, int width) {
    float squares = 0;
    for (int i = 0; i < width; i++) squares += widen(x[i]) * widen(x[i]);
    return squares / width;
}

// How much the tokens would lose by skipping a layer, one number each. Stores it for later tokens to compare theirs with.
template <class T>
static void score(const Gate& gate, int layers, int l, const Tokens& tokens, const T* states, int width,
                  const uint8_t* here, float* scores) {
    const float* weight = gate.weight + int64_t(l) * width;
    each(tokens, [&](int m) {
        const T* state = states + tokens.place[m] * width;
        float product = 0;
        for (int i = 0; i < width; i++) product += widen(state[i]) * weight[i];
        scores[m] = product / std::sqrt(mean_square(state, width) + 1e-6f) + gate.bias[l];
        bool counts = here[m] != PADDING && !(gate.shares[int64_t(m) * layers + l] < 0);
        gate.scores[tokens.row[m] * gate.row_stride + (gate.seen + tokens.column[m]) * layers + l] =
            counts ? scores[m] : NAN;
    });
}

// Whether token m, with this score, runs a layer.
static bool passes(const Gate& gate, int layers, int l, const Tokens& tokens, int m, float score) {
    const float* earlier = gate.scores + tokens.row[m] * gate.row_stride + l;
    int64_t lower = 0, compared = 0;
    for (int64_t s = gate.seen + tokens.column[m] - 1; s >= 0 && compared < gate.window; s--) {
        float other = earlier[s * layers];
        compared += other == other;
        lower += other < score;
    }
    if (gate.always[l]) return true;
    float below = 0.5f * std::erfc((gate.mean[l] - score) / gate.spread[l] * 0.70710678f);
    if ((lower + gate.prior * below) / (compared + gate.prior) < gate.shares[int64_t(m) * layers + l]) return false;
    if (!gate.wanted) return true;
    int64_t at = int64_t(l) * tokens.count + m;
    gate.wanted[m] += gate.run_share[at] - gate.skip_share[at];
    return gate.wanted[m] <= gate.limit + 1e-6f;
}

// Decides which tokens run a layer. Of padding, none does.
template <class T>
static void decide(const Gate& gate, int layers, int l, const Tokens& tokens, const T* states, int width,
                   uint8_t* here, float* scores) {
    score(gate, layers, l, tokens, states, width, here, scores);
    each(tokens, [&](int m) {
        if (here[m] != PADDING) here[m] = passes(gate, layers, l, tokens, m, scores[m]) ? RUNS : SKIPPED;
    });
}

// h + up down n(h) for some tokens; n scales h to unit norm.
template <class T>
static void shortcut(const Matrix& down, const Matrix& up, T* states, const Tokens& tokens) {
    int count = tokens.count, width = down.inputs;
    float* scratch = tokens.scratch;
    Rows unit = take(scratch, count, width), low = take(scratch, count, down.outputs), out = take(scratch, count, width);
#pragma omp parallel num_threads(tokens.threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Range range = share(count, 1, thread, threads);
        for (int m = range.first; m < range.last; m++) {
            const T* state = states + tokens.place[m] * width;
            float factor = 1.0f / std::sqrt(mean_square(state, width) + 1e-6f);
            for (int i = 0; i < width; i++) unit[m][i] = widen(state[i]) * factor;
        }
#pragma omp barrier
        product<T>(down, unit, count, low, thread, threads);
#pragma omp barrier
        range = product<T>(up, low, count, out, thread, threads);
        for (int m = 0; m < count; m++)
            for (int r = range.first; r < range.last; r++) {
                T* state = states + tokens.place[m] * width + r;
                store(state, widen(*state) + out[m][r]);
            }
    }
}

constexpr int PORTION = 64;  // mirrored in structs.py

// Some tokens of a call.
struct Some {
    std::vector<int64_t> place, row, column;

    void add(const Tokens& tokens, int m) {
        place.push_back(tokens.place[m]);
        row.push_back(tokens.row[m]);
        column.push_back(tokens.column[m]);
    }
    // Calls a function for all of them, a few at a time: their vectors stay in the cache.
    template <class F>
    void portions(Tokens tokens, F work) const {
        int size = int(place.size()), parts = (size + PORTION - 1) / PORTION;
        for (int i = 0; i < parts; i++) {
            Range range = share(size, 1, i, parts);
            tokens.place = place.data() + range.first, tokens.row = row.data() + range.first;
            tokens.column = column.data() + range.first;
            tokens.count = range.last - range.first;
            work(tokens);
        }
    }
};

// Lists, for each row, the slots that its new token keeps, in `kept` [B, most] and `count` [B]; drops the others. A token
// that skips the layer drops nothing, but has its interaction key stored.
template <class T>
static void interact(const Interaction& all, int l, const Layer& layer, const Storage& storage, const Tokens& tokens,
                     const uint8_t* states, int32_t* kept, int32_t* count, int64_t most) {
    int rank = all.rank, width = layer.width;
    float* scratch = tokens.scratch;
    Rows normed = take(scratch, tokens.count, width);
    Rows queries = take(scratch, tokens.count, rank), keys = take(scratch, tokens.count, rank);
#pragma omp parallel num_threads(tokens.threads)
    {
        int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        norm_all<T>(layer, layer.input_norm, tokens, normed, thread, threads);
        product<T>(all.query[l], normed, tokens.count, queries, thread, threads);
        product<T>(all.key[l], normed, tokens.count, keys, thread, threads);
#pragma omp barrier
        Range range = share(tokens.count, 1, thread, threads);
        for (int m = range.first; m < range.last; m++) {
            int64_t row = tokens.row[m], own = storage.start + tokens.column[m];
            T* stored = (T*)storage.interactions + row * storage.interaction_stride;
            int64_t* died = storage.died + row * storage.died_stride;
            int32_t *list = kept + row * most, found = 0;
            for (int i = 0; i < rank; i++) {
                T rounded;
                store(&rounded, queries[m][i]);
                queries[m][i] = widen(rounded);
                store(stored + own * rank + i, keys[m][i]);
            }
            for (int s = 0; s < storage.used; s++) {
                if (died[s] != HELD) continue;
                if (s != own && states[m] == RUNS) {
                    const T* key = stored + int64_t(s) * rank;
                    vec sums = {};
                    int i = 0;
                    for (; i + LANES <= rank; i += LANES) sums += load(key + i) * load(queries[m] + i);
                    float score = sum(sums);
                    for (; i < rank; i++) score += widen(key[i]) * queries[m][i];
                    if (!(score * all.scale + all.bias[l] > 0)) {
                        died[s] = all.now;
                        continue;
                    }
                }
                list[found++] = s;
            }
            count[row] = all.held[int64_t(l) * tokens.count + row] = found;
        }
    }
}

template <class T>
static void stack(const Layers& all, Tokens tokens, T* states) {
    int count = tokens.count;
    std::vector<int32_t> kept, kept_count;
    if (all.interaction) {
        kept.resize(int64_t(count) * tokens.used), kept_count.resize(count);
        tokens.kept = kept.data(), tokens.kept_count = kept_count.data(), tokens.kept_stride = tokens.used;
    }
    std::vector<float> scores(all.gate ? count : 0);
    for (int l = 0; l < all.count; l++) {
        const Layer& layer = *all.layers[l];
        const Storage& storage = all.storage[l];
        tokens.keys = storage.keys, tokens.values = storage.values, tokens.mask = storage.mask;
        tokens.row_stride = storage.row_stride, tokens.head_stride = storage.head_stride;
        tokens.threads = all.threads[l];
        if (all.interaction) tokens.start = storage.start;
        uint8_t* here = all.states + int64_t(l) * count;
        double since = tokens.seconds ? omp_get_wtime() : 0;
        if (all.gate) decide(*all.gate, all.count, l, tokens, states, layer.width, here, scores.data());
        took(tokens, DECISIONS, since);
        Some running, skipping, deferred;
        for (int m = 0; m < count; m++) {
            if (here[m] == RUNS) running.add(tokens, m);
            if (here[m] == SKIPPED) skipping.add(tokens, m);
            if (here[m] == DEFERRED) deferred.add(tokens, m);
        }
        if (all.inputs)
            std::memcpy((T*)all.inputs + int64_t(l) * count * layer.width, states, count * layer.width * sizeof(T));
        since = tokens.seconds ? omp_get_wtime() : 0;
        if (all.interaction)
            interact<T>(*all.interaction, l, layer, storage, tokens, here, kept.data(), kept_count.data(), tokens.used);
        took(tokens, DECISIONS, since);
        // Skipped tokens first, so that later ones of the block see their keys and values.
        skipping.portions(tokens, [&](const Tokens& these) {
            project<T>(layer, these);
            if (all.down) shortcut(all.down[l], all.up[l], states, these);
        });
        if (all.down)
            deferred.portions(tokens, [&](const Tokens& these) { shortcut(all.down[l], all.up[l], states, these); });
        running.portions(tokens, [&](const Tokens& these) {
            run<T>(layer, these);
            const T* result = (const T*)these.result;
            for (int m = 0; m < these.count; m++)
                std::memcpy(states + these.place[m] * layer.width, result + int64_t(m) * layer.width,
                            layer.width * sizeof(T));
        });
    }
}

// Take the tokens through all layers; their states are replaced, `result` has room for as many.
extern "C" void anee_stack(const Layers* all, const Tokens* tokens) {
    if (all->layers[0]->kind == BFLOAT16)
        stack<bf16>(*all, *tokens, (bf16*)tokens->states);
    else
        stack<float>(*all, *tokens, (float*)tokens->states);
}
