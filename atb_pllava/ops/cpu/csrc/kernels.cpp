// CPU kernels of atb_pllava: packed matrix products, attention over a paged cache, and the small functions between.
//
// Plain C interface, no torch headers: ops/native.py compiles this file in seconds for the machine at hand and calls it
// with pointers. One source serves every CPU: vectors are GCC's generic ones, W floats wide, and where the compiler's
// flags allow AVX-512 BF16, products of bfloat16 activations use its dot instruction (Dot below) instead of float32
// multiply-adds (Fma). Sums are float32 everywhere.
//
// Words: a *panel* is PANEL rows of a weight (columns of the result) side by side; a *pair* is two neighbouring elements
// along the dimension that is summed over; a *tile* is MR rows of the input times one panel, kept in registers.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <mutex>
#include <thread>
#include <type_traits>

#include <pthread.h>
#include <sys/mman.h>
#if defined(__GLIBC__)
#include <malloc.h>
#endif
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define DOT
#endif
#define INLINE static inline __attribute__((always_inline))

namespace {

// ---------------------------------------------------------------------------------------------------------- vectors

#if defined(__AVX512F__)
constexpr int W = 16, MR = 12;
#elif defined(__AVX2__)
constexpr int W = 8, MR = 3;
#elif defined(__aarch64__)
constexpr int W = 4, MR = 3;  // NEON: 24 of 32 registers hold sums
#else
constexpr int W = 4, MR = 2;
#endif
constexpr int PANEL = 32;        // columns of a panel
constexpr int NV = PANEL / W;    // vectors of a panel
constexpr int AHEAD = 4096;      // bytes that are asked for before they are needed, into the second-level cache
constexpr int STEP = 256;        // elements along the summed dimension that lie together in a row of a tile
constexpr int SPAN = 4 * STEP;   // elements along the summed dimension that are summed in registers

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int16_t vs __attribute__((vector_size(W * 4)));    // 2 W words
typedef int8_t vc __attribute__((vector_size(W * 2)));     // 2 W bytes
typedef int8_t vq __attribute__((vector_size(W)));         // W bytes
typedef uint16_t bf16;

template <class V> INLINE V load(const void* p) { V v; std::memcpy(&v, p, sizeof v); return v; }
template <class V> INLINE void store(void* p, V v) { std::memcpy(p, &v, sizeof v); }
INLINE vf splat(float x) { return x - (vf){}; }
INLINE vf even_half(vi pairs) { return (vf)(pairs << 16); }                  // bfloat16 at even places, as float32
INLINE vf odd_half(vi pairs) { return (vf)(pairs & (int32_t)0xffff0000); }
#if defined(__AVX512F__)
INLINE vf larger(vf a, vf b) { return (vf)_mm512_max_ps((__m512)a, (__m512)b); }  // b where one is not a number
INLINE float sum(vf v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float highest(vf v) { return _mm512_reduce_max_ps((__m512)v); }
#else
INLINE vf larger(vf a, vf b) { vi m = a > b; return (vf)(((vi)a & m) | ((vi)b & ~m)); }
INLINE float sum(vf v) { float s = 0; for (int i = 0; i < W; i++) s += v[i]; return s; }
INLINE float highest(vf v) { float s = v[0]; for (int i = 1; i < W; i++) s = std::max(s, v[i]); return s; }
#endif

INLINE float to_float(float x) { return x; }
INLINE float to_float(int8_t x) { return x; }
INLINE float to_float(bf16 x) { uint32_t bits = (uint32_t)x << 16; float f; std::memcpy(&f, &bits, 4); return f; }
INLINE void from_float(float x, float& out) { out = x; }
INLINE void from_float(float x, bf16& out) {
    uint32_t bits; std::memcpy(&bits, &x, 4);
    out = x != x ? 0x7fc0 : (bf16)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}
template <class T> INLINE float rounded(float x) { T t; from_float(x, t); return to_float(t); }

INLINE vf load_floats(const float* p) { return load<vf>(p); }
INLINE vf load_floats(const bf16* p) {
    typedef uint16_t vh __attribute__((vector_size(W * 2)));
    return (vf)(__builtin_convertvector(load<vh>(p), vi) << 16);
}
INLINE vf load_floats(const int8_t* p) {
#if defined(__AVX512F__)  // GCC makes many instructions of the generic form
    return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif defined(__AVX2__)
    return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
    return __builtin_convertvector(__builtin_convertvector(load<vq>(p), vi), vf);
#endif
}
INLINE void store_floats(vf v, float* p) { store(p, v); }
INLINE void store_floats(vf v, bf16* p) {
#if defined(__AVX512BF16__)
    store(p, _mm512_cvtneps_pbh((__m512)v));
#else
    typedef uint16_t vh __attribute__((vector_size(W * 2)));
    vi bits = (vi)v, nan = v != v;
    vi nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    store(p, __builtin_convertvector((nearest & ~nan) | (0x7fc0 & nan), vh));
#endif
}
template <class T> INLINE vf round_to(vf v) {
    if (std::is_same<T, float>::value) return v;
    T t[W]; store_floats(v, t); return load_floats(t);
}

template <class X, class A> INLINE void copy_row(const X* from, int64_t count, A* to) {
    if constexpr (std::is_same<X, A>::value) std::memcpy(to, from, count * sizeof(A));
    else {
        int64_t i = 0;
        for (; i + W <= count; i += W) store_floats(load_floats(from + i), to + i);
        for (; i < count; i++) from_float(to_float(from[i]), to[i]);
    }
}

// 2^x for x below 127, 0 for x below -126; relative error 2e-7. The polynomial is Cephes' exp2f on [-1/2, 1/2].
INLINE vf power_of_two(vf x) {
    const float MAGIC = 12582912.f;  // 1.5 * 2^23: adding it rounds to a whole number
    const vi vanished = x < -126.f;
    vf shifted = x + MAGIC, f = x - (shifted - MAGIC);
    vf p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
    p = p * f + 9.618437357674640e-3f;
    p = p * f + 5.550332471162809e-2f;
    p = p * f + 2.402264791363012e-1f;
    p = p * f + 6.931472028550421e-1f;
    p = p * f + 1.f;
    return (vf)(((vu)p + ((vu)shifted << 23)) & (vu)~vanished);
}
constexpr float LOG2E = 1.44269504088896341f;
INLINE vf logistic(vf x) {  // 1 / (1 + e^-x), both branches with a power below 1
    vf negative = (vf)((vi)x | (int32_t)0x80000000);
    vf e = power_of_two(negative * LOG2E);
    vi below = x < 0.f;
    vf numerator = (vf)(((vi)e & below) | ((vi)splat(1.f) & ~below));
    return numerator / (1.f + e);
}

// ---------------------------------------------------------------------------------------------------------- threads

// Memory that could not be had. It ends a call: results are incomplete then. No exception leaves a worker (the pool keeps
// it for the thread that called) or this file (see missing_bytes).
struct NoRoom {
    size_t bytes;
};

// Workers take numbered jobs from a counter, so one that wakes late (a busy neighbour, a slow virtual CPU) costs nothing
// but its help. They look for new work for a moment before they sleep: a decode step has a hundred short calls.
class Pool {
  public:
    // Raises NoRoom when a job did; others may not have begun then.
    template <class F> void run(int64_t count, int threads, F&& job) {
        threads = (int)std::min<int64_t>(threads, count);
        if (threads <= 1 || !turn.try_lock()) {  // another thread of the program is using the workers
            for (int64_t i = 0; i < count; i++) job(i);
            return;
        }
        while (size < threads - 1 && start()) {}
        call = [](void* f, int64_t i) { (*(typename std::remove_reference<F>::type*)f)(i); };
        context = (void*)&job, total = count, tickets = threads - 1;
        next = 0;
        open = true;
        generation++;
        if (sleeping) { std::lock_guard<std::mutex> guard(lock); wake.notify_all(); }
        work();
        open = false;
        for (int spins = 0; inside; spins++) spins < 4000 ? relax() : std::this_thread::yield();
        const size_t bytes = refused.exchange(0);
        turn.unlock();
        if (bytes) throw NoRoom{bytes};
    }

  private:
    std::mutex turn, lock;
    std::condition_variable wake;
    std::atomic<int> sleeping{0}, inside{0}, tickets{0};
    std::atomic<int64_t> next{0};
    std::atomic<size_t> refused{0};
    std::atomic<uint64_t> generation{0};
    std::atomic<bool> open{false};
    void (*call)(void*, int64_t) = nullptr;
    void* context = nullptr;
    int64_t total = 0;
    int size = 0;

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
    void work() {
        try {
            for (int64_t i; (i = next++) < total;) call(context, i);
        } catch (const NoRoom& missing) {
            refused = missing.bytes, next = total;
        }
    }
    bool start() {  // false where the system grants no more threads: those that there are do the work
        try {
            std::thread([this, seen = generation.load()] { live(seen); }).detach();
        } catch (const std::exception&) {
            return false;
        }
        size++;
        return true;
    }
    void live(uint64_t seen) {
        for (;;) {
            auto until = std::chrono::steady_clock::now() + std::chrono::microseconds(60);
            for (int i = 1; generation == seen; i++) {
                relax();
                if (i % 64 == 0 && std::chrono::steady_clock::now() > until) {
                    std::unique_lock<std::mutex> guard(lock);
                    sleeping++;
                    wake.wait(guard, [&] { return generation != seen; });
                    sleeping--;
                }
            }
            seen = generation;
            inside++;  // before looking at `open`: run() closes first and looks at `inside` then
            if (open && tickets-- > 0) work();
            inside--;
        }
    }
};

Pool* pool() {
    // Never destroyed: its threads may outlive static destructors. A forked child has none of them and starts anew.
    static Pool* one = nullptr;
    static std::once_flag once;
    std::call_once(once, [] { one = new Pool; pthread_atfork(nullptr, nullptr, [] { one = new Pool; }); });
    return one;
}

// Memory of a thread that is kept from call to call. Raises NoRoom.
struct Scratch {
    char* data = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(data); }
    template <class T> T* room(size_t count) {
        size_t wanted = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (wanted > size) {
            std::free(data);
            data = (char*)std::aligned_alloc(4096, wanted);
            size = data ? wanted : 0;
            if (!data) throw NoRoom{wanted};
        }
        return (T*)data;
    }
};

// What a C function returns that needs such memory: 0, or the bytes it could not have.
template <class F> int64_t missing_bytes(F&& work) {
    try {
        work();
        return 0;
    } catch (const NoRoom& missing) {
        return (int64_t)missing.bytes;
    }
}

INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ------------------------------------------------------------------------------------------------------------ tiles

// Each kind of arithmetic says how its operands lie: A is the type of an input element (rows STEP elements apart, the
// next STEP columns of all MR rows behind them), B that of a panel that was made here. place() is where element `e` of
// pair `pair` of a column lies in a panel.

struct Fma {
    typedef float A;
    typedef float B;
};
struct Dot {
    typedef bf16 A;
    typedef bf16 B;
};
#if defined(DOT)
typedef Dot Fast;  // for bfloat16
#else
typedef Fma Fast;
#endif
template <class T> INLINE int64_t place(int64_t pair, int column, int e) {
    return std::is_same<T, float>::value ? (pair * 2 + e) * PANEL + column : (pair * PANEL + column) * 2 + e;
}

// int8 weights lie in panels as their magnitude bits turned where they are negative; doing it twice undoes it.
template <class T> INLINE T coded(T x) { return x ^ (x >> 7 & 0x7f); }
INLINE void load_pair(const float* b, int v, vf& even, vf& odd) {
    even = load<vf>(b + v * W), odd = load<vf>(b + PANEL + v * W);
}
INLINE void load_pair(const bf16* b, int v, vf& even, vf& odd) {
    vi pairs = load<vi>(b + v * 2 * W);
    even = even_half(pairs), odd = odd_half(pairs);
}
INLINE void load_pair(const int8_t* b, int v, vf& even, vf& odd) {
    vi pairs = (vi)__builtin_convertvector(coded(load<vc>(b + v * 2 * W)), vs);
    even = __builtin_convertvector(pairs << 16 >> 16, vf), odd = __builtin_convertvector(pairs >> 16, vf);
}

// acc[rows][NV] = input rows times a panel over `pairs` pairs.
template <int R, class B> INLINE void tile(Fma, const float* a, const B* b, int64_t pairs, vf (&acc)[R][NV]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) acc[r][v] = (vf){};
    for (; pairs > 0; pairs -= STEP / 2, a += MR * STEP)
        for (int64_t p = 0; p < std::min<int64_t>(pairs, STEP / 2); p++, b += 2 * PANEL)
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                vf even, odd;
                load_pair(b, v, even, odd);
#pragma GCC unroll 16
                for (int r = 0; r < R; r++) {
                    acc[r][v] += even * splat(a[r * STEP + 2 * p]);
                    acc[r][v] += odd * splat(a[r * STEP + 2 * p + 1]);
                }
            }
}

