// One optimizer step over rows: project, clip, Adam, renormalise, and the bfloat16 shadow, in two passes.
//
// The first pass reads gradients (and constrained rows) for the global norm, the second does everything else while a
// row is in the cache.
#include <algorithm>
#include <cmath>
#include <limits>

#include "rows.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

// Treats denormal numbers as zero while it lives: the moments of a silent latent decay into them, where every operation
// takes a hundred cycles.
struct NoDenormals {
#if defined(__SSE2__)
    unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};

}  // namespace

extern "C" {

// squares[i] = |g|^2 of row i after projection; dots[i] = <g, p> / |p|^2, or untouched where the row is free.
//
// The projected gradient is g - <g, p> p (p has norm 1), whose square is |g|^2 - 2 <g, p>^2 + <g, p>^2 |p|^2.
void saeforge_row_norms(int64_t n, int64_t d, const float *grad, const float *rows, int constrained, double *squares,
                        float *dots, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
        const float *__restrict g = grad + i * d;
        if (!constrained) {
            float square = 0;
#pragma omp simd reduction(+ : square)
            for (int64_t j = 0; j < d; ++j) square += g[j] * g[j];
            squares[i] = square;
            continue;
        }
        const float *__restrict p = rows + i * d;
        float dot = 0, square = 0;
#pragma omp simd reduction(+ : dot)
        for (int64_t j = 0; j < d; ++j) dot += g[j] * p[j];
#pragma omp simd reduction(+ : square)
        for (int64_t j = 0; j < d; ++j) {
            const float projected = g[j] - dot * p[j];
            square += projected * projected;
        }
        dots[i] = dot;
        squares[i] = square;
    }
}

// Adam on each row with the gradient (g - dot * p) * clip; rows that have dots go back to norm 1.
//
// step_size = lr / (1 - beta1^t), root = sqrt(1 - beta2^t). If given, `rounded` gets the new rows as bfloat16, with the
// norms of what that rounding took away and of the rows (as saeforge_round_rows).
void saeforge_row_adam(int64_t n, int64_t d, float *rows, const float *grad, float *mean, float *square,
                       const float *dots, float clip, float beta1, float beta2, float eps, float step_size, float root,
                       uint16_t *rounded, float *residual, float *norm, int threads) {
    const float per_root = 1 / root;
#pragma omp parallel num_threads(threads)
    {
        const NoDenormals here;
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i) {
            float *__restrict p = rows + i * d;
            const float *__restrict g = grad + i * d;
            float *__restrict m = mean + i * d, *__restrict v = square + i * d;
            const float dot = dots ? dots[i] : 0;
            float sum = 0;
#pragma omp simd reduction(+ : sum)
            for (int64_t j = 0; j < d; ++j) {
                const float gradient = (g[j] - dot * p[j]) * clip;
                m[j] += (1 - beta1) * (gradient - m[j]);
                v[j] = beta2 * v[j] + (1 - beta2) * gradient * gradient;
                p[j] -= step_size * m[j] / (std::sqrt(v[j]) * per_root + eps);
                sum += p[j] * p[j];
            }
            if (dots) {
                const float scale = 1 / std::max(std::sqrt(sum), std::numeric_limits<float>::min());
#pragma omp simd
                for (int64_t j = 0; j < d; ++j) p[j] *= scale;
            }
            if (rounded) round_row(p, d, rounded + i * d, residual[i], norm[i]);
        }
    }
}

}  // extern "C"
