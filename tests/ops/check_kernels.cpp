// Compares the kernels for bfloat16 activations with float64, in one program without Python. The tests run the program
// under sanitizers. Linked statically, it also runs in an emulator of a CPU.
//
// Usage: check_kernels THREADS. Prints a line for each kind of call. Exits with 1 if a result is wrong.

#include "../../atb_pllava/ops/cpu/csrc/api.cpp"

#include <cstdio>
#include <vector>

namespace {

int threads = 1;
int failures = 0;

// Pseudo-random numbers between -1 and 1 (the constants are those of Knuth's MMIX generator).
float random_number() {
    static uint64_t state = 1;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(state >> 32) / 2147483648.f;
}

std::vector<bf16> random_bf16(int64_t count) {
    std::vector<bf16> numbers(count);
    for (bf16& x : numbers) from_float(random_number(), x);
    return numbers;
}

// `error` is the largest ratio of a difference to the difference that rounding may cause.
void report(const char* what, double error) {
    std::printf("%s: %.3f of the allowed error\n", what, error);
    std::fflush(stdout);
    if (!(error <= 1)) failures++;
}

double ratio(double found, double expected, double allowed) {
    const double difference = std::fabs(found - expected);
    return difference <= allowed ? difference / allowed : INFINITY;  // NaN too
}

void check_status(int64_t status) {
    if (status == 0) return;
    std::printf("status %lld\n", (long long)status);
    failures++;
}

// An int8 weight has a scale and a zero point for each row and group. group_size 0 is one group.
struct Shape {
    int64_t rows, columns, group_size, group_offset;
    bool is_int8, has_zero_points;
};

void check_linear(const Shape& shape) {
    const int64_t padded = ceil_div(shape.rows, PANEL) * PANEL;
    const int64_t width = ceil_div(shape.group_offset + shape.columns, 2) * 2;
    const int64_t groups = shape.group_size ? ceil_div(width, shape.group_size) : 1;
    std::vector<bf16> floats = random_bf16(shape.rows * shape.columns);
    std::vector<int8_t> whole(shape.rows * shape.columns);
    for (int8_t& q : whole) q = (int8_t)(random_number() * 128);
    std::vector<float> scale(groups * padded);
    std::vector<float> zero_point(groups * padded);
    for (float& x : scale) x = (1.5f + random_number()) / 128;
    for (float& x : zero_point) x = (float)(int)(random_number() * 20);
    std::vector<char> data(padded * width * 2);
    const Matrix w{data.data(),
                   shape.is_int8 ? scale.data() : nullptr,
                   shape.is_int8 && shape.has_zero_points ? zero_point.data() : nullptr,
                   shape.rows,
                   shape.columns,
                   shape.group_offset,
                   width,
                   shape.group_size,
                   shape.is_int8 ? INT8 : BFLOAT};
    atb_pack(&w, shape.is_int8 ? (const void*)whole.data() : floats.data(), shape.columns, threads);
    auto weight = [&](int64_t row, int64_t column) -> double {
        if (!shape.is_int8) return to_float(floats[row * shape.columns + column]);
        const int64_t group = shape.group_size ? (shape.group_offset + column) / shape.group_size : 0;
        const int64_t at = group * padded + row;
        return ((double)whole[row * shape.columns + column] - (w.zero_point ? zero_point[at] : 0)) * scale[at];
    };
    const std::vector<bf16> bias = random_bf16(shape.rows);
    double worst = 0;
    const int64_t most = shape.columns < 10 ? 2100 : 70;  // several tasks, and more rows than are packed at once
    for (int64_t count : {(int64_t)1, (int64_t)15, (int64_t)16, (int64_t)17, (int64_t)32, (int64_t)33, most}) {
        const std::vector<bf16> x = random_bf16(count * shape.columns);
        std::vector<bf16> out(count * shape.rows);
        check_status(
            atb_linear(&w, x.data(), count, shape.columns, bias.data(), out.data(), shape.rows, BFLOAT, threads));
        for (int64_t i = 0; i < count; i++)
            for (int64_t row = 0; row < shape.rows; row++) {
                double expected = to_float(bias[row]);
                double size = 0;
                for (int64_t k = 0; k < shape.columns; k++) {
                    const double product = to_float(x[i * shape.columns + k]) * weight(row, k);
                    expected += product;
                    size += std::fabs(product);
                }
                const double allowed = std::fabs(expected) / 256 + 1e-5 * size;
                worst = std::max(worst, ratio(to_float(out[i * shape.rows + row]), expected, allowed));
            }
    }
    char what[128];
    std::snprintf(what, sizeof what, "%s weight [%d, %d], groups of %d from %d, zero points %d",
                  shape.is_int8 ? "int8" : "bfloat16", (int)shape.rows, (int)shape.columns, (int)shape.group_size,
                  (int)shape.group_offset, shape.has_zero_points);
    report(what, worst);
}

// Attention of one query to the first `count` keys, in float64. key(i) and value(i) are rows of `dim` elements.
template <class Key, class Value>
std::vector<double> attend(const bf16* query, int64_t count, int64_t dim, Key key, Value value) {
    std::vector<double> scores(count);
    double sum = 0;
    for (int64_t i = 0; i < count; i++) {
        for (int64_t j = 0; j < dim; j++) scores[i] += (double)to_float(query[j]) * key(i, j);
        scores[i] = std::exp(scores[i] / std::sqrt((double)dim));
        sum += scores[i];
    }
    std::vector<double> out(dim);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < dim; j++) out[j] += scores[i] / sum * value(i, j);
    return out;
}

