/* What the C files share: the dispatch table, the jobs that its functions work on, and the constants of the formulas. */
#ifndef MG_KERNELS_H
#define MG_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "api.h"

#define MG_MAX_THREADS 256
#define MG_MAX_K 131072         /* 131072 * 128 * 127 < 2^31 */
#define MG_MAX_STATIC_K 65536   /* 65536 * 255 * 127 < 2^31 */
#define MG_MAX_ATTENTION 32768  /* 2 * 32768 * 255 * 128 < 2^31: differences of scores */
#define MG_PANEL 64             /* columns of a weight panel */
#define MG_KEYS 64              /* keys that attention takes at a time */
#define MG_DIFFUSED_BITS 22     /* 255 * 2^22 + rounding < 2^31 */
#define MG_WEIGHED 256          /* keys that share a scale of their probabilities in int8 */
#define MG_LOWEST -1e30f        /* before the first maximum */

#define MG_INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define MG_UNROLL _Pragma("clang loop unroll(full)")
#else
#define MG_UNROLL _Pragma("GCC unroll 64")
#endif

/* gelu(x) = max(x, 0) - |x|/2 * r^16, r = 1 / (c0 + c1 |x| + ... + c7 |x|^7): the form of Abramowitz and Stegun 7.1.28,
   fitted here to |error| < 4e-7 in float32 arithmetic; there is no cancellation, so tails are as good. */
#define MG_GELU_COEFFICIENTS \
    0.9999998211860657f, 0.04987083747982979f, 0.021121790632605553f, 0.0033221833873540163f, \
    -1.2405251254676841e-05f, 7.797643047524616e-05f, -2.7838361802423606e-06f, 8.794194741312822e-07f

/* 2^f = sum c_i f^i for |f| <= 1/2, relative error 8e-8 */
#define MG_EXP2_COEFFICIENTS \
    1.0000001192092896f, 0.6931469440460205f, 0.24022120237350464f, 0.05550713464617729f, 0.009675541892647743f, \
    0.0013276459649205208f
#define MG_LOG2_E 1.4426950408889634
#define MG_LN_2 0.6931471805599453

/* Queries that listen to the same keys in one head, and those keys.  Query i stands at q[i], its result goes to out[i];
   it sees keys 0 .. seen[i]-1, at least one.  gate[i] holds d values, or one if gate_width is 1; gate may be NULL.
   lse[i], unless lse is NULL, receives the natural logarithm of the sum of exp(scores). */
struct mg_attention_block {
    float *const *out;
    const float *const *q;
    const float *const *gate;
    const size_t *seen;
    float *lse;
    const float *k, *v;
    size_t k_row, v_row, gate_width, n_query, d;
};

/* One head of attention's backward: out, dout and dq (t_q,d), dk and dv (t_k,d), all with rows dense_row apart; lse
   (t_q).  Query i sees keys j <= i + t_k - t_q, or all. */
struct mg_attention_head {
    float *dq, *dk, *dv;
    const float *dout, *out, *lse, *q, *k, *v;
    size_t dense_row, q_row, k_row, v_row;
    int causal;
    size_t t_q, t_k, d;
};

/* A few queries, all of their heads, and a range of keys.  Partial results of query i and head h: top[i][h], the largest
   score as a base-2 logarithm, MG_LOWEST if it sees no key of the range; sum[i][h] of 2^(score - top);
   o[i][h][d], the sum of values weighted with that. */
struct mg_attention_range {
    float *top, *sum, *o;
    const float *const *q;
    const size_t *seen;
    const void *k, *v;          /* as held */
    enum mg_held held;
    size_t k_row, v_row, first_key, end_key, n_query, n_head, d;
};

/* A row of numbers: of x, q and acc one is not NULL.  x stands for itself, the others for scale * (number - zero). */
struct mg_source {
    const float *x;
    const int8_t *q;
    const int32_t *acc;
    float scale;
    int32_t zero;
};

/* Where a row of floats goes: to x, or if q is not NULL to clip(rint(float * inverse) + zero, -128, 127), ties to even;
   NaN becomes -128. */
struct mg_target {
    float *x;
    int8_t *q;
    float inverse;
    int32_t zero;
};

