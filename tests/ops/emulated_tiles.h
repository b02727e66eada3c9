// The operations of csrc/tiles.h in plain C++, for tests on CPUs without AMX.
//
// The arithmetic follows the description of TDPBF16PS in Intel's Software Developer's Manual, volume 2: fused
// multiply-adds of the even and of the odd elements of pairs into two sums, which start at 0 for each instruction.
// Denormal inputs and results are zeros. Where the processor would raise an exception, the process is aborted.

#pragma once

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace {

struct EmulatedTiles {
    bool configured = false;
    alignas(64) char data[8][TILE_ROWS][TILE_BYTES];
};

inline EmulatedTiles& emulated_tiles() {
    static thread_local EmulatedTiles tiles;
    return tiles;
}

inline char (*configured_tile(int number)) [TILE_BYTES] {
    EmulatedTiles& tiles = emulated_tiles();
    if (!tiles.configured) {
        std::fputs("tile registers are used without a configuration\n", stderr);
        std::abort();
    }
    return tiles.data[number];
}

inline void configure_tiles(const TileShapes& shapes) {
    for (int i = 0; i < 16; i++) {
        const bool is_full = shapes.rows[i] == TILE_ROWS && shapes.row_bytes[i] == TILE_BYTES;
        const bool is_unused = shapes.rows[i] == 0 && shapes.row_bytes[i] == 0;
        if (!(i < 8 ? is_full : is_unused) || shapes.palette != 1 || shapes.start_row != 0) {
            std::fputs("only eight full tile registers are emulated\n", stderr);
            std::abort();
        }
    }
    EmulatedTiles& tiles = emulated_tiles();
    if (tiles.configured) {
        std::fputs("tile registers are configured twice\n", stderr);
        std::abort();
    }
    tiles.configured = true;
    std::memset(tiles.data, 0, sizeof tiles.data);
}

inline void release_tiles() { emulated_tiles().configured = false; }

template <int T>
void load_tile(const void* from, int64_t stride) {
    auto* tile = configured_tile(T);
    for (int row = 0; row < TILE_ROWS; row++) std::memcpy(tile[row], (const char*)from + row * stride, TILE_BYTES);
}

template <int T>
void store_tile(void* to, int64_t stride) {
    auto* tile = configured_tile(T);
    for (int row = 0; row < TILE_ROWS; row++) std::memcpy((char*)to + row * stride, tile[row], TILE_BYTES);
}

template <int T>
void clear_tile() {
    std::memset(configured_tile(T), 0, TILE_ROWS * TILE_BYTES);
}

inline float without_denormals(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.f, x) : x; }

template <int C, int A, int B>
void multiply_tiles() {
    constexpr int COLUMNS = TILE_BYTES / 4;
    auto* sums = configured_tile(C);
    bf16 a[TILE_ROWS][2 * COLUMNS];
    bf16 b[TILE_ROWS][2 * COLUMNS];
    std::memcpy(a, configured_tile(A), sizeof a);
    std::memcpy(b, configured_tile(B), sizeof b);
    for (int row = 0; row < TILE_ROWS; row++) {
        float parts[2][COLUMNS] = {};
        for (int k = 0; k < TILE_ROWS; k++)
            for (int e = 0; e < 2; e++) {
                const float x = without_denormals(to_float(a[row][2 * k + e]));
                for (int column = 0; column < COLUMNS; column++) {
                    const float y = without_denormals(to_float(b[k][2 * column + e]));
                    parts[e][column] = without_denormals(std::fma(x, y, parts[e][column]));
                }
            }
        float total[COLUMNS];
        std::memcpy(total, sums[row], TILE_BYTES);
        for (int column = 0; column < COLUMNS; column++) {
            const float part = without_denormals(parts[0][column] + parts[1][column]);
            total[column] = without_denormals(without_denormals(total[column]) + part);
        }
        std::memcpy(sums[row], total, TILE_BYTES);
    }
}

}  // namespace
