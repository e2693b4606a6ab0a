/* Numbers of 16 bits for heardattention.c: queries, and as a kernel for rows.h the softmax. */
#ifndef MG_HEARDROWS_H
#define MG_HEARDROWS_H

#include "lanes.h"

#define MG_LOW_STEPS 128        /* of a number's low byte */
#define MG_QUERY_STEPS 16256    /* 127 * 128: the largest element of a query, whose low bytes are signed */
#define MG_WEIGHT_STEPS 32767   /* the largest weight of a value */
#define MG_ROUND 12582912.0f    /* 1.5 * 2^23: adding it leaves the nearest integer in the low bits */

/* Where numbers go: into `wide` or, if that is NULL, as 128 high + low. */
struct mg_wide {
    int16_t *wide;
    uint8_t *high, *low;
};

/* A query and the n keys of a head.  Scores become base-2 logarithms by k_scale and unit. */
struct mg_heard_row {
    struct mg_wide to;          /* (n rounded up to 4): the weights */
    float *weights;             /* (n rounded up to MG_PANEL): room */
    const float *scores;        /* MG_PANEL at a time, stride apart */
    size_t stride;
    const float *k_scale, *v_scale;     /* (n rounded up to MG_PANEL) */
    float unit;
    size_t n;
};

MG_INLINE int32_t mg_nearest(float x)
{
    float shifted = x + MG_ROUND;
    int32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    return bits - 0x4b400000;
}

/* to (n) = x * inverse; low bytes from 0 on or, if is_signed, from -64 to 63 */
MG_INLINE void mg_widen(const struct mg_wide *to, const float *restrict x, float inverse, size_t n, const int is_signed)
{
    int16_t *restrict wide = to->wide;
    uint8_t *restrict high = to->high, *restrict low = to->low;
    const int32_t half = is_signed ? MG_LOW_STEPS / 2 : 0;
    if (wide != NULL) {
        for (size_t i = 0; i < n; i++)
            wide[i] = (int16_t)mg_nearest(x[i] * inverse);
        return;
    }
    for (size_t i = 0; i < n; i++) {
        int32_t steps = mg_nearest(x[i] * inverse) + half;
        high[i] = (uint8_t)(steps >> 7);
        low[i] = (uint8_t)((steps & (MG_LOW_STEPS - 1)) - half);
    }
}

/* q (d) = scale * to, rounded; -> scale.  What is wide ends in zeros, as its length is a multiple of 4. */
MG_INLINE float mg_wide_query(const struct mg_wide *to, const float *q, size_t d)
{
    float top = 0.0f;
    for (size_t i = 0; i < d; i++)
        top = fabsf(q[i]) > top ? fabsf(q[i]) : top;
    for (size_t i = d; to->wide != NULL && i < mg_round_up(d, 4); i++)
        to->wide[i] = 0;
    mg_widen(to, q, top < 1e-30f ? 0.0f : MG_QUERY_STEPS / top, d, 1);
    return top / MG_QUERY_STEPS;
}

/* Weights are v_scale * 2^(score - the largest score), in steps of their largest / MG_WEIGHT_STEPS; -> what makes of
   steps v_scale * softmax. */
MG_INLINE float mg_weigh_heard(const struct mg_heard_row *r)
{
    const size_t n = r->n, size = mg_round_up(n, MG_PANEL);
    const float *restrict k_scale = r->k_scale, *restrict v_scale = r->v_scale, unit = r->unit;
    float *restrict w = r->weights, lanes[MG_LANES] = {0};
    for (size_t j = 0; j < size; j += MG_PANEL) {
        const float *restrict scores = r->scores + j / MG_PANEL * r->stride;
        for (size_t i = 0; i < MG_PANEL; i++)
            w[j + i] = scores[i] * (k_scale[j + i] * unit);
    }
    float top = mg_largest(w, n);
    for (size_t j = n; j < size; j++)
        w[j] = -INFINITY;
    for (size_t j = 0; j < size; j++)
        w[j] = mg_exp2(w[j] - top);
    for (size_t j = 0; j < size; j += MG_LANES)
        for (size_t l = 0; l < MG_LANES; l++)
            lanes[l] += w[j + l];
    for (size_t j = 0; j < size; j++)
        w[j] *= v_scale[j];
    float sum = mg_total(lanes), most = mg_largest(w, n);
    mg_widen(&r->to, w, most < 1e-30f ? 0.0f : MG_WEIGHT_STEPS / most, mg_round_up(n, 4), 0);
    return most / (MG_WEIGHT_STEPS * sum);
}

MG_INLINE void mg_weigh_heard_rows(const void *context, size_t first, size_t end, void *room)
{
    if (first < end)
        *(float *)room = mg_weigh_heard(context);
}

#endif
