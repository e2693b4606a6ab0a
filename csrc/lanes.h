/* Sums and exponentials in plain C that compilers vectorize.  Sums run over MG_LANES partial sums, so that their order
   is the same everywhere. */
#ifndef MG_LANES_H
#define MG_LANES_H

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

/* sum (a - shift) (b - shift) */
MG_INLINE float mg_dot(const float *a, const float *b, float shift, size_t n)
{
    float lanes[MG_LANES] = {0};
    size_t i = 0;
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] += (a[i + l] - shift) * (b[i + l] - shift);
    for (; i < n; i++)
        lanes[0] += (a[i] - shift) * (b[i] - shift);
    return mg_total(lanes);
}

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
MG_INLINE float mg_variance(const float *x, float mean, size_t n) { return mg_dot(x, x, mean, n) / (float)n; }

/* n >= 1 */
MG_INLINE float mg_largest(const float *x, size_t n)
{
    float top = x[0], lanes[MG_LANES];
    size_t i = 0;
    for (int l = 0; l < MG_LANES; l++)
        lanes[l] = top;
    for (; i + MG_LANES <= n; i += MG_LANES)
        for (int l = 0; l < MG_LANES; l++)
            lanes[l] = x[i + l] > lanes[l] ? x[i + l] : lanes[l];
    for (int l = 0; l < MG_LANES; l++)
        top = lanes[l] > top ? lanes[l] : top;
    for (; i < n; i++)
        top = x[i] > top ? x[i] : top;
    return top;
}

#endif
