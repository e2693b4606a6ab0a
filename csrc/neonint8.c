/* NEON, without and with dot products: attention in int8.  Elements of keys and values are made unsigned like the bytes
   that they are multiplied with: sum a w = sum a (w + 128) - 128 sum a, exact for all bytes. */
#if defined(__aarch64__)
#include "neon.h"

#include <string.h>

enum { ROWS = 4, DOT_ROWS = 6, LANES = 4, BYTES = 16 };

/* ---- panels: many queries ---- */

MG_INLINE uint8x16_t four_times(const uint8_t *row)
{
    uint32_t four;
    memcpy(&four, row, sizeof four);
    return vreinterpretq_u8_u32(vdupq_n_u32(four));
}

/* 16 elements + 128 */
MG_INLINE uint8x16_t raised(int8x16_t w) { return veorq_u8(vreinterpretq_u8_s8(w), vdupq_n_u8(128)); }

/* away[r] = 128 sum_k a[r][k] */
MG_INLINE void sum_rows(uint32_t *away, const uint8_t *a, size_t k4, const size_t rows)
{
    for (size_t r = 0; r < rows; r++) {
        uint32_t sum = 0;
        for (size_t i = 0; i < k4; i++)
            sum += a[r * k4 + i];
        away[r] = 128 * sum;
    }
}

/* start - away, modulo 2^32 as all sums before they are whole. */
MG_INLINE uint32x4_t start_of(const int32_t *start, uint32_t away)
{
    return vsubq_u32(vreinterpretq_u32_s32(vld1q_s32(start)), vdupq_n_u32(away));
}

MG_INLINE void store_sums(int32_t *acc, uint32x4_t sums) { vst1q_s32(acc, vreinterpretq_s32_u32(sums)); }

/* As in neon.c; with two groups of 4 elements only where two products fit 16 bits together. */
MG_INLINE void dot_step(uint32x4_t c[ROWS][4], const uint8_t *a, size_t a_row, const int8_t *w, const size_t rows,
                        const int two)
{
    uint8x16_t x[ROWS], y[ROWS];
    MG_UNROLL
    for (size_t r = 0; r < rows; r++) {
        x[r] = four_times(a + r * a_row);
        y[r] = two ? four_times(a + r * a_row + 4) : x[r];
    }
    MG_UNROLL
    for (size_t j = 0; j < 2; j++) {
        uint8x16_t w0 = raised(vld1q_s8(w + 16 * j)), w1 = two ? raised(vld1q_s8(w + 4 * MG_PANEL + 16 * j)) : w0;
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            uint16x8_t low = vmull_u8(vget_low_u8(w0), vget_low_u8(x[r])), high = vmull_high_u8(w0, x[r]);
            if (two) {
                low = vmlal_u8(low, vget_low_u8(w1), vget_low_u8(y[r]));
                high = vmlal_high_u8(high, w1, y[r]);
            }
            c[r][2 * j] = vpadalq_u16(c[r][2 * j], low);
            c[r][2 * j + 1] = vpadalq_u16(c[r][2 * j + 1], high);
        }
    }
}

MG_INLINE void dot_rows(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t k4,
                        const size_t rows, const int pairs)
{
    uint32_t away[ROWS];
    sum_rows(away, a, k4, rows);
    for (size_t column = 0; column < MG_PANEL; column += 8) {
        uint32x4_t c[ROWS][4];
        size_t i = 0;
        MG_UNROLL
        for (size_t r = 0; r < rows; r++)
            c[r][0] = c[r][1] = c[r][2] = c[r][3] = vdupq_n_u32(0);
        for (; pairs && i + 8 <= k4; i += 8)
            dot_step(c, a + i, k4, panel + i * MG_PANEL + 4 * column, rows, 1);
        for (; i < k4; i += 4)
            dot_step(c, a + i, k4, panel + i * MG_PANEL + 4 * column, rows, 0);
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < 2; j++) {
                const size_t at = column + 4 * j;
                uint32x4_t sums = vpaddq_u32(c[r][2 * j], c[r][2 * j + 1]);
                store_sums(acc + r * MG_PANEL + at, vaddq_u32(sums, start_of(start + at, away[r])));
            }
        }
    }
}

MG_INLINE void dot_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                         size_t k, const int pairs)
{
    size_t k4 = mg_round_up(k, 4);
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k4, 1, pairs); break;
    case 2: dot_rows(acc, a, panel, start, k4, 2, pairs); break;
    case 3: dot_rows(acc, a, panel, start, k4, 3, pairs); break;
    default: dot_rows(acc, a, panel, start, k4, ROWS, pairs); break;
    }
}

static void score_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                        size_t k)
{
    dot_panel(acc, a, panel, start, rows, k, 0);
}

