/* AVX512-BF16: the backward of attention, a head at a time.  Scores, which may be large before the exponential, are
   float32 as in avx512backward.c; in the other products numbers are rounded to bfloat16 and summed in float32.  Their
   operands are packed in panels of 16 rows as in avx512bf16.c.  48 queries lie across the lanes, in 3 vectors or
   panels; what is summed over queries takes P and dscore row by row instead. */
#if defined(__x86_64__)
#include "avx512bf16.h"

#include <string.h>

#define TARGET __attribute__((target(MG_AVX512BF16)))
enum { LANES = 16, VECTORS = 3, WIDTH = LANES * VECTORS, TILE = 8, KEYS = 48, COLUMNS = 2 };

/* A packed operand: panels of 16 rows, `stride` apart. */
struct panels {
    uint32_t *data;
    size_t stride;
};

/* Scratch memory of a head and of a block of its queries. */
struct state {
    const struct mg_attention_head *head;
    struct panels v, k_columns; /* rows of values; columns of keys, in pairs of keys */
    struct panels dout, q_columns, dout_columns;    /* the same of the block's queries */
    float *q;                   /* (d, WIDTH) queries, scaled so that scores are base-2 logarithms */
    struct panels dscore;       /* lanes of queries, pairs of keys */
    uint16_t *p_rows, *dscore_rows;                 /* (KEYS, WIDTH) bfloat16 */
    float *p, *dq;              /* (TILE, WIDTH), (d, WIDTH) */
    __m512 lse[VECTORS], delta[VECTORS];
    __m512i seen[VECTORS];
    size_t first, n;            /* queries */
};

static size_t pairs_of(size_t n) { return (n + 1) / 2; }

/* 2^x for x up to about 1 */
MG_INLINE TARGET __m512 exp2_of(__m512 x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    x = _mm512_max_ps(x, _mm512_set1_ps(-160.0f));
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n), p = _mm512_set1_ps(c[5]);
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
}

/* c[r] += sum over pairs of a(r, pair) * b(pair, lanes), a's element at a[r * a_row + pair * a_pair]. */
MG_INLINE TARGET void dots(__m512 c[TILE][VECTORS], const uint32_t *a, const size_t a_row, const size_t a_pair,
                           const uint32_t *b, size_t b_stride, size_t pairs, const size_t vectors)
{
    for (size_t i = 0; i < pairs; i++) {
        __m512i y[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            y[v] = _mm512_load_si512(b + v * b_stride + i * LANES);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            __m512i x = broadcast(a[r * a_row + i * a_pair]);
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm512_dpbf16_ps(c[r][v], (__m512bh)x, (__m512bh)y[v]);
        }
    }
}

/* c = scores of TILE keys, those beyond the last being copies of it, as base-2 logarithms. */
MG_INLINE TARGET void score_tile(__m512 c[TILE][VECTORS], const struct state *s, size_t key, const size_t vectors)
{
    const float *row[TILE];
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        row[r] = s->head->k + mg_min(key + r, s->head->t_k - 1) * s->head->k_row;
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm512_setzero_ps();
    }
    for (size_t i = 0; i < s->head->d; i++) {
        __m512 q[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            q[v] = _mm512_load_ps(s->q + i * WIDTH + v * LANES);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            __m512 x = _mm512_set1_ps(row[r][i]);
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm512_fmadd_ps(x, q[v], c[r][v]);
        }
    }
}

/* c = the dot products of TILE values with the block's dout. */
MG_INLINE TARGET void value_tile(__m512 c[TILE][VECTORS], const struct state *s, size_t key, const size_t vectors)
{
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm512_setzero_ps();
    }
    dots(c, s->v.data + key / LANES * s->v.stride + key % LANES, 1, LANES, s->dout.data, s->dout.stride,
         pairs_of(s->head->d), vectors);
}

/* dq[i] += sum over n keys of column i of k times dscore */
MG_INLINE TARGET void add_queries(const struct state *s, size_t key, size_t n, const size_t vectors)
{
    for (size_t i = 0; i < s->head->d; i += TILE) {
        __m512 c[TILE][VECTORS];
        const uint32_t *k = s->k_columns.data + i / LANES * s->k_columns.stride + i % LANES + key / 2 * LANES;
        float *dq = s->dq + i * vectors * LANES;
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm512_load_ps(dq + (r * vectors + v) * LANES);
        }
        dots(c, k, 1, LANES, s->dscore.data, s->dscore.stride, pairs_of(n), vectors);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                _mm512_store_ps(dq + (r * vectors + v) * LANES, c[r][v]);
        }
    }
}

