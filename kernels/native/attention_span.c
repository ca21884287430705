/* The parts of a span's attention that decoding and prefill must compute to the same bits: compiled once for both. */
#include "attention_span.h"

void find_keys(const struct cache *cache, const int32_t *table, int64_t head, int64_t start, int first, int last,
               int unit, const char *rows[SPAN_KEYS]) {
    int64_t row_bytes = row_bytes_of(cache), block_size = cache->block_size;
    int64_t block = (start + first) / block_size, place_in_block = (start + first) % block_size;
    int place = first;
    while (place < last) {
        const char *keys = cache->numbers
                         + ((int64_t)table[block++] * cache->kv_heads + head) * block_size * row_bytes;
        for (; place_in_block < block_size && place < last; place_in_block++)
            rows[place++] = keys + place_in_block * row_bytes;
        place_in_block = 0;
    }
    for (place = round_down(first, unit); place < first; place++)
        rows[place] = rows[first];
    for (place = last; place < round_up(last, unit); place++)
        rows[place] = rows[last - 1];
}

/* The hyperbolic tangent. Near zero 1 - 2 / (1 + e^2x), which is right for the largest numbers, has few digits left. */
INLINE vf tangent(vf x) {
    vf square = x * x;
    vf series = square * (-17.0f / 315) + 2.0f / 15;
    series = x + x * (square * (series * square - 1.0f / 3));
    vf far = 1.0f - 2.0f / (1.0f + exponential(x + x));
    return choose((vu)(square < 0.04f), series, far);
}

void weigh(float *scores, int first, int last, float soft_cap, float *peak, float *total) {
    int low = round_down(first, LANES), high = round_up(last, LANES);
    if (soft_cap > 0)
        for (int place = low; place < high; place += LANES)
            store(scores, place, tangent(load(scores, place, 0) / soft_cap) * soft_cap, 0);
    for (int place = low; place < first; place++)
        scores[place] = -INFINITY;
    for (int place = last; place < high; place++)
        scores[place] = -INFINITY;
    vf highest = all(-INFINITY), totals = {0};
    for (int place = low; place < high; place += LANES)
        highest = larger(load(scores, place, 0), highest);
    float top = largest(highest);
    for (int place = low; place < high; place += LANES) {
        vf weights = exponential(load(scores, place, 0) - top);
        if (place < first || place + LANES > last) {
            float own[LANES];
            memcpy(own, &weights, sizeof own);
            for (int i = 0; i < LANES; i++)
                own[i] = place + i < first || place + i >= last ? 0.0f : own[i];
            memcpy(&weights, own, sizeof own);
        }
        totals = totals + weights;
        store(scores, place, weights, 0);
    }
    *peak = top;
    *total = sum(totals);
}

void take_span(struct so_far *so_far, float peak, float total, float *kept, float *share) {
    float highest = peak > so_far->peak ? peak : so_far->peak;
    vf powers = {so_far->peak - highest, peak - highest};
    powers = exponential(powers);
    *kept = powers[0];
    *share = powers[1];
    so_far->peak = highest;
    so_far->total = so_far->total * *kept + total * *share;
}

void add_span(float *result, const float *span, int64_t size, float kept, float share) {
    for (int64_t i = 0; i < size; i += LANES)
        store(result, i, load(result, i, 0) * kept + load(span, i, 0) * share, 0);
}

void write_result(const struct so_far *so_far, const float *result, int64_t size, void *out, int64_t to, int bf16) {
    for (int64_t i = 0; i < size; i += LANES) {
        int count = size - i < LANES ? (int)(size - i) : LANES;
        store_up_to(out, to + i, load(result, i, 0) / so_far->total, count, bf16);
    }
}

void halve_weights(const float *weights, int low, int high, uint16_t *halves) {
#if BF16_PRODUCTS
    for (int place = low; place < high; place += LANES) {
        __m256bh some = _mm512_cvtneps_pbh((__m512)load(weights, place, 0));
        memcpy(halves + place, &some, sizeof some);
    }
#endif
}
