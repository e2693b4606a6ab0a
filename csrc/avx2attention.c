/* AVX2 with FMA: attention in float32, as in avx512attention.c.

   attend: queries lie across the lanes, up to 24 of them in 3 vectors.  Scores (keys, queries) and results (d, queries)
   are then products with broadcast elements of the keys and values, which are read where they are, and the softmax
   needs nothing across lanes.  4 keys, or 4 elements of d, times 3 vectors fill 12 of 16 registers.
   attend_range: elements of d lie across the lanes; for a few queries, one in decoding. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
enum { LANES = 8, VECTORS = 3, TILE = 4, SOME_KEYS = 32, AHEAD = 64 };

/* 2^x for x <= 0; 0 below -126 */
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

/* ---- many queries ---- */

/* What a block of queries keeps between blocks of keys; width = lanes in use, 8 to 24. */
struct state {
    float *q, *p, *o;           /* (d, width), (MG_KEYS, width), (d, width) */
    __m256 top[VECTORS], sum[VECTORS], scale[VECTORS];
    __m256i seen[VECTORS];
};

size_t mg_avx2_attend_floats(size_t d) { return (2 * d + MG_KEYS) * LANES * VECTORS; }

/* Scores of TILE keys, those beyond the last being copies of it; MG_LOWEST where a query does not see a key. */
MG_INLINE TARGET void score_tile(const struct state *s, const struct mg_attention_block *b, size_t key, size_t last,
                                 float *p, int hidden, const size_t vectors)
{
    const float *row[TILE];
    __m256 c[TILE][VECTORS];
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        row[r] = b->k + mg_min(key + r, last) * b->k_row;
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm256_setzero_ps();
    }
    for (size_t i = 0; i < b->d; i++) {
        __m256 q[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            q[v] = _mm256_loadu_ps(s->q + (i * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            __m256 x = _mm256_set1_ps(row[r][i]);
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm256_fmadd_ps(x, q[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            if (hidden) {
                __m256i see = _mm256_cmpgt_epi32(s->seen[v], _mm256_set1_epi32((int)(key + r)));
                c[r][v] = _mm256_blendv_ps(_mm256_set1_ps(MG_LOWEST), c[r][v], _mm256_castsi256_ps(see));
            }
            _mm256_storeu_ps(p + (r * vectors + v) * LANES, c[r][v]);
        }
    }
}

/* Online softmax: scores become 2^(score - top) with the new maximum; sums, and the scale of older results, follow. */
MG_INLINE TARGET void normalise(struct state *s, size_t n, const size_t vectors)
{
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++) {
        float *p = s->p + v * LANES;
        __m256 top = s->top[v], sum = _mm256_setzero_ps();
        for (size_t j = 0; j < n; j++)
            top = _mm256_max_ps(top, _mm256_loadu_ps(p + j * vectors * LANES));
        for (size_t j = 0; j < n; j++) {
            __m256 x = exp2_of(_mm256_sub_ps(_mm256_loadu_ps(p + j * vectors * LANES), top));
            _mm256_storeu_ps(p + j * vectors * LANES, x);
            sum = _mm256_add_ps(sum, x);
        }
        s->scale[v] = exp2_of(_mm256_sub_ps(s->top[v], top));
        s->sum[v] = _mm256_fmadd_ps(s->sum[v], s->scale[v], sum);
        s->top[v] = top;
    }
}

/* o[i .. i + tile - 1] = o * scale + sum_j value[j] * p[j] */
MG_INLINE TARGET void value_tile(const struct state *s, const float *value, size_t v_row, size_t i, size_t n,
                                 const size_t tile, const size_t vectors)
{
    __m256 c[TILE][VECTORS];
    float *o = s->o + i * vectors * LANES;
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm256_mul_ps(_mm256_loadu_ps(o + (r * vectors + v) * LANES), s->scale[v]);
    }
    for (size_t j = 0; j < n; j++) {
        const float *x = value + j * v_row + i;
        __m256 p[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            p[v] = _mm256_loadu_ps(s->p + (j * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < tile; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm256_fmadd_ps(_mm256_set1_ps(x[r]), p[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            _mm256_storeu_ps(o + (r * vectors + v) * LANES, c[r][v]);
    }
}

TARGET static size_t load_queries(struct state *s, const struct mg_attention_block *b, size_t vectors)
{
    float unit = (float)(MG_LOG2_E / sqrt((double)b->d));
    size_t width = vectors * LANES, n_keys = 0;
    int32_t seen[VECTORS * LANES] = {0};
    memset(s->q, 0, b->d * width * sizeof *s->q);
    memset(s->o, 0, b->d * width * sizeof *s->o);
    for (size_t l = 0; l < b->n_query; l++) {
        seen[l] = (int32_t)b->seen[l];
        n_keys = mg_max(n_keys, b->seen[l]);
        for (size_t i = 0; i < b->d; i++)
            s->q[i * width + l] = b->q[l][i] * unit;
    }
    for (size_t v = 0; v < vectors; v++) {
        s->seen[v] = _mm256_loadu_si256((const __m256i *)(seen + v * LANES));
        s->top[v] = _mm256_set1_ps(MG_LOWEST);
        s->sum[v] = _mm256_setzero_ps();
    }
    return n_keys;
}

TARGET static void store_queries(const struct state *s, const struct mg_attention_block *b, size_t vectors)
{
    float sum[VECTORS * LANES], top[VECTORS * LANES];
    for (size_t v = 0; v < vectors; v++) {
        _mm256_storeu_ps(sum + v * LANES, s->sum[v]);
        _mm256_storeu_ps(top + v * LANES, s->top[v]);
    }
    for (size_t l = 0; l < b->n_query; l++) {
        const float *o = s->o + l, *gate = b->gate != NULL ? b->gate[l] : NULL;
        float *out = b->out[l], scale = 1.0f / sum[l];
        if (b->lse != NULL)
            b->lse[l] = mg_lse(top[l], sum[l]);
        if (gate != NULL && b->gate_width == 1)
            scale *= gate[0];
        for (size_t i = 0; i < b->d; i++)
            out[i] = o[i * vectors * LANES] * scale;
        for (size_t i = 0; gate != NULL && b->gate_width != 1 && i < b->d; i++)
            out[i] *= gate[i];
    }
}

MG_INLINE TARGET void attend_vectors(const struct mg_attention_block *b, float *scratch, const size_t vectors)
{
    struct state s;
    size_t size = b->d * vectors * LANES, first_end = b->seen[0];
    s.q = scratch;
    s.o = scratch + size;
    s.p = scratch + 2 * size;
    size_t n_keys = load_queries(&s, b, vectors);
    for (size_t l = 1; l < b->n_query; l++)
        first_end = mg_min(first_end, b->seen[l]);
    for (size_t k0 = 0; k0 < n_keys; k0 += MG_KEYS) {
        size_t n = mg_min(MG_KEYS, n_keys - k0), i = 0;
        const float *value = b->v + k0 * b->v_row;
        int hidden = k0 + n > first_end;
        for (size_t j = 0; j < n; j += TILE)
            score_tile(&s, b, k0 + j, n_keys - 1, s.p + j * vectors * LANES, hidden, vectors);
        normalise(&s, n, vectors);
        for (; i + TILE <= b->d; i += TILE)
            value_tile(&s, value, b->v_row, i, n, TILE, vectors);
        for (; i < b->d; i++)
            value_tile(&s, value, b->v_row, i, n, 1, vectors);
    }
    store_queries(&s, b, vectors);
}

TARGET void mg_avx2_attend(const struct mg_attention_block *b, float *scratch)
{
    if (b->n_query <= LANES)
        attend_vectors(b, scratch, 1);
    else if (b->n_query <= 2 * LANES)
        attend_vectors(b, scratch, 2);
    else
        attend_vectors(b, scratch, 3);
}

/* ---- few queries ---- */

MG_INLINE TARGET __m256i mask_of(size_t left)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < LANES ? (int)left : LANES), lane);
}

/* Up to 8 floats, zero beyond; masked accesses, slow on some processors, only where there are fewer. */
MG_INLINE TARGET __m256 load(const float *x, size_t left)
{
    return left >= LANES ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, mask_of(left));
}

/* The sums of 8 vectors, in a vector. */
MG_INLINE TARGET __m256 sums_of(const __m256 *c)
{
    __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(c[0], c[1]), _mm256_hadd_ps(c[2], c[3]));
    __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(c[4], c[5]), _mm256_hadd_ps(c[6], c[7]));
    return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

/* Up to 8 elements as floats, zeros beyond. */
MG_INLINE TARGET __m256 widened(const void *x, size_t left, const enum mg_held held)
{
    if (held == MG_HELD_FLOAT)
        return load(x, left);
    __m128i bits = _mm_setzero_si128();
    memcpy(&bits, x, mg_min(left, LANES) * mg_held_bytes(held));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

/* Fetches elements that are read AHEAD keys later, or lie behind the last key, which does no harm: each head's part is
   too short for a processor to see it coming.  One row at a time, since many at once stall. */
MG_INLINE TARGET void fetch(const void *x, const size_t vectors, const enum mg_held held)
{
    for (size_t at = 0; at < vectors * LANES * mg_held_bytes(held); at += 64)
        _mm_prefetch((const char *)x + at, _MM_HINT_T1);
}

/* c[r] += q * key[r] for 8 keys, those beyond n being copies of the last, over some vectors, the last of up to 8. */
MG_INLINE TARGET void score_step(__m256 *c, const float *q, const void *key, size_t k_row, size_t n, size_t left,
                                 const size_t vectors, const enum mg_held held)
{
    __m256 x[4];
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++)
        x[v] = load(q + v * LANES, left);
    MG_UNROLL
    for (size_t r = 0; r < LANES; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r] = _mm256_fmadd_ps(x[v], widened(mg_held_at(key, v * LANES, held), left, held), c[r]);
        fetch(mg_held_at(key, AHEAD * k_row, held), vectors, held);
        key = mg_held_at(key, r + 1 < n ? k_row : 0, held);
    }
}

