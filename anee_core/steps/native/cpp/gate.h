// A linear gate: which tokens run a layer, from their states in front of it.

#pragma once

#include <omp.h>

#include "structs.h"
#include "vectors.h"

constexpr float TIE = 1e-4f;  // share of their spread by which scores that are equal may differ
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
    float least = score - TIE * gate.spread[l];
    int64_t lower = 0, compared = 0;
    for (int64_t s = gate.seen + tokens.column[m] - 1; s >= 0 && compared < gate.window; s--) {
        float other = earlier[s * layers];
        compared += other == other;
        lower += other < least;
    }
    if (gate.always[l]) return true;
    float below = 0.5f * std::erfc((gate.mean[l] - score) / gate.spread[l] * 0.70710678f);
    if ((lower + gate.prior * below) / (compared + gate.prior) < gate.shares[int64_t(m) * layers + l]) return false;
    if (!gate.wanted) return true;
    int64_t at = int64_t(l) * tokens.count + m;
    gate.wanted[m] += gate.run_share[at] - gate.skip_share[at];
    return gate.wanted[m] <= gate.limit;
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
