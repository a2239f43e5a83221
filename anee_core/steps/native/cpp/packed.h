// Products for many tokens: the sums of some rows with some columns stay in registers while the inputs are gone through,
// and what is read in every pass was set side by side before.

#pragma once

#include <type_traits>
#include <vector>

#include "matrix.h"

constexpr int MANY = 16;  // tokens from which that pays
constexpr int TALL = REGISTERS == 32 ? 12 : 6, BROAD = 2;  // rows, and registers of columns, whose sums fit
constexpr int DEEP = 1024;  // inputs at once: they stay in the cache for all rows

// Calls a function for parts of `count` things, of the given sizes, largest first.
template <int... SIZES, class F>
static inline void in_sizes(int count, F work) {
    int done = 0;
    auto run = [&](auto size) {
        for (; done + size <= count; done += size) work(done, size);
    };
    (run(std::integral_constant<int, SIZES>{}), ...);
}

// Adds a[r][k] b[k, n] over k. Of b, LANES columns lie side by side, and the next LANES behind all of those.
template <int R, int N>
static inline void outer(const float* const* a, const float* b, int depth, vec (&sums)[R][N]) {
    for (int k = 0; k < depth; k++) {
        vec columns[N];
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) columns[n] = load(b + (int64_t(n) * depth + k) * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int n = 0; n < N; n++) sums[r][n] += columns[n] * a[r][k];
    }
}

// Room for numbers, which stay until the thread's next call with the same tag.
template <int TAG>
static float* room_for(int64_t count) {
    static thread_local std::vector<float> room;
    if (int64_t(room.size()) < count) room.resize(count);
    return room.data();
}

// Numbers of a row from `first` on, in float32: where they are, or else in `room`.
static inline const float* wide(const float* row, const float*, float, int first, int, float*) { return row + first; }
template <class W>
static const float* wide(const W* row, const float*, float scale, int first, int depth, float* room) {
    int i = 0;
    for (; i + LANES <= depth; i += LANES) *(vec*)(room + i) = load(row + first + i) * scale;
    for (; i < depth; i++) room[i] = widen(row[first + i]) * scale;
    return room;
}
static const float* wide(const int4* row, const float* groups, float, int first, int depth, float* room) {
    for (int i = 0; i < depth; i += GROUP) {
        const float* group = groups + (first + i) / GROUP * 2;
        for (int j = 0; j < GROUP / 2; j += LANES) {
            vec low, high;
            load(row + (first + i) / 2 + j, low, high);
            *(vec*)(room + i + j) = low * group[0] + group[1];
            *(vec*)(room + i + j + GROUP / 2) = high * group[0] + group[1];
        }
    }
    return room;
}

// Rows of the weight times tokens that are set side by side, for some of the inputs.
template <class W>
static void packed_rows(const Matrix& matrix, Range range, Range deep, Rows x, int tokens, Rows y) {
    int depth = deep.last - deep.first, groups = (tokens + LANES - 1) / LANES;
    float *columns = room_for<0>(int64_t(groups) * LANES * depth), *room = room_for<1>(int64_t(TALL) * depth);
    for (int m = 0; m < groups * LANES; m++)
        for (int k = 0; k < depth; k++)
            columns[(int64_t(m / LANES) * depth + k) * LANES + m % LANES] = m < tokens ? x[m][deep.first + k] : 0.0f;
    in_sizes<TALL, 4, 1>(range.last - range.first, [&](int done, auto tall) {
        constexpr int R = tall;
        const float* rows[R];
        for (int r = 0; r < R; r++) {
            int64_t row = matrix.row(range.first + done + r);
            float scale = matrix.kind == INT8 ? matrix.scale[row] : 1.0f;
            rows[r] = wide((const W*)matrix.weight + row * matrix.stride, matrix.scale + row * (matrix.inputs / GROUP * 2),
                           scale, deep.first, depth, room + int64_t(r) * depth);
        }
        in_sizes<BROAD, 1>(groups, [&](int group, auto broad) {
            constexpr int N = broad;
            vec sums[R][N] = {};
            outer<R, N>(rows, columns + int64_t(group) * LANES * depth, depth, sums);
            for (int j = 0; j < N * LANES && group * LANES + j < tokens; j++) {
                float* out = y[group * LANES + j] + range.first + done;
                for (int r = 0; r < R; r++) out[r] = (deep.first ? out[r] : 0.0f) + sums[r][j / LANES][j % LANES];
            }
        });
    });
}

// Tokens times columns of the weight [inputs, outputs] that are set side by side, for some of the inputs.
template <class W>
static void packed_columns(const Matrix& matrix, Range range, Range deep, Rows x, int tokens, Rows y) {
    int depth = deep.last - deep.first;
    float* columns = room_for<0>(int64_t(BROAD) * LANES * depth);
    for (int first = range.first; first < range.last; first += BROAD * LANES) {
        int some = std::min(BROAD * LANES, range.last - first);
        for (int k = 0; k < depth; k++) {
            const W* row = (const W*)matrix.weight + (deep.first + k) * matrix.stride + first;
            __builtin_prefetch(row + 32 * matrix.stride);  // each row lies elsewhere in memory
            for (int n = 0; n < BROAD; n++) {
                float* at = columns + (int64_t(n) * depth + k) * LANES;
                if ((n + 1) * LANES <= some)
                    *(vec*)at = load(row + n * LANES);
                else
                    for (int j = 0; j < LANES; j++) at[j] = n * LANES + j < some ? widen(row[n * LANES + j]) : 0.0f;
            }
        }
        in_sizes<TALL, 4, 1>(tokens, [&](int m, auto tall) {
            constexpr int R = tall;
            const float* rows[R];
            for (int r = 0; r < R; r++) rows[r] = x[m + r] + deep.first;
            vec sums[R][BROAD] = {};
            outer<R, BROAD>(rows, columns, depth, sums);
            for (int r = 0; r < R; r++)
                for (int j = 0; j < some; j++) {
                    float* out = y[m + r] + first + j;
                    *out = (deep.first ? *out : 0.0f) + sums[r][j / LANES][j % LANES];
                }
        });
    }
}

// The thread's outputs of x W^T, for vectors x of many tokens.
template <class W>
static void packed_product(const Matrix& matrix, Range range, Rows x, int tokens, Rows y) {
    int parts = (matrix.inputs + DEEP - 1) / DEEP;
    for (int i = 0; i < parts; i++) {
        Range deep = share(matrix.inputs, GROUP, i, parts);
        if (!matrix.transposed)
            packed_rows<W>(matrix, range, deep, x, tokens, y);
        else if constexpr (!std::is_same<W, int4>::value)
            packed_columns<W>(matrix, range, deep, x, tokens, y);
    }
}
