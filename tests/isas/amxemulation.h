/* AMX's tiles in plain C, after the operations in Intel's manual (SDM volume 2, LDTILECFG and the others): csrc/amx.h
   includes this instead of the processor's with MG_AMX_EMULATED.  Where the manual has a fault, abort(). */
#ifndef ISAS_AMXEMULATION_H
#define ISAS_AMXEMULATION_H

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TMM_N = 8, TMM_ROWS = 16, TMM_BYTES = 64 };      /* of palette 1 */

struct tmm_configuration {
    uint8_t palette, start_row, none[14];
    uint16_t row_bytes[TMM_N], none_either[TMM_N];
    uint8_t rows[TMM_N], nor_any[TMM_N];
};

/* One for each thread, shared by all files, as the registers are. */
struct tmm_state {
    struct tmm_configuration now;
    uint8_t tile[TMM_N][TMM_ROWS][TMM_BYTES];
};
__attribute__((weak)) _Thread_local struct tmm_state mg_tmm;

/* Faults for a trial to find: where a sum is one too large. */
enum { TMM_RIGHT, INT8_FULL, INT8_ROWS, INT8_DEPTH, INT8_SECOND, BF16_FULL, BF16_ROWS, BF16_THIRD, TMM_FAULTS };
__attribute__((weak)) int mg_tmm_wrong;

static inline int tmm_is_wrong(int c, int b, int is_int8)
{
    const uint8_t *rows = mg_tmm.now.rows;
    switch (mg_tmm_wrong) {
    case INT8_FULL: return is_int8 && rows[c] == TMM_ROWS && rows[b] == TMM_ROWS;
    case INT8_ROWS: return is_int8 && rows[c] < TMM_ROWS;
    case INT8_DEPTH: return is_int8 && rows[b] < TMM_ROWS;
    case INT8_SECOND: return is_int8 && c == 3 && rows[c] < rows[0];
    case BF16_FULL: return !is_int8 && rows[c] == TMM_ROWS;
    case BF16_ROWS: return !is_int8 && rows[c] < TMM_ROWS;
    case BF16_THIRD: return !is_int8 && c == 2;
    default: return 0;
    }
}

__attribute__((noreturn)) static inline void tmm_fault(const char *instruction, const char *fault)
{
    fprintf(stderr, "emulated %s: %s\n", instruction, fault);
    abort();
}

static inline int tmm_any(const void *bytes, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (((const uint8_t *)bytes)[i] != 0)
            return 1;
    return 0;
}

/* A tile that an instruction may use. */
static inline void tmm_check(const char *instruction, int t)
{
    if (t < 0 || t >= TMM_N)
        tmm_fault(instruction, "no such tile");
    if (mg_tmm.now.palette == 0)
        tmm_fault(instruction, "tiles are not configured");
    if (mg_tmm.now.rows[t] == 0)
        tmm_fault(instruction, "a tile that is not configured");
}

static inline void tmm_loadconfig(const void *memory)
{
    struct tmm_configuration c;
    memcpy(&c, memory, sizeof c);
    if (c.palette > 1)
        tmm_fault("ldtilecfg", "no such palette");
    memset(&mg_tmm, 0, sizeof mg_tmm);
    if (c.palette == 0)
        return;
    if (tmm_any(c.none, sizeof c.none) || tmm_any(c.none_either, sizeof c.none_either) ||
        tmm_any(c.nor_any, sizeof c.nor_any))
        tmm_fault("ldtilecfg", "reserved bytes");
    for (int t = 0; t < TMM_N; t++) {
        if (c.row_bytes[t] > TMM_BYTES || c.rows[t] > TMM_ROWS)
            tmm_fault("ldtilecfg", "a tile is too large");
        if ((c.row_bytes[t] == 0) != (c.rows[t] == 0))
            tmm_fault("ldtilecfg", "a tile of rows or bytes alone");
    }
    mg_tmm.now = c;
}

static inline void tmm_storeconfig(void *memory) { memcpy(memory, &mg_tmm.now, sizeof mg_tmm.now); }

static inline void tmm_loadd(int t, const void *base, long stride)
{
    tmm_check("tileloadd", t);
    memset(mg_tmm.tile[t], 0, sizeof mg_tmm.tile[t]);
    for (int r = 0; r < mg_tmm.now.rows[t]; r++)
        memcpy(mg_tmm.tile[t][r], (const char *)base + r * stride, mg_tmm.now.row_bytes[t]);
}

