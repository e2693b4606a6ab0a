/* AVX2: integer products of rows and a packed panel.

   maddubs multiplies unsigned by signed bytes and adds two products in 16 bits.  Here two such sums are added before
   madd widens them: 5 operations for 64 products, besides loads.  Four products fit 16 bits if what stands above zero in
   the row's four factors has a sum of at most 128, and so has what stands below: so it is in 93 to 99.9 % of an encoder's
   activations, eight by eight, but its log-mel.  What is too large is taken out of the row and put on a list behind it,
   in pieces of which two products fit; a row with much of that is left as it is, and multiplied in 16 bits.

   Signed rows, less their zero-point, are multiplied by weights + 128, which are unsigned, and 128 times the row's sum
   is taken away again; unsigned rows, probabilities, by the weights as they are, and may have sums of 256. */
#if defined(__x86_64__)
#include "kernels.h"

#include <immintrin.h>
#include <stdlib.h>

#define TARGET __attribute__((target("avx2,fma")))
enum {
    ROWS = MG_AVX2_ROWS,
    LANES = 8,
    CROWD = 4,                  /* one in so many elements of rows: more of them too large make the rows crowded */
    LAST_PIECES = 12,           /* after the last look at a list's room: 10 of 8 elements, 2 of 4 that are not large */
    FEW = 8,                    /* rows */
};

struct piece {
    uint32_t at;                /* the first of 4 elements of the row */
    int8_t four[4];
};

/* Behind the elements of a row, which are rounded up to 8. */
struct rest {
    int32_t zero;
    uint32_t in_16_bits;        /* whether the row is as it was, zero-point and all, without a list */
    uint32_t few;               /* whether a few rows are all that read a panel, whose parts are then fetched ahead */
    uint32_t start;             /* -128 times the sum of a signed row */
    uint32_t n;
    struct piece pieces[];      /* up to two of 8 elements, and LAST_PIECES */
};

/* About 3 k, of which little more than k is touched where lists are short. */
size_t mg_avx2_row_bytes(size_t k)
{
    size_t k8 = mg_round_up(k, 8);
    return k8 + sizeof(struct rest) + (k8 / 4 + LAST_PIECES) * sizeof(struct piece);
}

MG_INLINE struct rest *rest_of(const int8_t *row, size_t k) { return (struct rest *)(row + mg_round_up(k, 8)); }

/* ---- rows ---- */

/* A row as it is. */
struct source {
    const int8_t *a;
    size_t k;
    int zero;
};

/* What the sum of two or four neighbours may be. */
MG_INLINE int most(const int is_unsigned) { return is_unsigned ? 256 : 128; }

/* 4 elements from `at` on, less zero; -> the largest of them and of the sums of two. */
MG_INLINE int read_four(int *x, const struct source *s, size_t at, const int is_unsigned)
{
    int large = 0;
    for (size_t i = 0; i < 4; i++) {
        x[i] = at + i >= s->k ? 0 : (is_unsigned ? (uint8_t)s->a[at + i] : s->a[at + i]) - s->zero;
        large = abs(x[i]) > large ? abs(x[i]) : large;
    }
    for (size_t i = 0; i < 4; i += 2)
        large = abs(x[i] + x[i + 1]) > large ? abs(x[i] + x[i + 1]) : large;
    return large;
}

/* Moves 4 elements to the list if `all`, or if they are too large, in parts that are not. */
MG_INLINE void take_out(int8_t *row, const struct source *s, size_t at, int all, const int is_unsigned)
{
    struct rest *rest = rest_of(row, s->k);
    int x[4], large = read_four(x, s, at, is_unsigned);
    int parts = large < most(is_unsigned) ? all : 1 + (large - 1) / (most(is_unsigned) - 2);
    for (int part = 0; part < parts; part++) {
        struct piece *piece = &rest->pieces[rest->n++];
        piece->at = (uint32_t)at;
        for (size_t i = 0; i < 4; i++)
            piece->four[i] = (int8_t)(parts == 1 ? x[i] : x[i] * (part + 1) / parts - x[i] * part / parts);
    }
    if (parts > 0)
        memset(row + at, 0, 4);
}

/* Sums of two neighbours and of the two that stand 4 further, twice each. */
MG_INLINE TARGET __m256i sums_of_four(__m256i pairs)
{
    return _mm256_add_epi16(pairs, _mm256_shuffle_epi32(pairs, 0xb1));
}

