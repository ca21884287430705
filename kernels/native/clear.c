/* Runs of memory set to zero. */
#include <string.h>

#include "team.h"

struct clear_job {
    char *const *places;
    size_t bytes;
};

static void clear_run(void *argument, int64_t run) {
    const struct clear_job *job = argument;
    memset(job->places[run], 0, job->bytes);
}

/* Clear `bytes` bytes at each of the places. */
EXPORT void slipstream_clear(char *const *places, int64_t count, int64_t bytes, int threads) {
    struct clear_job job = {.places = places, .bytes = (size_t)bytes};
    run_call(&CALL(clear_run, job, count), count * bytes < 1 << 17 ? 1 : threads);
}