static inline void tmm_stored(int t, void *base, long stride)
{
    tmm_check("tilestored", t);
    for (int r = 0; r < mg_tmm.now.rows[t]; r++)
        memcpy((char *)base + r * stride, mg_tmm.tile[t][r], mg_tmm.now.row_bytes[t]);
}

/* c (m, n) += a (m, k) b (k, n) of 4 bytes each: shapes that fit. */
static inline void tmm_check_product(const char *instruction, int c, int a, int b)
{
    const struct tmm_configuration *now = &mg_tmm.now;
    tmm_check(instruction, c);
    tmm_check(instruction, a);
    tmm_check(instruction, b);
    if (c == a || c == b || a == b)
        tmm_fault(instruction, "a tile that stands for two operands");
    if (now->row_bytes[c] % 4 != 0 || now->row_bytes[a] % 4 != 0 || now->row_bytes[b] % 4 != 0)
        tmm_fault(instruction, "rows that do not consist of 4 bytes");
    if (now->rows[c] != now->rows[a] || now->row_bytes[a] / 4 != now->rows[b] || now->row_bytes[c] != now->row_bytes[b])
        tmm_fault(instruction, "shapes that do not fit");
}

static inline void tmm_dpbusd(int c, int a, int b)
{
    tmm_check_product("tdpbusd", c, a, b);
    const int n = mg_tmm.now.row_bytes[c] / 4;
    for (int m = 0; m < mg_tmm.now.rows[c]; m++)
        for (int k = 0; k < mg_tmm.now.rows[b]; k++) {
            const uint8_t *x = mg_tmm.tile[a][m] + 4 * k;
            const int8_t *y = (const int8_t *)mg_tmm.tile[b][k];
            uint32_t sums[TMM_BYTES / 4];       /* which wrap */
            memcpy(sums, mg_tmm.tile[c][m], sizeof sums);
            for (int j = 0; j < n; j++)
                for (int i = 0; i < 4; i++)
                    sums[j] += (uint32_t)(x[i] * y[4 * j + i]);
            sums[0] += (uint32_t)(k == 0 && tmm_is_wrong(c, b, 1));
            memcpy(mg_tmm.tile[c][m], sums, sizeof sums);
        }
}

/* Subnormal numbers count as zeros, and become zeros. */
static inline float tmm_flush(float x) { return fabsf(x) < FLT_MIN ? copysignf(0.0f, x) : x; }

static inline float tmm_bf16(const uint8_t *at)
{
    float x;
    memcpy(&x, (const uint8_t[]){0, 0, at[0], at[1]}, sizeof x);
    return tmm_flush(x);
}

/* Products of a row are summed by themselves, the first ones of pairs and the second ones apart; each step is rounded
   once, to the nearest. */
static inline void tmm_dpbf16ps(int c, int a, int b)
{
    tmm_check_product("tdpbf16ps", c, a, b);
    const int n = mg_tmm.now.row_bytes[c] / 4;
    for (int m = 0; m < mg_tmm.now.rows[c]; m++) {
        float two[TMM_BYTES / 4][2] = {{0.0f}}, sums[TMM_BYTES / 4];
        for (int k = 0; k < mg_tmm.now.rows[b]; k++)
            for (int j = 0; j < n; j++)
                for (int i = 0; i < 2; i++)
                    two[j][i] = tmm_flush(fmaf(tmm_bf16(mg_tmm.tile[a][m] + 4 * k + 2 * i),
                                               tmm_bf16(mg_tmm.tile[b][k] + 4 * j + 2 * i), two[j][i]));
        memcpy(sums, mg_tmm.tile[c][m], sizeof sums);
        for (int j = 0; j < n; j++)
            sums[j] = tmm_flush(tmm_flush(sums[j]) + tmm_flush(two[j][0] + two[j][1]));
        sums[0] += (float)tmm_is_wrong(c, b, 0);
        memcpy(mg_tmm.tile[c][m], sums, sizeof sums);
    }
}

#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbusd
#undef _tile_dpbf16ps
#define _tile_loadconfig tmm_loadconfig
#define _tile_storeconfig tmm_storeconfig
#define _tile_loadd(tile, base, stride) tmm_loadd(tile, base, (long)(stride))
#define _tile_stored(tile, base, stride) tmm_stored(tile, base, (long)(stride))
#define _tile_dpbusd tmm_dpbusd
#define _tile_dpbf16ps tmm_dpbf16ps

#endif
