// Tile products of bfloat16 with the dot instruction of AVX-512 BF16. Sums are float32.

#pragma once

#include "blocks.h"
#include "int8_to_bf16.h"

namespace {

// See arithmetic.h for the members of an arithmetic.
struct Dot : VectorBlocks {
    typedef bf16 A;
    typedef bf16 B;
    static constexpr float INT8_EXCESS = 0.5f;  // int8_to_bf16 gives q + 1/2

    template <int R, class T>
    INLINE void tile(const bf16* a, const T* b, int64_t pairs, vf (&out)[R][NV]) {
        constexpr int U = R == 1 ? 4 : R <= 3 ? 2 : 1;  // independent sums, which hide the latency of the instruction
        __m512 acc[U][R][2];
#pragma GCC unroll 16
        for (int u = 0; u < U; u++)
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) acc[u][r][0] = acc[u][r][1] = _mm512_setzero_ps();
        for (; pairs > 0; pairs -= STEP / 2, a += MR * STEP, b += STEP * PANEL) {
            const int64_t count = std::min<int64_t>(pairs, STEP / 2);
            auto add = [&](int u, int64_t p) __attribute__((always_inline)) {
                __m512bh low, high;
                load_panel(b + p * 2 * PANEL, low, high);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    __m512bh x = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * STEP + 2 * p));
                    acc[u][r][0] = _mm512_dpbf16_ps(acc[u][r][0], x, low);
                    acc[u][r][1] = _mm512_dpbf16_ps(acc[u][r][1], x, high);
                }
            };
            int64_t p = 0;
            for (; p + U <= count; p += U)
#pragma GCC unroll 16
                for (int u = 0; u < U; u++) {
                    // The hardware prefetcher looks too short a way ahead when several rows are multiplied with int8.
                    if (sizeof(T) == 1 && R > 3 && R < MR)
                        __builtin_prefetch((const char*)(b + (p + u) * 2 * PANEL) + PREFETCH_BYTES, 0, 2);
                    add(u, p + u);
                }
            for (; p < count; p++) add(0, p);
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int h = 0; h < 2; h++) {
                __m512 total = acc[0][r][h];
#pragma GCC unroll 16
                for (int u = 1; u < U; u++) total += acc[u][r][h];
                out[r][h] = (vf)total;
            }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            if (sizeof(T) == 1) restore_order(out[r][0], out[r][1]);
    }

    INLINE void widen(const int8_t* b, int64_t pairs, bf16* out) {
        for (int64_t p = 0; p < pairs; p++) {
            __m512bh low, high;
            int8_to_bf16(b + p * 2 * PANEL, low, high);
            vf first = (vf)low;
            vf second = (vf)high;
            restore_order(first, second);
            store(out + p * 2 * PANEL, first);
            store(out + p * 2 * PANEL + PANEL, second);
        }
    }

  private:
    static constexpr int PREFETCH_BYTES = 4096;

    INLINE void load_panel(const bf16* b, __m512bh& low, __m512bh& high) {
        low = (__m512bh)_mm512_loadu_si512(b);
        high = (__m512bh)_mm512_loadu_si512(b + PANEL);
    }
    INLINE void load_panel(const int8_t* b, __m512bh& low, __m512bh& high) { int8_to_bf16(b, low, high); }
};

}  // namespace
