/* AVX-512F: the kernels of rows.h. */
#if defined(__x86_64__)
#include "rows.h"

#define TARGET __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")))

MG_ROWS_TABLE(mg_avx512_rows, TARGET);
#endif
