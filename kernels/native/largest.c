/* The largest number of each row, and where it stands first. NaN counts as the largest.
 *
 * A row is read once, block by block; then the block that holds the largest is searched for its place.
 */
#include <math.h>

#include "simd.h"
#include "team.h"

#define BLOCK 1024

struct largest_job {
    const float *values;
    float *best;
    int64_t *places;
    int64_t size, row_stride;
};

/* Return the largest of a block, or NaN if one of its numbers is. */
INLINE float block_largest(const float *values, int64_t size) {
    enum { vectors = 4 };
    vf highest[vectors];
    vu broken[vectors];
    for (int v = 0; v < vectors; v++) {
        highest[v] = all(-INFINITY);
        broken[v] = (vu){0};
    }
    int64_t i = 0;
    for (; i + vectors * LANES <= size; i += vectors * LANES)
        _Pragma("GCC unroll 4")
        for (int v = 0; v < vectors; v++) {
            vf some = load(values, i + v * LANES, 0);
            broken[v] |= (vu)(some != some);
            highest[v] = larger(some, highest[v]);
        }
    float best = largest(larger(larger(highest[0], highest[1]), larger(highest[2], highest[3])));
    vu any = (broken[0] | broken[1]) | (broken[2] | broken[3]);
    for (int lane = 0; lane < LANES; lane++)
        if (any[lane])
            return NAN;
    for (; i < size; i++) {
        if (values[i] != values[i])
            return NAN;
        best = values[i] > best ? values[i] : best;
    }
    return best;
}

static void find_largest(void *argument, int64_t row) {
    const struct largest_job *job = argument;
    const float *values = job->values + row * job->row_stride;
    float best = -INFINITY;
    int64_t place = 0;
    for (int64_t first = 0; first < job->size; first += BLOCK) {
        float own = block_largest(values + first, job->size - first < BLOCK ? job->size - first : BLOCK);
        if (own > best || own != own) {
            best = own;
            place = first;
        }
        if (own != own)
            break;
    }
    while (!(values[place] == best || (best != best && values[place] != values[place])))
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
