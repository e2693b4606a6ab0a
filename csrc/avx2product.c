/* AVX2: integer products of rows and a packed panel.

   maddubs multiplies unsigned by signed bytes and adds two products in 16 bits.  Here two such sums are added before
   madd widens them: 5 operations for 64 products, besides loads.  Four products fit 16 bits if what stands above zero in
   the row's four factors has a sum of at most 128, and so has what stands below: so it is in 93 to 99.9 % of an encoder's
   activations, eight by eight, but its log-mel.  What is too large is taken out of the row and put on a list behind it,
   in pieces of which two products fit.  A row with much of that is split: into x / 8, rounded down, and what is left of x,
   in both of which all fours fit.

   Signed rows, less their zero-point, are multiplied by weights + 128, which are unsigned, and 128 times the row's sum
   is taken away again; unsigned rows, probabilities, by the weights as they are, and may have sums of 256. */
#if defined(__x86_64__)
#include "avx2lists.h"

enum { ROWS = MG_AVX2_ROWS };

/* ---- rows ---- */

/* About 3 k, of which little more than k is touched where lists are short. */
size_t mg_avx2_row_bytes(size_t k)
{
    size_t k8 = mg_round_up(k, 8);
    return k8 + sizeof(struct rest) + (k8 / 4 + LAST_PIECES) * sizeof(struct piece);
}

TARGET void mg_avx2_pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    for (size_t r = 0; r < rows; r++) {
        int8_t *row = packed + r * mg_avx2_row_bytes(k);
        pack_row(row, a + r * k, k, zero, 0, 0);
        rest_of(row, k)->few = rows > 1 && rows <= FEW;
    }
}

/* ---- products: a vector of weights holds 8 columns of 4 elements ---- */

MG_INLINE TARGET __m256i weights_at(const int8_t *w, const int is_unsigned)
{
    __m256i x = _mm256_loadu_si256((const __m256i *)w);
    return is_unsigned ? x : _mm256_xor_si256(x, _mm256_set1_epi8(-128));       /* which adds 128 */
}

MG_INLINE TARGET __m256i pairs_of(__m256i x, __m256i w, const int is_unsigned)
{
    return is_unsigned ? _mm256_maddubs_epi16(x, w) : _mm256_maddubs_epi16(w, x);
}

MG_INLINE TARGET __m256i four_times(const int8_t *x)
{
    int32_t four;
    memcpy(&four, x, sizeof four);
    return _mm256_set1_epi32(four);
}

MG_INLINE TARGET __m256i widened(__m256i sums, const int factor)
{
    return _mm256_madd_epi16(sums, _mm256_set1_epi16((short)factor));
}

/* One row, without its list: a matter of memory, read as it lies. */
MG_INLINE TARGET void multiply_one(int32_t *acc, const int8_t *a, const int8_t *panel, size_t k, const int is_unsigned,
                                   const int split)
{
    enum { VECTORS = MG_PANEL / LANES };
    size_t whole = mg_round_up(k, 4) / 8 * 8, low = mg_avx2_row_bytes(k) - mg_round_up(k, 8);
    __m256i c[VECTORS];
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        c[j] = _mm256_setzero_si256();
    for (size_t i = 0; i < whole; i += 4) {
        __m256i x = four_times(a + i), y = x;
        if (split)
            y = four_times(a + low + i);
        MG_UNROLL
        for (size_t j = 0; j < VECTORS; j++) {
            __m256i w = weights_at(panel + i * MG_PANEL + 32 * j, is_unsigned);
            c[j] = _mm256_add_epi32(c[j], widened(pairs_of(x, w, is_unsigned), split ? 8 : 1));
            if (split)
                c[j] = _mm256_add_epi32(c[j], widened(pairs_of(y, w, is_unsigned), 1));
        }
    }
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        _mm256_storeu_si256((__m256i *)(acc + LANES * j), c[j]);
}