/* A row of an epilogue: out = [gelu](x + bias) + residual.  factor, bias and residual may be missing: all NULL.
   factor[i] multiplies the scale of x, whose numbers are then integers. */
struct mg_finish {
    struct mg_target out;
    struct mg_source x, residual;
    const float *factor, *bias;
    int gelu;
};

/* Rows of an epilogue, of MG_PANEL numbers each, of which x is acc, with zero 0, and has a factor. */
struct mg_finish_tile {
    struct mg_finish row;       /* the first, but for x.scale; the next row of x.acc begins MG_PANEL further */
    const float *scale;         /* of x, for each row, scale_step apart */
    uint16_t *half;             /* where rows go as bfloat16, if not NULL, instead of row.out */
    size_t scale_step, stride, rows;    /* stride: between rows of out, half and residual */
};

/* Kernels of attention in int8, see staticattention.c and dynamicattention.c.  Sums of up to MG_MAX_ATTENTION products,
   exact. */
struct mg_int8_attention {
    /* For more queries than this that share their keys, staticattention.c makes products of packed panels. */
    size_t few_queries;

    /* dot_panel for a in uint8 and weights that may be -128; a (rows,k) with rows k rounded up to 4 apart, 0 beyond k,
       where the panel may hold anything.  sum_panel: of probabilities, of which any two in a row add up to at most 256.
       value_panel: of any; fast where most are small. */
    void (*score_panel)(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                        size_t k);
    void (*sum_panel)(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k);
    void (*value_panel)(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                        size_t k);

    /* sums (rows, MG_PANEL) = a w^T, w a panel without -128; a (rows,k) in [-32767,32767], rows k rounded up to 4 apart, 0
       beyond k.  Any number of rows.  NULL: two products of bytes are as fast. */
    void (*wide_panel)(float *sums, const int16_t *a, const int8_t *panel, size_t rows, size_t k);

    /* scores[j] = sum_i (q[i] - zero) * k[j][i] for n keys; scores has room for n rounded up to MG_PANEL. */
    void (*score_keys)(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                       size_t d);

    /* p[j] = rint(255 * softmax(ln 2 * unit * scores)[j]) for n scores, of which MG_PANEL at a time are dense, `stride`
       apart; -> the sum of p.  scores are overwritten. */
    uint32_t (*weigh)(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);

    /* The same, but that each score takes over what rounding left of those before it:
       p[j] = r(j) - r(j - 1), r(j) = floor(1/2 + 255 * sum_{i <= j} softmax_i), each of the terms rounded to
       MG_DIFFUSED_BITS binary places before it is added. */
    uint32_t (*weigh_diffused)(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);

    /* Of n scores, 1 to MG_WEIGHED, as base-2 logarithms: x[j] = scale * key_scale[j] * scores[j], scale and key_scale at
       least 0, scores as those of weigh with room for MG_WEIGHED; top: the largest x;
       p[j] = rint(255 * 2^(x[j] - top)); -> the sum of these before they are rounded. */
    float (*weigh_some)(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n, float scale,
                        float *top);

    /* acc[i] = sum_j p[j] * v[j][i] for n values; p is as in sum_panel and 0 from n up to the next multiple of 4, acc has
       room for d rounded up to MG_PANEL. */
    void (*sum_values)(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d);
};
extern const struct mg_int8_attention mg_portable_int8;

/* Kernels of training, of decoding's choices and of its cross-attention, rows.h: work on rows, or elements,
   first .. end-1 of a job, with scratch memory. */
typedef void (*mg_row_kernel)(const void *job, size_t first, size_t end, void *room);
struct mg_rows {
    mg_row_kernel layer_norm_backward, gelu_backward, column_sums, logit_losses, magnitude, power_sum, power_backward,
        adamw, squares, choose, weigh_heard;
};
extern const struct mg_rows mg_portable_rows;

/* The kernels of one instruction set.  Functions see one tile, in one thread. */
struct mg_kernels {
    const char *name;

