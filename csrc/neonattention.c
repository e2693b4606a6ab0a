/* NEON: attention in float32, as in avx512attention.c.

   attend: queries lie across the lanes, up to 16 of them in 4 vectors; scores (keys, queries) and results (d, queries)
   are products with elements of the keys and values, which are read where they are, 4 at a time, and multiplied lane by
   lane.  4 keys, or 4 elements of d, times 4 vectors fill 16 of 32 registers.
   attend_range: elements of d lie across the lanes; for a few queries, one in decoding. */
#if defined(__aarch64__)
#include "neon.h"

#include <math.h>
#include <string.h>

enum { LANES = 4, VECTORS = 4, TILE = 4, ROWS = 8, SOME_KEYS = 32 };

/* ---- many queries ---- */

/* What a block of queries keeps between blocks of keys; width = lanes in use, 4 to 16. */
struct state {
    float *q, *p, *o;           /* (d, width), (MG_KEYS, width), (d, width) */
    float32x4_t top[VECTORS], sum[VECTORS], scale[VECTORS];
    int32x4_t seen[VECTORS];
};

size_t mg_neon_attend_floats(size_t d) { return (2 * d + MG_KEYS) * LANES * VECTORS; }

/* c + lanes * element l of x */
MG_INLINE float32x4_t add_product(float32x4_t c, float32x4_t lanes, float32x4_t x, const size_t l)
{
    switch (l) {
    case 0: return vfmaq_laneq_f32(c, lanes, x, 0);
    case 1: return vfmaq_laneq_f32(c, lanes, x, 1);
    case 2: return vfmaq_laneq_f32(c, lanes, x, 2);
    default: return vfmaq_laneq_f32(c, lanes, x, 3);
    }
}

/* c[r] += elements of row[r] * lanes, some elements from i on, 4 or 1. */
MG_INLINE void score_step(float32x4_t c[TILE][VECTORS], const float *const *row, const float *lanes, size_t i,
                          const size_t elements, const size_t vectors)
{
    float32x4_t x[TILE];
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++)
        x[r] = elements == 4 ? vld1q_f32(row[r] + i) : vdupq_n_f32(row[r][i]);
    MG_UNROLL
    for (size_t l = 0; l < elements; l++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            float32x4_t q = vld1q_f32(lanes + ((i + l) * vectors + v) * LANES);
            MG_UNROLL
            for (size_t r = 0; r < TILE; r++)
                c[r][v] = add_product(c[r][v], q, x[r], l);
        }
    }
}

/* Scores of TILE keys, those beyond the last being copies of it; MG_LOWEST where a query does not see a key. */
MG_INLINE void score_tile(const struct state *s, const struct mg_attention_block *b, size_t key, size_t last, float *p,
                          int hidden, const size_t vectors)
{
    const float *row[TILE];
    float32x4_t c[TILE][VECTORS];
    size_t i = 0;
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        row[r] = b->k + mg_min(key + r, last) * b->k_row;
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = vdupq_n_f32(0.0f);
    }
    for (; i + 4 <= b->d; i += 4)
        score_step(c, row, s->q, i, 4, vectors);
    for (; i < b->d; i++)
        score_step(c, row, s->q, i, 1, vectors);
    MG_UNROLL
    for (size_t r = 0; r < TILE; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            if (hidden) {
                uint32x4_t see = vcgtq_s32(s->seen[v], vdupq_n_s32((int32_t)(key + r)));
                c[r][v] = vbslq_f32(see, c[r][v], vdupq_n_f32(MG_LOWEST));
            }
            vst1q_f32(p + (r * vectors + v) * LANES, c[r][v]);
        }
    }
}

/* Online softmax: scores become 2^(score - top) with the new maximum; sums, and the scale of older results, follow. */
MG_INLINE void normalise(struct state *s, size_t n, const size_t vectors)
{
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++) {
        float *p = s->p + v * LANES;
        float32x4_t top = s->top[v], sum = vdupq_n_f32(0.0f);
        for (size_t j = 0; j < n; j++)
            top = vmaxq_f32(top, vld1q_f32(p + j * vectors * LANES));
        for (size_t j = 0; j < n; j++) {
            float32x4_t x = exp2_of(vsubq_f32(vld1q_f32(p + j * vectors * LANES), top));
            vst1q_f32(p + j * vectors * LANES, x);
            sum = vaddq_f32(sum, x);
        }
        s->scale[v] = exp2_of(vsubq_f32(s->top[v], top));
        s->sum[v] = vfmaq_f32(sum, s->sum[v], s->scale[v]);
        s->top[v] = top;
    }
}

/* o[i .. i + tile - 1] = o * scale + sum_j value[j] * p[j], tile 4 or 1 */
MG_INLINE void value_tile(const struct state *s, const float *value, size_t v_row, size_t i, size_t n,
                          const size_t tile, const size_t vectors)
{
    float32x4_t c[TILE][VECTORS];
    float *o = s->o + i * vectors * LANES;
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r][v] = vmulq_f32(vld1q_f32(o + (r * vectors + v) * LANES), s->scale[v]);
    }
    for (size_t j = 0; j < n; j++) {
        const float *at = value + j * v_row + i;
        float32x4_t x = tile == TILE ? vld1q_f32(at) : vdupq_n_f32(*at);
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            float32x4_t p = vld1q_f32(s->p + (j * vectors + v) * LANES);
            MG_UNROLL
            for (size_t r = 0; r < tile; r++)
                c[r][v] = add_product(c[r][v], p, x, r);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < tile; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            vst1q_f32(o + (r * vectors + v) * LANES, c[r][v]);
    }
}

