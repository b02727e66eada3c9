// Paged decode attention: one query per sequence over the paged KV cache (Flash-Decoding).
//
// A sequence is cut into splits of SPLIT tokens. Threads attend to the splits independently, with an online softmax.
// Each split has a largest score, a sum of exponentials and weighted values. `merge` joins the splits of a sequence.

#pragma once

#include "kv_cache.h"
#include "vec_math.h"

namespace {

constexpr int64_t SPLIT = 512;
constexpr int RUN = 32;          // tokens between two updates of the running maximum
constexpr int MOST_QUERIES = 4;  // query heads of one key head that are computed together

// Products with 2 W elements of a cached row. Q is the element type of queries, Weight that of the softmax weights.
// query_index(i) is the place of element i in a stored query. out_index(i) is its place in the weighted values.
// A bfloat16 row is loaded as a vector of even and a vector of odd elements, which takes no shuffle.
template <class T>
struct RowProducts {
    typedef float Q;
    typedef float Weight;
    INLINE int64_t query_index(int64_t i) { return lane_index((const T*)nullptr, i); }
    INLINE int64_t out_index(int64_t i) { return query_index(i); }

    // acc += row * q
    INLINE void add_score(const T* row, const Q* q, vf (&acc)[2]) {
        vf a, b;
        load_two(row, a, b);
        acc[0] += a * load<vf>(q);
        acc[1] += b * load<vf>(q + W);
    }

    // acc[g] += even * p[g][i] + odd * p[g][i + 1], for the rows of two neighbouring tokens
    template <int G>
    INLINE void add_values(const T* even, const T* odd, const Weight (&p)[G][RUN], int i, vf (&acc)[G][2]) {
        vf a, b, c, d;
        load_two(even, a, b);
        load_two(odd, c, d);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            acc[g][0] += a * p[g][i];
            acc[g][1] += b * p[g][i];
            acc[g][0] += c * p[g][i + 1];
            acc[g][1] += d * p[g][i + 1];
        }
    }

  private:
    INLINE void load_two(const float* p, vf& a, vf& b) {
        a = load<vf>(p);
        b = load<vf>(p + W);
    }
    INLINE void load_two(const bf16* p, vf& a, vf& b) {
        vi pairs = load<vi>(p);
        a = even_elements(pairs);
        b = odd_elements(pairs);
    }
    INLINE void load_two(const int8_t* p, vf& a, vf& b) {
        a = load_floats(p);
        b = load_floats(p + W);
    }

    // Where load_two puts element i of a row.
    INLINE int64_t lane_index(const bf16*, int64_t i) { return i / (2 * W) * (2 * W) + i % 2 * W + i % (2 * W) / 2; }
    template <class Other>
    INLINE int64_t lane_index(const Other*, int64_t i) {
        return i;
    }
};

#if defined(HAS_DOT)
template <>
struct RowProducts<bf16> {
    typedef bf16 Q;
    typedef bf16 Weight;
    INLINE int64_t query_index(int64_t i) { return i; }
    // Unpacking works inside 128-bit lanes: the first 4 elements of each 8 come out in acc[0], the others in acc[1].
    INLINE int64_t out_index(int64_t i) { return i / 32 * 32 + i % 8 / 4 * 16 + i % 32 / 8 * 4 + i % 4; }

    INLINE void add_score(const bf16* row, const Q* q, vf (&acc)[2]) {
        acc[0] = (vf)_mm512_dpbf16_ps((__m512)acc[0], load<__m512bh>(row), load<__m512bh>(q));
    }

    template <int G>
    INLINE void add_values(const bf16* even, const bf16* odd, const Weight (&p)[G][RUN], int i, vf (&acc)[G][2]) {
        const __m512i a = load<__m512i>(even);
        const __m512i b = load<__m512i>(odd);
        const __m512bh low = (__m512bh)_mm512_unpacklo_epi16(a, b);
        const __m512bh high = (__m512bh)_mm512_unpackhi_epi16(a, b);
#pragma GCC unroll 4
        for (int g = 0; g < G; g++) {
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(load<int32_t>(p[g] + i));
            acc[g][0] = (vf)_mm512_dpbf16_ps((__m512)acc[g][0], pair, low);
            acc[g][1] = (vf)_mm512_dpbf16_ps((__m512)acc[g][1], pair, high);
        }
    }
};
#endif

