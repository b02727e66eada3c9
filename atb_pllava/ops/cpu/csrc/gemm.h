// Products of an input with a packed weight: x * w^T + bias.
//
// The input is packed into tiles of MR rows. Few rows (decoding) read the weight once from end to end. Many rows
// (prefill) multiply each span of a panel with many tiles, while the span and the tiles stay in the caches.

#pragma once

#include "arithmetic.h"

namespace {

// A task is a block of panels times a block of tiles.
constexpr int64_t BLOCKS_PER_PACK = 4;  // blocks of tiles that are packed before they are multiplied
constexpr int64_t PANELS_PER_TASK = 8;

struct LinearCall {
    const Matrix* w;
    const void* x;  // [count, columns], rows x_stride elements apart
    int64_t count, x_stride;
    const void* bias;  // [rows of w], or null. x, bias and out have one type.
    void* out;         // [count, rows of w], rows out_stride elements apart
    int64_t out_stride;
    int threads;
};

// The scales of an int8 weight for one panel and one piece of K. All pointers are null for a float weight.
struct Scales {
    const float* scale;       // [PANEL]
    const float* zero_point;  // [PANEL], or null for a symmetric weight
    const float* sums;        // [MR]: the sum of each row of the input over the piece. Null if no sums are needed.
};

// c[R][PANEL] (+)= scale * (acc - (zero_point + excess) * sum of the inputs). `first` overwrites c.
template <int R>
INLINE void accumulate(const vf (&acc)[R][NV], float* c, bool first, const Scales& scales, float excess) {
    auto for_each_vector = [&](auto value) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                float* to = c + r * PANEL + v * W;
                store(to, value(r, v, to));
            }
    };
    const float* scale = scales.scale;
    const float* zero_point = scales.zero_point;
    const float* sums = scales.sums;
    if (scale || sums)
        for_each_vector([&](int r, int v, const float* to) {
            vf part = acc[r][v];
            if (sums) part -= (zero_point ? load<vf>(zero_point + v * W) + excess : splat(excess)) * splat(sums[r]);
            if (scale) part *= load<vf>(scale + v * W);
            return first ? part : load<vf>(to) + part;
        });
    else if (first)
        for_each_vector([&](int r, int v, const float*) { return acc[r][v]; });
    else
        for_each_vector([&](int r, int v, const float* to) { return load<vf>(to) + acc[r][v]; });
}

// c (+)= a tile times a panel, over `pairs` pairs of K, with the scales of the panel.
template <int R, class M, class B>
__attribute__((noinline)) void multiply_tile(const typename M::A* a, const B* b, int64_t pairs, float* c, bool first,
                                             const Scales& scales) {
    vf acc[R][NV];
    M::template tile<R>(a, b, pairs, acc);
    accumulate<R>(acc, c, first, scales, M::INT8_EXCESS);
}

// The same in tile registers. Rows of c up to the next multiple of 16 are written. Sums without scales are added in the
// registers.
template <class M>
__attribute__((noinline)) void multiply_in_tiles(int rows, const typename M::A* a, const typename M::B* b,
                                                 int64_t pairs, float* c, bool first, const Scales& scales) {
    if (!scales.scale && !scales.sums) return M::multiply(rows, a, b, pairs, first, c, PANEL);
    constexpr int R = M::MR / 2;  // MR rows would take too many registers
    vf acc[M::MR / R][R][NV];
    M::multiply(rows, a, b, pairs, true, (float*)acc, PANEL);
    for (int r = 0; r < rows; r += R) {
        const Scales of_rows{scales.scale, scales.zero_point, scales.sums ? scales.sums + r : nullptr};
        accumulate<R>(acc[r / R], c + r * PANEL, first, of_rows, M::INT8_EXCESS);
    }
}

// multiply_tile for 1 <= rows <= MR.
template <class M, class B>
INLINE void multiply_rows(int rows, const typename M::A* a, const B* b, int64_t pairs, float* c, bool first,
                          const Scales& scales) {
#define CASE(R) \
    case R:     \
        return multiply_tile<(R <= M::MR ? R : M::MR), M, B>(a, b, pairs, c, first, scales);
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) }
#undef CASE
}

// One call of atb_linear. M is the arithmetic, B the type of the weight's elements, X that of x, bias and out.
template <class M, class B, class X>
class Linear {
  public:
    explicit Linear(const LinearCall& call) : call(call), w(*call.w) {}

