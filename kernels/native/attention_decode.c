/* Attention of rows with one query over the paged cache, reading keys and values where they are.
 *
 * The work is cut into units of one row, one KV head and one span of keys, the spans at fixed positions. Whoever
 * finishes the last span of a row's KV head merges them, in their order: a row's bits depend on its own keys alone.
 * Only keys and values that the row sees are read.
 */
#include <math.h>

#include "simd.h"
#include "team.h"

#define SPAN_KEYS 256
#define HEADS_AT_ONCE 4

#if defined(__AVX512BF16__)
#define BF16_PRODUCTS 1
#else
#define BF16_PRODUCTS 0
#endif

/* What a step's layers have in common, and then what one layer has. The loader has the same structure.
 *
 * A cache is [2, num_blocks, kv_heads, block_size, head_size]. Items are a row's spans: item_rows [items], and
 * first_items [rows + 1], the items before each row's. partials [items, kv_heads, group, head_size + 2]; open [rows,
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
    float scale;
};

struct span {
    const struct decode_job *job;
    int64_t row, head;
    int keys;
    const char *key_rows[SPAN_KEYS + LANES]; /* the last one repeated, so that whole vectors of keys can be read */
    int64_t value_offset;                    /* bytes from a key to its value */
};

INLINE int64_t first_span_of(const struct decode_job *job, int64_t row) {
    return job->lowest_seen[row] / SPAN_KEYS;
}

SELDOM void find_keys(struct span *span, int64_t ordinal) {
    const struct decode_job *job = span->job;
    int64_t bytes = job->bf16 ? 2 : 4, row_bytes = job->head_size * bytes, row = span->row;
    int64_t from = (first_span_of(job, row) + ordinal) * SPAN_KEYS, to = from + SPAN_KEYS;
    if (from < job->lowest_seen[row])
        from = job->lowest_seen[row];
    if (to > job->positions[row] + 1)
        to = job->positions[row] + 1;
    span->keys = (int)(to - from);
    span->value_offset = job->num_blocks * job->kv_heads * job->block_size * row_bytes;
    const int32_t *table = job->tables + row * job->table_columns;
    int64_t place = from % job->block_size, block = from / job->block_size;
    int done = 0;
    while (done < span->keys) {
        const char *head = (const char *)job->cache
                         + ((int64_t)table[block++] * job->kv_heads + span->head) * job->block_size * row_bytes;
        for (; place < job->block_size && done < span->keys; place++)
            span->key_rows[done++] = head + place * row_bytes;
        place = 0;
    }
    for (int i = 0; i < LANES; i++)
        span->key_rows[done + i] = span->key_rows[done - 1];
}

INLINE void prefetch_row(const char *row, int64_t bytes) {
    for (int64_t at = 0; at < bytes; at += 64)
        __builtin_prefetch(row + at);
}

/* Return the products of one query with LANES keys. `query` is float32, filled up to whole vectors with zeros. */
INLINE vf dot_keys(const char *const *rows, const float *query, int64_t size, int bf16) {
    vf sums[LANES];
    int64_t whole = size / LANES * LANES;
    _Pragma("GCC unroll 16")
    for (int key = 0; key < LANES; key++) {
        vf total = {0};
        for (int64_t i = 0; i < whole; i += LANES)
            total = total + load(rows[key], i, bf16) * load(query, i, 0);
        if (whole < size)
            total = total + load_part(rows[key], whole, (int)(size - whole), bf16) * load(query, whole, 0);
        sums[key] = total;
    }
    return lane_sums(sums);
}

#if BF16_PRODUCTS
INLINE __m512bh load_pairs(const void *from) {
    return (__m512bh)_mm512_loadu_si512(from);
}

/* As `dot_keys`, of a bfloat16 query whose size is a multiple of 32. */
INLINE vf dot_keys_bf16(const char *const *rows, const uint16_t *query, int64_t size) {
    vf sums[LANES];
    _Pragma("GCC unroll 16")
    for (int key = 0; key < LANES; key++) {
        __m512 total = _mm512_setzero_ps();
        for (int64_t i = 0; i < size; i += 32)
            total = _mm512_dpbf16_ps(total, load_pairs(rows[key] + 2 * i), load_pairs(query + i));
        sums[key] = (vf)total;
    }
    return lane_sums(sums);
}
#endif