#if defined(DOT)
INLINE void load_dot(const bf16* b, __m512bh& low, __m512bh& high) {
    low = (__m512bh)_mm512_loadu_si512(b), high = (__m512bh)_mm512_loadu_si512(b + PANEL);
}
// Eight bits to bfloat16 by table. A byte is stored with its magnitude bits turned when it is negative (see `coded`), so
// that its low 7 bits m and its sign stand for +-(m + 1/2): the value and a half, always exact in bfloat16. The half is
// taken off with the offset. The bytes of the halves come out in the order of LOW_HALF and its complement.
struct Halves {
    alignas(64) uint8_t high[128], low[128];
    Halves() {
        for (int m = 0; m < 128; m++) {
            bf16 bits;
            from_float(m + 0.5f, bits);
            high[m] = bits >> 8, low[m] = bits & 255;
        }
    }
};
const Halves halves;
INLINE void load_dot(const int8_t* b, __m512bh& low, __m512bh& high) {
    const __m512i x = _mm512_loadu_si512(b), sign = _mm512_set1_epi8((char)0x80);
    const __m512i* table = (const __m512i*)&halves;
    __m512i upper = _mm512_permutex2var_epi8(table[0], x, table[1]), lower = _mm512_permutex2var_epi8(table[2], x, table[3]);
    upper = _mm512_ternarylogic_epi64(upper, x, sign, 0xf8);  // upper | (x & sign)
    low = (__m512bh)_mm512_unpacklo_epi8(lower, upper), high = (__m512bh)_mm512_unpackhi_epi8(lower, upper);
}
INLINE void in_order(const bf16*, vf&, vf&) {}
INLINE void in_order(const int8_t*, vf& low, vf& high) {  // each 128-bit lane has 4 columns of either half
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), second = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    __m512d a = (__m512d)low, b = (__m512d)high;
    low = (vf)_mm512_permutex2var_pd(a, first, b), high = (vf)_mm512_permutex2var_pd(a, second, b);
}
template <int R, class B> INLINE void tile(Dot, const bf16* a, const B* b, int64_t pairs, vf (&out)[R][NV]) {
    constexpr int U = R == 1 ? 4 : R <= 3 ? 2 : 1;  // sums in flight hide the instruction's latency
    __m512 acc[U][R][2];
#pragma GCC unroll 16
    for (int u = 0; u < U; u++)
#pragma GCC unroll 16
        for (int r = 0; r < R; r++) acc[u][r][0] = acc[u][r][1] = _mm512_setzero_ps();
    for (; pairs > 0; pairs -= STEP / 2, a += MR * STEP, b += STEP * PANEL) {
        const int64_t count = std::min<int64_t>(pairs, STEP / 2);
        auto add = [&](int u, int64_t p) __attribute__((always_inline)) {
            __m512bh low, high;
            load_dot(b + p * 2 * PANEL, low, high);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++) {
                __m512bh x = (__m512bh)_mm512_set1_epi32(load<int32_t>(a + r * STEP + 2 * p));
                acc[u][r][0] = _mm512_dpbf16_ps(acc[u][r][0], x, low);
                acc[u][r][1] = _mm512_dpbf16_ps(acc[u][r][1], x, high);
            }
        };
        int64_t p = 0;
        for (; p + U <= count; p += U)
#pragma GCC unroll 16
            for (int u = 0; u < U; u++) {
                // The processor looks ahead by itself, but too short where much is done with a line: several rows of int8.
                if (sizeof(B) == 1 && R > 3 && R < MR) __builtin_prefetch((const char*)(b + (p + u) * 2 * PANEL) + AHEAD, 0, 2);
                add(u, p + u);
            }
        for (; p < count; p++) add(0, p);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++)
#pragma GCC unroll 16
        for (int h = 0; h < 2; h++) {
            __m512 total = acc[0][r][h];
#pragma GCC unroll 16
            for (int u = 1; u < U; u++) total += acc[u][r][h];
            out[r][h] = (vf)total;
        }
#pragma GCC unroll 16
    for (int r = 0; r < R; r++) in_order(b, out[r][0], out[r][1]);
}
#endif

// --------------------------------------------------------------------------------------------------------- products

enum Kind : int64_t { FLOAT = 0, BFLOAT = 1, INT8 = 2 };

}  // namespace

