/* AVX2: the kernels of rows.h. */
#if defined(__x86_64__)
#include "rows.h"

#define TARGET __attribute__((target("avx2,fma")))

MG_ROWS_TABLE(mg_avx2_rows, TARGET);
#endif
