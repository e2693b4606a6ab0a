/* AVX2: attention in int8; its products of panels are in avx2product.c.  Products of bytes are made in 16 bits and added
   in pairs in 32 bits, which is exact for all bytes. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <string.h>

#define TARGET __attribute__((target("avx2,fma")))
enum { LANES = 8 };

/* ---- softmax ---- */

MG_INLINE TARGET __m256i mask_of(size_t left)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(left < LANES ? (int)left : LANES), lane);
}

/* 2^x for x <= 0; 0 below -126 */
MG_INLINE TARGET __m256 exp2_of(__m256 x)
{
    static const float c[] = {MG_EXP2_COEFFICIENTS};
    __m256 lowest = _mm256_set1_ps(-126.0f), normal = _mm256_cmp_ps(x, lowest, _CMP_GT_OQ);
    x = _mm256_max_ps(x, lowest);
    __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(x, n), p = _mm256_set1_ps(c[5]);
    MG_UNROLL
    for (int i = 4; i >= 0; i--)
        p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c[i]));
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
    return _mm256_and_ps(normal, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power)));
}

MG_INLINE TARGET int32_t *scores_at(int32_t *scores, size_t stride, size_t j)
{
    return scores + j / MG_PANEL * stride + j % MG_PANEL;
}

MG_INLINE TARGET __m256i read_scores(const int32_t *at) { return _mm256_loadu_si256((const __m256i *)at); }

TARGET static int32_t largest(int32_t *scores, size_t stride, size_t n)
{
    int32_t lanes[LANES], top = scores[0];
    __m256i tops = _mm256_set1_epi32(top);
    for (size_t j = 0; j < n; j += LANES) {
        __m256i x = read_scores(scores_at(scores, stride, j));
        tops = _mm256_max_epi32(tops, _mm256_blendv_epi8(tops, x, mask_of(n - j)));
    }
    _mm256_storeu_si256((__m256i *)lanes, tops);
    for (size_t l = 0; l < LANES; l++)
        top = lanes[l] > top ? lanes[l] : top;
    return top;
}

/* Scores become exponentials, floats in the integers' places; -> their sum */
TARGET static float raise(int32_t *scores, size_t stride, size_t n, int32_t top, float unit)
{
    __m256 sums = _mm256_setzero_ps();
    float lanes[LANES], sum = 0.0f;
    for (size_t j = 0; j < n; j += LANES) {
        int32_t *at = scores_at(scores, stride, j);
        __m256i below = _mm256_and_si256(_mm256_sub_epi32(read_scores(at), _mm256_set1_epi32(top)), mask_of(n - j));
        __m256 e = exp2_of(_mm256_mul_ps(_mm256_cvtepi32_ps(below), _mm256_set1_ps(unit)));
        e = _mm256_and_ps(e, _mm256_castsi256_ps(mask_of(n - j)));
        sums = _mm256_add_ps(sums, e);
        _mm256_storeu_si256((__m256i *)at, _mm256_castps_si256(e));
    }
    _mm256_storeu_ps(lanes, sums);
    for (size_t l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

/* Up to LANES of 0 to 255. */
MG_INLINE TARGET void write_bytes(uint8_t *p, __m256i x, size_t n)
{
    __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
    __m128i eight = _mm_packus_epi16(half, half);
    if (n >= LANES)
        _mm_storel_epi64((__m128i *)p, eight);
    else
        memcpy(p, &eight, n);
}

TARGET uint32_t mg_avx2_weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    float sum = raise(scores, stride, n, largest(scores, stride, n), unit);
    __m256 scale = _mm256_set1_ps(255.0f / sum);
    __m256i totals = _mm256_setzero_si256();
    uint32_t lanes[LANES], total = 0;
    for (size_t j = 0; j < n; j += LANES) {
        __m256 e = _mm256_castsi256_ps(read_scores(scores_at(scores, stride, j)));
        __m256i x = _mm256_cvtps_epi32(_mm256_mul_ps(e, scale));
        totals = _mm256_add_epi32(totals, x);
        write_bytes(p + j, x, n - j);
    }
    _mm256_storeu_si256((__m256i *)lanes, totals);
    for (size_t l = 0; l < LANES; l++)
        total += lanes[l];
    return total;
}

/* x[i] + .. + x[0] */
MG_INLINE TARGET __m256i sums_so_far(__m256i x)
{
    x = _mm256_add_epi32(x, _mm256_slli_si256(x, 4));   /* in each half */
    x = _mm256_add_epi32(x, _mm256_slli_si256(x, 8));
    return _mm256_add_epi32(x, _mm256_shuffle_epi32(_mm256_permute2x128_si256(x, x, 0x08), 0xff));
}

TARGET uint32_t mg_avx2_weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    const __m256i last = _mm256_set1_epi32(LANES - 1), back = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    float sum = raise(scores, stride, n, largest(scores, stride, n), unit);
    __m256 scale = _mm256_set1_ps((float)(255 << MG_DIFFUSED_BITS) / sum);
    __m256i carried = _mm256_set1_epi32(1 << (MG_DIFFUSED_BITS - 1)), before = _mm256_setzero_si256();
    for (size_t j = 0; j < n; j += LANES) {
        __m256 e = _mm256_castsi256_ps(read_scores(scores_at(scores, stride, j)));
        __m256i x = sums_so_far(_mm256_cvtps_epi32(_mm256_mul_ps(e, scale)));
        x = _mm256_add_epi32(carried, x);
        carried = _mm256_permutevar8x32_epi32(x, last);
        __m256i whole = _mm256_srli_epi32(x, MG_DIFFUSED_BITS);
        __m256i turned = _mm256_permutevar8x32_epi32(whole, back);
        write_bytes(p + j, _mm256_sub_epi32(whole, _mm256_blend_epi32(turned, before, 1)), n - j);
        before = turned;
    }
    return (uint32_t)_mm256_cvtsi256_si32(carried) >> MG_DIFFUSED_BITS;
}

