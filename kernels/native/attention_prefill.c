/* Attention of rows with several queries over the paged cache: tiles of queries, each over the spans of keys it sees.
 *
 * A unit of work is one KV head of one tile: some positions of a row, with all query heads of the KV head. For each
 * span, keys and values are laid side by side once, in the unit's scratch memory, and then multiplied block by block of
 * rows (a position's query heads are rows side by side). Spans come in their order and are added up as decoding does,
 * with the same bits. Keys and values outside of what the tile's positions see are not read.
 */
#include "attention_span.h"
#include "attention_tiles.h"

/* Places whose keys are laid side by side. */
#define PANEL_KEYS (VECTORS * LANES)
/* Rows whose scores are in memory at once: whole register tiles. */
#define BLOCK_ROWS (4 * TILE_ROWS)

/* What a step's layers have in common, and then what one layer has. The loader has the same structure.
 *
 * Items are tiles of `tile_queries` positions at most: item_rows [items], and item_firsts [items], the places of their
 * first positions in the row. starts, counts, tokens [rows]: first position, number of positions, first place in the
 * batch. scratch: `scratch_bytes` for each thread.
 */
struct prefill_job {
    const int32_t *tables, *item_rows, *item_firsts;
    const int64_t *starts, *counts, *tokens;
    char *scratch;
    int64_t scratch_bytes, table_columns, num_blocks, kv_heads, group, block_size, head_size, items, tile_queries;
    int64_t window;       /* how many keys a position sees at most */
    int64_t query_stride; /* numbers from one token's queries to the next */
    int32_t bf16, threads;
    const void *queries, *cache;
    void *out;
    float scale, soft_cap; /* as of `weigh` */
    const float *sinks;    /* NULL, or one of each query head */
    int64_t workers;
    struct pieces pieces;
};

/* Where things are in a unit's scratch memory. Rows are filled up to whole blocks. */
struct unit {
    const struct prefill_job *job;
    struct cache cache;
    int64_t row, head, first, queries;     /* the tile: positions `first` to `first + queries` */
    int64_t rows, words, filled;           /* query heads in all; words of a key; numbers of a result */
    int64_t span_start;
    float *keys;                           /* [panels of places][words][VECTORS][LANES] */
    float *values;                         /* [panels of numbers][steps][vectors][LANES] */
    char *x;                               /* [rows][words], of 4 bytes */
    float *scores;                         /* [BLOCK_ROWS][SPAN_KEYS], and then the weights */
    uint16_t *halves;                      /* the same as bfloat16 */
    float *products;                       /* [BLOCK_ROWS][filled] */
    float *results;                        /* [rows][filled] */
    struct so_far *so_far;                 /* [rows] */
};

/* Numbers of a result: panels of VECTORS vectors, the last one perhaps half as wide. */
INLINE int64_t filled_size(int64_t size) {
    int64_t unit = VECTORS / 2 * LANES;
    return FILLED((size + unit - 1) / unit * unit);
}

INLINE char *take(char **from, int64_t bytes) {
    char *taken = *from;
    *from += (bytes + 63) / 64 * 64;
    return taken;
}

