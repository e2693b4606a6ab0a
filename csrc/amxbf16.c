/* AMX-BF16: products of numbers rounded to bfloat16, summed in float32, on tiles.  A tile of sums has 16 rows of a and
   16 of b, whose panels are AVX512-BF16's: [pair][row].  A tile of a has rows of pairs, so a's panels are [row][pair],
   rows a sixteenth of a panel apart.  See amx.h. */
#include "amx.h"

#ifdef MG_AMX
#include "avx512bf16.h"

#define TARGET __attribute__((target(MG_AVX512BF16 MG_TILE_TARGET)))
enum { ROWS = MG_TILE_ROWS, PAIRS = MG_TILE_BYTES / 4, COLUMNS = 16, PANELS = MG_BF16_PANELS };

/* One panel of rows that are dense along k, `width` pairs apart. */
TARGET static void pack_rows(uint32_t *panel, size_t width, const float *x, size_t x_row, size_t rows, size_t k)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < k; i += 2 * PAIRS) {
            const float *at = x + r * x_row + i;
            __m512 low = _mm512_maskz_loadu_ps(mask_of(k - i), at), high = _mm512_setzero_ps();
            if (k - i > PAIRS)
                high = _mm512_maskz_loadu_ps(mask_of(k - i - PAIRS), at + PAIRS);
            _mm512_mask_storeu_epi32(panel + r * width + i / 2, mask_of((k - i + 1) / 2), round_two(low, high));
        }
}

/* One panel of rows that are dense along themselves. */
TARGET static void pack_columns(uint32_t *panel, size_t width, const float *x, size_t x_column, size_t rows, size_t k)
{
    for (size_t i = 0; i < k; i += 2 * PAIRS) {
        __m512i pairs[PAIRS];
        for (size_t j = 0; j < PAIRS; j++) {
            __mmask16 even = i + 2 * j < k ? mask_of(rows) : 0, odd = i + 2 * j + 1 < k ? mask_of(rows) : 0;
            const float *at = x + mg_min(i + 2 * j, k - 1) * x_column;
            pairs[j] = round_pairs(_mm512_maskz_loadu_ps(even, at),
                                   _mm512_maskz_loadu_ps(odd, at + (odd ? x_column : 0)));
        }
        transpose(pairs);
        for (size_t r = 0; r < rows; r++)
            _mm512_mask_storeu_epi32(panel + r * width + i / 2, mask_of((k - i + 1) / 2), pairs[r]);
    }
}

/* Rows beyond the last stay as they are: no tile reads them. */
TARGET static void pack_a(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows,
                          size_t k)
{
    for (size_t r = 0; r < rows; r += ROWS) {
        uint32_t *panel = panels + r / ROWS * stride;
        if (x_column == 1)
            pack_rows(panel, stride / ROWS, x + r * x_row, x_row, mg_min(ROWS, rows - r), k);
        else
            pack_columns(panel, stride / ROWS, x + r, x_column, mg_min(ROWS, rows - r), k);
    }
}

static void pack_b(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows,
                   size_t k)
{
    mg_avx512bf16.pack_b(panels, stride, x, x_row, x_column, rows, k);
}

/* The last pairs along k, followed by zeros. */
struct tail {
    _Alignas(64) uint32_t a[ROWS][PAIRS], b[PANELS][PAIRS][COLUMNS];
};

TARGET static void copy_tail(struct tail *tail, const struct mg_bf16_tile *t, size_t first, size_t panels)
{
    for (size_t r = 0; r < t->rows; r++)
        _mm512_store_si512(tail->a[r], _mm512_maskz_loadu_epi32(mask_of(t->pairs - first),
                                                                t->a + r * (t->a_stride / ROWS) + first));
    for (size_t p = 0; p < panels; p++)
        for (size_t i = 0; i < PAIRS; i++) {
            __mmask16 real = first + i < t->pairs ? 0xffff : 0;
            const uint32_t *b = t->b + p * t->b_stride + (real ? first + i : 0) * COLUMNS;
            _mm512_store_si512(tail->b[p][i], _mm512_maskz_loadu_epi32(real, b));
        }
}

/* What the sums of a panel start from, rows `row` bytes apart; in `room` if there are fewer columns than in a tile. */
struct start {
    const float *at;
    size_t row;
};