extern "C" {

// A weight [rows, columns] whose panels lie one behind the other: [panel][pair][PANEL][2], float32 as [pair][2][PANEL].
// Columns are shifted by `lead` zeros, so that groups of `group` columns (0: one scale a row) start at multiples of
// `group`, and filled to `width`. scale and offset are float32 [groups][rows filled to whole panels]; offset may be null.
struct Matrix {
    void* data;
    const float* scale;
    const float* offset;
    int64_t rows, columns, lead, width, group, kind;
};

}  // extern "C"

namespace {

struct Product {
    const Matrix* w;
    const void* x;       // [count, columns], rows x_stride elements apart
    int64_t count, x_stride;
    const void* bias;    // [rows] or null, like x and out of one type
    void* out;           // [count, rows], rows out_stride elements apart
    int64_t out_stride;
    int threads;
};

// The step of the summed dimension between two applications of a scale.
INLINE int64_t scale_step(const Matrix* w) { return w->group ? std::min<int64_t>(w->group, STEP) : SPAN; }

// c[rows][PANEL] (+)= scale * (acc - (offset + half) * sum of inputs)
template <int R> INLINE void accumulate(
    const vf (&acc)[R][NV], float* c, bool first, const float* scale, const float* offset, const float* sums,
    float half) {
    auto each = [&](auto part_of) __attribute__((always_inline)) {
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int v = 0; v < NV; v++) {
                float* place = c + r * PANEL + v * W;
                store(place, part_of(r, v, place));
            }
    };
    if (scale || sums)
        each([&](int r, int v, const float* place) {
            vf part = acc[r][v];
            if (sums) part -= (offset ? load<vf>(offset + v * W) + half : splat(half)) * splat(sums[r]);
            if (scale) part *= load<vf>(scale + v * W);
            return first ? part : load<vf>(place) + part;
        });
    else if (first) each([&](int r, int v, const float*) { return acc[r][v]; });
    else each([&](int r, int v, const float* place) { return load<vf>(place) + acc[r][v]; });
}

template <int R, class M, class B> __attribute__((noinline)) void tile_into(
    const typename M::A* a, const B* b, int64_t pairs, float* c, bool first, const float* scale, const float* offset,
    const float* sums) {
    vf acc[R][NV];
    tile<R>(M{}, a, b, pairs, acc);
    accumulate<R>(acc, c, first, scale, offset, sums, std::is_same<M, Dot>::value ? 0.5f : 0.f);
}

template <class M, class B> INLINE void tile_rows(
    int rows, const typename M::A* a, const B* b, int64_t pairs, float* c, bool first, const float* scale,
    const float* offset, const float* sums) {
#define CASE(R) case R: return tile_into<(R <= MR ? R : MR), M, B>(a, b, pairs, c, first, scale, offset, sums);
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) }
#undef CASE
}

// A step of a panel of int8 as the arithmetic's own type, for many tiles.
INLINE void widen(const int8_t* b, int64_t pairs, bf16* out) {
#if defined(DOT)
    for (int64_t p = 0; p < pairs; p++) {
        __m512bh low, high;
        load_dot(b + p * 2 * PANEL, low, high);
        vf first = (vf)low, second = (vf)high;
        in_order(b, first, second);
        store(out + p * 2 * PANEL, first), store(out + p * 2 * PANEL + PANEL, second);
    }
#endif
}
template <class B> INLINE void widen(const B* b, int64_t pairs, float* out) {
    for (int64_t p = 0; p < pairs; p++)
        for (int v = 0; v < NV; v++) {
            vf even, odd;
            load_pair(b + p * 2 * PANEL, v, even, odd);
            store(out + p * 2 * PANEL + v * W, even), store(out + p * 2 * PANEL + PANEL + v * W, odd);
        }
}
INLINE void widen(const bf16*, int64_t, bf16*) {}

constexpr int64_t TILES_AT_ONCE = 20;    // rows of the input whose step stays in the second-level cache
constexpr int64_t BLOCKS_AT_ONCE = 4;    // of so many tiles are put in order before they are multiplied
constexpr int64_t PANELS_AT_ONCE = 8;

template <class T> INLINE float total(const T* x, int64_t count) {
    vf parts = {};
    int64_t i = 0;
    for (; i + W <= count; i += W) parts += load_floats(x + i);
    float rest = sum(parts);
    for (; i < count; i++) rest += to_float(x[i]);
    return rest;
}

// Rows [first, first + rows) of x in tiles: [tile][step][MR][STEP], and the sum of each piece that has an own scale.
template <class A, class X> void order_rows(
    const Product& job, int64_t first, int64_t rows, A* a, float* sums, int64_t pieces) {
    const Matrix* w = job.w;
    int64_t steps = ceil_div(w->width, STEP), piece = scale_step(w);
    pool()->run(ceil_div(rows, MR), rows * w->width > 65536 ? job.threads : 1, [&](int64_t t) {
        for (int64_t r = 0; r < std::min<int64_t>(MR, rows - t * MR); r++) {
            const X* x = (const X*)job.x + (first + t * MR + r) * job.x_stride;
            for (int64_t s = 0; s < steps; s++) {
                A* row = a + ((t * steps + s) * MR + r) * STEP;
                int64_t from = std::max<int64_t>(s * STEP - w->lead, 0);
                int64_t to = std::min<int64_t>((s + 1) * STEP - w->lead, w->columns);
                int64_t start = from - (s * STEP - w->lead), n = to - from, end = std::min(STEP + 0l, w->width - s * STEP);
                std::fill(row, row + start, A{});
                copy_row(x + from, n, row + start);
                std::fill(row + start + n, row + end, A{});
                if (!sums) continue;
                for (int64_t k = 0; k < end; k += piece) {
                    float& sum_of = sums[(t * pieces + (s * STEP + k) / piece) * MR + r];
                    sum_of = ((s * STEP + k) % piece ? sum_of : 0) + total(row + k, std::min(piece, end - k));
                }
            }
        }
    });
}

template <class M, class B, class X> void multiply(const Product& job) {
    typedef typename M::A A;
    const Matrix* w = job.w;
    const int64_t steps = ceil_div(w->width, STEP), piece = scale_step(w), pieces = ceil_div(w->width, piece);
    const int64_t panels = ceil_div(w->rows, PANEL), padded = panels * PANEL;
    const int64_t most = std::min<int64_t>(job.count, TILES_AT_ONCE * BLOCKS_AT_ONCE * MR);
    static thread_local Scratch a_room, sum_room;
    A* a = a_room.room<A>(ceil_div(most, MR) * steps * MR * STEP);
    float* sums = w->offset || (w->kind == INT8 && std::is_same<M, Dot>::value) ? sum_room.room<float>(ceil_div(most, MR) * pieces * MR) : nullptr;
    for (int64_t first = 0; first < job.count; first += most) {
        const int64_t rows = std::min(most, job.count - first), tiles = ceil_div(rows, MR);
        order_rows<A, X>(job, first, rows, a, sums, pieces);
        const int64_t blocks = ceil_div(tiles, TILES_AT_ONCE);
        const int64_t together = tiles > 1 ? PANELS_AT_ONCE : std::max<int64_t>(1, std::min<int64_t>(8, panels / (4 * job.threads)));
        pool()->run(ceil_div(panels, together) * blocks, job.threads, [&](int64_t task) {
            static thread_local Scratch c_room, b_room;
            const int64_t first_panel = task / blocks * together, last_panel = std::min(panels, first_panel + together);
            const int64_t first_tile = task % blocks * TILES_AT_ONCE, last_tile = std::min(tiles, first_tile + TILES_AT_ONCE);
            const int64_t block_rows = (last_tile - first_tile) * MR;
            float* c = c_room.room<float>((last_panel - first_panel) * block_rows * PANEL);
            typename M::B* wide = b_room.room<typename M::B>(SPAN * PANEL);
            const bool many = last_tile - first_tile > 1;
            const bool widened = many && !std::is_same<B, typename M::B>::value;
            // Many rows: a span of the input stays in the cache. Few: the weights are read from end to end.
            const int64_t spans = ceil_div(w->width, SPAN), panels_here = last_panel - first_panel;
            for (int64_t i = 0; i < spans * panels_here; i++) {
                const int64_t panel = first_panel + (many ? i % panels_here : i / spans), start = (many ? i / panels_here : i % spans) * SPAN;
                const int64_t length = std::min<int64_t>(SPAN, w->width - start);
                const B* b = (const B*)w->data + (panel * w->width + start) * PANEL;
                if (widened) widen(b, length / 2, wide);
                for (int64_t t = first_tile; t < last_tile; t++) {
                    const int count = (int)std::min<int64_t>(MR, rows - t * MR);
                    float* place = c + ((panel - first_panel) * block_rows + (t - first_tile) * MR) * PANEL;
                    for (int64_t k = 0; k < length; k += piece) {
                        const int64_t pairs = std::min(piece, length - k) / 2, number = (start + k) / piece;
                        const A* input = a + (t * steps + (start + k) / STEP) * MR * STEP + k % STEP;
                        const int64_t at = (w->group ? (start + k) / w->group : 0) * padded + panel * PANEL;
                        const float* scale = w->scale ? w->scale + at : nullptr;
                        const float* offset = w->offset ? w->offset + at : nullptr;
                        const float* total = sums ? sums + (t * pieces + number) * MR : nullptr;
                        if (widened) tile_rows<M>(count, input, wide + k * PANEL, pairs, place, start + k == 0, scale, offset, total);
                        else tile_rows<M>(count, input, b + k * PANEL, pairs, place, start + k == 0, scale, offset, total);
                    }
                }
            }
            for (int64_t panel = first_panel; panel < last_panel; panel++)
                for (int64_t r = first_tile * MR; r < std::min(rows, last_tile * MR); r++) {
                    const float* from = c + ((panel - first_panel) * block_rows + r - first_tile * MR) * PANEL;
                    X* to = (X*)job.out + (first + r) * job.out_stride + panel * PANEL;
                    const X* bias = job.bias ? (const X*)job.bias + panel * PANEL : nullptr;
                    const int64_t columns = std::min<int64_t>(PANEL, w->rows - panel * PANEL);
                    if (columns == PANEL)
                        for (int v = 0; v < NV; v++)
                            store_floats(load<vf>(from + v * W) + (bias ? load_floats(bias + v * W) : (vf){}), to + v * W);
                    else
                        for (int64_t i = 0; i < columns; i++) from_float(from[i] + (bias ? to_float(bias[i]) : 0.f), to[i]);
                }
        });
    }
}