/* A bit of each of 32 elements: whether it, less zero, is no byte or belongs to four of which the sum is too large. */
MG_INLINE TARGET uint32_t too_large(__m256i x, __m256i zero, const int is_unsigned)
{
    const __m256i ones = _mm256_set1_epi8(1), none = _mm256_setzero_si256();
    const __m256i top = _mm256_set1_epi16((short)most(is_unsigned)), bottom = _mm256_sub_epi16(none, top);
    if (is_unsigned)
        return (uint32_t)_mm256_movemask_epi8(_mm256_cmpgt_epi16(sums_of_four(_mm256_maddubs_epi16(x, ones)), top));
    __m256i y = _mm256_subs_epi8(x, zero), fits = _mm256_cmpeq_epi8(y, _mm256_sub_epi8(x, zero));
    __m256i above = sums_of_four(_mm256_maddubs_epi16(ones, _mm256_max_epi8(y, none)));
    __m256i below = sums_of_four(_mm256_maddubs_epi16(ones, _mm256_min_epi8(y, none)));
    __m256i large = _mm256_or_si256(_mm256_cmpgt_epi16(above, top), _mm256_cmpgt_epi16(bottom, below));
    return (uint32_t)_mm256_movemask_epi8(large) | ~(uint32_t)_mm256_movemask_epi8(fits);
}

/* Up to 32 elements, zero-points beyond. */
MG_INLINE TARGET __m256i elements_at(const struct source *s, size_t i)
{
    __m256i x = _mm256_set1_epi8((char)s->zero);
    if (s->k - i >= sizeof x)
        return _mm256_loadu_si256((const __m256i *)(s->a + i));
    memcpy(&x, s->a + i, s->k - i);
    return x;
}

/* Lists of the 32 elements at i those that are too large; -> whether the list has room for all. */
MG_INLINE TARGET int list_large(int8_t *row, const struct source *s, size_t i, __m256i x, const int is_unsigned)
{
    uint32_t bits = too_large(x, _mm256_set1_epi8((char)s->zero), is_unsigned);
    while (bits != 0) {
        unsigned block = (unsigned)__builtin_ctz(bits) / 8;
        size_t at = i + 8 * block, k4 = mg_round_up(s->k, 4);
        if (rest_of(row, s->k)->n >= mg_round_up(s->k, 8) / 4)
            return 0;
        if (at + 4 < k4) {      /* if not, it is the last four, which is on the list in any case */
            take_out(row, s, at + 4, 1, is_unsigned);
            take_out(row, s, at, 0, is_unsigned);
        }
        bits &= ~(0xffu << 8 * block);
    }
    return 1;
}

MG_INLINE TARGET void pack_row(int8_t *row, const int8_t *a, size_t k, int zero, const int is_unsigned)
{
    const struct source source = {a, k, zero};
    const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1), zeros = _mm256_set1_epi8((char)zero);
    uint32_t lanes[LANES], sum = 0;
    int fits = 1;
    __m256i sums = _mm256_setzero_si256();
    struct rest *rest = rest_of(row, k);
    *rest = (struct rest){.zero = zero};
    for (size_t i = 0; fits && i < k; i += sizeof sums) {
        __m256i x = elements_at(&source, i), y = _mm256_sub_epi8(x, zeros);
        memcpy(row + i, &y, k - i >= sizeof y ? sizeof y : mg_round_up(k - i, 8));
        if (!is_unsigned)
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, x), words));
        fits = list_large(row, &source, i, x, is_unsigned);
    }
    if (!fits) {
        memcpy(row, a, k);
        memset(row + k, 0, mg_round_up(k, 8) - k);
        *rest = (struct rest){.zero = zero, .in_16_bits = 1};
        return;
    }
    if (mg_round_up(k, 4) % 8 != 0)
        take_out(row, &source, mg_round_up(k, 4) - 4, 1, is_unsigned);
    _mm256_storeu_si256((__m256i *)lanes, sums);
    for (size_t l = 0; l < LANES; l++)
        sum += lanes[l];
    if (!is_unsigned)           /* zero-points stand where a has no elements */
        rest->start = -128 * (sum - (uint32_t)mg_round_up(k, sizeof sums) * (uint32_t)zero);
}

