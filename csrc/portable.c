/* Plain C: the specification that the other instruction sets are tested against, and what runs on other processors.
   Vectors of 16 bytes are what gcc and clang make of any processor's, or of its scalars. */
#include "lanes.h"

#include <math.h>
#include <string.h>

#define ROUND 12582912.0f       /* 1.5 * 2^23: adding it rounds to an integer, half to even */
enum { ROWS = 4, LANES = 16, VECTORS = 4 };      /* queries of attention; in vectors */
typedef float vec __attribute__((vector_size(16)));
typedef int8_t bytes __attribute__((vector_size(8)));
typedef int16_t shorts __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
typedef uint32_t bits __attribute__((vector_size(16)));

static void pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    (void)zero;
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++) {
        int8_t *row = packed + r * k4;
        memcpy(row, a + r * k, k);
        memset(row + k, 0, k4 - k);
    }
}

MG_INLINE shorts widened(const void *eight)
{
    bytes b;
    memcpy(&b, eight, sizeof b);
    return __builtin_convertvector(b, shorts);
}

/* 4 elements of a row, twice. */
MG_INLINE shorts twice(const int8_t *row)
{
    uint32_t four;
    memcpy(&four, row, sizeof four);
    uint64_t eight = four * 0x100000001ULL;
    return widened(&eight);
}

/* sum[j] = start[j] + sum_k a[k] * panel[k][j].  Two products fit 16 bits (w is never -128); pairs of them are added in
   32 bits, two sums for each column, which are added at the end. */
static void dot_row(int32_t *sum, const int8_t *row, const int8_t *panel, const int32_t *start, size_t k4)
{
    enum { COLUMNS = 16, SUMS = COLUMNS / 2 };
    for (size_t column = 0; column < MG_PANEL; column += COLUMNS) {
        ints c[SUMS] = {{0}};
        int32_t halves[2 * COLUMNS];
        for (size_t i = 0; i < k4; i += 8) {
            const int8_t *w = panel + i * MG_PANEL + 4 * column;
            size_t next = i + 4 < k4 ? 4 : 0;
            shorts a = twice(row + i), b = next ? twice(row + i + next) : a - a;
            MG_UNROLL
            for (size_t v = 0; v < SUMS; v++) {
                shorts x = a * widened(w + 8 * v) + b * widened(w + next * MG_PANEL + 8 * v);
                c[v] += ((ints)((bits)x << 16) >> 16) + ((ints)x >> 16);
            }
        }
        memcpy(halves, c, sizeof c);
        for (size_t j = 0; j < COLUMNS; j++)
            sum[column + j] = start[column + j] + halves[2 * j] + halves[2 * j + 1];
    }
}

static void dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++)
        dot_row(acc + r * MG_PANEL, a + r * k4, panel, start, k4);
}

static inline float gelu_of(float x)
{
    static const float c[] = {MG_GELU_COEFFICIENTS};
    float a = fabsf(x), r = c[7];
    for (int i = 6; i >= 0; i--)
        r = r * a + c[i];
    r = 1.0f / r;
    r *= r;
    r *= r;
    r *= r;
    r *= r;
    return (x > 0.0f ? x : 0.0f) - 0.5f * a * r;
}

static void read_numbers(float *x, const struct mg_source *s, const float *factor, size_t n)
{
    if (s->x != NULL)
        memcpy(x, s->x, n * sizeof *x);
    else if (s->q != NULL)
        for (size_t i = 0; i < n; i++)
            x[i] = (float)(s->q[i] - s->zero) * (factor != NULL ? s->scale * factor[i] : s->scale);
    else
        for (size_t i = 0; i < n; i++)
            x[i] = (float)(s->acc[i] - s->zero) * (factor != NULL ? s->scale * factor[i] : s->scale);
}

static void write_numbers(const struct mg_target *t, const float *x, size_t n)
{
    const float low = (float)(-128 - t->zero), high = (float)(127 - t->zero), zero = (float)t->zero;
    if (t->q == NULL) {
        memcpy(t->x, x, n * sizeof *x);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        float steps = x[i] * t->inverse;
        steps = steps > low ? steps : low;      /* NaN too */
        steps = steps < high ? steps : high;
        t->q[i] = (int8_t)(steps + ROUND - ROUND + zero);
    }
}

static void finish_some(const struct mg_finish *f, size_t n)
{
    float x[MG_PANEL], residual[MG_PANEL];
    read_numbers(x, &f->x, f->factor, n);
    for (size_t i = 0; f->bias != NULL && i < n; i++)
        x[i] += f->bias[i];
    for (size_t i = 0; f->gelu && i < n; i++)
        x[i] = gelu_of(x[i]);
    if (f->residual.x != NULL || f->residual.q != NULL) {
        read_numbers(residual, &f->residual, NULL, n);
        for (size_t i = 0; i < n; i++)
            x[i] += residual[i];
    }
    write_numbers(&f->out, x, n);
}

