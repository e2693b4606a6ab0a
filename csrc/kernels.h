/* What the C files share: the dispatch table, the jobs that its functions work on, and the constants of the formulas. */
#ifndef MG_KERNELS_H
#define MG_KERNELS_H

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include "api.h"

#define MG_MAX_THREADS 256
#define MG_MAX_K 131072         /* 131072 * 128 * 127 < 2^31 */
#define MG_PANEL 64             /* columns of a weight panel */
#define MG_KEYS 64              /* keys that attention takes at a time */
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
    const float *k, *v;
    size_t k_row, v_row, first_key, end_key, n_query, n_head, d;
};

/* Kernels of training, rows.h: work on rows, or elements, first .. end-1 of a job, with scratch memory. */
typedef void (*mg_row_kernel)(const void *job, size_t first, size_t end, void *room);
struct mg_rows {
    mg_row_kernel layer_norm_backward, gelu_backward, column_sums, logit_losses, magnitude, power_sum, power_backward,
        adamw, squares;
};
extern const struct mg_rows mg_portable_rows;

/* The kernels of one instruction set.  Functions see one tile, in one thread. */
struct mg_kernels {
    const char *name;

    /* Integer product.  pack_rows copies rows of a (rows,k), one after the other, in the form that dot_panel reads, k
       rounded up to 4.  dot_panel makes acc (rows, MG_PANEL) of rows <= max_rows of them and one packed panel with its
       column sums. */
    size_t max_rows;
    void (*pack_rows)(int8_t *packed, const int8_t *a, size_t rows, size_t k);
    void (*dot_panel)(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *sums, size_t rows, size_t k);

    /* One row of the epilogue, from integers or from floats; see mg_linear_int8 and mg_finish. */
    void (*finish_int)(float *out, const int32_t *acc, float a_scale, const float *w_scale, const float *bias,
                       const float *residual, int gelu, size_t n);
    void (*finish)(float *out, const float *x, const float *bias, const float *residual, int gelu, size_t n);

    float (*quantize_row)(int8_t *q, const float *x, size_t n);     /* -> scale */
    void (*layer_norm_row)(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n);

    /* Many queries, up to max_queries at a time, with scratch memory; up to few_queries attend_range is the better one,
       which reads keys and values once, row after row. */
    size_t max_queries, few_queries;
    size_t (*attend_floats)(size_t d);      /* size of scratch */
    void (*attend)(const struct mg_attention_block *block, float *scratch);
    void (*attend_range)(const struct mg_attention_range *range);

    /* The backward of a head, with scratch memory. */
    size_t (*attend_backward_floats)(size_t d);
    void (*attend_backward)(const struct mg_attention_head *head, float *scratch);

    const struct mg_rows *rows;
};

extern const struct mg_kernels mg_portable;
#if defined(__x86_64__)
extern const struct mg_kernels mg_avx2;
extern const struct mg_kernels mg_avx512vnni;
extern const struct mg_rows mg_avx2_rows;
extern const struct mg_rows mg_avx512_rows;
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
#endif

const struct mg_kernels *mg_kernels(void);

/* A tile of a product in bfloat16: c (rows, columns) [+]= bias + a b^T over some pairs of elements along k. */
#define MG_BF16_ROWS 8          /* of a at a time */
#define MG_BF16_PANELS 3        /* of b at a time, 16 columns each */
struct mg_bf16_tile {
    float *c;
    const uint32_t *a, *b;      /* of a panel: pairs 16 apart; panels of b are b_stride apart */
    const float *bias;          /* NULL: zeros; not if add */
    size_t c_row, b_stride, rows, columns, pairs;
    int add;
};

/* pack: rows of k elements x[r * x_row + i * x_column], one stride being 1, rounded to bfloat16, into panels of 16
   rows, stride apart: pairs of elements, [pair][row], with zeros beyond the last row and beyond k. */
struct mg_bf16 {
    void (*pack)(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows, size_t k);
    void (*tile)(const struct mg_bf16_tile *tile);
    size_t (*attend_backward_words)(size_t t_k, size_t d);     /* size of scratch */
    void (*attend_backward)(const struct mg_attention_head *head, uint32_t *scratch);
};
#if defined(__x86_64__)
extern const struct mg_bf16 mg_avx512bf16;
size_t mg_avx512bf16_attend_backward_words(size_t t_k, size_t d);
void mg_avx512bf16_attend_backward(const struct mg_attention_head *head, uint32_t *scratch);
#endif
const struct mg_bf16 *mg_bf16(void);    /* NULL where the instruction set in use has none */

/* Runs task(context, i, worker) for every i < n_tasks, each once, worker < n_workers; returns when all are done. */
typedef void (*mg_task)(void *context, size_t i, size_t worker);
void mg_run(mg_task task, void *context, size_t n_tasks, size_t n_workers);

/* Scratch memory: bytes for each of n_workers, on 64 byte boundaries; free(data) after use. */
struct mg_scratch {
    char *data;
    size_t bytes, n_workers;
};
int mg_get_scratch(struct mg_scratch *scratch, size_t bytes, size_t n_tasks);   /* -> whether there is enough */
MG_INLINE void *mg_scratch_of(const struct mg_scratch *scratch, size_t worker)
{
    return scratch->data + scratch->bytes * worker;
}

/* ln(sum * 2^top), top a score as a base-2 logarithm */
MG_INLINE float mg_lse(float top, float sum) { return (float)(MG_LN_2 * (double)top) + logf(sum); }

MG_INLINE size_t mg_round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }
MG_INLINE size_t mg_min(size_t a, size_t b) { return a < b ? a : b; }
MG_INLINE size_t mg_max(size_t a, size_t b) { return a > b ? a : b; }

#endif
