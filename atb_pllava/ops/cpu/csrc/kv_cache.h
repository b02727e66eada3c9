// The KV cache: writing of new tokens, and access to the rows of a sequence. `struct Cache` in types.h has the layout.

#pragma once

#include <cmath>
#include <limits>

#include "threads.h"
#include "vec.h"

namespace {

// The rows [dim] of one head's keys or values, by the number of a token in its sequence.
template <class T>
struct PagedRows {
    const T* start;
    const float* scales;         // null if T is not int8
    const int64_t* block_table;  // of the sequence
    int64_t heads, block, dim, head;

    int64_t index(int64_t token) const { return (block_table[token / block] * heads + head) * block + token % block; }
    const T* row(int64_t token) const { return start + index(token) * dim; }
    float scale(int64_t token) const { return scales ? scales[index(token)] : 1.f; }
};

template <class T>
PagedRows<T> key_rows(const Cache& c, const int64_t* block_table, int64_t head) {
    return {(const T*)c.keys, c.key_scale, block_table, c.heads, c.block, c.dim, head};
}
template <class T>
PagedRows<T> value_rows(const Cache& c, const int64_t* block_table, int64_t head) {
    return {(const T*)c.values, c.value_scale, block_table, c.heads, c.block, c.dim, head};
}

// Raises OutOfRange unless `block_table` holds a block of the cache for each of `context` tokens. The table has `columns`
// numbers.
inline void check_block_table(const Cache& c, const int64_t* block_table, int64_t columns, int64_t context) {
    if (context < 1 || (context - 1) / c.block >= columns) throw OutOfRange{};
    for (int64_t i = 0; i <= (context - 1) / c.block; i++)
        if ((uint64_t)block_table[i] >= (uint64_t)c.blocks) throw OutOfRange{};
}

// Raises OutOfRange unless all of `count` slots lie in the cache.
inline void check_slots(const Cache& c, const int64_t* slot_mapping, int64_t count) {
    const uint64_t slots = (uint64_t)(c.blocks * c.block);
    for (int64_t i = 0; i < count; i++)
        if ((uint64_t)slot_mapping[i] >= slots) throw OutOfRange{};
}

// Writes one token's row of one head. int8: q = x / scale with scale = max|x| / 127. If max|x| / 127 rounds to 0, the
// scale is 1. If an element is NaN or infinite, the scale is so too and q is 0: attention then gives NaN or infinity.
template <class T, class X>
void write_row(const X* from, int64_t dim, T* to, float* scale) {
    if constexpr (std::is_same<T, int8_t>::value) {
        float max = 0;
        for (int64_t i = 0; i < dim; i++) {
            const float size = std::fabs(to_float(from[i]));
            if (!(size <= max) && max == max) max = size;  // a NaN in max stays
        }
        const float step = max / 127;
        *scale = step == 0 ? 1.f : step;
        const bool is_finite = max <= std::numeric_limits<float>::max();
        for (int64_t i = 0; i < dim; i++) to[i] = is_finite ? (int8_t)std::nearbyint(to_float(from[i]) / *scale) : 0;
    } else {
        std::memcpy(to, from, dim * sizeof(T));
    }
}

// Writes keys and values [count, heads, dim]. Token i goes to slot_mapping[i] = block * block_size + offset in the
// block. Tokens are key_stride and value_stride elements apart. Raises OutOfRange.
template <class T, class X>
void write_kv(const Cache& c, const X* keys, int64_t key_stride, const X* values, int64_t value_stride,
              const int64_t* slot_mapping, int64_t count, int threads) {
    check_slots(c, slot_mapping, count);
    constexpr int64_t TOKENS_PER_TASK = 32;
    pool()->run(ceil_div(count, TOKENS_PER_TASK), threads, [&](int64_t task) {
        const int64_t first = task * TOKENS_PER_TASK;
        for (int64_t i = first; i < std::min(count, first + TOKENS_PER_TASK); i++)
            for (int64_t head = 0; head < c.heads; head++) {
                const int64_t slot = slot_mapping[i];
                const int64_t row = (slot / c.block * c.heads + head) * c.block + slot % c.block;
                write_row(keys + i * key_stride + head * c.dim, c.dim, (T*)c.keys + row * c.dim, c.key_scale + row);
                write_row(values + i * value_stride + head * c.dim, c.dim, (T*)c.values + row * c.dim,
                          c.value_scale + row);
            }
    });
}

}  // namespace
