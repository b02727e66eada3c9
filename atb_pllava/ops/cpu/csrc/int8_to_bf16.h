// Conversion of packed int8 weights to bfloat16 by a table with 128 entries. Needs AVX-512 VBMI.
//
// A weight q is stored as q ^ 0x7f when q < 0 (encode_sign_magnitude). The low 7 bits m of a stored byte then are the
// magnitude of q + 1/2: |q + 1/2| = m + 1/2. The top bit is the sign. The table holds m + 1/2, which is exact in
// bfloat16, so one lookup and the sign bit give q + 1/2. The product subtracts the 1/2 together with the zero point
// (INT8_EXCESS).

#pragma once

#include "panel.h"

namespace {

// High and low bytes of the bfloat16 numbers m + 1/2.
struct Int8ToBf16Table {
    alignas(64) uint8_t high[128];
    alignas(64) uint8_t low[128];
    Int8ToBf16Table() {
        for (int m = 0; m < 128; m++) {
            bf16 bits;
            from_float(m + 0.5f, bits);
            high[m] = bits >> 8;
            low[m] = bits & 255;
        }
    }
};
const Int8ToBf16Table int8_to_bf16_table;

// q + 1/2 of a row of PANEL pairs. The pairs are not in the order of the columns, because unpacking works inside
// 128-bit lanes. Each lane of `low` has the first 4 of 8 columns, each lane of `high` the other 4. See restore_order.
INLINE void int8_to_bf16(const int8_t* b, __m512bh& low, __m512bh& high) {
    const __m512i x = _mm512_loadu_si512(b);
    const __m512i sign = _mm512_set1_epi8((char)0x80);
    const __m512i* high_bytes = (const __m512i*)int8_to_bf16_table.high;
    const __m512i* low_bytes = (const __m512i*)int8_to_bf16_table.low;
    __m512i upper = _mm512_permutex2var_epi8(high_bytes[0], x, high_bytes[1]);
    __m512i lower = _mm512_permutex2var_epi8(low_bytes[0], x, low_bytes[1]);
    upper = _mm512_ternarylogic_epi64(upper, x, sign, 0xf8);  // upper | (x & sign)
    low = (__m512bh)_mm512_unpacklo_epi8(lower, upper);
    high = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}

// Sorts 32-bit elements from the order of int8_to_bf16 to the order of the columns.
INLINE void restore_order(vf& low, vf& high) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    const __m512d a = (__m512d)low;
    const __m512d b = (__m512d)high;
    low = (vf)_mm512_permutex2var_pd(a, first, b);
    high = (vf)_mm512_permutex2var_pd(a, second, b);
}

}  // namespace
