// CPU kernels of atb_pllava as C functions: linear layers, attention over the paged KV cache, element-wise functions.
//
// ops/cpu/build.py compiles this file, the only translation unit, at the first use on a machine. Compilation takes
// seconds, because the file includes no headers of torch. ops/cpu/backend.py calls the functions with pointers.
//
// One source serves every CPU. The compiler's flags choose the vectors (vec.h) and the arithmetic of tile products for
// bfloat16 (arithmetic.h). Sums are float32 everywhere.
//
// The argument `kind` is FLOAT or BFLOAT: the type of activations. `threads` is the number of threads to use. Functions
// that may fail return 0 on success. If an allocation fails, they return its bytes, and the output is incomplete. They
// return OUT_OF_RANGE for a slot, block number or context length outside of the KV cache, and then write nothing.

#include "decode_attention.h"
#include "elementwise.h"
#include "flash_attention.h"
#include "gemm.h"
#include "kv_cache.h"
#include "probe.h"

extern "C" {

// out = x * w^T + bias, see LinearCall.
int64_t atb_linear(const Matrix* w, const void* x, int64_t count, int64_t x_stride, const void* bias, void* out,
                   int64_t out_stride, int64_t kind, int threads) {
    const LinearCall call{w, x, count, x_stride, bias, out, out_stride, threads};
    return status_of([&] {
        if (kind == FLOAT && w->kind == FLOAT)
            Linear<Fma, float, float>(call).run();
        else if (kind == FLOAT)
            Linear<Fma, int8_t, float>(call).run();
        else
            with_bfloat_arithmetic(count, [&](auto m) {
                typedef decltype(m) M;
                w->kind == BFLOAT ? Linear<M, bf16, bf16>(call).run() : Linear<M, int8_t, bf16>(call).run();
            });
    });
}

// Packs a row-major weight, whose rows are `stride` elements apart, into w->data.
void atb_pack(const Matrix* w, const void* from, int64_t stride, int threads) {
    if (w->kind == FLOAT)
        pack<float, float>(*w, (const float*)from, stride, (float*)w->data, threads);
    else if (w->kind == BFLOAT)
        pack<bf16, uint32_t>(*w, (const bf16*)from, stride, (bf16*)w->data, threads);
    else
        pack<int8_t, uint16_t>(*w, (const int8_t*)from, stride, (int8_t*)w->data, threads);
}

// The inverse of atb_pack.
void atb_unpack(const Matrix* w, void* to, int64_t stride, int threads) {
    if (w->kind == FLOAT)
        unpack(*w, (const float*)w->data, (float*)to, stride, threads);
    else if (w->kind == BFLOAT)
        unpack(*w, (const bf16*)w->data, (bf16*)to, stride, threads);
    else
        unpack(*w, (const int8_t*)w->data, (int8_t*)to, stride, threads);
}

// Stores keys and values at the slots, see write_kv.
int64_t atb_write_kv(const Cache* c, const void* keys, int64_t key_stride, const void* values, int64_t value_stride,
                     const int64_t* slot_mapping, int64_t count, int64_t kind, int threads) {
#define WRITE(T, X) \
    write_kv<T>(*c, (const X*)keys, key_stride, (const X*)values, value_stride, slot_mapping, count, threads)
    return status_of([&] {
        if (c->kind == INT8)
            kind == FLOAT ? WRITE(int8_t, float) : WRITE(int8_t, bf16);
        else
            kind == FLOAT ? WRITE(float, float) : WRITE(bf16, bf16);
    });
#undef WRITE
}

// Attention of one new token of each sequence, see DecodeCall.
int64_t atb_decode(const Cache* c, const void* q, int64_t q_stride, void* out, const int64_t* block_tables,
                   int64_t table_stride, int64_t columns, const int64_t* context_lens, int64_t sequences, int64_t heads,
                   int64_t kind, int threads) {
    const DecodeCall call{c,     q,        out,          block_tables, context_lens, sequences,
                          heads, q_stride, table_stride, columns,      threads};
    return status_of([&] {
        if (c->kind == INT8)
            kind == FLOAT ? DecodeAttention<int8_t, float>(call).run() : DecodeAttention<int8_t, bf16>(call).run();
        else
            kind == FLOAT ? DecodeAttention<float, float>(call).run() : DecodeAttention<bf16, bf16>(call).run();
    });
}

// Attention of many new tokens of one sequence, see PrefillCall. dim is at most STEP.
int64_t atb_prefill(const Cache* c, const void* q, int64_t q_stride, void* out, int64_t out_stride,
                    const int64_t* block_table, int64_t columns, int64_t heads, int64_t length, int64_t context,
                    int64_t kind, int threads) {
    const PrefillCall call{c, q, out, block_table, heads, q_stride, out_stride, length, context, threads};
    return status_of([&] {
        if (length > context) throw OutOfRange{};
        check_block_table(*c, block_table, columns, context);
        if (kind == FLOAT)
            c->kind == INT8 ? prefill_attention<Fma, int8_t, float>(call) : prefill_attention<Fma, float, float>(call);
        else
            with_bfloat_arithmetic(length, [&](auto m) {
                typedef decltype(m) M;
                c->kind == INT8 ? prefill_attention<M, int8_t, bf16>(call) : prefill_attention<M, bf16, bf16>(call);
            });
    });
}

// Attention inside the frames of a vision encoder, see EncoderCall. dim is at most STEP.
int64_t atb_encoder(const void* q, const void* k, const void* v, void* out, int64_t frames, int64_t tokens,
                    int64_t heads, int64_t dim, int64_t frame_stride, int64_t token_stride, int64_t head_stride,
                    int64_t kind, int threads) {
    const EncoderCall call{q, k, v, out, frames, tokens, heads, dim, frame_stride, token_stride, head_stride, threads};
    return status_of([&] {
        if (kind == FLOAT)
            encoder_attention<Fma, float>(call);
        else
            with_bfloat_arithmetic(tokens, [&](auto m) { encoder_attention<decltype(m), bf16>(call); });
    });
}

void atb_rms_norm(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width, int64_t kind,
                  int threads) {
    if (kind == FLOAT)
        rms_norm((const float*)x, (const float*)weight, eps, (float*)out, rows, width, threads);
    else
        rms_norm((const bf16*)x, (const bf16*)weight, eps, (bf16*)out, rows, width, threads);
}

void atb_rotary(const void* x, int64_t stride, const float* cos, const float* sin, void* out, int64_t rows,
                int64_t heads, int64_t half, int64_t kind, int threads) {
    if (kind == FLOAT)
        rotary((const float*)x, stride, cos, sin, (float*)out, rows, heads, half, threads);
    else
        rotary((const bf16*)x, stride, cos, sin, (bf16*)out, rows, heads, half, threads);
}

void atb_swiglu(const void* gate_up, void* out, int64_t rows, int64_t width, int64_t kind, int threads) {
    if (kind == FLOAT)
        swiglu((const float*)gate_up, (float*)out, rows, width, threads);
    else
        swiglu((const bf16*)gate_up, (bf16*)out, rows, width, threads);
}

void atb_quick_gelu(const void* x, void* out, int64_t count, int64_t kind, int threads) {
    if (kind == FLOAT)
        quick_gelu((const float*)x, (float*)out, count, threads);
    else
        quick_gelu((const bf16*)x, (bf16*)out, count, threads);
}

// Pixels of uint8 frames, see look_up_pixels.
void atb_look_up_pixels(const uint8_t* bytes, const float* table, float* out, int64_t frames, int64_t area,
                        int threads) {
    look_up_pixels(bytes, table, out, frames, area, threads);
}

void atb_keep_freed_memory() { keep_freed_memory(); }

void atb_large_pages(void* start, int64_t bytes) { use_huge_pages(start, bytes); }

// Benchmark: reads `pieces` pieces of 1 MiB. `out` has 64 bytes for each piece.
void atb_probe_read(const void* data, int64_t pieces, int32_t* out, int threads) {
    read_all((const char*)data, pieces, out, threads);
}

// Benchmark: multiply-adds in registers, `rounds` rounds in each task. `out` has 64 bytes for each task's sum. The factor
// is out[0], the addend out[1]. Writes to `counts`: the FLOPs of a round, the floats of a vector, the multiply-adds of
// one element in a round, and the sum of one element before the first round.
void atb_probe_multiply_add(int64_t tasks, int64_t rounds, int64_t kind, float* out, int64_t* counts, int threads) {
    const vf a = splat(out[0]);
    const vf b = splat(out[1]);
    counts[1] = W;
    counts[2] = CHAINS;
    counts[3] = CHAINS * (CHAINS - 1) / 2;
#if defined(HAS_TILES)
    if (kind == BFLOAT) {
        counts[2] = TILE_CHAINS * 2 * TILE_ROWS;
        counts[3] = 0;
        counts[0] = counts[2] * TILE_ROWS * TILE_ROWS * 2;
        return multiply_add_in_tiles(tasks, rounds, out[0], out[1], out, threads);
    }
#elif defined(HAS_DOT)
    if (kind == BFLOAT) {
        counts[2] *= 2;
        counts[0] = counts[2] * W * 2;
        const __m512bh pair = (__m512bh)((vi)a | (vi)a >> 16);  // two bfloat16
        const __m512bh other = (__m512bh)((vi)b | (vi)b >> 16);
        multiply_add(tasks, rounds, out, threads,
                     [=](vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, pair, other); });
        return;
    }
#endif
    counts[0] = counts[2] * W * 2;
    multiply_add(tasks, rounds, out, threads, [=](vf sum) { return sum * a + b; });
}

// Whether the probe multiplies bfloat16 numbers in tile registers.
int atb_probe_has_tiles() {
#if defined(HAS_TILES)
    return 1;
#else
    return 0;
#endif
}

}  // extern "C"
