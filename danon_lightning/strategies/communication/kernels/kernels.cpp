// The hot loops of gradient compression for CPUs. Called through ctypes, which releases the GIL meanwhile.
//
// Each does what a few lines of torch beside it do (in compressors/, and in __init__.py here), equal to the bit: the same
// operations in the same order, rounded one by one. It is therefore built with -ffp-contract=off and without -ffast-math,
// which would remove the tests for NaN besides. What is gained is passes over memory: a block is read once, stays in the
// first-level cache, and is written once.
//
// Magnitudes are compared on the bits of the number without its sign. That orders them like the numbers themselves, needs
// no special case for NaN in order to be vectorized, and finds non-finite values on the way: their bits are >= kInfinity.
// Legend: n elements; `residual` may be null, then `new_residual` is too, and the elements coded are `values`; else they
// are values + decay * residual.
#include <cfloat>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the wire formats are little-endian"
#endif

#define INLINE static inline __attribute__((always_inline))

namespace {

constexpr int32_t kInfinity = 0x7f800000;
constexpr int64_t kPiece = 256;  // elements worked on at a time: a few registers' worth, well inside the first-level cache

INLINE uint32_t bits(float x) {
    uint32_t b;
    memcpy(&b, &x, 4);
    return b;
}

INLINE float number(uint32_t b) {
    float x;
    memcpy(&x, &b, 4);
    return x;
}

INLINE int32_t magnitude(float x) { return (int32_t)(bits(x) & 0x7fffffffu); }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE int32_t greatest(const float* __restrict x, int64_t n) {
    int32_t most = 0;
    for (int64_t i = 0; i < n; i++) {
        int32_t m = magnitude(x[i]);
        most = m > most ? m : most;
    }
    return most;
}

// sum = values + decay * residual
INLINE void combine(const float* __restrict values, const float* __restrict residual, float decay, float* __restrict sum,
                    int64_t n) {
    for (int64_t i = 0; i < n; i++) sum[i] = residual[i] * decay + values[i];
}

// sum = share * (sources[0] + sources[1] + ...), elements from `at` on, added in this order; `sum` may be sources[0].
INLINE void add_up(const float* const* sources, int32_t count, int64_t at, float share, float* sum, int64_t n) {
    if (count == 2) {  // the usual case, in one pass
        const float *x = sources[0] + at, *y = sources[1] + at;
        for (int64_t i = 0; i < n; i++) sum[i] = (x[i] + y[i]) * share;
        return;
    }
    if (sources[0] + at != sum) memcpy(sum, sources[0] + at, 4 * (size_t)n);
    for (int32_t s = 1; s < count; s++) {
        const float* __restrict x = sources[s] + at;
        for (int64_t i = 0; i < n; i++) sum[i] += x[i];
    }
    for (int64_t i = 0; i < n; i++) sum[i] *= share;
}

// Write past the caches what nobody reads soon on this core: memory then need not be read before it is written, which is
// half of the traffic. Such writes become visible to other threads in no order until `finish_stream`.
INLINE void stream(const float* __restrict x, float* __restrict out, int64_t n) {
#if defined(__AVX__)
    if (((uintptr_t)out & 31) == 0 && n % 8 == 0) {
        for (int64_t i = 0; i < n; i += 8) _mm256_stream_ps(out + i, _mm256_loadu_ps(x + i));
        return;
    }
#endif
    memcpy(out, x, 4 * n);
}

INLINE void finish_stream() {
#if defined(__AVX__)
    _mm_sfence();
#endif
}

// A scale too small to divide by stands for a block of zeros; NaN marks a block that is not finite.
INLINE float usable(float scale) {
    if (!(scale <= FLT_MAX)) return number(0x7fc00000u);
    return scale < FLT_MIN ? 0.f : scale;
}

// ---- linear quantization: int8 (Largest = 127) and int4 (Largest = 7)

// codes = round(x * (1 / scale)); where an error is kept, x becomes x - code * scale. Noise makes the rounding stochastic.
template <int Largest, bool Stochastic, bool Feedback>
INLINE void round_piece(float* __restrict x, const float* __restrict noise, float scale, int8_t* __restrict codes,
                        int64_t n) {
    const float inverse = 1.f / scale;
    for (int64_t i = 0; i < n; i++) {
        float r = x[i] * inverse;
        r = Stochastic ? __builtin_floorf(r + noise[i]) : __builtin_rintf(r);
        if (Stochastic) {  // else |r| cannot exceed it: the greatest x makes Largest * (1 + 2^-22) at most
            r = r > (float)Largest ? (float)Largest : r;
            r = r < (float)-Largest ? (float)-Largest : r;
        }
        codes[i] = (int8_t)(int32_t)r;
        // -0 becomes 0, as in an integer. Converting there and back will not do: with -fno-trapping-math, GCC 12 makes a
        // truncation of it, which keeps the sign.
        if (Feedback) x[i] -= (r + 0.f) * scale;
    }
}

// Two codes a byte, offset by 8, the even element in the low half.
INLINE void pack_pairs(const int8_t* __restrict codes, uint8_t* __restrict out, int64_t n) {
    for (int64_t i = 0; i < n / 2; i++) {
        uint16_t pair;
        memcpy(&pair, codes + 2 * i, 2);
        // To add 8 is to flip the highest of four bits.
        out[i] = (uint8_t)(((pair & 0x0f) | ((pair >> 4) & 0xf0)) ^ 0x88);
    }
    if (n % 2) out[n / 2] = (uint8_t)((codes[n - 1] & 0x0f) ^ 0x08);
}

template <int Largest, bool Stochastic, bool Feedback>
INLINE void quantize_block(const float* values, const float* residual, float decay, float* new_residual,
                           const float* noise, int64_t n, float* scale_out, uint8_t* codes_out) {
    float* x = const_cast<float*>(values);  // written only where there is feedback
    if (Feedback) {
        x = new_residual;
        combine(values, residual, decay, x, n);
    }
    const float scale = usable(number((uint32_t)greatest(x, n)) / (float)Largest);
    *scale_out = scale;
    if (!(scale > 0.f)) {
        if (Largest == 127) {
            memset(codes_out, 0, (size_t)n);
        } else {
            memset(codes_out, 0x88, (size_t)(n / 2));
            if (n % 2) codes_out[n / 2] = 0x08;
        }
        if (Feedback)
            for (int64_t i = 0; i < n; i++) x[i] -= scale;
        return;
    }
    for (int64_t o = 0; o < n; o += kPiece) {
        const int64_t m = smaller(kPiece, n - o);
        const float* piece_noise = Stochastic ? noise + o : nullptr;
        if (Largest == 127) {
            round_piece<Largest, Stochastic, Feedback>(x + o, piece_noise, scale, (int8_t*)codes_out + o, m);
        } else {
            int8_t codes[kPiece];
            round_piece<Largest, Stochastic, Feedback>(x + o, piece_noise, scale, codes, m);
            pack_pairs(codes, codes_out + o / 2, m);
        }
    }
}

template <int Largest, bool Stochastic, bool Feedback>
void quantize(const float* values, const float* residual, float decay, float* new_residual, const float* noise, int64_t n,
              int64_t block, float* scales, uint8_t* codes) {
    for (int64_t o = 0, b = 0; o < n; o += block, b++) {
        const int64_t m = smaller(block, n - o);
        const float* e = Feedback ? residual + o : nullptr;
        float* next = Feedback ? new_residual + o : nullptr;
        const float* u = Stochastic ? noise + o : nullptr;
        uint8_t* c = codes + (Largest == 127 ? o : o / 2);
        // The usual lengths as constants: loops without remainders.
        if (m == 256) quantize_block<Largest, Stochastic, Feedback>(values + o, e, decay, next, u, 256, scales + b, c);
        else if (m == 64) quantize_block<Largest, Stochastic, Feedback>(values + o, e, decay, next, u, 64, scales + b, c);
        else quantize_block<Largest, Stochastic, Feedback>(values + o, e, decay, next, u, m, scales + b, c);
    }
}

// Codes a sum that is nowhere written as a whole. Whether it is finite.
template <int Largest, bool Stochastic>
bool quantize_sum(const float* const* sources, int32_t count, float share, const float* noise, int64_t n, int64_t block,
                  float* scales, uint8_t* codes) {
    std::vector<float> sum((size_t)block);
    float* x = sum.data();
    bool finite = true;
    for (int64_t o = 0, b = 0; o < n; o += block, b++) {
        const int64_t m = smaller(block, n - o);
        const float* u = Stochastic ? noise + o : nullptr;
        uint8_t* c = codes + (Largest == 127 ? o : o / 2);
        if (o + 3 * block <= n)
            for (int32_t s = 0; s < count; s++)
                for (int64_t i = 0; i < block; i += 16) __builtin_prefetch(sources[s] + o + 2 * block + i);
        if (m == 256) {
            add_up(sources, count, o, share, x, 256);
            quantize_block<Largest, Stochastic, false>(x, nullptr, 0.f, nullptr, u, 256, scales + b, c);
        } else if (m == 64) {
            add_up(sources, count, o, share, x, 64);
            quantize_block<Largest, Stochastic, false>(x, nullptr, 0.f, nullptr, u, 64, scales + b, c);
        } else {
            add_up(sources, count, o, share, x, m);
            quantize_block<Largest, Stochastic, false>(x, nullptr, 0.f, nullptr, u, m, scales + b, c);
        }
        finite &= scales[b] == scales[b];
    }
    return finite;
}

template <int Largest, bool Add>
INLINE void dequantize_block(const uint8_t* __restrict codes, float scale, float* __restrict out, int64_t n) {
    if (Largest == 127) {
        for (int64_t i = 0; i < n; i++) {
            float x = (float)(int8_t)codes[i] * scale;
            out[i] = Add ? out[i] + x : x;
        }
        return;
    }
    for (int64_t i = 0; i < n / 2; i++) {
        float x = (float)((int32_t)(codes[i] & 15) - 8) * scale, y = (float)((int32_t)(codes[i] >> 4) - 8) * scale;
        out[2 * i] = Add ? out[2 * i] + x : x;
        out[2 * i + 1] = Add ? out[2 * i + 1] + y : y;
    }
    if (n % 2) {
        float x = (float)((int32_t)(codes[n / 2] & 15) - 8) * scale;
        out[n - 1] = Add ? out[n - 1] + x : x;
    }
}

template <int Largest, bool Add>
void dequantize(const float* scales, const uint8_t* codes, int64_t n, int64_t block, float* out) {
    for (int64_t o = 0, b = 0; o < n; o += block, b++) {
        const int64_t m = smaller(block, n - o);
        const uint8_t* c = codes + (Largest == 127 ? o : o / 2);
        if (!Add && m == 256) {
            float x[256];
            dequantize_block<Largest, false>(c, scales[b], x, 256);
            stream(x, out + o, 256);
        } else if (!Add && m == 64) {
            float x[64];
            dequantize_block<Largest, false>(c, scales[b], x, 64);
            stream(x, out + o, 64);
        } else if (m == 256) dequantize_block<Largest, Add>(c, scales[b], out + o, 256);
        else if (m == 64) dequantize_block<Largest, Add>(c, scales[b], out + o, 64);
        else dequantize_block<Largest, Add>(c, scales[b], out + o, m);
    }
    finish_stream();
}

// ---- signs

// Bit i of the word is the sign of x[i].
INLINE uint32_t sign_word(const float* __restrict x, int64_t n) {
    uint32_t word = 0;
    if (n == 32)
        for (int i = 0; i < 32; i++) word |= (bits(x[i]) >> 31) << i;
    else
        for (int64_t i = 0; i < n; i++) word |= (bits(x[i]) >> 31) << i;
    return word;
}

// The sum of |x| / block in the order that halves the block: element i + element i + block/2, and so on. `sums` has room
// for a block, a power of two; beyond n it is zero.
INLINE float halving_sum(const float* __restrict x, int64_t n, int64_t block, float* __restrict sums) {
    const float share = 1.f / (float)block;
    for (int64_t i = 0; i < n; i++) sums[i] = number(bits(x[i]) & 0x7fffffffu) * share;
    for (int64_t i = n; i < block; i++) sums[i] = 0.f;
    for (int64_t half = block / 2; half > 0; half /= 2) {
        float* __restrict low = sums;
        const float* __restrict high = sums + half;
        for (int64_t i = 0; i < half; i++) low[i] += high[i];
    }
    return sums[0];
}

template <bool Feedback>
void encode_signs(const float* values, const float* residual, float decay, float* new_residual, int64_t n, int64_t block,
                  float* scales, uint32_t* words) {
    std::vector<float> sums((size_t)block);
    for (int64_t o = 0, b = 0; o < n; o += block, b++) {
        const int64_t m = smaller(block, n - o);
        float* x = Feedback ? new_residual + o : const_cast<float*>(values + o);
        if (Feedback) combine(values + o, residual + o, decay, x, m);
        const float scale = usable(halving_sum(x, m, block, sums.data()) * (float)((double)block / (double)m));
        scales[b] = scale;
        for (int64_t i = 0; i < m; i += 32) {
            // The sign of a NaN means nothing and is not sent.
            const uint32_t word = scale != scale ? 0 : sign_word(x + i, smaller(32, m - i));
            words[(o + i) / 32] = word;
        }
        if (Feedback)
            for (int64_t i = 0; i < m; i++) x[i] -= number(bits(scale) ^ (scale != scale ? 0 : bits(x[i]) & 0x80000000u));
    }
}

template <bool Add>
void decode_signs(const float* scales, const uint32_t* words, int64_t n, int64_t block, float* __restrict out) {
    for (int64_t i = 0; i < n; i += 32) {
        const uint32_t word = words[i / 32], scale = bits(scales[i / block]);
        float* __restrict d = out + i;
        const int64_t m = smaller(32, n - i);
        if (m == 32) {
            for (int j = 0; j < 32; j++) {
                float x = number(scale ^ (((word >> j) & 1) << 31));
                d[j] = Add ? d[j] + x : x;
            }
        } else {
            for (int64_t j = 0; j < m; j++) {
                float x = number(scale ^ (((word >> j) & 1) << 31));
                d[j] = Add ? d[j] + x : x;
            }
        }
    }
}

// ---- the largest elements

struct Selection {
    int64_t count = 0, passed = 0;
    int32_t most = 0;
};

// Elements [from, to) of the scan.
template <bool Feedback>
INLINE void select_range(const float* values, const float* residual, float decay, float* new_residual, int64_t from,
                         int64_t to, int32_t threshold, int64_t k, int32_t* __restrict indices, float* __restrict numbers,
                         Selection& found) {
    for (int64_t o = from; o < to; o += 32) {
        const int64_t m = smaller(32, to - o);
        float* x = Feedback ? new_residual + o : const_cast<float*>(values + o);
        uint32_t over = 0;
        int32_t most = 0;
        if (m == 32) {
            if (Feedback) combine(values + o, residual + o, decay, x, 32);
            most = greatest(x, 32);
            // At a density of 1 % three in four stop here.
            if (most >= threshold)
                for (int i = 0; i < 32; i++) over |= (uint32_t)(magnitude(x[i]) >= threshold) << i;
        } else {
            if (Feedback) combine(values + o, residual + o, decay, x, m);
            most = greatest(x, m);
            for (int64_t i = 0; i < m; i++) over |= (uint32_t)(magnitude(x[i]) >= threshold) << i;
        }
        found.most = most > found.most ? most : found.most;
        found.passed += __builtin_popcount(over);
        for (; over && found.count < k; over &= over - 1) {
            const int i = __builtin_ctz(over);
            indices[found.count] = (int32_t)(o + i);
            numbers[found.count++] = x[i];
            if (Feedback) x[i] = 0.f;
        }
    }
}

template <bool Feedback>
Selection select(const float* values, const float* residual, float decay, float* new_residual, int64_t n, float threshold,
                 int64_t start, int64_t k, int32_t* indices, float* numbers) {
    Selection found;
    const int32_t t = magnitude(threshold);
    select_range<Feedback>(values, residual, decay, new_residual, start, n, t, k, indices, numbers, found);
    select_range<Feedback>(values, residual, decay, new_residual, 0, start, t, k, indices, numbers, found);
    return found;
}

}  // namespace