/* Where query v sees key. */
MG_INLINE TARGET __mmask16 sees(const struct state *s, size_t v, size_t key)
{
    return _mm512_cmpgt_epi32_mask(s->seen[v], _mm512_set1_epi32((int)key));
}

MG_INLINE float unit_of(size_t d) { return (float)(MG_LOG2_E / sqrt((double)d)); }

static void pack(struct panels *to, const float *x, size_t x_row, size_t x_column, size_t rows, size_t k)
{
    mg_avx512bf16.pack_b(to->data, to->stride, x, x_row, x_column, rows, k);
}

/* -> the number of keys that the block's last query sees. */
TARGET static size_t begin_block(struct state *s, size_t vectors)
{
    const struct mg_attention_head *h = s->head;
    int32_t seen[WIDTH] = {0};
    size_t n_keys = 0;
    memset(s->q, 0, h->d * WIDTH * sizeof *s->q);
    for (size_t l = 0; l < s->n; l++) {
        const float *q = h->q + (s->first + l) * h->q_row;
        for (size_t i = 0; i < h->d; i++)
            s->q[i * WIDTH + l] = q[i] * unit_of(h->d);
        n_keys = h->causal ? s->first + l + 1 + h->t_k - h->t_q : h->t_k;
        seen[l] = (int32_t)n_keys;
    }
    for (size_t v = 0; v < vectors; v++)
        s->seen[v] = _mm512_loadu_si512(seen + v * LANES);
    memset(s->dq, 0, mg_round_up(h->d, TILE) * vectors * LANES * sizeof *s->dq);
    return n_keys;
}

/* P and dscore of TILE keys from `key` on, row j of the block, in the forms in which they are multiplied. */
MG_INLINE TARGET void gradient_tile(const struct state *s, size_t key, size_t j, const size_t vectors)
{
    __m512 c[TILE][VECTORS], scale = _mm512_set1_ps(unit_of(s->head->d) * (float)MG_LN_2);      /* 1 / sqrt(d) */
    score_tile(c, s, key, vectors);
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m512 p = exp2_of(_mm512_sub_ps(c[r][v], s->lse[v]));
            p = _mm512_maskz_mov_ps(sees(s, v, key + r), p);
            _mm512_store_ps(s->p + (r * vectors + v) * LANES, p);
            _mm256_store_si256((__m256i *)(s->p_rows + (j + r) * WIDTH + v * LANES), (__m256i)_mm512_cvtneps_pbh(p));
        }
    }
    value_tile(c, s, key, vectors);
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m512 p = _mm512_mul_ps(_mm512_load_ps(s->p + (r * vectors + v) * LANES), scale);
            c[r][v] = _mm512_mul_ps(p, _mm512_sub_ps(c[r][v], s->delta[v]));
            _mm256_store_si256((__m256i *)(s->dscore_rows + (j + r) * WIDTH + v * LANES),
                               (__m256i)_mm512_cvtneps_pbh(c[r][v]));
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < TILE; r += 2) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            _mm512_store_si512(s->dscore.data + v * s->dscore.stride + (j + r) / 2 * LANES,
                               round_pairs(c[r][v], c[r + 1][v]));
    }
}

/* to[j] += sum over queries of weight[j][l] * x[l], x packed in columns, for n keys j. */
TARGET static void add_rows(const struct state *s, float *to, const uint16_t *weight, const struct panels *x, size_t n)
{
    size_t d = s->head->d, row = s->head->dense_row;
    for (size_t j = 0; j < n; j += TILE)
        for (size_t i = 0; i < d; i += COLUMNS * LANES) {
            __m512 c[TILE][VECTORS];
            __mmask16 mask[COLUMNS] = {mask_of(d - i), mask_of(d - i > LANES ? d - i - LANES : 0)};
            const uint32_t *b = x->data + i / LANES * x->stride;
            float *at = to + j * row + i;
            MG_UNROLL
            for (size_t r = 0; r < TILE; r++) {
                MG_UNROLL
                for (size_t v = 0; v < COLUMNS; v++)
                    c[r][v] = _mm512_maskz_loadu_ps(j + r < n ? mask[v] : 0, at + r * row + v * LANES);
            }
            dots(c, (const uint32_t *)(weight + j * WIDTH), WIDTH / 2, 1, b, mask[1] ? x->stride : 0, pairs_of(s->n),
                 COLUMNS);
            MG_UNROLL
            for (size_t r = 0; r < TILE; r++) {
                MG_UNROLL
                for (size_t v = 0; v < COLUMNS; v++)
                    _mm512_mask_storeu_ps(at + r * row + v * LANES, j + r < n ? mask[v] : 0, c[r][v]);
            }
        }
}