static size_t load_queries(struct state *s, const struct mg_attention_block *b, size_t vectors)
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
        s->seen[v] = vld1q_s32(seen + v * LANES);
        s->top[v] = vdupq_n_f32(MG_LOWEST);
        s->sum[v] = vdupq_n_f32(0.0f);
    }
    return n_keys;
}

static void store_queries(const struct state *s, const struct mg_attention_block *b, size_t vectors)
{
    float sum[VECTORS * LANES], top[VECTORS * LANES];
    for (size_t v = 0; v < vectors; v++) {
        vst1q_f32(sum + v * LANES, s->sum[v]);
        vst1q_f32(top + v * LANES, s->top[v]);
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

MG_INLINE void attend_vectors(const struct mg_attention_block *b, float *scratch, const size_t vectors)
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

void mg_neon_attend(const struct mg_attention_block *b, float *scratch)
{
    if (b->n_query <= LANES)
        attend_vectors(b, scratch, 1);
    else if (b->n_query <= 2 * LANES)
        attend_vectors(b, scratch, 2);
    else
        attend_vectors(b, scratch, VECTORS);
}

/* ---- few queries ---- */

/* c[r] += q * key[r] for ROWS keys, those beyond n being copies of the last, over some vectors. */
MG_INLINE void key_step(float32x4_t *c, const float *q, const float *key, size_t k_row, size_t n,
                        const size_t vectors)
{
    float32x4_t x[4];
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++)
        x[v] = vld1q_f32(q + v * LANES);
    MG_UNROLL
    for (size_t r = 0; r < ROWS; r++) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[r] = vfmaq_f32(c[r], x[v], vld1q_f32(key + v * LANES));
        key += r + 1 < n ? k_row : 0;
    }
}

/* p[j] = q . key[j], times unit, for n <= SOME_KEYS keys; -> their maximum.  Elements that do not fill a vector are
   added one by one. */
static float score_some(float *p, const float *q, const void *keys, size_t k_row, size_t n, size_t d, float unit,
                        enum mg_held held)
{
    const float *key = keys;
    float top = MG_LOWEST;
    (void)held;     /* floats, see reads_narrow */
    for (size_t j = 0; j < n; j += ROWS) {
        const float *at = key + j * k_row;
        float32x4_t c[ROWS];
        size_t i = 0;
        MG_UNROLL
        for (size_t r = 0; r < ROWS; r++)
            c[r] = vdupq_n_f32(0.0f);
        for (; i + 4 * LANES <= d; i += 4 * LANES)
            key_step(c, q + i, at + i, k_row, n - j, 4);
        for (; i + LANES <= d; i += LANES)
            key_step(c, q + i, at + i, k_row, n - j, 1);
        vst1q_f32(p + j, vpaddq_f32(vpaddq_f32(c[0], c[1]), vpaddq_f32(c[2], c[3])));
        vst1q_f32(p + j + 4, vpaddq_f32(vpaddq_f32(c[4], c[5]), vpaddq_f32(c[6], c[7])));
        for (size_t r = 0; r < mg_min(ROWS, n - j); r++)
            for (size_t rest = i; rest < d; rest++)
                p[j + r] += q[rest] * at[r * k_row + rest];
    }
    for (size_t j = 0; j < n; j++) {
        p[j] *= unit;
        top = p[j] > top ? p[j] : top;
    }
    return top;
}

/* p[j] = 2^(p[j] - top) -> their sum */
static float weigh_some(float *p, float top, size_t n)
{
    float sum = 0.0f;
    for (size_t j = 0; j < n; j += LANES)
        vst1q_f32(p + j, exp2_of(vsubq_f32(vld1q_f32(p + j), vdupq_n_f32(top))));
    for (size_t j = 0; j < n; j++)
        sum += p[j];
    return sum;
}

/* o = o * scale + sum_j p[j] * value[j], over some vectors. */
MG_INLINE void add_step(float *o, float scale, const float *p, const float *value, size_t v_row, size_t n,
                        const size_t vectors)
{
    float32x4_t c[16];
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++)
        c[v] = vmulq_n_f32(vld1q_f32(o + v * LANES), scale);
    for (size_t j = 0; j < n; j++, value += v_row) {
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++)
            c[v] = vfmaq_n_f32(c[v], vld1q_f32(value + v * LANES), p[j]);
    }
    MG_UNROLL
    for (size_t v = 0; v < vectors; v++)
        vst1q_f32(o + v * LANES, c[v]);
}

static void add_some(float *o, float scale, const float *p, const void *values, size_t v_row, size_t n, size_t d,
                     enum mg_held held)
{
    const float *value = values;
    size_t i = 0;
    (void)held;
    for (; i + 16 * LANES <= d; i += 16 * LANES)
        add_step(o + i, scale, p, value + i, v_row, n, 16);
    for (; i + 4 * LANES <= d; i += 4 * LANES)
        add_step(o + i, scale, p, value + i, v_row, n, 4);
    for (; i + LANES <= d; i += LANES)
        add_step(o + i, scale, p, value + i, v_row, n, 1);
    for (; i < d; i++) {
        o[i] *= scale;
        for (size_t j = 0; j < n; j++)
            o[i] += p[j] * value[j * v_row + i];
    }
}

#define TARGET
#include "rangeloop.h"

void mg_neon_attend_range(const struct mg_attention_range *r) { attend_range(r, MG_HELD_FLOAT); }
#endif
