// The layout of packed matrices, and packing and unpacking of weights.
//
// K is the dimension that a product sums over. A panel is PANEL rows of a weight, which are columns of the result. A
// pair is two neighbouring elements along K. Panels follow each other in memory. Inside a panel the layout is
//   bfloat16 and int8: [pair][PANEL][2]
//   float32:           [pair][2][PANEL]
// The bfloat16 layout is the one that AVX-512 BF16 and AMX call VNNI.

#pragma once

#include "threads.h"
#include "vec.h"

namespace {

constexpr int PANEL = 32;
constexpr int NV = PANEL / W;  // vectors of a row of a panel
constexpr int STEP = 256;      // elements along K that lie together in a row of a tile, see gemm.h

// The position in a panel of element `e` of a pair.
template <class T>
INLINE int64_t panel_index(int64_t pair, int column, int e) {
    return std::is_same<T, float>::value ? (pair * 2 + e) * PANEL + column : (pair * PANEL + column) * 2 + e;
}

// A packed int8 weight q < 0 is stored as q ^ 0x7f: int8_to_bf16.h says why. The function is its own inverse.
template <class T>
INLINE T encode_sign_magnitude(T q) {
    return q ^ (q >> 7 & 0x7f);
}

template <class T>
INLINE T encode(T x) {
    return x;
}
INLINE int8_t encode(int8_t q) { return encode_sign_magnitude(q); }

// Vector v of the even and of the odd elements of a row of pairs, as float32.
INLINE void load_pair(const float* b, int v, vf& even, vf& odd) {
    even = load<vf>(b + v * W);
    odd = load<vf>(b + PANEL + v * W);
}
INLINE void load_pair(const bf16* b, int v, vf& even, vf& odd) {
    vi pairs = load<vi>(b + v * 2 * W);
    even = even_elements(pairs);
    odd = odd_elements(pairs);
}
INLINE void load_pair(const int8_t* b, int v, vf& even, vf& odd) {
    vi pairs = (vi) __builtin_convertvector(encode_sign_magnitude(load<vi8_2w>(b + v * 2 * W)), vi16_2w);
    even = __builtin_convertvector(pairs << 16 >> 16, vf);
    odd = __builtin_convertvector(pairs >> 16, vf);
}

// Elements [begin, begin + count) of a row of a weight, encoded. Elements outside the row are zeros.
template <class T>
INLINE void encode_row(const Matrix& w, const T* row, int64_t begin, int64_t count, T* out) {
    const int64_t from = std::clamp<int64_t>(begin, 0, w.columns);
    const int64_t to = std::clamp<int64_t>(begin + count, from, w.columns);
    std::fill(out, out + (from - begin), T{});
    for (int64_t i = from; i < to; i++) out[i - begin] = encode(row[i]);
    std::fill(out + (to - begin), out + count, T{});
}

// Packs the row-major weight `from`, whose rows are `stride` elements apart. A panel is the transpose of PANEL rows of
// units. A unit is a pair, or one float32 element. 64 units of each row are transposed at a time, in the L1 cache.
template <class T, class Unit>
void pack(const Matrix& w, const T* from, int64_t stride, T* to, int threads) {
    constexpr int64_t UNIT = sizeof(Unit) / sizeof(T);
    constexpr int64_t BLOCK = 64 * UNIT;
    pool()->run(ceil_div(w.rows, PANEL), threads, [&](int64_t panel) {
        alignas(64) T rows[PANEL][BLOCK] = {};
        const int64_t used = std::min<int64_t>(PANEL, w.rows - panel * PANEL);
        for (int64_t first = 0; first < w.width; first += BLOCK) {
            const int64_t count = std::min(BLOCK, w.width - first);
            T* out = to + (panel * w.width + first) * PANEL;
            for (int64_t r = 0; r < used; r++)
                encode_row(w, from + (panel * PANEL + r) * stride, first - w.group_offset, count, rows[r]);
            for (int64_t i = 0; i < count; i += UNIT)
#pragma GCC unroll 32
                for (int r = 0; r < PANEL; r++) store(out + i * PANEL + r * UNIT, load<Unit>(rows[r] + i));
        }
    });
}

// The inverse of `pack`: writes the weight row-major to `to`.
template <class T>
void unpack(const Matrix& w, const T* from, T* to, int64_t stride, int threads) {
    pool()->run(ceil_div(w.rows, PANEL), threads, [&](int64_t panel) {
        const T* in = from + panel * w.width * PANEL;
        for (int column = 0; column < std::min<int64_t>(PANEL, w.rows - panel * PANEL); column++) {
            T* row = to + (panel * PANEL + column) * stride;
            for (int64_t i = 0; i < w.columns; i++) {
                const int64_t k = i + w.group_offset;
                row[i] = encode(in[panel_index<T>(k / 2, column, k % 2)]);
            }
        }
    });
}

}  // namespace
