/* NEON, without and with dot products: the integer product, the epilogue and the row kernels; attention is in
   neonattention.c and neonint8.c.  NEON is part of AArch64, so compilers make it of plain C too: what they make of the
   elementwise kernels of training is used as it is, and so is the backward of attention, which devices do not run.
   Sizes of tiles follow from 32 registers; they, and few_queries, have been tested under an emulator and never timed. */
#if defined(__aarch64__)
#include "kernels.h"

#include <arm_neon.h>
#include <string.h>

enum { ROWS = 4, DOT_ROWS = 6, LANES = 8 };

static void pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    mg_portable.pack_rows(packed, a, rows, k, zero);
}

/* 4 elements of a row, for each of 4 columns. */
MG_INLINE int8x16_t four_times(const int8_t *row)
{
    int32_t four;
    memcpy(&four, row, sizeof four);
    return vreinterpretq_s8_s32(vdupq_n_s32(four));
}

/* ---- integer product without dot products ---- */

/* A vector holds 4 columns of 4.  Products have 16 bits, and so have sums of two of them, of 4 elements along k and the
   next 4: |w| <= 127 (mg_pack_int8 takes no other), and 2 * 128 * 127 < 2^15.  Neighbours are added in 32 bits: there
   are two sums for each column. */
MG_INLINE void dot_step(int32x4_t c[ROWS][16], const int8_t *a, size_t a_row, const int8_t *w, const size_t rows,
                        const size_t vectors, const int two)
{
    int8x16_t x[ROWS], y[ROWS];
    MG_UNROLL
    for (size_t r = 0; r < rows; r++) {
        x[r] = four_times(a + r * a_row);
        y[r] = two ? four_times(a + r * a_row + 4) : x[r];
    }
    MG_UNROLL
    for (size_t j = 0; j < vectors; j++) {
        int8x16_t w0 = vld1q_s8(w + 16 * j), w1 = two ? vld1q_s8(w + 4 * MG_PANEL + 16 * j) : w0;
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            int16x8_t low = vmull_s8(vget_low_s8(w0), vget_low_s8(x[r])), high = vmull_high_s8(w0, x[r]);
            if (two) {
                low = vmlal_s8(low, vget_low_s8(w1), vget_low_s8(y[r]));
                high = vmlal_high_s8(high, w1, y[r]);
            }
            c[r][2 * j] = vpadalq_s16(c[r][2 * j], low);
            c[r][2 * j + 1] = vpadalq_s16(c[r][2 * j + 1], high);
        }
    }
}

MG_INLINE void dot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t k4,
                        const size_t rows, const size_t vectors)
{
    for (size_t column = 0; column < MG_PANEL; column += 4 * vectors) {
        int32x4_t c[ROWS][16];
        size_t i = 0;
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < 2 * vectors; j++)
                c[r][j] = vdupq_n_s32(0);
        }
        for (; i + 8 <= k4; i += 8)
            dot_step(c, a + i, k4, panel + i * MG_PANEL + 4 * column, rows, vectors, 1);
        if (i < k4)
            dot_step(c, a + i, k4, panel + i * MG_PANEL + 4 * column, rows, vectors, 0);
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                int32x4_t sums = vpaddq_s32(c[r][2 * j], c[r][2 * j + 1]);
                vst1q_s32(acc + r * MG_PANEL + column + 4 * j, vaddq_s32(sums, vld1q_s32(start + column + 4 * j)));
            }
        }
    }
}

static void dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k4, 1, 8); break;
    case 2: dot_rows(acc, a, panel, start, k4, 2, 4); break;
    case 3: dot_rows(acc, a, panel, start, k4, 3, 2); break;
    default: dot_rows(acc, a, panel, start, k4, ROWS, 2); break;
    }
}

/* ---- integer product with dot products ---- */

/* sdot adds 4 products in 32 bits.  6 rows * 4 vectors of sums, 6 of a and one of w fill 31 of 32 registers. */
#ifdef MG_NEON_DOT
MG_INLINE MG_NEON_DOT void sdot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start,
                                     size_t k4, const size_t rows, const size_t vectors)
{
    for (size_t column = 0; column < MG_PANEL; column += 4 * vectors) {
        int32x4_t c[DOT_ROWS][16];
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++)
                c[r][j] = vld1q_s32(start + column + 4 * j);
        }
        for (size_t i = 0; i < k4; i += 4) {
            int8x16_t x[DOT_ROWS];
            MG_UNROLL
            for (size_t r = 0; r < rows; r++)
                x[r] = four_times(a + r * k4 + i);
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                int8x16_t w = vld1q_s8(panel + i * MG_PANEL + 4 * column + 16 * j);
                MG_UNROLL
                for (size_t r = 0; r < rows; r++)
                    c[r][j] = vdotq_s32(c[r][j], w, x[r]);
            }
        }
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++)
                vst1q_s32(acc + r * MG_PANEL + column + 4 * j, c[r][j]);
        }
    }
}

