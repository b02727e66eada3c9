// The arithmetics of tile products, and the one that bfloat16 uses at this level of CPU.
//
// A tile is up to MR rows of the input times one panel; its sums stay in registers. An arithmetic is a struct with
//   A            the type of an element of the input in tiles
//   B            the type of an element of a panel after `widen`
//   INT8_EXCESS  the number that a loaded int8 element is larger than the weight's
//   tile<R>(a, b, pairs, out)  out[R][NV] = R rows of the input times a panel, over `pairs` pairs. Elements of `a` lie
//   as
//                              [STEP elements of K][MR rows][STEP]; the panel has elements of B, or of int8 or
//                              bfloat16.
//   widen(b, pairs, out)       a panel as elements of B. It pays if many tiles are multiplied with the panel.
//
// A further arithmetic, such as AMX, is one more file gemm_*.h, and one more branch below. Its level also needs a line
// in LEVELS of ops/cpu/build.py.

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
