// Tile products with float32 multiply-adds, for every CPU.

#pragma once

#include "blocks.h"

namespace {

// See arithmetic.h for the members of an arithmetic.
struct Fma : VectorBlocks {
    typedef float A;
    typedef float B;
    static constexpr float INT8_EXCESS = 0;

    template <int R, class T>
    INLINE void tile(const float* a, const T* b, int64_t pairs, vf (&out)[R][NV]) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) out[r][v] = (vf){};
        for (; pairs > 0; pairs -= STEP / 2, a += MR * STEP)
            for (int64_t p = 0; p < std::min<int64_t>(pairs, STEP / 2); p++, b += 2 * PANEL)
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    vf even, odd;
                    load_pair(b, v, even, odd);
#pragma GCC unroll 16
                    for (int r = 0; r < R; r++) {
                        out[r][v] += even * splat(a[r * STEP + 2 * p]);
                        out[r][v] += odd * splat(a[r * STEP + 2 * p + 1]);
                    }
                }
    }

    template <class T>
    INLINE void widen(const T* b, int64_t pairs, float* out) {
        for (int64_t p = 0; p < pairs; p++)
            for (int v = 0; v < NV; v++) {
                vf even, odd;
                load_pair(b + p * 2 * PANEL, v, even, odd);
                store(out + p * 2 * PANEL + v * W, even);
                store(out + p * 2 * PANEL + PANEL + v * W, odd);
            }
    }
};

}  // namespace
