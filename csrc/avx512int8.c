/* AVX-512 with VNNI: attention in int8.  dpbusd multiplies unsigned bytes, of a or p, by signed ones and adds four
   products in 32 bits: exact for all bytes. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))
enum { LANES = 16, BYTES = 64 };

MG_INLINE TARGET __mmask16 mask_of(size_t left) { return left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1); }

MG_INLINE TARGET __mmask64 byte_mask(size_t left) { return left >= BYTES ? ~0ULL : (1ULL << left) - 1; }

/* ---- panels: many queries ---- */

/* What dot_panel reads are bytes as they come here, and no weight is too small for it. */
static void dot_bytes(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    mg_avx512vnni.dot_panel(acc, (const int8_t *)a, panel, start, rows, k);
}

/* ---- softmax ---- */

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

MG_INLINE TARGET int32_t *scores_at(int32_t *scores, size_t stride, size_t j)
{
    return scores + j / MG_PANEL * stride + j % MG_PANEL;
}

TARGET static int32_t largest(int32_t *scores, size_t stride, size_t n)
{
    __m512i top = _mm512_set1_epi32(scores[0]);
    for (size_t j = 0; j < n; j += LANES) {
        __m512i x = _mm512_loadu_si512(scores_at(scores, stride, j));
        top = _mm512_mask_max_epi32(top, mask_of(n - j), top, x);
    }
    return _mm512_reduce_max_epi32(top);
}

/* Scores become exponentials, floats in the integers' places; -> their sum */
TARGET static float raise(int32_t *scores, size_t stride, size_t n, int32_t top, float unit)
{
    __m512 sum = _mm512_setzero_ps();
    for (size_t j = 0; j < n; j += LANES) {
        int32_t *at = scores_at(scores, stride, j);
        __m512i below = _mm512_sub_epi32(_mm512_loadu_si512(at), _mm512_set1_epi32(top));
        __m512 e = exp2_of(_mm512_mul_ps(_mm512_cvtepi32_ps(below), _mm512_set1_ps(unit)));
        sum = _mm512_mask_add_ps(sum, mask_of(n - j), sum, e);
        _mm512_storeu_si512(at, _mm512_castps_si512(e));
    }
    return _mm512_reduce_add_ps(sum);
}

TARGET uint32_t mg_avx512_weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    float sum = raise(scores, stride, n, largest(scores, stride, n), unit);
    __m512 scale = _mm512_set1_ps(255.0f / sum);
    __m512i total = _mm512_setzero_si512();
    for (size_t j = 0; j < n; j += LANES) {
        __mmask16 mask = mask_of(n - j);
        __m512 e = _mm512_castsi512_ps(_mm512_loadu_si512(scores_at(scores, stride, j)));
        __m512i x = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(e, scale));
        total = _mm512_add_epi32(total, x);
        _mm_mask_storeu_epi8(p + j, mask, _mm512_cvtepi32_epi8(x));
    }
    return (uint32_t)_mm512_reduce_add_epi32(total);
}

/* x[i] + .. + x[0] */
MG_INLINE TARGET __m512i sums_so_far(__m512i x)
{
    const __m512i zero = _mm512_setzero_si512();
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, LANES - 1));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, LANES - 2));
    x = _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, LANES - 4));
    return _mm512_add_epi32(x, _mm512_alignr_epi32(x, zero, LANES - 8));
}

TARGET uint32_t mg_avx512_weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    const __m512i last = _mm512_set1_epi32(LANES - 1);
    float sum = raise(scores, stride, n, largest(scores, stride, n), unit);
    __m512 scale = _mm512_set1_ps((float)(255 << MG_DIFFUSED_BITS) / sum);
    __m512i carried = _mm512_set1_epi32(1 << (MG_DIFFUSED_BITS - 1)), before = _mm512_setzero_si512();
    for (size_t j = 0; j < n; j += LANES) {
        __mmask16 mask = mask_of(n - j);
        __m512 e = _mm512_castsi512_ps(_mm512_loadu_si512(scores_at(scores, stride, j)));
        __m512i x = _mm512_maskz_cvtps_epi32(mask, _mm512_mul_ps(e, scale));
        x = _mm512_add_epi32(carried, sums_so_far(x));
        carried = _mm512_permutexvar_epi32(last, x);
        __m512i whole = _mm512_srli_epi32(x, MG_DIFFUSED_BITS);
        __m512i steps = _mm512_sub_epi32(whole, _mm512_alignr_epi32(whole, before, LANES - 1));
        before = whole;
        _mm_mask_storeu_epi8(p + j, mask, _mm512_cvtepi32_epi8(steps));
    }
    return (uint32_t)_mm_cvtsi128_si32(_mm512_castsi512_si128(carried)) >> MG_DIFFUSED_BITS;
}