template <class T> INLINE T stored(T x) { return x; }
INLINE int8_t stored(int8_t x) { return coded(x); }

// Elements [begin, begin + count) of a row, zeros where it has none.
template <class T> INLINE void part_of_row(const Matrix* w, const T* row, int64_t begin, int64_t count, T* out) {
    const int64_t from = std::clamp<int64_t>(begin, 0, w->columns), to = std::clamp<int64_t>(begin + count, from, w->columns);
    std::fill(out, out + (from - begin), T{});
    for (int64_t i = from; i < to; i++) out[i - begin] = stored(row[i]);
    std::fill(out + (to - begin), out + count, T{});
}

// A panel is PANEL rows of units, which are pairs or single floats, transposed; a block of them at a time lies in the
// first-level cache.
template <class T, class Unit> void pack(const Matrix* w, const T* from, int64_t stride, T* to, int threads) {
    constexpr int64_t EACH = sizeof(Unit) / sizeof(T), BLOCK = 64 * EACH;
    pool()->run(ceil_div(w->rows, PANEL), threads, [&](int64_t panel) {
        alignas(64) T rows[PANEL][BLOCK] = {};
        const int64_t used = std::min<int64_t>(PANEL, w->rows - panel * PANEL);
        for (int64_t first = 0; first < w->width; first += BLOCK) {
            const int64_t count = std::min(BLOCK, w->width - first);
            T* out = to + (panel * w->width + first) * PANEL;
            for (int64_t r = 0; r < used; r++)
                part_of_row(w, from + (panel * PANEL + r) * stride, first - w->lead, count, rows[r]);
            for (int64_t i = 0; i < count; i += EACH)
#pragma GCC unroll 32
                for (int r = 0; r < PANEL; r++) store(out + i * PANEL + r * EACH, load<Unit>(rows[r] + i));
        }
    });
}

template <class T> void unpack(const Matrix* w, const T* from, T* to, int64_t stride, int threads) {
    pool()->run(ceil_div(w->rows, PANEL), threads, [&](int64_t panel) {
        const T* in = from + panel * w->width * PANEL;
        for (int column = 0; column < std::min<int64_t>(PANEL, w->rows - panel * PANEL); column++) {
            T* row = to + (panel * PANEL + column) * stride;
            for (int64_t i = 0; i < w->columns; i++)
                row[i] = stored(in[place<T>((i + w->lead) / 2, column, (i + w->lead) % 2)]);
        }
    });
}

}  // namespace

extern "C" {

// kind: FLOAT or BFLOAT, of x, bias and out. Returns the missing bytes, as all that need scratch memory do.
int64_t atb_linear(
    const Matrix* w, const void* x, int64_t count, int64_t x_stride, const void* bias, void* out, int64_t out_stride,
    int64_t kind, int threads) {
    Product job{w, x, count, x_stride, bias, out, out_stride, threads};
    return missing_bytes([&] {
        if (kind == FLOAT) {
            if (w->kind == FLOAT) multiply<Fma, float, float>(job);
            else multiply<Fma, int8_t, float>(job);
            return;
        }
        if (w->kind == BFLOAT) multiply<Fast, bf16, bf16>(job);
        else multiply<Fast, int8_t, bf16>(job);
    });
}

// Between a row-major weight and the packed one in w->data.
void atb_pack(const Matrix* w, const void* from, int64_t stride, int threads) {
    if (w->kind == FLOAT) pack<float, float>(w, (const float*)from, stride, (float*)w->data, threads);
    else if (w->kind == BFLOAT) pack<bf16, uint32_t>(w, (const bf16*)from, stride, (bf16*)w->data, threads);
    else pack<int8_t, uint16_t>(w, (const int8_t*)from, stride, (int8_t*)w->data, threads);
}
void atb_unpack(const Matrix* w, void* to, int64_t stride, int threads) {
    if (w->kind == FLOAT) unpack(w, (const float*)w->data, (float*)to, stride, threads);
    else if (w->kind == BFLOAT) unpack(w, (const bf16*)w->data, (bf16*)to, stride, threads);
    else unpack(w, (const int8_t*)w->data, (int8_t*)to, stride, threads);
}

}  // extern "C"

// -------------------------------------------------------------------------------------------------------- attention

extern "C" {

// One layer's keys and values [blocks, heads, block, dim]; int8 ones with a float32 scale [blocks, heads, block] each.
struct Cache {
    void* keys;
    void* values;
    float* key_scale;
    float* value_scale;
    int64_t heads, block, dim, kind;
};

}  // extern "C"

namespace {

// Where a sequence's tokens are, for one head.
template <class T> struct Pages {
    const T* start;
    const float* scales;
    const int64_t* table;
    int64_t heads, block, dim, head;
    int64_t slot(int64_t token) const { return (table[token / block] * heads + head) * block + token % block; }
    const T* row(int64_t token) const { return start + slot(token) * dim; }
    float scale(int64_t token) const { return scales ? scales[slot(token)] : 1.f; }
};
template <class T> struct Strided {
    const T* start;
    int64_t stride;
    const T* row(int64_t token) const { return start + token * stride; }
    float scale(int64_t) const { return 1.f; }
};

constexpr int64_t SPLIT = 512;  // tokens that one thread attends to; the splits of a sequence are merged at the end
constexpr int RUN = 32;         // tokens between two corrections of the running maximum

// Two vectors of a row. bfloat16 comes as its even and its odd elements: that takes no shuffle. `turned` is where an
// element is then.
INLINE void load_two(const float* p, vf& a, vf& b) { a = load<vf>(p), b = load<vf>(p + W); }
INLINE void load_two(const bf16* p, vf& a, vf& b) { vi x = load<vi>(p); a = even_half(x), b = odd_half(x); }
INLINE void load_two(const int8_t* p, vf& a, vf& b) { a = load_floats(p), b = load_floats(p + W); }
INLINE int64_t turned(const bf16*, int64_t i) { return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2; }
template <class T> INLINE int64_t turned(const T*, int64_t i) { return i; }

// How decoding multiplies 2 W elements of a cached row: with a query (kept as Q, elements at query_place), and with the
// weights of tokens, two rows at a time (sums come out at value_place).
template <class T> struct Rows {
    typedef float Q;
    typedef float Weight;
    INLINE int64_t query_place(int64_t i) { return turned((const T*)nullptr, i); }
    INLINE int64_t value_place(int64_t i) { return query_place(i); }
    INLINE void score(const T* row, const Q* q, vf (&acc)[2]) {
        vf a, b;
        load_two(row, a, b);
        acc[0] += a * load<vf>(q), acc[1] += b * load<vf>(q + W);
    }
    template <int G> INLINE void weigh(const T* even, const T* odd, const Weight (&p)[G][RUN], int i, vf (&acc)[G][2]) {
        vf a, b, c, d;
        load_two(even, a, b), load_two(odd, c, d);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            acc[g][0] += a * p[g][i], acc[g][1] += b * p[g][i];
            acc[g][0] += c * p[g][i + 1], acc[g][1] += d * p[g][i + 1];
        }
    }
};
#if defined(DOT)
template <> struct Rows<bf16> {
    typedef bf16 Q;
    typedef bf16 Weight;
    INLINE int64_t query_place(int64_t i) { return i; }
    INLINE int64_t value_place(int64_t i) {  // unpacking leaves 4 of each 8 elements in either half
        return i / 32 * 32 + i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4;
    }
    INLINE void score(const bf16* row, const Q* q, vf (&acc)[2]) {
        acc[0] = (vf)_mm512_dpbf16_ps((__m512)acc[0], load<__m512bh>(row), load<__m512bh>(q));
    }
    template <int G> INLINE void weigh(const bf16* even, const bf16* odd, const Weight (&p)[G][RUN], int i, vf (&acc)[G][2]) {
        const __m512i a = load<__m512i>(even), b = load<__m512i>(odd);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b), high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(p[g] + i));
            acc[g][0] = (vf)_mm512_dpbf16_ps((__m512)acc[g][0], pair, low);
            acc[g][1] = (vf)_mm512_dpbf16_ps((__m512)acc[g][1], pair, high);
        }
    }
};
#endif