TARGET static void begin_gradient(struct state *s, size_t vectors)
{
    const struct mg_attention_head *h = s->head;
    const float *q = h->q + s->first * h->q_row, *dout = h->dout + s->first * h->dense_row;
    const float *out = h->out + s->first * h->dense_row;
    float lse[WIDTH] = {0}, delta[WIDTH] = {0};
    pack(&s->dout, dout, h->dense_row, 1, s->n, h->d);
    pack(&s->q_columns, q, 1, h->q_row, h->d, s->n);
    pack(&s->dout_columns, dout, 1, h->dense_row, h->d, s->n);
    for (size_t l = 0; l < s->n; l++) {
        __m512 sum = _mm512_setzero_ps();
        for (size_t i = 0; i < h->d; i += LANES) {
            __mmask16 mask = mask_of(h->d - i);
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, dout + l * h->dense_row + i),
                                  _mm512_maskz_loadu_ps(mask, out + l * h->dense_row + i), sum);
        }
        delta[l] = _mm512_reduce_add_ps(sum);
        lse[l] = h->lse[s->first + l] * (float)MG_LOG2_E;
    }
    for (size_t v = 0; v < vectors; v++) {
        s->lse[v] = _mm512_loadu_ps(lse + v * LANES);
        s->delta[v] = _mm512_loadu_ps(delta + v * LANES);
    }
}

MG_INLINE TARGET void backward_block(struct state *s, const size_t vectors)
{
    const struct mg_attention_head *h = s->head;
    size_t n_keys = begin_block(s, vectors);
    begin_gradient(s, vectors);
    for (size_t key = 0; key < n_keys; key += KEYS) {
        size_t n = mg_min(KEYS, n_keys - key);
        for (size_t j = 0; j < n; j += TILE)
            gradient_tile(s, key + j, j, vectors);
        add_rows(s, h->dv + key * h->dense_row, s->p_rows, &s->dout_columns, n);
        add_rows(s, h->dk + key * h->dense_row, s->dscore_rows, &s->q_columns, n);
        add_queries(s, key, n, vectors);
    }
    for (size_t l = 0; l < s->n; l++)
        for (size_t i = 0; i < h->d; i++)
            h->dq[(s->first + l) * h->dense_row + i] = s->dq[i * vectors * LANES + l];
}

/* ---- a head ---- */

/* The next panels of scratch memory, for rows of k elements. */
static struct panels take(uint32_t **at, size_t rows, size_t k)
{
    struct panels p = {*at, pairs_of(k) * LANES};
    *at += mg_round_up(rows, LANES) / LANES * p.stride;
    return p;
}

size_t mg_avx512bf16_attend_backward_words(size_t t_k, size_t d)
{
    size_t keys = mg_round_up(t_k, LANES) * pairs_of(d) + mg_round_up(d, LANES) * pairs_of(t_k);
    size_t queries = WIDTH * pairs_of(d) + 2 * mg_round_up(d, LANES) * pairs_of(WIDTH);
    return keys + queries + WIDTH * pairs_of(KEYS) + (KEYS + TILE) * WIDTH + (d + mg_round_up(d, TILE)) * WIDTH;
}

static void lay_out(struct state *s, const struct mg_attention_head *h, uint32_t *at)
{
    s->head = h;
    s->v = take(&at, h->t_k, h->d);
    s->k_columns = take(&at, h->d, h->t_k);
    s->dout = take(&at, WIDTH, h->d);
    s->q_columns = take(&at, h->d, WIDTH);
    s->dout_columns = take(&at, h->d, WIDTH);
    s->dscore = take(&at, WIDTH, KEYS);
    s->p_rows = (uint16_t *)at;
    s->dscore_rows = s->p_rows + KEYS * WIDTH;
    s->p = (float *)(at + KEYS * WIDTH);
    s->q = s->p + TILE * WIDTH;
    s->dq = s->q + h->d * WIDTH;
}

TARGET void mg_avx512bf16_attend_backward(const struct mg_attention_head *h, uint32_t *scratch)
{
    struct state s;
    lay_out(&s, h, scratch);
    pack(&s.v, h->v, h->v_row, 1, h->t_k, h->d);
    pack(&s.k_columns, h->k, 1, h->k_row, h->d, h->t_k);
    for (size_t j = 0; j < h->t_k; j++) {
        memset(h->dk + j * h->dense_row, 0, h->d * sizeof *h->dk);
        memset(h->dv + j * h->dense_row, 0, h->d * sizeof *h->dv);
    }
    for (s.first = 0; s.first < h->t_q; s.first += WIDTH) {
        s.n = mg_min(WIDTH, h->t_q - s.first);
        if (s.n <= LANES)
            backward_block(&s, 1);
        else if (s.n <= 2 * LANES)
            backward_block(&s, 2);
        else
            backward_block(&s, 3);
    }
}

#endif
