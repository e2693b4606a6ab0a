/* The elementwise kernels of training as plain loops, which compilers vectorize: each file of an instruction set makes
   its own functions of them, MG_ROWS_TABLE.  Sums run over MG_LANES partial sums, so that their order is the same
   everywhere.  A kernel works on rows or elements first .. end-1 of its job; room is scratch memory of its own. */
#ifndef MG_ROWS_H
#define MG_ROWS_H

#include "kernels.h"

#include <string.h>

#define MG_LANES 16
#define MG_SUM_BLOCK 1024       /* elements summed in float32 before they join a sum in float64 */

MG_INLINE float mg_total(const float *lanes)
{
    float sum = 0.0f;
    for (int l = 0; l < MG_LANES; l++)
        sum += lanes[l];
    return sum;
}

/* 2^x for x <= 0; 0 below -126 */
MG_INLINE float mg_exp2(float x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    const float shift = 12582912.0f;    /* 1.5 * 2^23: adding it rounds to an integer, half to even */
    float at = x > -126.0f ? x : -126.0f, shifted = at + shift, f = at - (shifted - shift);
    float p = ((((c[5] * f + c[4]) * f + c[3]) * f + c[2]) * f + c[1]) * f + c[0];
    int32_t n, bits;
    memcpy(&n, &shifted, sizeof n);
    memcpy(&bits, &p, sizeof bits);
    bits += (int32_t)((uint32_t)n << 23);   /* the low bits of the shifted number are the rounded one */
    memcpy(&p, &bits, sizeof p);
    return x > -126.0f ? p : 0.0f;
}

/* ---- layer norm ---- */

struct mg_layer_norm_gradient {
    float *dx;
    const float *dy, *x, *weight;
    float eps;
    size_t n;
};

MG_INLINE float mg_mean(const float *x, size_t n)
{
    float lanes[MG_LANES] = {0};
    size_t i = 0;
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] += x[i + l];
    for (; i < n; i++)
        lanes[0] += x[i];
    return mg_total(lanes) / (float)n;
}

/* mean of (x - mean)^2 */
MG_INLINE float mg_variance(const float *x, float mean, size_t n)
{
    float lanes[MG_LANES] = {0};
    size_t i = 0;
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] += (x[i + l] - mean) * (x[i + l] - mean);
    for (; i < n; i++)
        lanes[0] += (x[i] - mean) * (x[i] - mean);
    return mg_total(lanes) / (float)n;
}

/* The means of g = dy * weight and of g * (x - mean) * inverse. */
MG_INLINE void mg_gradient_means(float means[2], const float *dy, const float *weight, const float *x, float mean,
                                 float inverse, size_t n)
{
    float a[MG_LANES] = {0}, b[MG_LANES] = {0};
    size_t i = 0;
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++) {
            float g = dy[i + l] * weight[i + l];
            a[l] += g;
            b[l] += g * ((x[i + l] - mean) * inverse);
        }
    for (; i < n; i++) {
        a[0] += dy[i] * weight[i];
        b[0] += dy[i] * weight[i] * ((x[i] - mean) * inverse);
    }
    means[0] = mg_total(a) / (float)n;
    means[1] = mg_total(b) / (float)n;
}

/* room: sums over the rows, dweight (n), dbias (n). */
MG_INLINE void mg_layer_norm_backward_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_layer_norm_gradient *j = context;
    size_t n = j->n;
    float *restrict dweight = room, *restrict dbias = dweight + n;
    for (size_t row = first; row < end; row++) {
        const float *restrict x = j->x + row * n, *restrict dy = j->dy + row * n, *restrict weight = j->weight;
        float *restrict dx = j->dx + row * n, means[2], mean = mg_mean(x, n);
        float inverse = 1.0f / sqrtf(mg_variance(x, mean, n) + j->eps);
        mg_gradient_means(means, dy, weight, x, mean, inverse, n);
        for (size_t i = 0; i < n; i++) {
            float normal = (x[i] - mean) * inverse, d = dy[i];
            dx[i] = (d * weight[i] - means[0] - normal * means[1]) * inverse;
            dweight[i] += d * normal;
            dbias[i] += d;
        }
    }
}

/* ---- GELU, bias ---- */

struct mg_gelu_gradient {
    float *dx;
    const float *dy, *x;
};

struct mg_columns {
    const float *x;
    size_t n;
};

