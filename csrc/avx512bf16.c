/* AVX512-BF16: products of numbers rounded to bfloat16, summed in float32.  dpbf16 multiplies pairs along k; both
   operands are packed alike, in panels of 16 rows: panel[pair][row] holds two elements of that row.  A tile of the result has
   8 rows of the one, broadcast, and 3 panels of the other, which fills 24 of 32 registers with sums. */
#if defined(__x86_64__)
#include "avx512bf16.h"

#define TARGET __attribute__((target(MG_AVX512BF16)))
enum { ROWS = 8, PANELS = MG_BF16_PANELS };

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
    for (size_t i = 0; i < k; i += 2) {
        const float *at = x + i * x_column;
        for (size_t r = 0; r < rows; r += 16) {
            __mmask16 mask = mask_of(rows - r);
            __m512 odd = i + 1 < k ? _mm512_maskz_loadu_ps(mask, at + x_column + r) : _mm512_setzero_ps();
            __m512i pairs = round_pairs(_mm512_maskz_loadu_ps(mask, at + r), odd);
            _mm512_store_si512(panels + r / 16 * stride + i / 2 * 16, pairs);
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
            __m512i a = broadcast(t->a[i * 16 + r]);
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
    .rows = ROWS,
    .pack_a = pack,
    .pack_b = pack,
    .tile = tile,
    .attend_words = mg_avx512bf16_attend_words,
    .attend = mg_avx512bf16_attend,
    .attend_backward_words = mg_avx512bf16_attend_backward_words,
    .attend_backward = mg_avx512bf16_attend_backward,
};
#endif
