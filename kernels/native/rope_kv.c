/* Rotary positions of queries and keys, and keys and values to their places in the cache: one pass over a token. */
#include "simd.h"
#include "team.h"

struct rope_job {
    void *qkv, *cache;
    const void *cosines, *sines;
    const int64_t *cache_rows;
    int64_t token_stride, heads, kv_heads, head_size;
    int bf16;
};

/* Rotate the pairs (d, d + half) of a head; both may be the same memory. */
INLINE void rotate(const void *head, int64_t from, void *target, int64_t to, const void *cosines, const void *sines,
                   int64_t angles, int64_t half, int bf16) {
    for (int64_t d = 0; d < half; d += LANES) {
        int count = half - d < LANES ? (int)(half - d) : LANES;
        vf low = load_up_to(head, from + d, count, bf16), high = load_up_to(head, from + half + d, count, bf16);
        vf low_cos = load_up_to(cosines, angles + d, count, bf16);
        vf high_cos = load_up_to(cosines, angles + half + d, count, bf16);
        vf low_sin = load_up_to(sines, angles + d, count, bf16);
        vf high_sin = load_up_to(sines, angles + half + d, count, bf16);
        /* The product with the cosine is rounded, as by the separate operations. */
        vf low_product = rounded(low * low_cos, bf16), high_product = rounded(high * high_cos, bf16);
        store_up_to(target, to + d, low_product + high * low_sin, count, bf16);
        store_up_to(target, to + half + d, high_product + low * high_sin, count, bf16);
    }
}

INLINE void place_token(const struct rope_job *job, int64_t token, int bf16) {
    int64_t size = job->head_size, half = size / 2, first = token * job->token_stride, angles = token * size;
    int64_t bytes = bf16 ? 2 : 4;
    const int64_t *rows = job->cache_rows + token * 2 * job->kv_heads;
    for (int64_t head = 0; head < job->heads; head++)
        rotate(job->qkv, first + head * size, job->qkv, first + head * size, job->cosines, job->sines, angles, half,
               bf16);
    const int64_t keys = first + job->heads * size, values = keys + job->kv_heads * size;
    for (int64_t head = 0; head < job->kv_heads; head++) {
        rotate(job->qkv, keys + head * size, job->cache, rows[head] * size, job->cosines, job->sines, angles, half,
               bf16);
        memcpy((char *)job->cache + rows[job->kv_heads + head] * size * bytes,
               (const char *)job->qkv + (values + head * size) * bytes, (size_t)(size * bytes));
    }
}

static void place_piece(void *job, int64_t token) {
    if (((struct rope_job *)job)->bf16)
        place_token(job, token, 1);
    else
        place_token(job, token, 0);
}

/* qkv [tokens, heads + 2 * kv_heads, head_size], tokens `token_stride` numbers apart: queries are rotated in place,
 * rotated keys and values go to rows `cache_rows` [tokens, 2 * kv_heads] of the cache. cosines, sines [tokens,
 * head_size], the first half of the sines negated. No two tokens have a row in common.
 */
EXPORT void slipstream_rope_kv(void *qkv, const void *cosines, const void *sines, const int64_t *cache_rows,
                               void *cache, int64_t tokens, int64_t token_stride, int64_t heads, int64_t kv_heads,
                               int64_t head_size, int bf16, int threads) {
    struct rope_job job = {.qkv = qkv, .cache = cache, .cosines = cosines, .sines = sines, .cache_rows = cache_rows,
                           .token_stride = token_stride, .heads = heads, .kv_heads = kv_heads,
                           .head_size = head_size, .bf16 = bf16};
    int64_t numbers = tokens * (heads + 2 * kv_heads) * head_size;
    run_call(&CALL(place_piece, job, tokens), numbers < 8192 ? 1 : threads);
}
