// Attention of many queries: prefill over the paged KV cache, and the vision encoder (FlashAttention).
//
// Keys and values are packed into panels. Blocks of STEP keys are multiplied with tiles of MR queries by the tile
// products of arithmetic.h, with an online softmax between the two products.

#pragma once

#include "arithmetic.h"
#include "kv_cache.h"
#include "vec_math.h"

namespace {

constexpr int64_t QUERY_TILES = 8;  // tiles of queries that share a block of keys in the L2 cache

// The rows [dim] of one head's keys or values in a strided tensor, indexed by token. PagedRows is the paged form.
template <class T>
struct DenseRows {
    const T* start;
    int64_t stride;
    const T* row(int64_t token) const { return start + token * stride; }
    float scale(int64_t) const { return 1.f; }
};

// `count` elements of a token's row from `first` on, times its scale.
template <class B, class Rows>
INLINE void copy_scaled(const Rows& rows, int64_t token, int64_t first, int64_t count, B* out) {
    const auto* row = rows.row(token) + first;
    if constexpr (!std::is_same<decltype(row), const int8_t*>::value) return copy_row(row, count, out);
    const float scale = rows.scale(token);
    for (int64_t i = 0; i < count; i++) from_float(to_float(row[i]) * scale, out[i]);
}

// Two rows of PANEL elements as one row of pairs. float32 pairs are one row behind the other.
INLINE void store_pair(const float* even, const float* odd, float* out) {
    std::memcpy(out, even, PANEL * sizeof(float));
    std::memcpy(out + PANEL, odd, PANEL * sizeof(float));
}
INLINE void store_pair(const bf16* even, const bf16* odd, bf16* out) {
    for (int i = 0; i < PANEL; i += W)
        store(out + 2 * i, ((vi)load_floats(even + i) >> 16 & 0xffff) | (vi)load_floats(odd + i));
}

// Packed keys and values of one head. B is the element type of the arithmetic. T is that of the rows.
template <class B>
struct PackedHead {
    int64_t dim, tokens;
    B* keys;

    PackedHead(int64_t dim, int64_t tokens, B* memory) : dim(dim), tokens(tokens), keys(memory) {}

    int64_t pairs() const { return ceil_div(dim, 2); }
    int64_t value_panels() const { return ceil_div(dim, PANEL); }
    int64_t key_panels() const { return ceil_div(tokens, PANEL); }
    int64_t blocks() const { return ceil_div(tokens, STEP); }
    int64_t size() const { return key_panels() * pairs() * 2 * PANEL + blocks() * value_panels() * STEP * PANEL; }

    // K of the first product is the head's elements: [panel of keys][pair of elements][PANEL][2].
    B* key_panel(int64_t panel) const { return keys + panel * pairs() * 2 * PANEL; }
    // K of the second product is the keys: [block][panel of the head's elements][pair of keys][PANEL][2].
    B* value_panel(int64_t block, int64_t panel) const {
        return key_panel(key_panels()) + (block * value_panels() + panel) * STEP * PANEL;
    }

    template <class Rows>
    INLINE_METHOD void pack_keys(const Rows& rows, int64_t panel) const {
        typedef typename std::conditional<std::is_same<B, float>::value, float, uint32_t>::type Unit;  // see `pack`
        constexpr int64_t UNIT = sizeof(Unit) / sizeof(B);
        const int64_t dim = this->dim;  // copies, because the compiler assumes that stores to `out` change members
        const int64_t tokens = this->tokens;
        const int64_t width = pairs() * 2;
        B* out = key_panel(panel);
        alignas(64) B row[STEP] = {};
        for (int column = 0; column < PANEL; column++) {
            const int64_t token = panel * PANEL + column;
            if (token < tokens)
                copy_scaled(rows, token, 0, dim, row);
            else
                std::fill(row, row + width, B{});
            for (int64_t i = 0; i < width; i += UNIT) store(out + i * PANEL + column * UNIT, load<Unit>(row + i));
        }
    }