MG_NEON_DOT static void sdot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start,
                                   size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    switch (rows) {
    case 1: sdot_rows(acc, a, panel, start, k4, 1, 16); break;
    case 2: sdot_rows(acc, a, panel, start, k4, 2, 8); break;
    case 3: sdot_rows(acc, a, panel, start, k4, 3, 8); break;
    case 4: sdot_rows(acc, a, panel, start, k4, 4, 4); break;
    case 5: sdot_rows(acc, a, panel, start, k4, 5, 4); break;
    default: sdot_rows(acc, a, panel, start, k4, DOT_ROWS, 4); break;
    }
}
#endif

/* ---- epilogue: 8 numbers at a time, in a pair of vectors ---- */

/* 8 floats, zeros beyond those that are left. */
MG_INLINE float32x4x2_t load(const float *x, size_t left)
{
    float some[LANES] = {0};
    if (left < LANES) {
        memcpy(some, x, left * sizeof *x);
        x = some;
    }
    return (float32x4x2_t){{vld1q_f32(x), vld1q_f32(x + 4)}};
}

MG_INLINE void store(float *out, float32x4x2_t x, size_t left)
{
    float some[LANES];
    float *to = left >= LANES ? out : some;
    vst1q_f32(to, x.val[0]);
    vst1q_f32(to + 4, x.val[1]);
    if (left < LANES)
        memcpy(out, some, left * sizeof *out);
}

/* Integers, as 8 bits, to q[0] and on. */
MG_INLINE void store_bytes(int8_t *q, int32x4_t low, int32x4_t high, size_t left)
{
    int8x8_t eight = vqmovn_s16(vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
    if (left >= LANES)
        vst1_s8(q, eight);
    else
        memcpy(q, &eight, left);
}

MG_INLINE float32x4_t gelu_of(float32x4_t x)
{
    static const float c[] = {MG_GELU_COEFFICIENTS};
    float32x4_t a = vabsq_f32(x), r = vdupq_n_f32(c[7]);
    MG_UNROLL
    for (int i = 6; i >= 0; i--)
        r = vfmaq_f32(vdupq_n_f32(c[i]), r, a);
    r = vdivq_f32(vdupq_n_f32(1.0f), r);
    r = vmulq_f32(r, r);
    r = vmulq_f32(r, r);
    r = vmulq_f32(r, r);
    r = vmulq_f32(r, r);
    return vfmsq_f32(vmaxq_f32(x, vdupq_n_f32(0.0f)), vmulq_n_f32(a, 0.5f), r);
}

/* 8 numbers at i of n, zeros or what stands there beyond n. */
MG_INLINE float32x4x2_t read_numbers(const struct mg_source *s, const float *factor, size_t i, size_t n)
{
    int32x4_t number[2];
    if (s->x != NULL)
        return load(s->x + i, n - i);
    if (s->q != NULL) {
        int8x8_t eight = vdup_n_s8(0);
        if (n - i >= LANES)
            eight = vld1_s8(s->q + i);
        else
            memcpy(&eight, s->q + i, n - i);
        int16x8_t wide = vmovl_s8(eight);
        number[0] = vmovl_s16(vget_low_s16(wide));
        number[1] = vmovl_high_s16(wide);
    } else {
        int32_t some[LANES] = {0};
        const int32_t *from = n - i >= LANES ? s->acc + i : some;
        if (n - i < LANES)
            memcpy(some, s->acc + i, (n - i) * sizeof *some);
        number[0] = vld1q_s32(from);
        number[1] = vld1q_s32(from + 4);
    }
    float32x4x2_t x, scale = {{vdupq_n_f32(s->scale), vdupq_n_f32(s->scale)}};
    if (factor != NULL)
        scale = load(factor + i, n - i);
    MG_UNROLL
    for (int h = 0; h < 2; h++) {
        if (factor != NULL)
            scale.val[h] = vmulq_n_f32(scale.val[h], s->scale);
        x.val[h] = vmulq_f32(vcvtq_f32_s32(vsubq_s32(number[h], vdupq_n_s32(s->zero))), scale.val[h]);
    }
    return x;
}

MG_INLINE void write_numbers(const struct mg_target *t, float32x4x2_t x, size_t i, size_t n)
{
    int32x4_t steps[2];
    if (t->q == NULL) {
        store(t->x + i, x, n - i);
        return;
    }
    MG_UNROLL
    for (int h = 0; h < 2; h++) {
        float32x4_t y = vmulq_n_f32(x.val[h], t->inverse);
        y = vmaxnmq_f32(y, vdupq_n_f32((float)(-128 - t->zero)));       /* this number where y is NaN */
        y = vminnmq_f32(y, vdupq_n_f32((float)(127 - t->zero)));
        steps[h] = vaddq_s32(vcvtnq_s32_f32(y), vdupq_n_s32(t->zero));
    }
    store_bytes(t->q + i, steps[0], steps[1], n - i);
}

MG_INLINE float32x4x2_t sum_of(float32x4x2_t x, float32x4x2_t y)
{
    return (float32x4x2_t){{vaddq_f32(x.val[0], y.val[0]), vaddq_f32(x.val[1], y.val[1])}};
}

static void finish(const struct mg_finish *f, size_t n)
{
    int residual = f->residual.x != NULL || f->residual.q != NULL;
    for (size_t i = 0; i < n; i += LANES) {
        float32x4x2_t x = read_numbers(&f->x, f->factor, i, n);
        if (f->bias != NULL)
            x = sum_of(x, load(f->bias + i, n - i));
        if (f->gelu)
            x = (float32x4x2_t){{gelu_of(x.val[0]), gelu_of(x.val[1])}};
        if (residual)
            x = sum_of(x, read_numbers(&f->residual, NULL, i, n));
        write_numbers(&f->out, x, i, n);
    }
}

/* ---- rows ---- */

static float quantize_row(int8_t *q, const float *x, size_t n)
{
    float32x4_t tops[2] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    for (size_t i = 0; i < n; i += LANES) {
        float32x4x2_t y = load(x + i, n - i);
        tops[0] = vmaxnmq_f32(tops[0], vabsq_f32(y.val[0]));
        tops[1] = vmaxnmq_f32(tops[1], vabsq_f32(y.val[1]));
    }
    float top = vmaxnmvq_f32(vmaxnmq_f32(tops[0], tops[1]));
    if (top < 1e-30f) {
        memset(q, 0, n);
        return 1.0f;
    }
    float inverse = 127.0f / top;
    for (size_t i = 0; i < n; i += LANES) {
        float32x4x2_t y = load(x + i, n - i);
        store_bytes(q + i, vcvtnq_s32_f32(vmulq_n_f32(y.val[0], inverse)),
                    vcvtnq_s32_f32(vmulq_n_f32(y.val[1], inverse)), n - i);
    }
    return top / 127.0f;
}

/* sum_i (x[i] - shift)^power, power 1 or 2: whole vectors in 16 partial sums, the rest one by one. */
MG_INLINE float power_sum(const float *x, float shift, size_t n, const int power)
{
    float32x4_t c[4] = {vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f), vdupq_n_f32(0.0f)};
    float rest = 0.0f;
    size_t i = 0;
    for (; i + 16 <= n; i += 16) {
        MG_UNROLL
        for (size_t v = 0; v < 4; v++) {
            float32x4_t y = vsubq_f32(vld1q_f32(x + i + 4 * v), vdupq_n_f32(shift));
            c[v] = power == 1 ? vaddq_f32(c[v], y) : vfmaq_f32(c[v], y, y);
        }
    }
    for (; i < n; i++)
        rest += power == 1 ? x[i] - shift : (x[i] - shift) * (x[i] - shift);
    return vaddvq_f32(vaddq_f32(vaddq_f32(c[0], c[1]), vaddq_f32(c[2], c[3]))) + rest;
}