INLINE void ask_for(const void* from, size_t bytes) {
    for (size_t line = 0; line < bytes; line += 64) __builtin_prefetch((const char*)from + line, 0, 2);
}

// One split for G query heads of one key head: its largest score, sum of exponentials and weighted values. Scores are
// those of the queries times `factor`, which makes them exponents of 2.
template <int G, class T> void attend_split(
    const Pages<T>& keys, const Pages<T>& values, int64_t from, int64_t to, const typename Rows<T>::Q* q, float factor,
    int64_t width, float* most, float* total, float* out) {
    const int64_t dim = keys.dim, whole = dim / (2 * W) * (2 * W);
    alignas(64) T rest[2][2 * W] = {};
    alignas(64) float p[G][RUN];
    alignas(64) typename Rows<T>::Weight weights[G][RUN];
    for (int g = 0; g < G; g++) most[g] = -std::numeric_limits<float>::infinity(), total[g] = 0;
    std::fill(out, out + G * width, 0.f);
    auto run_at = [&](int64_t token) { return (int)std::min<int64_t>({RUN, to - token, keys.block - token % keys.block}); };
    for (int64_t start = from; start < to;) {
        // Keys of the next run are asked for while this one's are read, values while values are: memory never rests.
        const int n = run_at(start), further = start + n < to ? run_at(start + n) : 0;
        const T *first_key = keys.row(start), *next_key = further ? keys.row(start + n) : nullptr;
        for (int i = 0; i < n; i++) {
            const T* row = first_key + i * dim;
            if (i < further) ask_for(next_key + i * dim, dim * sizeof(T));
            vf acc[G][2] = {};
            auto add = [&](const T* part, int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
                for (int g = 0; g < G; g++) Rows<T>::score(part, q + g * width + c, acc[g]);
            };
            for (int64_t c = 0; c < whole; c += 2 * W) add(row + c, c);
            if (whole < dim) std::memcpy(rest[0], row + whole, (dim - whole) * sizeof(T)), add(rest[0], whole);
            const float scale = factor * (keys.scales ? keys.scale(start + i) : 1.f);
            for (int g = 0; g < G; g++) p[g][i] = sum(acc[g][0] + acc[g][1]) * scale;
        }
        float correction[G];
        for (int g = 0; g < G; g++) {
            for (int i = n; i < RUN; i++) p[g][i] = -std::numeric_limits<float>::infinity();
            vf high = load<vf>(p[g]);
            for (int i = W; i < RUN; i += W) high = larger(load<vf>(p[g] + i), high);
            const float top = std::max(most[g], highest(high));
            vf sums = {};
            for (int i = 0; i < RUN; i += W) {
                vf e = power_of_two(load<vf>(p[g] + i) - top);
                store(p[g] + i, e);
                sums += e;
            }
            correction[g] = std::exp2(most[g] - top);
            total[g] = total[g] * correction[g] + sum(sums), most[g] = top;
            if (values.scales) for (int i = 0; i < n; i++) p[g][i] *= values.scale(start + i);
            copy_row(p[g], RUN, weights[g]);
        }
        const T *first_value = values.row(start), *next_value = further ? values.row(start + n) : nullptr;
        // C pieces of 2 W elements of all rows: rows are read from end to end, and sums stay in registers.
        auto weigh = [&](auto pieces, int64_t c) __attribute__((always_inline)) {
            constexpr int C = decltype(pieces)::value;
            vf acc[C][G][2] = {};
            for (int i = 0; i < n; i += 2) {
                const T *even = first_value + i * dim + c, *odd = i + 1 < n ? even + dim : even;  // of weight 0 then
                if (i < further) ask_for(next_value + i * dim + c, C * 2 * W * sizeof(T));
                if (i + 1 < further) ask_for(next_value + (i + 1) * dim + c, C * 2 * W * sizeof(T));
                if (C == 1 && c == whole) {
                    std::memcpy(rest[0], even, (dim - whole) * sizeof(T)), std::memcpy(rest[1], odd, (dim - whole) * sizeof(T));
                    even = rest[0], odd = rest[1];
                }
#pragma GCC unroll 4
                for (int k = 0; k < C; k++) Rows<T>::weigh(even + k * 2 * W, odd + k * 2 * W, weights, i, acc[k]);
            }
#pragma GCC unroll 4
            for (int k = 0; k < C; k++)
#pragma GCC unroll 4
                for (int g = 0; g < G; g++)
#pragma GCC unroll 2
                    for (int h = 0; h < 2; h++) {
                        float* place = out + g * width + c + (2 * k + h) * W;
                        store(place, load<vf>(place) * correction[g] + acc[k][g][h]);
                    }
        };
        constexpr int MOST = G <= 2 ? 4 : 2;
        int64_t c = 0;
        for (; c + MOST * 2 * W <= dim; c += MOST * 2 * W) weigh(std::integral_constant<int, MOST>{}, c);
        for (; c < dim; c += 2 * W) weigh(std::integral_constant<int, 1>{}, c);
        start += n;
    }
}

struct Decode {
    const Cache* cache;
    const void* q;  // [sequences, heads, dim], sequences q_stride elements apart
    void* out;      // [sequences, heads, dim]
    const int64_t* tables;
    const int64_t* contexts;
    int64_t sequences, heads, q_stride, table_stride;
    int threads;
};

template <class T, class X> void decode(const Decode& job) {
    const Cache& c = *job.cache;
    const int64_t dim = c.dim, width = ceil_div(dim, 2 * W) * 2 * W, group = job.heads / c.heads, each = width + 2;
    static thread_local Scratch first_room, parts_room;
    int64_t* first = first_room.room<int64_t>(job.sequences + 1);  // number of a sequence's first split
    first[0] = 0;
    for (int64_t s = 0; s < job.sequences; s++) first[s + 1] = first[s] + ceil_div(job.contexts[s], SPLIT);
    const int64_t splits = first[job.sequences];
    float* parts = parts_room.room<float>(splits * job.heads * each);  // [split][head]: maximum, total, values
    const float factor = LOG2E / std::sqrt((float)dim);
    pool()->run(splits * c.heads, job.threads, [&](int64_t task) {
        const int64_t number = task / c.heads, head = task % c.heads;
        const int64_t s = std::upper_bound(first, first + job.sequences + 1, number) - first - 1;
        const int64_t from = (number - first[s]) * SPLIT, to = std::min(from + SPLIT, job.contexts[s]);
        const int64_t* table = job.tables + s * job.table_stride;
        const Pages<T> keys{(const T*)c.keys, c.key_scale, table, c.heads, c.block, dim, head};
        const Pages<T> values{(const T*)c.values, c.value_scale, table, c.heads, c.block, dim, head};
        static thread_local Scratch room;
        typedef typename Rows<T>::Q Q;
        float* out = room.room<float>(4 * 2 * width);
        Q* q = (Q*)(out + 4 * width);
        for (int64_t g = 0; g < group;) {
            const int count = (int)std::min<int64_t>(4, group - g);
            const X* query = (const X*)job.q + s * job.q_stride + (head * group + g) * dim;
            std::fill(q, q + count * width, Q{});
            for (int h = 0; h < count; h++)
                for (int64_t i = 0; i < dim; i++) from_float(to_float(query[h * dim + i]), q[h * width + Rows<T>::query_place(i)]);
            float most[4], total[4];
            switch (count) {
            case 1: attend_split<1>(keys, values, from, to, q, factor, width, most, total, out); break;
            case 2: attend_split<2>(keys, values, from, to, q, factor, width, most, total, out); break;
            case 3: attend_split<3>(keys, values, from, to, q, factor, width, most, total, out); break;
            default: attend_split<4>(keys, values, from, to, q, factor, width, most, total, out);
            }
            for (int h = 0; h < count; h++) {
                float* part = parts + (number * job.heads + head * group + g + h) * each;
                part[0] = most[h], part[1] = total[h];
                std::memcpy(part + 2, out + h * width, width * sizeof(float));
            }
            g += count;
        }
    });
    pool()->run(job.sequences, job.sequences * job.heads > 64 ? job.threads : 1, [&](int64_t s) {
        for (int64_t head = 0; head < job.heads; head++) {
            X* out = (X*)job.out + (s * job.heads + head) * dim;
            const float* split = parts + (first[s] * job.heads + head) * each;
            const int64_t count = first[s + 1] - first[s], stride = job.heads * each;
            float top = split[0], total = 0;
            for (int64_t i = 1; i < count; i++) top = std::max(top, split[i * stride]);
            static thread_local Scratch room;
            float* sums = room.room<float>(width);
            std::fill(sums, sums + width, 0.f);
            for (int64_t i = 0; i < count; i++) {
                const float* part = split + i * stride;
                const float weight = std::exp2(part[0] - top);
                total += weight * part[1];
                for (int64_t k = 0; k < width; k++) sums[k] += weight * part[2 + k];
            }
            for (int64_t i = 0; i < dim; i++) from_float(sums[Rows<T>::value_place(i)] / total, out[i]);
        }
    });
}