TARGET void mg_avx2_pack_rows(int8_t *packed, const int8_t *a, size_t rows, size_t k, int zero)
{
    for (size_t r = 0; r < rows; r++) {
        int8_t *row = packed + r * mg_avx2_row_bytes(k);
        pack_row(row, a + r * k, k, zero, 0);
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

MG_INLINE TARGET __m256i widened(__m256i sums) { return _mm256_madd_epi16(sums, _mm256_set1_epi16(1)); }

/* One row, without its list: a matter of memory, read as it lies. */
MG_INLINE TARGET void multiply_one(int32_t *acc, const int8_t *a, const int8_t *panel, size_t k, const int is_unsigned)
{
    enum { VECTORS = MG_PANEL / LANES };
    __m256i c[VECTORS];
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        c[j] = _mm256_setzero_si256();
    for (size_t i = 0; i < k; i += 4) {
        __m256i x = four_times(a + i);
        MG_UNROLL
        for (size_t j = 0; j < VECTORS; j++) {
            __m256i w = weights_at(panel + i * MG_PANEL + 32 * j, is_unsigned);
            c[j] = _mm256_add_epi32(c[j], widened(pairs_of(x, w, is_unsigned)));
        }
    }
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        _mm256_storeu_si256((__m256i *)(acc + LANES * j), c[j]);
}

/* Some columns, without the lists.  fetch: what other columns will read of the panel is asked for on the way. */
MG_INLINE TARGET void multiply(int32_t *acc, const int8_t *a, const int8_t *columns, size_t k, const size_t rows,
                               const size_t vectors, const int is_unsigned, const int fetch)
{
    size_t row = mg_avx2_row_bytes(k), whole = mg_round_up(k, 4) / 8 * 8;
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
                __m256i sums = pairs_of(four_times(at), v, is_unsigned);
                sums = _mm256_add_epi16(sums, pairs_of(four_times(at + 4), w, is_unsigned));
                c[r][j] = _mm256_add_epi32(c[r][j], widened(sums));
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
            c[j] = _mm256_add_epi32(c[j], widened(pairs_of(x, weights_at(at + 32 * j, is_unsigned), is_unsigned)));
    }
    MG_UNROLL
    for (size_t j = 0; j < VECTORS; j++)
        _mm256_storeu_si256((__m256i *)(acc + LANES * j), c[j]);
}

MG_INLINE TARGET void dot_rows(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t k,
                               const size_t rows, const size_t vectors, const int is_unsigned, const int few)
{
    if (rows == 1)
        multiply_one(acc, a, panel, k, is_unsigned);
    for (size_t column = 0; rows > 1 && column < MG_PANEL; column += LANES * vectors)
        multiply(acc + column, a, panel + 4 * column, k, rows, vectors, is_unsigned, few && column == 0);
    for (size_t r = 0; r < rows; r++)
        add_rest(acc + r * MG_PANEL, rest_of(a + r * mg_avx2_row_bytes(k), k), panel, start, is_unsigned);
}

/* In 16 bits, exact for all bytes: rows as they are, `row` bytes apart.  A vector of products has 2 sums of each of 4
   columns. */
MG_INLINE TARGET void dot_wide(int32_t *acc, const int8_t *a, size_t row, int zero, const int8_t *panel,
                               const int32_t *start, size_t k, const size_t rows, const int is_unsigned)
{
    const __m256i zeros = _mm256_set1_epi16((short)zero);
    for (size_t column = 0; column < MG_PANEL; column += LANES) {
        __m256i c[ROWS][2];
        MG_UNROLL
        for (size_t r = 0; r < rows; r++)
            c[r][0] = c[r][1] = _mm256_setzero_si256();
        for (size_t i = 0; i < k; i += 4) {
            const __m128i *w = (const __m128i *)(panel + i * MG_PANEL + 4 * column);
            __m256i low = _mm256_cvtepi8_epi16(_mm_loadu_si128(w)), high = _mm256_cvtepi8_epi16(_mm_loadu_si128(w + 1));
            MG_UNROLL
            for (size_t r = 0; r < rows; r++) {
                __m128i x = _mm256_castsi256_si128(four_times(a + r * row + i));
                __m256i y = is_unsigned ? _mm256_cvtepu8_epi16(x) : _mm256_sub_epi16(_mm256_cvtepi8_epi16(x), zeros);
                c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(y, low));
                c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(y, high));
            }
        }
        __m256i from = _mm256_loadu_si256((const __m256i *)(start + column));
        MG_UNROLL
        for (size_t r = 0; r < rows; r++) {
            __m256i sums = _mm256_permute4x64_epi64(_mm256_hadd_epi32(c[r][0], c[r][1]), 0xd8);
            _mm256_storeu_si256((__m256i *)(acc + r * MG_PANEL + column), _mm256_add_epi32(sums, from));
        }
    }
}