/* 8 elements of a row, 4 by 4, and 8 columns of their weights. */
MG_INLINE TARGET __m256i fours_of(const int8_t *a, __m256i v, __m256i w, const int is_unsigned)
{
    __m256i first = pairs_of(four_times(a), v, is_unsigned);
    return _mm256_add_epi16(first, pairs_of(four_times(a + 4), w, is_unsigned));
}

/* Some columns, without the lists.  fetch: what other columns will read of the panel is asked for on the way. */
MG_INLINE TARGET void multiply(int32_t *acc, const int8_t *a, const int8_t *columns, size_t k, const size_t rows,
                               const size_t vectors, const int is_unsigned, const int split, const int fetch)
{
    size_t row = mg_avx2_row_bytes(k), whole = mg_round_up(k, 4) / 8 * 8, low = row - mg_round_up(k, 8);
    __m256i c[ROWS][LANES];
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i++)
        c[i / vectors][i % vectors] = _mm256_setzero_si256();
    for (size_t i = 0; i < whole; i += 8) {
        for (size_t ahead = 32 * vectors; fetch && ahead < 8 * MG_PANEL; ahead += 64)
            __builtin_prefetch(columns + i * MG_PANEL + ahead);
        MG_UNROLL
        for (size_t j = 0; j < vectors; j++) {
            __m256i v = weights_at(columns + i * MG_PANEL + 32 * j, is_unsigned);
            __m256i w = weights_at(columns + (i + 4) * MG_PANEL + 32 * j, is_unsigned);
            MG_UNROLL
            for (size_t r = 0; r < rows; r++) {
                const int8_t *at = a + r * row + i;
                c[r][j] = _mm256_add_epi32(c[r][j], widened(fours_of(at, v, w, is_unsigned), split ? 8 : 1));
                if (split)
                    c[r][j] = _mm256_add_epi32(c[r][j], widened(fours_of(at + low, v, w, is_unsigned), 1));
            }
        }
    }
    MG_UNROLL
    for (size_t i = 0; i < rows * vectors; i++) {
        size_t r = i / vectors, j = i % vectors;
        _mm256_storeu_si256((__m256i *)(acc + r * MG_PANEL + LANES * j), c[r][j]);
    }
}

/* A row's list, and start. */
MG_INLINE TARGET void add_rest(int32_t *acc, const struct rest *rest, const int8_t *panel, const int32_t *start,
                               const int is_unsigned)
{
    enum { VECTORS = MG_PANEL / LANES };
    __m256i c[VECTORS];
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++) {
        c[j] = _mm256_add_epi32(_mm256_loadu_si256((const __m256i *)(acc + LANES * j)),
                                _mm256_loadu_si256((const __m256i *)(start + LANES * j)));
        c[j] = _mm256_add_epi32(c[j], _mm256_set1_epi32((int32_t)rest->start));
    }
    for (size_t p = 0; p < rest->n; p++) {
        const int8_t *at = panel + rest->pieces[p].at * MG_PANEL;
        __m256i x = four_times(rest->pieces[p].four);
        MG_UNROLL
        for (size_t j = 0; j < VECTORS; j++)
            c[j] = _mm256_add_epi32(c[j], widened(pairs_of(x, weights_at(at + 32 * j, is_unsigned), is_unsigned), 1));
    }
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        _mm256_storeu_si256((__m256i *)(acc + LANES * j), c[j]);
}

MG_INLINE TARGET void dot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t k,
                               const size_t rows, const size_t vectors, const int is_unsigned, const int split,
                               const int few)
{
    if (rows == 1)
        multiply_one(acc, a, panel, k, is_unsigned, split);
    for (size_t column = 0; rows > 1 && column < MG_PANEL; column += LANES * vectors)
        multiply(acc + column, a, panel + 4 * column, k, rows, vectors, is_unsigned, split, few && column == 0);
    for (size_t r = 0; r < rows; r++)
        add_rest(acc + r * MG_PANEL, rest_of(a + r * mg_avx2_row_bytes(k), k), panel, start, is_unsigned);
}

