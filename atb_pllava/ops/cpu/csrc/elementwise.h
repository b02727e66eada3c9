// RMSNorm, rotary position embedding, SwiGLU and QuickGELU. X is float or bf16. The arithmetic is float32.

#pragma once

#include <cmath>

#include "threads.h"
#include "vec_math.h"

namespace {

// Calls task(row) for each row, in threads.
template <class F>
void for_each_row(int64_t rows, int threads, F&& task) {
    constexpr int64_t ROWS_PER_TASK = 16;
    pool()->run(ceil_div(rows, ROWS_PER_TASK), threads, [&](int64_t part) {
        const int64_t first = part * ROWS_PER_TASK;
        for (int64_t row = first; row < std::min(rows, first + ROWS_PER_TASK); row++) task(row);
    });
}

// out = x / sqrt(mean(x^2) + eps), rounded to X, times weight. x and out are [rows, width].
template <class X>
void rms_norm(const X* x, const X* weight, float eps, X* out, int64_t rows, int64_t width, int threads) {
    for_each_row(rows, threads, [&](int64_t row) {
        const X* from = x + row * width;
        X* to = out + row * width;
        vf squares = {};
        int64_t i = 0;
        for (; i + W <= width; i += W) {
            vf v = load_floats(from + i);
            squares += v * v;
        }
        float total = sum(squares);
        for (; i < width; i++) total += to_float(from[i]) * to_float(from[i]);
        const float factor = 1 / std::sqrt(total / width + eps);
        for (i = 0; i + W <= width; i += W)
            store_floats(round_to<X>(load_floats(from + i) * factor) * load_floats(weight + i), to + i);
        for (; i < width; i++) from_float(round_to<X>(to_float(from[i]) * factor) * to_float(weight[i]), to[i]);
    });
}

// Rotates each pair (x[i], x[half + i]) of a head by the angle whose cosine and sine are given, [rows, half].
// x is [rows, heads, 2 * half] with rows `stride` elements apart. out is contiguous.
template <class X>
void rotary(const X* x, int64_t stride, const float* cos, const float* sin, X* out, int64_t rows, int64_t heads,
            int64_t half, int threads) {
    for_each_row(rows, threads, [&](int64_t row) {
        for (int64_t head = 0; head < heads; head++) {
            const X* first = x + row * stride + head * 2 * half;
            const X* second = first + half;
            X* to = out + (row * heads + head) * 2 * half;
            const float* c = cos + row * half;
            const float* s = sin + row * half;
            int64_t i = 0;
            for (; i + W <= half; i += W) {
                vf a = load_floats(first + i);
                vf b = load_floats(second + i);
                vf cos_i = load<vf>(c + i);
                vf sin_i = load<vf>(s + i);
                store_floats(a * cos_i - b * sin_i, to + i);
                store_floats(b * cos_i + a * sin_i, to + half + i);
            }
            for (; i < half; i++) {
                const float a = to_float(first[i]);
                const float b = to_float(second[i]);
                from_float(a * c[i] - b * s[i], to[i]);
                from_float(b * c[i] + a * s[i], to[half + i]);
            }
        }
    });
}

// out = x * logistic(slope * x) * gate, of `count` elements. A null gate counts as 1.
template <class X>
INLINE void sigmoid_product(const X* x, const X* gate, float slope, X* out, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        vf v = load_floats(x + i);
        v *= logistic(v * slope);
        store_floats(gate ? v * load_floats(gate + i) : v, out + i);
    }
    if (i == count) return;
    X a[W] = {};
    X b[W] = {};
    std::memcpy(a, x + i, (count - i) * sizeof(X));
    if (gate) std::memcpy(b, gate + i, (count - i) * sizeof(X));
    vf v = load_floats(a);
    v *= logistic(v * slope);
    store_floats(gate ? v * load_floats(b) : v, a);
    std::memcpy(out + i, a, (count - i) * sizeof(X));
}

// out = silu(gate) * up. gate_up is [rows, 2 * width], out is [rows, width].
template <class X>
void swiglu(const X* gate_up, X* out, int64_t rows, int64_t width, int threads) {
    for_each_row(rows, threads, [&](int64_t row) {
        const X* gate = gate_up + row * 2 * width;
        sigmoid_product(gate, gate + width, 1.f, out + row * width, width);
    });
}

// out = x * logistic(1.702 * x), of `count` elements.
template <class X>
void quick_gelu(const X* x, X* out, int64_t count, int threads) {
    constexpr int64_t PER_TASK = 32768;
    pool()->run(ceil_div(count, PER_TASK), threads, [&](int64_t task) {
        const int64_t first = task * PER_TASK;
        sigmoid_product<X>(x + first, nullptr, 1.702f, out + first, std::min(PER_TASK, count - first));
    });
}

// Pixels of frames: out [frames, 3, area] = table [256, 3] at (byte, channel) for each byte of `bytes` [frames, area, 3].
inline void look_up_pixels(const uint8_t* bytes, const float* table, float* out, int64_t frames, int64_t area,
                           int threads) {
    constexpr int64_t PER_TASK = 1 << 14;
    const int64_t parts = ceil_div(area, PER_TASK);
    pool()->run(frames * parts, threads, [&](int64_t task) {
        const int64_t frame = task / parts;
        const int64_t first = task % parts * PER_TASK;
        const int64_t last = std::min(area, first + PER_TASK);
        float* red = out + frame * 3 * area;
        const uint8_t* pixel = bytes + (frame * area + first) * 3;
        for (int64_t i = first; i < last; i++, pixel += 3)
            for (int channel = 0; channel < 3; channel++)
                red[channel * area + i] = table[pixel[channel] * 3 + channel];
    });
}

}  // namespace