// Attention of many queries, in blocks of STEP keys (flash attention): scores and weighted values are tile products.

// `count` elements of a token's row from `first` on, times its scale.
template <class B, class Rows> INLINE void scaled_row(const Rows& rows, int64_t token, int64_t first, int64_t count, B* out) {
    const auto* row = rows.row(token) + first;
    if constexpr (!std::is_same<decltype(row), const int8_t*>::value) return copy_row(row, count, out);
    const float scale = rows.scale(token);
    for (int64_t i = 0; i < count; i++) from_float(to_float(row[i]) * scale, out[i]);
}

// Two rows of PANEL elements as one row of pairs; float32 keeps them one behind the other.
INLINE void store_pair(const float* even, const float* odd, float* out) {
    std::memcpy(out, even, PANEL * sizeof(float)), std::memcpy(out + PANEL, odd, PANEL * sizeof(float));
}
INLINE void store_pair(const bf16* even, const bf16* odd, bf16* out) {
    for (int i = 0; i < PANEL; i += W) store(out + 2 * i, ((vi)load_floats(even + i) >> 16 & 0xffff) | (vi)load_floats(odd + i));
}

template <class B, class T, class Rows> void order_keys(const Rows& rows, int64_t panel, int64_t count, int64_t dim, B* out) {
    typedef typename std::conditional<std::is_same<B, float>::value, float, uint32_t>::type Unit;  // see `place`
    constexpr int64_t EACH = sizeof(Unit) / sizeof(B);
    const int64_t width = ceil_div(dim, 2) * 2;
    alignas(64) B row[STEP] = {};
    for (int column = 0; column < PANEL; column++) {
        if (panel * PANEL + column < count) scaled_row(rows, panel * PANEL + column, 0, dim, row);
        else std::fill(row, row + width, B{});
        for (int64_t i = 0; i < width; i += EACH) store(out + i * PANEL + column * EACH, load<Unit>(row + i));
    }
}

// Keys [block * STEP, ...) as the summed dimension: [panel of the head's elements][pair of keys][PANEL][2].
template <class B, class T, class Rows> void order_values(const Rows& rows, int64_t block, int64_t count, int64_t dim, B* out) {
    const int64_t n = std::min<int64_t>(STEP, count - block * STEP), all = ceil_div(n, PANEL) * PANEL;
    for (int64_t panel = 0; panel < ceil_div(dim, PANEL); panel++)
        for (int64_t key = 0; key < all; key += 2) {
            alignas(64) B even[PANEL] = {}, odd[PANEL] = {};
            const int64_t first = panel * PANEL, columns = std::min<int64_t>(PANEL, dim - first);
            if (key < n) scaled_row(rows, block * STEP + key, first, columns, even);
            if (key + 1 < n) scaled_row(rows, block * STEP + key + 1, first, columns, odd);
            store_pair(even, odd, out + (panel * STEP + key) * PANEL);
        }
}

constexpr int64_t QUERY_TILES = 8;  // that share a block of keys while it is in the second-level cache

// Room of one thread for QUERY_TILES tiles of queries.
template <class M> struct Flash {
    typedef typename M::A A;
    typedef typename M::B B;
    int64_t dim, panels;
    A *q, *p;
    float *scores, *out, *most, *total;

    explicit Flash(int64_t dim) : dim(dim), panels(ceil_div(dim, PANEL)) {
        static thread_local Scratch room;
        const int64_t rows = QUERY_TILES * MR;
        q = (A*)room.room<char>(((rows + MR) * STEP) * sizeof(A) + (MR * STEP + rows * panels * PANEL + 2 * rows) * sizeof(float));
        p = q + rows * STEP;
        scores = (float*)(p + MR * STEP), out = scores + MR * STEP, most = out + rows * panels * PANEL, total = most + rows;
    }

    // `rows` queries, of which the first sees `seen` keys and each further one `more` more, of `count` in all.
    template <class X> void attend(
        const X* query, int64_t stride, int64_t rows, int64_t seen, int64_t more, int64_t count, const B* keys,
        const B* values, X* to, int64_t to_stride) {
        const int64_t tiles = ceil_div(rows, MR), pairs = ceil_div(dim, 2), visible = std::min(count, seen + more * (rows - 1));
        for (int64_t r = 0; r < tiles * MR; r++) {
            std::fill(q + r * STEP, q + r * STEP + 2 * pairs, A{});
            if (r < rows) copy_row(query + r * stride, dim, q + r * STEP);
            most[r] = -std::numeric_limits<float>::infinity(), total[r] = 0;
        }
        std::fill(out, out + tiles * MR * panels * PANEL, 0.f);
        for (int64_t block = 0; block * STEP < visible; block++)
            for (int64_t t = 0; t < tiles; t++) {
                const int64_t last = std::min(count, seen + more * (std::min(rows, (t + 1) * MR) - 1)) - block * STEP;
                if (last <= 0) continue;
                const int64_t n = std::min<int64_t>(STEP, last), used = ceil_div(n, PANEL);
                for (int64_t panel = 0; panel < used; panel++) {
                    vf acc[MR][NV];
                    tile<MR>(M{}, q + t * MR * STEP, keys + (block * (STEP / PANEL) + panel) * pairs * 2 * PANEL, pairs, acc);
#pragma GCC unroll 16
                    for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
                        for (int v = 0; v < NV; v++) store(scores + r * STEP + panel * PANEL + v * W, acc[r][v]);
                }
                float correction[MR];
                for (int r = 0; r < MR; r++) {
                    const int64_t row = t * MR + r, sees = std::min(count, seen + more * row) - block * STEP;
                    correction[r] = exponentials(r, std::max<int64_t>(0, std::min(n, sees)), used * PANEL, most[row], total[row]);
                }
                for (int64_t panel = 0; panel < panels; panel++) {
                    vf acc[MR][NV];
                    tile<MR>(M{}, p, values + (block * panels + panel) * STEP * PANEL, used * PANEL / 2, acc);
#pragma GCC unroll 16
                    for (int r = 0; r < MR; r++)
#pragma GCC unroll 16
                        for (int v = 0; v < NV; v++) {
                            float* place = out + (t * MR + r) * panels * PANEL + panel * PANEL + v * W;
                            store(place, load<vf>(place) * correction[r] + acc[r][v]);
                        }
                }
            }
        for (int64_t r = 0; r < rows; r++) {
            float* row = out + r * panels * PANEL;
            for (int64_t i = 0; i < panels * PANEL; i += W) store(row + i, load<vf>(row + i) / total[r]);
            copy_row(row, dim, to + r * to_stride);
        }
    }

    // Row r of `scores`, of which n count, to exponentials in p; what the sums so far have to be multiplied with.
    float exponentials(int r, int64_t n, int64_t all, float& top, float& sum_so_far) {
        float* row = scores + r * STEP;
        A* to = p + r * STEP;
        if (n == 0) {
            std::fill(to, to + all, A{});
            return 1.f;
        }
        const float scale = LOG2E / std::sqrt((float)dim), lowest = -std::numeric_limits<float>::infinity();
        for (int64_t i = n; i < all; i++) row[i] = lowest;
        vf high = load<vf>(row);
        for (int64_t i = W; i < all; i += W) high = larger(load<vf>(row + i), high);
        const float before = top;
        top = std::max(before, highest(high) * scale);
        vf sums = {};
        for (int64_t i = 0; i < all; i += W) {
            vf e = power_of_two(load<vf>(row + i) * scale - top);
            sums += e;
            store_floats(e, to + i);
        }
        const float correction = std::exp2(before - top);
        sum_so_far = sum_so_far * correction + sum(sums);
        return correction;
    }
};

