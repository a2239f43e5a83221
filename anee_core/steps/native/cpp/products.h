// Matrix products for some tokens, on weights where they lie: the arithmetic under one decoder layer. Sums are in
// float32 throughout.

#pragma once

#include <algorithm>
#include <type_traits>

#include "packed.h"
#include "paired.h"

constexpr int64_t AHEAD = 3072;  // bytes that are fetched ahead, at least
constexpr int64_t LONG = 3072;   // bytes of a row from which two are read at once; shorter ones go as they lie
constexpr int TOGETHER = REGISTERS == 32 ? 8 : 4;  // tokens whose sums with three rows stay in registers

// Rows times tokens. On the first pass over some rows, those `ahead` numbers further on are fetched, which are the next:
// rows are too short for the processor to notice by itself where it will go on. It forgets what it is asked for while it
// is busy, so each line is asked for several times. Loops over rows and tokens are unrolled, so that the sums stay in
// registers; where they are few, each is kept in parts, for additions not to wait for each other.
template <class W, int R, int M, bool FIRST>
static inline void dots(const W* const* rows, int64_t ahead, const float* x, int64_t x_stride, int inputs,
                        float (&out)[R][M]) {
    constexpr int LINE = std::max<int>(LANES, 64 / sizeof(W)), STEPS = LINE / LANES;
    constexpr int PARTS = std::min(STEPS, std::max(1, 4 / (R * M)));
    vec sums[R][M][PARTS] = {};
    auto step = [&](int i, int part) {
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
            for (int r = 0; r < R; r++) sums[r][m][part] += w[r] * v;
        }
    };
    int i = 0;
    for (; i + LINE <= inputs; i += LINE) {
#pragma GCC unroll 8
        for (int k = 0; k < STEPS; k++) step(i + k * LANES, k % PARTS);
    }
    for (; i + LANES <= inputs; i += LANES) step(i, 0);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
#pragma GCC unroll 8
            for (int k = 1; k < PARTS; k++) sums[r][m][0] += sums[r][m][k];
            float total = sum(sums[r][m][0]);
            for (int j = i; j < inputs; j++) total += widen(rows[r][j]) * x[m * x_stride + j];
            out[r][m] = total;
        }
}

// The same for rows of 4-bit numbers; `scales` points to scale and offset of each 32 numbers of each row.
template <int R, int M, bool FIRST>
static inline void dots(const int4* const* rows, const float* const* scales, int64_t ahead, const float* x,
                        int64_t x_stride, int inputs, float (&out)[R][M]) {
    vec sums[R][M] = {};
    for (int i = 0; i < inputs / 2; i += LANES) {
        const int g = i / (GROUP / 2);
        vec low[R], high[R];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            load(rows[r] + i, low[r], high[r]);
            float scale = scales[r][2 * g], offset = scales[r][2 * g + 1];
            low[r] = low[r] * scale + offset;
            high[r] = high[r] * scale + offset;
            if (FIRST && i % 64 == 0) __builtin_prefetch(rows[r] + ahead + i);
        }
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) {
            const float* at = x + m * x_stride + i + g * (GROUP / 2);
            vec first = load(at), second = load(at + GROUP / 2);
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
        groups[r] = matrix.scale + row * (matrix.inputs / GROUP * 2);
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
    if constexpr (R <= 3) run(std::integral_constant<int, TOGETHER>{});
    if constexpr (TOGETHER > 4) run(std::integral_constant<int, 4>{});
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

// The thread's outputs of x W^T, for vectors x of as many tokens.
template <class W>
static void products_in(const Matrix& matrix, Range range, Rows x, int tokens, Rows y) {
    if (tokens >= MANY) return packed_product<W>(matrix, range, x, tokens, y);
    if (matrix.transposed) {
        if constexpr (!std::is_same<W, int4>::value) columns_product<W>(matrix, range, x, tokens, y);
        return;
    }
    int r = range.first;
    auto run = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        for (; r + R <= range.last; r += R) rows_product<W, R>(matrix, r, x, tokens, y);
    };
    if (tokens >= TOGETHER) run(std::integral_constant<int, 3>{});
    if (tokens >= 4 || std::is_same<W, int4>::value) run(std::integral_constant<int, 4>{});
    if (tokens > 1 || LANES == 16 || matrix.stride * sizeof(W) >= LONG) run(std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 1>{});
}

#ifdef __AVX512BF16__
// The same, two numbers at a time.
static void pairs_in(const Matrix& matrix, Range range, Rows x, int tokens, Rows y) {
    const bf16* weight = (const bf16*)matrix.weight;
    Narrow vectors = narrow(x, tokens, matrix.inputs);
    if (matrix.transposed)
        return paired_columns(weight, matrix.stride, range.first, range.last, vectors, matrix.inputs, tokens, y);
    auto run = [&](auto some, auto together) {
        constexpr int R = decltype(some)::value, M = decltype(together)::value;
        for (; tokens >= M && range.first + R <= range.last; range.first += R) {
            const bf16* rows[R];
            for (int r = 0; r < R; r++) rows[r] = weight + matrix.row(range.first + r) * matrix.stride;
            int64_t ahead = std::max<int64_t>(R * matrix.stride, AHEAD / sizeof(bf16));
            paired_rows<R, M>(rows, ahead, vectors, matrix.inputs, tokens, y, range.first);
        }
    };
    run(std::integral_constant<int, 4>{}, std::integral_constant<int, 4>{});
    run(std::integral_constant<int, 8>{}, std::integral_constant<int, 2>{});
    run(std::integral_constant<int, 16>{}, std::integral_constant<int, 1>{});
    products_in<bf16>(matrix, range, x, tokens, y);
}
#endif

// The thread's share of x W^T + b. Returns that share.
template <class W, class T>
static Range product_of(const Matrix& matrix, Rows x, int tokens, Rows y, int thread, int threads) {
    Range range = share(matrix.outputs, matrix.transposed ? 4 * LANES : 16, thread, threads);
#ifdef __AVX512BF16__
    // For fewer tokens, columns are read row after row, which memory likes better.
    if constexpr (std::is_same<W, bf16>::value) {
        if (tokens >= 4 || !matrix.transposed)
            pairs_in(matrix, range, x, tokens, y);
        else
            products_in<W>(matrix, range, x, tokens, y);
    } else
#endif
        products_in<W>(matrix, range, x, tokens, y);
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
