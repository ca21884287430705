/* Vectors of floats, as wide as the machine's; reading and writing float32 and bfloat16.
 *
 * Written in the compiler's vector types, so that one text serves AVX-512, AVX2, NEON and machines without any.
 * Functions are inlined and take the type as a constant: what they branch on is gone when they are compiled.
 */
#ifndef SLIPSTREAM_SIMD_H
#define SLIPSTREAM_SIMD_H

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline, unused))
/* For what is called seldom: inlined, it would only take the compiler's time. */
#define SELDOM static __attribute__((noinline, unused))

typedef float vf __attribute__((vector_size(LANES * 4)));
typedef uint32_t vu __attribute__((vector_size(LANES * 4)));
typedef uint16_t vh __attribute__((vector_size(LANES * 2)));

INLINE vf all(float value) {
    return value - (vf){0};
}

/* Return total + a * b, rounded once where the machine can: compilers fuse some such sums and not others. */
INLINE vf add_product(vf total, vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)total);
#elif defined(__AVX__) && defined(__FMA__)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)total);
#else
    return total + a * b;
#endif
}

INLINE vf choose(vu mask, vf yes, vf no) {
    return (vf)((mask & (vu)yes) | (~mask & (vu)no));
}

/* b where one of them is no number. */
INLINE vf larger(vf a, vf b) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return choose((vu)(a > b), a, b);
#endif
}

INLINE vf widen(vh halves) {
    return (vf)(__builtin_convertvector(halves, vu) << 16);
}

/* To the nearest, ties to even; every NaN becomes the same one. */
INLINE vh narrow(vf values) {
    vu bits = (vu)values;
    vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    vu nan = (vu)(values != values);
    return __builtin_convertvector((nan & 0x7fc0) | (~nan & rounded), vh);
}

INLINE float widen_one(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Return LANES numbers from place i of an array, bfloat16 or float32. */
INLINE vf load(const void *array, int64_t i, int bf16) {
    if (bf16) {
        vh halves;
        memcpy(&halves, (const uint16_t *)array + i, sizeof halves);
        return widen(halves);
    }
    vf values;
    memcpy(&values, (const float *)array + i, sizeof values);
    return values;
}

/* Return the first `count` numbers from place i, zeros behind them; what is behind them is not read. */
INLINE vf load_part(const void *array, int64_t i, int count, int bf16) {
    if (bf16) {
        vh halves = {0};
        memcpy(&halves, (const uint16_t *)array + i, (size_t)count * 2);
        return widen(halves);
    }
    vf values = {0};
    memcpy(&values, (const float *)array + i, (size_t)count * 4);
    return values;
}

INLINE void store(void *array, int64_t i, vf values, int bf16) {
    if (bf16) {
        vh halves = narrow(values);
        memcpy((uint16_t *)array + i, &halves, sizeof halves);
    } else {
        memcpy((float *)array + i, &values, sizeof values);
    }
}

INLINE void store_part(void *array, int64_t i, vf values, int count, int bf16) {
    if (bf16) {
        vh halves = narrow(values);
        memcpy((uint16_t *)array + i, &halves, (size_t)count * 2);
    } else {
        memcpy((float *)array + i, &values, (size_t)count * 4);
    }
}

/* As `load_part` and `store_part`, quick where all lanes are meant. */
INLINE vf load_up_to(const void *array, int64_t i, int count, int bf16) {
    return count == LANES ? load(array, i, bf16) : load_part(array, i, count, bf16);
}

INLINE void store_up_to(void *array, int64_t i, vf values, int count, int bf16) {
    if (count == LANES)
        store(array, i, values, bf16);
    else
        store_part(array, i, values, count, bf16);
}

/* Return what is left of the values when they have been stored. */
INLINE vf rounded(vf values, int bf16) {
    return bf16 ? widen(narrow(values)) : values;
}

/* Add up the lanes, in one order. */
INLINE float sum(vf values) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)values);
#else
    float lanes[LANES];
    memcpy(lanes, &values, sizeof lanes);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            lanes[i] += lanes[i + step];
    return lanes[0];
#endif
}

/* Return the largest lane; none is NaN. */
INLINE float largest(vf values) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)values);
#else
    float lanes[LANES];
    memcpy(lanes, &values, sizeof lanes);
    for (int i = 1; i < LANES; i++)
        lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
#endif
}

/* The Taylor series of e^r up to r^7, |r| <= 0.347. */
INLINE vf exponential_near_zero(vf r) {
    vf p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    return p * r + 1.0f;
}

/* e to the power of each lane, within 2 units of the last place; what is below e^-87.3 may be that or less, minus
 * infinity included, and above 88.8 is infinity; NaN stays NaN.
 *
 * e^x = 2^n * e^r with n the nearest integer to x / ln 2. Adding 1.5 * 2^23 rounds to an integer, which then stands in
 * the lowest bits. ln 2 is subtracted in two parts, of which the first times n is exact.
 */
