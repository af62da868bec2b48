// Passes over dense rows: what a reconstruction leaves of its target, and the gradient of its square.
#include <algorithm>
#include <vector>

#include "rows.h"

extern "C" {

// error[b] = target[b] - (rebuilt[b] + bias), squares[b] = |error[b]|^2
void saeforge_residual(int64_t n, int64_t d, const float *target, const float *rebuilt, const float *bias, float *error,
                       float *squares, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t b = 0; b < n; ++b) {
        const float *__restrict t = target + b * d, *__restrict r = rebuilt + b * d;
        float *__restrict e = error + b * d;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < d; ++j) {
            e[j] = t[j] - (r[j] + bias[j]);
            sum += e[j] * e[j];
        }
        squares[b] = sum;
    }
}

// grad[b] = -2 * weight[b] * error[b], the gradient of sum_b weight[b] |error[b]|^2 by the reconstruction; sums[j]: its
// sum over rows. Rows are added in blocks, blocks in order: the number of threads changes no bit.
void saeforge_residual_grad(int64_t n, int64_t d, const float *error, const float *weight, float *grad, float *sums,
                            int threads) {
    constexpr int64_t block = 64;
    const int64_t blocks = (n + block - 1) / block;
    std::vector<float> parts(blocks * d, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
        float *__restrict part = parts.data() + i * d;
        for (int64_t b = i * block; b < std::min(n, (i + 1) * block); ++b) {
            const float *__restrict e = error + b * d;
            float *__restrict g = grad + b * d;
            const float factor = -2 * weight[b];
#pragma omp simd
            for (int64_t j = 0; j < d; ++j) {
                g[j] = factor * e[j];
                part[j] += g[j];
            }
        }
    }
    std::memset(sums, 0, sizeof(float) * d);
    for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < d; ++j) sums[j] += parts[i * d + j];
}

// out[j] = sum_i weight[i] * table[i, j], in blocks as above.
void saeforge_row_sum(int64_t n, int64_t d, const float *weight, const float *table, float *out, int threads) {
    constexpr int64_t block = 64;
    const int64_t blocks = (n + block - 1) / block;
    std::vector<float> parts(blocks * d, 0);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
        const int64_t stop = std::min(n, (i + 1) * block);
        for (int64_t b = i * block; b < stop; b += 4) {
            const int m = int(std::min<int64_t>(4, stop - b));
            const float *rows[4] = {table, table, table, table};
            for (int j = 0; j < m; ++j) rows[j] = table + (b + j) * d;
            add_rows(parts.data() + i * d, d, weight + b, rows, m);
        }
    }
    std::memset(out, 0, sizeof(float) * d);
    for (int64_t i = 0; i < blocks; ++i)
        for (int64_t j = 0; j < d; ++j) out[j] += parts[i * d + j];
}

}  // extern "C"
