// What the kernels share: element types, and loops over rows of a table.
//
// Sums run in an order that depends on the data alone, never on the number of threads: every kernel gives the same bits
// on one thread and on many.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

// bfloat16 as its bits; reads as float.
struct bf16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float value;
        std::memcpy(&value, &wide, 4);
        return value;
    }
};

// Rounds to the nearest bfloat16, ties to even, as torch does; NaN stays NaN.
static inline uint16_t to_bf16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    uint32_t rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    return (wide & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : uint16_t(rounded);
}

// Rows that will be read soon: the hardware sees a row's stream only after its first lines. No more than the first cache
// has room for beside what is being read.
template <class T>
static inline void prefetch_row(const T *row, int64_t d) {
    const int64_t bytes = std::min<int64_t>(d * sizeof(T), 24 * 64);
    for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(reinterpret_cast<const char *>(row) + at);
}

// A row as bfloat16, with the norm of what that took away and the norm of the row.
static inline void round_row(const float *__restrict row, int64_t d, uint16_t *__restrict rounded, float &residual,
                             float &norm) {
    float lost = 0, square = 0;
#pragma omp simd reduction(+ : lost, square)
    for (int64_t j = 0; j < d; ++j) {
        rounded[j] = to_bf16(row[j]);
        const float gone = row[j] - float(bf16{rounded[j]});
        lost += gone * gone;
        square += row[j] * row[j];
    }
    residual = std::sqrt(lost);
    norm = std::sqrt(square);
}

// out += sum of weight[j] * row[j] over up to four rows of d elements: four at a time, since `out` is then read and
// written once for four.
template <class T>
static inline void add_rows(float *__restrict out, int64_t d, const float *weight, const T *const *row, int n) {
    const float a = weight[0], b = n > 1 ? weight[1] : 0, c = n > 2 ? weight[2] : 0, e = n > 3 ? weight[3] : 0;
    const T *__restrict p = row[0], *__restrict q = row[1], *__restrict r = row[2], *__restrict s = row[3];
    if (n == 4) {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i)
            out[i] += (a * float(p[i]) + b * float(q[i])) + (c * float(r[i]) + e * float(s[i]));
    } else if (n == 3) {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) out[i] += (a * float(p[i]) + b * float(q[i])) + c * float(r[i]);
    } else if (n == 2) {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) out[i] += a * float(p[i]) + b * float(q[i]);
    } else if (n == 1) {
#pragma omp simd
        for (int64_t i = 0; i < d; ++i) out[i] += a * float(p[i]);
    }
}
