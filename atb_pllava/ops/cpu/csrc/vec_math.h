// Functions of a vector: powers of 2, and the logistic function.

#pragma once

#include "vec.h"

namespace {

constexpr float LOG2E = 1.44269504088896341f;

// 2^x for x below 127, 0 for x below -126. The relative error is at most 2e-7. The polynomial is that of exp2f in the
// Cephes library, for [-1/2, 1/2].
INLINE vf power_of_two(vf x) {
    const float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    const vi is_zero = x < -126.f;
    vf shifted = x + MAGIC;
    vf f = x - (shifted - MAGIC);
    vf p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    return (vf)(((vu)p + ((vu)shifted << 23)) & (vu)~is_zero);
}

// The logistic function 1 / (1 + e^-x), computed from e^-|x|, which does not overflow.
INLINE vf logistic(vf x) {
    vf minus_abs = (vf)((vi)x | (int32_t)0x80000000);
    vf e = power_of_two(minus_abs * LOG2E);
    vi is_negative = x < 0.f;
    vf numerator = (vf)(((vi)e & is_negative) | ((vi)splat(1.f) & ~is_negative));
    return numerator / (1.f + e);
}

}  // namespace