    /* Integer product.  pack_rows copies rows of a (rows,k), one after the other, in the form that dot_panel reads, each
       of row_bytes(k): if that is NULL, the bytes, k rounded up to 4.  dot_panel makes acc (rows, MG_PANEL) =
       start + (a + offset) w^T of rows <= max_rows of them and one packed panel; start (MG_PANEL) takes what the offset
       adds, and the zero-point, away again.  If takes_zero, it is start + (a - zero) w^T instead. */
    size_t max_rows;
    int32_t offset;
    int takes_zero;
    size_t (*row_bytes)(size_t k);
    void (*pack_rows)(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero);
    void (*dot_panel)(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k);

    void (*finish)(const struct mg_finish *f, size_t n);
    void (*finish_tile)(const struct mg_finish_tile *t);    /* NULL: finish, row by row, is as fast */

    float (*quantize_row)(int8_t *q, const float *x, size_t n);     /* -> scale */
    void (*layer_norm_row)(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n);

    /* Many queries, up to max_queries at a time, with scratch memory; up to few_queries attend_range is the better one,
       which reads keys and values once, row after row. */
    size_t max_queries, few_queries;
    size_t (*attend_floats)(size_t d);      /* size of scratch */
    void (*attend)(const struct mg_attention_block *block, float *scratch);
    void (*attend_range)(const struct mg_attention_range *range);
    int reads_narrow;           /* whether attend_range takes keys and values that are not held as floats */

    /* The backward of a head, with scratch memory. */
    size_t (*attend_backward_floats)(size_t d);
    void (*attend_backward)(const struct mg_attention_head *head, float *scratch);

    const struct mg_rows *rows;
    const struct mg_int8_attention *int8;
};

extern const struct mg_kernels mg_portable;
#if defined(__x86_64__)
extern const struct mg_kernels mg_avx2;
extern const struct mg_kernels mg_avx512vnni;
extern const struct mg_rows mg_avx2_rows;
extern const struct mg_rows mg_avx512_rows;
extern const struct mg_int8_attention mg_avx2_int8;
extern const struct mg_int8_attention mg_avx512_int8;
enum { MG_AVX2_ROWS = 4 };
size_t mg_avx2_row_bytes(size_t k);
void mg_avx2_pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero);
void mg_avx2_dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k);
void mg_avx2_score_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                         size_t k);
void mg_avx2_sum_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                       size_t k);
void mg_avx2_finish(const struct mg_finish *f, size_t n);
float mg_avx2_quantize_row(int8_t *q, const float *x, size_t n);
void mg_avx2_layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n);
void mg_avx2_score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                        size_t d);
uint32_t mg_avx2_weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);
uint32_t mg_avx2_weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);
float mg_avx2_weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                         float scale, float *top);
void mg_avx2_sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d);
size_t mg_avx2_attend_floats(size_t d);
void mg_avx2_attend(const struct mg_attention_block *block, float *scratch);
void mg_avx2_attend_range(const struct mg_attention_range *range);
size_t mg_avx512_attend_floats(size_t d);
void mg_avx512_attend(const struct mg_attention_block *block, float *scratch);
void mg_avx512_attend_range(const struct mg_attention_range *range);
size_t mg_avx2_attend_backward_floats(size_t d);
void mg_avx2_attend_backward(const struct mg_attention_head *head, float *scratch);
size_t mg_avx512_attend_backward_floats(size_t d);
void mg_avx512_attend_backward(const struct mg_attention_head *head, float *scratch);
void mg_avx512_pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero);
void mg_avx512_finish(const struct mg_finish *f, size_t n);
void mg_avx512_finish_tile(const struct mg_finish_tile *t);
float mg_avx512_quantize_row(int8_t *q, const float *x, size_t n);
void mg_avx512_layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n);
void mg_avx512_score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                          size_t d);
uint32_t mg_avx512_weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);
uint32_t mg_avx512_weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit);
float mg_avx512_weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                           float scale, float *top);
void mg_avx512_sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d);
/* Whether products that were not run where they were written are those of kernels that have run: trial.c.  No, too, if
   there is no memory to try. */
