/* AVX512-BF16: attention of many queries, a head at a time, with queries, keys, values and probabilities rounded to
   bfloat16 and all sums in float32.  Queries lie across the lanes, WIDTH at a time, as in avx512attention.c; products
   are tiles of the table that is given (avx512bf16.c), whose operands are packed once for all queries of the block. */
#if defined(__x86_64__)
#include "avx512bf16.h"

#include <string.h>

#define TARGET __attribute__((target(MG_AVX512BF16)))
enum { LANES = 16, VECTORS = MG_BF16_PANELS, WIDTH = LANES * VECTORS, KEYS = 256 };

/* What a block of queries keeps: packed keys and values of all keys seen, and for WIDTH queries at a time the rest. */
struct state {
    const struct mg_attention_block *block;
    size_t k_stride, v_stride;  /* between panels */
    uint32_t *k, *v;            /* panels of 16 keys; for KEYS keys after the other, panels of 16 elements of d */
    uint32_t *q, *p;            /* panels of 16 queries: pairs of elements of d; pairs of keys */
    float *scores, *o;          /* (KEYS, WIDTH), (d, WIDTH) */
    __m512 top[VECTORS], sum[VECTORS];
    __m512i seen[VECTORS];
};

static size_t key_panels(size_t t_k) { return mg_round_up(t_k, KEYS) / LANES; }
static size_t value_panels(size_t d) { return mg_round_up(d, LANES) / LANES; }
static size_t pairs_of(size_t n) { return (n + 1) / 2; }
static size_t score_floats(size_t d) { return mg_max(KEYS * WIDTH, LANES * d); }    /* rows of queries at first */

size_t mg_avx512bf16_attend_words(size_t t_k, size_t d)
{
    size_t k = key_panels(t_k) * pairs_of(d) * LANES, v = mg_round_up(t_k, KEYS) / 2 * value_panels(d) * LANES;
    return k + v + (pairs_of(d) + KEYS / 2 + d) * WIDTH + score_floats(d);
}

static struct state state_of(const struct mg_attention_block *b, size_t t_k, uint32_t *scratch)
{
    struct state s = {.block = b, .k_stride = pairs_of(b->d) * LANES, .v_stride = KEYS / 2 * LANES, .k = scratch};
    s.v = s.k + key_panels(t_k) * s.k_stride;
    s.q = s.v + mg_round_up(t_k, KEYS) / KEYS * value_panels(b->d) * s.v_stride;
    s.p = s.q + pairs_of(b->d) * WIDTH;
    s.scores = (float *)(s.p + KEYS / 2 * WIDTH);
    s.o = s.scores + score_floats(b->d);
    return s;
}

/* 2^x for x <= 0, to a relative error of 8e-5, since p is about to be rounded to 8 bits; NaN stays NaN.  Adding
   1.5 * 2^23 leaves the nearest integer in the low bits; the coefficients minimize the error for |f| <= 1/2. */
MG_INLINE TARGET __m512 exp2_of(__m512 x)
{
    const __m512 magic = _mm512_set1_ps(12582912.0f);
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);      /* the second of them where it is NaN */
    __m512 n = _mm512_add_ps(x, magic), f = _mm512_sub_ps(x, _mm512_sub_ps(n, magic));
    __m512 p = _mm512_fmadd_ps(f, _mm512_set1_ps(0.05517164963581466f), _mm512_set1_ps(0.24261116195647364f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6932609926350322f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999280712959872f));
    return (__m512)_mm512_add_epi32((__m512i)p, _mm512_slli_epi32((__m512i)n, 23));
}

TARGET static void load_queries(struct state *s, const struct mg_bf16 *bf16, size_t first, size_t n)
{
    const struct mg_attention_block *b = s->block;
    const float unit = (float)(MG_LOG2_E / sqrt((double)b->d));
    int32_t seen[WIDTH] = {0};
    float *rows = s->scores;    /* free as yet */
    for (size_t l = 0; l < n; l++)
        seen[l] = (int32_t)b->seen[first + l];
    for (size_t panel = 0; panel < VECTORS; panel++) {
        size_t at = panel * LANES, rows_here = n > at ? mg_min(LANES, n - at) : 0;
        for (size_t l = 0; l < rows_here; l++)
            for (size_t i = 0; i < b->d; i++)
                rows[l * b->d + i] = b->q[first + at + l][i] * unit;
        if (rows_here > 0)
            bf16->pack_b(s->q + panel * s->k_stride, s->k_stride, rows, b->d, 1, rows_here, b->d);
        s->seen[panel] = _mm512_loadu_si512(seen + at);
        s->top[panel] = _mm512_set1_ps(MG_LOWEST);
        s->sum[panel] = _mm512_setzero_ps();
    }
    memset(s->o, 0, b->d * WIDTH * sizeof *s->o);
}

/* MG_LOWEST where a query does not see a key. */
MG_INLINE TARGET void hide(struct state *s, size_t key, size_t n, size_t vectors)
{
    for (size_t j = 0; j < n; j++)
        for (size_t v = 0; v < vectors; v++) {
            float *at = s->scores + j * WIDTH + v * LANES;
            __mmask16 see = _mm512_cmpgt_epi32_mask(s->seen[v], _mm512_set1_epi32((int)(key + j)));
            _mm512_storeu_ps(at, _mm512_mask_blend_ps(see, _mm512_set1_ps(MG_LOWEST), _mm512_loadu_ps(at)));
        }
}

