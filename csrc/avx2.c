/* AVX2 with FMA: the epilogue and the row kernels; the integer product is in avx2product.c, attention in
   avx2attention.c. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
enum { LANES = 8 };

MG_INLINE TARGET __m256i mask_of(size_t left)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < LANES ? (int)left : LANES), lane);
}

MG_INLINE TARGET __m256 absolute(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

/* Up to 8 floats, zero beyond; masked accesses, slow on some processors, only where there are fewer. */
MG_INLINE TARGET __m256 load(const float *x, size_t left)
{
    return left >= LANES ? _mm256_loadu_ps(x) : _mm256_maskload_ps(x, mask_of(left));
}

MG_INLINE TARGET void store(float *out, __m256 x, size_t left)
{
    if (left >= LANES)
        _mm256_storeu_ps(out, x);
    else
        _mm256_maskstore_ps(out, mask_of(left), x);
}

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

/* 8 numbers at i of n, zeros or what stands there beyond n. */
MG_INLINE TARGET __m256 read_numbers(const struct mg_source *s, const float *factor, size_t i, size_t n)
{
    __m256i number;
    if (s->x != NULL)
        return load(s->x + i, n - i);
    if (s->q != NULL) {
        __m128i eight = _mm_setzero_si128();
        if (n - i >= LANES)
            eight = _mm_loadl_epi64((const __m128i *)(s->q + i));
        else
            memcpy(&eight, s->q + i, n - i);
        number = _mm256_cvtepi8_epi32(eight);
    } else if (n - i >= LANES) {
        number = _mm256_loadu_si256((const __m256i *)(s->acc + i));
    } else {
        number = _mm256_maskload_epi32(s->acc + i, mask_of(n - i));
    }
    __m256 scale = _mm256_set1_ps(s->scale);
    if (factor != NULL)
        scale = _mm256_mul_ps(scale, load(factor + i, n - i));
    return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(number, _mm256_set1_epi32(s->zero))), scale);
}

/* Integers that fit, as 8 bits, to q[i] and on. */
MG_INLINE TARGET void store_bytes(int8_t *q, __m256i x, size_t left)
{
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    __m128i eight = _mm_packs_epi16(half, half);
    if (left >= LANES)
        _mm_storel_epi64((__m128i *)q, eight);
    else
        memcpy(q, &eight, left);
}

MG_INLINE TARGET void write_numbers(const struct mg_target *t, __m256 x, size_t i, size_t n)
{
    if (t->q == NULL) {
        store(t->x + i, x, n - i);
        return;
    }
    x = _mm256_mul_ps(x, _mm256_set1_ps(t->inverse));
    x = _mm256_max_ps(x, _mm256_set1_ps((float)(-128 - t->zero)));      /* the second of them where x is NaN */
    x = _mm256_min_ps(x, _mm256_set1_ps((float)(127 - t->zero)));
    store_bytes(t->q + i, _mm256_add_epi32(_mm256_cvtps_epi32(x), _mm256_set1_epi32(t->zero)), n - i);
}

TARGET void mg_avx2_finish(const struct mg_finish *f, size_t n)
{
    int residual = f->residual.x != NULL || f->residual.q != NULL;
    for (size_t i = 0; i < n; i += LANES) {
        __m256 x = read_numbers(&f->x, f->factor, i, n);
        if (f->bias != NULL)
            x = _mm256_add_ps(x, load(f->bias + i, n - i));
        if (f->gelu)
            x = gelu_of(x);
        if (residual)
            x = _mm256_add_ps(x, read_numbers(&f->residual, NULL, i, n));
        write_numbers(&f->out, x, i, n);
    }
}

TARGET float mg_avx2_quantize_row(int8_t *q, const float *x, size_t n)
{
    __m256 tops = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += LANES)
        tops = _mm256_max_ps(tops, absolute(load(x + i, n - i)));
    float top = largest(tops);
    if (top < 1e-30f) {
        memset(q, 0, n);
        return 1.0f;
    }
    __m256 inverse = _mm256_set1_ps(127.0f / top);
    for (size_t i = 0; i < n; i += LANES) {
        store_bytes(q + i, _mm256_cvtps_epi32(_mm256_mul_ps(load(x + i, n - i), inverse)), n - i);
    }
    return top / 127.0f;
}

TARGET void mg_avx2_layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps,
                                   size_t n)
{
    __m256 sum = _mm256_setzero_ps(), squares = _mm256_setzero_ps();
    for (size_t i = 0; i < n; i += LANES)
        sum = _mm256_add_ps(sum, load(x + i, n - i));
    __m256 mean = _mm256_set1_ps(total(sum) / (float)n);
    for (size_t i = 0; i < n; i += LANES) {
        __m256 centred = _mm256_sub_ps(load(x + i, n - i), mean);
        if (n - i < LANES)
            centred = _mm256_and_ps(centred, _mm256_castsi256_ps(mask_of(n - i)));
        squares = _mm256_fmadd_ps(centred, centred, squares);
    }
    __m256 inverse = _mm256_set1_ps(1.0f / sqrtf(total(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += LANES) {
        __m256 y = _mm256_mul_ps(_mm256_sub_ps(load(x + i, n - i), mean), inverse);
        store(out + i, _mm256_fmadd_ps(y, load(weight + i, n - i), load(bias + i, n - i)), n - i);
    }
}

const struct mg_kernels mg_avx2 = {
    .name = "avx2",
    .max_rows = MG_AVX2_ROWS,
    .takes_zero = 1,
    .row_bytes = mg_avx2_row_bytes,
    .pack_rows = mg_avx2_pack_rows,
    .dot_panel = mg_avx2_dot_panel,
    .finish = mg_avx2_finish,
    .quantize_row = mg_avx2_quantize_row,
    .layer_norm_row = mg_avx2_layer_norm_row,
    .max_queries = 24,
    .few_queries = 6,
    .attend_floats = mg_avx2_attend_floats,
    .attend = mg_avx2_attend,
    .attend_range = mg_avx2_attend_range,
    .reads_narrow = 1,
    .attend_backward_floats = mg_avx2_attend_backward_floats,
    .attend_backward = mg_avx2_attend_backward,
    .rows = &mg_avx2_rows,
    .int8 = &mg_avx2_int8,
};
#endif
