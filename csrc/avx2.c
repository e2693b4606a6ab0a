/* AVX2 with FMA: the integer product, the epilogue and the row kernels; attention is in avx2attention.c. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
enum { ROWS = 6, LANES = 8 };

/* a is widened here and w on the way, for maddubs would saturate: 2 * 128 * 127 * 2 does not fit 16 bits. */
static void pack_rows(void *packed, const int8_t *a, size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++) {
        int16_t *out = (int16_t *)packed + r * k4;
        const int8_t *row = a + r * k;
        for (size_t i = 0; i < k; i++)
            out[i] = row[i];
        for (size_t i = k; i < k4; i++)
            out[i] = 0;
    }
}

/* A vector w holds 4 columns of 4; its sums are two for each column, added at the end.  rows * vectors <= 12 of 16
   registers hold sums. */
MG_INLINE TARGET void dot_rows(int32_t *acc, const int16_t *a, const int8_t *panel, size_t k4, const size_t rows,
                               const size_t vectors)
{
    for (size_t column = 0; column < MG_PANEL; column += 4 * vectors) {
        __m256i c[12];
        MG_UNROLL
        for (size_t t = 0; t < rows * vectors; t++)
            c[t] = _mm256_setzero_si256();
        for (size_t i = 0; i < k4; i += 4) {
            const int8_t *at = panel + i * MG_PANEL + 4 * column;
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++) {
                __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(at + 16 * j)));
                MG_UNROLL
                for (size_t r = 0; r < rows; r++) {
                    int64_t four;
                    memcpy(&four, a + r * k4 + i, sizeof four);
                    __m256i sum = _mm256_madd_epi16(_mm256_set1_epi64x(four), w);
                    c[r * vectors + j] = _mm256_add_epi32(c[r * vectors + j], sum);
                }
            }
        }
        MG_UNROLL
        for (size_t t = 0; t < rows * vectors; t += 2) {
            __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[t], c[t + 1]), 0xd8);
            int32_t *out = acc + t / vectors * MG_PANEL + column + t % vectors * 4;
            _mm256_storeu_si256((__m256i *)out, sum);
        }
    }
}

TARGET static void dot_panel(int32_t *acc, const void *a, const int8_t *panel, const int32_t *sums, size_t rows,
                             size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    (void)sums;     /* nothing is offset */
    switch (rows) {
    case 1: dot_rows(acc, a, panel, k4, 1, 8); break;
    case 2: dot_rows(acc, a, panel, k4, 2, 4); break;
    case 3: dot_rows(acc, a, panel, k4, 3, 4); break;
    case 4: dot_rows(acc, a, panel, k4, 4, 2); break;
    case 5: dot_rows(acc, a, panel, k4, 5, 2); break;
    default: dot_rows(acc, a, panel, k4, ROWS, 2); break;
    }
}

MG_INLINE TARGET __m256i mask_of(size_t left)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < LANES ? (int)left : LANES), lane);
}

MG_INLINE TARGET __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

MG_INLINE TARGET __m128 halves(__m256 x, int maximum)
{
    __m128 low = _mm256_castps256_ps128(x), high = _mm256_extractf128_ps(x, 1);
    return maximum ? _mm_max_ps(low, high) : _mm_add_ps(low, high);
}

MG_INLINE TARGET float largest(__m256 x)
{
    __m128 y = halves(x, 1);
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
}

MG_INLINE TARGET float total(__m256 x)
{
    __m128 y = halves(x, 0);
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
}

MG_INLINE TARGET __m256 gelu_of(__m256 x)
{
    static const float c[] = {MG_GELU_COEFFICIENTS};
    __m256 a = absolute(x), r = _mm256_set1_ps(c[7]);
    MG_UNROLL
    for (int i = 6; i >= 0; i--)
        r = _mm256_fmadd_ps(r, a, _mm256_set1_ps(c[i]));
    r = _mm256_div_ps(_mm256_set1_ps(1.0f), r);
    r = _mm256_mul_ps(r, r);
    r = _mm256_mul_ps(r, r);
    r = _mm256_mul_ps(r, r);
    r = _mm256_mul_ps(r, r);
    a = _mm256_mul_ps(a, _mm256_set1_ps(0.5f));
    return _mm256_fnmadd_ps(a, r, _mm256_max_ps(x, _mm256_setzero_ps()));
}

