// Selects the micro-kernels ("arithmetics") of tile products for bfloat16 at this level of CPU.
//
// A tile is up to MR rows of the input. A tile product multiplies a tile with one panel. The sums stay in registers.
// An arithmetic is a struct with these members:
//   MR           rows of a tile
//   SPAN         elements along K that are summed in registers before a sum is stored
//   TILES_PER_TASK
//                tiles that one task multiplies
//   Setup        an object that a task holds while it multiplies
//   A            the element type of the input in tiles
//   B            the element type of a panel after `widen`
//   INT8_EXCESS  a number. `tile` multiplies with q + INT8_EXCESS instead of the int8 weight q.
//   tile<R>(a, b, pairs, out)
//                out[R][NV] = R rows of the input times a panel, over `pairs` pairs of K. The input is
//                [step of K][MR][STEP]. The panel has elements of type B, or bfloat16 or int8.
//   widen(b, pairs, out)
//                converts a panel to elements of type B, for panels that are multiplied with many tiles.
//   USES_TILES   the sums are in tile registers. The arithmetic then has `multiply` in place of `tile`, see gemm_amx.h.
//                Panels are always widened. All MR rows of a tile are read.
//
// Another arithmetic is one more file gemm_*.h and one more branch below. Its level is one more line of LEVELS in
// ops/cpu/levels.py.

#pragma once

#include "gemm_fma.h"
#if defined(HAS_DOT)
#include "gemm_dot.h"
#endif
#if defined(HAS_TILES)
#include "gemm_amx.h"
#endif

namespace {

#if defined(HAS_DOT)
typedef Dot BfloatArithmetic;
#else
typedef Fma BfloatArithmetic;
#endif

// Calls work(arithmetic) with the arithmetic for bfloat16 and this number of rows. The argument is only a type's name.
template <class F>
INLINE void with_bfloat_arithmetic(int64_t rows, F&& work) {
#if defined(HAS_TILES)
    if (rows >= Amx::LEAST_ROWS) return work(Amx{});
#endif
    work(BfloatArithmetic{});
}

}  // namespace