// A run is up to RUN tokens of one block of the cache, which are attended to together. The keys of the next run are
// prefetched while keys are read, and its values while values are read.
struct Run {
    int64_t start;
    int count;
    int next;  // number of tokens in the next run, 0 for the last run
};

// p[g][i] = factor * (key of token i) * (query g). q is [G][width].
template <int G, class T>
INLINE void compute_scores(const PagedRows<T>& keys, const Run& run, const typename RowProducts<T>::Q* q, int64_t width,
                           float factor, float (&p)[G][RUN]) {
    const int64_t dim = keys.dim;
    const int64_t whole = dim / (2 * W) * (2 * W);
    alignas(64) T rest[2 * W] = {};  // the elements from `whole` on, padded with zeros
    const T* first = keys.row(run.start);
    const T* next = run.next ? keys.row(run.start + run.count) : nullptr;
    for (int i = 0; i < run.count; i++) {
        const T* row = first + i * dim;
        if (i < run.next) prefetch(next + i * dim, dim * sizeof(T));
        vf acc[G][2] = {};
        auto add = [&](const T* part, int64_t c) __attribute__((always_inline)) {
#pragma GCC unroll 4
            for (int g = 0; g < G; g++) RowProducts<T>::add_score(part, q + g * width + c, acc[g]);
        };
        for (int64_t c = 0; c < whole; c += 2 * W) add(row + c, c);
        if (whole < dim) {
            std::memcpy(rest, row + whole, (dim - whole) * sizeof(T));
            add(rest, whole);
        }
        const float scale = factor * (keys.scales ? keys.scale(run.start + i) : 1.f);
        for (int g = 0; g < G; g++) p[g][i] = sum(acc[g][0] + acc[g][1]) * scale;
    }
}

// The online softmax: p = 2^(p - max), weights = p * scales of the values. Updates the maximum and the sum of
// exponentials of each query. correction[g] is the factor for the weighted values so far.
template <int G, class T>
INLINE void update_softmax(const PagedRows<T>& values, const Run& run, float (&p)[G][RUN], float* max, float* sum_exp,
                           float (&correction)[G], typename RowProducts<T>::Weight (&weights)[G][RUN]) {
    for (int g = 0; g < G; g++) {
        for (int i = run.count; i < RUN; i++) p[g][i] = -std::numeric_limits<float>::infinity();
        vf high = load<vf>(p[g]);
        for (int i = W; i < RUN; i += W) high = vmax(load<vf>(p[g] + i), high);
        const float new_max = std::max(max[g], highest(high));
        vf sums = {};
        for (int i = 0; i < RUN; i += W) {
            vf e = power_of_two(load<vf>(p[g] + i) - new_max);
            store(p[g] + i, e);
            sums += e;
        }
        correction[g] = std::exp2(max[g] - new_max);
        sum_exp[g] = sum_exp[g] * correction[g] + sum(sums);
        max[g] = new_max;
        if (values.scales)
            for (int i = 0; i < run.count; i++) p[g][i] *= values.scale(run.start + i);
        copy_row(p[g], RUN, weights[g]);
    }
}

