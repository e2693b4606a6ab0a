/* Roofs of the kernels, built at run time by bench_kernels.py for the processor that it runs on. */

#include <stddef.h>
#include <stdint.h>

/* Products of one row, called as decoder.c calls them: from C, one after the other; -> whether one reports an error. */

typedef int linear(float *out, uint16_t *half, const int8_t *a, const float *a_scale, const int8_t *packed,
                   const float *w_scale, const float *bias, const float *residual, int gelu, size_t m, size_t n,
                   size_t k);

int rows(linear *f, float *out, const int8_t *a, const float *a_scale, const int8_t **packed, const float *w_scale,
         size_t count, size_t n, size_t k)
{
    int error = 0;
    for (size_t i = 0; i < count; i++)
        error |= f(out, NULL, a, a_scale, packed[i], w_scale, NULL, NULL, 0, 1, n, k);
    return error;
}

/* Reading: sums of arrays of n words, one after the other, each cut into a part for each thread. */

static int64_t sum(const int64_t *x, size_t n)
{
    int64_t total = 0;
    for (size_t i = 0; i < n; i++)
        total += x[i];
    return total;
}

int64_t sums(const int64_t **arrays, size_t count, size_t n, int threads)
{
    int64_t total = 0;
    for (size_t i = 0; i < count; i++) {
        if (threads == 1) {
            total += sum(arrays[i], n);
            continue;
        }
#pragma omp parallel for num_threads(threads) reduction(+ : total)
        for (int part = 0; part < threads; part++)
            total += sum(arrays[i] + part * n / threads, (part + 1) * n / threads - part * n / threads);
    }
    return total;
}

/* The most that one core computes: loops of nothing but an instruction, with enough sums to hide its latency.  Each takes
   n turns and returns the number of multiplications and additions of the products; none touches memory. */

#ifdef __x86_64__
#include <immintrin.h>

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
#endif