    void run() const {
        const int64_t most = std::min<int64_t>(call.count, TILES_PER_TASK * BLOCKS_PER_PACK * MR);
        static thread_local Scratch a_scratch;
        static thread_local Scratch sum_scratch;
        A* a = a_scratch.get<A>(ceil_div(most, MR) * steps * MR * STEP);
        const bool needs_sums = w.zero_point || (w.kind == INT8 && M::INT8_EXCESS != 0);
        float* sums = needs_sums ? sum_scratch.get<float>(ceil_div(most, MR) * pieces * MR) : nullptr;
        for (int64_t first = 0; first < call.count; first += most) {
            const Input input{first, std::min(most, call.count - first), a, sums};
            pack_input(input);
            multiply(input);
        }
    }

  private:
    typedef typename M::A A;
    typedef typename M::B Wide;
    static constexpr int MR = M::MR;
    static constexpr int SPAN = M::SPAN;
    static constexpr int64_t TILES_PER_TASK = M::TILES_PER_TASK;

    // Rows [first, first + rows) of x.
    struct Input {
        int64_t first, rows;
        A* a;         // in tiles: [tile][step][MR][STEP]
        float* sums;  // [tile][piece][MR], or null
    };

    // Panels and tiles of one task.
    struct Block {
        int64_t first_panel, last_panel, first_tile, last_tile;
        int64_t rows() const { return (last_tile - first_tile) * MR; }
        int64_t panels() const { return last_panel - first_panel; }
    };

    const LinearCall& call;
    const Matrix& w;
    const int64_t steps = ceil_div(w.width, STEP);
    const int64_t panels = ceil_div(w.rows, PANEL);
    // A piece of K is summed in registers, then scaled. With groups, a piece is a group, at most STEP. Else SPAN.
    const int64_t piece = w.group_size ? std::min<int64_t>(w.group_size, STEP) : SPAN;
    const int64_t pieces = ceil_div(w.width, piece);

    void pack_input(const Input& input) const {
        const int threads = input.rows * w.width > 65536 ? call.threads : 1;
        pool()->run(ceil_div(input.rows, MR), threads, [&](int64_t tile) {
            for (int64_t r = 0; r < std::min<int64_t>(MR, input.rows - tile * MR); r++)
                for (int64_t s = 0; s < steps; s++) {
                    A* row = input.a + ((tile * steps + s) * MR + r) * STEP;
                    pack_step((const X*)call.x + (input.first + tile * MR + r) * call.x_stride, s, row);
                    if (input.sums) add_to_sums(row, s, input.sums + tile * pieces * MR + r);
                }
            if constexpr (M::USES_TILES) clear_missing_rows(input, tile);
        });
    }

    // Zeros in the rows of the last tile that the input does not have.
    void clear_missing_rows(const Input& input, int64_t tile) const {
        for (int64_t r = input.rows - tile * MR; r < MR; r++) {
            for (int64_t s = 0; s < steps; s++)
                std::fill_n(input.a + ((tile * steps + s) * MR + r) * STEP, step_length(s), A{});
            for (int64_t p = 0; input.sums && p < pieces; p++) input.sums[(tile * pieces + p) * MR + r] = 0;
        }
    }

    // Step `s` of K of one row of x, with zeros where the weight has no columns.
    void pack_step(const X* x, int64_t s, A* row) const {
        const int64_t origin = s * STEP - w.group_offset;
        const int64_t from = std::max<int64_t>(origin, 0);
        const int64_t to = std::min<int64_t>(origin + STEP, w.columns);
        std::fill(row, row + (from - origin), A{});
        copy_row(x + from, to - from, row + (from - origin));
        std::fill(row + (to - origin), row + step_length(s), A{});
    }

    // Adds step `s` of a row of a tile to the row's sum of each piece. `sums` are MR elements apart.
    void add_to_sums(const A* row, int64_t s, float* sums) const {
        for (int64_t k = 0; k < step_length(s); k += piece) {
            float& piece_sum = sums[(s * STEP + k) / piece * MR];
            const float before = (s * STEP + k) % piece ? piece_sum : 0;
            piece_sum = before + sum_row(row + k, std::min(piece, step_length(s) - k));
        }
    }

    int64_t step_length(int64_t s) const { return std::min<int64_t>(STEP, w.width - s * STEP); }