MG_INLINE TARGET __m256 largest_of(__m256 x)
{
    x = _mm256_max_ps(x, _mm256_permute2f128_ps(x, x, 1));
    x = _mm256_max_ps(x, _mm256_shuffle_ps(x, x, 0x4e));
    return _mm256_max_ps(x, _mm256_shuffle_ps(x, x, 0xb1));
}

/* whole: n is MG_WEIGHED, and nothing has to be masked. */
MG_INLINE TARGET float weigh_vectors(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                                     float scale, float *top, const int whole)
{
    float x[MG_WEIGHED], sum = 0.0f, lanes[LANES];
    __m256 tops = _mm256_set1_ps(MG_LOWEST), sums = _mm256_setzero_ps(), unit = _mm256_set1_ps(scale);
    for (size_t j = 0; j < n; j += LANES) {
        __m256 number = _mm256_cvtepi32_ps(read_scores(scores + j / MG_PANEL * stride + j % MG_PANEL)), score;
        if (whole) {
            score = _mm256_mul_ps(number, _mm256_loadu_ps(key_scale + j));
        } else {
            __m256i mask = mask_of(n - j);
            score = _mm256_mul_ps(number, _mm256_maskload_ps(key_scale + j, mask));
            score = _mm256_blendv_ps(_mm256_set1_ps(MG_LOWEST), score, _mm256_castsi256_ps(mask));
        }
        tops = _mm256_max_ps(tops, score);
        _mm256_storeu_ps(x + j, score);
    }
    tops = largest_of(tops);
    *top = scale * _mm256_cvtss_f32(tops);
    for (size_t j = 0; j < n; j += LANES) {
        __m256 e = exp2_of(_mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + j), tops), unit));
        e = _mm256_mul_ps(e, _mm256_set1_ps(255.0f));
        sums = _mm256_add_ps(sums, whole ? e : _mm256_and_ps(e, _mm256_castsi256_ps(mask_of(n - j))));
        write_bytes(p + j, _mm256_cvtps_epi32(e), whole ? LANES : n - j);
    }
    _mm256_storeu_ps(lanes, sums);
    for (size_t l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum;
}

TARGET float mg_avx2_weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n,
                                float scale, float *top)
{
    if (n == MG_WEIGHED)
        return weigh_vectors(p, scores, stride, key_scale, MG_WEIGHED, scale, top, 1);
    return weigh_vectors(p, scores, stride, key_scale, n, scale, top, 0);
}

/* ---- rows: few queries ---- */

/* Up to 16 bytes as 16 bits, zeros beyond. */
MG_INLINE TARGET __m256i widened(const int8_t *x, size_t left)
{
    __m128i bytes = _mm_setzero_si128();
    if (left >= 16)
        bytes = _mm_loadu_si128((const __m128i *)x);
    else
        memcpy(&bytes, x, left);
    return _mm256_cvtepi8_epi16(bytes);
}

/* The sums of 8 vectors, in a vector. */
MG_INLINE TARGET __m256i sums_of(const __m256i *c)
{
    __m256i low = _mm256_hadd_epi32(_mm256_hadd_epi32(c[0], c[1]), _mm256_hadd_epi32(c[2], c[3]));
    __m256i high = _mm256_hadd_epi32(_mm256_hadd_epi32(c[4], c[5]), _mm256_hadd_epi32(c[6], c[7]));
    return _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
}

