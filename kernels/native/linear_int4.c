/* The product of bfloat16 rows with 4-bit weights, groups of 32 inputs of an output sharing a scale.
 *
 * A word of 16 bits holds four weights: of the inputs 0, 2, 4 and 6 behind its own, from the low bits up. Shifting words
 * and looking the low four bits up in a table of bfloat16 numbers makes pairs of weights as bfloat16 products take
 * them. weight [panels, groups, 4 runs of 8 inputs, VECTORS, LANES outputs, 2 inputs] words; scales [panels, groups,
 * VECTORS, LANES] bfloat16.
 */
#include "product.h"

#if defined(__AVX512BF16__) && defined(__AVX512BW__)

#define GROUP 32
#define RUNS 4
#define TILE_ROWS 4

EXPORT int slipstream_has_int4(void) {
    return 1;
}

/* -8 to 7 as bfloat16; twice, because the look-up minds one bit more than a weight has. */
#define NUMBERS 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040, 0xc000, 0xbf80, \
                0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0
static const uint16_t numbers[32] __attribute__((aligned(64))) = {NUMBERS, NUMBERS};

/* Multiply `rows` rows with `vectors` vectors of outputs of a panel, from vector `at` on. */
INLINE void multiply_tile(const struct product_job *job, int64_t panel, int64_t row, int rows, int at, int vectors) {
    int64_t groups = job->inputs / GROUP;
    const char *weights = job->weight + panel * groups * RUNS * VECTORS * 64;
    const uint16_t *scales = (const uint16_t *)job->scales + panel * groups * PANEL;
    const char *x = job->x + row * job->row_bytes;
    const __m512i table = _mm512_load_si512(numbers);
    vf totals[TILE_ROWS][VECTORS];
    _Pragma("GCC unroll 4")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 4")
        for (int v = 0; v < vectors; v++)
            totals[r][v] = (vf){0};
    for (int64_t group = 0; group < groups; group++) {
        __m512 sums[TILE_ROWS][VECTORS];
        _Pragma("GCC unroll 4")
        for (int r = 0; r < rows; r++)
            _Pragma("GCC unroll 4")
            for (int v = 0; v < vectors; v++)
                sums[r][v] = _mm512_setzero_ps();
        for (int run = 0; run < RUNS; run++) {
            __m512i words[VECTORS];
            _Pragma("GCC unroll 4")
            for (int v = 0; v < vectors; v++)
                words[v] = _mm512_loadu_si512(weights + (((group * RUNS + run) * VECTORS) + at + v) * 64);
            _Pragma("GCC unroll 4")
            for (int step = 0; step < 4; step++) {
                __m512bh pairs[VECTORS];
                _Pragma("GCC unroll 4")
                for (int v = 0; v < vectors; v++) {
                    pairs[v] = (__m512bh)_mm512_permutexvar_epi16(words[v], table);
                    words[v] = _mm512_srli_epi16(words[v], 4);
                }
                _Pragma("GCC unroll 4")
                for (int r = 0; r < rows; r++) {
                    int32_t two;
                    memcpy(&two, x + r * job->row_bytes + ((group * RUNS + run) * 4 + step) * 4, sizeof two);
                    __m512bh both = (__m512bh)_mm512_set1_epi32(two);
                    _Pragma("GCC unroll 4")
                    for (int v = 0; v < vectors; v++)
                        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, pairs[v]);
                }
            }
        }
        _Pragma("GCC unroll 4")
        for (int v = 0; v < vectors; v++) {
            vf scale = load(scales, (group * VECTORS + at + v) * LANES, 1);
            _Pragma("GCC unroll 4")
            for (int r = 0; r < rows; r++)
                totals[r][v] = totals[r][v] + (vf)sums[r][v] * scale;
        }
    }
    _Pragma("GCC unroll 4")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 4")
        for (int v = 0; v < vectors; v++)
            write_outputs(job, row + r, panel * PANEL + (at + v) * LANES, totals[r][v], 1);
}

INLINE void multiply_halves(const struct product_job *job, int64_t panel, int64_t row, int rows) {
    multiply_tile(job, panel, row, rows, 0, 2);
    multiply_tile(job, panel, row, rows, 2, 2);
}

static void multiply_piece(void *argument, int64_t piece) {
    const struct product_job *job = argument;
    int64_t first, last, panel = rows_of_piece(job, piece, &first, &last), row = first;
    for (; row + TILE_ROWS <= last; row += TILE_ROWS)
        multiply_halves(job, panel, row, TILE_ROWS);
    switch (last - row) {
    case 1: multiply_tile(job, panel, row, 1, 0, 4); break;
    case 2: multiply_halves(job, panel, row, 2); break;
    case 3: multiply_halves(job, panel, row, 3); break;
    default: break;
    }
}

/* out = x @ weight + bias; x [rows, inputs], rows `row_bytes` apart, inputs whole groups; out bfloat16, or float32 if
 * `wide`.
 */
EXPORT void slipstream_linear_int4(const void *x, const void *weight, const void *scales, const void *bias, void *out,
                                   int64_t rows, int64_t inputs, int64_t outputs, int64_t row_bytes, int wide,
                                   int threads) {
    struct product_job job = {.x = x, .weight = weight, .scales = scales, .bias = bias, .out = out, .rows = rows,
                              .inputs = inputs, .outputs = outputs, .row_bytes = row_bytes, .wide = wide};
    struct call call = product_call(multiply_piece, &job, 4);
    run_call(&call, threads_for(&job, threads));
}

#else

EXPORT int slipstream_has_int4(void) {
    return 0;
}

EXPORT void slipstream_linear_int4(const void *x, const void *weight, const void *scales, const void *bias, void *out,
                                   int64_t rows, int64_t inputs, int64_t outputs, int64_t row_bytes, int wide,
                                   int threads) {
    (void)x, (void)weight, (void)scales, (void)bias, (void)out, (void)rows, (void)inputs, (void)outputs;
    (void)row_bytes, (void)wide, (void)threads;
}

#endif
