// Attention of the tokens of one call over the keys and values in the cache.

#pragma once

#include <omp.h>

#include "products.h"

// Adds the time since then to what a part takes; for one thread, between barriers.
static inline void took(const Tokens& tokens, Part part, double since) {
    if (tokens.seconds) tokens.seconds[part] += omp_get_wtime() - since;
}

// The slots that a token's attention looks at: those listed for its row, or all up to its own.
struct Seen {
    const int32_t* list;
    int count;
    int64_t operator[](int s) const { return list ? list[s] : s; }
};

static Seen seen_by(const Tokens& tokens, int m) {
    int64_t row = tokens.row[m];
    if (tokens.kept) return {tokens.kept + row * tokens.kept_stride, tokens.kept_count[row]};
    return {nullptr, int(tokens.start + tokens.column[m]) + 1};
}

// Scores under a soft cap (Gemma 2, arXiv:2408.00118): cap tanh(score / cap).
static inline vec capped(vec scores, float cap) {
    return cap ? cap - 2.0f * cap / (exponential(scores * (2.0f / cap)) + 1.0f) : scores;
}

// The query's products with the keys it sees, times `scale`, plus the mask; returns the largest.
template <class T>
static float match(const T* keys, const T* mask, Seen seen, const float* query, int dim, float scale, float cap,
                   float* scores) {
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
        found = capped(found * scale, cap);
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

// The sum of the seen values, weighted by `scores`, for N LANES of a head's numbers.
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

// Attention of one token's query head over the slots of its row; `scores` has room for all of them.
template <class T>
static void attend(const Layer& layer, const Tokens& tokens, int m, int head, const float* query, float* out,
                   float* scores) {
    int dim = layer.head_dim, kv_head = head / (layer.heads / layer.kv_heads);
    int64_t base = tokens.row[m] * tokens.row_stride + kv_head * tokens.head_stride;
    const T *keys = (const T*)tokens.keys + base, *values = (const T*)tokens.values + base;
    const T* mask = tokens.mask ? (const T*)tokens.mask + tokens.place[m] * tokens.mask_stride : nullptr;
    Seen seen = seen_by(tokens, m);
    float most = match(keys, mask, seen, query, dim, layer.scale, layer.cap, scores);
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

// The products of the queries of QUERIES tokens with the keys up to the last one's own, times `scale`, plus the masks:
// those of one key with all queries lie side by side. `own` says which key is each token's own, in ascending order.
template <class T>
static void match_together(const T* keys, const T* const* masks, const int* own, const float* const* queries, int dim,
                           float scale, float cap, float* scores) {
    constexpr int KEYS = LANES / QUERIES;
    int count = own[QUERIES - 1] + 1;
    for (int s = 0; s < count; s += KEYS) {
        const T* rows[KEYS];
        for (int k = 0; k < KEYS; k++) rows[k] = keys + int64_t(std::min(s + k, count - 1)) * dim;
        vec sums[LANES] = {};
        int i = 0;
        for (; i + LANES <= dim; i += LANES) {
            vec q[QUERIES];
#pragma GCC unroll 4
            for (int m = 0; m < QUERIES; m++) q[m] = load(queries[m] + i);
#pragma GCC unroll 4
            for (int k = 0; k < KEYS; k++) {
                vec key = load(rows[k] + i);
#pragma GCC unroll 4
                for (int m = 0; m < QUERIES; m++) sums[k * QUERIES + m] += key * q[m];
            }
        }
        vec found = sums_of(sums);
        for (; i < dim; i++)
            for (int j = 0; j < LANES; j++) found[j] += widen(rows[j / QUERIES][i]) * queries[j % QUERIES][i];
        found = capped(found * scale, cap);
        if (masks || s + KEYS > own[0])
            for (int j = 0; j < LANES; j++) {
                int at = s + j / QUERIES, m = j % QUERIES;
                if (at > own[m])
                    found[j] = -INFINITY;
                else if (masks)
                    found[j] += widen(masks[m][at]);
            }
        *(vec*)(scores + s * QUERIES) = found;
    }
}

// The sums of `count` values, weighted by each token's scores, for N LANES of a head's numbers.
template <int N, class T>
static void mix_together(const T* values, int count, const float* scores, int dim, const float* factors,
                         float* const* out) {
    vec sums[QUERIES][N] = {};
    for (int s = 0; s < count; s++) {
        vec value[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) value[n] = load(values + int64_t(s) * dim + n * LANES);
#pragma GCC unroll 4
        for (int m = 0; m < QUERIES; m++)
#pragma GCC unroll 4
            for (int n = 0; n < N; n++) sums[m][n] += value[n] * scores[s * QUERIES + m];
    }
    for (int m = 0; m < QUERIES; m++)
        for (int n = 0; n < N; n++) *(vec*)(out[m] + n * LANES) = sums[m][n] * factors[m];
}

// Attention of one query head of QUERIES tokens of one row.
template <class T>
static void attend_together(const T* keys, const T* values, const T* const* masks, const int* own,
                            const float* const* queries, int dim, float scale, float cap, float* const* out,
                            float* scores) {
    match_together(keys, masks, own, queries, dim, scale, cap, scores);
    int count = own[QUERIES - 1] + 1, filled = (count * QUERIES + LANES - 1) / LANES * LANES;
    vec most = vec{} - INFINITY, totals = {};
    for (int i = 0; i < filled; i += LANES) {
        vec found = load(scores + i);
        most = found > most ? found : most;
    }
    for (int j = QUERIES; j < LANES; j++) most[j % QUERIES] = std::max(most[j % QUERIES], most[j]);
    for (int j = QUERIES; j < LANES; j++) most[j] = most[j % QUERIES];
    for (int i = 0; i < filled; i += LANES) {
        vec weights = exponential(load(scores + i) - most);
        for (int j = count * QUERIES - i; j < LANES; j++) weights[j] = 0;
        *(vec*)(scores + i) = weights;
        totals += weights;
    }
    float factors[QUERIES];
    for (int m = 0; m < QUERIES; m++) {
        float total = 0;
        for (int j = m; j < LANES; j += QUERIES) total += totals[j];
        factors[m] = 1.0f / total;
    }
    constexpr int N = REGISTERS / 8;
    float* at[QUERIES];
    int i = 0;
    auto run = [&](auto width) {
        constexpr int W = decltype(width)::value;
        for (; i + W * LANES <= dim; i += W * LANES) {
            for (int m = 0; m < QUERIES; m++) at[m] = out[m] + i;
            mix_together<W>(values + i, count, scores, dim, factors, at);
        }
    };
    run(std::integral_constant<int, N>{});
    run(std::integral_constant<int, 1>{});
    for (; i < dim; i++)
        for (int m = 0; m < QUERIES; m++) {
            float total = 0;
            for (int s = 0; s < count; s++) total += widen(values[int64_t(s) * dim + i]) * scores[s * QUERIES + m];
            out[m][i] = total * factors[m];
        }
}

// Attention of one query head of the `some` tokens from `first` on, at most QUERIES: together if they are of one row.
template <class T>
static void attend_some(const Layer& layer, const Tokens& tokens, int first, int some, int head, Rows queries,
                        Rows attended, float* scores) {
    int dim = layer.head_dim;
    bool together = some == QUERIES && !tokens.kept && tokens.row[first] == tokens.row[first + some - 1];
    if (!together) {
        for (int m = first; m < first + some; m++)
            attend<T>(layer, tokens, m, head, queries[m] + head * dim, attended[m] + head * dim, scores);
        return;
    }
    int64_t base = tokens.row[first] * tokens.row_stride + head / (layer.heads / layer.kv_heads) * tokens.head_stride;
    const float* query[QUERIES];
    float* out[QUERIES];
    const T* masks[QUERIES];
    int own[QUERIES];
    for (int k = 0; k < QUERIES; k++) {
        int m = first + k;
        query[k] = queries[m] + head * dim, out[k] = attended[m] + head * dim;
        masks[k] = (const T*)tokens.mask + tokens.place[m] * tokens.mask_stride;
        own[k] = int(tokens.start + tokens.column[m]);
    }
    attend_together((const T*)tokens.keys + base, (const T*)tokens.values + base, tokens.mask ? masks : nullptr, own,
                    query, dim, layer.scale, layer.cap, out, scores);
}
