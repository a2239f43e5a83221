// Products of bf16 numbers, two at a time (AVX512-BF16): twice as fast as widening each to float32, which is what counts
// for several tokens. The tokens' vectors are rounded to bf16 on the way in, as torch's own products expect them; sums
// are in float32.

#pragma once

#ifdef __AVX512BF16__

#include <algorithm>
#include <type_traits>
#include <vector>

#include "vectors.h"

constexpr int PAIRED_LANES = 2 * LANES;

// Vectors of `count` tokens in bf16, each filled up with zeros to whole registers.
struct Narrow {
    const bf16* data;
    int64_t stride;
    const bf16* operator[](int64_t m) const { return data + m * stride; }
};

// Rounds the tokens' vectors; they stay until the thread's next call.
template <class R>
static Narrow narrow(R x, int tokens, int inputs) {
    static thread_local std::vector<bf16> room;
    int64_t stride = (inputs + PAIRED_LANES - 1) / PAIRED_LANES * PAIRED_LANES + PAIRED_LANES;  // see Rows
    if (int64_t(room.size()) < tokens * stride) room.resize(tokens * stride);
    for (int m = 0; m < tokens; m++)
        for (int64_t i = 0; i < stride; i += LANES) {
            int64_t some = std::max<int64_t>(0, std::min<int64_t>(LANES, inputs - i));
            __m512 wide = _mm512_maskz_loadu_ps(__mmask16((1u << some) - 1), x[m] + i);
            _mm256_storeu_si256((__m256i*)(room.data() + m * stride + i), (__m256i)_mm512_cvtneps_pbh(wide));
        }
    return {room.data(), stride};
}

static inline vec pairs_added(vec total, __m512i a, __m512i b) {
    return (vec)_mm512_dpbf16_ps((__m512)total, (__m512bh)a, (__m512bh)b);
}

// R rows times M tokens, sixteen products in all: out[R m + r].
template <int R, int M, bool FIRST>
static inline vec paired_dots(const bf16* const* rows, int64_t ahead, const bf16* const* x, int inputs) {
    static_assert(R * M == LANES, "as many sums as a vector holds");
    vec sums[LANES] = {};
    for (int i = 0; i < inputs; i += PAIRED_LANES) {
        uint32_t some = inputs - i < PAIRED_LANES ? (1u << (inputs - i)) - 1 : ~0u;
        __m512i w[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) {
            w[r] = _mm512_maskz_loadu_epi16(some, rows[r] + i);
            if (FIRST) __builtin_prefetch(rows[r] + ahead + i);
        }
#pragma GCC unroll 4
        for (int m = 0; m < M; m++) {
            __m512i v = _mm512_loadu_si512(x[m] + i);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) sums[R * m + r] = pairs_added(sums[R * m + r], w[r], v);
        }
    }
    return sums_of(sums);
}

// R outputs of a map for at least M tokens, into y[m] + first.
template <int R, int M, class Y>
static void paired_rows(const bf16* const* rows, int64_t ahead, Narrow x, int inputs, int tokens, Y y, int first) {
    for (int m = 0; m < tokens; m += M) {
        int from = std::min(m, tokens - M);  // the last ones overlap those before
        const bf16* vectors[M];
        for (int k = 0; k < M; k++) vectors[k] = x[from + k];
        vec out = m ? paired_dots<R, M, false>(rows, 0, vectors, inputs)
                    : paired_dots<R, M, true>(rows, ahead, vectors, inputs);
        for (int k = 0; k < M; k++) std::memcpy(y[from + k] + first, (const float*)&out + R * k, R * sizeof(float));
    }
}

// Up to 64 outputs of x W, for a weight [inputs, outputs] at its first of these, and M tokens.
template <int M, bool FIRST>
static inline void paired_block(const bf16* weight, int64_t stride, const bf16* const* x, int inputs, int outputs,
                                float* const* y) {
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                         5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(LANES));
    uint64_t some = outputs < 64 ? (uint64_t(1) << outputs) - 1 : ~uint64_t(0);
    vec sums[M][4] = {};
    for (int i = 0; i < inputs; i += 2) {
        const bf16 *one = weight + i * stride, *two = i + 1 < inputs ? one + stride : one;
        __m512i w[4];
#pragma GCC unroll 2
        for (int h = 0; h < 2; h++) {
            __mmask32 these = uint32_t(some >> (32 * h));
            __m512i a = _mm512_maskz_loadu_epi16(these, one + 32 * h);
            __m512i b = _mm512_maskz_loadu_epi16(i + 1 < inputs ? these : 0, two + 32 * h);
            w[2 * h] = _mm512_permutex2var_epi16(a, low, b);
            w[2 * h + 1] = _mm512_permutex2var_epi16(a, high, b);
            if (FIRST) __builtin_prefetch(one + 64 + 32 * h), __builtin_prefetch(two + 64 + 32 * h);
        }
#pragma GCC unroll 6
        for (int m = 0; m < M; m++) {
            int32_t pair;
            std::memcpy(&pair, x[m] + i, sizeof pair);
            __m512i v = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) sums[m][k] = pairs_added(sums[m][k], w[k], v);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++)
#pragma GCC unroll 4
        for (int k = 0; k < 4; k++) _mm512_mask_storeu_ps(y[m] + LANES * k, __mmask16(some >> (LANES * k)), (__m512)sums[m][k]);
}

// Outputs `first` to `last` of x W for a weight [inputs, outputs].
template <class R>
static void paired_columns(const bf16* weight, int64_t stride, int first, int last, Narrow x, int inputs, int tokens,
                           R y) {
    for (; first < last; first += 64) {
        int m = 0, outputs = std::min(64, last - first);
        auto run = [&](auto width) {
            constexpr int M = decltype(width)::value;
            for (; m + M <= tokens; m += M) {
                const bf16* vectors[M];
                float* out[M];
                for (int k = 0; k < M; k++) vectors[k] = x[m + k], out[k] = y[m + k] + first;
                if (m == 0)
                    paired_block<M, true>(weight + first, stride, vectors, inputs, outputs, out);
                else
                    paired_block<M, false>(weight + first, stride, vectors, inputs, outputs, out);
            }
        };
        run(std::integral_constant<int, 6>{});
        run(std::integral_constant<int, 4>{});
        run(std::integral_constant<int, 2>{});
        run(std::integral_constant<int, 1>{});
    }
}

#endif