int mg_products_agree(const struct mg_kernels *kernels, const struct mg_kernels *proven);
/* For functions of this target; or as AVX-512 has it, see avxvnni.c. */
#if defined(__apple_build_version__)
#define MG_KNOWS_AVXVNNI (__clang_major__ >= 13)        /* Apple counts by itself */
#elif defined(__clang__)
#define MG_KNOWS_AVXVNNI (__clang_major__ >= 12)
#else
#define MG_KNOWS_AVXVNNI (__GNUC__ >= 11)
#endif
#if MG_KNOWS_AVXVNNI || defined(MG_EVEX_VNNI)
#define MG_AVXVNNI
extern const struct mg_kernels mg_avxvnni;
#endif
/* Tiles, which Linux alone hands out, for functions of their targets; or in plain C, see tests/isas/amxemulation.h. */
#if defined(MG_AMX_EMULATED) || (defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11))
#define MG_AMX
extern const struct mg_kernels mg_amx;
extern const struct mg_int8_attention mg_amx_int8;
#endif
#elif defined(__aarch64__)
extern const struct mg_kernels mg_neon;
extern const struct mg_int8_attention mg_neon_int8;
size_t mg_neon_attend_floats(size_t d);
void mg_neon_attend(const struct mg_attention_block *block, float *scratch);
void mg_neon_attend_range(const struct mg_attention_range *range);
/* Dot products, for functions of this target; clang has had them since its version 16, before only for whole files. */
#if defined(__ARM_FEATURE_DOTPROD)
#define MG_NEON_DOT
#elif !defined(__clang__)
#define MG_NEON_DOT __attribute__((target("arch=armv8.2-a+dotprod")))
#elif __clang_major__ >= 16
#define MG_NEON_DOT __attribute__((target("dotprod")))
#endif
#ifdef MG_NEON_DOT
extern const struct mg_kernels mg_neondot;
extern const struct mg_int8_attention mg_neondot_int8;
#endif
#endif

const struct mg_kernels *mg_kernels(void);
const struct mg_kernels *mg_isa_proven(size_t i);   /* what mg_isa_name(i) is tried against, or NULL */

int mg_fits(const struct mg_decoder_dims *dims);        /* whether they go together, decoder.c */

/* What mg_attention is asked for, see api.h. */
struct mg_attention_call {
    float *out;
    const float *q, *gate;
    const void *k, *v;          /* as held */
    enum mg_held held;
    size_t q_batch, q_row, k_batch, k_row, v_batch, v_row, gate_width;
    int causal;
    size_t group, n_head, t_q, t_k, d;
};
enum mg_status mg_attend_int8(const struct mg_attention_call *call, size_t n_shared);   /* dynamicattention.c */

/* One key as a column of its panel; -> the sum of its elements.  Four values as a group of rows of their panels, which
   are panel_bytes apart. */
int32_t mg_pack_key(int8_t *panel, const int8_t *key, size_t column, size_t d);
void mg_pack_values(int8_t *panels, size_t panel_bytes, const int8_t *const *value, size_t d);

/* finish_tile, for any instruction set and n <= MG_PANEL numbers of a row. */
void mg_finish_rows(const struct mg_kernels *kernels, const struct mg_finish_tile *t, size_t n);

/* A tile of a product in bfloat16: c (rows, columns) [+]= bias + a b^T over some pairs of elements along k. */
#define MG_BF16_PANELS 3        /* of b at a time, 16 columns each */
#define MG_BF16_QUERIES 384     /* of attention that share packed keys and values */
struct mg_bf16_tile {
    float *c;
    const uint32_t *a, *b;      /* packed; panels are a_stride and b_stride apart */
    const float *bias;          /* NULL: zeros; not if add */
    size_t c_row, a_stride, b_stride, rows, columns, pairs;
    int add;
};

/* pack_b: rows of k elements x[r * x_row + i * x_column], one stride being 1, rounded to bfloat16, into panels of 16
   rows, stride apart: pairs of elements, [pair][row], with zeros beyond the last row and beyond k.  pack_a: panels of
   another order perhaps, of which tile reads up to `rows` rows from panels + i / 16 * stride + i % 16 on. */
