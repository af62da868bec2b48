// Keys that order like the numbers they stand for, and the k best of a few candidates.
#pragma once

#include <algorithm>
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

// How many of n keys are at least `bound`. In parts, so that counts fit into lanes as narrow as the keys.
template <class K>
static inline int64_t count_reaching(const K *__restrict keys, int64_t n, K bound) {
    int64_t total = 0;
    for (int64_t start = 0; start < n; start += 1 << 14) {
        const int64_t stop = std::min<int64_t>(n, start + (1 << 14));
        K count = 0;
#pragma omp simd reduction(+ : count)
        for (int64_t i = start; i < stop; ++i) count += K(keys[i] >= bound);
        total += count;
    }
    return total;
}

// The k-th largest of n keys, 1 <= k <= n. By halving the range of keys: a handful of passes of vectors over keys that lie
// in the first cache cost a tenth of a selection by comparison, whose branches nobody can predict.
template <class K>
static inline K kth_largest(const K *__restrict keys, int64_t n, int64_t k) {
    K least = keys[0], most = keys[0];
#pragma omp simd reduction(min : least) reduction(max : most)
    for (int64_t i = 0; i < n; ++i) {
        least = keys[i] < least ? keys[i] : least;
        most = keys[i] > most ? keys[i] : most;
    }
    while (least < most) {  // at least k keys reach `least`, fewer than k pass `most`
        const K middle = K(least + (int64_t(most) - least + 1) / 2);
        const int64_t count = count_reaching(keys, n, middle);
        if (count == k) {
            K last = most;
#pragma omp simd reduction(min : last)
            for (int64_t i = 0; i < n; ++i) last = keys[i] >= middle && keys[i] < last ? keys[i] : last;
            return last;
        }
        if (count > k)
            least = middle;
        else
            most = K(middle - 1);
    }
    return least;
}

// The k largest keys among n candidates in ascending order of their place: take(j) is called for each one chosen, in
// that order; of equal keys the first are.
template <class K, class Take>
static inline void choose_k(const K *keys, int64_t n, int64_t k, Take take) {
    const K last = kth_largest(keys, n, k);
    int64_t equal = k;  // how many of those equal to the last are chosen
    for (int64_t j = 0; j < n; ++j) equal -= keys[j] > last;
    for (int64_t j = 0; j < n; ++j)
        if (keys[j] > last || (keys[j] == last && equal-- > 0)) take(j);
}

// Entries of a row that may be chosen: place and key, ascending by place.
template <class K>
struct Candidates {
    int64_t count = 0;
    std::vector<int64_t> places;
    std::vector<K> keys;

    void make_room(int64_t more) {
        if (count + more <= int64_t(places.size())) return;
        places.resize(2 * (count + more));
        keys.resize(2 * (count + more));
    }
};

// Maxima of blocks of a row, by which most of it can be passed over.
//
// The k-th largest of the maxima is at most the k-th largest value: k blocks hold one at least as large. So all that
// may be among the k largest lies at or above it, in the blocks whose maximum does. Where k is so large that blocks would
// be short, the k-th largest of all keys takes that place.
template <class T>
struct Blocks {
    static constexpr int64_t LONGEST = 64, SHORTEST = sizeof(T) == 2 ? 32 : 16;
    using K = typename KeyOf<T>::type;
    int64_t n, size, count;
    std::vector<K> maxima, keys;

    Blocks(int64_t n, int64_t k) : n(n), size(LONGEST) {
        while (size >= SHORTEST && (n + size - 1) / size < 2 * k) size /= 2;
        if (size < SHORTEST) {
            size = LONGEST;
            keys.resize(n);
        }
        count = (n + size - 1) / size;
        maxima.resize(count);
    }

    void read(const T *row) {
        for (int64_t i = 0; i < count; ++i) {
            const int64_t width = std::min(size, n - i * size);
            const T *block = row + i * size;
            // A length that the compiler knows takes half the time.
            maxima[i] = width == LONGEST ? most_of(block, LONGEST) : most_of(block, width);
        }
        for (int64_t i = 0; i < int64_t(keys.size()); ++i) keys[i] = key(row[i]);
    }

    // A key that at least k entries of the row reach.
    K floor(int64_t k) const {
        return keys.empty() ? kth_largest(maxima.data(), count, k) : kth_largest(keys.data(), n, k);
    }

    // Fills `found` with the entries of the row that reach the floor, in order.
    void above(const T *row, K floor, Candidates<K> &found) const {
        found.count = 0;
        for (int64_t i = 0; i < count; ++i) {
            if (maxima[i] < floor) continue;
            const int64_t start = i * size;
            const T *block = row + start;
            found.make_room(LONGEST);
            int64_t to = found.count;
            const int64_t width = std::min(size, n - start);
            uint64_t left = width == LONGEST ? reaching(block, LONGEST, floor) : reaching(block, width, floor);
            for (; left; left &= left - 1) {
                const int64_t j = __builtin_ctzll(left);
                found.places[to] = start + j;
                found.keys[to++] = key(block[j]);
            }
            found.count = to;
        }
    }

  private:
    [[gnu::always_inline]] static inline K most_of(const T *__restrict block, int64_t width) {
        K most = key(block[0]);
#pragma omp simd reduction(max : most)
        for (int64_t j = 0; j < width; ++j) {
            const K other = key(block[j]);
            most = most > other ? most : other;
        }
        return most;
    }

    // One bit for each of up to 64 entries: whether it reaches the floor. Without branches: which entries do is chance.
    [[gnu::always_inline]] static inline uint64_t reaching(const T *__restrict block, int64_t width, K floor) {
        alignas(64) uint8_t hit[LONGEST] = {};
#pragma omp simd
        for (int64_t j = 0; j < width; ++j) hit[j] = key(block[j]) >= floor;
        uint64_t bits = 0;
        static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the first of eight bytes is the lowest");
        for (int part = 0; part < LONGEST / 8; ++part) {
            uint64_t eight;  // bytes that are 0 or 1; the product gathers them in its highest byte
            std::memcpy(&eight, hit + 8 * part, 8);
            bits |= (eight * 0x0102040810204080u >> 56) << 8 * part;
        }
        return bits;
    }
};