    template <class Rows>
    INLINE_METHOD void pack_values(const Rows& rows, int64_t block) const {
        const int64_t dim = this->dim;
        const int64_t panels = value_panels();
        const int64_t count = std::min<int64_t>(STEP, tokens - block * STEP);
        const int64_t filled = ceil_div(count, PANEL) * PANEL;
        for (int64_t panel = 0; panel < panels; panel++) {
            const int64_t first = panel * PANEL;
            const int64_t columns = std::min<int64_t>(PANEL, dim - first);
            B* out = value_panel(block, panel);
            for (int64_t key = 0; key < filled; key += 2) {
                alignas(64) B even[PANEL] = {};
                alignas(64) B odd[PANEL] = {};
                if (key < count) copy_scaled(rows, block * STEP + key, first, columns, even);
                if (key + 1 < count) copy_scaled(rows, block * STEP + key + 1, first, columns, odd);
                store_pair(even, odd, out + key * PANEL);
            }
        }
    }
};

// The mask: row r of the queries sees the first `first + r * more` keys.
struct Mask {
    int64_t first, more;
    int64_t visible(int64_t row, int64_t tokens) const { return std::min(tokens, first + more * row); }
};

// The online softmax of up to QUERY_TILES tiles of queries of one head. Its scratch memory belongs to the thread.
template <class M>
class FlashAttention {
    typedef typename M::A A;
    typedef typename M::B B;
    static constexpr int MR = M::MR;

  public:
    explicit FlashAttention(const PackedHead<B>& head) : head(head), dim(head.dim), width(head.value_panels() * PANEL) {
        static thread_local Scratch scratch;
        const int64_t rows = QUERY_TILES * MR;
        const int64_t floats = MR * STEP + rows * width + 2 * rows;
        q = (A*)scratch.get<char>((rows + MR) * STEP * sizeof(A) + floats * sizeof(float));
        p = q + rows * STEP;
        scores = (float*)(p + MR * STEP);
        out = scores + MR * STEP;
        max = out + rows * width;
        sum_exp = max + rows;
    }

    // Attends with queries [rows, dim], `stride` elements apart. Writes the results to `to`, to_stride elements apart.
    template <class X>
    void run(const X* query, int64_t stride, int64_t rows, const Mask& mask, X* to, int64_t to_stride) {
        [[maybe_unused]] const typename M::Setup setup;
        const int64_t tiles = ceil_div(rows, MR);
        load_queries(query, stride, rows);
        for (int64_t block = 0; block * STEP < mask.visible(rows - 1, head.tokens); block++)
            for (int64_t tile = 0; tile < tiles; tile++) attend(block, tile, rows, mask);
        for (int64_t r = 0; r < rows; r++) {
            float* row = out + r * width;
            for (int64_t i = 0; i < width; i += W) store(row + i, load<vf>(row + i) / sum_exp[r]);
            copy_row(row, dim, to + r * to_stride);
        }
    }

  private:
    const PackedHead<B>& head;
    const int64_t dim;
    const int64_t width;  // dim filled to whole panels
    A* q;                 // [QUERY_TILES * MR][STEP]
    A* p;                 // exponentials of one tile, [MR][STEP]
    float* scores;        // of one tile, [MR][STEP]
    float* out;           // weighted values, [QUERY_TILES * MR][width]
    float* max;           // the largest score of each query so far
    float* sum_exp;       // the sum of the exponentials of each query so far

    template <class X>
    void load_queries(const X* query, int64_t stride, int64_t rows) {
        const int64_t filled = ceil_div(rows, MR) * MR;
        for (int64_t r = 0; r < filled; r++) {
            std::fill(q + r * STEP, q + r * STEP + 2 * head.pairs(), A{});
            if (r < rows) copy_row(query + r * stride, dim, q + r * STEP);
            max[r] = -std::numeric_limits<float>::infinity();
            sum_exp[r] = 0;
        }
        std::fill(out, out + filled * width, 0.f);
    }