/* p[j] = q . key[j], times unit, for n <= SOME_KEYS keys; -> their maximum */
MG_INLINE TARGET float score_some(float *p, const float *q, const void *key, size_t k_row, size_t n, size_t d, float unit,
                                  const enum mg_held held)
{
    float top = MG_LOWEST;
    for (size_t j = 0; j < n; j += LANES) {
        const void *at = mg_held_at(key, j * k_row, held);
        __m256 c[LANES];
        size_t i = 0;
        MG_UNROLL
        for (size_t r = 0; r < LANES; r++)
            c[r] = _mm256_setzero_ps();
        for (; i + 4 * LANES <= d; i += 4 * LANES)
            score_step(c, q + i, mg_held_at(at, i, held), k_row, n - j, LANES, 4, held);
        for (; i + LANES <= d; i += LANES)
            score_step(c, q + i, mg_held_at(at, i, held), k_row, n - j, LANES, 1, held);
        if (i < d)
            score_step(c, q + i, mg_held_at(at, i, held), k_row, n - j, d - i, 1, held);
        _mm256_storeu_ps(p + j, _mm256_mul_ps(sums_of(c), _mm256_set1_ps(unit)));
    }
    for (size_t j = 0; j < n; j++)
        top = p[j] > top ? p[j] : top;
    return top;
}