INLINE vf exponential(vf x) {
#if defined(__AVX512F__)
    /* Of two operands the second is taken if one is no number. */
    vf bounded = (vf)_mm512_min_ps(_mm512_set1_ps(100.0f), _mm512_max_ps(_mm512_set1_ps(-110.0f), (__m512)x));
#else
    vf low = choose((vu)(x < -87.3f), all(-87.3f), x);
    vf bounded = choose((vu)(low > 88.7f), all(88.7f), low);
#endif
    vf shifted = bounded * 1.44269504f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = exponential_near_zero(r);
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    vf power = (vf)((vu)p + ((vu)shifted << 23));
    vf unbounded = choose((vu)(x > 88.7f), all(__builtin_inff()), power);
    return choose((vu)(x != x), x, unbounded);
#endif
}

#if defined(__AVX512F__)
/* Swap rows and columns of a square of lanes. */
INLINE void transpose(vf rows[LANES]) {
    __m512 fours[LANES];
    _Pragma("GCC unroll 4")
    for (int i = 0; i < LANES; i += 4) {
        __m512d low = (__m512d)_mm512_unpacklo_ps((__m512)rows[i], (__m512)rows[i + 1]);
        __m512d high = (__m512d)_mm512_unpackhi_ps((__m512)rows[i], (__m512)rows[i + 1]);
        __m512d other_low = (__m512d)_mm512_unpacklo_ps((__m512)rows[i + 2], (__m512)rows[i + 3]);
        __m512d other_high = (__m512d)_mm512_unpackhi_ps((__m512)rows[i + 2], (__m512)rows[i + 3]);
        /* Of rows i to i + 3, column j of each four columns. */
        fours[i] = (__m512)_mm512_unpacklo_pd(low, other_low);
        fours[i + 1] = (__m512)_mm512_unpackhi_pd(low, other_low);
        fours[i + 2] = (__m512)_mm512_unpacklo_pd(high, other_high);
        fours[i + 3] = (__m512)_mm512_unpackhi_pd(high, other_high);
    }
    _Pragma("GCC unroll 4")
    for (int j = 0; j < 4; j++) {
        __m512 even = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0x88);
        __m512 odd = _mm512_shuffle_f32x4(fours[j], fours[4 + j], 0xdd);
        __m512 other_even = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0x88);
        __m512 other_odd = _mm512_shuffle_f32x4(fours[8 + j], fours[12 + j], 0xdd);
        rows[j] = (vf)_mm512_shuffle_f32x4(even, other_even, 0x88);
        rows[4 + j] = (vf)_mm512_shuffle_f32x4(odd, other_odd, 0x88);
        rows[8 + j] = (vf)_mm512_shuffle_f32x4(even, other_even, 0xdd);
        rows[12 + j] = (vf)_mm512_shuffle_f32x4(odd, other_odd, 0xdd);
    }
}
#elif defined(__AVX__)
INLINE void transpose(vf rows[LANES]) {
    __m256 fours[LANES];
    _Pragma("GCC unroll 2")
    for (int i = 0; i < LANES; i += 4) {
        __m256d low = (__m256d)_mm256_unpacklo_ps((__m256)rows[i], (__m256)rows[i + 1]);
        __m256d high = (__m256d)_mm256_unpackhi_ps((__m256)rows[i], (__m256)rows[i + 1]);
        __m256d other_low = (__m256d)_mm256_unpacklo_ps((__m256)rows[i + 2], (__m256)rows[i + 3]);
        __m256d other_high = (__m256d)_mm256_unpackhi_ps((__m256)rows[i + 2], (__m256)rows[i + 3]);
        fours[i] = (__m256)_mm256_unpacklo_pd(low, other_low);
        fours[i + 1] = (__m256)_mm256_unpackhi_pd(low, other_low);
        fours[i + 2] = (__m256)_mm256_unpacklo_pd(high, other_high);
        fours[i + 3] = (__m256)_mm256_unpackhi_pd(high, other_high);
    }
    _Pragma("GCC unroll 4")
    for (int j = 0; j < 4; j++) {
        rows[j] = (vf)_mm256_permute2f128_ps(fours[j], fours[4 + j], 0x20);
        rows[4 + j] = (vf)_mm256_permute2f128_ps(fours[j], fours[4 + j], 0x31);
    }
}
#else
INLINE void transpose(vf rows[LANES]) {
    float from[LANES][LANES], to[LANES][LANES];
    memcpy(from, rows, sizeof from);
    for (int i = 0; i < LANES; i++)
        for (int j = 0; j < LANES; j++)
            to[j][i] = from[i][j];
    memcpy(rows, to, sizeof to);
}
#endif

#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif

/* Add the products of one step, 4 bytes of each: one float32, or, if `pairs`, two bfloat16. `x` is the same for all
 * lanes. Where there are no BF16_PRODUCTS, there are no pairs.
 */
INLINE vf add_products(vf total, vf weights, uint32_t x, int pairs) {
#if BF16_PRODUCTS
    if (pairs)
        return (vf)_mm512_dpbf16_ps((__m512)total, (__m512bh)_mm512_set1_epi32((int)x), (__m512bh)weights);
#endif
    float one;
    memcpy(&one, &x, sizeof one);
    return add_product(total, weights, all(one));
}

#endif
