/* Attention of rows with one query over the paged cache, reading keys and values where they are.
 *
 * The work is cut into units of one row, one KV head and one span of keys, the spans at fixed positions. Whoever
 * finishes the last span of a row's KV head adds them up, in their order: a row's bits depend on its own keys alone,
 * and are those that prefill gives. Only keys and values that the row sees are read.
 */
#include "attention_span.h"

#define HEADS_AT_ONCE 4

/* What a step's layers have in common, and then what one layer has. The loader has the same structure.
 *
 * A cache is [2, num_blocks, kv_heads, block_size, head_size]. Items are a row's spans: item_rows [items], and
 * first_items [rows + 1], the items before each row's. partials [items, kv_heads, group, PARTIAL_NUMBERS]; open [rows,
 * kv_heads], the spans that are left to do, which is full again at the end.
 */
struct decode_job {
    const int32_t *tables, *item_rows, *first_items;
    const int64_t *tokens, *positions, *lowest_seen;
    float *partials;
    int32_t *open;
    int64_t table_columns, num_blocks, kv_heads, group, block_size, head_size, items;
    int64_t query_stride; /* numbers from one token's queries to the next */
    int32_t bf16, threads;
    const void *queries, *cache;
    void *out;
    float scale, soft_cap; /* as of `weigh` */
    const float *sinks;    /* NULL, or one of each query head */
};

/* A span's result for one query: its weighted values, its largest score and the sum of its weights. */
#define PARTIAL_NUMBERS(size) (FILLED(size) + 16)

struct span {
    const struct decode_job *job;
    struct cache cache;
    int first, last;                 /* the places that the row sees */
    const char *key_rows[SPAN_KEYS]; /* whole vectors of keys */
};

INLINE int64_t first_span_of(const struct decode_job *job, int64_t row) {
    return job->lowest_seen[row] / SPAN_KEYS;
}

SELDOM void prepare_span(struct span *span, int64_t row, int64_t head, int64_t ordinal) {
    const struct decode_job *job = span->job;
    int64_t start = (first_span_of(job, row) + ordinal) * SPAN_KEYS;
    int64_t first = job->lowest_seen[row] - start, last = job->positions[row] + 1 - start;
    span->cache = (struct cache){.numbers = job->cache, .num_blocks = job->num_blocks, .kv_heads = job->kv_heads,
                                 .block_size = job->block_size, .head_size = job->head_size, .bf16 = job->bf16};
    span->first = first > 0 ? (int)first : 0;
    span->last = last < SPAN_KEYS ? (int)last : SPAN_KEYS;
    find_keys(&span->cache, job->tables + row * job->table_columns, head, start, span->first, span->last,
              LANES, span->key_rows);
}

INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(row + at);
}

/* Write the scaled scores of `heads` queries with LANES keys, which are laid side by side in registers. `x` has the
 * queries' words, which are added up one after the other.
 */
INLINE void score_keys(const struct span *span, const char *x, int place, int heads, int widened, int pairs,
                       float scores[][SPAN_KEYS]) {
    int64_t words = words_of(&span->cache);
    const char *const *rows = span->key_rows + place;
    const char *const *next = place + LANES < span->last ? rows + LANES : rows;
    vf totals[HEADS_AT_ONCE];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        totals[head] = (vf){0};
    for (int64_t i = 0; i < words; i += LANES) {
        int count = words - i < LANES ? (int)(words - i) : LANES;
        vf square[LANES];
        _Pragma("GCC unroll 16")
        for (int key = 0; key < LANES; key++) {
            __builtin_prefetch(next[key] + i * (widened ? 2 : 4));
            square[key] = load_up_to(rows[key], i, count, widened);
        }
        transpose(square);
        _Pragma("GCC unroll 16")
        for (int j = 0; j < LANES; j++) {
            if (j >= count)
                break;
            _Pragma("GCC unroll 4")
            for (int head = 0; head < heads; head++) {
                uint32_t word;
                memcpy(&word, x + (head * words + i + j) * 4, sizeof word);
                totals[head] = add_products(totals[head], square[j], word, pairs);
            }
        }
    }
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        store(scores[head], place, totals[head] * span->job->scale, 0);
}

INLINE void score_some(const struct span *span, const char *x, int heads, int widened, int pairs,
                       float scores[][SPAN_KEYS]) {
    int high = round_up(span->last, LANES);
    for (int place = round_down(span->first, LANES); place < high; place += LANES)
        score_keys(span, x, place, heads, widened, pairs, scores);
}

/* Write scaled scores of `heads` queries. */
INLINE void score(const struct span *span, const void *queries, int heads, float scores[][SPAN_KEYS]) {
    int64_t words = words_of(&span->cache);
    if (in_pairs(&span->cache)) {
        score_some(span, queries, heads, 0, 1, scores);
    } else if (span->cache.bf16) {
        float wide[HEADS_AT_ONCE * words];
        for (int64_t i = 0; i < heads * words; i++)
            wide[i] = widen_one(((const uint16_t *)queries)[i]);
        score_some(span, (const char *)wide, heads, 1, 0, scores);
    } else {
        score_some(span, queries, heads, 0, 0, scores);
    }
}

