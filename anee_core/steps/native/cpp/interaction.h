// Token dropping by a linear interaction: which slots of its row each new token keeps.

#pragma once

#include "layer.h"

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
