/* Rows as 8-bit integers: each row divided by a scale of its own, its largest number being 127; 128 is added. */
#include <math.h>

#include "simd.h"
#include "team.h"

struct quantize_job {
    const void *x;
    uint8_t *integers;
    float *scales;
    int64_t size, row_stride;
    int bf16;
};

INLINE vf absolute(vf values) {
    return (vf)((vu)values & 0x7fffffff);
}

INLINE void quantize_row(const struct quantize_job *job, int64_t row, int bf16) {
    int64_t size = job->size, from = row * job->row_stride;
    vf highest = {0};
    vu broken = {0};
    for (int64_t i = 0; i < size; i += LANES) {
        int count = size - i < LANES ? (int)(size - i) : LANES;
        vf values = absolute(load_up_to(job->x, from + i, count, bf16));
        broken |= (vu)(values != values);
        highest = larger(values, highest);
    }
    float scale = largest(highest) / 127.0f;
    scale = scale < 1e-12f ? 1e-12f : scale;
    for (int lane = 0; lane < LANES; lane++)
        if (broken[lane])
            scale = NAN; /* the whole row is no number then, and is found out later */
    job->scales[row] = scale;
    uint8_t *target = job->integers + row * size;
    for (int64_t i = 0; i < size; i += LANES) {
        int count = size - i < LANES ? (int)(size - i) : LANES;
        /* Adding 1.5 * 2^23 rounds to an integer, ties to even, which then stands in the lowest bits. */
        vf shifted = load_up_to(job->x, from + i, count, bf16) / scale + 12582912.0f;
        vu words = ((vu)shifted + 128) & 0xff;
        for (int lane = 0; lane < count; lane++)
            target[i + lane] = (uint8_t)words[lane];
    }
}

static void quantize_piece(void *job, int64_t row) {
    if (((struct quantize_job *)job)->bf16)
        quantize_row(job, row, 1);
    else
        quantize_row(job, row, 0);
}

/* x [rows, size], rows `row_stride` numbers apart; integers [rows, size]; scales [rows]. */
EXPORT void slipstream_quantize_rows(const void *x, uint8_t *integers, float *scales, int64_t rows, int64_t size,
                                     int64_t row_stride, int bf16, int threads) {
    struct quantize_job job = {.x = x, .integers = integers, .scales = scales, .size = size,
                               .row_stride = row_stride, .bf16 = bf16};
    run_call(&CALL(quantize_piece, job, rows), rows * size < 16384 ? 1 : threads);
}
