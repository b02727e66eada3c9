// Selects the micro-kernel ("arithmetic") of tile products for bfloat16 at this level of CPU.
//
// A tile product multiplies up to MR rows of the input with one panel (panel.h). The sums stay in registers.
// A micro-kernel is a struct with these members:
//   A            the element type of packed input tiles
//   B            the element type of a panel after `widen`
//   INT8_EXCESS  a loaded int8 element is this much larger than the weight's integer
//   tile<R>(a, b, pairs, out)  out[R][NV] = R rows of the input times a panel, over `pairs` pairs.
//                              `a` has the layout [steps of K][MR rows][STEP elements].
//                              The elements of the panel are of type B, int8 or bfloat16.
//   widen(b, pairs, out)       converts a panel to elements of B, once for many tiles.
//
// A new micro-kernel, such as AMX, needs a file gemm_*.h, a branch below, and a level in LEVELS of ops/cpu/build.py.

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
