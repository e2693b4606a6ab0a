/* AVX2 with FMA: the backward of attention in float32, as in avx512backward.c, with 24 queries across the lanes and 12
   of 16 registers as sums. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
enum { LANES = 8, VECTORS = 3, WIDTH = LANES * VECTORS, TILE = 4, KEYS = 48, ROWS = 6, COLUMNS = 2 };

/* What a block of queries needs; matrices (., width), width = lanes in use. */
struct state {
    const struct mg_attention_head *head;
    float *q, *dout, *dq;       /* (d, width), q scaled so that scores are base-2 logarithms */
    float *p, *dscore;          /* (KEYS, width) */
    __m256 lse[VECTORS], delta[VECTORS];
    __m256i seen[VECTORS];
    float scale;                /* 1 / sqrt(d) */
    size_t first, n;            /* queries */
};

size_t mg_avx2_attend_backward_floats(size_t d) { return (3 * d + 2 * KEYS) * WIDTH; }

/* 2^x for x up to about 1; 0 below -126 */
MG_INLINE TARGET __m256 exp2_of(__m256 x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    __m256 lowest = _mm256_set1_ps(-126.0f), normal = _mm256_cmp_ps(x, lowest, _CMP_GT_OQ);
    x = _mm256_max_ps(x, lowest);
    __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(x, n), p = _mm256_set1_ps(c[5]);
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(normal, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)));
}

/* c[r] = x[key + r] . lanes, for TILE rows of x, those beyond the last being copies of it. */
MG_INLINE TARGET void dot_tile(__m256 c[TILE][VECTORS], const float *x, size_t x_row, const float *lanes, size_t key,
                               size_t last, size_t d, const size_t vectors)
{
    const float *row[TILE];
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        row[r] = x + mg_min(key + r, last) * x_row;
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm256_setzero_ps();
    }
    for (size_t i = 0; i < d; i++) {
        __m256 y[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            y[v] = _mm256_loadu_ps(lanes + (i * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            __m256 one = _mm256_set1_ps(row[r][i]);
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm256_fmadd_ps(one, y[v], c[r][v]);
        }
    }
}

/* P = 2^(score - lse), 0 where a query does not see the key, of TILE keys from `key` on; their place is row `at`. */
MG_INLINE TARGET void probability_tile(const struct state *s, size_t key, size_t last, size_t at, int hidden,
                                       const size_t vectors)
{
    __m256 c[TILE][VECTORS];
    dot_tile(c, s->head->k, s->head->k_row, s->q, key, last, s->head->d, vectors);
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m256 p = exp2_of(_mm256_sub_ps(c[r][v], s->lse[v]));
            if (hidden)
                p = _mm256_and_ps(p, _mm256_castsi256_ps(
                    _mm256_cmpgt_epi32(s->seen[v], _mm256_set1_epi32((int)(key + r)))));
            _mm256_storeu_ps(s->p + ((at + r) * vectors + v) * LANES, p);
        }
    }
}

/* dscore = P (dP - delta) / sqrt(d), dP = value . dout */
MG_INLINE TARGET void score_tile(const struct state *s, size_t key, size_t last, size_t at, const size_t vectors)
{
    __m256 c[TILE][VECTORS];
    dot_tile(c, s->head->v, s->head->v_row, s->dout, key, last, s->head->d, vectors);
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            size_t to = ((at + r) * vectors + v) * LANES;
            __m256 p = _mm256_mul_ps(_mm256_loadu_ps(s->p + to), _mm256_set1_ps(s->scale));
            _mm256_storeu_ps(s->dscore + to, _mm256_mul_ps(p, _mm256_sub_ps(c[r][v], s->delta[v])));
        }
    }
}

