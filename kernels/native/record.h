/* What team.c and record.c know of each other. */
#ifndef SLIPSTREAM_RECORD_H
#define SLIPSTREAM_RECORD_H

#include "team.h"

/* Run body(job) on `threads` threads at once, recorded by nobody. */
void fork_team(void (*body)(void *), void *job, int threads);

/* Note a call in the recording that this thread has on, if it has. */
void note_call(const struct call *call);

/* Note that something is done which no recording holds. */
void note_other_work(void);

#endif
