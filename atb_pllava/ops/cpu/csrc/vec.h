// Vector types and operations for each level of CPU (LEVELS in ops/cpu/levels.py), and conversions of single elements.
//
// Vectors are those of GCC's vector extension: the operators of scalars work on them. Intrinsics are used only where
// GCC makes poor code of the operators.
//
// GCC may fuse a * b + c into one instruction with one rounding. Which ones it fuses depends on the structure of the
// function, so moving code can change the last bit of a result.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "types.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

// The CPU has a dot instruction for bfloat16 (gemm_dot.h) and a table lookup of bytes (int8_to_bf16.h).
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define HAS_DOT
#endif

// The CPU has tile registers (tiles.h), or a test emulates them.
#if (defined(__AMX_TILE__) && defined(__AMX_BF16__)) || defined(ATB_EMULATED_TILES)
#define HAS_TILES
#endif

// INLINE: functions, and static member functions. INLINE_METHOD: other member functions.
#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))

namespace {

// W: floats in a vector. VECTOR_MR: rows of the input that a tile product in vector registers multiplies at once.
#if defined(__AVX512F__)
constexpr int W = 16;
constexpr int VECTOR_MR = 12;
#elif defined(__AVX2__)
constexpr int W = 8;
constexpr int VECTOR_MR = 3;
#elif defined(__aarch64__)
constexpr int W = 4;
constexpr int VECTOR_MR = 3;  // NEON: 24 of 32 registers hold sums
#else
constexpr int W = 4;
constexpr int VECTOR_MR = 2;
#endif

// Vectors of W elements, named by their type. A vector named 2w has 2 W elements.
typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vu16_w __attribute__((vector_size(W * 2)));
typedef int16_t vi16_2w __attribute__((vector_size(W * 4)));
typedef int8_t vi8_w __attribute__((vector_size(W)));
typedef int8_t vi8_2w __attribute__((vector_size(W * 2)));

// Loads and stores at any alignment.
template <class V>
INLINE V load(const void* p) {
    V v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class V>
INLINE void store(void* p, V v) {
    std::memcpy(p, &v, sizeof v);
}

// x in every element. GCC broadcasts the scalar operand of a vector operator. GCC then drops the subtraction of 0,
// because x - 0 is x for every float. An addition of 0 would remain, because -0 + 0 is +0.
INLINE vf splat(float x) { return x - (vf){}; }

// 2 W bfloat16 elements: those with an even index, and those with an odd index, as float32.
INLINE vf even_elements(vi pairs) { return (vf)(pairs << 16); }
INLINE vf odd_elements(vi pairs) { return (vf)(pairs & (int32_t)0xffff0000); }

// vmax: the larger of two elements, and b where a or b is NaN. sum, highest: over the elements of one vector.
#if defined(__AVX512F__)
INLINE vf vmax(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float highest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE vf vmax(vf a, vf b) {
    vi a_is_larger = a > b;
    return (vf)(((vi)a & a_is_larger) | ((vi)b & ~a_is_larger));
}
INLINE float sum(vf v) {
    float s = 0;
    for (int i = 0; i < W; i++) s += v[i];
    return s;
}
INLINE float highest(vf v) {
    float s = v[0];
    for (int i = 1; i < W; i++) s = std::max(s, v[i]);
    return s;
}
#endif

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) {
    const uint32_t bits = (uint32_t)x << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Rounds to nearest, ties to even. Every NaN becomes 0x7fc0.
INLINE void from_float(float x, float& out) { out = x; }
INLINE void from_float(float x, bf16& out) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out = x != x ? 0x7fc0 : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE vf load_floats(const float* p) { return load<vf>(p); }
INLINE vf load_floats(const bf16* p) { return (vf)(__builtin_convertvector(load<vu16_w>(p), vi) << 16); }
INLINE vf load_floats(const int8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<vi8_w>(p), vi), vf);
#endif
}

INLINE void store_floats(vf v, float* p) { store(p, v); }
INLINE void store_floats(vf v, bf16* p) {
#if defined(__AVX512BF16__)
    store(p, _mm512_cvtneps_pbh((__m512)v));
#else
    vi bits = (vi)v;
    vi nan = v != v;
    vi nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(p, __builtin_convertvector((nearest & ~nan) | (0x7fc0 & nan), vu16_w));
#endif
}

// x rounded to type T.
template <class T>
INLINE float round_to(float x) {
    T t;
    from_float(x, t);
    return to_float(t);
}
template <class T>
INLINE vf round_to(vf v) {
    if (std::is_same<T, float>::value) return v;
    T t[W];
    store_floats(v, t);
    return load_floats(t);
}

// Copies `count` elements and converts them to the type of `to`.
template <class X, class A>
INLINE void copy_row(const X* from, int64_t count, A* to) {
    if constexpr (std::is_same<X, A>::value) {
        std::memcpy(to, from, count * sizeof(A));
    } else {
        int64_t i = 0;
        for (; i + W <= count; i += W) store_floats(load_floats(from + i), to + i);
        for (; i < count; i++) from_float(to_float(from[i]), to[i]);
    }
}

// The sum of `count` elements.
template <class T>
INLINE float sum_row(const T* x, int64_t count) {
    vf sums = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) sums += load_floats(x + i);
    float result = sum(sums);
    for (; i < count; i++) result += to_float(x[i]);
    return result;
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Prefetches memory into the L2 cache.
INLINE void prefetch(const void* from, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 2);
}

}  // namespace