    // One block of keys and values, for one tile of the queries. The parts are inlined, because AVX2 code would be a
    // quarter slower otherwise.
    INLINE_METHOD void attend(int64_t block, int64_t tile, int64_t rows, const Mask& mask) {
        const int64_t last_row = std::min(rows, (tile + 1) * MR) - 1;
        const int64_t visible = mask.visible(last_row, head.tokens) - block * STEP;
        if (visible <= 0) return;
        const int64_t count = std::min<int64_t>(STEP, visible);
        const int64_t key_panels = ceil_div(count, PANEL);
        compute_scores(block, tile, key_panels);
        float correction[MR];
        for (int r = 0; r < MR; r++) {
            const int64_t row = tile * MR + r;
            const int64_t seen = mask.visible(row, head.tokens) - block * STEP;
            correction[r] = update_softmax(r, std::max<int64_t>(0, std::min(count, seen)), key_panels * PANEL, max[row],
                                           sum_exp[row]);
        }
        add_values(block, tile, key_panels, correction);
    }

    INLINE_METHOD void compute_scores(int64_t block, int64_t tile, int64_t key_panels) {
        for (int64_t panel = 0; panel < key_panels; panel++) {
            const B* keys = head.key_panel(block * (STEP / PANEL) + panel);
            if constexpr (M::USES_TILES) {
                M::multiply(MR, q + tile * MR * STEP, keys, head.pairs(), true, scores + panel * PANEL, STEP);
            } else {
                vf acc[MR][NV];
                M::template tile<MR>(q + tile * MR * STEP, keys, head.pairs(), acc);
#pragma GCC unroll 16
                for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
                    for (int v = 0; v < NV; v++) store(scores + r * STEP + panel * PANEL + v * W, acc[r][v]);
            }
        }
    }

    // Row r of p = exponentials of the first `count` scores of row r, zeros up to `filled`. Updates the row's maximum
    // and sum of exponentials. Returns the factor that corrects the weighted values so far.
    float update_softmax(int r, int64_t count, int64_t filled, float& row_max, float& row_sum_exp) {
        float* row = scores + r * STEP;
        A* to = p + r * STEP;
        if (count == 0) {
            std::fill(to, to + filled, A{});
            return 1.f;
        }
        const float scale = LOG2E / std::sqrt((float)dim);
        for (int64_t i = count; i < filled; i++) row[i] = -std::numeric_limits<float>::infinity();
        vf high = load<vf>(row);
        for (int64_t i = W; i < filled; i += W) high = vmax(load<vf>(row + i), high);
        const float old_max = row_max;
        row_max = std::max(old_max, highest(high) * scale);
        vf sums = {};
        for (int64_t i = 0; i < filled; i += W) {
            vf e = power_of_two(load<vf>(row + i) * scale - row_max);
            sums += e;
            store_floats(e, to + i);
        }
        const float correction = std::exp2(old_max - row_max);
        row_sum_exp = row_sum_exp * correction + sum(sums);
        return correction;
    }

