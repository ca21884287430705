/* The largest number of each row, and where it stands first. NaN counts as the largest. */
#include <math.h>

#include "simd.h"
#include "team.h"

struct largest_job {
    const float *values;
    float *best;
    int64_t *places;
    int64_t size, row_stride;
};

static void find_largest(void *argument, int64_t row) {
    const struct largest_job *job = argument;
    const float *values = job->values + row * job->row_stride;
    int64_t size = job->size, whole = size / LANES * LANES;
    vf highest = all(-INFINITY);
    vu broken = {0};
    for (int64_t i = 0; i < whole; i += LANES) {
        vf some = load(values, i, 0);
        broken |= (vu)(some != some);
        highest = larger(some, highest);
    }
    float best = largest(highest);
    for (int lane = 0; lane < LANES; lane++)
        if (broken[lane])
            best = NAN;
    for (int64_t i = whole; i < size; i++)
        if (values[i] > best || values[i] != values[i])
            best = values[i];
    int64_t place = 0;
    for (int found = 0; place < whole; place += LANES) {
        vf some = load(values, place, 0);
        vu same = best != best ? (vu)(some != some) : (vu)(some == best);
        for (int lane = 0; lane < LANES; lane++)
            found |= same[lane] != 0;
        if (found)
            break;
    }
    while (place < size - 1 && !(values[place] == best || (best != best && values[place] != values[place])))
        place++;
    job->best[row] = best;
    job->places[row] = place;
}

/* values [rows, size], rows `row_stride` numbers apart, at least one a row; best, places [rows]. */
EXPORT void slipstream_first_largest(const float *values, float *best, int64_t *places, int64_t rows, int64_t size,
                                     int64_t row_stride, int threads) {
    struct largest_job job = {.values = values, .best = best, .places = places, .size = size,
                              .row_stride = row_stride};
    run_call(&CALL(find_largest, job, rows), rows * size < 65536 ? 1 : threads);
}