/* Divide the scratch memory, and return how many bytes it takes. */
SELDOM int64_t divide_scratch(struct unit *unit, const struct prefill_job *job, char *scratch) {
    unit->job = job;
    unit->cache = (struct cache){.numbers = job->cache, .num_blocks = job->num_blocks, .kv_heads = job->kv_heads,
                                 .block_size = job->block_size, .head_size = job->head_size, .bf16 = job->bf16};
    int64_t most_rows = (job->tile_queries * job->group + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    char *end = scratch;
    unit->words = words_of(&unit->cache);
    unit->filled = filled_size(job->head_size);
    unit->keys = (float *)take(&end, SPAN_KEYS * unit->words * 4);
    unit->values = (float *)take(&end, SPAN_KEYS * unit->filled * 4);
    unit->x = take(&end, most_rows * unit->words * 4);
    unit->scores = (float *)take(&end, BLOCK_ROWS * SPAN_KEYS * 4);
    unit->halves = (uint16_t *)take(&end, BLOCK_ROWS * SPAN_KEYS * 2);
    unit->products = (float *)take(&end, BLOCK_ROWS * unit->filled * 4);
    unit->results = (float *)take(&end, most_rows * unit->filled * 4);
    unit->so_far = (struct so_far *)take(&end, most_rows * (int64_t)sizeof(struct so_far));
    return end - scratch;
}

/* Places of the current span, from `first` to `last`; none if `last` is not above `first`. */
struct places {
    int first, last;
};

/* Return which places positions number `from` to `to` of the tile see, all together. */
INLINE struct places seen_by(const struct unit *unit, int64_t from, int64_t to) {
    int64_t first = unit->first + from - unit->job->window + 1 - unit->span_start;
    int64_t last = unit->first + to - unit->span_start;
    first = first > 0 ? first : 0;
    last = last < SPAN_KEYS ? last : SPAN_KEYS;
    return (struct places){(int)(first < SPAN_KEYS ? first : SPAN_KEYS), (int)(last > 0 ? last : 0)};
}

/* The same of rows. Those that only fill up a tile see nothing. */
INLINE struct places seen_by_rows(const struct unit *unit, int64_t from, int64_t to) {
    int64_t group = unit->job->group, end = to < unit->rows ? to : unit->rows;
    return from < end ? seen_by(unit, from / group, (end - 1) / group + 1) : (struct places){0, 0};
}

/* Copy the queries; those that only fill up a block are zeros. */
SELDOM void load_queries(struct unit *unit) {
    const struct prefill_job *job = unit->job;
    int64_t size = job->head_size, group = job->group, bytes = job->bf16 ? 2 : 4;
    int64_t token = job->tokens[unit->row] + unit->first - job->starts[unit->row];
    int widened = job->bf16 && !in_pairs(&unit->cache);
    for (int64_t query = 0; query < unit->queries; query++) {
        const char *from = (const char *)job->queries
                         + ((token + query) * job->query_stride + unit->head * group * size) * bytes;
        char *to = unit->x + query * group * unit->words * 4;
        if (!widened)
            memcpy(to, from, (size_t)(group * size * bytes));
        else
            for (int64_t i = 0; i < group * size; i++)
                ((float *)to)[i] = widen_one(((const uint16_t *)from)[i]);
    }
    int64_t filled = (unit->rows + BLOCK_ROWS - 1) / BLOCK_ROWS * BLOCK_ROWS;
    memset(unit->x + unit->rows * unit->words * 4, 0, (size_t)((filled - unit->rows) * unit->words * 4));
    memset(unit->results, 0, (size_t)(unit->rows * unit->filled * 4));
    for (int64_t row = 0; row < unit->rows; row++)
        unit->so_far[row] = nothing_so_far(job->sinks, unit->head * group + row % group);
}

SELDOM void lay_all_keys(struct unit *unit, const char *const *rows, int low, int high) {
    int widened = unit->cache.bf16 && !in_pairs(&unit->cache);
    for (int place = low; place < high; place += LANES) {
        float *to = unit->keys + place / PANEL_KEYS * PANEL_KEYS * unit->words + place % PANEL_KEYS;
        if (widened)
            lay_keys(rows + place, unit->words, 1, to, PANEL_KEYS);
        else
            lay_keys(rows + place, unit->words, 0, to, PANEL_KEYS);
    }
}

/* Return how many vectors the panel of values from number `first` on has. */
INLINE int vectors_of(const struct unit *unit, int64_t first) {
    return unit->cache.head_size - first > VECTORS / 2 * LANES ? VECTORS : VECTORS / 2;
}

#if BF16_PRODUCTS
/* Lay 32 numbers of two values two by two. */
INLINE void lay_value_pairs(const char *one, const char *other, float *to) {
    __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(other);
    __m512i low = _mm512_unpacklo_epi16(a, b), high = _mm512_unpackhi_epi16(a, b);
    /* Unpacking took four numbers of each eight to the first vector, four to the second. */
    const __m512i lower = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i upper = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi64(low, lower, high));
    _mm512_storeu_si512(to + 16, _mm512_permutex2var_epi64(low, upper, high));
}
#endif

/* Lay the values of places `low` to `high`, even ones: a step is one place, or two by two. */
SELDOM void lay_values(struct unit *unit, const char *const *rows, int low, int high) {
    int64_t size = unit->cache.head_size, offset = value_offset_of(&unit->cache);
    int pairs = in_pairs(&unit->cache), places = pairs ? 2 : 1;
    for (int64_t first = 0; first < size; first += VECTORS * LANES) {
        int vectors = vectors_of(unit, first);
        float *panel = unit->values + first * (SPAN_KEYS / places);
        for (int place = low; place < high; place += places) {
            float *to = panel + place / places * vectors * LANES;
            const char *value = rows[place] + offset;
#if BF16_PRODUCTS
            if (pairs) {
                const char *next = rows[place + 1] + offset;
                for (int vector = 0; vector < vectors; vector += 2)
                    lay_value_pairs(value + (first + vector * LANES) * 2, next + (first + vector * LANES) * 2,
                                    to + vector * LANES);
                continue;
            }
#endif
            for (int vector = 0; vector < vectors; vector++) {
                int64_t from = first + vector * LANES, left = size - from;
                vf numbers = {0};
                if (left > 0)
                    numbers = load_up_to(value, from, left < LANES ? (int)left : LANES, unit->cache.bf16);
                store(to, vector * LANES, numbers, 0);
            }
        }
    }
}