double worst_ratio(const bf16* found, const std::vector<double>& expected) {
    double worst = 0;
    for (size_t j = 0; j < expected.size(); j++) worst = std::max(worst, ratio(to_float(found[j]), expected[j], 0.01));
    return worst;
}

// The last `length` of `context` tokens attend to all tokens before them.
void check_prefill(int64_t length, int64_t context, int64_t heads, int64_t kv_heads, int64_t dim, Kind kind) {
    const int64_t block = 16;
    const int64_t blocks = ceil_div(context, block) + 1;
    const int64_t elements = blocks * kv_heads * block * dim;
    std::vector<char> keys(elements * 2), values(elements * 2);
    std::vector<float> key_scale(elements / dim, 1.f), value_scale(elements / dim, 1.f);
    const bool is_int8 = kind == INT8;
    const Cache cache{keys.data(),
                      values.data(),
                      is_int8 ? key_scale.data() : nullptr,
                      is_int8 ? value_scale.data() : nullptr,
                      blocks,
                      kv_heads,
                      block,
                      dim,
                      kind};
    std::vector<int64_t> table(blocks);
    for (int64_t i = 0; i < blocks; i++) table[i] = blocks - 1 - i;
    std::vector<int64_t> slots(context);
    for (int64_t i = 0; i < context; i++) slots[i] = table[i / block] * block + i % block;
    const std::vector<bf16> k = random_bf16(context * kv_heads * dim);
    const std::vector<bf16> v = random_bf16(context * kv_heads * dim);
    const int64_t kv_stride = kv_heads * dim;
    check_status(
        atb_write_kv(&cache, k.data(), kv_stride, v.data(), kv_stride, slots.data(), context, BFLOAT, threads));
    const std::vector<bf16> q = random_bf16(length * heads * dim);
    std::vector<bf16> out(length * heads * dim);
    check_status(atb_prefill(&cache, q.data(), heads * dim, out.data(), heads * dim, table.data(), blocks, heads,
                             length, context, BFLOAT, threads));
    double worst = 0;
    for (int64_t i = 0; i < length; i++)
        for (int64_t head = 0; head < heads; head++) {
            const int64_t kv_head = head / (heads / kv_heads);
            auto element = [&](const std::vector<bf16>& x) {
                return [&, kv_head](int64_t token, int64_t j) -> double {
                    return to_float(x[token * kv_stride + kv_head * dim + j]);
                };
            };
            const int64_t at = (i * heads + head) * dim;
            const auto expected = attend(&q[at], context - length + i + 1, dim, element(k), element(v));
            worst = std::max(worst, worst_ratio(&out[at], expected));
        }
    char what[128];
    std::snprintf(what, sizeof what, "prefill of %d of %d tokens, %d heads of %d, %s cache", (int)length, (int)context,
                  (int)heads, (int)dim, is_int8 ? "int8" : "bfloat16");
    report(what, worst);
}

