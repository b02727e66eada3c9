// Probes of memory bandwidth and of multiply-add throughput, for benchmarks (ops/cpu/probe.py). Each loop writes a
// result to `out`, so that the compiler cannot remove the work.

#pragma once

#include "arithmetic.h"

namespace {

constexpr int64_t READ_PIECE = 1 << 20;
constexpr int CHAINS = 12;  // independent sums, which hide the latency of a multiply-add and stay in registers

// Reads `pieces` pieces of 1 MiB. out[i * W ...] is the bitwise or of piece i.
void read_all(const char* data, int64_t pieces, int32_t* out, int threads) {
    pool()->run(pieces, threads, [&](int64_t piece) {
        const char* from = data + piece * READ_PIECE;
        vi found[8] = {};
        for (int64_t i = 0; i < READ_PIECE; i += 8 * W * 4) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) found[j] |= load<vi>(from + i + j * W * 4);
        }
        for (int j = 1; j < 8; j++) found[0] |= found[j];
        store(out + piece * W, found[0]);
    });
}

// Each task calls sum = step(sum) for CHAINS vectors, `rounds` times. out[task * W ...] is the sum of the vectors.
template <class Step>
void multiply_add(int64_t tasks, int64_t rounds, float* out, int threads, Step step) {
    pool()->run(tasks, threads, [&](int64_t task) {
        vf sums[CHAINS];  // the starts differ, because a compiler would compute equal sums once
        for (int j = 0; j < CHAINS; j++) sums[j] = splat(j);
        for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 16
            for (int j = 0; j < CHAINS; j++) sums[j] = step(sums[j]);
        }
        for (int j = 1; j < CHAINS; j++) sums[0] += sums[j];
        store(out + task * W, sums[0]);
    });
}

#if defined(HAS_TILES)
constexpr int TILE_CHAINS = 4;  // registers of sums, as many as a product has (gemm_amx.h)

// The same in tile registers. Each step adds 32 products a * b to every element of a register. out[task * W ...] is the
// sum of the first rows of the registers. There are no loads and stores between the steps.
inline void multiply_add_in_tiles(int64_t tasks, int64_t rounds, float a, float b, float* out, int threads) {
    pool()->run(tasks, threads, [&](int64_t task) {
        alignas(64) bf16 left[TILE_ROWS * 32];
        alignas(64) bf16 right[TILE_ROWS * 32];
        for (bf16& x : left) from_float(a, x);
        for (bf16& x : right) from_float(b, x);
        alignas(64) float sums[TILE_CHAINS][TILE_ROWS * 16];
        {
            const TileRegisters setup;
            clear_tile<0>();
            clear_tile<1>();
            clear_tile<2>();
            clear_tile<3>();
            load_tile<4>(left, TILE_BYTES);
            load_tile<5>(right, TILE_BYTES);
            for (int64_t i = 0; i < rounds; i++) {
                multiply_tiles<0, 4, 5>();
                multiply_tiles<1, 4, 5>();
                multiply_tiles<2, 4, 5>();
                multiply_tiles<3, 4, 5>();
            }
            store_tile<0>(sums[0], TILE_BYTES);
            store_tile<1>(sums[1], TILE_BYTES);
            store_tile<2>(sums[2], TILE_BYTES);
            store_tile<3>(sums[3], TILE_BYTES);
        }
        for (int i = 0; i < W; i++) out[task * W + i] = sums[0][i] + sums[1][i] + sums[2][i] + sums[3][i];
    });
}
#endif

}  // namespace