extern "C" {

void danon_copy(float* out, const float* source, int64_t n) {
    const int64_t head = smaller(n, (int64_t)((32 - ((uintptr_t)out & 31)) & 31) / 4);
    const int64_t body = (n - head) / 8 * 8;
    memcpy(out, source, 4 * head);
    stream(source + head, out + head, body);
    memcpy(out + head + body, source + head + body, 4 * (n - head - body));
    finish_stream();
}

// out = share * (sources[0] + sources[1] + ...), added in this order; `out` may be sources[0]. Whether all is finite.
int32_t danon_add_scaled(float* out, const float* const* sources, int32_t count, int64_t n, float share) {
    int32_t most = 0;
    for (int64_t o = 0; o < n; o += 4 * kPiece) {
        const int64_t m = smaller(4 * kPiece, n - o);
        add_up(sources, count, o, share, out + o, m);
        const int32_t here = greatest(out + o, m);
        most = here > most ? here : most;
    }
    return most < kInfinity;
}

// Scales float32 [ceil(n / block)]; codes as in compressors/int8.py (largest = 127) and int4.py (7). `noise` may be null.
void danon_quantize(int32_t largest, const float* values, const float* residual, float decay, float* new_residual,
                    const float* noise, int64_t n, int64_t block, float* scales, uint8_t* codes) {
    auto run = largest == 127 ? (noise ? (residual ? quantize<127, true, true> : quantize<127, true, false>)
                                       : (residual ? quantize<127, false, true> : quantize<127, false, false>))
                              : (noise ? (residual ? quantize<7, true, true> : quantize<7, true, false>)
                                       : (residual ? quantize<7, false, true> : quantize<7, false, false>));
    run(values, residual, decay, new_residual, noise, n, block, scales, codes);
}

// The same for share * (sources[0] + sources[1] + ...), added in this order. Whether all of it is finite.
int32_t danon_quantize_sum(int32_t largest, const float* const* sources, int32_t count, float share, const float* noise,
                           int64_t n, int64_t block, float* scales, uint8_t* codes) {
    auto run = largest == 127 ? (noise ? quantize_sum<127, true> : quantize_sum<127, false>)
                              : (noise ? quantize_sum<7, true> : quantize_sum<7, false>);
    return run(sources, count, share, noise, n, block, scales, codes);
}

void danon_dequantize(int32_t largest, const float* scales, const uint8_t* codes, int64_t n, int64_t block, int32_t add,
                      float* out) {
    auto run = largest == 127 ? (add ? dequantize<127, true> : dequantize<127, false>)
                              : (add ? dequantize<7, true> : dequantize<7, false>);
    run(scales, codes, n, block, out);
}

// Words uint32 [ceil(n / 32)]; `block` is a power of two, at least 32.
void danon_encode_signs(const float* values, const float* residual, float decay, float* new_residual, int64_t n,
                        int64_t block, float* scales, uint32_t* words) {
    auto run = residual ? encode_signs<true> : encode_signs<false>;
    run(values, residual, decay, new_residual, n, block, scales, words);
}

void danon_decode_signs(const float* scales, const uint32_t* words, int64_t n, int64_t block, int32_t add, float* out) {
    auto run = add ? decode_signs<true> : decode_signs<false>;
    run(scales, words, n, block, out);
}

// The first k elements of magnitude >= threshold, scanned from `start` and round to it, go to `indices` and `numbers`;
// their residual is zero. Returns how many there are; `passed` would have been there without the limit. -1 if an element
// is not finite.
int64_t danon_select(const float* values, const float* residual, float decay, float* new_residual, int64_t n,
                     float threshold, int64_t start, int64_t k, int32_t* indices, float* numbers, int64_t* passed) {
    auto run = residual ? select<true> : select<false>;
    const Selection found = run(values, residual, decay, new_residual, n, threshold, start, k, indices, numbers);
    *passed = found.passed;
    return found.most < kInfinity ? found.count : -1;
}

// out[indices] += numbers. False, with `out` untouched, if an index is out of bounds: messages come from elsewhere.
int32_t danon_scatter_add(const int32_t* indices, const float* numbers, int64_t count, int64_t n, float* out) {
    uint32_t most = 0;  // a negative index is a large one
    for (int64_t i = 0; i < count; i++) most = (uint32_t)indices[i] > most ? (uint32_t)indices[i] : most;
    if (count > 0 && (int64_t)most >= n) return 0;
    for (int64_t i = 0; i < count; i++) out[indices[i]] += numbers[i];
    return 1;
}
}