/* Write the scaled scores of a register tile of rows, from row `row` of the unit and `at` of the block on, with a panel
 * of keys.
 */
SELDOM void score_tile(const struct unit *unit, int64_t row, int at, int place) {
    const char *x = unit->x + row * unit->words * 4;
    const float *panel = unit->keys + place * unit->words;
    vf products[TILE_ROWS][VECTORS];
    if (in_pairs(&unit->cache))
        multiply_steps(x, unit->words * 4, panel, PANEL_KEYS, unit->words, VECTORS, 1, products);
    else
        multiply_steps(x, unit->words * 4, panel, PANEL_KEYS, unit->words, VECTORS, 0, products);
    _Pragma("GCC unroll 8")
    for (int r = 0; r < TILE_ROWS; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < VECTORS; vector++)
            store(unit->scores + (at + r) * SPAN_KEYS, place + vector * LANES,
                  products[r][vector] * unit->job->scale, 0);
}

/* Write the products of a register tile's weights with a panel of values. */
INLINE void sum_tile(const struct unit *unit, int at, struct places seen, int64_t first, int vectors, int pairs) {
    int from = pairs ? seen.first / 2 : seen.first, to = pairs ? (seen.last + 1) / 2 : seen.last;
    const void *weights = pairs ? (const void *)unit->halves : unit->scores;
    int64_t x_bytes = SPAN_KEYS * (pairs ? 2 : 4);
    const char *x = (const char *)weights + at * x_bytes;
    const float *panel = unit->values + first * (pairs ? SPAN_KEYS / 2 : SPAN_KEYS) + from * vectors * LANES;
    vf sums[TILE_ROWS][VECTORS];
    multiply_steps(x + from * 4, x_bytes, panel, vectors * LANES, to - from, vectors, pairs, sums);
    _Pragma("GCC unroll 8")
    for (int r = 0; r < TILE_ROWS; r++)
        _Pragma("GCC unroll 4")
        for (int vector = 0; vector < vectors; vector++)
            store(unit->products + (at + r) * unit->filled, first + vector * LANES, sums[r][vector], 0);
}

SELDOM void sum_values(const struct unit *unit, int at, struct places seen) {
    for (int64_t first = 0; first < unit->cache.head_size; first += VECTORS * LANES) {
        int is_whole = vectors_of(unit, first) == VECTORS;
        if (in_pairs(&unit->cache)) {
            if (is_whole)
                sum_tile(unit, at, seen, first, VECTORS, 1);
            else
                sum_tile(unit, at, seen, first, VECTORS / 2, 1);
        } else if (is_whole) {
            sum_tile(unit, at, seen, first, VECTORS, 0);
        } else {
            sum_tile(unit, at, seen, first, VECTORS / 2, 0);
        }
    }
}

/* Turn a row's scores into weights, zeros where others of its register tile see something and it does not. Return
 * whether it sees anything, and if so in `kept` and `share` what `take_span` does.
 */
SELDOM int weigh_row(struct unit *unit, int64_t row, int at, struct places of_tile, float *kept, float *share) {
    struct places own = seen_by_rows(unit, row, row + 1);
    float *scores = unit->scores + at * SPAN_KEYS;
    int low = round_down(of_tile.first, LANES), high = round_up(of_tile.last, LANES), sees = own.first < own.last;
    if (sees) {
        float peak, total;
        weigh(scores, own.first, own.last, unit->job->soft_cap, &peak, &total);
        take_span(&unit->so_far[row], peak, total, kept, share);
        memset(scores + low, 0, (size_t)(round_down(own.first, LANES) - low) * sizeof *scores);
        int end = round_up(own.last, LANES);
        memset(scores + end, 0, (size_t)(high - end) * sizeof *scores);
    } else {
        memset(scores + low, 0, (size_t)(high - low) * sizeof *scores);
    }
    if (in_pairs(&unit->cache))
        halve_weights(scores, low, high, unit->halves + at * SPAN_KEYS);
    return sees;
}