/* (p0 + p1) * 255 <= 256 * 255 < 2^16 */
static void sum_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    dot_panel(acc, a, panel, start, rows, k, 1);
}

#ifdef MG_NEON_DOT
MG_INLINE MG_NEON_DOT void udot_rows(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start,
                                     size_t k4, const size_t rows, const size_t vectors)
{
    uint32_t away[DOT_ROWS];
    sum_rows(away, a, k4, rows);
    for (size_t column = 0; column < MG_PANEL; column += 4 * vectors) {
        uint32x4_t c[DOT_ROWS][8];
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++)
                c[r][j] = start_of(start + column + 4 * j, away[r]);
        }
        for (size_t i = 0; i < k4; i += 4) {
            uint8x16_t x[DOT_ROWS];
            MG_UNROLL
            for (size_t r = 0; r < rows; r++)
                x[r] = four_times(a + r * k4 + i);
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                uint8x16_t w = raised(vld1q_s8(panel + i * MG_PANEL + 4 * column + 16 * j));
                MG_UNROLL
                for (size_t r = 0; r < rows; r++)
                    c[r][j] = vdotq_u32(c[r][j], w, x[r]);
            }
        }
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++)
                store_sums(acc + r * MG_PANEL + column + 4 * j, c[r][j]);
        }
    }
}

MG_NEON_DOT static void udot_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start,
                                   size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    switch (rows) {
    case 1: udot_rows(acc, a, panel, start, k4, 1, 8); break;
    case 2: udot_rows(acc, a, panel, start, k4, 2, 8); break;
    case 3: udot_rows(acc, a, panel, start, k4, 3, 4); break;
    case 4: udot_rows(acc, a, panel, start, k4, 4, 4); break;
    case 5: udot_rows(acc, a, panel, start, k4, 5, 4); break;
    default: udot_rows(acc, a, panel, start, k4, DOT_ROWS, 4); break;
    }
}
#endif

/* ---- softmax ---- */

MG_INLINE int32_t *scores_at(int32_t *scores, size_t stride, size_t j)
{
    return scores + j / MG_PANEL * stride + j % MG_PANEL;
}

/* All ones in the lanes of numbers that are left. */
MG_INLINE uint32x4_t mask_of(size_t left)
{
    static const uint32_t lanes[LANES] = {0, 1, 2, 3};
    return vcltq_u32(vld1q_u32(lanes), vdupq_n_u32(left < LANES ? (uint32_t)left : LANES));
}

static int32_t largest(int32_t *scores, size_t stride, size_t n)
{
    int32x4_t tops = vdupq_n_s32(scores[0]);
    for (size_t j = 0; j < n; j += LANES) {
        int32x4_t x = vld1q_s32(scores_at(scores, stride, j));
        tops = vmaxq_s32(tops, vbslq_s32(mask_of(n - j), x, tops));
    }
    return vmaxvq_s32(tops);
}

/* Scores become exponentials, floats in the integers' places, zeros beyond n; -> their sum */
static float raise(int32_t *scores, size_t stride, size_t n, int32_t top, float unit)
{
    float32x4_t sums = vdupq_n_f32(0.0f);
    for (size_t j = 0; j < n; j += LANES) {
        int32_t *at = scores_at(scores, stride, j);
        uint32x4_t mask = mask_of(n - j);       /* beyond n stands anything */
        uint32x4_t below = vsubq_u32(vreinterpretq_u32_s32(vld1q_s32(at)), vdupq_n_u32((uint32_t)top));
        float32x4_t e = exp2_of(vmulq_n_f32(vcvtq_f32_s32(vreinterpretq_s32_u32(below)), unit));
        e = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(e), mask));
        sums = vaddq_f32(sums, e);
        vst1q_s32(at, vreinterpretq_s32_f32(e));
    }
    return vaddvq_f32(sums);
}

/* Up to LANES of 0 to 255. */
MG_INLINE void write_bytes(uint8_t *p, uint32x4_t x, size_t n)
{
    uint16x4_t half = vmovn_u32(x);
    uint8x8_t bytes = vmovn_u16(vcombine_u16(half, half));
    if (n >= LANES)
        memcpy(p, &bytes, LANES);
    else
        memcpy(p, &bytes, n);
}

static uint32_t weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    float scale = 255.0f / raise(scores, stride, n, largest(scores, stride, n), unit);
    uint32x4_t totals = vdupq_n_u32(0);
    for (size_t j = 0; j < n; j += LANES) {
        float32x4_t e = vreinterpretq_f32_s32(vld1q_s32(scores_at(scores, stride, j)));
        uint32x4_t x = vcvtnq_u32_f32(vmulq_n_f32(e, scale));
        totals = vaddq_u32(totals, x);
        write_bytes(p + j, x, n - j);
    }
    return vaddvq_u32(totals);
}

