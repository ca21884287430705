/* The product with weights of float32, of bfloat16 and of 8-bit integers, laid out in panels.
 *
 * A step takes 4 bytes of a row (one float32, two bfloat16, four 8-bit integers) and VECTORS vectors of weights, of
 * which each lane belongs to one output: weight [panels, steps, VECTORS, LANES, 4 bytes]. A tile of rows keeps its sums
 * in registers from the first step to the last.
 */
#include "product.h"

enum { FLOAT32, BFLOAT16, INT8 };

/* What fits the registers: rows that are multiplied at once, and panels that one row is multiplied with at once. */
#if LANES == 16
#define TILE_ROWS 6
#define MOST_PANELS 4
#else
#define TILE_ROWS 3
#define MOST_PANELS 2
#endif

/* Return which kinds of weights this machine multiplies fast by this file's means: a bit each. Machines with tiles in
 * their registers have something better for 16 and 8 bits, in torch.
 */
EXPORT int slipstream_panel_kinds(void) {
    int kinds = LANES >= 8 ? 1 << FLOAT32 : 0;
#if BF16_PRODUCTS && !defined(__AMX_BF16__)
    kinds |= 1 << BFLOAT16;
#endif
#if defined(__AVX512VNNI__) && !defined(__AMX_INT8__)
    kinds |= 1 << INT8;
#endif
    return kinds;
}

EXPORT int64_t slipstream_lanes(void) {
    return LANES;
}

/* Add the products of one step. What is summed are lanes of 32 bits, of whatever type. */
INLINE vf add_step(vf total, vf weights, uint32_t x, int kind) {
#if defined(__AVX512VNNI__)
    if (kind == INT8)
        return (vf)_mm512_dpbusd_epi32((__m512i)total, _mm512_set1_epi32((int)x), (__m512i)weights);
#endif
    return add_products(total, weights, x, kind == BFLOAT16);
}

SELDOM void write_integers(const struct product_job *job, int64_t row, int64_t first, vf sums) {
#if defined(__AVX512VNNI__)
    /* Corrections and scales are there for whole panels. */
    __m512i exact = _mm512_sub_epi32((__m512i)sums, _mm512_loadu_si512(job->corrections + first));
    vf values = (vf)_mm512_cvtepi32_ps(exact) * load(job->scales, first, 0) * job->row_scales[row];
    write_outputs(job, row, first, values, job->bf16);
#endif
}

SELDOM void write_tile(const struct product_job *job, int64_t panel, int64_t row, int rows, int kind,
                       vf sums[][VECTORS]) {
    for (int r = 0; r < rows; r++)
        for (int vector = 0; vector < VECTORS; vector++) {
            int64_t first = panel * PANEL + vector * LANES;
            if (kind == INT8)
                write_integers(job, row + r, first, sums[r][vector]);
            else
                write_outputs(job, row + r, first, sums[r][vector], kind == BFLOAT16);
        }
}

/* Multiply `rows` rows with a panel. */
INLINE void multiply_tile(const struct product_job *job, int64_t panel, int64_t row, int rows, int kind) {
    int64_t steps = job->inputs / (kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : 4);
    const char *weights = job->weight + panel * steps * PANEL * 4;
    const char *x = job->x + row * job->row_bytes;
    vf totals[TILE_ROWS][VECTORS];
    _Pragma("GCC unroll 8")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            totals[r][vector] = (vf){0};
    for (int64_t step = 0; step < steps; step++) {
        vf some[VECTORS];
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            some[vector] = load(weights, (step * VECTORS + vector) * LANES, 0);
        _Pragma("GCC unroll 8")
        for (int r = 0; r < rows; r++) {
            uint32_t word;
            memcpy(&word, x + r * job->row_bytes + step * 4, sizeof word);
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < VECTORS; vector++)
                totals[r][vector] = add_step(totals[r][vector], some[vector], word, kind);
        }
    }
    vf finished[TILE_ROWS][VECTORS]; /* in memory, which `totals` never are */
    _Pragma("GCC unroll 8")
    for (int r = 0; r < rows; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            finished[r][vector] = totals[r][vector];
    write_tile(job, panel, row, rows, kind, finished);
}

INLINE void multiply_rows(const struct product_job *job, int64_t panel, int64_t first, int64_t last, int kind) {
    int64_t row = first;
    for (; row + TILE_ROWS <= last; row += TILE_ROWS)
        multiply_tile(job, panel, row, TILE_ROWS, kind);
    switch (last - row) {
    case 1: multiply_tile(job, panel, row, 1, kind); break;
    case 2: multiply_tile(job, panel, row, 2, kind); break;
#if TILE_ROWS > 3
    case 3: multiply_tile(job, panel, row, 3, kind); break;
    case 4: multiply_tile(job, panel, row, 4, kind); break;
    case 5: multiply_tile(job, panel, row, 5, kind); break;
#endif
    default: break;
    }
}

