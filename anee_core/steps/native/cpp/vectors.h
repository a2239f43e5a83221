// As many numbers at once as a register holds, whatever type they are stored in.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// Vectors wider than a register would be kept in memory.
#if defined(__AVX512F__)
constexpr int LANES = 16, REGISTERS = 32;
#elif defined(__AVX2__)
constexpr int LANES = 8, REGISTERS = 16;
#else
constexpr int LANES = 4, REGISTERS = 32;
#endif

struct bf16 { uint16_t bits; };
struct int4 { uint8_t pair; };  // numbers i and i + 16 of 32

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t vec_bits __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vec_int __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t vec_half __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t vec_byte __attribute__((vector_size(LANES), aligned(1)));

static inline float widen(float x) { return x; }
static inline float widen(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}
static inline void store(float* at, float x) { *at = x; }
static inline void store(bf16* at, float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
static inline vec load(const float* p) { return *(const vec*)p; }
static inline vec load(const bf16* p) {
#if defined(__AVX2__) && !defined(__AVX512F__)  // compilers make two halves of it, and join them
    return (vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    return (vec)(__builtin_convertvector(*(const vec_half*)p, vec_bits) << 16);
#endif
}
static inline vec load(const int8_t* p) {
#if defined(__AVX512F__)  // compilers make single conversions of the last
    return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(*(const vec_byte*)p, vec);
#endif
}
static inline float widen(int8_t x) { return x; }
// The numbers in the lower halves of the pairs at p, and those in the upper ones.
static inline void load(const int4* p, vec& low, vec& high) {
#if defined(__AVX512F__)
    __m512i pairs = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
    low = (vec)_mm512_cvtepi32_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(15)));
    high = (vec)_mm512_cvtepi32_ps(_mm512_srli_epi32(pairs, 4));
#elif defined(__AVX2__)
    __m256i pairs = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
    low = (vec)_mm256_cvtepi32_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(15)));
    high = (vec)_mm256_cvtepi32_ps(_mm256_srli_epi32(pairs, 4));
#else
    for (int k = 0; k < LANES; k++) low[k] = p[k].pair & 15, high[k] = p[k].pair >> 4;
#endif
}
static inline float sum(vec v) {
    typedef float eight __attribute__((vector_size(32)));
    typedef float quarter __attribute__((vector_size(16)));
    quarter q[LANES / 4];
    if constexpr (LANES == 16) {
        eight h[2];
        std::memcpy(h, &v, sizeof v);
        h[0] += h[1];
        std::memcpy(q, &h[0], sizeof h[0]);
    } else {
        std::memcpy(q, &v, sizeof v);
    }
    if constexpr (LANES > 4) q[0] += q[1];
    return (q[0][0] + q[0][1]) + (q[0][2] + q[0][3]);
}

// The sums of as many vectors as one holds, in order.
static inline vec sums_of(const vec (&v)[LANES]) {
#if defined(__AVX512F__)
    __m512 two[8], four[4], eight[2];
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) {
        __m512 a = (__m512)v[2 * k], b = (__m512)v[2 * k + 1];
        two[k] = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
    }
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        __m512d a = (__m512d)two[2 * k], b = (__m512d)two[2 * k + 1];
        four[k] = (__m512)_mm512_unpacklo_pd(a, b) + (__m512)_mm512_unpackhi_pd(a, b);
    }
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++)
        eight[k] = _mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0x88) +
                   _mm512_shuffle_f32x4(four[2 * k], four[2 * k + 1], 0xdd);
    return (vec)(_mm512_shuffle_f32x4(eight[0], eight[1], 0x88) + _mm512_shuffle_f32x4(eight[0], eight[1], 0xdd));
#elif defined(__AVX2__)
    __m256 two[4], four[2];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) two[k] = _mm256_hadd_ps((__m256)v[2 * k], (__m256)v[2 * k + 1]);
#pragma GCC unroll 2
    for (int k = 0; k < 2; k++) four[k] = _mm256_hadd_ps(two[2 * k], two[2 * k + 1]);
    return (vec)(_mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31));
#else
    vec sums;
    for (int k = 0; k < LANES; k++) sums[k] = sum(v[k]);
    return sums;
#endif
}

// exp, to about two units in the last place (range reduction to |r| <= ln2/2 and a polynomial).
static inline vec exponential(vec x) {
    x = x < -87.0f ? (vec{} - 87.0f) : x;
    x = x > 88.0f ? (vec{} + 88.0f) : x;
    vec t = x * 1.44269504f;
    vec_int whole = __builtin_convertvector(t + (t < 0.0f ? (vec{} - 0.5f) : (vec{} + 0.5f)), vec_int);
    vec n = __builtin_convertvector(whole, vec);
    vec r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vec p = vec{} + 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)((whole + 127) << 23);
}
