/* Attention of queries to one span of keys: what decoding and prefill have in common.
 *
 * Spans stand at fixed positions. A key's place is its position within its span, and every sum goes over places in one
 * order: over a query's numbers for a score, over lanes and then groups of places for the sum of weights, over places
 * for the values. What a query does not see counts exactly nothing. So a position gives the same bits whether it is
 * decoded or computed with any others. What could round in two ways is compiled once, in attention_span.c.
 */
#ifndef SLIPSTREAM_ATTENTION_SPAN_H
#define SLIPSTREAM_ATTENTION_SPAN_H

#include <math.h>

#include "simd.h"
#include "team.h"

#define SPAN_KEYS 256
/* Numbers of a head, filled up to whole vectors on every machine. */
#define FILLED(size) (((size) + 15) / 16 * 16)

/* A layer's cache, [2, num_blocks, kv_heads, block_size, head_size]; keys that are values too have 0 num_blocks between
 * the one and the other.
 */
struct cache {
    const char *numbers;
    int64_t num_blocks, kv_heads, block_size, head_size;
    int bf16;
};

/* Return whether numbers are multiplied two by two, as bfloat16; else they are float32, or made so. */
INLINE int in_pairs(const struct cache *cache) {
    return BF16_PRODUCTS && cache->bf16 && cache->head_size % 32 == 0;
}

/* Return how many words of 4 bytes a key is multiplied as. */
INLINE int64_t words_of(const struct cache *cache) {
    return in_pairs(cache) ? cache->head_size / 2 : cache->head_size;
}

INLINE int64_t row_bytes_of(const struct cache *cache) {
    return cache->head_size * (cache->bf16 ? 2 : 4);
}

INLINE int64_t value_offset_of(const struct cache *cache) {
    return cache->num_blocks * cache->kv_heads * cache->block_size * row_bytes_of(cache);
}

INLINE int round_down(int number, int unit) {
    return number / unit * unit;
}

INLINE int round_up(int number, int unit) {
    return (number + unit - 1) / unit * unit;
}

/* Find the keys at places `first` to `last` of the span that begins at position `start`. Those of the places around
 * them, up to whole `unit`s, become the nearest of them: they can be read, and are to count nothing.
 */
void find_keys(const struct cache *cache, const int32_t *table, int64_t head, int64_t start, int first, int last,
               int unit, const char *rows[SPAN_KEYS]);

/* Turn the scores of places `first` to `last` into weights relative to the largest, which is returned with the sum of
 * the weights. Places around them, up to whole vectors, become zero. Scores first become soft_cap * tanh(score /
 * soft_cap), unless `soft_cap` is 0.
 */
void weigh(float *scores, int first, int last, float soft_cap, float *peak, float *total);

/* What a query has attended to so far: its largest score, and the sum of weights relative to it. */
struct so_far {
    float peak, total;
};

/* Return where query head `head` begins: with its sink, a score without a value, where there are `sinks`. */
INLINE struct so_far nothing_so_far(const float *sinks, int64_t head) {
    return sinks ? (struct so_far){.peak = sinks[head], .total = 1} : (struct so_far){.peak = -INFINITY, .total = 0};
}

/* Take in a span with its `peak` and `total`. Return in `kept` and `share` what earlier results and the span's are to
 * be multiplied by.
 */
void take_span(struct so_far *so_far, float peak, float total, float *kept, float *share);

/* Add a span's weighted values to earlier ones, which begin as zeros. All are filled up to whole vectors. */
void add_span(float *result, const float *span, int64_t size, float kept, float share);

/* Write a query's result, which is at place `to` of `out`. */
void write_result(const struct so_far *so_far, const float *result, int64_t size, void *out, int64_t to, int bf16);

/* Round the weights of places `low` to `high`, whole vectors, to bfloat16. Without BF16_PRODUCTS nobody needs it. */
void halve_weights(const float *weights, int low, int high, uint16_t *halves);

#endif
