// The vectors that linear maps are applied to, and the parts of the work that fall to each thread.

#pragma once

#include <algorithm>

#include "structs.h"
#include "vectors.h"

constexpr int GROUP = 32;  // 4-bit numbers that share a scale and an offset

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
