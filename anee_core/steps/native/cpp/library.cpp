// What Python calls: each function takes its structs by pointer, and does the work in the model's type.

#include "stack.h"

template <class T>
static void linear(const Matrix& matrix, const T* x, T* y, int tokens, float* scratch, int most) {
    Rows wide = take(scratch, tokens, matrix.inputs), out = take(scratch, tokens, matrix.outputs);
    for (int m = 0; m < tokens; m++)
        for (int i = 0; i < matrix.inputs; i++) wide[m][i] = widen(x[int64_t(m) * matrix.inputs + i]);
#pragma omp parallel num_threads(most)
    {
        Range range = product<T>(matrix, wide, tokens, out, omp_get_thread_num(), omp_get_num_threads());
        for (int m = 0; m < tokens; m++)
            for (int r = range.first; r < range.last; r++) store(y + int64_t(m) * matrix.outputs + r, out[m][r]);
    }
}

template <class T>
static void norm_states(const NormWeights& norm, const T* x, T* y, int tokens, int width, float* scratch) {
    for (int m = 0; m < tokens; m++) {
        normalise<T>(norm, x + int64_t(m) * width, scratch, width);
        for (int i = 0; i < width; i++) store(y + int64_t(m) * width + i, scratch[i]);
    }
}

extern "C" {

// Sizes of the structs and the constants, as LAYOUT in structs.py has them. Returns how many numbers those are.
int32_t anee_layout(int32_t* numbers) {
    const int32_t known[] = {sizeof(Matrix),  sizeof(NormWeights), sizeof(Layer),  sizeof(Tokens), sizeof(Storage),
                             sizeof(Gate), sizeof(Interaction), sizeof(Layers), QUERIES, PORTION};
    std::memcpy(numbers, known, sizeof(known));
    return int32_t(sizeof(known) / sizeof(known[0]));
}

// Whether the processor itself multiplies bf16 numbers, which is what makes torch's own products of them fast.
int32_t anee_multiplies_bf16() {
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16)
    return 1;
#else
    return 0;
#endif
}

// Run the layer for the tokens: their keys and values go into the cache, their new states into `result`.
void anee_run(const Layer* layer, const Tokens* tokens) {
    layer->kind == BFLOAT16 ? run<bf16>(*layer, *tokens) : run<float>(*layer, *tokens);
}

// Write the tokens' keys and values alone.
void anee_project(const Layer* layer, const Tokens* tokens) {
    layer->kind == BFLOAT16 ? project<bf16>(*layer, *tokens) : project<float>(*layer, *tokens);
}

// y [M, width] = norm(x [M, width]), in a model of `kind`; scratch has `width` floats.
void anee_norm(const NormWeights* norm, const void* x, void* y, int32_t tokens, int32_t width, int32_t kind,
               float* scratch) {
    kind == BFLOAT16 ? norm_states(*norm, (const bf16*)x, (bf16*)y, tokens, width, scratch)
                     : norm_states(*norm, (const float*)x, (float*)y, tokens, width, scratch);
}

// y [M, outputs] = x [M, inputs] W^T + b, in a model of `kind`; scratch has M * (inputs + outputs + 32) floats.
void anee_linear(const Matrix* matrix, const void* x, void* y, int32_t tokens, int32_t kind, float* scratch,
                 int32_t threads) {
    kind == BFLOAT16 ? linear(*matrix, (const bf16*)x, (bf16*)y, tokens, scratch, threads)
                     : linear(*matrix, (const float*)x, (float*)y, tokens, scratch, threads);
}

// Take the tokens through all layers; their states are replaced, `result` has room for as many.
void anee_stack(const Layers* all, const Tokens* tokens) {
    if (all->layers[0]->kind == BFLOAT16)
        stack<bf16>(*all, *tokens, (bf16*)tokens->states);
    else
        stack<float>(*all, *tokens, (float*)tokens->states);
}
}