/* Attend a block of rows, from `row` on, to the current span. */
SELDOM void attend_block(struct unit *unit, int64_t row) {
    struct places tiles[BLOCK_ROWS / TILE_ROWS];
    for (int tile = 0; tile < BLOCK_ROWS / TILE_ROWS; tile++)
        tiles[tile] = seen_by_rows(unit, row + tile * TILE_ROWS, row + (tile + 1) * TILE_ROWS);
    for (int place = 0; place < SPAN_KEYS; place += PANEL_KEYS)
        for (int tile = 0; tile < BLOCK_ROWS / TILE_ROWS; tile++)
            if (tiles[tile].first < place + PANEL_KEYS && place < tiles[tile].last)
                score_tile(unit, row + tile * TILE_ROWS, tile * TILE_ROWS, place);
    float kept[BLOCK_ROWS], share[BLOCK_ROWS];
    int sees[BLOCK_ROWS];
    for (int tile = 0; tile < BLOCK_ROWS / TILE_ROWS; tile++) {
        if (tiles[tile].first >= tiles[tile].last)
            continue;
        for (int at = tile * TILE_ROWS; at < (tile + 1) * TILE_ROWS; at++)
            sees[at] = weigh_row(unit, row + at, at, tiles[tile], &kept[at], &share[at]);
        sum_values(unit, tile * TILE_ROWS, tiles[tile]);
        for (int at = tile * TILE_ROWS; at < (tile + 1) * TILE_ROWS; at++)
            if (sees[at])
                add_span(unit->results + (row + at) * unit->filled, unit->products + at * unit->filled,
                         unit->cache.head_size, kept[at], share[at]);
    }
}

static void attend_unit(struct unit *unit, int64_t item, int64_t head) {
    const struct prefill_job *job = unit->job;
    int64_t size = job->head_size, group = job->group, row = job->item_rows[item];
    int64_t left = job->counts[row] - job->item_firsts[item];
    unit->row = row;
    unit->head = head;
    unit->first = job->starts[row] + job->item_firsts[item];
    unit->queries = left < job->tile_queries ? left : job->tile_queries;
    unit->rows = unit->queries * group;
    load_queries(unit);
    int64_t lowest = unit->first - job->window + 1, end = unit->first + unit->queries;
    int64_t start = (lowest > 0 ? lowest : 0) / SPAN_KEYS * SPAN_KEYS;
    for (; start < end; start += SPAN_KEYS) {
        const char *rows[SPAN_KEYS];
        unit->span_start = start;
        struct places seen = seen_by(unit, 0, unit->queries);
        find_keys(&unit->cache, job->tables + row * job->table_columns, head, start, seen.first, seen.last, PANEL_KEYS,
                  rows);
        lay_all_keys(unit, rows, round_down(seen.first, PANEL_KEYS), round_up(seen.last, PANEL_KEYS));
        lay_values(unit, rows, round_down(seen.first, 2), round_up(seen.last, 2));
        for (int64_t some = 0; some < unit->rows; some += BLOCK_ROWS)
            attend_block(unit, some);
    }
    int64_t token = job->tokens[row] + job->item_firsts[item];
    for (int64_t i = 0; i < unit->rows; i++)
        write_result(&unit->so_far[i], unit->results + i * unit->filled, size, job->out,
                     (((token + i / group) * job->kv_heads + head) * group + i % group) * size, job->bf16);
}

static void attend_pieces(void *argument) {
    struct prefill_job *job = argument;
    struct unit unit;
    int64_t worker = __atomic_fetch_add(&job->workers, 1, __ATOMIC_RELAXED);
    divide_scratch(&unit, job, job->scratch + worker * job->scratch_bytes);
    for (int64_t piece; (piece = take_piece(&job->pieces)) >= 0;)
        attend_unit(&unit, piece / job->kv_heads, piece % job->kv_heads);
}

/* Return how many bytes of scratch memory a thread needs, aligned to 64. */
EXPORT int64_t slipstream_prefill_scratch(const struct prefill_job *job) {
    struct unit unit;
    return divide_scratch(&unit, job, NULL);
}

/* Attend all items; queries [tokens, kv_heads * group, head_size], out like them and contiguous. */
EXPORT void slipstream_attend_prefill(struct prefill_job *job) {
    job->workers = 0;
    job->pieces.next = 0;
    job->pieces.count = job->items * job->kv_heads;
    run_on_team(attend_pieces, job, job->pieces.count < 2 ? 1 : job->threads);
}
