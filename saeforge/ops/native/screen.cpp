// Selection in float from a product in bfloat16: the cheap product says which latents may be chosen, and only those
// are computed in full precision.
//
// Every pre-activation p of a row is wrong by at most margin + RELATIVE * |p| (ops/screen.py says why). Both ends of
// that interval rise with p, so bounds carry over from one entry to all.
#include <cmath>

#include "order.h"

namespace {

// Rounding a product to bfloat16 moves it by at most 2^-8 of itself; a little more, for the arithmetic here.
constexpr float RELATIVE = 1.02f / 256;

inline float lower(float p) { return p - RELATIVE * std::fabs(p); }

// The least p whose upper end p + RELATIVE * |p| reaches `bound`.
inline float reaching(float bound) { return bound / (bound > 0 ? 1 + RELATIVE : 1 - RELATIVE); }

inline bf16 round_down(float value) {
    bf16 down{to_bf16(value)};
    if (float(down) <= value) return down;
    // One step towards minus infinity.
    if (down.bits == 0) return bf16{0x8001};
    return bf16{uint16_t(down.bits & 0x8000 ? down.bits + 1 : down.bits - 1)};
}

inline float dot(const float *__restrict a, const float *__restrict b, int64_t d) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < d; ++i) sum += a[i] * b[i];
    return sum;
}

}  // namespace

extern "C" {

// The k largest of <x[b], weight[i]> + bias[i] in each row; pre are bfloat16 approximations within margin[b].
void saeforge_screened_top_k(const bf16 *pre, int64_t n_rows, int64_t n, int64_t k, const float *margin, const float *x,
                             const float *weight, const float *bias, int64_t d, float *values, int64_t *indices,
                             int threads) {
#pragma omp parallel num_threads(threads)
    {
        Blocks<bf16> blocks(n, k);
        Candidates<int16_t> found;
        std::vector<int32_t> exact_keys;
        std::vector<float> exact;
#pragma omp for schedule(dynamic, 16)
        for (int64_t b = 0; b < n_rows; ++b) {
            const bf16 *row = pre + b * n;
            blocks.read(row);
            blocks.above(row, blocks.floor(k), found);
            const int16_t last = kth_largest(found.keys.data(), found.count, k);
            const size_t at = std::find(found.keys.begin(), found.keys.end(), last) - found.keys.begin();
            const float bound = reaching(lower(float(row[found.places[at]])) - 2 * margin[b]);
            // k entries are certain to reach lower(k-th) - margin; who cannot reach that is out.
            blocks.above(row, key(round_down(bound)), found);
            const int64_t *places = found.places.data();
            exact.resize(found.count);
            exact_keys.resize(found.count);
            for (int64_t j = 0; j < found.count; ++j) {
                if (j + 3 < found.count) prefetch_row(weight + places[j + 3] * d, d);
                exact[j] = dot(x + b * d, weight + places[j] * d, d) + (bias ? bias[places[j]] : 0.0f);
                exact_keys[j] = key(exact[j]);
            }
            int64_t to = b * k;
            choose_k(exact_keys.data(), found.count, k, [&](int64_t j) {
                values[to] = exact[j];
                indices[to++] = places[j];
            });
        }
    }
}

// How many entries of each row may lie above threshold[stride * i].
void saeforge_screened_count(const bf16 *pre, int64_t n_rows, int64_t n, const float *margin, const float *threshold,
                             int64_t stride, int64_t *counts, int threads) {
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n_rows; ++b) {
        const bf16 *row = pre + b * n;
        const float slack = margin[b];
        int32_t count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = 0; i < n; ++i) {
            const float p = float(row[i]);
            count += !(p + RELATIVE * std::fabs(p) + slack <= threshold[stride * i]);
        }
        counts[b] = count;
    }
}

// The entries of <x[b], weight[i]> + bias[i] above the threshold, at offsets[b]; counts: how many there are, at most
// as many as saeforge_screened_count said.
void saeforge_screened_above(const bf16 *pre, int64_t n_rows, int64_t n, const float *margin, const float *threshold,
                             int64_t stride, const float *x, const float *weight, const float *bias, int64_t d,
                             const int64_t *offsets, float *values, int64_t *indices, int64_t *counts, int threads) {
    constexpr int64_t block = 32;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 16)
    for (int64_t b = 0; b < n_rows; ++b) {
        const bf16 *row = pre + b * n;
        const float slack = margin[b];
        int64_t to = offsets[b];
        for (int64_t start = 0; start < n; start += block) {
            const int64_t stop = std::min(n, start + block);
            int32_t any = 0;
#pragma omp simd reduction(| : any)
            for (int64_t i = start; i < stop; ++i) {
                const float p = float(row[i]);
                any |= !(p + RELATIVE * std::fabs(p) + slack <= threshold[stride * i]);
            }
            if (!any) continue;
            for (int64_t i = start; i < stop; ++i) {
                const float p = float(row[i]), bound = threshold[stride * i];
                if (p + RELATIVE * std::fabs(p) + slack <= bound) continue;
                const float exact = dot(x + b * d, weight + i * d, d) + (bias ? bias[i] : 0.0f);
                if (exact <= bound) continue;
                values[to] = exact;
                indices[to++] = i;
            }
        }
        counts[b] = to - offsets[b];
    }
}

// weight rounded to bfloat16, with what that rounding took away: residual[i] = |w_i - rounded w_i|, norm[i] = |w_i|.
void saeforge_round_rows(int64_t n, int64_t d, const float *weight, uint16_t *rounded, float *residual, float *norm,
                         int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) round_row(weight + i * d, d, rounded + i * d, residual[i], norm[i]);
}

}  // extern "C"
