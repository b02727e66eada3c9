// The tile registers of AMX: eight registers of 16 rows of 64 bytes. A row holds 16 float32 or 32 bfloat16 elements.
//
// The operations are inline assembly, because GCC's intrinsics take only literal register numbers. Those of GCC 12 also
// do not tell the compiler which memory they read. Names and meanings are in Intel's Software Developer's Manual,
// volume 1 chapter 18.
//
// -DATB_EMULATED_TILES takes the operations from a header of the tests, which emulates them on every CPU.

#pragma once

#include "vec.h"

namespace {

constexpr int TILE_ROWS = 16;
constexpr int TILE_BYTES = 64;  // of a row

// The operand of LDTILECFG.
struct alignas(64) TileShapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};

}  // namespace

#if defined(ATB_EMULATED_TILES)
#include "emulated_tiles.h"
#else

namespace {

INLINE void configure_tiles(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
INLINE void release_tiles() { asm volatile("tilerelease"); }

// Loads and stores 16 rows, which are `stride` bytes apart in memory.
template <int T>
INLINE void load_tile(const void* from, int64_t stride) {
    asm volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(T), "r"(from), "r"(stride) : "memory");
}
template <int T>
INLINE void store_tile(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(T), "r"(to), "r"(stride) : "memory");
}
template <int T>
INLINE void clear_tile() {
    asm volatile("tilezero %%tmm%c0" ::"i"(T));
}

// Adds products to the float32 elements of register C. C[row][column] += the sum over k and over e = 0, 1 of
// A[row][2 k + e] * B[k][2 column + e]. A and B hold bfloat16 elements.
template <int C, int A, int B>
INLINE void multiply_tiles() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

}  // namespace

#endif

namespace {

// Gives all tile registers of this thread their full size, until the end of the scope. No thread keeps contents in tile
// registers outside of such a scope, so the system has nothing to save when it switches threads.
class TileRegisters {
  public:
    TileRegisters() {
        static const TileShapes shapes = [] {
            TileShapes full = {};
            full.palette = 1;  // the only layout of the registers so far
            for (int i = 0; i < 8; i++) {
                full.rows[i] = TILE_ROWS;
                full.row_bytes[i] = TILE_BYTES;
            }
            return full;
        }();
        configure_tiles(shapes);
    }
    ~TileRegisters() { release_tiles(); }
    TileRegisters(const TileRegisters&) = delete;
    TileRegisters& operator=(const TileRegisters&) = delete;
};

}  // namespace
