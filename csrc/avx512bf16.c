/* AVX512-BF16: products of numbers rounded to bfloat16, summed in float32.  dpbf16 multiplies pairs along k; both
   operands are packed alike, in panels of 16 rows: panel[pair][row] holds two elements of that row.  A tile of the result has
   8 rows of the one, broadcast, and 3 panels of the other, which fills 24 of 32 registers with sums. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))
enum { ROWS = MG_BF16_ROWS, PANELS = MG_BF16_PANELS };

MG_INLINE TARGET __mmask16 mask_of(size_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* Elements of low and high, rounded: 16 of the one, then 16 of the other. */
MG_INLINE TARGET __m512i round_two(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* Transposes 16 x 16 elements of 32 bits. */
MG_INLINE TARGET void transpose(__m512i x[16])
{
    __m512i y[16];
    MG_UNROLL
    for (int i = 0; i < 8; i++) {
        y[2 * i] = _mm512_unpacklo_epi32(x[2 * i], x[2 * i + 1]);
        y[2 * i + 1] = _mm512_unpackhi_epi32(x[2 * i], x[2 * i + 1]);
    }
    MG_UNROLL
    for (int i = 0; i < 4; i++) {
        MG_UNROLL
        for (int j = 0; j < 2; j++) {
            x[4 * i + 2 * j] = _mm512_unpacklo_epi64(y[4 * i + j], y[4 * i + 2 + j]);
            x[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(y[4 * i + j], y[4 * i + 2 + j]);
        }
    }
    MG_UNROLL
    for (int i = 0; i < 2; i++) {
        MG_UNROLL
        for (int j = 0; j < 4; j++) {
            y[8 * i + j] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0x88);
            y[8 * i + 4 + j] = _mm512_shuffle_i32x4(x[8 * i + j], x[8 * i + 4 + j], 0xdd);
        }
    }
    MG_UNROLL
    for (int j = 0; j < 8; j++) {
        x[j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0x88);
        x[8 + j] = _mm512_shuffle_i32x4(y[j], y[8 + j], 0xdd);
    }
}

/* One panel of rows that are dense along k. */
TARGET static void pack_rows(uint32_t *panel, const float *x, size_t x_row, size_t rows, size_t k)
{
    for (size_t i = 0; i < k; i += 32) {
        __mmask16 low = mask_of(k - i), high = mask_of(k - i > 16 ? k - i - 16 : 0);
        __m512i pairs[16];
        MG_UNROLL
        for (size_t r = 0; r < 16; r++) {
            const float *at = x + mg_min(r, rows - 1) * x_row + i;
            __mmask16 real = r < rows ? 0xffff : 0;
            pairs[r] = round_two(_mm512_maskz_loadu_ps(low & real, at), _mm512_maskz_loadu_ps(high & real, at + 16));
        }
        transpose(pairs);
        MG_UNROLL
        for (size_t j = 0; j < 16; j++)
            if (i + 2 * j < k)
                _mm512_store_si512(panel + (i / 2 + j) * 16, pairs[j]);
    }
}

/* Panels of rows that are dense along themselves, all at once: memory is read in its order. */
TARGET static void pack_columns(uint32_t *panels, size_t stride, const float *x, size_t x_column, size_t rows, size_t k)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    for (size_t i = 0; i < k; i += 2) {
        const float *at = x + i * x_column;
        for (size_t r = 0; r < rows; r += 16) {
            __mmask16 mask = mask_of(rows - r);
            __m512 high = i + 1 < k ? _mm512_maskz_loadu_ps(mask, at + x_column + r) : _mm512_setzero_ps();
            __m512i both = round_two(_mm512_maskz_loadu_ps(mask, at + r), high);
            _mm512_store_si512(panels + r / 16 * stride + i / 2 * 16, _mm512_permutexvar_epi16(order, both));
        }
    }
}

TARGET static void pack(uint32_t *panels, size_t stride, const float *x, size_t x_row, size_t x_column, size_t rows,
                        size_t k)
{
    if (x_column == 1)
        for (size_t r = 0; r < rows; r += 16)
            pack_rows(panels + r / 16 * stride, x + r * x_row, x_row, mg_min(16, rows - r), k);
    else
        pack_columns(panels, stride, x, x_column, rows, k);
}

MG_INLINE TARGET void tile_of(const struct mg_bf16_tile *t, const size_t panels)
{
    __m512 c[ROWS][PANELS];
    __mmask16 mask[PANELS];
    MG_UNROLL
    for (size_t p = 0; p < panels; p++) {
        mask[p] = mask_of(t->columns - 16 * p);
        __m512 bias = t->bias != NULL ? _mm512_maskz_loadu_ps(mask[p], t->bias + 16 * p) : _mm512_setzero_ps();
        MG_UNROLL
        for (size_t r = 0; r < ROWS; r++)
            c[r][p] = !t->add || r >= t->rows ? bias : _mm512_maskz_loadu_ps(mask[p], t->c + r * t->c_row + 16 * p);
    }
    for (size_t i = 0; i < t->pairs; i++) {
        __m512i b[PANELS];
        MG_UNROLL
        for (size_t p = 0; p < panels; p++)
            b[p] = _mm512_load_si512(t->b + p * t->b_stride + i * 16);
        MG_UNROLL
        for (size_t r = 0; r < ROWS; r++) {
            __m512i a = _mm512_set1_epi32((int)t->a[i * 16 + r]);
            MG_UNROLL
            for (size_t p = 0; p < panels; p++)
                c[r][p] = _mm512_dpbf16_ps(c[r][p], (__m512bh)a, (__m512bh)b[p]);
        }
    }
    MG_UNROLL
    for (size_t r = 0; r < ROWS; r++) {
        if (r < t->rows) {
            MG_UNROLL
            for (size_t p = 0; p < panels; p++)
                _mm512_mask_storeu_ps(t->c + r * t->c_row + 16 * p, mask[p], c[r][p]);
        }
    }
}

TARGET static void tile(const struct mg_bf16_tile *t)
{
    if (t->columns > 32)
        tile_of(t, 3);
    else if (t->columns > 16)
        tile_of(t, 2);
    else
        tile_of(t, 1);
}

const struct mg_bf16 mg_avx512bf16 = {
    .pack = pack,
    .tile = tile,
    .attend_words = mg_avx512bf16_attend_words,
    .attend = mg_avx512bf16_attend,
    .attend_backward_words = mg_avx512bf16_attend_backward_words,
    .attend_backward = mg_avx512bf16_attend_backward,
};
#endif