TARGET void mg_avx2_score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                               size_t d)
{
    for (size_t j = 0; j < n; j += LANES) {
        __m256i c[LANES];
        MG_UNROLL
        for (size_t r = 0; r < LANES; r++)
            c[r] = _mm256_setzero_si256();
        for (size_t i = 0; i < d; i += 16) {
            const int8_t *key = k + j * k_row + i;
            __m256i x = _mm256_sub_epi16(widened(q + i, d - i), _mm256_set1_epi16((short)zero));
            MG_UNROLL
            for (size_t r = 0; r < LANES; r++) {
                c[r] = _mm256_add_epi32(c[r], _mm256_madd_epi16(x, widened(key, d - i)));
                key += j + r + 1 < n ? k_row : 0;       /* beyond the last key stand copies of it */
            }
        }
        _mm256_storeu_si256((__m256i *)(scores + j), sums_of(c));
    }
}

/* Two values at a time, 16 of their elements; most weights are zero. */
TARGET void mg_avx2_sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d)
{
    for (size_t i = 0; i < d; i += 16) {
        __m256i low = _mm256_setzero_si256(), high = low;
        for (size_t j = 0; j < n; j += 2) {
            if ((p[j] | p[j + 1]) == 0)
                continue;
            const int8_t *at = v + j * v_row + i;
            __m256i a = widened(at, d - i), b = widened(at + (j + 1 < n ? v_row : 0), d - i);
            __m256i pair = _mm256_set1_epi32((int32_t)((uint32_t)p[j + 1] << 16 | p[j]));
            low = _mm256_add_epi32(low, _mm256_madd_epi16(pair, _mm256_unpacklo_epi16(a, b)));
            high = _mm256_add_epi32(high, _mm256_madd_epi16(pair, _mm256_unpackhi_epi16(a, b)));
        }
        _mm256_storeu_si256((__m256i *)(acc + i), _mm256_permute2x128_si256(low, high, 0x20));
        _mm256_storeu_si256((__m256i *)(acc + i + LANES), _mm256_permute2x128_si256(low, high, 0x31));
    }
}

/* ---- numbers of 16 bits ---- */

enum { FLUSHED = 256 };         /* elements of k, 256 * 32767 * 127 < 2^31, after which sums become floats */

/* Some rows, k4 apart, times 4 * vectors columns, over n of their elements, added to sums unless these are the first; w of
   4 columns and 4 elements in a vector, whose pairs are added. */
MG_INLINE TARGET void multiply_wide(float *sums, const int16_t *a, size_t k4, const int8_t *panel, size_t n, int first,
                                    const size_t rows, const size_t vectors)
{
    __m256i c[2][8], x[2];
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        c[i / vectors][i % vectors] = _mm256_setzero_si256();
    for (size_t i = 0; i < n; i += 4) {
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            int64_t four;
            memcpy(&four, a + r * k4 + i, sizeof four);
            x[r] = _mm256_set1_epi64x(four);
        }
        MG_UNROLL
        for (size_t v = 0; v < vectors; v++) {
            __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(panel + i * MG_PANEL + 16 * v)));
            MG_UNROLL
            for (size_t r = 0; r < rows; r++)
                c[r][v] = _mm256_add_epi32(c[r][v], _mm256_madd_epi16(w, x[r]));
        }
    }
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i += 2) {
        size_t r = i / vectors, v = i % vectors;
        float *to = sums + r * MG_PANEL + 4 * v;
        __m256i pairs = _mm256_hadd_epi32(c[r][v], c[r][v + 1]);        /* columns 0 1 4 5 2 3 6 7 */
        __m256 some = _mm256_cvtepi32_ps(_mm256_permute4x64_epi64(pairs, 0xd8));
        _mm256_storeu_ps(to, first ? some : _mm256_add_ps(some, _mm256_loadu_ps(to)));
    }
}

TARGET static void wide_panel(float *sums, const int16_t *a, const int8_t *panel, size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    for (size_t i = 0; i < k4; i += FLUSHED) {
        size_t n = mg_min(FLUSHED, k4 - i);
        const int8_t *part = panel + i * MG_PANEL;
        for (size_t r = 0; r + 2 <= rows; r += 2)
            for (size_t j = 0; j < MG_PANEL; j += 16)
                multiply_wide(sums + r * MG_PANEL + j, a + r * k4 + i, k4, part + 4 * j, n, i == 0, 2, 4);
        for (size_t r = rows - rows % 2, j = 0; r < rows && j < MG_PANEL; j += 32)
            multiply_wide(sums + r * MG_PANEL + j, a + r * k4 + i, k4, part + 4 * j, n, i == 0, 1, 8);
    }
}

const struct mg_int8_attention mg_avx2_int8 = {
    .few_queries = 6,
    .wide_panel = wide_panel,
    .score_panel = mg_avx2_score_panel,
    .sum_panel = mg_avx2_sum_panel,
    .value_panel = mg_avx2_sum_panel,
    .score_keys = mg_avx2_score_keys,
    .weigh = mg_avx2_weigh,
    .weigh_diffused = mg_avx2_weigh_diffused,
    .weigh_some = mg_avx2_weigh_some,
    .sum_values = mg_avx2_sum_values,
};
#endif