    void multiply(const Input& input) const {
        const int64_t tiles = ceil_div(input.rows, MR);
        const int64_t blocks = ceil_div(tiles, TILES_PER_TASK);
        // With one tile, tasks are smaller, so that all threads end at the same time. Tasks in tile registers are short
        // too.
        const int64_t fair = std::clamp<int64_t>(panels * blocks / (4 * call.threads), 1, PANELS_PER_TASK);
        const int64_t panels_per_task = tiles > 1 && !M::USES_TILES ? PANELS_PER_TASK : fair;
        pool()->run(ceil_div(panels, panels_per_task) * blocks, call.threads, [&](int64_t task) {
            const int64_t first_panel = task / blocks * panels_per_task;
            const int64_t first_tile = task % blocks * TILES_PER_TASK;
            multiply_block(input, Block{first_panel, std::min(panels, first_panel + panels_per_task), first_tile,
                                        std::min(tiles, first_tile + TILES_PER_TASK)});
        });
    }

    void multiply_block(const Input& input, const Block& block) const {
        [[maybe_unused]] const typename M::Setup setup;
        static thread_local Scratch c_scratch;
        static thread_local Scratch wide_scratch;
        float* c = c_scratch.get<float>(block.panels() * block.rows() * PANEL);
        Wide* wide = wide_scratch.get<Wide>(SPAN * PANEL);
        const bool many = block.last_tile - block.first_tile > 1;
        const int64_t spans = ceil_div(w.width, SPAN);
        for (int64_t i = 0; i < spans * block.panels(); i++) {
            // Many tiles: the inner loop is over panels, so that the span of the tiles stays in the cache. One tile:
            // the inner loop is over spans, so that the weight is read from end to end.
            const int64_t panel = block.first_panel + (many ? i % block.panels() : i / spans);
            const int64_t start = (many ? i / block.panels() : i % spans) * SPAN;
            const B* b = (const B*)w.data + (panel * w.width + start) * PANEL;
            if constexpr (!std::is_same<B, Wide>::value)
                if (many || M::USES_TILES) {
                    M::widen(b, std::min<int64_t>(SPAN, w.width - start) / 2, wide);
                    multiply_span(input, block, panel, start, wide, c);
                    continue;
                }
            if constexpr (std::is_same<B, Wide>::value || !M::USES_TILES)
                multiply_span(input, block, panel, start, b, c);
        }
        store_block(input, block, c);
    }

    // All tiles of the block times SPAN elements of K of one panel, from `start` on. b is that part of the panel.
    template <class Weight>
    void multiply_span(const Input& input, const Block& block, int64_t panel, int64_t start, const Weight* b,
                       float* c) const {
        const int64_t length = std::min<int64_t>(SPAN, w.width - start);
        for (int64_t tile = block.first_tile; tile < block.last_tile; tile++) {
            const int rows = (int)std::min<int64_t>(MR, input.rows - tile * MR);
            float* to = c + ((panel - block.first_panel) * block.rows() + (tile - block.first_tile) * MR) * PANEL;
            for (int64_t k = 0; k < length; k += piece) {
                const int64_t at = start + k;
                const A* a = input.a + (tile * steps + at / STEP) * MR * STEP + k % STEP;
                const int64_t column = (w.group_size ? at / w.group_size : 0) * panels * PANEL + panel * PANEL;
                const Scales scales{w.scale ? w.scale + column : nullptr,
                                    w.zero_point ? w.zero_point + column : nullptr,
                                    input.sums ? input.sums + (tile * pieces + at / piece) * MR : nullptr};
                const int64_t pairs = std::min(piece, length - k) / 2;
                if constexpr (M::USES_TILES)
                    multiply_in_tiles<M>(rows, a, b + k * PANEL, pairs, to, at == 0, scales);
                else
                    multiply_rows<M>(rows, a, b + k * PANEL, pairs, to, at == 0, scales);
            }
        }
    }

    // out = c + bias
    void store_block(const Input& input, const Block& block, const float* c) const {
        for (int64_t panel = block.first_panel; panel < block.last_panel; panel++) {
            const X* bias = call.bias ? (const X*)call.bias + panel * PANEL : nullptr;
            const int64_t columns = std::min<int64_t>(PANEL, w.rows - panel * PANEL);
            for (int64_t r = block.first_tile * MR; r < std::min(input.rows, block.last_tile * MR); r++) {
                const float* from =
                    c + ((panel - block.first_panel) * block.rows() + r - block.first_tile * MR) * PANEL;
                X* to = (X*)call.out + (input.first + r) * call.out_stride + panel * PANEL;
                if (columns == PANEL)
                    for (int v = 0; v < NV; v++)
                        store_floats(load<vf>(from + v * W) + (bias ? load_floats(bias + v * W) : (vf){}), to + v * W);
                else
                    for (int64_t i = 0; i < columns; i++) from_float(from[i] + (bias ? to_float(bias[i]) : 0.f), to[i]);
            }
        }
    }
};

}  // namespace
