// Keys that order like the numbers they stand for, and the k best of a few candidates.
#pragma once

#include <algorithm>
#include <functional>
#include <vector>

#include "rows.h"

// A signed integer that orders like the value: NaN above everything (it must not vanish), both zeros equal.
static inline int16_t key(bf16 value) {
    const int16_t bits = int16_t(value.bits), order = bits ^ ((bits >> 15) & 0x7fff);
    return (bits & 0x7fff) > 0x7f80 ? 0x7fff : int16_t(order + (order >> 15 & 1));
}

static inline int32_t key(float value) {
    int32_t bits;
    std::memcpy(&bits, &value, 4);
    const int32_t order = bits ^ ((bits >> 31) & 0x7fffffff);
    return (bits & 0x7fffffff) > 0x7f800000 ? 0x7fffffff : order + (order >> 31 & 1);
}

template <class T>
struct KeyOf;
template <>
struct KeyOf<bf16> {
    using type = int16_t;
};
template <>
struct KeyOf<float> {
    using type = int32_t;
};

// The k largest keys among candidates in ascending order of their place: take(j) is called for each one chosen, in that
// order; of equal keys the first are.
template <class K, class Take>
static inline void choose_k(const std::vector<K> &keys, int64_t k, std::vector<K> &scratch, Take take) {
    scratch.assign(keys.begin(), keys.end());
    std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<K>());
    const K last = scratch[k - 1];
    int64_t equal = k;
    for (K found : keys) equal -= found > last;
    for (size_t j = 0; j < keys.size(); ++j)
        if (keys[j] > last || (keys[j] == last && equal-- > 0)) take(j);
}

// Maxima of blocks of a row, by which most of it can be passed over.
//
// The k-th largest of the maxima is at most the k-th largest value: k blocks hold one at least as large. So all that
// may be among the k largest lies at or above it, in the blocks whose maximum does.
template <class T>
struct Blocks {
    using K = typename KeyOf<T>::type;
    int64_t n, size, count;
    std::vector<K> maxima, scratch;

    Blocks(int64_t n, int64_t k) : n(n), size(64) {
        while (size > 1 && (n + size - 1) / size < 2 * k) size /= 2;
        count = (n + size - 1) / size;
        maxima.resize(count);
    }

    void read(const T *row) {
        for (int64_t i = 0; i < count; ++i) {
            const T *block = row + i * size;
            const int64_t width = std::min(size, n - i * size);
            K most = key(block[0]);
#pragma omp simd reduction(max : most)
            for (int64_t j = 0; j < width; ++j) {
                const K other = key(block[j]);
                most = most > other ? most : other;
            }
            maxima[i] = most;
        }
    }

    // A key that at least k entries of the row reach. There are k maxima: blocks of one entry are the last resort.
    K floor(int64_t k) {
        scratch = maxima;
        std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<K>());
        return scratch[k - 1];
    }

    // found(place, key) for every entry of the row that reaches the floor, in order.
    template <class Found>
    void above(const T *row, K floor, Found found) const {
        for (int64_t i = 0; i < count; ++i) {
            if (maxima[i] < floor) continue;
            for (int64_t j = i * size; j < std::min(n, (i + 1) * size); ++j) {
                const K other = key(row[j]);
                if (other >= floor) found(j, other);
            }
        }
    }
};