// out[G][width] = out * correction + weights * values
template <int G, class T>
INLINE void add_weighted_values(const PagedRows<T>& values, const Run& run,
                                const typename RowProducts<T>::Weight (&weights)[G][RUN], const float (&correction)[G],
                                int64_t width, float* out) {
    const int64_t dim = values.dim;
    const int64_t whole = dim / (2 * W) * (2 * W);
    alignas(64) T rest[2][2 * W] = {};  // the elements of two rows from `whole` on, padded with zeros
    const T* first = values.row(run.start);
    const T* next = run.next ? values.row(run.start + run.count) : nullptr;
    // C times 2 W elements of all rows, from column c on. Rows are read from end to end, and sums stay in registers.
    auto add = [&](auto pieces, int64_t c) __attribute__((always_inline)) {
        constexpr int C = decltype(pieces)::value;
        vf acc[C][G][2] = {};
        for (int i = 0; i < run.count; i += 2) {
            const T* even = first + i * dim + c;
            const T* odd = i + 1 < run.count ? even + dim : even;  // after the last row: any row with weight 0
            if (i < run.next) prefetch(next + i * dim + c, C * 2 * W * sizeof(T));
            if (i + 1 < run.next) prefetch(next + (i + 1) * dim + c, C * 2 * W * sizeof(T));
            if (C == 1 && c == whole) {
                std::memcpy(rest[0], even, (dim - whole) * sizeof(T));
                std::memcpy(rest[1], odd, (dim - whole) * sizeof(T));
                even = rest[0];
                odd = rest[1];
            }
#pragma GCC unroll 4
            for (int k = 0; k < C; k++)
                RowProducts<T>::add_values(even + k * 2 * W, odd + k * 2 * W, weights, i, acc[k]);
        }
#pragma GCC unroll 4
        for (int k = 0; k < C; k++)
#pragma GCC unroll 4
            for (int g = 0; g < G; g++)
#pragma GCC unroll 2
                for (int h = 0; h < 2; h++) {
                    float* to = out + g * width + c + (2 * k + h) * W;
                    store(to, load<vf>(to) * correction[g] + acc[k][g][h]);
                }
    };
    constexpr int MOST = G <= 2 ? 4 : 2;
    int64_t c = 0;
    for (; c + MOST * 2 * W <= dim; c += MOST * 2 * W) add(std::integral_constant<int, MOST>{}, c);
    for (; c < dim; c += 2 * W) add(std::integral_constant<int, 1>{}, c);
}

// Attends to tokens [from, to), one split, with G query heads that share a key head. q is [G][width], where width is
// dim padded to whole vectors. The exponentials are 2^(factor * score). Writes for each query the largest exponent, the
// sum of the exponentials relative to the largest, and the weighted values, out [G][width].
template <int G, class T>
void attend_split(const PagedRows<T>& keys, const PagedRows<T>& values, int64_t from, int64_t to,
                  const typename RowProducts<T>::Q* q, float factor, int64_t width, float* max, float* sum_exp,
                  float* out) {
    alignas(64) float p[G][RUN];
    alignas(64) typename RowProducts<T>::Weight weights[G][RUN];
    for (int g = 0; g < G; g++) {
        max[g] = -std::numeric_limits<float>::infinity();
        sum_exp[g] = 0;
    }
    std::fill(out, out + G * width, 0.f);
    auto run_length = [&](int64_t start) {
        return (int)std::min<int64_t>({RUN, to - start, keys.block - start % keys.block});
    };
    for (int64_t start = from; start < to;) {
        const int count = run_length(start);
        const Run run{start, count, start + count < to ? run_length(start + count) : 0};
        float correction[G];
        compute_scores(keys, run, q, width, factor, p);
        update_softmax(values, run, p, max, sum_exp, correction, weights);
        add_weighted_values(values, run, weights, correction, width, out);
        start += count;
    }
}

struct DecodeCall {
    const Cache* cache;
    const void* q;  // [sequences, heads, dim], sequences q_stride elements apart
    void* out;      // [sequences, heads, dim]
    const int64_t* block_tables;
    const int64_t* context_lens;
    int64_t sequences, heads, q_stride, table_stride, columns;  // `columns` of block_tables
    int threads;
};

// One call of atb_decode. T is the type of the cache's elements, X that of q and out. Raises OutOfRange.
template <class T, class X>
class DecodeAttention {
    typedef RowProducts<T> Products;
    typedef typename Products::Q Q;

  public:
    explicit DecodeAttention(const DecodeCall& call) : call(call), c(*call.cache) {}