MG_INLINE TARGET void dot_some_wide(int32_t *acc, const int8_t *a, size_t row, int zero, const int8_t *panel,
                                    const int32_t *start, size_t rows, size_t k, const int is_unsigned)
{
    for (size_t r = 0; r < rows && rows < ROWS; r++)
        dot_wide(acc + r * MG_PANEL, a + r * row, row, zero, panel, start, k, 1, is_unsigned);
    if (rows == ROWS)
        dot_wide(acc, a, row, zero, panel, start, k, ROWS, is_unsigned);
}

/* Rows that are all packed in the same way. */
MG_INLINE TARGET void dot_alike(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                                size_t k, const int is_unsigned)
{
    const struct rest *rest = rest_of(a, k);
    if (rest->in_16_bits) {
        dot_some_wide(acc, a, mg_avx2_row_bytes(k), rest->zero, panel, start, rows, k, is_unsigned);
        return;
    }
    switch (rows) {
    case 1: dot_rows(acc, a, panel, start, k, 1, 8, is_unsigned, 0); break;
    case 2: dot_rows(acc, a, panel, start, k, 2, 4, is_unsigned, 1); break;
    case 3: dot_rows(acc, a, panel, start, k, 3, 4, is_unsigned, 1); break;
    default:
        if (rest->few)
            dot_rows(acc, a, panel, start, k, ROWS, 2, is_unsigned, 1);
        else
            dot_rows(acc, a, panel, start, k, ROWS, 2, is_unsigned, 0);
    }
}

MG_INLINE TARGET void dot_some(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                               size_t k, const int is_unsigned)
{
    size_t row = mg_avx2_row_bytes(k), wide = 0;
    for (size_t r = 0; r < rows; r++)
        wide += rest_of(a + r * row, k)->in_16_bits;
    size_t step = wide == 0 || wide == rows ? rows : 1;
    for (size_t r = 0; r < rows; r += step)
        dot_alike(acc + r * MG_PANEL, a + r * row, panel, start, step, k, is_unsigned);
}

TARGET void mg_avx2_dot_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                              size_t k)
{
    dot_some(acc, a, panel, start, rows, k, 0);
}

/* ---- of attention ---- */

TARGET void mg_avx2_score_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                                size_t k)
{
    dot_some_wide(acc, (const int8_t *)a, mg_round_up(k, 4), 0, panel, start, rows, k, 1);
}

/* Whether so many of some rows' probabilities are too large that lists take longer than products in 16 bits. */
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

/* n <= MG_WEIGHED keys. */
MG_INLINE TARGET void sum_some(int32_t *acc, const uint8_t *p, size_t row, const int8_t *panel, const int32_t *start,
                               size_t rows, size_t n)
{
    enum { ROW = 3 * MG_WEIGHED + sizeof(struct rest) + LAST_PIECES * sizeof(struct piece) };
    _Alignas(32) int8_t packed[ROWS * ROW];
    if (are_crowded(p, row, rows, n)) {
        dot_some_wide(acc, (const int8_t *)p, row, 0, panel, start, rows, n, 1);
        return;
    }
    for (size_t r = 0; r < rows; r++)
        pack_row(packed + r * mg_avx2_row_bytes(n), (const int8_t *)p + r * row, n, 0, 1);
    dot_some(acc, packed, panel, start, rows, n, 1);
}

TARGET void mg_avx2_sum_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows,
                              size_t k)
{
    static const int32_t zeros[MG_PANEL];
    int32_t more[ROWS * MG_PANEL];
    for (size_t i = 0; i < k; i += MG_WEIGHED) {
        size_t n = mg_min(MG_WEIGHED, k - i);
        sum_some(i == 0 ? acc : more, a + i, mg_round_up(k, 4), panel + i * MG_PANEL, i == 0 ? start : zeros, rows, n);
        for (size_t j = 0; i > 0 && j < rows * MG_PANEL; j++)
            acc[j] += more[j];
    }
}
#endif
