/* Running a job on torch's own team of threads.
 *
 * A second OpenMP runtime would keep a second team, and both would spin on the same cores. So nothing here is linked
 * with one: the loader looks up GOMP_parallel where torch has it (GNU's runtime, and Intel's and LLVM's under the same
 * name), and hands it over.
 */
#ifndef SLIPSTREAM_TEAM_H
#define SLIPSTREAM_TEAM_H

#include <stdint.h>

#define EXPORT __attribute__((visibility("default")))

/* Pieces of work that whoever comes takes next: which thread does a piece must change no bits. */
struct pieces {
    int64_t next, count;
};

/* Return the next piece, or -1 when there is none left. */
static inline int64_t take_piece(struct pieces *pieces) {
    int64_t piece = __atomic_fetch_add(&pieces->next, 1, __ATOMIC_RELAXED);
    return piece < pieces->count ? piece : -1;
}

/* Run body(job) on `threads` threads at once, and return when all have returned. */
void run_on_team(void (*body)(void *), void *job, int threads);

#endif