/* Multiply the only row with `panels` panels at once: so many places of memory are read ahead by the machine. */
INLINE void multiply_row(const struct product_job *job, int64_t panel, int panels, int kind) {
    int64_t steps = job->inputs / (kind == FLOAT32 ? 1 : kind == BFLOAT16 ? 2 : 4), stride = steps * PANEL * 4;
    const char *weights = job->weight + panel * stride;
    vf totals[MOST_PANELS][VECTORS];
    _Pragma("GCC unroll 4")
    for (int p = 0; p < panels; p++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            totals[p][vector] = (vf){0};
    for (int64_t step = 0; step < steps; step++) {
        uint32_t word;
        memcpy(&word, job->x + step * 4, sizeof word);
        _Pragma("GCC unroll 4")
        for (int p = 0; p < panels; p++)
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < VECTORS; vector++) {
                vf some = load(weights + p * stride, (step * VECTORS + vector) * LANES, 0);
                totals[p][vector] = add_step(totals[p][vector], some, word, kind);
            }
    }
    _Pragma("GCC unroll 4")
    for (int p = 0; p < panels; p++) {
        vf finished[1][VECTORS]; /* in memory, which `totals` never are */
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            finished[0][vector] = totals[p][vector];
        write_tile(job, panel + p, 0, 1, kind, finished);
    }
}

/* Cut the product of the only row: a piece is MOST_PANELS panels, at the end half as many and then one, as there are left
 * for each thread, so that all end together. Return how many pieces there are.
 */
INLINE int64_t cut_row(struct product_job *job, int threads) {
    enum { half = MOST_PANELS / 2 };
    int64_t left = panels_of(job), many = left - (MOST_PANELS - 1) * threads;
    job->large = many > 0 ? (many + MOST_PANELS - 1) / MOST_PANELS : 0;
    left -= job->large * MOST_PANELS;
    many = left - (half - 1) * threads;
    job->halved = many > 0 ? (many + half - 1) / half : 0;
    return job->large + job->halved + left - job->halved * half;
}

/* Return the first panel of a piece, and how many they are. */
INLINE int64_t panels_of_piece(const struct product_job *job, int64_t piece, int *panels) {
    int64_t halved = piece - job->large, single = halved - job->halved, first = job->large * MOST_PANELS;
    if (halved < 0) {
        *panels = MOST_PANELS;
        return piece * MOST_PANELS;
    }
    *panels = single < 0 ? MOST_PANELS / 2 : 1;
    return first + (single < 0 ? halved * (MOST_PANELS / 2) : job->halved * (MOST_PANELS / 2) + single);
}

static const char *weights_of_row(const void *argument, int64_t piece, int64_t *bytes) {
    const struct product_job *job = argument;
    int panels;
    int64_t panel = panels_of_piece(job, piece, &panels);
    *bytes = panels * job->panel_bytes;
    return job->weight + panel * job->panel_bytes;
}

INLINE void multiply_row_piece(const struct product_job *job, int64_t piece, int kind) {
    int panels;
    int64_t panel = panels_of_piece(job, piece, &panels);
    if (panels == MOST_PANELS)
        multiply_row(job, panel, MOST_PANELS, kind);
    else if (panels > 1)
        multiply_row(job, panel, MOST_PANELS / 2, kind);
    else
        multiply_row(job, panel, 1, kind);
}

static void multiply_one_row(void *argument, int64_t piece) {
    const struct product_job *job = argument;
    switch (job->kind) {
    case FLOAT32: multiply_row_piece(job, piece, FLOAT32); break;
    case BFLOAT16: multiply_row_piece(job, piece, BFLOAT16); break;
    default: multiply_row_piece(job, piece, INT8); break;
    }
}

static void multiply_piece(void *argument, int64_t piece) {
    const struct product_job *job = argument;
    int64_t first, last, panel = rows_of_piece(job, piece, &first, &last);
    switch (job->kind) {
    case FLOAT32: multiply_rows(job, panel, first, last, FLOAT32); break;
    case BFLOAT16: multiply_rows(job, panel, first, last, BFLOAT16); break;
    default: multiply_rows(job, panel, first, last, INT8); break;
    }
}

INLINE void multiply(struct product_job *job, int bits, int most_threads) {
    int threads = threads_for(job, most_threads);
    struct call call = product_call(multiply_piece, job, bits);
    if (job->rows == 1) {
        call.body = multiply_one_row;
        call.reads = weights_of_row;
        call.pieces = cut_row(job, threads);
    }
    run_call(&call, threads);
}

/* out = x @ weight + bias; x and bias are of the weight's type, out too or `wide`; inputs whole steps. */
EXPORT void slipstream_linear(const void *x, const void *weight, const void *bias, void *out, int64_t rows,
                              int64_t inputs, int64_t outputs, int64_t row_bytes, int bf16, int wide,
                              int threads) {
    struct product_job job = {.x = x, .weight = weight, .bias = bias, .out = out, .rows = rows, .inputs = inputs,
                              .outputs = outputs, .row_bytes = row_bytes, .kind = bf16 ? BFLOAT16 : FLOAT32,
                              .wide = wide};
    multiply(&job, bf16 ? 16 : 32, threads);
}

/* Of integers: x unsigned, with 128 added, each row with a scale; corrections are 128 times each output's sum of
 * weights; bias and out are bfloat16 or float32, or out is `wide`. corrections and scales [whole panels of outputs].
 */
EXPORT void slipstream_linear_int8(const void *x, const float *row_scales, const void *weight, const float *scales,
                                   const int32_t *corrections, const void *bias, void *out, int64_t rows,
                                   int64_t inputs, int64_t outputs, int bf16, int wide, int threads) {
    struct product_job job = {.x = x, .weight = weight, .bias = bias, .scales = scales, .corrections = corrections,
                              .row_scales = row_scales, .out = out, .rows = rows, .inputs = inputs,
                              .outputs = outputs, .row_bytes = inputs, .kind = INT8, .bf16 = bf16, .wide = wide};
    multiply(&job, 8, threads);
}