/* 255 * 2^x for x <= 0, however small */
MG_INLINE TARGET __m512 weight_of(__m512 x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    __m512 f = _mm512_reduce_ps(x, 0), p = _mm512_set1_ps(255.0f * c[5]);       /* x less the nearest integer */
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(255.0f * c[i]));
    return _mm512_scalef_ps(p, _mm512_sub_ps(x, f));
}

/* All scores of MG_WEIGHED keys stay in registers; those from n on do not count. */
MG_INLINE TARGET float weigh_vectors(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                                     float scale, float *top)
{
    enum { VECTORS = MG_WEIGHED / LANES };
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);  /* of packed bytes */
    __m512 x[VECTORS], tops = _mm512_set1_ps(MG_LOWEST), sum = _mm512_setzero_ps();
    MG_UNROLL
    for (size_t v = 0; v < VECTORS; v++) {
        size_t j = v * LANES;
        __mmask16 mask = mask_of(n > j ? n - j : 0);
        __m512i number = _mm512_loadu_si512(scores + j / MG_PANEL * stride + j % MG_PANEL);
        x[v] = _mm512_mul_ps(_mm512_cvtepi32_ps(number), _mm512_maskz_loadu_ps(mask, key_scale + j));
        tops = _mm512_mask_max_ps(tops, mask, tops, x[v]);
    }
    float most = _mm512_reduce_max_ps(tops);
    __m512 unit = _mm512_set1_ps(scale), largest = _mm512_set1_ps(most);
    *top = scale * most;
    MG_UNROLL
    for (size_t v = 0; v < VECTORS; v += 4) {
        __m512i steps[4];
        MG_UNROLL
        for (size_t i = 0; i < 4; i++) {
            __mmask16 mask = mask_of(n > (v + i) * LANES ? n - (v + i) * LANES : 0);
            __m512 e = weight_of(_mm512_mul_ps(_mm512_sub_ps(x[v + i], largest), unit));
            sum = _mm512_mask_add_ps(sum, mask, sum, e);
            steps[i] = _mm512_cvtps_epi32(e);
        }
        __m512i low = _mm512_packs_epi32(steps[0], steps[1]), high = _mm512_packs_epi32(steps[2], steps[3]);
        __m512i bytes = _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
        _mm512_mask_storeu_epi8(p + v * LANES, byte_mask(n > v * LANES ? n - v * LANES : 0), bytes);
    }
    return _mm512_reduce_add_ps(sum);
}

TARGET float mg_avx512_weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                                  float scale, float *top)
{
    if (n == MG_WEIGHED)
        return weigh_vectors(p, scores, stride, key_scale, MG_WEIGHED, scale, top);
    return weigh_vectors(p, scores, stride, key_scale, n, scale, top);
}

/* ---- rows: few queries ---- */

/* The sums of 16 vectors, in a vector. */
MG_INLINE TARGET __m512i sums_of(const __m512i *c)
{
    __m512i pair[8], four[4], two[2];
    MG_UNROLL
    for (int i = 0; i < 8; i++)
        pair[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(c[2 * i], c[2 * i + 1]),
                                   _mm512_unpackhi_epi32(c[2 * i], c[2 * i + 1]));
    MG_UNROLL
    for (int i = 0; i < 4; i++)
        four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(pair[2 * i], pair[2 * i + 1]),
                                   _mm512_unpackhi_epi64(pair[2 * i], pair[2 * i + 1]));
    MG_UNROLL
    for (int i = 0; i < 2; i++)
        two[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0x88),
                                  _mm512_shuffle_i32x4(four[2 * i], four[2 * i + 1], 0xdd));
    return _mm512_add_epi32(_mm512_shuffle_i32x4(two[0], two[1], 0x88), _mm512_shuffle_i32x4(two[0], two[1], 0xdd));
}

