// The products of a sparse step: decode, gradients of the values, gradients of a weight; and the transposed pattern.
//
// Entries of row b are offsets[b] .. offsets[b + 1] - 1. Tables are row-major, (n, d), float or bfloat16; everything
// is accumulated in float.
#include <algorithm>
#include <vector>

#include "rows.h"

namespace {

// out[i] = sum over the entries p of segment i of values[at(p)] * table[row(p)].
template <class T, class At, class Row>
void segment_sums(int64_t n, const int64_t *offsets, const float *values, const T *table, int64_t d, float *out, At at,
                  Row row, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (int64_t i = 0; i < n; ++i) {
        float *sum = out + i * d;
        std::memset(sum, 0, sizeof(float) * d);
        for (int64_t p = offsets[i]; p < offsets[i + 1]; p += 4) {
            const int m = int(std::min<int64_t>(4, offsets[i + 1] - p));
            float weight[4];
            const T *rows[4] = {table, table, table, table};
            for (int j = 0; j < m; ++j) {
                weight[j] = values[at(p + j)];
                rows[j] = table + row(p + j) * d;
            }
            for (int64_t j = p + 4; j < std::min(p + 8, offsets[i + 1]); ++j) prefetch_row(table + row(j) * d, d);
            add_rows(sum, d, weight, rows, m);
        }
    }
}

template <class T>
void row_dots(int64_t n, const int64_t *indices, const int64_t *offsets, const float *rows, const T *table, int64_t d,
              float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (int64_t b = 0; b < n; ++b) {
        const float *__restrict row = rows + b * d;
        for (int64_t p = offsets[b]; p < offsets[b + 1]; ++p) {
            const T *__restrict other = table + indices[p] * d;
            if (p + 3 < offsets[b + 1]) prefetch_row(table + indices[p + 3] * d, d);
            float dot = 0;
#pragma omp simd reduction(+ : dot)
            for (int64_t i = 0; i < d; ++i) dot += row[i] * float(other[i]);
            out[p] = dot;
        }
    }
}

template <class T, class Store>
void spread(int64_t n, const int64_t *indices, const int64_t *offsets, const float *values, int64_t width, T *dense,
            Store store, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n; ++b) {
        T *row = dense + b * width;
        std::memset(row, 0, sizeof(T) * width);
        for (int64_t p = offsets[b]; p < offsets[b + 1]; ++p) row[indices[p]] = store(values[p]);
    }
}

}  // namespace

extern "C" {

// out[b] = sum_j values[b, j] * table[indices[b, j]]
void saeforge_gather_sum(int64_t n, const int64_t *indices, const int64_t *offsets, const float *values,
                         const void *table, int is_bf16, int64_t d, float *out, int threads) {
    auto at = [](int64_t p) { return p; };
    auto row = [=](int64_t p) { return indices[p]; };
    if (is_bf16)
        segment_sums(n, offsets, values, static_cast<const bf16 *>(table), d, out, at, row, threads);
    else
        segment_sums(n, offsets, values, static_cast<const float *>(table), d, out, at, row, threads);
}

// out[i] = sum over entries p of latent i, in the order of their rows, of values[order[p]] * table[rows[p]]
void saeforge_scatter_outer(int64_t n, const int64_t *order, const int64_t *rows, const int64_t *offsets,
                            const float *values, const void *table, int is_bf16, int64_t d, float *out, int threads) {
    auto at = [=](int64_t p) { return order[p]; };
    auto row = [=](int64_t p) { return rows[p]; };
    if (is_bf16)
        segment_sums(n, offsets, values, static_cast<const bf16 *>(table), d, out, at, row, threads);
    else
        segment_sums(n, offsets, values, static_cast<const float *>(table), d, out, at, row, threads);
}

// out[b, j] = <rows[b], table[indices[b, j]]>
void saeforge_row_dots(int64_t n, const int64_t *indices, const int64_t *offsets, const float *rows, const void *table,
                       int is_bf16, int64_t d, float *out, int threads) {
    if (is_bf16)
        row_dots(n, indices, offsets, rows, static_cast<const bf16 *>(table), d, out, threads);
    else
        row_dots(n, indices, offsets, rows, static_cast<const float *>(table), d, out, threads);
}

// dense[b, indices[b, j]] = values[b, j], 0 elsewhere; as float or as bfloat16. For products over dense codes.
void saeforge_spread(int64_t n, const int64_t *indices, const int64_t *offsets, const float *values, int64_t width,
                     void *dense, int is_bf16, int threads) {
    if (is_bf16)
        spread(n, indices, offsets, values, width, static_cast<uint16_t *>(dense), to_bf16, threads);
    else
        spread(n, indices, offsets, values, width, static_cast<float *>(dense), [](float v) { return v; }, threads);
}

// out[b, j] = dense[b, indices[b, j]]
void saeforge_collect(int64_t n, const int64_t *indices, const int64_t *offsets, const void *dense, int is_bf16,
                      int64_t width, float *out, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n; ++b)
        for (int64_t p = offsets[b]; p < offsets[b + 1]; ++p) {
            const int64_t at = b * width + indices[p];
            out[p] = is_bf16 ? float(static_cast<const bf16 *>(dense)[at]) : static_cast<const float *>(dense)[at];
        }
}

// Entries sorted by latent, and by row inside a latent: a counting sort. Each thread owns a range of latents and passes
// over all entries, so that no two write to one place.
void saeforge_by_latent(int64_t n_rows, const int64_t *indices, const int64_t *offsets, int64_t n_latents,
                        int64_t *order, int64_t *rows, int64_t *latent_offsets, int threads) {
    const int64_t nnz = offsets[n_rows];
    std::vector<int64_t> next(n_latents + 1, 0);
    const int64_t share = (n_latents + threads - 1) / threads;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t low = t * share, width = std::max<int64_t>(0, std::min(n_latents - low, share));
        for (int64_t p = 0; p < nnz; ++p)
            if (uint64_t(indices[p] - low) < uint64_t(width)) ++next[indices[p]];
    }
    int64_t total = 0;
    for (int64_t i = 0; i < n_latents; ++i) {
        latent_offsets[i] = total;
        total += next[i];
        next[i] = latent_offsets[i];
    }
    latent_offsets[n_latents] = total;
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int t = 0; t < threads; ++t) {
        const int64_t low = t * share, width = std::max<int64_t>(0, std::min(n_latents - low, share));
        for (int64_t b = 0; b < n_rows; ++b)
            for (int64_t p = offsets[b]; p < offsets[b + 1]; ++p)
                if (uint64_t(indices[p] - low) < uint64_t(width)) {
                    const int64_t to = next[indices[p]]++;
                    order[to] = p;
                    rows[to] = b;
                }
    }
}

}  // extern "C"
