// Selects the micro-kernel ("arithmetic") of tile products for bfloat16 at this level of CPU.
//
// A tile is up to MR rows of the input. A tile product multiplies a tile with one panel. The sums stay in registers.
// An arithmetic is a struct with these members:
//   A            the element type of the input in tiles
//   B            the element type of a panel after `widen`
//   INT8_EXCESS  a number. `tile` multiplies with q + INT8_EXCESS instead of the int8 weight q.
//   tile<R>(a, b, pairs, out)
//                out[R][NV] = R rows of the input times a panel, over `pairs` pairs of K. The input is
//                [step of K][MR][STEP]. The panel has elements of type B, or bfloat16 or int8.
//   widen(b, pairs, out)
//                converts a panel to elements of type B, for panels that are multiplied with many tiles.
//
// Another arithmetic, such as AMX, is one more file gemm_*.h and one more branch below. Its level is one more line of
// LEVELS in ops/cpu/build.py.

#pragma once

#include "gemm_fma.h"
#if defined(HAS_DOT)
#include "gemm_dot.h"
#endif

namespace {

#if defined(HAS_DOT)
typedef Dot BfloatArithmetic;
#else
typedef Fma BfloatArithmetic;
#endif

}  // namespace