    void run() const {
        for (int64_t s = 0; s < call.sequences; s++)
            check_block_table(c, call.block_tables + s * call.table_stride, call.columns, call.context_lens[s]);
        static thread_local Scratch first_scratch;
        static thread_local Scratch partial_scratch;
        int64_t* first = first_scratch.get<int64_t>(call.sequences + 1);  // number of the first split of each sequence
        first[0] = 0;
        for (int64_t s = 0; s < call.sequences; s++) first[s + 1] = first[s] + ceil_div(call.context_lens[s], SPLIT);
        const int64_t splits = first[call.sequences];
        float* partials = partial_scratch.get<float>(splits * call.heads * partial_size);
        pool()->run(splits * c.heads, call.threads, [&](int64_t task) {
            const int64_t split = task / c.heads;
            const int64_t s = std::upper_bound(first, first + call.sequences + 1, split) - first - 1;
            attend(s, (split - first[s]) * SPLIT, task % c.heads, partials + split * call.heads * partial_size);
        });
        const int threads = call.sequences * call.heads > 64 ? call.threads : 1;
        pool()->run(call.sequences, threads, [&](int64_t s) {
            for (int64_t head = 0; head < call.heads; head++)
                merge(partials + (first[s] * call.heads + head) * partial_size, first[s + 1] - first[s],
                      (X*)call.out + (s * call.heads + head) * c.dim);
        });
    }

  private:
    const DecodeCall& call;
    const Cache& c;
    const int64_t width = ceil_div(c.dim, 2 * W) * 2 * W;
    const int64_t group = call.heads / c.heads;  // query heads of a key head
    const int64_t partial_size = width + 2;      // of one query head in a split: maximum, sum of exponentials, values

    // Attends to the split of sequence s that begins at token `from`, with the query heads of one key head.
    void attend(int64_t s, int64_t from, int64_t head, float* partials) const {
        const int64_t to = std::min(from + SPLIT, call.context_lens[s]);
        const int64_t* block_table = call.block_tables + s * call.table_stride;
        const PagedRows<T> keys = key_rows<T>(c, block_table, head);
        const PagedRows<T> values = value_rows<T>(c, block_table, head);
        static thread_local Scratch scratch;
        float* out = scratch.get<float>(2 * MOST_QUERIES * width);
        Q* q = (Q*)(out + MOST_QUERIES * width);
        for (int64_t g = 0; g < group; g += MOST_QUERIES) {
            const int count = (int)std::min<int64_t>(MOST_QUERIES, group - g);
            const X* query = (const X*)call.q + s * call.q_stride + (head * group + g) * c.dim;
            order_queries(query, count, q);
            float max[MOST_QUERIES], sum_exp[MOST_QUERIES];
            const float factor = LOG2E / std::sqrt((float)c.dim);
            switch (count) {
                case 1:
                    attend_split<1>(keys, values, from, to, q, factor, width, max, sum_exp, out);
                    break;
                case 2:
                    attend_split<2>(keys, values, from, to, q, factor, width, max, sum_exp, out);
                    break;
                case 3:
                    attend_split<3>(keys, values, from, to, q, factor, width, max, sum_exp, out);
                    break;
                default:
                    attend_split<4>(keys, values, from, to, q, factor, width, max, sum_exp, out);
            }
            for (int h = 0; h < count; h++) {
                float* partial = partials + (head * group + g + h) * partial_size;
                partial[0] = max[h];
                partial[1] = sum_exp[h];
                std::memcpy(partial + 2, out + h * width, width * sizeof(float));
            }
        }
    }

    // Stores `count` queries in the order of RowProducts, padded with zeros to `width`.
    void order_queries(const X* query, int count, Q* q) const {
        std::fill(q, q + count * width, Q{});
        for (int h = 0; h < count; h++)
            for (int64_t i = 0; i < c.dim; i++)
                from_float(to_float(query[h * c.dim + i]), q[h * width + Products::query_index(i)]);
    }

    // Merges the `count` splits of one sequence and head.
    void merge(const float* partials, int64_t count, X* out) const {
        const int64_t stride = call.heads * partial_size;
        float max = partials[0];
        for (int64_t i = 1; i < count; i++) max = std::max(max, partials[i * stride]);
        static thread_local Scratch scratch;
        float* sums = scratch.get<float>(width);
        std::fill(sums, sums + width, 0.f);
        float sum_exp = 0;
        for (int64_t i = 0; i < count; i++) {
            const float* partial = partials + i * stride;
            const float weight = std::exp2(partial[0] - max);
            sum_exp += weight * partial[1];
            for (int64_t k = 0; k < width; k++) sums[k] += weight * partial[2 + k];
        }
        for (int64_t i = 0; i < c.dim; i++) from_float(sums[Products::out_index(i)] / sum_exp, out[i]);
    }
};

}  // namespace