/* q is offset by 128 for dpbusd, so that 128 + zero times the sum of the key's elements has to be taken away. */
TARGET void mg_avx512_score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row,
                                 size_t n, size_t d)
{
    const __m512i offset = _mm512_set1_epi8(-128), away = _mm512_set1_epi8((char)(128 + zero));
    for (size_t j = 0; j < n; j += LANES) {
        __m512i c[LANES];
        MG_UNROLL
        for (size_t r = 0; r < LANES; r++)
            c[r] = _mm512_setzero_si512();
        for (size_t i = 0; i < d; i += BYTES) {
            const int8_t *at = k + j * k_row + i;
            __mmask64 mask = byte_mask(d - i);
            __m512i x = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, q + i), offset);
            MG_UNROLL
            for (size_t r = 0; r < LANES; r++) {
                __m512i key = _mm512_maskz_loadu_epi8(mask, at);
                __m512i extra = _mm512_dpbusd_epi32(_mm512_setzero_si512(), away, key);
                c[r] = _mm512_sub_epi32(_mm512_dpbusd_epi32(c[r], x, key), extra);
                at += j + r + 1 < n ? k_row : 0;        /* beyond the last key stand copies of it */
            }
        }
        _mm512_storeu_si512(scores + j, sums_of(c));
    }
}

/* Four values at a time, 64 of their elements; most weights are zero.  Unpacking them leaves in a vector 4 elements of
   every 16. */
TARGET void mg_avx512_sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d)
{
    for (size_t i = 0; i < d; i += BYTES) {
        __mmask64 mask = byte_mask(d - i);
        __m512i c[4], row[4];
        MG_UNROLL
        for (int r = 0; r < 4; r++)
            c[r] = _mm512_setzero_si512();
        for (size_t j = 0; j < n; j += 4) {
            int32_t four;
            memcpy(&four, p + j, sizeof four);
            if (four == 0)
                continue;
            __m512i x = _mm512_set1_epi32(four);
            MG_UNROLL
            for (size_t r = 0; r < 4; r++)
                row[r] = _mm512_maskz_loadu_epi8(mask, v + mg_min(j + r, n - 1) * v_row + i);
            __m512i low01 = _mm512_unpacklo_epi8(row[0], row[1]), high01 = _mm512_unpackhi_epi8(row[0], row[1]);
            __m512i low23 = _mm512_unpacklo_epi8(row[2], row[3]), high23 = _mm512_unpackhi_epi8(row[2], row[3]);
            c[0] = _mm512_dpbusd_epi32(c[0], x, _mm512_unpacklo_epi16(low01, low23));
            c[1] = _mm512_dpbusd_epi32(c[1], x, _mm512_unpackhi_epi16(low01, low23));
            c[2] = _mm512_dpbusd_epi32(c[2], x, _mm512_unpacklo_epi16(high01, high23));
            c[3] = _mm512_dpbusd_epi32(c[3], x, _mm512_unpackhi_epi16(high01, high23));
        }
        MG_UNROLL
        for (int r = 0; r < 4; r++) {
            _mm_storeu_si128((__m128i *)(acc + i + 4 * r), _mm512_extracti32x4_epi32(c[r], 0));
            _mm_storeu_si128((__m128i *)(acc + i + 4 * r + 16), _mm512_extracti32x4_epi32(c[r], 1));
            _mm_storeu_si128((__m128i *)(acc + i + 4 * r + 32), _mm512_extracti32x4_epi32(c[r], 2));
            _mm_storeu_si128((__m128i *)(acc + i + 4 * r + 48), _mm512_extracti32x4_epi32(c[r], 3));
        }
    }
}

const struct mg_int8_attention mg_avx512_int8 = {
    .few_queries = 8,
    .score_panel = dot_bytes,
    .sum_panel = dot_bytes,
    .value_panel = dot_bytes,
    .score_keys = mg_avx512_score_keys,
    .weigh = mg_avx512_weigh,
    .weigh_diffused = mg_avx512_weigh_diffused,
    .weigh_some = mg_avx512_weigh_some,
    .sum_values = mg_avx512_sum_values,
};
#endif