/* dq[i .. i + tile - 1] += sum_j key[j] * dscore[j] */
MG_INLINE TARGET void query_tile(const struct state *s, const float *key, size_t i, size_t n, const size_t tile,
                                 const size_t vectors)
{
    __m256 c[TILE][VECTORS];
    float *dq = s->dq + i * vectors * LANES;
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm256_loadu_ps(dq + (r * vectors + v) * LANES);
    }
    for (size_t j = 0; j < n; j++) {
        const float *x = key + j * s->head->k_row + i;
        __m256 y[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            y[v] = _mm256_loadu_ps(s->dscore + (j * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < tile; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm256_fmadd_ps(_mm256_set1_ps(x[r]), y[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            _mm256_storeu_ps(dq + (r * vectors + v) * LANES, c[r][v]);
    }
}

/* sum[j] += sum_l weight[j][l] * x[l] for some rows j, weight rows `width` apart, n queries l, over some vectors. */
MG_INLINE TARGET void row_step(float *sum, const float *weight, size_t width, const float *x, size_t x_row,
                               const struct state *s, const size_t rows, const size_t vectors)
{
    size_t sum_row = s->head->dense_row;
    __m256 c[ROWS][COLUMNS];
    MG_UNROLL
    for (size_t r = 0; r < rows; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm256_loadu_ps(sum + r * sum_row + v * LANES);
    }
    for (size_t l = 0; l < s->n; l++) {
        __m256 y[COLUMNS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            y[v] = _mm256_loadu_ps(x + l * x_row + v * LANES);
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm256_fmadd_ps(_mm256_set1_ps(weight[r * width + l]), y[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < rows; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            _mm256_storeu_ps(sum + r * sum_row + v * LANES, c[r][v]);
    }
}

MG_INLINE TARGET void row_tile(float *sum, const float *weight, size_t width, const float *x, size_t x_row,
                               const struct state *s, const size_t rows)
{
    size_t d = s->head->d, i = 0;
    for (; i + COLUMNS * LANES <= d; i += COLUMNS * LANES)
        row_step(sum + i, weight, width, x + i, x_row, s, rows, COLUMNS);
    for (; i + LANES <= d; i += LANES)
        row_step(sum + i, weight, width, x + i, x_row, s, rows, 1);
    for (size_t r = 0; r < rows && i < d; r++)
        for (size_t l = 0; l < s->n; l++)
            for (size_t c = i; c < d; c++)
                sum[r * s->head->dense_row + c] += weight[r * width + l] * x[l * x_row + c];
}

TARGET static void add_rows(float *sum, const float *weight, size_t width, const float *x, size_t x_row,
                            const struct state *s, size_t n_keys)
{
    size_t j = 0;
    for (; j + ROWS <= n_keys; j += ROWS)
        row_tile(sum + j * s->head->dense_row, weight + j * width, width, x, x_row, s, ROWS);
    for (; j < n_keys; j++)
        row_tile(sum + j * s->head->dense_row, weight + j * width, width, x, x_row, s, 1);
}

/* -> the number of keys that the block's last query sees; *first_end that of its first. */
TARGET static size_t load_queries(struct state *s, size_t vectors, size_t *first_end)
{
    const struct mg_attention_head *h = s->head;
    size_t width = vectors * LANES, n_keys = 0;
    float lse[WIDTH] = {0}, delta[WIDTH] = {0}, unit = s->scale * (float)MG_LOG2_E;
    int32_t seen[WIDTH] = {0};
    memset(s->q, 0, 3 * h->d * width * sizeof *s->q);
    for (size_t l = 0; l < s->n; l++) {
        size_t at = s->first + l;
        const float *q = h->q + at * h->q_row, *dout = h->dout + at * h->dense_row, *out = h->out + at * h->dense_row;
        for (size_t i = 0; i < h->d; i++) {
            s->q[i * width + l] = q[i] * unit;
            s->dout[i * width + l] = dout[i];
            delta[l] += dout[i] * out[i];
        }
        lse[l] = h->lse[at] * (float)MG_LOG2_E;
        n_keys = h->causal ? at + 1 + h->t_k - h->t_q : h->t_k;
        seen[l] = (int32_t)n_keys;
    }
    for (size_t v = 0; v < vectors; v++) {
        s->lse[v] = _mm256_loadu_ps(lse + v * LANES);
        s->delta[v] = _mm256_loadu_ps(delta + v * LANES);
        s->seen[v] = _mm256_loadu_si256((const __m256i *)(seen + v * LANES));
    }
    *first_end = (size_t)seen[0];
    return n_keys;
}

MG_INLINE TARGET void backward_vectors(struct state *s, const size_t vectors)
{
    const struct mg_attention_head *h = s->head;
    size_t width = vectors * LANES, first_end;
    s->dout = s->q + h->d * width;
    s->dq = s->dout + h->d * width;
    size_t n_keys = load_queries(s, vectors, &first_end);
    for (size_t k0 = 0; k0 < n_keys; k0 += KEYS) {
        size_t n = mg_min(KEYS, n_keys - k0), i = 0, dense = k0 * h->dense_row;
        const float *key = h->k + k0 * h->k_row;
        for (size_t j = 0; j < n; j += TILE) {
            probability_tile(s, k0 + j, n_keys - 1, j, k0 + n > first_end, vectors);
            score_tile(s, k0 + j, n_keys - 1, j, vectors);
        }
        add_rows(h->dv + dense, s->p, width, h->dout + s->first * h->dense_row, h->dense_row, s, n);
        add_rows(h->dk + dense, s->dscore, width, h->q + s->first * h->q_row, h->q_row, s, n);
        for (; i + TILE <= h->d; i += TILE)
            query_tile(s, key, i, n, TILE, vectors);
        for (; i < h->d; i++)
            query_tile(s, key, i, n, 1, vectors);
    }
    for (size_t l = 0; l < s->n; l++)
        for (size_t i = 0; i < h->d; i++)
            h->dq[(s->first + l) * h->dense_row + i] = s->dq[i * width + l];
}

TARGET void mg_avx2_attend_backward(const struct mg_attention_head *head, float *scratch)
{
    struct state s = {.head = head, .p = scratch, .dscore = scratch + KEYS * WIDTH, .q = scratch + 2 * KEYS * WIDTH,
                      .scale = (float)(1.0 / sqrt((double)head->d))};
    for (size_t j = 0; j < head->t_k; j++) {
        memset(head->dk + j * head->dense_row, 0, head->d * sizeof *head->dk);
        memset(head->dv + j * head->dense_row, 0, head->d * sizeof *head->dv);
    }
    for (s.first = 0; s.first < head->t_q; s.first += WIDTH) {
        s.n = mg_min(WIDTH, head->t_q - s.first);
        if (s.n <= LANES)
            backward_vectors(&s, 1);
        else if (s.n <= 2 * LANES)
            backward_vectors(&s, 2);
        else
            backward_vectors(&s, 3);
    }
}
#endif