void check_encoder(int64_t frames, int64_t tokens, int64_t heads, int64_t dim) {
    const int64_t count = frames * tokens * heads * dim;
    const std::vector<bf16> q = random_bf16(count);
    const std::vector<bf16> k = random_bf16(count);
    const std::vector<bf16> v = random_bf16(count);
    std::vector<bf16> out(count);
    const int64_t token_stride = heads * dim;
    check_status(atb_encoder(q.data(), k.data(), v.data(), out.data(), frames, tokens, heads, dim,
                             tokens * token_stride, token_stride, dim, BFLOAT, threads));
    double worst = 0;
    for (int64_t frame = 0; frame < frames; frame++)
        for (int64_t token = 0; token < tokens; token++)
            for (int64_t head = 0; head < heads; head++) {
                auto element = [&](const std::vector<bf16>& x) {
                    return [&, frame, head](int64_t i, int64_t j) -> double {
                        return to_float(x[((frame * tokens + i) * heads + head) * dim + j]);
                    };
                };
                const int64_t at = ((frame * tokens + token) * heads + head) * dim;
                worst = std::max(worst, worst_ratio(&out[at], attend(&q[at], tokens, dim, element(k), element(v))));
            }
    char what[128];
    std::snprintf(what, sizeof what, "%d frames of %d tokens, %d heads of %d", (int)frames, (int)tokens, (int)heads,
                  (int)dim);
    report(what, worst);
}

#if defined(HAS_TILES)
// A hash (FNV-1a) of one product of tile registers with denormal, huge and infinite elements. An emulation is right if
// the hash equals that of a CPU with AMX.
void hash_of_tile_product() {
    bf16 a[TILE_ROWS * 32], b[TILE_ROWS * 32];
    float c[TILE_ROWS * 16];
    for (int i = 0; i < TILE_ROWS * 32; i++) {
        const int exponent = (int)(random_number() * 20);
        from_float(std::ldexp(random_number(), i / 32 == 3 ? exponent - 126 : exponent), a[i]);
        from_float(std::ldexp(random_number(), i % 32 / 2 == 5 ? exponent - 126 : exponent), b[i]);
    }
    a[7 * 32 + 4] = 0x7f80;  // infinity
    for (int i = 0; i < TILE_ROWS * 16; i++) c[i] = i == 20 ? 1e-40f : random_number();
    const TileRegisters setup;
    load_tile<0>(c, 64);
    load_tile<1>(a, 64);
    load_tile<2>(b, 64);
    multiply_tiles<0, 1, 2>();
    multiply_tiles<0, 1, 2>();
    store_tile<0>(c, 64);
    uint64_t hash = 14695981039346656037u;
    for (float x : c) {
        uint32_t bits = 0x7fc00000;  // every NaN
        if (x == x) std::memcpy(&bits, &x, 4);
        hash = (hash ^ bits) * 1099511628211u;
    }
    std::printf("hash of a tile product: %016llx\n", (unsigned long long)hash);
}
#endif

int check_all() {
    for (const Shape& shape :
         {Shape{32, 32, 0, 0, false, false}, Shape{37, 130, 0, 0, false, false}, Shape{65, 515, 0, 0, false, false},
          Shape{31, 7, 0, 0, false, false}, Shape{40, 517, 0, 0, true, false}, Shape{40, 300, 0, 0, true, true},
          Shape{45, 512, 64, 0, true, true}, Shape{45, 475, 64, 37, true, false}, Shape{45, 289, 128, 96, true, true}})
        check_linear(shape);
    for (Kind kind : {BFLOAT, INT8}) {
        check_prefill(40, 40, 4, 2, 64, kind);
        check_prefill(70, 290, 2, 1, 80, kind);
        check_prefill(16, 300, 2, 2, 128, kind);
        check_prefill(3, 20, 2, 2, 33, kind);
    }
    check_encoder(2, 77, 3, 64);
    check_encoder(1, 300, 1, 80);
    check_encoder(2, 5, 2, 17);
#if defined(HAS_TILES)
    hash_of_tile_product();
#endif
    std::printf("%d failures\n", failures);
    return failures ? 1 : 0;
}

}  // namespace

#if !defined(NO_MAIN)
int main(int, char** arguments) {
    threads = std::atoi(arguments[1]);
    return check_all();
}
#endif