MG_INLINE TARGET void finish_at(float *out, __m256 x, const float *bias, const float *residual, int gelu, size_t i,
                                __m256i mask)
{
    if (bias != NULL)
        x = _mm256_add_ps(x, _mm256_maskload_ps(bias + i, mask));
    if (gelu)
        x = gelu_of(x);
    if (residual != NULL)
        x = _mm256_add_ps(x, _mm256_maskload_ps(residual + i, mask));
    _mm256_maskstore_ps(out + i, mask, x);
}

TARGET static void finish(float *out, const float *x, const float *bias, const float *residual, int gelu, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        __m256i mask = mask_of(n - i);
        finish_at(out, _mm256_maskload_ps(x + i, mask), bias, residual, gelu, i, mask);
    }
}

TARGET static void finish_int(float *out, const int32_t *acc, float a_scale, const float *w_scale, const float *bias,
                              const float *residual, int gelu, size_t n)
{
    for (size_t i = 0; i < n; i += LANES) {
        __m256i mask = mask_of(n - i);
        __m256 scale = _mm256_mul_ps(_mm256_set1_ps(a_scale), _mm256_maskload_ps(w_scale + i, mask));
        __m256 x = _mm256_cvtepi32_ps(_mm256_loadu_si256((const __m256i *)(acc + i)));
        finish_at(out, _mm256_mul_ps(x, scale), bias, residual, gelu, i, mask);
    }
}

TARGET static float quantize_row(int8_t *q, const float *x, size_t n)
{
    __m256 tops = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += LANES)
        tops = _mm256_max_ps(tops, absolute(_mm256_maskload_ps(x + i, mask_of(n - i))));
    float top = largest(tops);
    if (top < 1e-30f) {
        memset(q, 0, n);
        return 1.0f;
    }
    __m256 inverse = _mm256_set1_ps(127.0f / top);
    for (size_t i = 0; i < n; i += LANES) {
        __m256i rounded = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_maskload_ps(x + i, mask_of(n - i)), inverse));
        __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
        int64_t eight = _mm_cvtsi128_si64(_mm_packs_epi16(half, half));
        memcpy(q + i, &eight, mg_min(LANES, n - i));
    }
    return top / 127.0f;
}

TARGET static void layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps,
                                  size_t n)
{
    __m256 sum = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += LANES)
        sum = _mm256_add_ps(sum, _mm256_maskload_ps(x + i, mask_of(n - i)));
    __m256 mean = _mm256_set1_ps(total(sum) / (float)n);
    for (size_t i = 0; i < n; i += LANES) {
        __m256i mask = mask_of(n - i);
        __m256 centred = _mm256_sub_ps(_mm256_maskload_ps(x + i, mask), mean);
        centred = _mm256_and_ps(centred, _mm256_castsi256_ps(mask));
        squares = _mm256_fmadd_ps(centred, centred, squares);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / sqrtf(total(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += LANES) {
        __m256i mask = mask_of(n - i);
        __m256 y = _mm256_mul_ps(_mm256_sub_ps(_mm256_maskload_ps(x + i, mask), mean), inverse);
        y = _mm256_fmadd_ps(y, _mm256_maskload_ps(weight + i, mask), _mm256_maskload_ps(bias + i, mask));
        _mm256_maskstore_ps(out + i, mask, y);
    }
}

const struct mg_kernels mg_avx2 = {
    .name = "avx2",
    .max_rows = ROWS,
    .a_bytes = 2,
    .pack_rows = pack_rows,
    .dot_panel = dot_panel,
    .finish_int = finish_int,
    .finish = finish,
    .quantize_row = quantize_row,
    .layer_norm_row = layer_norm_row,
    .max_queries = 24,
    .few_queries = 6,
    .attend_floats = mg_avx2_attend_floats,
    .attend = mg_avx2_attend,
    .attend_few = mg_avx2_attend_few,
};
#endif
