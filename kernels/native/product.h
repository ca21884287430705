/* What the products with weights have in common: how a product is cut into pieces, and how results are written.
 *
 * Outputs come in panels of PANEL, the vectors of a panel side by side for each step through the inputs. A piece is one
 * panel and up to PIECE_ROWS rows: the panel stays in cache for all its rows. Every output adds up its inputs one after
 * the other, whatever rows stand beside it: a row's bits do not depend on their number.
 */
#ifndef SLIPSTREAM_PRODUCT_H
#define SLIPSTREAM_PRODUCT_H

#include "simd.h"
#include "team.h"

#define VECTORS 4
#define PANEL (VECTORS * LANES)
#define PIECE_ROWS 48

/* x [rows, inputs], rows `row_bytes` apart; out [rows, outputs] contiguous; bias [outputs] or NULL. scales: of groups
 * (int4), or of outputs (int8), whose `corrections` are subtracted from the integers and whose `row_scales` are those
 * of x.
 */
struct product_job {
    const char *x;
    const char *weight;
    const void *bias, *scales;
    const int32_t *corrections;
    const float *row_scales;
    void *out;
    int64_t rows, inputs, outputs, row_bytes, panel_bytes;
    int64_t large, halved; /* of one row's pieces: linear_panels.c */
    int kind, bf16, wide; /* wide: out is float32 whatever x is */
};

INLINE int64_t panels_of(const struct product_job *job) {
    return (job->outputs + PANEL - 1) / PANEL;
}

/* Return the panel of a piece, and its rows. */
INLINE int64_t rows_of_piece(const struct product_job *job, int64_t piece, int64_t *first, int64_t *last) {
    int64_t chunks = (job->rows + PIECE_ROWS - 1) / PIECE_ROWS;
    *first = piece % chunks * PIECE_ROWS;
    *last = *first + PIECE_ROWS < job->rows ? *first + PIECE_ROWS : job->rows;
    return piece / chunks;
}

static const char *weights_of_piece(const void *argument, int64_t piece, int64_t *bytes) {
    const struct product_job *job = argument;
    int64_t first, last, panel = rows_of_piece(job, piece, &first, &last);
    *bytes = job->panel_bytes;
    return job->weight + panel * job->panel_bytes;
}

/* Return the call that multiplies with weights of `bits` bits, a piece being a panel and some rows. */
INLINE struct call product_call(piece_function body, struct product_job *job, int bits) {
    int64_t chunks = (job->rows + PIECE_ROWS - 1) / PIECE_ROWS;
    job->panel_bytes = job->inputs * PANEL * bits / 8;
    struct call call = CALL(body, *job, panels_of(job) * chunks);
    call.reads = weights_of_piece;
    return call;
}

INLINE int threads_for(const struct product_job *job, int threads) {
    return job->rows * job->inputs * job->outputs < 65536 ? 1 : threads;
}

/* Write LANES outputs of a row, from output `first` on; those beyond the last one are none. */
SELDOM void write_outputs(const struct product_job *job, int64_t row, int64_t first, vf values, int bf16) {
    int64_t left = job->outputs - first;
    if (left <= 0)
        return;
    int count = left < LANES ? (int)left : LANES;
    if (job->bias)
        values = values + load_up_to(job->bias, first, count, bf16);
    store_up_to(job->out, row * job->outputs + first, values, count, bf16 && !job->wide);
}

#endif
