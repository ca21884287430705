/* Keys side by side, and tiles of products that stay in registers from the first step to the last.
 *
 * A step is a word of 4 bytes of each row: one float32 or two bfloat16, as in `add_products`. Every sum goes over its
 * steps in order, so tiles of any size give the same bits.
 */
#ifndef SLIPSTREAM_ATTENTION_TILES_H
#define SLIPSTREAM_ATTENTION_TILES_H

#include "simd.h"

#define VECTORS 4
#if LANES == 16
#define TILE_ROWS 6
#else
#define TILE_ROWS 3
#endif

/* Lay LANES keys side by side: vector i of `out`, `stride` numbers from the one before it, has word i of each. */
INLINE void lay_keys(const char *const *rows, int64_t words, int widened, float *out, int64_t stride) {
    for (int64_t i = 0; i < words; i += LANES) {
        int count = words - i < LANES ? (int)(words - i) : LANES;
        vf square[LANES];
        _Pragma("GCC unroll 16")
        for (int key = 0; key < LANES; key++)
            square[key] = load_up_to(rows[key], i, count, widened);
        transpose(square);
        if (count == LANES) {
            _Pragma("GCC unroll 16")
            for (int j = 0; j < LANES; j++)
                store(out, (i + j) * stride, square[j], 0);
        } else {
            float lines[LANES][LANES];
            memcpy(lines, square, sizeof lines);
            for (int j = 0; j < count; j++)
                memcpy(out + (i + j) * stride, lines[j], sizeof lines[j]);
        }
    }
}

/* Multiply TILE_ROWS rows of words, `x_bytes` apart, with vectors of words, `stride` numbers from step to step. */
INLINE void multiply_steps(const char *x, int64_t x_bytes, const float *panel, int64_t stride, int64_t steps,
                           int vectors, int pairs, vf results[][VECTORS]) {
    vf totals[TILE_ROWS][VECTORS];
    _Pragma("GCC unroll 8")
    for (int r = 0; r < TILE_ROWS; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            totals[r][vector] = (vf){0};
    for (int64_t step = 0; step < steps; step++) {
        vf some[VECTORS];
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            some[vector] = load(panel, step * stride + vector * LANES, 0);
        _Pragma("GCC unroll 8")
        for (int r = 0; r < TILE_ROWS; r++) {
            uint32_t word;
            memcpy(&word, x + r * x_bytes + step * 4, sizeof word);
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < vectors; vector++)
                totals[r][vector] = add_products(totals[r][vector], some[vector], word, pairs);
        }
    }
    _Pragma("GCC unroll 8")
    for (int r = 0; r < TILE_ROWS; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            results[r][vector] = totals[r][vector];
}

#endif
