/* The elementwise kernels of training, and the choice of tokens, as plain loops, which compilers vectorize: each file of
   an instruction set makes its own functions of them, MG_ROWS_TABLE.  A kernel works on rows or elements first .. end-1
   of its job; room is scratch memory of its own. */
#ifndef MG_ROWS_H
#define MG_ROWS_H

#include "choicerows.h"
#include "heardrows.h"
#include "lossrows.h"

/* ---- layer norm ---- */

struct mg_layer_norm_gradient {
    float *dx;
    const float *dy, *x, *weight;
    float eps;
    size_t n;
};

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
    MG_ROWS_KERNEL(target, choose) \
    MG_ROWS_KERNEL(target, weigh_heard) \
    const struct mg_rows name = {layer_norm_backward, gelu_backward, column_sums, logit_losses, magnitude, power_sum, \
                                 power_backward, adamw, squares, choose, weigh_heard}

#endif