/* Add up four vectors of the values from number `first` on, weighted, for each head: out[head][first ...]. */
INLINE void sum_values(const struct span *span, float weights[][SPAN_KEYS], int heads, int64_t first,
                       float *out, int64_t out_stride, int bf16) {
    enum { vectors = 4 };
    vf totals[HEADS_AT_ONCE][vectors];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            totals[head][vector] = (vf){0};
    int64_t offset = value_offset_of(&span->cache) + first * (bf16 ? 2 : 4);
    for (int key = span->first; key < span->last; key++) {
        const char *values = span->key_rows[key] + offset;
        if (key + LANES < span->last)
            __builtin_prefetch(span->key_rows[key + LANES] + offset);
        vf value[vectors];
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            value[vector] = load(values, vector * LANES, bf16);
        _Pragma("GCC unroll 4")
        for (int head = 0; head < heads; head++)
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < vectors; vector++)
                totals[head][vector] = add_product(totals[head][vector], value[vector], all(weights[head][key]));
    }
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            store(out + head * out_stride, first + vector * LANES, totals[head][vector], 0);
}

SELDOM void sum_values_part(const struct span *span, float weights[][SPAN_KEYS], int heads, int64_t first,
                            int count, float *out, int64_t out_stride, int bf16) {
    int64_t offset = value_offset_of(&span->cache);
    for (int head = 0; head < heads; head++) {
        vf total = {0};
        for (int key = span->first; key < span->last; key++)
            total = add_product(total, load_up_to(span->key_rows[key] + offset, first, count, bf16),
                                all(weights[head][key]));
        store_up_to(out + head * out_stride, first, total, count, 0);
    }
}

#if BF16_PRODUCTS
/* As `sum_values` of 64 numbers: keys two by two, an even place and the next, weights rounded to bfloat16, so that one
 * instruction multiplies and adds two values. A place that is not seen counts zero, whatever value it repeats.
 */
INLINE void sum_value_pairs(const struct span *span, float weights[][SPAN_KEYS], int heads, int chunks,
                            int64_t first, float *out, int64_t out_stride) {
    uint16_t halves[HEADS_AT_ONCE][SPAN_KEYS];
    int64_t offset = value_offset_of(&span->cache) + 2 * first;
    for (int head = 0; head < heads; head++)
        halve_weights(weights[head], round_down(span->first, LANES), round_up(span->last, LANES), halves[head]);
    __m512 totals[HEADS_AT_ONCE][4];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < 2 * chunks; vector++)
            totals[head][vector] = _mm512_setzero_ps();
    for (int key = round_down(span->first, 2); key < span->last; key += 2) {
        const char *one = span->key_rows[key] + offset, *other = span->key_rows[key + 1] + offset;
        if (key + LANES < span->last) {
            prefetch_row(span->key_rows[key + LANES] + offset, 64 * chunks);
            prefetch_row(span->key_rows[key + LANES + 1] + offset, 64 * chunks);
        }
        __m512bh pairs[4];
        _Pragma("GCC unroll 4")
        for (int chunk = 0; chunk < chunks; chunk++) {
            __m512i a = _mm512_loadu_si512(one + 64 * chunk), b = _mm512_loadu_si512(other + 64 * chunk);
            pairs[2 * chunk] = (__m512bh)_mm512_unpacklo_epi16(a, b);
            pairs[2 * chunk + 1] = (__m512bh)_mm512_unpackhi_epi16(a, b);
        }
        _Pragma("GCC unroll 4")
        for (int head = 0; head < heads; head++) {
            int32_t two;
            memcpy(&two, halves[head] + key, sizeof two);
            __m512bh both = (__m512bh)_mm512_set1_epi32(two);
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < 2 * chunks; vector++)
                totals[head][vector] = _mm512_dpbf16_ps(totals[head][vector], pairs[vector], both);
        }
    }
    /* Unpacking took four numbers of each eight to the first vector, four to the second. */
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int chunk = 0; chunk < chunks; chunk++) {
            __m512 a = totals[head][2 * chunk], b = totals[head][2 * chunk + 1];
            float *target = out + head * out_stride + first + 32 * chunk;
            _mm512_storeu_ps(target, _mm512_permutex2var_ps(a, lower, b));
            _mm512_storeu_ps(target + 16, _mm512_permutex2var_ps(a, upper, b));
        }
}
#endif

