/* The losses of training as kernels for rows.h: on the logits, and the outlier penalty on activations. */
#ifndef MG_LOSSROWS_H
#define MG_LOSSROWS_H

#include "lanes.h"

/* ---- losses on the logits ---- */

struct mg_logit_losses {
    float *dlogits;
    double *values;             /* of each row: KL without T^2, CE */
    const float *logits, *teacher;
    const int64_t *targets;
    float unit, sharp;          /* log2(e) / T, log2(e) */
    float kl_scale, ce_scale;   /* of the gradients of KL and CE with respect to logits / T and logits */
    size_t n;
};

/* e[i] = 2^((x[i] - top) * unit) -> their sum; not a number if an x is none.  e may be x. */
MG_INLINE double mg_exponentials(float *e, const float *x, float top, float unit, size_t n)
{
    double sum = 0.0;
    for (size_t start = 0; start < n; start += MG_SUM_BLOCK) {
        size_t end = mg_min(start + MG_SUM_BLOCK, n), i = start;
        float lanes[MG_LANES] = {0};
        for (; i + MG_LANES <= end; i += MG_LANES) {
            float y[MG_LANES];
            for (int l = 0; l < MG_LANES; l++) {
                float at = (x[i + l] - top) * unit;
                y[l] = mg_exp2(at);
                lanes[l] += y[l] + 0.0f * at;
            }
            memcpy(e + i, y, sizeof y);
        }
        for (; i < end; i++) {
            float at = (x[i] - top) * unit;
            e[i] = mg_exp2(at);
            lanes[0] += e[i] + 0.0f * at;
        }
        sum += (double)mg_total(lanes);
    }
    return sum;
}

/* sum_i q[i] * ((t[i] - t_top) - (z[i] - z_top)) */
MG_INLINE double mg_expectation(const float *q, const float *t, const float *z, float t_top, float z_top, size_t n)
{
    double sum = 0.0;
    for (size_t start = 0; start < n; start += MG_SUM_BLOCK) {
        size_t end = mg_min(start + MG_SUM_BLOCK, n), i = start;
        float lanes[MG_LANES] = {0};
        for (; i + MG_LANES <= end; i += MG_LANES)
            for (int l = 0; l < MG_LANES; l++)
                lanes[l] += q[i + l] * ((t[i + l] - t_top) - (z[i + l] - z_top));
        for (; i < end; i++)
            lanes[0] += q[i] * ((t[i] - t_top) - (z[i] - z_top));
        sum += (double)mg_total(lanes);
    }
    return sum;
}

/* One row that has a target; p and q hold n elements each.  dlogits may be logits. */
MG_INLINE void mg_logit_row(const struct mg_logit_losses *j, size_t row, float *p, float *q)
{
    const float *z = j->logits + row * j->n, *t = j->teacher != NULL ? j->teacher + row * j->n : NULL;
    float *d = j->dlogits + row * j->n, z_top = mg_largest(z, j->n);
    size_t target = (size_t)j->targets[row];
    double z_target = ((double)z[target] - (double)z_top) * MG_LN_2 * (double)j->sharp;
    float p_scale = 0.0f, q_scale = 0.0f;
    if (t != NULL) {
        float t_top = mg_largest(t, j->n);
        double p_sum = mg_exponentials(p, z, z_top, j->unit, j->n), q_sum = mg_exponentials(q, t, t_top, j->unit, j->n);
        double mean = mg_expectation(q, t, z, t_top, z_top, j->n) / q_sum * MG_LN_2 * (double)j->unit;
        j->values[2 * row] = mean - log(q_sum) + log(p_sum);
        p_scale = (float)((double)j->kl_scale / p_sum);
        q_scale = (float)((double)j->kl_scale / q_sum);
    }
    double sum = mg_exponentials(d, z, z_top, j->sharp, j->n);
    float scale = (float)((double)j->ce_scale / sum);
    j->values[2 * row + 1] = log(sum) - z_target;
    for (size_t i = 0; t != NULL && i < j->n; i++)
        d[i] = scale * d[i] + (p_scale * p[i] - q_scale * q[i]);
    for (size_t i = 0; t == NULL && i < j->n; i++)
        d[i] *= scale;
    d[target] -= j->ce_scale;
}

/* room: 2 n elements. */
MG_INLINE void mg_logit_losses_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_logit_losses *j = context;
    for (size_t row = first; row < end; row++) {
        j->values[2 * row] = j->values[2 * row + 1] = 0.0;
        if (j->targets[row] < 0)
            memset(j->dlogits + row * j->n, 0, j->n * sizeof *j->dlogits);
        else
            mg_logit_row(j, row, room, (float *)room + j->n);
    }
}

/* ---- outlier penalty: r = |a| / largest, powers by products ---- */

struct mg_power {
    float *da;
    const float *a;
    float largest, factor;
    size_t power;
};

MG_INLINE float mg_power_of(float r, size_t power)
{
    float result = 1.0f;
    for (; power > 0; power >>= 1) {
        if (power & 1)
            result *= r;
        r *= r;
    }
    return result;
}

/* room: the largest |a|, a float; not a number if an a is none or infinite. */
MG_INLINE void mg_magnitude_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_power *j = context;
    float lanes[MG_LANES] = {0}, bad[MG_LANES] = {0}, top = 0.0f;
    size_t i = first;
    for (; i + MG_LANES <= end; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++) {
            float r = fabsf(j->a[i + l]);
            lanes[l] = r > lanes[l] ? r : lanes[l];
            bad[l] += 0.0f * r;
        }
    for (; i < end; i++) {
        lanes[0] = fabsf(j->a[i]) > lanes[0] ? fabsf(j->a[i]) : lanes[0];
        bad[0] += 0.0f * j->a[i];
    }
    for (int l = 0; l < MG_LANES; l++)
        top = lanes[l] > top ? lanes[l] : top;
    *(float *)room = top + mg_total(bad);
}

/* sum of r^power, whose value the compiler may know */
MG_INLINE double mg_powers(const struct mg_power *j, size_t first, size_t end, size_t power)
{
    double sum = 0.0;
    for (size_t start = first; start < end; start += MG_SUM_BLOCK) {
        size_t stop = mg_min(start + MG_SUM_BLOCK, end), i = start;
        float lanes[MG_LANES] = {0};
        for (; i + MG_LANES <= stop; i += MG_LANES)
            for (int l = 0; l < MG_LANES; l++)
                lanes[l] += mg_power_of(fabsf(j->a[i + l]) / j->largest, power);
        for (; i < stop; i++)
            lanes[0] += mg_power_of(fabsf(j->a[i]) / j->largest, power);
        sum += (double)mg_total(lanes);
    }
    return sum;
}

/* room: the sum, a double. */
MG_INLINE void mg_power_sum_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_power *j = context;
    *(double *)room = j->power == 4 ? mg_powers(j, first, end, 4) : mg_powers(j, first, end, j->power);
}

MG_INLINE void mg_power_gradient(const struct mg_power *j, size_t first, size_t end, size_t power)
{
    const float *restrict a = j->a, largest = j->largest, factor = j->factor;
    float *restrict da = j->da;
    for (size_t i = first; i < end; i++)
        da[i] = copysignf(mg_power_of(fabsf(a[i]) / largest, power), a[i]) * factor;
}

MG_INLINE void mg_power_backward_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_power *j = context;
    (void)room;
    if (j->power == 4)
        mg_power_gradient(j, first, end, 3);
    else
        mg_power_gradient(j, first, end, j->power - 1);
}

#endif
