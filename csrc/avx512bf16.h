/* What packs operands in bfloat16, for AVX512-BF16 and for AMX. */
#ifndef MG_AVX512BF16_H
#define MG_AVX512BF16_H
#include "kernels.h"

#include <immintrin.h>

#define MG_AVX512BF16 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"
#define PACKING MG_INLINE __attribute__((target(MG_AVX512BF16)))

PACKING __mmask16 mask_of(size_t left) { return left >= 16 ? 0xffff : (__mmask16)((1u << left) - 1); }

/* Elements of low and high, rounded: 16 of the one, then 16 of the other. */
PACKING __m512i round_two(__m512 low, __m512 high) { return (__m512i)_mm512_cvtne2ps_pbh(high, low); }

/* 16 pairs of an element of the one and an element of the other. */
PACKING __m512i round_pairs(__m512 even, __m512 odd)
{
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                           23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, round_two(even, odd));
}

/* A pair in every lane.  clang 16 fails where it sees what is broadcast become bfloat16. */
PACKING __m512i broadcast(uint32_t pair)
{
    __m512i x = _mm512_set1_epi32((int)pair);
#ifdef __clang__
    __asm__("" : "+v"(x));
#endif
    return x;
}

/* Transposes 16 x 16 elements of 32 bits. */
PACKING void transpose(__m512i x[16])
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

#endif