MG_INLINE TARGET struct start start_of(const struct mg_bf16_tile *t, size_t panel, float *room)
{
    static const float zeros[COLUMNS];
    const float *at = t->add ? t->c + panel * COLUMNS : t->bias != NULL ? t->bias + panel * COLUMNS : zeros;
    size_t left = t->columns - panel * COLUMNS, row = t->add ? t->c_row : 0;
    if (left >= COLUMNS || at == zeros)
        return (struct start){at, row * sizeof *at};
    for (size_t r = 0; r < t->rows; r++)
        _mm512_store_ps(room + r * COLUMNS, _mm512_maskz_loadu_ps(mask_of(left), at + r * row));
    mg_tile_fence(room);
    return (struct start){room, COLUMNS * sizeof *at};
}

/* Sums stand in tiles 0 to 2, a in 3, panels of b in 4 to 6. */
MG_INLINE TARGET void step(const uint32_t *a, size_t a_row, const uint32_t *b, size_t b_stride, const size_t panels)
{
    _tile_loadd(3, a, a_row * sizeof *a);
    _tile_loadd(4, b, COLUMNS * sizeof *b);
    _tile_dpbf16ps(0, 3, 4);
    if (panels > 1) {
        _tile_loadd(5, b + b_stride, COLUMNS * sizeof *b);
        _tile_dpbf16ps(1, 3, 5);
    }
    if (panels > 2) {
        _tile_loadd(6, b + 2 * b_stride, COLUMNS * sizeof *b);
        _tile_dpbf16ps(2, 3, 6);
    }
}

/* One row of tiles, three products at a time: Intel says that one takes 52 cycles, and the next can follow after 16. */
MG_INLINE TARGET void tile_of(const struct mg_bf16_tile *t, const size_t panels)
{
    _Alignas(64) float room[ROWS][COLUMNS];     /* of the last panel */
    struct tail tail;
    const size_t last = panels - 1, left = t->columns - last * COLUMNS, a_row = t->a_stride / ROWS;
    size_t i = 0;
    struct start x = start_of(t, 0, room[0]);
    _tile_loadd(0, x.at, x.row);
    if (panels > 1) {
        x = start_of(t, 1, room[0]);
        _tile_loadd(1, x.at, x.row);
    }
    if (panels > 2) {
        x = start_of(t, 2, room[0]);
        _tile_loadd(2, x.at, x.row);
    }
    for (; i + PAIRS <= t->pairs; i += PAIRS)
        step(t->a + i, a_row, t->b + i * COLUMNS, t->b_stride, panels);
    if (i < t->pairs) {
        copy_tail(&tail, t, i, panels);
        mg_tile_fence(&tail);
        step(tail.a[0], PAIRS, tail.b[0][0], PAIRS * COLUMNS, panels);
    }
    float *to = left < COLUMNS ? room[0] : t->c + last * COLUMNS;
    size_t to_row = (left < COLUMNS ? COLUMNS : t->c_row) * sizeof *to, row = t->c_row * sizeof *to;
    if (panels == 1) {
        _tile_stored(0, to, to_row);
    } else if (panels == 2) {
        _tile_stored(0, t->c, row);
        _tile_stored(1, to, to_row);
    } else {
        _tile_stored(0, t->c, row);
        _tile_stored(1, t->c + COLUMNS, row);
        _tile_stored(2, to, to_row);
    }
    for (size_t r = 0; left < COLUMNS && r < t->rows; r++)
        _mm512_mask_storeu_ps(t->c + r * t->c_row + last * COLUMNS, mask_of(left), _mm512_load_ps(room[r]));
}

TARGET static void tile(const struct mg_bf16_tile *t)
{
    const uint8_t n = (uint8_t)t->rows;
    mg_configure_tiles(&(struct mg_tiles){.palette = 1, .row_bytes = {64, 64, 64, 64, 64, 64, 64},
                                          .rows = {n, n, n, n, PAIRS, PAIRS, PAIRS}});
    if (t->columns > 2 * COLUMNS)
        tile_of(t, 3);
    else if (t->columns > COLUMNS)
        tile_of(t, 2);
    else
        tile_of(t, 1);
}

const struct mg_bf16 mg_amxbf16 = {
    .rows = ROWS,
    .pack_a = pack_a,
    .pack_b = pack_b,
    .tile = tile,
    .attend_words = mg_avx512bf16_attend_words,
    .attend = mg_avx512bf16_attend,
    .attend_backward_words = mg_avx512bf16_attend_backward_words,
    .attend_backward = mg_avx512bf16_attend_backward,
};
#endif