/* Phi(x) + x phi(x), Phi(x) from gelu's r^16 */
MG_INLINE float mg_gelu_slope(float x)
{
    static const float c[] = {MG_GELU_COEFFICIENTS};
    const float density = 0.3989422804014327f;      /* 1 / sqrt(2 pi) */
    float a = fabsf(x), r = c[7];
    r = (((r * a + c[6]) * a + c[5]) * a + c[4]) * a + c[3];
    r = 1.0f / (((r * a + c[2]) * a + c[1]) * a + c[0]);
    r *= r;
    r *= r;
    r *= r;
    r *= r;
    float tail = 0.5f * r, phi = density * mg_exp2(x * x * (float)(-0.5 * MG_LOG2_E));
    return (x > 0.0f ? 1.0f - tail : tail) + x * phi;
}

MG_INLINE void mg_gelu_backward_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_gelu_gradient *j = context;
    const float *restrict dy = j->dy, *restrict x = j->x;
    float *restrict dx = j->dx;
    (void)room;
    for (size_t i = first; i < end; i++)
        dx[i] = dy[i] * mg_gelu_slope(x[i]);
}

/* room: sums over the rows, (n). */
MG_INLINE void mg_column_sums_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_columns *j = context;
    float *restrict sums = room;
    for (size_t row = first; row < end; row++) {
        const float *restrict x = j->x + row * j->n;
        for (size_t i = 0; i < j->n; i++)
            sums[i] += x[i];
    }
}

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

MG_INLINE float mg_largest(const float *x, size_t n)
{
    float lanes[MG_LANES], top;
    size_t i = 0;
    for (int l = 0; l < MG_LANES; l++)
        lanes[l] = x[0];
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    top = lanes[0];
    for (int l = 1; l < MG_LANES; l++)
        top = lanes[l] > top ? lanes[l] : top;
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

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

/* ---- optimizer ---- */

struct mg_adamw {
    float *p, *m, *v, *average;
    const float *g;
    float beta1, beta2, g_mean, g_root, step, eps, shrink, average_rate;
};

MG_INLINE void mg_adamw_rows(const void *context, size_t first, size_t end, void *room)
{
    const struct mg_adamw j = *(const struct mg_adamw *)context;
    float *restrict p = j.p, *restrict m = j.m, *restrict v = j.v, *restrict average = j.average;
    const float *restrict g = j.g;
    (void)room;
    for (size_t i = first; i < end; i++) {
        float root = g[i] * j.g_root, mean = m[i] * j.beta1 + g[i] * j.g_mean, square = v[i] * j.beta2 + root * root;
        m[i] = mean;
        v[i] = square;
        p[i] = p[i] * j.shrink - mean / (sqrtf(square) + j.eps) * j.step;
    }
    for (size_t i = first; average != NULL && i < end; i++)
        average[i] += (p[i] - average[i]) * j.average_rate;
}

/* room: sum of g^2, a double. */
MG_INLINE void mg_squares_rows(const void *context, size_t first, size_t end, void *room)
{
    const float *g = ((const struct mg_adamw *)context)->g;
    double lanes[MG_LANES] = {0}, sum = 0.0;
    size_t i = first;
    for (; i + MG_LANES <= end; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] += (double)g[i + l] * (double)g[i + l];
    for (; i < end; i++)
        lanes[0] += (double)g[i] * (double)g[i];
    for (int l = 0; l < MG_LANES; l++)
        sum += lanes[l];
    *(double *)room = sum;
}

/* The table `name` of these kernels, compiled for a target. */
#define MG_ROWS_KERNEL(target, kernel) \
    target static void kernel(const void *context, size_t first, size_t end, void *room) \
    { \
        mg_##kernel##_rows(context, first, end, room); \
    }
#define MG_ROWS_TABLE(name, target) \
    MG_ROWS_KERNEL(target, layer_norm_backward) \
    MG_ROWS_KERNEL(target, gelu_backward) \
    MG_ROWS_KERNEL(target, column_sums) \
    MG_ROWS_KERNEL(target, logit_losses) \
    MG_ROWS_KERNEL(target, magnitude) \
    MG_ROWS_KERNEL(target, power_sum) \
    MG_ROWS_KERNEL(target, power_backward) \
    MG_ROWS_KERNEL(target, adamw) \
    MG_ROWS_KERNEL(target, squares) \
    const struct mg_rows name = {layer_norm_backward, gelu_backward, column_sums, logit_losses, magnitude, power_sum, \
                                 power_backward, adamw, squares}

#endif
