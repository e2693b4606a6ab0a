/* AVX-VNNI: the integer products of processors that have dpbusd in 256 bits and no AVX-512; the rest is AVX2's.

   dpbusd multiplies four unsigned bytes, of rows, by signed ones and adds the products in 32 bits: exact for all bytes.

   Written without such a processor.  AVX-512 has the same instruction in another encoding: with MG_EVEX_VNNI that is
   built instead, for tests, and a processor that has this one must pass a trial (trial.c) before it is chosen unasked. */
#if defined(__x86_64__)
#include "kernels.h"

#ifdef MG_AVXVNNI
#include <immintrin.h>
#include <string.h>

#ifdef MG_EVEX_VNNI
#define TARGET __attribute__((target("avx2,fma,avx512f,avx512vl,avx512vnni")))
#define DPBUSD _mm256_dpbusd_epi32
#else
#define TARGET __attribute__((target("avx2,fma,avxvnni")))
#define DPBUSD _mm256_dpbusd_avx_epi32
#endif

enum { ROWS = 6, LANES = 8, BYTES = 32, OFFSET = 128 };

TARGET static void pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    (void)zero;
    const __m256i offset = _mm256_set1_epi8(-128);      /* exclusive or with it adds OFFSET */
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++) {
        int8_t *out = packed + r * k4, last[BYTES] = {0};
        const int8_t *row = a + r * k;
        size_t i = 0;
        for (; i + BYTES <= k; i += BYTES) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(row + i));
            _mm256_storeu_si256((__m256i *)(out + i), _mm256_xor_si256(x, offset));
        }
        if (i == k)
            continue;
        memcpy(last, row + i, k - i);
        __m256i x = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)last), offset);
        _mm256_storeu_si256((__m256i *)last, x);
        memcpy(out + i, last, k4 - i);
    }
}

/* LANES * vectors columns of a panel; rows * vectors sums leave registers for their weights and a row's bytes. */
MG_INLINE TARGET void dot_columns(int32_t *acc, const int8_t *a, const int8_t *columns, const int32_t *start, size_t k4,
                                  const size_t rows, const size_t vectors)
{
    __m256i c[ROWS][LANES];
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        c[i / vectors][i % vectors] = _mm256_loadu_si256((const __m256i *)(start + LANES * (i % vectors)));
    for (size_t i = 0; i < k4; i += 4) {
        __m256i w[LANES];
        MG_UNROLL
        for (size_t j = 0; j < vectors; j++)
            w[j] = _mm256_loadu_si256((const __m256i *)(columns + i * MG_PANEL + BYTES * j));
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            int32_t four;
            memcpy(&four, a + r * k4 + i, sizeof four);
            __m256i x = _mm256_set1_epi32(four);
            MG_UNROLL
            for (size_t j = 0; j < vectors; j++)
                c[r][j] = DPBUSD(c[r][j], x, w[j]);
        }
    }
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i++) {
        int32_t *to = acc + i / vectors * MG_PANEL + LANES * (i % vectors);
        _mm256_storeu_si256((__m256i *)to, c[i / vectors][i % vectors]);
    }
}

MG_INLINE TARGET void dot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t k,
                               const size_t rows, const size_t vectors)
{
    for (size_t column = 0; column < MG_PANEL; column += LANES * vectors)
        dot_columns(acc + column, a, panel + 4 * column, start + column, mg_round_up(k, 4), rows, vectors);
}

TARGET static void dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                             size_t k)
{
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k, 1, 8); break;     /* a matter of memory, read as it lies */
    case 2: dot_rows(acc, a, panel, start, k, 2, 4); break;
    case 3: dot_rows(acc, a, panel, start, k, 3, 4); break;
    case 4: dot_rows(acc, a, panel, start, k, 4, 2); break;
    case 5: dot_rows(acc, a, panel, start, k, 5, 2); break;
    default: dot_rows(acc, a, panel, start, k, ROWS, 2); break;
    }
}

/* What dot_panel reads are bytes as they come here, and no weight is too small for it. */
static void dot_bytes(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    dot_panel(acc, (const int8_t *)a, panel, start, rows, k);
}

static const struct mg_int8_attention int8 = {
    .few_queries = 6,
    .score_panel = dot_bytes,
    .sum_panel = dot_bytes,
    .value_panel = dot_bytes,
    .score_keys = mg_avx2_score_keys,
    .weigh = mg_avx2_weigh,
    .weigh_diffused = mg_avx2_weigh_diffused,
    .weigh_some = mg_avx2_weigh_some,
    .sum_values = mg_avx2_sum_values,
};

const struct mg_kernels mg_avxvnni = {
    .name = "avxvnni",
    .max_rows = ROWS,
    .offset = OFFSET,
    .pack_rows = pack_rows,
    .dot_panel = dot_panel,
    .finish = mg_avx2_finish,
    .quantize_row = mg_avx2_quantize_row,
    .layer_norm_row = mg_avx2_layer_norm_row,
    .max_queries = 24,          /* these two are AVX2's, and were not measured here */
    .few_queries = 6,
    .attend_floats = mg_avx2_attend_floats,
    .attend = mg_avx2_attend,
    .attend_range = mg_avx2_attend_range,
    .reads_narrow = 1,
    .attend_backward_floats = mg_avx2_attend_backward_floats,
    .attend_backward = mg_avx2_attend_backward,
    .rows = &mg_avx2_rows,
    .int8 = &int8,
};
#endif
#endif
