/* AVX2: rows as avx2product.c reads them, which says why. */
#ifndef MG_AVX2LISTS_H
#define MG_AVX2LISTS_H

#include "kernels.h"

#include <immintrin.h>
#include <stdlib.h>

#define TARGET __attribute__((target("avx2,fma")))
enum {
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
    uint32_t split;             /* whether the row is x / 8, and the rest stands at the very end */
    uint32_t few;               /* whether a few rows are all that read a panel, whose parts are then fetched ahead */
    uint32_t start;             /* -128 times the sum of a signed row */
    uint32_t n;
    struct piece pieces[];      /* up to two of 8 elements, and LAST_PIECES */
};

MG_INLINE struct rest *rest_of(const int8_t *row, size_t k) { return (struct rest *)(row + mg_round_up(k, 8)); }

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

/* Lists of the 32 elements at i those that are too large; -> whether the list has room for all and is not too long by
   then for a row of which the end is no better. */
MG_INLINE TARGET int list_large(int8_t *row, const struct source *s, size_t i, __m256i x, const int is_unsigned)
{
    uint32_t bits = too_large(x, _mm256_set1_epi8((char)s->zero), is_unsigned);
    while (bits != 0) {
        unsigned block = (unsigned)__builtin_ctz(bits) / 8;
        size_t at = i + 8 * block, k4 = mg_round_up(s->k, 4);
        if (rest_of(row, s->k)->n >= mg_min(mg_round_up(s->k, 8), at + 32) / 4)
            return 0;
        if (at + 4 < k4) {      /* if not, it is the last four, which is on the list in any case */
            take_out(row, s, at + 4, 1, is_unsigned);
            take_out(row, s, at, 0, is_unsigned);
        }
        bits &= ~(0xffu << 8 * block);
    }
    return 1;
}

/* The rest of a split row; a list of 4 elements still has room before it. */
MG_INLINE int8_t *low_bits(int8_t *row, size_t k) { return row + mg_avx2_row_bytes(k) - mg_round_up(k, 8); }

MG_INLINE TARGET void split_row(int8_t *row, const struct source *s, const int is_unsigned)
{
    const __m256i zero = _mm256_set1_epi16((short)s->zero), seven = _mm256_set1_epi16(7);
    int8_t *low = low_bits(row, s->k);
    rest_of(row, s->k)->split = 1;
    rest_of(row, s->k)->n = 0;
    for (size_t i = 0; i < s->k; i += 16) {
        __m128i bytes = _mm_set1_epi8((char)s->zero);
        if (s->k - i >= 16)
            bytes = _mm_loadu_si128((const __m128i *)(s->a + i));
        else
            memcpy(&bytes, s->a + i, s->k - i);
        __m256i x = is_unsigned ? _mm256_cvtepu8_epi16(bytes) : _mm256_cvtepi8_epi16(bytes);
        x = _mm256_sub_epi16(x, zero);
        __m256i both = _mm256_packs_epi16(_mm256_srai_epi16(x, 3), _mm256_and_si256(x, seven));
        both = _mm256_permute4x64_epi64(both, 0xd8);
        if (s->k - i > 8) {
            _mm_storeu_si128((__m128i *)(row + i), _mm256_castsi256_si128(both));
            _mm_storeu_si128((__m128i *)(low + i), _mm256_extracti128_si256(both, 1));
        } else {
            _mm_storel_epi64((__m128i *)(row + i), _mm256_castsi256_si128(both));
            _mm_storel_epi64((__m128i *)(low + i), _mm256_extracti128_si256(both, 1));
        }
    }
}

/* The elements less zero -> their sum; and, unless split, the list. */
MG_INLINE TARGET uint32_t copy_row(int8_t *row, const struct source *s, int split, const int is_unsigned)
{
    const __m256i ones = _mm256_set1_epi8(1), words = _mm256_set1_epi16(1), zeros = _mm256_set1_epi8((char)s->zero);
    uint32_t lanes[LANES], sum = 0;
    __m256i sums = _mm256_setzero_si256();
    for (size_t i = 0; i < s->k; i += sizeof sums) {
        __m256i x = elements_at(s, i), y = _mm256_sub_epi8(x, zeros);
        if (!is_unsigned)
            sums = _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(ones, x), words));
        if (split)
            continue;
        if (s->k - i >= sizeof y)
            _mm256_storeu_si256((__m256i *)(row + i), y);
        else
            memcpy(row + i, &y, mg_round_up(s->k - i, 8));
        split = !list_large(row, s, i, x, is_unsigned);
    }
    if (split)
        split_row(row, s, is_unsigned);
    _mm256_storeu_si256((__m256i *)lanes, sums);
    for (size_t l = 0; l < LANES; l++)
        sum += lanes[l];
    return sum - (uint32_t)mg_round_up(s->k, sizeof sums) * (uint32_t)s->zero;  /* which stand where there are none */
}

MG_INLINE TARGET void pack_row(int8_t *row, const int8_t *a, size_t k, int zero, int split, const int is_unsigned)
{
    const struct source source = {a, k, zero};
    struct rest *rest = rest_of(row, k);
    *rest = (struct rest){0};
    uint32_t sum = copy_row(row, &source, split, is_unsigned);
    rest->start = is_unsigned ? 0 : -128 * sum;
    if (mg_round_up(k, 4) % 8 != 0)
        take_out(row, &source, mg_round_up(k, 4) - 4, 1, is_unsigned);
}

#endif