/* Online softmax of n keys: p = 2^(score - top) with the new maximum, in pairs of keys; sums and o follow. */
TARGET static void normalise(struct state *s, size_t n, size_t vectors)
{
    for (size_t v = 0; v < vectors; v++) {
        const float *x = s->scores + v * LANES;
        uint32_t *p = s->p + v * s->v_stride;
        __m512 before = s->top[v], top = before, sum = _mm512_setzero_ps();
        for (size_t j = 0; j < n; j++)
            top = _mm512_max_ps(top, _mm512_loadu_ps(x + j * WIDTH));
        for (size_t j = 0; j < n; j += 2) {
            __m512 even = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(x + j * WIDTH), top)), odd = _mm512_setzero_ps();
            if (j + 1 < n)
                odd = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(x + (j + 1) * WIDTH), top));
            sum = _mm512_add_ps(sum, _mm512_add_ps(even, odd));
            _mm512_storeu_si512(p + j / 2 * LANES, round_pairs(even, odd));
        }
        s->top[v] = top;
        if (_mm512_cmpneq_ps_mask(before, top) == 0) {
            s->sum[v] = _mm512_add_ps(s->sum[v], sum);
            continue;
        }
        __m512 scale = exp2_of(_mm512_sub_ps(before, top));
        s->sum[v] = _mm512_fmadd_ps(s->sum[v], scale, sum);
        for (size_t i = 0; i < s->block->d; i++) {
            float *o = s->o + i * WIDTH + v * LANES;
            _mm512_storeu_ps(o, _mm512_mul_ps(_mm512_loadu_ps(o), scale));
        }
    }
}

/* c (rows, columns) [+]= a b^T: rows of panels of 16 in a, lanes in b. */
static void multiply(const struct mg_bf16 *bf16, float *c, const uint32_t *a, size_t a_stride, const uint32_t *b,
                     size_t b_stride, size_t rows, size_t columns, size_t pairs, int add)
{
    for (size_t i = 0; i < rows; i += bf16->rows) {
        struct mg_bf16_tile t = {.c = c + i * WIDTH, .a = a + i / LANES * a_stride + i % LANES, .b = b, .c_row = WIDTH,
                                 .a_stride = a_stride, .b_stride = b_stride, .rows = mg_min(bf16->rows, rows - i),
                                 .columns = columns, .pairs = pairs, .add = add};
        bf16->tile(&t);
    }
}

TARGET static void store_queries(const struct state *s, size_t first, size_t n)
{
    const struct mg_attention_block *b = s->block;
    float sum[WIDTH];
    for (size_t v = 0; v < VECTORS; v++)
        _mm512_storeu_ps(sum + v * LANES, s->sum[v]);
    for (size_t l = 0; l < n; l++) {
        const float *o = s->o + l, *gate = b->gate != NULL ? b->gate[first + l] : NULL;
        float *out = b->out[first + l], scale = 1.0f / sum[l];
        if (gate != NULL && b->gate_width == 1)
            scale *= gate[0];
        for (size_t i = 0; i < b->d; i++)
            out[i] = o[i * WIDTH] * scale;
        for (size_t i = 0; gate != NULL && b->gate_width != 1 && i < b->d; i++)
            out[i] *= gate[i];
    }
}

/* Queries first .. first + n - 1 of the block, at most WIDTH. */
TARGET static void attend_some(struct state *s, const struct mg_bf16 *bf16, size_t first, size_t n)
{
    const struct mg_attention_block *b = s->block;
    size_t n_keys = 0, first_end = b->seen[first], vectors = mg_round_up(n, LANES) / LANES;
    for (size_t l = first; l < first + n; l++) {
        n_keys = mg_max(n_keys, b->seen[l]);
        first_end = mg_min(first_end, b->seen[l]);
    }
    load_queries(s, bf16, first, n);
    for (size_t key = 0; key < n_keys; key += KEYS) {
        size_t some = mg_min(KEYS, n_keys - key);
        const uint32_t *k = s->k + key / LANES * s->k_stride, *v = s->v + key / KEYS * value_panels(b->d) * s->v_stride;
        multiply(bf16, s->scores, k, s->k_stride, s->q, s->k_stride, some, vectors * LANES, pairs_of(b->d), 0);
        if (key + some > first_end)
            hide(s, key, some, vectors);
        normalise(s, some, vectors);
        multiply(bf16, s->o, v, s->v_stride, s->p, s->v_stride, b->d, vectors * LANES, pairs_of(some), 1);
    }
    store_queries(s, first, n);
}

void mg_avx512bf16_attend(const struct mg_bf16 *bf16, const struct mg_attention_block *b, uint32_t *scratch)
{
    size_t n_keys = 0;
    for (size_t l = 0; l < b->n_query; l++)
        n_keys = mg_max(n_keys, b->seen[l]);
    struct state s = state_of(b, n_keys, scratch);
    bf16->pack_a(s.k, s.k_stride, b->k, b->k_row, 1, n_keys, b->d);
    for (size_t key = 0; key < n_keys; key += KEYS)
        bf16->pack_a(s.v + key / KEYS * value_panels(b->d) * s.v_stride, s.v_stride, b->v + key * b->v_row, 1,
                     b->v_row, b->d, mg_min(KEYS, n_keys - key));
    for (size_t first = 0; first < b->n_query; first += WIDTH)
        attend_some(&s, bf16, first, mg_min(WIDTH, b->n_query - first));
}
#endif
