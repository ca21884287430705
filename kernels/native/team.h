/* Running jobs on torch's own team of threads.
 *
 * A second OpenMP runtime would keep a second team, and both would spin on the same cores. So nothing here is linked
 * with one: the loader looks up GOMP_parallel where torch has it (GNU's runtime, and Intel's and LLVM's under the same
 * name), and hands it over.
 */
#ifndef SLIPSTREAM_TEAM_H
#define SLIPSTREAM_TEAM_H

#include <stddef.h>
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

typedef void (*piece_function)(void *job, int64_t piece);

/* A job that is nothing but pieces, in a form that can be kept and run again: all that it needs to know is in `job`.
 *
 * renew: NULL, or for a job that another step has to change. It brings a kept copy up to the original, which is still
 * where it was, and returns how many pieces there are now. reads: NULL, or where a piece's own constants begin in memory
 * and how many bytes they are: who waits for the calls before may fetch them.
 */
struct call {
    piece_function body;
    void *job;
    size_t job_bytes;
    int64_t pieces;
    int64_t (*renew)(void *copy, const void *original);
    const char *(*reads)(const void *job, int64_t piece, int64_t *bytes);
};

#define CALL(body_, job_, pieces_) \
    ((struct call){.body = (body_), .job = &(job_), .job_bytes = sizeof(job_), .pieces = (pieces_)})

/* Do the pieces of a call, and return when all are done. A recording that is on notes the call (record.c). */
void run_call(const struct call *call, int threads);

/* Run body(job) on `threads` threads at once, and return when all have returned. Cannot be recorded. */
void run_on_team(void (*body)(void *), void *job, int threads);

#endif
