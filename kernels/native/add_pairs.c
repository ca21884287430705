/* Parts of a sum, added up as a tree: neighbours first, then neighbouring sums, to the last one. */
#include "simd.h"
#include "team.h"

#define MOST_PARTS 8
#define PIECE 4096

struct pairs_job {
    const float *parts[MOST_PARTS];
    void *out;
    int64_t count, numbers;
    int bf16;
};

INLINE void add_vector(const struct pairs_job *job, int64_t at, int count) {
    vf sums[MOST_PARTS];
    for (int64_t part = 0; part < job->count; part++)
        sums[part] = load_up_to(job->parts[part], at, count, 0);
    for (int64_t left = job->count; left > 1; left /= 2)
        for (int64_t pair = 0; pair < left / 2; pair++)
            sums[pair] = sums[2 * pair] + sums[2 * pair + 1];
    store_up_to(job->out, at, sums[0], count, job->bf16);
}

static void add_piece(void *argument, int64_t piece) {
    const struct pairs_job *job = argument;
    int64_t at = piece * PIECE, end = at + PIECE < job->numbers ? at + PIECE : job->numbers;
    for (; at + LANES <= end; at += LANES)
        add_vector(job, at, LANES);
    if (at < end)
        add_vector(job, at, (int)(end - at));
}

/* parts: `count` arrays (a power of two, at most MOST_PARTS) of float32; out float32, or bfloat16. */
EXPORT void slipstream_add_pairs(const float *const *parts, void *out, int64_t count, int64_t numbers, int bf16,
                                 int threads) {
    struct pairs_job job = {.out = out, .count = count, .numbers = numbers, .bf16 = bf16};
    memcpy(job.parts, parts, (size_t)count * sizeof *parts);
    run_call(&CALL(add_piece, job, (numbers + PIECE - 1) / PIECE), numbers < 2 * PIECE ? 1 : threads);
}
