// Structures that Python passes to the kernels. Matrix and Cache equal _Matrix and _Cache in ops/cpu/backend.py.

#pragma once

#include <cstdint>

typedef uint16_t bf16;  // the bits of a bfloat16

// Element types. The numbers are those of _KINDS in ops/cpu/backend.py.
enum Kind : int64_t { FLOAT = 0, BFLOAT = 1, INT8 = 2 };

// A weight [rows, columns] in panels, see panel.h. The result of a product has one column for each row of the weight.
//
// An int8 weight is w = (q - zero_point) * scale. scale and zero_point are float32 [groups][rows padded to whole
// panels]. zero_point is null for a symmetric weight. group_size is the number of columns that share a scale, 0 for one
// scale a row. group_offset zeros stand before the first column, so that groups start at multiples of group_size.
// group_offset is nonzero when a tensor-parallel shard starts inside a group. `width` is group_offset + columns, padded
// to an even number.
struct Matrix {
    void* data;
    const float* scale;
    const float* zero_point;
    int64_t rows, columns, group_offset, width, group_size, kind;
};

// One layer's KV cache. keys and values are [blocks, heads, block, dim], where `block` is the block size in tokens. An
// int8 cache has float32 scales [blocks, heads, block]. The scales of other kinds are null.
struct Cache {
    void* keys;
    void* values;
    float* key_scale;
    float* value_scale;
    int64_t blocks, heads, block, dim, kind;
};