static void finish(const struct mg_finish *f, size_t n)
{
    for (size_t i = 0; i < n; i += MG_PANEL) {
        struct mg_finish some = {
            .out = mg_target_at(f->out, i), .x = mg_source_at(f->x, i), .residual = mg_source_at(f->residual, i),
            .factor = f->factor != NULL ? f->factor + i : NULL, .bias = f->bias != NULL ? f->bias + i : NULL,
            .gelu = f->gelu};
        finish_some(&some, mg_min(MG_PANEL, n - i));
    }
}

static float quantize_row(int8_t *q, const float *x, size_t n)
{
    float top = 0.0f;
    for (size_t i = 0; i < n; i++)
        top = fabsf(x[i]) > top ? fabsf(x[i]) : top;
    if (top < 1e-30f) {
        memset(q, 0, n);
        return 1.0f;
    }
    float inverse = 127.0f / top;
    for (size_t i = 0; i < n; i++)
        q[i] = (int8_t)(x[i] * inverse + ROUND - ROUND);
    return top / 127.0f;
}

static void layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps, size_t n)
{
    float mean = mg_mean(x, n), inverse = 1.0f / sqrtf(mg_variance(x, mean, n) + eps);
    for (size_t i = 0; i < n; i++)
        out[i] = (x[i] - mean) * inverse * weight[i] + bias[i];
}

static size_t attend_floats(size_t d) { return (2 * d + MG_KEYS) * LANES; }

/* Scores of keys k0 .. k0+n-1 as base-2 logarithms: p[j][lane], MG_LOWEST where the query does not see the key. */
static void score_keys(float *p, const vec *q, const struct mg_attention_block *b, size_t k0, size_t n)
{
    for (size_t j = 0; j < n; j++) {
        const float *key = b->k + (k0 + j) * b->k_row;
        vec c[VECTORS] = {{0}};
        for (size_t i = 0; i < b->d; i++) {
            MG_UNROLL
            for (size_t v = 0; v < VECTORS; v++)
                c[v] += key[i] * q[i * VECTORS + v];
        }
        memcpy(p + j * LANES, c, sizeof c);
        for (size_t l = 0; l < b->n_query; l++)
            if (k0 + j >= b->seen[l])
                p[j * LANES + l] = MG_LOWEST;
    }
}

/* Online softmax: p becomes 2^(p - top) with the new maximum; sum and the scale of what was summed so far follow. */
static void normalise(float *p, float *top, float *sum, float *scale, size_t n)
{
    float before[LANES];
    memcpy(before, top, sizeof before);
    for (size_t j = 0; j < n; j++)
        for (int l = 0; l < LANES; l++)
            top[l] = p[j * LANES + l] > top[l] ? p[j * LANES + l] : top[l];
    for (int l = 0; l < LANES; l++) {
        scale[l] = mg_exp2(before[l] - top[l]);
        sum[l] *= scale[l];
    }
    for (size_t j = 0; j < n; j++)
        for (int l = 0; l < LANES; l++) {
            p[j * LANES + l] = mg_exp2(p[j * LANES + l] - top[l]);
            sum[l] += p[j * LANES + l];
        }
}

/* o = o * scale + sum_j value[j] * p[j] */
static void add_values(vec *o, const vec *p, const vec *scale, const struct mg_attention_block *b, size_t k0, size_t n)
{
    for (size_t i = 0; i < b->d; i++) {
        const float *value = b->v + k0 * b->v_row + i;
        vec c[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < VECTORS; v++)
            c[v] = o[i * VECTORS + v] * scale[v];
        for (size_t j = 0; j < n; j++) {
            MG_UNROLL
            for (size_t v = 0; v < VECTORS; v++)
                c[v] += value[j * b->v_row] * p[j * VECTORS + v];
        }
        memcpy(o + i * VECTORS, c, sizeof c);
    }
}

/* Queries lie across the lanes, so that neither keys nor values have to be rearranged. */
static void attend(const struct mg_attention_block *b, float *scratch)
{
    float *q = scratch, *o = q + b->d * LANES, *p = o + b->d * LANES;
    float top[LANES], sum[LANES] = {0}, unit = (float)(MG_LOG2_E / sqrt((double)b->d));
    vec scale[VECTORS];
    size_t n_keys = 0;
    memset(scratch, 0, 2 * b->d * LANES * sizeof *scratch);
    for (size_t l = 0; l < LANES; l++)
        top[l] = MG_LOWEST;
    for (size_t l = 0; l < b->n_query; l++) {
        n_keys = mg_max(n_keys, b->seen[l]);
        for (size_t i = 0; i < b->d; i++)
            q[i * LANES + l] = b->q[l][i] * unit;
    }
    for (size_t k0 = 0; k0 < n_keys; k0 += MG_KEYS) {
        size_t n = mg_min(MG_KEYS, n_keys - k0);
        score_keys(p, (const vec *)q, b, k0, n);
        normalise(p, top, sum, (float *)scale, n);
        add_values((vec *)o, (const vec *)p, scale, b, k0, n);
    }
    for (size_t l = 0; l < b->n_query; l++) {
        if (b->lse != NULL)
            b->lse[l] = mg_lse(top[l], sum[l]);
        for (size_t i = 0; i < b->d; i++) {
            float y = o[i * LANES + l] / sum[l];
            b->out[l][i] = b->gate == NULL ? y : y * b->gate[l][b->gate_width == 1 ? 0 : i];
        }
    }
}