static void layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n)
{
    float mean = power_sum(x, 0.0f, n, 1) / (float)n;
    float inverse = 1.0f / sqrtf(power_sum(x, mean, n, 2) / (float)n + eps);
    size_t i = 0;
    for (; i + 4 <= n; i += 4) {
        float32x4_t y = vmulq_n_f32(vsubq_f32(vld1q_f32(x + i), vdupq_n_f32(mean)), inverse);
        vst1q_f32(out + i, vfmaq_f32(vld1q_f32(bias + i), y, vld1q_f32(weight + i)));
    }
    for (; i < n; i++)
        out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

/* ---- what compilers make of the portable code ---- */

static size_t attend_backward_floats(size_t d) { return mg_portable.attend_backward_floats(d); }

static void attend_backward(const struct mg_attention_head *head, float *scratch)
{
    mg_portable.attend_backward(head, scratch);
}

#define FLOAT_KERNELS \
    .pack_rows = pack_rows, \
    .finish = finish, \
    .quantize_row = quantize_row, \
    .layer_norm_row = layer_norm_row, \
    .max_queries = 16, \
    .few_queries = 6, \
    .attend_floats = mg_neon_attend_floats, \
    .attend = mg_neon_attend, \
    .attend_range = mg_neon_attend_range, \
    .attend_backward_floats = attend_backward_floats, \
    .attend_backward = attend_backward, \
    .rows = &mg_portable_rows

const struct mg_kernels mg_neon = {
    .name = "neon",
    .max_rows = ROWS,
    .dot_panel = dot_panel,
    .int8 = &mg_neon_int8,
    FLOAT_KERNELS,
};

#ifdef MG_NEON_DOT
const struct mg_kernels mg_neondot = {
    .name = "neondot",
    .max_rows = DOT_ROWS,
    .dot_panel = sdot_panel,
    .int8 = &mg_neondot_int8,
    FLOAT_KERNELS,
};
#endif
#endif
