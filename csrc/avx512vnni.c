/* AVX-512 with VNNI: the integer product, the epilogue and the row kernels; attention is in avx512attention.c. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <math.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
enum { ROWS = 6, VECTORS = MG_PANEL / 16, OFFSET = 128 };    /* 6 rows * 4 vectors of sums fill 24 of 32 registers */

/* dpbusd multiplies unsigned by signed: a is offset by OFFSET. */
TARGET void mg_avx512_pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    (void)zero;
    const __m512i offset = _mm512_set1_epi8(-128);     /* exclusive or with it adds OFFSET */
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++) {
        int8_t *out = packed + r * k4;
        const int8_t *row = a + r * k;
        size_t i = 0;
        for (; i + 64 <= k; i += 64)
            _mm512_storeu_si512(out + i, _mm512_xor_si512(_mm512_loadu_si512(row + i), offset));
        if (i < k) {
            __mmask64 in = (1ULL << (k - i)) - 1, to = (2ULL << (k4 - i - 1)) - 1;      /* k4 - i may be 64 */
            _mm512_mask_storeu_epi8(out + i, to, _mm512_xor_si512(_mm512_maskz_loadu_epi8(in, row + i), offset));
        }
    }
}

MG_INLINE TARGET void dot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t k4,
                               const size_t rows)
{
    __m512i c[ROWS][VECTORS];
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++) {
        MG_UNROLL
        for (size_t r = 0; r < rows; r++)
            c[r][j] = _mm512_loadu_si512(start + 16 * j);
    }
    for (size_t i = 0; i < k4; i += 4) {
        __m512i w[VECTORS];
        MG_UNROLL
        for (size_t j = 0; j < VECTORS; j++)
            w[j] = _mm512_loadu_si512(panel + i * MG_PANEL + 64 * j);
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, a + r * k4 + i, sizeof four);
            __m512i x = _mm512_set1_epi32(four);
            MG_UNROLL
            for (size_t j = 0; j < VECTORS; j++)
                c[r][j] = _mm512_dpbusd_epi32(c[r][j], x, w[j]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < rows; r++) {
        MG_UNROLL
        for (size_t j = 0; j < VECTORS; j++)
            _mm512_storeu_si512(acc + r * MG_PANEL + 16 * j, c[r][j]);
    }
}

TARGET static void dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                             size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k4, 1); break;
    case 2: dot_rows(acc, a, panel, start, k4, 2); break;
    case 3: dot_rows(acc, a, panel, start, k4, 3); break;
    case 4: dot_rows(acc, a, panel, start, k4, 4); break;
    case 5: dot_rows(acc, a, panel, start, k4, 5); break;
    default: dot_rows(acc, a, panel, start, k4, ROWS); break;
    }
}

MG_INLINE TARGET __mmask16 mask_of(size_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

MG_INLINE TARGET __m512 gelu_of(__m512 x)
{
    static const float c[] = {MG_GELU_COEFFICIENTS};
    __m512 a = _mm512_min_ps(_mm512_set1_ps(1e5f), _mm512_abs_ps(x)), r = _mm512_set1_ps(c[7]);     /* or NaN */
    MG_UNROLL
    for (int i = 6; i >= 0; i--)
        r = _mm512_fmadd_ps(r, a, _mm512_set1_ps(c[i]));
    __m512 guess = _mm512_rcp14_ps(r);
    r = _mm512_fmadd_ps(guess, _mm512_fnmadd_ps(r, guess, _mm512_set1_ps(1.0f)), guess);    /* 1 / r */
    r = _mm512_mul_ps(r, r);
    r = _mm512_mul_ps(r, r);
    r = _mm512_mul_ps(r, r);
    r = _mm512_mul_ps(r, r);
    a = _mm512_mul_ps(a, _mm512_set1_ps(0.5f));
    return _mm512_fnmadd_ps(a, r, _mm512_max_ps(x, _mm512_setzero_ps()));
}

MG_INLINE TARGET __m512 read_numbers(const struct mg_source *s, const float *factor, size_t i, __mmask16 mask)
{
    __m512i number;
    if (s->x != NULL)
        return _mm512_maskz_loadu_ps(mask, s->x + i);
    if (s->q != NULL)
        number = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, s->q + i));
    else
        number = _mm512_maskz_loadu_epi32(mask, s->acc + i);
    __m512 scale = _mm512_set1_ps(s->scale);
    if (factor != NULL)
        scale = _mm512_mul_ps(scale, _mm512_maskz_loadu_ps(mask, factor + i));
    return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(number, _mm512_set1_epi32(s->zero))), scale);
}

MG_INLINE TARGET void write_numbers(const struct mg_target *t, __m512 x, size_t i, __mmask16 mask)
{
    if (t->q == NULL) {
        _mm512_mask_storeu_ps(t->x + i, mask, x);
        return;
    }
    x = _mm512_mul_ps(x, _mm512_set1_ps(t->inverse));
    x = _mm512_max_ps(x, _mm512_set1_ps((float)(-128 - t->zero)));      /* the second of them where x is NaN */
    x = _mm512_min_ps(x, _mm512_set1_ps((float)(127 - t->zero)));
    __m512i steps = _mm512_add_epi32(_mm512_cvtps_epi32(x), _mm512_set1_epi32(t->zero));
    _mm_mask_storeu_epi8(t->q + i, mask, _mm512_cvtsepi32_epi8(steps));
}

