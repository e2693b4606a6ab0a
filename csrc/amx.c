/* AMX-INT8: integer products, and those of attention, on tiles; the rest is AVX-512's.  TDPBUSD multiplies unsigned
   bytes by signed ones as AVX-512's dpbusd does, so that operands are packed alike.  See amx.h. */
#include "amx.h"

#ifdef MG_AMX
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni" MG_TILE_TARGET)))
enum {
    ROWS = 2 * MG_TILE_ROWS,
    FEW = 4,                    /* rows that fill a tile so badly that vectors are as good */
    DEPTH = MG_TILE_BYTES,      /* elements along k of a step */
    PANEL_ROW = 4 * MG_PANEL,   /* bytes of a panel between groups of 4 elements along k */
    ACC_ROW = MG_PANEL * sizeof(int32_t)
};

/* The last DEPTH elements along k, zeros instead of those that earlier steps have taken: the last step goes over their
   weights again, and so reads none beyond the panel. */
TARGET static void copy_tail(int8_t (*tail)[DEPTH], const int8_t *a, size_t rows, size_t k4)
{
    __mmask64 left = ~0ULL << (DEPTH - k4 % DEPTH);
    for (size_t r = 0; r < rows; r++)
        _mm512_store_si512(tail[r], _mm512_maskz_loadu_epi8(left, a + r * k4 + k4 - DEPTH));
}

/* ---- up to 16 rows by 64 columns: sums in tiles 0 to 3, a in 4, weights in 5 to 7 ---- */

MG_INLINE TARGET void step_low(const int8_t *a, size_t a_row, const int8_t *w)
{
    _tile_loadd(4, a, a_row);
    _tile_loadd(5, w, PANEL_ROW);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(6, w + 64, PANEL_ROW);
    _tile_dpbusd(1, 4, 6);
    _tile_loadd(7, w + 128, PANEL_ROW);
    _tile_dpbusd(2, 4, 7);
    _tile_loadd(5, w + 192, PANEL_ROW);
    _tile_dpbusd(3, 4, 5);
}

TARGET static void dot_low(int32_t *acc, const int8_t *a, const int8_t *tail, const int8_t *panel,
                           const int32_t *start, size_t k4, size_t depth)
{
    size_t i = 0;
    _tile_loadd(0, start, 0);           /* in every row */
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start + 32, 0);
    _tile_loadd(3, start + 48, 0);
    for (; i + depth <= k4; i += depth)
        step_low(a + i, k4, panel + i * MG_PANEL);
    if (i < k4)
        step_low(tail, DEPTH, panel + (k4 - DEPTH) * MG_PANEL);
    _tile_stored(0, acc, ACC_ROW);
    _tile_stored(1, acc + 16, ACC_ROW);
    _tile_stored(2, acc + 32, ACC_ROW);
    _tile_stored(3, acc + 48, ACC_ROW);
}

/* ---- 17 to 32 rows by 32 columns: sums in tiles 0 to 3, a in 4 and 5, weights in 6 and 7 ---- */

MG_INLINE TARGET void step_high(const int8_t *a, size_t a_row, const int8_t *w)
{
    _tile_loadd(4, a, a_row);
    _tile_loadd(6, w, PANEL_ROW);
    _tile_dpbusd(0, 4, 6);
    _tile_loadd(7, w + 64, PANEL_ROW);
    _tile_dpbusd(1, 4, 7);
    _tile_loadd(5, a + MG_TILE_ROWS * a_row, a_row);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
}

TARGET static void dot_high(int32_t *acc, const int8_t *a, const int8_t *tail, const int8_t *panel,
                            const int32_t *start, size_t k4, size_t depth)
{
    size_t i = 0;
    _tile_loadd(0, start, 0);
    _tile_loadd(1, start + 16, 0);
    _tile_loadd(2, start, 0);
    _tile_loadd(3, start + 16, 0);
    for (; i + depth <= k4; i += depth)
        step_high(a + i, k4, panel + i * MG_PANEL);
    if (i < k4)
        step_high(tail, DEPTH, panel + (k4 - DEPTH) * MG_PANEL);
    _tile_stored(0, acc, ACC_ROW);
    _tile_stored(1, acc + 16, ACC_ROW);
    _tile_stored(2, acc + MG_TILE_ROWS * MG_PANEL, ACC_ROW);
    _tile_stored(3, acc + MG_TILE_ROWS * MG_PANEL + 16, ACC_ROW);
}

TARGET static void configure(size_t rows, size_t depth)
{
    const uint8_t low = (uint8_t)mg_min(rows, MG_TILE_ROWS), high = (uint8_t)(rows - low), fours = (uint8_t)(depth / 4);
    const uint16_t all = MG_TILE_BYTES, some = (uint16_t)depth;
    if (high == 0)
        mg_configure_tiles(&(struct mg_tiles){.palette = 1, .row_bytes = {all, all, all, all, some, all, all, all},
                                              .rows = {low, low, low, low, low, fours, fours, fours}});
    else
        mg_configure_tiles(&(struct mg_tiles){.palette = 1, .row_bytes = {all, all, all, all, some, some, all, all},
                                              .rows = {low, low, high, high, low, high, fours, fours}});
}

TARGET static void dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                             size_t k)
{
    _Alignas(64) int8_t tail[ROWS][DEPTH];
    const size_t k4 = mg_round_up(k, 4), depth = mg_max(4, mg_min(k4, DEPTH));
    if (rows < FEW) {
        mg_avx512vnni.dot_panel(acc, a, panel, start, rows, k);
        return;
    }
    if (k4 % depth != 0)
        copy_tail(tail, a, rows, k4);
    configure(rows, depth);
    mg_tile_fence(tail);
    if (rows <= MG_TILE_ROWS) {
        dot_low(acc, a, tail[0], panel, start, k4, depth);
        return;
    }
    for (size_t j = 0; j < MG_PANEL; j += 32)
        dot_high(acc + j, a, tail[0], panel + 4 * j, start + j, k4, depth);
}

/* What dot_panel reads are bytes as they come here, and no weight is too small for it. */
static void dot_bytes(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    dot_panel(acc, (const int8_t *)a, panel, start, rows, k);
}

const struct mg_int8_attention mg_amx_int8 = {
    .few_queries = 8,
    .score_panel = dot_bytes,
    .sum_panel = dot_bytes,
    .value_panel = dot_bytes,
    .score_keys = mg_avx512_score_keys,
    .weigh = mg_avx512_weigh,
    .weigh_diffused = mg_avx512_weigh_diffused,
    .weigh_some = mg_avx512_weigh_some,
    .sum_values = mg_avx512_sum_values,
};

const struct mg_kernels mg_amx = {
    .name = "amx",
    .max_rows = ROWS,
    .offset = 128,
    .pack_rows = mg_avx512_pack_rows,
    .dot_panel = dot_panel,
    .finish = mg_avx512_finish,
    .finish_tile = mg_avx512_finish_tile,
    .quantize_row = mg_avx512_quantize_row,
    .layer_norm_row = mg_avx512_layer_norm_row,
    .max_queries = 48,
    .few_queries = 8,
    .attend_floats = mg_avx512_attend_floats,
    .attend = mg_avx512_attend,
    .attend_range = mg_avx512_attend_range,
    .reads_narrow = 1,
    .attend_backward_floats = mg_avx512_attend_backward_floats,
    .attend_backward = mg_avx512_attend_backward,
    .rows = &mg_avx512_rows,
    .int8 = &mg_amx_int8,
};
#endif
