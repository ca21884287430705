/* Recordings: calls noted once, in their order, and run again and again as one job.
 *
 * Run by itself, a call gathers the team and lets it go. Here the threads stay together for the whole list. The pieces
 * of all calls are one row of tickets; a thread takes the next ticket, waits until the calls before its own are done,
 * and does the piece. So pieces are those of single calls, in the same order as far as any can tell, and which thread
 * does one changes no bits, as ever.
 *
 * A recording keeps a copy of each job, with the addresses that it was called with: what they point to is the
 * recorder's to keep. One thread at a time uses a recording.
 */
#include "record.h"

#include <sched.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define SPINS 4000 /* some hundred microseconds */
#define FETCHED_BYTES 65536 /* a part of a core's own cache */
#define FETCHED_AT_ONCE 512

struct entry {
    struct call call;
    const void *original;
    int64_t first, end; /* its tickets */
};

struct recording {
    struct entry *entries;
    int64_t count, room;
    int broken; /* something was done that is not in the list, or there was no memory to note it */
    /* On lines of their own: one is written by who takes, the other read by who waits. */
    int64_t next __attribute__((aligned(64)));
    int64_t done __attribute__((aligned(64)));
    char behind __attribute__((aligned(64)));
};

static __thread struct recording *current;

/* Return a new recording, or NULL without memory. */
EXPORT struct recording *slipstream_new_recording(void) {
    struct recording *recording;
    if (posix_memalign((void **)&recording, 64, sizeof *recording))
        return NULL;
    memset(recording, 0, sizeof *recording);
    return recording;
}

EXPORT void slipstream_free_recording(struct recording *recording) {
    for (int64_t i = 0; i < recording->count; i++)
        free(recording->entries[i].call.job);
    free(recording->entries);
    free(recording);
}

/* Let a recording note what this thread calls from now on; NULL: nothing more. */
EXPORT void slipstream_record(struct recording *recording) {
    current = recording;
}

/* Return how many calls a recording holds, or -1 if they are not all that was done. */
EXPORT int64_t slipstream_recorded_calls(const struct recording *recording) {
    return recording->broken ? -1 : recording->count;
}

static struct entry *new_entry(struct recording *recording) {
    if (recording->count == recording->room) {
        int64_t room = 2 * recording->room + 64;
        struct entry *entries = realloc(recording->entries, (size_t)room * sizeof *entries);
        if (!entries)
            return NULL;
        recording->entries = entries;
        recording->room = room;
    }
    return &recording->entries[recording->count];
}

void note_call(const struct call *call) {
    if (!current)
        return;
    struct entry *entry = new_entry(current);
    void *copy = malloc(call->job_bytes);
    if (!entry || !copy) {
        free(copy);
        current->broken = 1;
        return;
    }
    memcpy(copy, call->job, call->job_bytes);
    *entry = (struct entry){.call = *call, .original = call->job, .first = -1};
    entry->call.job = copy;
    current->count++;
}

void note_other_work(void) {
    if (current)
        current->broken = 1;
}

static inline void pause_a_little(void) {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* Wait until the calls before this one are done, and fetch what the piece will read meanwhile: nobody else reads memory
 * where one thread does a small call. A thread whose core another one needs gives it away: it may be that one's piece
 * which is waited for.
 */
static void wait_for(const struct recording *recording, const struct entry *entry, int64_t piece) {
    const char *next = NULL;
    int64_t left = 0;
    for (int64_t spins = 0; __atomic_load_n(&recording->done, __ATOMIC_ACQUIRE) < entry->first; spins++) {
        if (!spins && entry->call.reads) {
            next = entry->call.reads(entry->call.job, piece, &left);
            left = left < FETCHED_BYTES ? left : FETCHED_BYTES;
        }
        if (left > 0) {
            for (int64_t at = 0; at < FETCHED_AT_ONCE; at += 64)
                __builtin_prefetch(next + at, 0, 2);
            next += FETCHED_AT_ONCE;
            left -= FETCHED_AT_ONCE;
        } else if (spins < SPINS)
            pause_a_little();
        else
            sched_yield();
    }
}

static void do_tickets(void *argument) {
    struct recording *recording = argument;
    const struct entry *entry = recording->entries, *behind = entry + recording->count;
    int64_t total = behind[-1].end, finished = 0;
    for (;;) {
        int64_t ticket = __atomic_fetch_add(&recording->next, 1, __ATOMIC_RELAXED);
        if (ticket >= entry->end) { /* of another call than the piece before */
            if (finished)
                __atomic_fetch_add(&recording->done, finished, __ATOMIC_RELEASE);
            finished = 0;
            if (ticket >= total)
                return;
            while (ticket >= entry->end)
                entry++;
            wait_for(recording, entry, ticket - entry->first);
        }
        entry->call.body(entry->call.job, ticket - entry->first);
        finished++;
    }
}

/* Run all calls again, at least one. */
EXPORT void slipstream_replay(struct recording *recording, int threads) {
    int64_t total = 0;
    for (int64_t i = 0; i < recording->count; i++) {
        struct entry *entry = &recording->entries[i];
        if (entry->call.renew)
            entry->call.pieces = entry->call.renew(entry->call.job, entry->original);
        int64_t end = total + entry->call.pieces;
        if (entry->first != total || entry->end != end) { /* other threads have these lines: seldom written */
            entry->first = total;
            entry->end = end;
        }
        total = end;
    }
    recording->next = 0;
    recording->done = 0;
    fork_team(do_tickets, recording, threads);
}
