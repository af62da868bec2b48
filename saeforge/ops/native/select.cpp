// Which pre-activations of a row are active: the k largest, ties to the lowest index, or all above a threshold.
#include "order.h"

namespace {

template <class T>
void top_k(const T *pre, int64_t n_rows, int64_t n, int64_t k, float *values, int64_t *indices, int threads) {
    using K = typename KeyOf<T>::type;
#pragma omp parallel num_threads(threads)
    {
        Blocks<T> blocks(n, k);
        Candidates<K> found;
#pragma omp for schedule(dynamic, 16)
        for (int64_t b = 0; b < n_rows; ++b) {
            const T *row = pre + b * n;
            blocks.read(row);
            blocks.above(row, blocks.floor(k), found);
            int64_t to = b * k;
            choose_k(found.keys.data(), found.count, k, [&](int64_t j) {
                values[to] = float(row[found.places[j]]);
                indices[to++] = found.places[j];
            });
        }
    }
}

// A NaN is above every threshold: it must not vanish.
template <class T>
void count_above(const T *pre, int64_t n_rows, int64_t n, const float *threshold, int64_t stride, int64_t *counts,
                 int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n_rows; ++b) {
        const T *row = pre + b * n;
        int32_t count = 0;
        if (stride) {
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < n; ++i) count += !(float(row[i]) <= threshold[i]);
        } else {
            const float bound = threshold[0];
#pragma omp simd reduction(+ : count)
            for (int64_t i = 0; i < n; ++i) count += !(float(row[i]) <= bound);
        }
        counts[b] = count;
    }
}

template <class T>
void take_above(const T *pre, int64_t n_rows, int64_t n, const float *threshold, int64_t stride, const int64_t *offsets,
                float *values, int64_t *indices, int threads) {
    constexpr int64_t block = 32;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n_rows; ++b) {
        const T *row = pre + b * n;
        int64_t to = offsets[b];
        for (int64_t start = 0; start < n && to < offsets[b + 1]; start += block) {
            const int64_t stop = std::min(n, start + block);
            int32_t found = 0;
#pragma omp simd reduction(+ : found)
            for (int64_t i = start; i < stop; ++i) found += !(float(row[i]) <= threshold[stride * i]);
            if (!found) continue;
            // Without a branch, which would be mispredicted for every other entry of a dense row: what is not above is
            // overwritten by the next. One more place than entries is never written, since the row ends there.
            for (int64_t i = start; i < stop && to < offsets[b + 1]; ++i) {
                const float value = float(row[i]);
                values[to] = value;
                indices[to] = i;
                to += !(value <= threshold[stride * i]);
            }
        }
    }
}

}  // namespace

extern "C" {

// values, indices: (n_rows, k), ascending by index.
void saeforge_top_k(const void *pre, int is_bf16, int64_t n_rows, int64_t n, int64_t k, float *values,
                    int64_t *indices, int threads) {
    if (is_bf16)
        top_k(static_cast<const bf16 *>(pre), n_rows, n, k, values, indices, threads);
    else
        top_k(static_cast<const float *>(pre), n_rows, n, k, values, indices, threads);
}

// How many entries of each row lie above threshold[stride * i]; stride is 0 for one threshold, 1 for one a latent.
void saeforge_count_above(const void *pre, int is_bf16, int64_t n_rows, int64_t n, const float *threshold,
                          int64_t stride, int64_t *counts, int threads) {
    if (is_bf16)
        count_above(static_cast<const bf16 *>(pre), n_rows, n, threshold, stride, counts, threads);
    else
        count_above(static_cast<const float *>(pre), n_rows, n, threshold, stride, counts, threads);
}

// These entries, at offsets that are the running sums of those counts.
void saeforge_take_above(const void *pre, int is_bf16, int64_t n_rows, int64_t n, const float *threshold,
                         int64_t stride, const int64_t *offsets, float *values, int64_t *indices, int threads) {
    if (is_bf16)
        take_above(static_cast<const bf16 *>(pre), n_rows, n, threshold, stride, offsets, values, indices, threads);
    else
        take_above(static_cast<const float *>(pre), n_rows, n, threshold, stride, offsets, values, indices, threads);
}

}  // extern "C"