struct Prefill {
    const Cache* cache;
    const void* q;  // [length, heads, dim], the last `length` tokens of `context`
    void* out;
    const int64_t* table;
    int64_t heads, q_stride, out_stride, length, context;
    int threads;
};

template <class M, class T, class X> void prefill(const Prefill& job) {
    typedef typename M::B B;
    const Cache& c = *job.cache;
    const int64_t dim = c.dim, pairs = ceil_div(dim, 2), group = job.heads / c.heads;
    const int64_t panels = ceil_div(job.context, PANEL), blocks = ceil_div(job.context, STEP), rows = QUERY_TILES * MR;
    const int64_t key_size = panels * pairs * 2 * PANEL, value_size = blocks * ceil_div(dim, PANEL) * PANEL * STEP;
    const int64_t together = std::min<int64_t>(c.heads, 4), parts = ceil_div(job.length, rows);
    static thread_local Scratch room;
    B* ordered = room.room<B>(together * (key_size + value_size));
    for (int64_t first = 0; first < c.heads; first += together) {
        const int64_t heads = std::min(together, c.heads - first);
        pool()->run(heads * blocks, job.threads, [&](int64_t task) {
            const int64_t block = task / heads, number = task % heads;
            B *keys = ordered + number * (key_size + value_size), *values = keys + key_size;
            const Pages<T> k{(const T*)c.keys, c.key_scale, job.table, c.heads, c.block, dim, first + number};
            const Pages<T> v{(const T*)c.values, c.value_scale, job.table, c.heads, c.block, dim, first + number};
            for (int64_t panel = block * (STEP / PANEL); panel < std::min(panels, (block + 1) * (STEP / PANEL)); panel++)
                order_keys<B, T>(k, panel, job.context, dim, keys + panel * pairs * 2 * PANEL);
            order_values<B, T>(v, block, job.context, dim, values + block * ceil_div(dim, PANEL) * PANEL * STEP);
        });
        pool()->run(heads * group * parts, job.threads, [&](int64_t task) {
            const int64_t from = (parts - 1 - task / (heads * group)) * rows, head = task % (heads * group);  // longest first
            const B* keys = ordered + head / group * (key_size + value_size);
            const int64_t q_head = first * group + head, count = std::min(rows, job.length - from);
            Flash<M>(dim).template attend<X>(
                (const X*)job.q + from * job.q_stride + q_head * dim, job.q_stride, count,
                job.context - job.length + from + 1, 1, job.context, keys, keys + key_size,
                (X*)job.out + from * job.out_stride + q_head * dim, job.out_stride);
        });
    }
}

struct Encoder {
    const void *q, *k, *v;  // [frames, tokens, heads, dim] with these strides; a head's elements lie together
    void* out;              // the same, contiguous
    int64_t frames, tokens, heads, dim, frame_stride, token_stride, head_stride;
    int threads;
};

template <class M, class X> void encoder(const Encoder& job) {
    typedef typename M::B B;
    const int64_t dim = job.dim, pairs = ceil_div(dim, 2), panels = ceil_div(job.tokens, PANEL), blocks = ceil_div(job.tokens, STEP);
    const int64_t key_size = panels * pairs * 2 * PANEL, block_size = ceil_div(dim, PANEL) * PANEL * STEP;
    const int64_t rows = QUERY_TILES * MR, out_stride = job.heads * dim;
    pool()->run(job.frames * job.heads, job.threads, [&](int64_t task) {
        static thread_local Scratch room;
        B *keys = room.room<B>(key_size + blocks * block_size), *values = keys + key_size;
        const int64_t start = task / job.heads * job.frame_stride + task % job.heads * job.head_stride;
        const Strided<X> k{(const X*)job.k + start, job.token_stride}, v{(const X*)job.v + start, job.token_stride};
        for (int64_t panel = 0; panel < panels; panel++) order_keys<B, X>(k, panel, job.tokens, dim, keys + panel * pairs * 2 * PANEL);
        for (int64_t block = 0; block < blocks; block++) order_values<B, X>(v, block, job.tokens, dim, values + block * block_size);
        for (int64_t from = 0; from < job.tokens; from += rows)
            Flash<M>(dim).template attend<X>(
                (const X*)job.q + start + from * job.token_stride, job.token_stride, std::min(rows, job.tokens - from), job.tokens, 0,
                job.tokens, keys, values, (X*)job.out + (task / job.heads * job.tokens + from) * out_stride + task % job.heads * dim, out_stride);
    });
}

template <class T, class X> void write_head(const X* from, int64_t dim, T* to, float* scale) {
    if constexpr (std::is_same<T, int8_t>::value) {
        float most = 0;
        for (int64_t i = 0; i < dim; i++) {
            const float size = std::fabs(to_float(from[i]));
            if (!(size <= most) && most == most) most = size;  // NaN stays
        }
        const float step = most / 127;  // 0 for what is tiny too
        *scale = step == 0 ? 1.f : step;
        // What is not finite shows in the scale; it has no 8 bits.
        const bool finite = most <= std::numeric_limits<float>::max();
        for (int64_t i = 0; i < dim; i++) to[i] = finite ? (int8_t)std::nearbyint(to_float(from[i]) / *scale) : 0;
    } else {
        std::memcpy(to, from, dim * sizeof(T));
    }
}

template <class T, class X> void write_kv(
    const Cache& c, const X* keys, int64_t key_stride, const X* values, int64_t value_stride, const int64_t* slots,
    int64_t count, int threads) {
    pool()->run(ceil_div(count, 32), threads, [&](int64_t part) {
        for (int64_t i = part * 32; i < std::min(count, part * 32 + 32); i++)
            for (int64_t head = 0; head < c.heads; head++) {
                const int64_t place = (slots[i] / c.block * c.heads + head) * c.block + slots[i] % c.block;
                write_head(keys + i * key_stride + head * c.dim, c.dim, (T*)c.keys + place * c.dim, c.key_scale + place);
                write_head(values + i * value_stride + head * c.dim, c.dim, (T*)c.values + place * c.dim, c.value_scale + place);
            }
    });
}

// -------------------------------------------------------------------------------------- the small functions between

template <class X> void rms_norm(const X* x, const X* weight, float eps, X* out, int64_t rows, int64_t width, int threads) {
    pool()->run(ceil_div(rows, 16), threads, [&](int64_t part) {
        for (int64_t r = part * 16; r < std::min(rows, part * 16 + 16); r++) {
            const X* from = x + r * width;
            X* to = out + r * width;
            vf squares = {};
            int64_t i = 0;
            for (; i + W <= width; i += W) { vf v = load_floats(from + i); squares += v * v; }
            float total = sum(squares);
            for (; i < width; i++) total += to_float(from[i]) * to_float(from[i]);
            const float factor = 1 / std::sqrt(total / width + eps);
            for (i = 0; i + W <= width; i += W)
                store_floats(round_to<X>(load_floats(from + i) * factor) * load_floats(weight + i), to + i);
            for (; i < width; i++) from_float(rounded<X>(to_float(from[i]) * factor) * to_float(weight[i]), to[i]);
        }
    });
}

template <class X> void rotary(
    const X* x, int64_t stride, const float* cos, const float* sin, X* out, int64_t rows, int64_t heads, int64_t half, int threads) {
    pool()->run(ceil_div(rows, 16), threads, [&](int64_t part) {
        for (int64_t r = part * 16; r < std::min(rows, part * 16 + 16); r++)
            for (int64_t h = 0; h < heads; h++) {
                const X *first = x + r * stride + h * 2 * half, *second = first + half;
                X* to = out + (r * heads + h) * 2 * half;
                const float *c = cos + r * half, *s = sin + r * half;
                int64_t i = 0;
                for (; i + W <= half; i += W) {
                    vf a = load_floats(first + i), b = load_floats(second + i), co = load<vf>(c + i), si = load<vf>(s + i);
                    store_floats(a * co - b * si, to + i), store_floats(b * co + a * si, to + half + i);
                }
                for (; i < half; i++) {
                    const float a = to_float(first[i]), b = to_float(second[i]);
                    from_float(a * c[i] - b * s[i], to[i]), from_float(b * c[i] + a * s[i], to[half + i]);
                }
            }
    });
}