/* Write scaled scores of `heads` queries, [heads][SPAN_KEYS + LANES]. */
SELDOM void score(const struct span *span, const void *queries, int heads, float scores[][SPAN_KEYS + LANES]) {
    const struct decode_job *job = span->job;
    int64_t size = job->head_size, row_bytes = size * (job->bf16 ? 2 : 4);
    float wide[HEADS_AT_ONCE][size + LANES];
    int pairs = BF16_PRODUCTS && job->bf16 && size % 32 == 0;
    for (int head = 0; head < heads && !pairs; head++)
        for (int64_t i = 0; i < size; i += LANES) {
            int count = size - i < LANES ? (int)(size - i) : LANES;
            vf some = load_up_to(queries, head * size + i, count, job->bf16);
            memcpy(wide[head] + i, &some, sizeof some);
        }
    for (int key = 0; key < span->keys; key += LANES) {
        const char *const *rows = span->key_rows + key;
        if (key + 2 * LANES <= span->keys)
            for (int ahead = LANES; ahead < 2 * LANES; ahead++)
                prefetch_row(rows[ahead], row_bytes);
        for (int head = 0; head < heads; head++) {
            vf products;
#if BF16_PRODUCTS
            if (pairs && size == 64)
                products = dot_keys_bf16(rows, (const uint16_t *)queries + head * size, 64);
            else if (pairs && size == 128)
                products = dot_keys_bf16(rows, (const uint16_t *)queries + head * size, 128);
            else if (pairs)
                products = dot_keys_bf16(rows, (const uint16_t *)queries + head * size, size);
            else
#endif
            if (job->bf16)
                products = dot_keys(rows, wide[head], size, 1);
            else
                products = dot_keys(rows, wide[head], size, 0);
            store(scores[head], key, products * job->scale, 0);
        }
    }
}

/* Turn scores into weights relative to the largest, which is returned with the sum of the weights. Places beyond the
 * span's keys become zero.
 */
SELDOM void weigh(float *scores, int keys, float *peak, float *total) {
    vf highest = all(-INFINITY), totals = {0};
    for (int key = keys; key % LANES; key++)
        scores[key] = -INFINITY;
    for (int key = 0; key < keys; key += LANES)
        highest = larger(load(scores, key, 0), highest);
    *peak = largest(highest);
    for (int key = 0; key < keys; key += LANES) {
        vf weights = exponential(load(scores, key, 0) - *peak);
        if (key + LANES > keys)
            weights = load_part(&weights, 0, keys - key, 0);
        totals = totals + weights;
        store(scores, key, weights, 0);
    }
    *total = sum(totals);
}

/* Add up four vectors of the values from number `first` on, weighted, for each head: out[head][first ...]. */
INLINE void sum_values(const struct span *span, float weights[][SPAN_KEYS + LANES], int heads, int64_t first,
                       float *out, int64_t out_stride, int bf16) {
    enum { vectors = 4 };
    vf totals[HEADS_AT_ONCE][vectors];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            totals[head][vector] = (vf){0};
    for (int key = 0; key < span->keys; key++) {
        const char *values = span->key_rows[key] + span->value_offset;
        if (key + LANES < span->keys)
            __builtin_prefetch(span->key_rows[key + LANES] + span->value_offset + first * (bf16 ? 2 : 4));
        vf value[vectors];
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            value[vector] = load(values, first + vector * LANES, bf16);
        _Pragma("GCC unroll 4")
        for (int head = 0; head < heads; head++)
            _Pragma("GCC unroll 4")
            for (int vector = 0; vector < vectors; vector++)
                totals[head][vector] = totals[head][vector] + value[vector] * weights[head][key];
    }
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            store(out + head * out_stride, first + vector * LANES, totals[head][vector], 0);
}

SELDOM void sum_values_part(const struct span *span, float weights[][SPAN_KEYS + LANES], int heads, int64_t first,
                            int count, float *out, int64_t out_stride, int bf16) {
    for (int head = 0; head < heads; head++) {
        vf total = {0};
        for (int key = 0; key < span->keys; key++)
            total = total
                  + load_up_to(span->key_rows[key] + span->value_offset, first, count, bf16) * weights[head][key];
        store_up_to(out + head * out_stride, first, total, count, 0);
    }
}

#if BF16_PRODUCTS
/* As `sum_values` of 64 numbers: keys two by two, weights rounded to bfloat16, so that one instruction multiplies and
 * adds two values.
 */
