/* The gated activation of MLPs: silu(gate) * up. */
#include "simd.h"
#include "team.h"

struct silu_job {
    const void *gate_up;
    void *out;
    int64_t size;
    int bf16;
};

INLINE vf silu(vf gate) {
    return gate / (1.0f + exponential(-gate));
}

/* silu is rounded before it is multiplied, as by the separate operations. */
INLINE void activate_row(const struct silu_job *job, int64_t row, int bf16) {
    int64_t size = job->size, whole = size / LANES * LANES, gate = row * 2 * size, up = gate + size;
    int rest = (int)(size - whole);
    for (int64_t i = 0; i < whole; i += LANES) {
        vf active = rounded(silu(load(job->gate_up, gate + i, bf16)), bf16);
        store(job->out, row * size + i, active * load(job->gate_up, up + i, bf16), bf16);
    }
    if (rest) {
        vf active = rounded(silu(load_part(job->gate_up, gate + whole, rest, bf16)), bf16);
        vf value = active * load_part(job->gate_up, up + whole, rest, bf16);
        store_part(job->out, row * size + whole, value, rest, bf16);
    }
}

static void activate_piece(void *job, int64_t row) {
    if (((struct silu_job *)job)->bf16)
        activate_row(job, row, 1);
    else
        activate_row(job, row, 0);
}

/* gate_up [rows, 2 * size], gate first; out [rows, size]; both contiguous. */
EXPORT void slipstream_silu_and_mul(const void *gate_up, void *out, int64_t rows, int64_t size, int bf16,
                                    int threads) {
    struct silu_job job = {.gate_up = gate_up, .out = out, .size = size, .bf16 = bf16};
    run_call(&CALL(activate_piece, job, rows), rows * size < 8192 ? 1 : threads);
}
