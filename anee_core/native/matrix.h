// Linear maps, and the vectors that they are applied to. Matrix is mirrored in structs.py.

#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int GROUP = 32;  // 4-bit numbers that share a scale and an offset

enum Kind : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };

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

struct Range { int first, last; };

// A vector for each token. The space between them keeps the vectors of many tokens from competing for one place in the cache.
struct Rows {
    float* data;
    int64_t stride;
    float* operator[](int64_t m) const { return data + m * stride; }
};

// Takes vectors of some width for `count` tokens from the scratch.
static inline Rows take(float*& scratch, int64_t count, int64_t width) {
    Rows rows = {scratch, width + LANES};
    scratch += count * rows.stride;
    return rows;
}

// The part of `count` things that falls to a thread, in multiples of `unit`.
static inline Range share(int count, int unit, int thread, int threads) {
    int64_t units = (count + unit - 1) / unit;
    return {int(std::min<int64_t>(count, units * thread / threads * unit)),
            int(std::min<int64_t>(count, units * (thread + 1) / threads * unit))};
}