/* Rows that are all split, or all not. */
MG_INLINE TARGET void dot_alike(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                                size_t k, const int is_unsigned, const int split)
{
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k, 1, 8, is_unsigned, split, 0); break;
    case 2: dot_rows(acc, a, panel, start, k, 2, 4, is_unsigned, split, 1); break;
    case 3: dot_rows(acc, a, panel, start, k, 3, 4, is_unsigned, split, 1); break;
    default:
        if (rest_of(a, k)->few)
            dot_rows(acc, a, panel, start, k, ROWS, 2, is_unsigned, split, 1);
        else
            dot_rows(acc, a, panel, start, k, ROWS, 2, is_unsigned, split, 0);
    }
}

MG_INLINE TARGET void dot_some(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                               size_t k, const int is_unsigned)
{
    size_t row = mg_avx2_row_bytes(k), split = 0;
    for (size_t r = 0; r < rows; r++)
        split += rest_of(a + r * row, k)->split;
    size_t step = split == 0 || split == rows ? rows : 1;
    for (size_t r = 0; r < rows; r += step)
        if (rest_of(a + r * row, k)->split)
            dot_alike(acc + r * MG_PANEL, a + r * row, panel, start, step, k, is_unsigned, 1);
        else
            dot_alike(acc + r * MG_PANEL, a + r * row, panel, start, step, k, is_unsigned, 0);
}

TARGET void mg_avx2_dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                              size_t k)
{
    dot_some(acc, a, panel, start, rows, k, 0);
}

/* ---- of attention ---- */

/* Whether so many of some rows' probabilities are too large that lists take longer than split rows. */
MG_INLINE TARGET int are_crowded(const uint8_t *p, size_t row, size_t rows, size_t n)
{
    size_t large = 0;
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i + 32 <= n; i += 32) {
            __m256i x = _mm256_loadu_si256((const __m256i *)(p + r * row + i));
            large += (size_t)__builtin_popcount(too_large(x, _mm256_setzero_si256(), 1));
        }
    return large > rows * n / CROWD;
}

/* Of n <= MG_WEIGHED bytes of rows. */
MG_INLINE TARGET void sum_some(int32_t *acc, const uint8_t *p, size_t row, const int8_t *panel, const int32_t *start,
                               size_t rows, size_t n, int split)
{
    enum { ROW = 3 * MG_WEIGHED + sizeof(struct rest) + LAST_PIECES * sizeof(struct piece) };
    _Alignas(32) int8_t packed[ROWS * ROW];
    for (size_t r = 0; r < rows; r++)
        pack_row(packed + r * mg_avx2_row_bytes(n), (const int8_t *)p + r * row, n, 0, split, 1);
    dot_some(acc, packed, panel, start, rows, n, 1);
}

/* Of any number; split: they are whatever they are. */
MG_INLINE TARGET void sum_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                                size_t k, const int split)
{
    static const int32_t zeros[MG_PANEL];
    size_t row = mg_round_up(k, 4);
    int32_t more[ROWS * MG_PANEL];
    for (size_t i = 0; i < k; i += MG_WEIGHED) {
        size_t n = mg_min(MG_WEIGHED, k - i);
        sum_some(i == 0 ? acc : more, a + i, row, panel + i * MG_PANEL, i == 0 ? start : zeros, rows, n,
                 split || are_crowded(a + i, row, rows, n));
        for (size_t j = 0; i > 0 && j < rows * MG_PANEL; j++)
            acc[j] += more[j];
    }
}

TARGET void mg_avx2_score_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                                size_t k)
{
    sum_panel(acc, a, panel, start, rows, k, 1);
}

TARGET void mg_avx2_sum_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                              size_t k)
{
    sum_panel(acc, a, panel, start, rows, k, 0);
}
#endif
