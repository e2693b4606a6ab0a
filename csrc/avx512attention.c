/* AVX-512F: attention in float32.

   attend: queries lie across the lanes, up to 48 of them in 3 vectors.  Scores (keys, queries) and results (d, queries)
   are then products with broadcast elements of the keys and values, which are read where they are, and the softmax
   needs nothing across lanes.  8 keys, or 8 elements of d, times 3 vectors fill 24 of 32 registers.
   attend_range: elements of d lie across the lanes; for a few queries, one in decoding. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))
enum { LANES = 16, VECTORS = 3, TILE = 8, SOME_KEYS = 32, AHEAD = 64 };

/* 2^x for x <= 0, however small */
MG_INLINE TARGET __m512 exp2_of(__m512 x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 f = _mm512_sub_ps(x, n), p = _mm512_set1_ps(c[5]);
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c[i]));
    return _mm512_scalef_ps(p, n);
}

/* ---- many queries ---- */

/* What a block of queries keeps between blocks of keys; width = lanes in use, 16 to 48. */
struct state {
    float *q, *p, *o;           /* (d, width), (MG_KEYS, width), (d, width) */
    __m512 top[VECTORS], sum[VECTORS], scale[VECTORS];
    __m512i seen[VECTORS];
};

size_t mg_avx512_attend_floats(size_t d) { return (2 * d + MG_KEYS) * LANES * VECTORS; }

/* Scores of TILE keys, those beyond the last being copies of it; MG_LOWEST where a query does not see a key. */
MG_INLINE TARGET void score_tile(const struct state *s, const struct mg_attention_block *b, size_t key, size_t last,
                                 float *p, int hidden, const size_t vectors)
{
    const float *row[TILE];
    __m512 c[TILE][VECTORS];
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        row[r] = b->k + mg_min(key + r, last) * b->k_row;
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm512_setzero_ps();
    }
    for (size_t i = 0; i < b->d; i++) {
        __m512 q[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            q[v] = _mm512_loadu_ps(s->q + (i * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < TILE; r++) {
            __m512 x = _mm512_set1_ps(row[r][i]);
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm512_fmadd_ps(x, q[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            if (hidden) {
                __mmask16 see = _mm512_cmpgt_epi32_mask(s->seen[v], _mm512_set1_epi32((int)(key + r)));
                c[r][v] = _mm512_mask_blend_ps(see, _mm512_set1_ps(MG_LOWEST), c[r][v]);
            }
            _mm512_storeu_ps(p + (r * vectors + v) * LANES, c[r][v]);
        }
    }
}

/* Online softmax: scores become 2^(score - top) with the new maximum; sums, and the scale of older results, follow. */
MG_INLINE TARGET void normalise(struct state *s, size_t n, const size_t vectors)
{
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++) {
        float *p = s->p + v * LANES;
        __m512 top = s->top[v], sum = _mm512_setzero_ps();
        for (size_t j = 0; j < n; j++)
            top = _mm512_max_ps(top, _mm512_loadu_ps(p + j * vectors * LANES));
        for (size_t j = 0; j < n; j++) {
            __m512 x = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(p + j * vectors * LANES), top));
            _mm512_storeu_ps(p + j * vectors * LANES, x);
            sum = _mm512_add_ps(sum, x);
        }
        s->scale[v] = exp2_of(_mm512_sub_ps(s->top[v], top));
        s->sum[v] = _mm512_fmadd_ps(s->sum[v], s->scale[v], sum);
        s->top[v] = top;
    }
}