TARGET void mg_avx512_finish(const struct mg_finish *f, size_t n)
{
    int residual = f->residual.x != NULL || f->residual.q != NULL;
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = mask_of(n - i);
        __m512 x = read_numbers(&f->x, f->factor, i, mask);
        if (f->bias != NULL)
            x = _mm512_add_ps(x, _mm512_maskz_loadu_ps(mask, f->bias + i));
        if (f->gelu)
            x = gelu_of(x);
        if (residual)
            x = _mm512_add_ps(x, read_numbers(&f->residual, NULL, i, mask));
        write_numbers(&f->out, x, i, mask);
    }
}

/* bfloat16, ties to even; NaN stays NaN. */
MG_INLINE TARGET __m256i halves_of(__m512 x)
{
    __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

/* What finish makes of each row, with factors and bias in registers. */
TARGET void mg_avx512_finish_tile(const struct mg_finish_tile *t)
{
    const struct mg_finish *f = &t->row;
    __m512 x[VECTORS], factor[VECTORS], bias[VECTORS];
    int residual = f->residual.x != NULL || f->residual.q != NULL;
    MG_UNROLL
    for (size_t v = 0; v < VECTORS; v++) {
        factor[v] = _mm512_loadu_ps(f->factor + 16 * v);
        bias[v] = f->bias != NULL ? _mm512_loadu_ps(f->bias + 16 * v) : _mm512_setzero_ps();
    }
    for (size_t r = 0, at = 0; r < t->rows; r++, at += t->stride) {
        __m512 scale = _mm512_set1_ps(t->scale[r * t->scale_step]);
        MG_UNROLL
        for (size_t v = 0; v < VECTORS; v++) {
            __m512i sums = _mm512_loadu_si512(f->x.acc + r * MG_PANEL + 16 * v);
            x[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_mul_ps(scale, factor[v]));
            x[v] = _mm512_add_ps(x[v], bias[v]);
        }
        if (f->gelu) {
            MG_UNROLL
            for (size_t v = 0; v < VECTORS; v++)
                x[v] = gelu_of(x[v]);
        }
        if (residual) {
            MG_UNROLL
            for (size_t v = 0; v < VECTORS; v++)
                x[v] = _mm512_add_ps(x[v], read_numbers(&f->residual, NULL, at + 16 * v, 0xffff));
        }
        MG_UNROLL
        for (size_t v = 0; v < VECTORS; v++) {
            if (t->half != NULL)
                _mm256_storeu_si256((__m256i *)(t->half + at + 16 * v), halves_of(x[v]));
            else
                write_numbers(&f->out, x[v], at + 16 * v, 0xffff);
        }
    }
}

TARGET float mg_avx512_quantize_row(int8_t *q, const float *x, size_t n)
{
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  /* of packed bytes */
    __m512 tops = _mm512_setzero_ps(), more = _mm512_setzero_ps();
    size_t i = 0;
    for (; i + 32 <= n; i += 32) {
        tops = _mm512_max_ps(tops, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
        more = _mm512_max_ps(more, _mm512_abs_ps(_mm512_loadu_ps(x + i + 16)));
    }
    for (; i < n; i += 16)
        tops = _mm512_max_ps(tops, _mm512_abs_ps(_mm512_maskz_loadu_ps(mask_of(n - i), x + i)));
    float top = _mm512_reduce_max_ps(_mm512_max_ps(tops, more));
    if (top < 1e-30f) {
        memset(q, 0, n);
        return 1.0f;
    }
    __m512 inverse = _mm512_set1_ps(127.0f / top);
    for (i = 0; i + 64 <= n; i += 64) {
        __m512i steps[4];
        MG_UNROLL
        for (size_t v = 0; v < 4; v++)
            steps[v] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i + 16 * v), inverse));
        __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
        _mm512_storeu_si512(q + i, _mm512_permutexvar_epi32(order, _mm512_packs_epi16(low, high)));
    }
    for (; i < n; i += 16) {
        __mmask16 mask = mask_of(n - i);
        __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), inverse));
        _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtsepi32_epi8(rounded));
    }
    return top / 127.0f;
}

TARGET void mg_avx512_layer_norm_row(float *out, const float *x, const float *weight, const float *bias, float eps,
                                     size_t n)
{
    __m512 sum = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
    for (size_t i = 0; i < n; i += 16)
        sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask_of(n - i), x + i));
    __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / (float)n);
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = mask_of(n - i);
        __m512 centred = _mm512_maskz_sub_ps(mask, _mm512_maskz_loadu_ps(mask, x + i), mean);
        squares = _mm512_fmadd_ps(centred, centred, squares);
    }
    __m512 inverse = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)n + eps));
    for (size_t i = 0; i < n; i += 16) {
        __mmask16 mask = mask_of(n - i);
        __m512 y = _mm512_mul_ps(_mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x + i), mean), inverse);
        y = _mm512_fmadd_ps(y, _mm512_maskz_loadu_ps(mask, weight + i), _mm512_maskz_loadu_ps(mask, bias + i));
        _mm512_mask_storeu_ps(out + i, mask, y);
    }
}

const struct mg_kernels mg_avx512vnni = {
    .name = "avx512vnni",
    .max_rows = ROWS,
    .offset = OFFSET,
    .pack_rows = mg_avx512_pack_rows,
    .dot_panel = dot_panel,
    .finish = mg_avx512_finish,
    .finish_tile = mg_avx512_finish_tile,
    .quantize_row = mg_avx512_quantize_row,
    .layer_norm_row = mg_avx512_layer_norm_row,
    .max_queries = 48,
    .few_queries = 8,
    .attend_floats = mg_avx512_attend_floats,
    .attend = mg_avx512_attend,
    .attend_range = mg_avx512_attend_range,
    .reads_narrow = 1,
    .attend_backward_floats = mg_avx512_attend_backward_floats,
    .attend_backward = mg_avx512_attend_backward,
    .rows = &mg_avx512_rows,
    .int8 = &mg_avx512_int8,
};
#endif
