/* The gated activations of MLPs: gate * sigmoid(f(gate)) * up. */
#include "simd.h"
#include "team.h"

/* What f is: gate itself; that of GELU by its tanh, which is a sigmoid of twice as much; gate times alpha. The last
 * bounds gate above, and up on both sides, and adds one to it.
 */
enum kind { SILU, GELU_TANH, CLAMPED };

struct gate_job {
    const void *gate_up;
    void *out;
    int64_t size;
    float alpha, limit;
    int kind, bf16;
};

INLINE vf activated(const struct gate_job *job, vf gate, int kind) {
    vf inner = gate;
    if (kind == CLAMPED)
        inner = gate * job->alpha;
    if (kind == GELU_TANH)
        inner = (gate + gate * gate * gate * 0.044715f) * 1.5957691216f;
    return gate / (1.0f + exponential(-inner));
}

/* What is no number is not above the limit, and stays so. */
INLINE vf at_most(vf values, float limit) {
    return choose((vu)(values > limit), all(limit), values);
}

/* The activated gate is rounded before it is multiplied, as by separate operations. */
INLINE vf gated(const struct gate_job *job, vf gate, vf up, int kind, int bf16) {
    if (kind == CLAMPED) {
        gate = at_most(gate, job->limit);
        up = 1.0f - at_most(-at_most(up, job->limit), job->limit);
    }
    return rounded(activated(job, gate, kind), bf16) * up;
}

INLINE void activate_row(const struct gate_job *job, int64_t row, int kind, int bf16) {
    int64_t size = job->size, whole = size / LANES * LANES, gate = row * 2 * size, up = gate + size;
    int rest = (int)(size - whole);
    for (int64_t i = 0; i < whole; i += LANES) {
        vf value = gated(job, load(job->gate_up, gate + i, bf16), load(job->gate_up, up + i, bf16), kind, bf16);
        store(job->out, row * size + i, value, bf16);
    }
    if (rest) {
        vf value = gated(job, load_part(job->gate_up, gate + whole, rest, bf16),
                         load_part(job->gate_up, up + whole, rest, bf16), kind, bf16);
        store_part(job->out, row * size + whole, value, rest, bf16);
    }
}

static void activate_piece(void *argument, int64_t row) {
    const struct gate_job *job = argument;
    switch (2 * job->kind + (job->bf16 != 0)) {
    case 2 * SILU: activate_row(job, row, SILU, 0); break;
    case 2 * SILU + 1: activate_row(job, row, SILU, 1); break;
    case 2 * GELU_TANH: activate_row(job, row, GELU_TANH, 0); break;
    case 2 * GELU_TANH + 1: activate_row(job, row, GELU_TANH, 1); break;
    case 2 * CLAMPED: activate_row(job, row, CLAMPED, 0); break;
    case 2 * CLAMPED + 1: activate_row(job, row, CLAMPED, 1); break;
    }
}

/* gate_up [rows, 2 * size], gate first; out [rows, size]; both contiguous. alpha and limit: of CLAMPED alone. */
EXPORT void slipstream_gate_and_mul(const void *gate_up, void *out, int64_t rows, int64_t size, int kind, float alpha,
                                    float limit, int bf16, int threads) {
    struct gate_job job = {.gate_up = gate_up, .out = out, .size = size, .alpha = alpha, .limit = limit, .kind = kind,
                           .bf16 = bf16};
    run_call(&CALL(activate_piece, job, rows), rows * size < 8192 ? 1 : threads);
}

EXPORT void slipstream_silu_and_mul(const void *gate_up, void *out, int64_t rows, int64_t size, int bf16,
                                    int threads) {
    slipstream_gate_and_mul(gate_up, out, rows, size, SILU, 1.0f, 0.0f, bf16, threads);
}
