#include "team.h"

#include "record.h"

typedef void (*parallel_function)(void (*body)(void *), void *job, unsigned threads, unsigned flags);

static parallel_function parallel;

EXPORT void slipstream_set_parallel(parallel_function function) {
    parallel = function;
}

void fork_team(void (*body)(void *), void *job, int threads) {
    /* All or one: GNU's runtime ends the threads that a smaller team leaves over. */
    if (threads > 1)
        parallel(body, job, (unsigned)threads, 0);
    else
        body(job);
}

void run_on_team(void (*body)(void *), void *job, int threads) {
    note_other_work();
    fork_team(body, job, threads);
}

struct running {
    const struct call *call;
    struct pieces pieces;
};

static void do_pieces(void *argument) {
    struct running *running = argument;
    for (int64_t piece; (piece = take_piece(&running->pieces)) >= 0;)
        running->call->body(running->call->job, piece);
}

void run_call(const struct call *call, int threads) {
    note_call(call);
    struct running running = {.call = call, .pieces = {.count = call->pieces}};
    fork_team(do_pieces, &running, threads);
}

static void count_thread(void *job) {
    __atomic_fetch_add((int64_t *)job, 1, __ATOMIC_RELAXED);
}

/* Return how many threads a team of `threads` really has. */
EXPORT int64_t slipstream_team_size(int threads) {
    int64_t counted = 0;
    run_on_team(count_thread, &counted, threads);
    return counted;
}