/* o[i .. i + tile - 1] = o * scale + sum_j value[j] * p[j] */
MG_INLINE TARGET void value_tile(const struct state *s, const float *value, size_t v_row, size_t i, size_t n,
                                 const size_t tile, const size_t vectors)
{
    __m512 c[TILE][VECTORS];
    float *o = s->o + i * vectors * LANES;
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = _mm512_mul_ps(_mm512_loadu_ps(o + (r * vectors + v) * LANES), s->scale[v]);
    }
    for (size_t j = 0; j < n; j++) {
        const float *x = value + j * v_row + i;
        __m512 p[VECTORS];
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            p[v] = _mm512_loadu_ps(s->p + (j * vectors + v) * LANES);
        MG_UNROLL
        for (size_t r = 0; r < tile; r++) {
            MG_UNROLL
            for (size_t v = 0; v < vectors; v++)
                c[r][v] = _mm512_fmadd_ps(_mm512_set1_ps(x[r]), p[v], c[r][v]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            _mm512_storeu_ps(o + (r * vectors + v) * LANES, c[r][v]);
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
        s->seen[v] = _mm512_loadu_si512(seen + v * LANES);
        s->top[v] = _mm512_set1_ps(MG_LOWEST);
        s->sum[v] = _mm512_setzero_ps();
    }
    return n_keys;
}

TARGET static void store_queries(const struct state *s, const struct mg_attention_block *b, size_t vectors)
{
    float sum[VECTORS * LANES], top[VECTORS * LANES];
    for (size_t v = 0; v < vectors; v++) {
        _mm512_storeu_ps(sum + v * LANES, s->sum[v]);
        _mm512_storeu_ps(top + v * LANES, s->top[v]);
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

TARGET void mg_avx512_attend(const struct mg_attention_block *b, float *scratch)
{
    if (b->n_query <= LANES)
        attend_vectors(b, scratch, 1);
    else if (b->n_query <= 2 * LANES)
        attend_vectors(b, scratch, 2);
    else
        attend_vectors(b, scratch, 3);
}

/* ---- few queries ---- */

MG_INLINE TARGET __mmask16 mask_of(size_t left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

/* The sums of 16 vectors, in a vector. */
MG_INLINE TARGET __m512 sums_of(const __m512 *c)
{
    __m512 pair[8], four[4], two[2];
    MG_UNROLL
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(c[2 * i], c[2 * i + 1]), _mm512_unpackhi_ps(c[2 * i], c[2 * i + 1]));
    MG_UNROLL
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(pair[2 * i]), b = _mm512_castps_pd(pair[2 * i + 1]);
        four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    MG_UNROLL
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_ps(_mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0x88),
                               _mm512_shuffle_f32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_ps(_mm512_shuffle_f32x4(two[0], two[1], 0x88), _mm512_shuffle_f32x4(two[0], two[1], 0xdd));
}

MG_INLINE TARGET __m512 load(const void *x, size_t i, __mmask16 mask, const enum mg_held held)
{
    if (held == MG_HELD_FLOAT)
        return _mm512_maskz_loadu_ps(mask, (const float *)x + i);
    __m256i bits = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)x + i);
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

/* Fetches 64 elements that are read AHEAD keys later, or lie behind the last key, which does no harm: each head's part
   is too short for a processor to see it coming.  One row at a time, since many at once stall. */
MG_INLINE TARGET void fetch(const void *x, const enum mg_held held)
{
    for (size_t line = 0; line < mg_held_bytes(held); line++)      /* 64 elements are as many lines as one is bytes */
        _mm_prefetch((const char *)x + 64 * line, _MM_HINT_T1);
}

/* p[j] = q . key[j], times unit, for n <= SOME_KEYS keys; -> their maximum */
MG_INLINE TARGET float score_some(float *p, const float *q, const void *key, size_t k_row, size_t n, size_t d, float unit,
                                  const enum mg_held held)
{
    __m512 top = _mm512_set1_ps(MG_LOWEST);
    for (size_t j = 0; j < n; j += LANES) {
        __m512 c[LANES];
        MG_UNROLL
        for (size_t r = 0; r < LANES; r++)
            c[r] = _mm512_setzero_ps();
        for (size_t i = 0; i < d; i += 4 * LANES) {
            const void *at = mg_held_at(key, j * k_row + i, held);
            __m512 x[4];
            __mmask16 mask[4];
            MG_UNROLL
            for (size_t v = 0; v < 4; v++) {
                mask[v] = mask_of(i + v * LANES < d ? d - i - v * LANES : 0);
                x[v] = _mm512_maskz_loadu_ps(mask[v], q + i + v * LANES);
            }
            MG_UNROLL
            for (size_t r = 0; r < LANES; r++) {
                MG_UNROLL
                for (size_t v = 0; v < 4; v++)
                    c[r] = _mm512_fmadd_ps(x[v], load(at, v * LANES, mask[v], held), c[r]);
                fetch(mg_held_at(at, AHEAD * k_row, held), held);
                at = mg_held_at(at, j + r + 1 < n ? k_row : 0, held);      /* beyond the last key stand copies of it */
            }
        }
        __m512 score = _mm512_mul_ps(sums_of(c), _mm512_set1_ps(unit));
        top = _mm512_max_ps(top, score);
        _mm512_storeu_ps(p + j, score);
    }
    return _mm512_reduce_max_ps(top);
}

/* p[j] = 2^(p[j] - top) -> their sum */
MG_INLINE TARGET float weigh_some(float *p, float top, size_t n)
{
    __m512 sum = _mm512_setzero_ps();
    for (size_t j = 0; j < n; j += LANES) {
        __m512 x = exp2_of(_mm512_sub_ps(_mm512_loadu_ps(p + j), _mm512_set1_ps(top)));
        sum = _mm512_mask_add_ps(sum, mask_of(n - j), sum, x);
        _mm512_storeu_ps(p + j, x);
    }
    return _mm512_reduce_add_ps(sum);
}

/* o = o * scale + sum_j p[j] * value[j] */
MG_INLINE TARGET void add_some(float *o, float scale, const float *p, const void *value, size_t v_row, size_t n,
                               size_t d, const enum mg_held held)
{
    for (size_t i = 0; i < d; i += 4 * LANES) {
        const void *at = mg_held_at(value, i, held);
        __m512 c[4];
        __mmask16 mask[4];
        MG_UNROLL
        for (size_t v = 0; v < 4; v++) {
            mask[v] = mask_of(i + v * LANES < d ? d - i - v * LANES : 0);
            c[v] = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask[v], o + i + v * LANES), _mm512_set1_ps(scale));
        }
        for (size_t j = 0; j < n; j++, at = mg_held_at(at, v_row, held)) {
            fetch(mg_held_at(at, AHEAD * v_row, held), held);
            MG_UNROLL
            for (size_t v = 0; v < 4; v++)
                c[v] = _mm512_fmadd_ps(_mm512_set1_ps(p[j]), load(at, v * LANES, mask[v], held), c[v]);
        }
        MG_UNROLL
        for (size_t v = 0; v < 4; v++)
            _mm512_mask_storeu_ps(o + i + v * LANES, mask[v], c[v]);
    }
}

#include "rangeloop.h"

TARGET void mg_avx512_attend_range(const struct mg_attention_range *r)
{
    if (r->held == MG_HELD_FLOAT)
        attend_range(r, MG_HELD_FLOAT);
    else
        attend_range(r, MG_HELD_HALF);
}
#endif
