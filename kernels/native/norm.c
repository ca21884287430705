/* RMSNorm, with or without the residual addition before it: one pass over a row that fits the cache. */
#include <math.h>

#include "simd.h"
#include "team.h"

struct norm_job {
    const void *x, *residual, *weight;
    void *total, *out;
    int64_t heads, size, row_stride, out_stride, weight_stride;
    float epsilon;
    int bf16, wide_weight;
    int64_t rows_at_once, rows;
};

/* Normalize one run of `size` numbers. Roundings are those of the separate operations: the sum is stored, the scaled
 * value is rounded before it is multiplied with the weight, but for one of float32 beside bfloat16 (`wide`).
 */
INLINE void normalize(const struct norm_job *job, int64_t from, int64_t to, int64_t weight, int bf16, int wide) {
    int64_t size = job->size, whole = size / LANES * LANES;
    int rest = (int)(size - whole);
    const void *values = job->x;
    int64_t start = from;
    vf squares[4] = {{0}};
    if (job->residual) {
        values = job->total;
        start = to;
    }
    for (int64_t i = 0, turn = 0; i < size; i += LANES, turn++) {
        int part = i == whole;
        vf value = part ? load_part(job->x, from + i, rest, bf16) : load(job->x, from + i, bf16);
        if (job->residual) {
            vf other = part ? load_part(job->residual, to + i, rest, bf16) : load(job->residual, to + i, bf16);
            value = rounded(value + other, bf16);
            if (part)
                store_part(job->total, to + i, value, rest, bf16);
            else
                store(job->total, to + i, value, bf16);
        }
        squares[turn & 3] = squares[turn & 3] + value * value;
    }
    float mean = sum((squares[0] + squares[1]) + (squares[2] + squares[3])) / (float)size;
    vf scale = all(1.0f / sqrtf(mean + job->epsilon));
    for (int64_t i = 0; i < whole; i += LANES) {
        vf value = rounded(load(values, start + i, bf16) * scale, bf16 && !wide);
        store(job->out, to + i, value * load(job->weight, weight + i, bf16 && !wide), bf16);
    }
    if (rest) {
        vf value = rounded(load_part(values, start + whole, rest, bf16) * scale, bf16 && !wide);
        vf factor = load_part(job->weight, weight + whole, rest, bf16 && !wide);
        store_part(job->out, to + whole, value * factor, rest, bf16);
    }
}

static void normalize_piece(void *argument, int64_t piece) {
    const struct norm_job *job = argument;
    int64_t first = piece * job->rows_at_once, last = first + job->rows_at_once;
    for (int64_t row = first; row < last && row < job->rows; row++)
        for (int64_t head = 0; head < job->heads; head++) {
            int64_t from = row * job->row_stride + head * job->size;
            int64_t to = row * job->out_stride + head * job->size;
            if (job->bf16 && job->wide_weight)
                normalize(job, from, to, head * job->weight_stride, 1, 1);
            else if (job->bf16)
                normalize(job, from, to, head * job->weight_stride, 1, 0);
            else
                normalize(job, from, to, head * job->weight_stride, 0, 0);
        }
}

/* x, out [rows, heads, size], rows `row_stride` and `out_stride` numbers apart; both may be the same memory. residual
 * NULL or, like total and out, contiguous; total = x + residual, out = its norm; weight [size] (weight_stride 0) or
 * [heads, size]; of float32 if `wide_weight`, else of the type of x.
 */
EXPORT void slipstream_rms_norm(const void *x, const void *residual, const void *weight, void *total, void *out,
                                int64_t rows, int64_t heads, int64_t size, int64_t row_stride, int64_t out_stride,
                                int64_t weight_stride, float epsilon, int bf16, int wide_weight, int threads) {
    struct norm_job job = {.x = x, .residual = residual, .weight = weight, .total = total, .out = out, .heads = heads,
                           .size = size, .row_stride = row_stride, .out_stride = out_stride,
                           .weight_stride = weight_stride, .epsilon = epsilon, .bf16 = bf16, .wide_weight = wide_weight,
                           .rows = rows};
    int64_t row_numbers = heads * size;
    job.rows_at_once = 1 + 4096 / (row_numbers + 1);
    int64_t pieces = (rows + job.rows_at_once - 1) / job.rows_at_once;
    run_call(&CALL(normalize_piece, job, pieces), rows * row_numbers < 16384 ? 1 : threads);
}