// x * logistic(slope * x) * gate, gate 1 when there is none.
template <class X> INLINE void sigmoid_product(const X* x, const X* gate, float slope, X* out, int64_t count) {
    int64_t i = 0;
    for (; i + W <= count; i += W) {
        vf v = load_floats(x + i);
        v *= logistic(v * slope);
        store_floats(gate ? v * load_floats(gate + i) : v, out + i);
    }
    if (i == count) return;
    X a[W] = {}, b[W] = {};
    std::memcpy(a, x + i, (count - i) * sizeof(X));
    if (gate) std::memcpy(b, gate + i, (count - i) * sizeof(X));
    vf v = load_floats(a);
    v *= logistic(v * slope);
    store_floats(gate ? v * load_floats(b) : v, a);
    std::memcpy(out + i, a, (count - i) * sizeof(X));
}

template <class X> void swiglu(const X* gate_up, X* out, int64_t rows, int64_t width, int threads) {
    pool()->run(ceil_div(rows, 16), threads, [&](int64_t part) {
        for (int64_t r = part * 16; r < std::min(rows, part * 16 + 16); r++)
            sigmoid_product(gate_up + r * 2 * width, gate_up + r * 2 * width + width, 1.f, out + r * width, width);
    });
}

template <class X> void quick_gelu(const X* x, X* out, int64_t count, int threads) {
    constexpr int64_t PIECE = 32768;
    pool()->run(ceil_div(count, PIECE), threads, [&](int64_t part) {
        sigmoid_product<X>(x + part * PIECE, nullptr, 1.702f, out + part * PIECE, std::min(PIECE, count - part * PIECE));
    });
}

}  // namespace

#define BY_KIND(kind, CALL_FLOAT, CALL_BFLOAT) ((kind) == FLOAT ? CALL_FLOAT : CALL_BFLOAT)

// ----------------------------------------------------------------------------------------------------------- limits

// What this machine can do at best, for benchmarks to compare with. Results go to `out`, so nothing is left out.

constexpr int64_t PIECE = 1 << 20;
constexpr int CHAINS = 12;  // independent sums that hide a multiply-add's latency and stay in registers

void read_all(const char* data, int64_t pieces, int32_t* out, int threads) {
    pool()->run(pieces, threads, [&](int64_t piece) {
        const char* from = data + piece * PIECE;
        vi found[8] = {};
        for (int64_t i = 0; i < PIECE; i += 8 * W * 4) {
#pragma GCC unroll 8
            for (int j = 0; j < 8; j++) found[j] |= load<vi>(from + i + j * W * 4);
        }
        for (int j = 1; j < 8; j++) found[0] |= found[j];
        store(out + piece * W, found[0]);
    });
}
template <class Step> void multiply_add(int64_t tasks, int64_t rounds, float* out, int threads, Step step) {
    pool()->run(tasks, threads, [&](int64_t task) {
        vf sums[CHAINS];  // they start apart: of equal ones a compiler keeps but one
        for (int j = 0; j < CHAINS; j++) sums[j] = splat(j);
        for (int64_t i = 0; i < rounds; i++) {
#pragma GCC unroll 16
            for (int j = 0; j < CHAINS; j++) sums[j] = step(sums[j]);
        }
        for (int j = 1; j < CHAINS; j++) sums[0] += sums[j];
        store(out + task * W, sums[0]);
    });
}

extern "C" {

// Reads pieces of 1 MiB; out has 64 bytes for each.
void atb_read(const void* data, int64_t pieces, int32_t* out, int threads) { read_all((const char*)data, pieces, out, threads); }

// rounds * 12 vector multiply-adds in each task; out has 64 bytes for each, for the sum of the twelve results; its first
// two values are read as the factors. Returns the FLOPs of a round and the floats of a vector in `counts`.
void atb_multiply(int64_t tasks, int64_t rounds, int64_t kind, float* out, int64_t* counts, int threads) {
    const vf a = splat(out[0]), b = splat(out[1]);
    counts[0] = CHAINS * W * 2, counts[1] = W;
#if defined(DOT)
    if (kind == BFLOAT) {
        counts[0] *= 2;
        const __m512bh pair = (__m512bh)((vi)a | (vi)a >> 16), other = (__m512bh)((vi)b | (vi)b >> 16);  // both bfloat16
        multiply_add(tasks, rounds, out, threads, [=](vf sum) { return (vf)_mm512_dpbf16_ps((__m512)sum, pair, other); });
        return;
    }
#endif
    multiply_add(tasks, rounds, out, threads, [=](vf sum) { return sum * a + b; });
}

}  // extern "C"

extern "C" {

void atb_write_kv(
    const Cache* c, const void* keys, int64_t key_stride, const void* values, int64_t value_stride, const int64_t* slots,
    int64_t count, int64_t kind, int threads) {
#define WRITE(T, X) write_kv<T, X>(*c, (const X*)keys, key_stride, (const X*)values, value_stride, slots, count, threads)
    if (c->kind == INT8) BY_KIND(kind, (WRITE(int8_t, float)), (WRITE(int8_t, bf16)));
    else BY_KIND(kind, (WRITE(float, float)), (WRITE(bf16, bf16)));
#undef WRITE
}

int64_t atb_decode(
    const Cache* c, const void* q, int64_t q_stride, void* out, const int64_t* tables, int64_t table_stride,
    const int64_t* contexts, int64_t sequences, int64_t heads, int64_t kind, int threads) {
    const Decode job{c, q, out, tables, contexts, sequences, heads, q_stride, table_stride, threads};
    return missing_bytes([&] {
        if (c->kind == INT8) BY_KIND(kind, (decode<int8_t, float>(job)), (decode<int8_t, bf16>(job)));
        else BY_KIND(kind, (decode<float, float>(job)), (decode<bf16, bf16>(job)));
    });
}

int64_t atb_prefill(
    const Cache* c, const void* q, int64_t q_stride, void* out, int64_t out_stride, const int64_t* table, int64_t heads,
    int64_t length, int64_t context, int64_t kind, int threads) {
    const Prefill job{c, q, out, table, heads, q_stride, out_stride, length, context, threads};
    return missing_bytes([&] {
        if (c->kind == INT8) BY_KIND(kind, (prefill<Fma, int8_t, float>(job)), (prefill<Fast, int8_t, bf16>(job)));
        else BY_KIND(kind, (prefill<Fma, float, float>(job)), (prefill<Fast, bf16, bf16>(job)));
    });
}

int64_t atb_encoder(
    const void* q, const void* k, const void* v, void* out, int64_t frames, int64_t tokens, int64_t heads, int64_t dim,
    int64_t frame_stride, int64_t token_stride, int64_t head_stride, int64_t kind, int threads) {
    const Encoder job{q, k, v, out, frames, tokens, heads, dim, frame_stride, token_stride, head_stride, threads};
    return missing_bytes([&] { BY_KIND(kind, (encoder<Fma, float>(job)), (encoder<Fast, bf16>(job))); });
}

void atb_rms_norm(const void* x, const void* weight, float eps, void* out, int64_t rows, int64_t width, int64_t kind, int threads) {
#define NORM(X) rms_norm((const X*)x, (const X*)weight, eps, (X*)out, rows, width, threads)
    BY_KIND(kind, NORM(float), NORM(bf16));
#undef NORM
}

void atb_rotary(
    const void* x, int64_t stride, const float* cos, const float* sin, void* out, int64_t rows, int64_t heads, int64_t half,
    int64_t kind, int threads) {
#define ROTARY(X) rotary((const X*)x, stride, cos, sin, (X*)out, rows, heads, half, threads)
    BY_KIND(kind, ROTARY(float), ROTARY(bf16));
#undef ROTARY
}

void atb_swiglu(const void* x, void* out, int64_t rows, int64_t width, int64_t kind, int threads) {
#define SWIGLU(X) swiglu((const X*)x, (X*)out, rows, width, threads)
    BY_KIND(kind, SWIGLU(float), SWIGLU(bf16));
#undef SWIGLU
}

void atb_quick_gelu(const void* x, void* out, int64_t count, int64_t kind, int threads) {
#define GELU(X) quick_gelu((const X*)x, (X*)out, count, threads)
    BY_KIND(kind, GELU(float), GELU(bf16));
#undef GELU
}

// Blocks up to 1 GiB that are freed stay with the process, for the next step's activations: glibc would give them back
// and get each page anew, which takes a tenth of a large product's time. An older glibc takes 32 MiB at most, and
// without them the first threshold would stay small: setting the second ends glibc's own adjustment of both.
void atb_keep_freed_memory() {
#if defined(__GLIBC__)
    if (!mallopt(M_MMAP_THRESHOLD, 1 << 30)) mallopt(M_MMAP_THRESHOLD, 32 << 20);
    mallopt(M_TRIM_THRESHOLD, 1 << 30);
#endif
}

// Large pages for memory that is read from end to end; it has no effect where the system has none.
void atb_large_pages(void* start, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = 2 << 20, first = ((uintptr_t)start + page - 1) / page * page, last = ((uintptr_t)start + bytes) / page * page;
    if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

}  // extern "C"