struct mg_bf16 {
    size_t rows;                /* 8 or 16 */
    void (*pack_a)(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows,
                   size_t k);
    void (*pack_b)(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows,
                   size_t k);
    void (*tile)(const struct mg_bf16_tile *tile);
    size_t (*attend_words)(size_t t_k, size_t d);              /* size of scratch */
    void (*attend)(const struct mg_bf16 *self, const struct mg_attention_block *block, uint32_t *scratch);
    size_t (*attend_backward_words)(size_t t_k, size_t d);     /* size of scratch */
    void (*attend_backward)(const struct mg_attention_head *head, uint32_t *scratch);
};
#if defined(__x86_64__)
extern const struct mg_bf16 mg_avx512bf16;
#ifdef MG_AMX
extern const struct mg_bf16 mg_amxbf16;
int mg_bf16_tiles_agree(const struct mg_bf16 *kernels, const struct mg_bf16 *proven);   /* trial.c */
#endif
size_t mg_avx512bf16_attend_words(size_t t_k, size_t d);
void mg_avx512bf16_attend(const struct mg_bf16 *bf16, const struct mg_attention_block *block, uint32_t *scratch);
size_t mg_avx512bf16_attend_backward_words(size_t t_k, size_t d);
void mg_avx512bf16_attend_backward(const struct mg_attention_head *head, uint32_t *scratch);
#endif
const struct mg_bf16 *mg_bf16(void);    /* NULL where the instruction set in use has none */

/* Runs task(context, i, worker) for every i < n_tasks, each once, worker < n_workers; returns when all are done. */
typedef void (*mg_task)(void *context, size_t i, size_t worker);
void mg_run(mg_task task, void *context, size_t n_tasks, size_t n_workers);

/* Scratch memory: bytes for each of n_workers, on 64 byte boundaries. */
struct mg_scratch {
    char *data;
    size_t bytes, n_workers;
};
int mg_get_scratch(struct mg_scratch *scratch, size_t bytes, size_t n_tasks);   /* -> whether there is enough */
void mg_free_scratch(struct mg_scratch *scratch);
MG_INLINE void *mg_scratch_of(const struct mg_scratch *scratch, size_t worker)
{
    return scratch->data + scratch->bytes * worker;
}

MG_INLINE size_t mg_held_bytes(enum mg_held held)
{
    return held == MG_HELD_FLOAT ? sizeof(float) : sizeof(uint16_t);
}

MG_INLINE const void *mg_held_at(const void *x, size_t i, const enum mg_held held)
{
    return (const char *)x + i * mg_held_bytes(held);
}

/* bfloat16, ties to even; NaN stays NaN */
MG_INLINE uint16_t mg_to_bf16(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? bits >> 16 | 0x40 : rounded);
}

MG_INLINE float mg_from_bf16(uint16_t half)
{
    uint32_t bits = (uint32_t)half << 16;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

/* ln(sum * 2^top), top a score as a base-2 logarithm */
MG_INLINE float mg_lse(float top, float sum) { return (float)(MG_LN_2 * (double)top) + logf(sum); }

/* The row that begins `at` numbers further. */
MG_INLINE struct mg_target mg_target_at(struct mg_target t, size_t at)
{
    t.x = t.x != NULL ? t.x + at : NULL;
    t.q = t.q != NULL ? t.q + at : NULL;
    return t;
}

MG_INLINE struct mg_source mg_source_at(struct mg_source s, size_t at)
{
    s.x = s.x != NULL ? s.x + at : NULL;
    s.q = s.q != NULL ? s.q + at : NULL;
    s.acc = s.acc != NULL ? s.acc + at : NULL;
    return s;
}

MG_INLINE struct mg_target mg_target_of(const struct mg_tensor *t)
{
    return (struct mg_target){t->x, t->q, 1.0f / t->scale, t->zero};
}

MG_INLINE struct mg_source mg_source_of(const struct mg_tensor *t)
{
    return (struct mg_source){t->x, t->q, NULL, t->scale, t->zero};
}

MG_INLINE int mg_is_grid(const struct mg_tensor *t) { return t->scale > 0.0f && t->zero >= -128 && t->zero <= 127; }

MG_INLINE size_t mg_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
MG_INLINE size_t mg_min(size_t a, size_t b) { return a < b ? a : b; }
MG_INLINE size_t mg_max(size_t a, size_t b) { return a > b ? a : b; }
MG_INLINE size_t mg_row_bytes(const struct mg_kernels *kernels, size_t k)
{
    return kernels->row_bytes != NULL ? kernels->row_bytes(k) : mg_round_up(k, 4);
}

#endif
