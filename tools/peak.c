/* The most that one core computes: loops of nothing but an instruction, with enough sums to hide its latency.  Built at
   run time by bench_kernels.py, which calls only what this processor has.  Each takes n turns and returns the number of
   multiplications and additions of the products; none touches memory. */

#include <immintrin.h>
#include <stddef.h>

enum { SUMS = 10 };
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define PEAK(name, instructions, vector, start, step, operations)                                                      \
    __attribute__((target(instructions))) double name(size_t n)                                                        \
    {                                                                                                                  \
        vector c[SUMS], a = start, b = start;                                                                          \
        UNROLL for (int i = 0; i < SUMS; i++)                                                                          \
            __asm__ volatile("" : "=x"(c[i]) : "0"(a)); /* c[i] = a, in a register */                                  \
        for (size_t j = 0; j < n; j++) {                                                                               \
            UNROLL for (int i = 0; i < SUMS; i++) {                                                                    \
                __asm__ volatile("" : "+x"(a), "+x"(b)); /* as if they changed */                                      \
                c[i] = step;                                                                                           \
            }                                                                                                          \
        }                                                                                                              \
        UNROLL for (int i = 0; i < SUMS; i++)                                                                          \
            __asm__ volatile("" : : "x"(c[i])); /* as if it was used */                                                \
        return (double)n * SUMS * operations;                                                                          \
    }

PEAK(avx512vnni_int8, "avx512f,avx512vnni", __m512i, _mm512_set1_epi8(1), _mm512_dpbusd_epi32(c[i], a, b), 128)
PEAK(avx512vnni_float32, "avx512f", __m512, _mm512_set1_ps(0.5f), _mm512_fmadd_ps(a, b, c[i]), 32)
PEAK(avx512vnni_bf16, "avx512f,avx512bf16", __m512, _mm512_set1_ps(0.5f),
     _mm512_dpbf16_ps(c[i], (__m512bh)a, (__m512bh)b), 64)
#if defined(__clang__) || __GNUC__ >= 11
PEAK(avxvnni_int8, "avx2,avxvnni", __m256i, _mm256_set1_epi8(1), _mm256_dpbusd_avx_epi32(c[i], a, b), 64)
#endif
PEAK(avxvnni_float32, "avx2,fma", __m256, _mm256_set1_ps(0.5f), _mm256_fmadd_ps(a, b, c[i]), 16)
/* what the kernel spends on 64 products, of which all fit */
PEAK(avx2_int8, "avx2", __m256i, _mm256_set1_epi8(1),
     _mm256_add_epi32(
         c[i], _mm256_madd_epi16(_mm256_add_epi16(_mm256_maddubs_epi16(a, b), _mm256_maddubs_epi16(b, a)), a)), 128)
PEAK(avx2_float32, "avx2,fma", __m256, _mm256_set1_ps(0.5f), _mm256_fmadd_ps(a, b, c[i]), 16)