/* p[j] = 2^(p[j] - top) -> their sum */
MG_INLINE TARGET float weigh_some(float *p, float top, size_t n)
{
    float sum = 0.0f;
    for (size_t j = 0; j < n; j += LANES)
        _mm256_storeu_ps(p + j, exp2_of(_mm256_sub_ps(_mm256_loadu_ps(p + j), _mm256_set1_ps(top))));
    for (size_t j = 0; j < n; j++)
        sum += p[j];
    return sum;
}

/* o = o * scale + sum_j p[j] * value[j], over some vectors, the last of up to 8 elements. */
MG_INLINE TARGET void add_step(float *o, float scale, const float *p, const void *value, size_t v_row, size_t n,
                               size_t left, const size_t vectors, const enum mg_held held)
{
    __m256 c[8];
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++)
        c[v] = _mm256_mul_ps(load(o + v * LANES, left), _mm256_set1_ps(scale));
    for (size_t j = 0; j < n; j++, value = mg_held_at(value, v_row, held)) {
        fetch(mg_held_at(value, AHEAD * v_row, held), vectors, held);
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[v] = _mm256_fmadd_ps(_mm256_set1_ps(p[j]), widened(mg_held_at(value, v * LANES, held), left, held), c[v]);
    }
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++) {
        if (left >= LANES)
            _mm256_storeu_ps(o + v * LANES, c[v]);
        else
            _mm256_maskstore_ps(o + v * LANES, mask_of(left), c[v]);
    }
}

MG_INLINE TARGET void add_some(float *o, float scale, const float *p, const void *value, size_t v_row, size_t n,
                               size_t d, const enum mg_held held)
{
    size_t i = 0;
    for (; i + 8 * LANES <= d; i += 8 * LANES)
        add_step(o + i, scale, p, mg_held_at(value, i, held), v_row, n, LANES, 8, held);
    for (; i + LANES <= d; i += LANES)
        add_step(o + i, scale, p, mg_held_at(value, i, held), v_row, n, LANES, 1, held);
    if (i < d)
        add_step(o + i, scale, p, mg_held_at(value, i, held), v_row, n, d - i, 1, held);
}

#include "rangeloop.h"

TARGET void mg_avx2_attend_range(const struct mg_attention_range *r)
{
    if (r->held == MG_HELD_FLOAT)
        attend_range(r, MG_HELD_FLOAT);
    else
        attend_range(r, MG_HELD_HALF);
}
#endif