    // out = out * correction + p * values
    INLINE_METHOD void add_values(int64_t block, int64_t tile, int64_t key_panels, const float (&correction)[MR]) {
        for (int64_t panel = 0; panel < head.value_panels(); panel++) {
            vf acc[MR][NV];
            const B* values = head.value_panel(block, panel);
            if constexpr (M::USES_TILES)
                M::multiply(MR, p, values, key_panels * PANEL / 2, true, (float*)acc, PANEL);
            else
                M::template tile<MR>(p, values, key_panels * PANEL / 2, acc);
#pragma GCC unroll 16
            for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
                for (int v = 0; v < NV; v++) {
                    float* to = out + (tile * MR + r) * width + panel * PANEL + v * W;
                    store(to, load<vf>(to) * correction[r] + acc[r][v]);
                }
        }
    }
};

struct PrefillCall {
    const Cache* cache;
    const void* q;  // [length, heads, dim]: the last `length` tokens of `context`, tokens q_stride elements apart
    void* out;      // [length, heads, dim], tokens out_stride elements apart
    const int64_t* block_table;
    int64_t heads, q_stride, out_stride, length, context;
    int threads;
};

// Causal attention of one sequence. M is the arithmetic, T the type of the cache's elements, X that of q and out.
template <class M, class T, class X>
void prefill_attention(const PrefillCall& call) {
    typedef typename M::B B;
    const Cache& c = *call.cache;
    const int64_t group = call.heads / c.heads;  // query heads of a key head
    const int64_t rows = QUERY_TILES * M::MR;
    const int64_t parts = ceil_div(call.length, rows);
    const int64_t most_heads = std::min<int64_t>(c.heads, 4);  // key heads that are packed at once
    const PackedHead<B> shape(c.dim, call.context, nullptr);
    static thread_local Scratch scratch;
    B* memory = scratch.get<B>(most_heads * shape.size());
    auto packed_head = [&](int64_t number) {
        return PackedHead<B>(c.dim, call.context, memory + number * shape.size());
    };
    for (int64_t first = 0; first < c.heads; first += most_heads) {
        const int64_t heads = std::min(most_heads, c.heads - first);
        pool()->run(heads * shape.blocks(), call.threads, [&](int64_t task) {
            const int64_t block = task / heads;
            const int64_t number = task % heads;
            const PackedHead<B> head = packed_head(number);
            const PagedRows<T> keys = key_rows<T>(c, call.block_table, first + number);
            const PagedRows<T> values = value_rows<T>(c, call.block_table, first + number);
            const int64_t last_panel = std::min(head.key_panels(), (block + 1) * (STEP / PANEL));
            for (int64_t panel = block * (STEP / PANEL); panel < last_panel; panel++) head.pack_keys(keys, panel);
            head.pack_values(values, block);
        });
        pool()->run(heads * group * parts, call.threads, [&](int64_t task) {
            // The last queries first: they see the most keys.
            const int64_t from = (parts - 1 - task / (heads * group)) * rows;
            const int64_t q_head = task % (heads * group);
            const PackedHead<B> head = packed_head(q_head / group);
            const int64_t column = (first * group + q_head) * c.dim;
            const Mask causal{call.context - call.length + from + 1, 1};
            FlashAttention<M>(head).template run<X>((const X*)call.q + from * call.q_stride + column, call.q_stride,
                                                    std::min(rows, call.length - from), causal,
                                                    (X*)call.out + from * call.out_stride + column, call.out_stride);
        });
    }
}

struct EncoderCall {
    const void* q;  // q, k and v: [frames, tokens, heads, dim] with the strides below and contiguous heads
    const void* k;
    const void* v;
    void* out;  // the same shape, contiguous
    int64_t frames, tokens, heads, dim, frame_stride, token_stride, head_stride;
    int threads;
};

// Attention of each frame's tokens to all tokens of the frame.
template <class M, class X>
void encoder_attention(const EncoderCall& call) {
    typedef typename M::B B;
    const int64_t rows = QUERY_TILES * M::MR;
    const int64_t out_stride = call.heads * call.dim;
    pool()->run(call.frames * call.heads, call.threads, [&](int64_t task) {
        static thread_local Scratch scratch;
        const PackedHead<B> shape(call.dim, call.tokens, nullptr);
        const PackedHead<B> head(call.dim, call.tokens, scratch.get<B>(shape.size()));
        const int64_t frame_number = task / call.heads;
        const int64_t head_number = task % call.heads;
        const int64_t start = frame_number * call.frame_stride + head_number * call.head_stride;
        const DenseRows<X> keys{(const X*)call.k + start, call.token_stride};
        const DenseRows<X> values{(const X*)call.v + start, call.token_stride};
        for (int64_t panel = 0; panel < head.key_panels(); panel++) head.pack_keys(keys, panel);
        for (int64_t block = 0; block < head.blocks(); block++) head.pack_values(values, block);
        for (int64_t from = 0; from < call.tokens; from += rows)
            FlashAttention<M>(head).template run<X>(
                (const X*)call.q + start + from * call.token_stride, call.token_stride,
                std::min(rows, call.tokens - from), Mask{call.tokens, 0},
                (X*)call.out + (frame_number * call.tokens + from) * out_stride + head_number * call.dim, out_stride);
    });
}

}  // namespace