/* The keys of one head from first to end, at most MG_KEYS: one step of the online softmax. */
static void attend_keys(float *top, float *sum, float *o, const float *q, const struct mg_attention_range *r,
                        size_t first, size_t end, size_t head)
{
    const float *k = (const float *)r->k + head * r->d, *v = (const float *)r->v + head * r->d;
    float unit = (float)(MG_LOG2_E / sqrt((double)r->d)), p[MG_KEYS], before = *top;
    for (size_t j = first; j < end; j++) {
        p[j - first] = mg_dot(q, k + j * r->k_row, 0.0f, r->d) * unit;
        *top = p[j - first] > *top ? p[j - first] : *top;
    }
    float scale = mg_exp2(before - *top);
    *sum *= scale;
    for (size_t i = 0; i < r->d; i++)
        o[i] *= scale;
    for (size_t j = first; j < end; j++) {
        float weight = mg_exp2(p[j - first] - *top);
        *sum += weight;
        for (size_t i = 0; i < r->d; i++)
            o[i] += weight * v[j * r->v_row + i];
    }
}

static void attend_range(const struct mg_attention_range *r)
{
    for (size_t i = 0; i < r->n_query * r->n_head; i++) {
        r->top[i] = MG_LOWEST;
        r->sum[i] = 0.0f;
    }
    memset(r->o, 0, r->n_query * r->n_head * r->d * sizeof *r->o);
    for (size_t key = r->first_key; key < r->end_key; key += MG_KEYS)
        for (size_t head = 0; head < r->n_head; head++)
            for (size_t l = 0; l < r->n_query; l++) {
                size_t end = mg_min(mg_min(key + MG_KEYS, r->end_key), r->seen[l]), at = l * r->n_head + head;
                if (key < end)
                    attend_keys(r->top + at, r->sum + at, r->o + at * r->d, r->q[l] + head * r->d, r, key, end, head);
            }
}

static size_t attend_backward_floats(size_t d)
{
    (void)d;
    return 1;
}

/* One query and the keys that it sees, one by one. */
static void query_backward(const struct mg_attention_head *h, size_t t)
{
    const float *q = h->q + t * h->q_row, *dout = h->dout + t * h->dense_row;
    float *dq = h->dq + t * h->dense_row, scale = (float)(1.0 / sqrt((double)h->d));
    float delta = mg_dot(dout, h->out + t * h->dense_row, 0.0f, h->d);
    size_t n_keys = h->causal ? t + 1 + h->t_k - h->t_q : h->t_k;
    memset(dq, 0, h->d * sizeof *dq);
    for (size_t j = 0; j < n_keys; j++) {
        const float *k = h->k + j * h->k_row;
        float *dk = h->dk + j * h->dense_row, *dv = h->dv + j * h->dense_row;
        float p = mg_exp2((mg_dot(q, k, 0.0f, h->d) * scale - h->lse[t]) * (float)MG_LOG2_E);
        float dscore = p * (mg_dot(dout, h->v + j * h->v_row, 0.0f, h->d) - delta) * scale;
        for (size_t i = 0; i < h->d; i++) {
            dq[i] += dscore * k[i];
            dk[i] += dscore * q[i];
            dv[i] += p * dout[i];
        }
    }
}

static void attend_backward(const struct mg_attention_head *h, float *scratch)
{
    (void)scratch;
    for (size_t j = 0; j < h->t_k; j++) {
        memset(h->dk + j * h->dense_row, 0, h->d * sizeof *h->dk);
        memset(h->dv + j * h->dense_row, 0, h->d * sizeof *h->dv);
    }
    for (size_t t = 0; t < h->t_q; t++)
        query_backward(h, t);
}

const struct mg_kernels mg_portable = {
    .name = "portable",
    .max_rows = ROWS,
    .pack_rows = pack_rows,
    .dot_panel = dot_panel,
    .finish = finish,
    .quantize_row = quantize_row,
    .layer_norm_row = layer_norm_row,
    .max_queries = LANES,
    .few_queries = 4,
    .attend_floats = attend_floats,
    .attend = attend,
    .attend_range = attend_range,
    .attend_backward_floats = attend_backward_floats,
    .attend_backward = attend_backward,
    .rows = &mg_portable_rows,
    .int8 = &mg_portable_int8,
};
