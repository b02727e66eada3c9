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

}  // namespace
