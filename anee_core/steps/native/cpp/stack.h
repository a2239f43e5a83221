// All decoder layers for some tokens in one call: who runs which layer is known, or decided on the way by a linear gate.

#pragma once

#include <vector>

#include "gate.h"
#include "interaction.h"
#include "layer.h"

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
