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

INLINE vf choose(vu mask, vf yes, vf no) {
    return (vf)((mask & (vu)yes) | (~mask & (vu)no));
}

INLINE vf larger(vf a, vf b) {
    return choose((vu)(a > b), a, b);
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
    float lanes[LANES];
    memcpy(lanes, &values, sizeof lanes);
    for (int step = LANES / 2; step; step /= 2)
        for (int i = 0; i < step; i++)
            lanes[i] += lanes[i + step];
    return lanes[0];
}

INLINE float largest(vf values) {
    float lanes[LANES];
    memcpy(lanes, &values, sizeof lanes);
    for (int i = 1; i < LANES; i++)
        lanes[0] = lanes[i] > lanes[0] ? lanes[i] : lanes[0];
    return lanes[0];
}

/* e to the power of each lane, within 2 units of the last place; below -87.3 as for -87.3, above 88.7
 * infinite; NaN stays NaN.
 *
 * e^x = 2^n * e^r with n the nearest integer to x / ln 2. Adding 1.5 * 2^23 rounds to an integer, which then stands in
 * the lowest bits. ln 2 is subtracted in two parts, of which the first times n is exact. The polynomial is the Taylor
 * series up to r^7, |r| <= 0.347.
 */
INLINE vf exponential(vf x) {
    vf low = choose((vu)(x < -87.3f), all(-87.3f), x);
    vf bounded = choose((vu)(low > 88.7f), all(88.7f), low);
    vf shifted = bounded * 1.44269504f + 12582912.0f;
    vf n = shifted - 12582912.0f;
    vf r = bounded - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = r * (1.0f / 5040) + (1.0f / 720);
    p = p * r + (1.0f / 120);
    p = p * r + (1.0f / 24);
    p = p * r + (1.0f / 6);
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    vf power = (vf)((vu)p + ((vu)shifted << 23));
    vf unbounded = choose((vu)(x > 88.7f), all(__builtin_inff()), power);
    return choose((vu)(x != x), x, unbounded);
}

/* One step of `lane_sums`: lanes without bit `bit` have a's sums over pairs of lanes, the others b's. */
INLINE vf fold(vf a, vf b, int bit) {
#if defined(__AVX512F__)
    __mmask16 mask = bit == 1 ? 0xaaaa : bit == 2 ? 0xcccc : bit == 4 ? 0xf0f0 : 0xff00;
    __m512 own = _mm512_mask_blend_ps(mask, (__m512)a, (__m512)b);
    __m512 other = _mm512_mask_blend_ps(mask, (__m512)b, (__m512)a);
    switch (bit) {
    case 1: other = _mm512_permute_ps(other, 0xb1); break;
    case 2: other = _mm512_permute_ps(other, 0x4e); break;
    case 4: other = _mm512_shuffle_f32x4(other, other, 0xb1); break;
    default: other = _mm512_shuffle_f32x4(other, other, 0x4e); break;
    }
    return (vf)_mm512_add_ps(own, other);
#elif defined(__AVX__)
    __m256 own, other;
    switch (bit) {
    case 1:
        own = _mm256_blend_ps((__m256)a, (__m256)b, 0xaa);
        other = _mm256_permute_ps(_mm256_blend_ps((__m256)b, (__m256)a, 0xaa), 0xb1);
        break;
    case 2:
        own = _mm256_blend_ps((__m256)a, (__m256)b, 0xcc);
        other = _mm256_permute_ps(_mm256_blend_ps((__m256)b, (__m256)a, 0xcc), 0x4e);
        break;
    default:
        own = _mm256_blend_ps((__m256)a, (__m256)b, 0xf0);
        other = _mm256_blend_ps((__m256)b, (__m256)a, 0xf0);
        other = _mm256_permute2f128_ps(other, other, 0x01);
        break;
    }
    return (vf)_mm256_add_ps(own, other);
#else
    vf sums;
    for (int i = 0; i < LANES; i++)
        sums[i] = i & bit ? b[i] + b[i ^ bit] : a[i] + a[i ^ bit];
    return sums;
#endif
}

/* Return a vector whose lane i is the sum over the lanes of vectors[i]; overwrites the vectors. */
INLINE vf lane_sums(vf vectors[LANES]) {
    _Pragma("GCC unroll 4")
    for (int bit = 1; bit < LANES; bit *= 2)
        _Pragma("GCC unroll 8")
        for (int i = 0; i < LANES / 2 / bit; i++)
            vectors[i] = fold(vectors[2 * i], vectors[2 * i + 1], bit);
    return vectors[0];
}

#endif