INLINE void sum_all_values(const struct span *span, float weights[][SPAN_KEYS], int heads, float *out,
                           int64_t out_stride) {
    int bf16 = span->cache.bf16;
    int64_t size = span->cache.head_size, first = 0;
#if BF16_PRODUCTS
    if (in_pairs(&span->cache)) {
        for (; first + 64 <= size; first += 64)
            sum_value_pairs(span, weights, heads, 2, first, out, out_stride);
        if (first < size)
            sum_value_pairs(span, weights, heads, 1, first, out, out_stride);
        return;
    }
#endif
    for (; first + 4 * LANES <= size; first += 4 * LANES) {
        if (bf16)
            sum_values(span, weights, heads, first, out, out_stride, 1);
        else
            sum_values(span, weights, heads, first, out, out_stride, 0);
    }
    for (; first < size; first += LANES) {
        int count = size - first < LANES ? (int)(size - first) : LANES;
        sum_values_part(span, weights, heads, first, count, out, out_stride, bf16);
    }
}

/* Compute `heads` query heads over the span: a partial of each. */
INLINE void attend_heads(const struct span *span, const void *queries, int heads, float *partials) {
    int64_t filled = FILLED(span->cache.head_size), stride = PARTIAL_NUMBERS(span->cache.head_size);
    float weights[HEADS_AT_ONCE][SPAN_KEYS];
    score(span, queries, heads, weights);
    for (int head = 0; head < heads; head++) {
        float *ends = partials + head * stride + filled;
        weigh(weights[head], span->first, span->last, span->job->soft_cap, ends, ends + 1);
    }
    sum_all_values(span, weights, heads, partials, stride);
}

/* Add up the spans of query head `head`, in their order, and write its result. */
SELDOM void merge(const struct decode_job *job, const float *partials, int64_t spans, int64_t span_stride, int64_t head,
                  int64_t to) {
    int64_t size = job->head_size;
    float result[FILLED(size)];
    struct so_far so_far = nothing_so_far(job->sinks, head);
    memset(result, 0, sizeof result);
    for (int64_t span = 0; span < spans; span++) {
        const float *partial = partials + span * span_stride;
        float kept, share;
        take_span(&so_far, partial[FILLED(size)], partial[FILLED(size) + 1], &kept, &share);
        add_span(result, partial, size, kept, share);
    }
    write_result(&so_far, result, size, job->out, to, job->bf16);
}

static void attend_unit(const struct decode_job *job, int64_t item, int64_t head) {
    int64_t row = job->item_rows[item], size = job->head_size, group = job->group;
    int64_t first_item = job->first_items[row], spans = job->first_items[row + 1] - first_item;
    int64_t stride = PARTIAL_NUMBERS(size), unit_stride = group * stride, span_stride = job->kv_heads * unit_stride;
    float *partials = job->partials + item * span_stride + head * unit_stride;
    struct span span;
    span.job = job;
    prepare_span(&span, row, head, item - first_item);
    const char *queries = (const char *)job->queries
                        + (job->tokens[row] * job->query_stride + head * group * size) * (job->bf16 ? 2 : 4);
    for (int64_t done = 0; done < group; done += HEADS_AT_ONCE) {
        const char *some = queries + done * size * (job->bf16 ? 2 : 4);
        float *target = partials + done * stride;
        switch (group - done) {
        case 1: attend_heads(&span, some, 1, target); break;
        case 2: attend_heads(&span, some, 2, target); break;
        case 3: attend_heads(&span, some, 3, target); break;
        default: attend_heads(&span, some, 4, target); break;
        }
    }
    int32_t *open = job->open + row * job->kv_heads + head;
    if (__atomic_sub_fetch(open, 1, __ATOMIC_ACQ_REL) > 0)
        return;
    __atomic_store_n(open, (int32_t)spans, __ATOMIC_RELAXED);
    for (int64_t i = 0; i < group; i++)
        merge(job, job->partials + first_item * span_stride + head * unit_stride + i * stride, spans, span_stride,
              head * group + i, ((job->tokens[row] * job->kv_heads + head) * group + i) * size);
}

static void attend_piece(void *argument, int64_t piece) {
    const struct decode_job *job = argument;
    attend_unit(job, piece / job->kv_heads, piece % job->kv_heads);
}

/* Take over what the steps differ in: a recorded layer keeps only what is its own. */
static int64_t renew(void *copy, const void *original) {
    const struct decode_job own = *(const struct decode_job *)copy;
    struct decode_job *job = copy;
    *job = *(const struct decode_job *)original;
    job->query_stride = own.query_stride;
    job->queries = own.queries;
    job->cache = own.cache;
    job->out = own.out;
    job->scale = own.scale;
    job->soft_cap = own.soft_cap;
    job->sinks = own.sinks;
    return job->items * job->kv_heads;
}

/* Attend all rows; queries [tokens, kv_heads * group, head_size], out like them and contiguous. */
EXPORT void slipstream_attend_decode(struct decode_job *job) {
    int64_t pieces = job->items * job->kv_heads;
    struct call call = CALL(attend_piece, *job, pieces);
    call.renew = renew;
    run_call(&call, pieces < 2 ? 1 : job->threads);
}

EXPORT int64_t slipstream_span_keys(void) {
    return SPAN_KEYS;
}

/* Return how many numbers a span's result for one query of `size` takes. */
EXPORT int64_t slipstream_partial_numbers(int64_t size) {
    return PARTIAL_NUMBERS(size);
}