static uint32_t weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    const uint32x4_t zero = vdupq_n_u32(0);
    float scale = (float)(255 << MG_DIFFUSED_BITS) / raise(scores, stride, n, largest(scores, stride, n), unit);
    uint32x4_t carried = vdupq_n_u32(1 << (MG_DIFFUSED_BITS - 1)), before = zero;
    for (size_t j = 0; j < n; j += LANES) {
        float32x4_t e = vreinterpretq_f32_s32(vld1q_s32(scores_at(scores, stride, j)));
        uint32x4_t x = vcvtnq_u32_f32(vmulq_n_f32(e, scale));
        x = vaddq_u32(x, vextq_u32(zero, x, 3));
        x = vaddq_u32(x, vextq_u32(zero, x, 2));        /* x[i] + .. + x[0] */
        x = vaddq_u32(carried, x);
        carried = vdupq_laneq_u32(x, 3);
        uint32x4_t whole = vshrq_n_u32(x, MG_DIFFUSED_BITS);
        write_bytes(p + j, vsubq_u32(whole, vextq_u32(before, whole, 3)), n - j);
        before = whole;
    }
    return vgetq_lane_u32(carried, 0) >> MG_DIFFUSED_BITS;
}

static float weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n, float scale,
                        float *top)
{
    float x[MG_WEIGHED];
    float32x4_t tops = vdupq_n_f32(MG_LOWEST), sums = vdupq_n_f32(0.0f);
    for (size_t j = 0; j < n; j += LANES) {
        float factor[LANES] = {0};
        memcpy(factor, key_scale + j, mg_min(LANES, n - j) * sizeof *factor);
        int32x4_t number = vld1q_s32(scores + j / MG_PANEL * stride + j % MG_PANEL);
        float32x4_t score = vmulq_f32(vcvtq_f32_s32(number), vld1q_f32(factor));
        score = vbslq_f32(mask_of(n - j), score, vdupq_n_f32(MG_LOWEST));
        tops = vmaxq_f32(tops, score);
        vst1q_f32(x + j, score);
    }
    float largest = vmaxvq_f32(tops);
    *top = scale * largest;
    for (size_t j = 0; j < n; j += LANES) {
        float32x4_t e = exp2_of(vmulq_n_f32(vsubq_f32(vld1q_f32(x + j), vdupq_n_f32(largest)), scale));
        e = vmulq_n_f32(e, 255.0f);
        sums = vaddq_f32(sums, vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(e), mask_of(n - j))));
        write_bytes(p + j, vcvtnq_u32_f32(e), n - j);
    }
    return vaddvq_f32(sums);
}

/* ---- rows: few queries ---- */

/* 16 bytes, zeros beyond those that are left. */
MG_INLINE int8x16_t load(const int8_t *x, size_t left)
{
    int8_t some[BYTES] = {0};
    if (left >= BYTES)
        return vld1q_s8(x);
    memcpy(some, x, left);
    return vld1q_s8(some);
}

MG_INLINE int32x4_t sums_of(const int32x4_t *c) { return vpaddq_s32(vpaddq_s32(c[0], c[1]), vpaddq_s32(c[2], c[3])); }

/* c[r] += sum_i (q[i] - zero) * key[r][i], four keys, those beyond n being copies of the last; up to 16 elements.
   Differences and keys have 16 bits. */
MG_INLINE void key_step(int32x4_t *c, const int8_t *q, int32_t zero, const int8_t *key, size_t k_row, size_t n,
                        size_t left)
{
    const int16x8_t zeros = vdupq_n_s16((int16_t)zero);
    int8x16_t x = load(q, left);        /* beyond q, keys are zero */
    int16x8_t low = vsubq_s16(vmovl_s8(vget_low_s8(x)), zeros), high = vsubq_s16(vmovl_high_s8(x), zeros);
    MG_UNROLL
    for (size_t r = 0; r < 4; r++) {
        int8x16_t k = load(key, left);
        int16x8_t y = vmovl_s8(vget_low_s8(k)), z = vmovl_high_s8(k);
        c[r] = vmlal_s16(c[r], vget_low_s16(low), vget_low_s16(y));
        c[r] = vmlal_high_s16(c[r], low, y);
        c[r] = vmlal_s16(c[r], vget_low_s16(high), vget_low_s16(z));
        c[r] = vmlal_high_s16(c[r], high, z);
        key += r + 1 < n ? k_row : 0;
    }
}

static void score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                       size_t d)
{
    for (size_t j = 0; j < n; j += 4) {
        int32x4_t c[4] = {vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)};
        size_t i = 0;
        for (; i + BYTES <= d; i += BYTES)
            key_step(c, q + i, zero, k + j * k_row + i, k_row, n - j, BYTES);
        if (i < d)
            key_step(c, q + i, zero, k + j * k_row + i, k_row, n - j, d - i);
        vst1q_s32(scores + j, sums_of(c));
    }
}

