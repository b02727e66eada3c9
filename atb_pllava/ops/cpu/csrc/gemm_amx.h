// Tile products of bfloat16 with the tile registers of AMX. Sums are float32.
//
// The sizes below are derived from the manual's numbers for Sapphire Rapids (48 KiB of L1 data cache, 2 MiB of L2
// cache, a product of two registers every 16 cycles). They are not the result of measurements.

#pragma once

#include "panel.h"
#include "tiles.h"
#if defined(HAS_DOT)
#include "gemm_dot.h"
#endif

namespace {

// See arithmetic.h for the members of an arithmetic.
struct Amx {
    typedef bf16 A;
    typedef bf16 B;
    typedef TileRegisters Setup;
    static constexpr bool USES_TILES = true;

    // Two groups of 16 rows times two halves of a panel: four registers hold sums, two the input, two the panel. Each
    // loaded register takes part in two products. A product takes longer than the loads of two registers.
    static constexpr int MR = 2 * TILE_ROWS;
    // A span of a panel takes 16 KiB and stays in the L1 cache, while tiles come from the L2 cache.
    static constexpr int SPAN = STEP;
    // A step of the tiles takes 256 KiB and their sums for all panels of a task 512 KiB.
    static constexpr int64_t TILES_PER_TASK = 16;
    // From here on the rows of a product, or the queries of a sequence, fill a register. With fewer rows the speed of
    // memory limits a product, and the dot instruction reads int8 weights without widening.
    static constexpr int64_t LEAST_ROWS = TILE_ROWS;

    // to[R][PANEL] (+)= rows of the input times a panel, over `pairs` pairs of K. R is `rows` filled to a multiple of
    // 16. Rows of `to` are `stride` elements apart. `first` overwrites. The input is [step of K][MR][STEP].
    static void multiply(int rows, const bf16* a, const bf16* b, int64_t pairs, bool first, float* to, int64_t stride) {
        if (rows <= TILE_ROWS)
            multiply_groups<1>(a, b, pairs, first, to, stride);
        else
            multiply_groups<2>(a, b, pairs, first, to, stride);
    }

#if defined(HAS_DOT)
    static constexpr float INT8_EXCESS = Dot::INT8_EXCESS;
    INLINE void widen(const int8_t* b, int64_t pairs, bf16* out) { Dot::widen(b, pairs, out); }
#else
    // A CPU with tile registers has the dot instruction too, so only emulated tile registers need this. int8 numbers
    // are exact in bfloat16.
    static constexpr float INT8_EXCESS = 0;
    INLINE void widen(const int8_t* b, int64_t pairs, bf16* out) {
        for (int64_t i = 0; i < pairs * 2 * PANEL; i += 2 * W) {
            vf even, odd;
            load_pair(b + i, 0, even, odd);
            store(out + i, ((vi)even >> 16 & 0xffff) | ((vi)odd & (int32_t)0xffff0000));
        }
    }
#endif

  private:
    static constexpr int PAIRS = TILE_ROWS;          // of K, in one product of registers
    static constexpr int COLUMNS = TILE_ROWS;        // of the result, in one register
    static constexpr int64_t PANEL_ROW = 4 * PANEL;  // bytes of a row of pairs: two registers side by side

    // The numbers of the registers. SUM_01 has the sums of the first group of rows and the second half of the panel.
    static constexpr int SUM_00 = 0;
    static constexpr int SUM_01 = 1;
    static constexpr int SUM_10 = 2;
    static constexpr int SUM_11 = 3;
    static constexpr int A_0 = 4;
    static constexpr int A_1 = 5;
    static constexpr int B_0 = 6;
    static constexpr int B_1 = 7;

    template <int GROUPS>
    static void multiply_groups(const bf16* a, const bf16* b, int64_t pairs, bool first, float* to, int64_t stride) {
        first ? clear_sums<GROUPS>() : load_sums<GROUPS>(to, stride);
        for (; pairs > 0; pairs -= STEP / 2, a += MR * STEP, b += STEP * PANEL) {
            const int64_t count = std::min<int64_t>(pairs, STEP / 2);
            int64_t p = 0;
            for (; p + PAIRS <= count; p += PAIRS) add<GROUPS>(a + 2 * p, STEP, b + p * 2 * PANEL);
            if (p < count) add_rest<GROUPS>(a + 2 * p, b + p * 2 * PANEL, count - p);
        }
        store_sums<GROUPS>(to, stride);
    }

    template <int GROUPS>
    INLINE void clear_sums() {
        clear_tile<SUM_00>();
        clear_tile<SUM_01>();
        if (GROUPS == 1) return;
        clear_tile<SUM_10>();
        clear_tile<SUM_11>();
    }

    template <int GROUPS>
    INLINE void load_sums(const float* from, int64_t stride) {
        const int64_t bytes = stride * sizeof(float);
        load_tile<SUM_00>(from, bytes);
        load_tile<SUM_01>(from + COLUMNS, bytes);
        if (GROUPS == 1) return;
        load_tile<SUM_10>(from + TILE_ROWS * stride, bytes);
        load_tile<SUM_11>(from + TILE_ROWS * stride + COLUMNS, bytes);
    }

    template <int GROUPS>
    INLINE void store_sums(float* to, int64_t stride) {
        const int64_t bytes = stride * sizeof(float);
        store_tile<SUM_00>(to, bytes);
        store_tile<SUM_01>(to + COLUMNS, bytes);
        if (GROUPS == 1) return;
        store_tile<SUM_10>(to + TILE_ROWS * stride, bytes);
        store_tile<SUM_11>(to + TILE_ROWS * stride + COLUMNS, bytes);
    }

    // Adds the products of PAIRS pairs. Rows of the input are `stride` elements apart.
    template <int GROUPS>
    INLINE void add(const bf16* a, int64_t stride, const bf16* b) {
        load_tile<B_0>(b, PANEL_ROW);
        load_tile<A_0>(a, stride * sizeof(bf16));
        multiply_tiles<SUM_00, A_0, B_0>();
        load_tile<B_1>(b + 2 * COLUMNS, PANEL_ROW);
        multiply_tiles<SUM_01, A_0, B_1>();
        if (GROUPS == 1) return;
        load_tile<A_1>(a + TILE_ROWS * stride, stride * sizeof(bf16));
        multiply_tiles<SUM_10, A_1, B_0>();
        multiply_tiles<SUM_11, A_1, B_1>();
    }

    // Adds the products of the last pairs of K, fewer than PAIRS, from copies that are filled with zeros.
    template <int GROUPS>
    __attribute__((noinline)) static void add_rest(const bf16* a, const bf16* b, int64_t pairs) {
        alignas(64) bf16 rows[GROUPS * TILE_ROWS][2 * PAIRS] = {};
        alignas(64) bf16 panel[PAIRS][2 * PANEL] = {};
        for (int r = 0; r < GROUPS * TILE_ROWS; r++) std::copy(a + r * STEP, a + r * STEP + 2 * pairs, rows[r]);
        std::copy(b, b + pairs * 2 * PANEL, panel[0]);
        add<GROUPS>(rows[0], 2 * PAIRS, panel[0]);
    }
};

}  // namespace