INLINE void sum_value_pairs(const struct span *span, float weights[][SPAN_KEYS + LANES], int heads, int chunks,
                            int64_t first, float *out, int64_t out_stride) {
    uint16_t halves[HEADS_AT_ONCE][SPAN_KEYS + LANES];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        for (int key = 0; key < span->keys + 1; key += LANES)
            store(halves[head], key, key < span->keys ? load(weights[head], key, 0) : (vf){0}, 1);
    __m512 totals[HEADS_AT_ONCE][4];
    _Pragma("GCC unroll 4")
    for (int head = 0; head < heads; head++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < 2 * chunks; vector++)
            totals[head][vector] = _mm512_setzero_ps();
    for (int key = 0; key < span->keys; key += 2) {
        const char *one = span->key_rows[key] + span->value_offset + 2 * first;
        const char *other = span->key_rows[key + 1] + span->value_offset + 2 * first;
        if (key + LANES < span->keys) {
            prefetch_row(span->key_rows[key + LANES] + span->value_offset + 2 * first, 64 * chunks);
            prefetch_row(span->key_rows[key + LANES + 1] + span->value_offset + 2 * first, 64 * chunks);
        }
        __m512bh pairs[4];
        _Pragma("GCC unroll 4")
        for (int chunk = 0; chunk < chunks; chunk++) {
            __m512i a = _mm512_loadu_si512(one + 64 * chunk);
            /* An odd last value stands alone: what is not there counts zero, whatever number it repeats. */
            __m512i b = key + 1 < span->keys ? _mm512_loadu_si512(other + 64 * chunk) : _mm512_setzero_si512();
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

INLINE void sum_all_values(const struct span *span, float weights[][SPAN_KEYS + LANES], int heads, float *out,
                           int64_t out_stride) {
    int bf16 = span->job->bf16;
    int64_t size = span->job->head_size, first = 0;
#if BF16_PRODUCTS
    if (bf16 && size % 32 == 0) {
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

/* Compute `heads` query heads over the span: each head's weighted values, its peak and the sum of its weights. */
INLINE void attend_heads(const struct span *span, const void *queries, int heads, float *partial) {
    int64_t size = span->job->head_size, stride = size + 2;
    float weights[HEADS_AT_ONCE][SPAN_KEYS + LANES];
    score(span, queries, heads, weights);
    for (int head = 0; head < heads; head++)
        weigh(weights[head], span->keys, partial + head * stride + size, partial + head * stride + size + 1);
    sum_all_values(span, weights, heads, partial, stride);
}

/* Merge a query head's spans, in their order, and write its result. */
SELDOM void merge(const struct decode_job *job, const float *partial, int64_t spans, int64_t span_stride, int64_t to) {
    int64_t size = job->head_size;
    float peak = -INFINITY, total = 0;
    for (int64_t span = 0; span < spans; span++) {
        float own = partial[span * span_stride + size];
        peak = own > peak ? own : peak;
    }
    float shares[spans];
    for (int64_t span = 0; span < spans; span++) {
        const float *own = partial + span * span_stride + size;
        vf share = exponential(all(own[0] - peak));
        shares[span] = spans == 1 ? 1.0f : share[0];
        total = total + shares[span] * own[1];
    }
    for (int64_t i = 0; i < size; i += LANES) {
        int count = size - i < LANES ? (int)(size - i) : LANES;
        vf result = {0};
        for (int64_t span = 0; span < spans; span++)
            result = result + load_up_to(partial + span * span_stride, i, count, 0) * shares[span];
        store_up_to(job->out, to + i, result / total, count, job->bf16);
    }
}

static void attend_unit(const struct decode_job *job, int64_t item, int64_t head) {
    int64_t row = job->item_rows[item], size = job->head_size, group = job->group;
    int64_t first_item = job->first_items[row], spans = job->first_items[row + 1] - first_item;
    int64_t unit_stride = group * (size + 2), span_stride = job->kv_heads * unit_stride;
    float *partial = job->partials + item * span_stride + head * unit_stride;
    struct span span;
    span.job = job;
    span.row = row;
    span.head = head;
    find_keys(&span, item - first_item);
    const char *queries = (const char *)job->queries
                        + (job->tokens[row] * job->query_stride + head * group * size) * (job->bf16 ? 2 : 4);
    for (int64_t done = 0; done < group; done += HEADS_AT_ONCE) {
        const char *some = queries + done * size * (job->bf16 ? 2 : 4);
        float *target = partial + done * (size + 2);
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
        merge(job, job->partials + first_item * span_stride + head * unit_stride + i * (size + 2), spans, span_stride,
              ((job->tokens[row] * job->kv_heads + head) * group + i) * size);
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