/* As key_step, but c[r] += sum q k, away[r] += sum zero k. */
#ifdef MG_NEON_DOT
MG_INLINE MG_NEON_DOT void sdot_step(int32x4_t *c, int32x4_t *away, const int8_t *q, int32_t zero, const int8_t *key,
                                     size_t k_row, size_t n, size_t left)
{
    const int8x16_t zeros = vdupq_n_s8((int8_t)zero), x = load(q, left);
    MG_UNROLL
    for (size_t r = 0; r < 4; r++) {
        int8x16_t k = load(key, left);
        c[r] = vdotq_s32(c[r], x, k);
        away[r] = vdotq_s32(away[r], zeros, k);
        key += r + 1 < n ? k_row : 0;
    }
}

MG_NEON_DOT static void sdot_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row,
                                  size_t n, size_t d)
{
    for (size_t j = 0; j < n; j += 4) {
        int32x4_t c[4], away[4];
        size_t i = 0;
        MG_UNROLL
        for (size_t r = 0; r < 4; r++)
            c[r] = away[r] = vdupq_n_s32(0);
        for (; i + BYTES <= d; i += BYTES)
            sdot_step(c, away, q + i, zero, k + j * k_row + i, k_row, n - j, BYTES);
        if (i < d)
            sdot_step(c, away, q + i, zero, k + j * k_row + i, k_row, n - j, d - i);
        vst1q_s32(scores + j, vsubq_s32(sums_of(c), sums_of(away)));
    }
}
#endif

/* Two values at a time, some vectors of 16 of their elements, the last of up to 16; most weights are zero. */
MG_INLINE void add_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t left,
                          const size_t vectors)
{
    uint32x4_t c[2][4];
    uint32_t total = 0;
    MG_UNROLL
    for (size_t x = 0; x < vectors; x++)
        c[x][0] = c[x][1] = c[x][2] = c[x][3] = vdupq_n_u32(0);
    for (size_t j = 0; j < n; j += 2) {
        if ((p[j] | p[j + 1]) == 0)
            continue;
        const int8_t *at = v + j * v_row, *next = at + (j + 1 < n ? v_row : 0);
        uint8x8_t a = vdup_n_u8(p[j]), b = vdup_n_u8(p[j + 1]);
        total += (uint32_t)(p[j] + p[j + 1]);
        MG_UNROLL
        for (size_t x = 0; x < vectors; x++) {
            uint8x16_t y = raised(load(at + BYTES * x, left)), z = raised(load(next + BYTES * x, left));
            uint16x8_t low = vmlal_u8(vmull_u8(vget_low_u8(y), a), vget_low_u8(z), b);
            uint16x8_t high = vmlal_u8(vmull_u8(vget_high_u8(y), a), vget_high_u8(z), b);
            c[x][0] = vaddw_u16(c[x][0], vget_low_u16(low));
            c[x][1] = vaddw_high_u16(c[x][1], low);
            c[x][2] = vaddw_u16(c[x][2], vget_low_u16(high));
            c[x][3] = vaddw_high_u16(c[x][3], high);
        }
    }
    MG_UNROLL
    for (size_t x = 0; x < vectors; x++) {
        MG_UNROLL
        for (size_t h = 0; h < 4; h++)
            store_sums(acc + BYTES * x + LANES * h, vsubq_u32(c[x][h], vdupq_n_u32(128 * total)));
    }
}

static void sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d)
{
    size_t i = 0;
    for (; i + 2 * BYTES <= d; i += 2 * BYTES)
        add_values(acc + i, p, v + i, v_row, n, BYTES, 2);
    for (; i < d; i += BYTES)
        add_values(acc + i, p, v + i, v_row, n, d - i, 1);
}

const struct mg_int8_attention mg_neon_int8 = {
    .few_queries = 6,
    .score_panel = score_panel,
    .sum_panel = sum_panel,
    .value_panel = score_panel,
    .score_keys = score_keys,
    .weigh = weigh,
    .weigh_diffused = weigh_diffused,
    .weigh_some = weigh_some,
    .sum_values = sum_values,
};

#ifdef MG_NEON_DOT
const struct mg_int8_attention mg_neondot_int8 = {
    .few_queries = 6,
    .score_panel = udot_panel,
    .sum_panel = udot_panel,
    .value_panel = udot_panel,
    .score_keys = sdot_keys,
    .weigh = weigh,
    .weigh_diffused = weigh_diffused,
    .weigh_some = weigh_some,
    .sum_values = sum_values,
};
#endif
#endif
