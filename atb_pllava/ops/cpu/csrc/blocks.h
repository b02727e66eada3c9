// The blocks of products whose sums are in vector registers.

#pragma once

#include "panel.h"

namespace {

// The base of an arithmetic, see arithmetic.h for the members.
struct VectorBlocks {
    static constexpr bool USES_TILES = false;
    static constexpr int MR = VECTOR_MR;
    static constexpr int SPAN = 4 * STEP;
    static constexpr int64_t TILES_PER_TASK = 20;  // one step of all these tiles fits in the second-level cache
    struct Setup {};
};

}  // namespace
