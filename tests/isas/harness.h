/* What the checks share: inputs and outputs, sizes, and how a difference is reported. */
#ifndef ISAS_HARNESS_H
#define ISAS_HARNESS_H

#include "kernels.h"

enum fill { RANDOM, LOW, HIGH, ZERO_ROW, SMALL, FILLS };   /* SMALL: 31 to 33, of one sign for 8, a few any */

enum { N_SIZES = 14, N_SMALL = N_SIZES - 2 };
static const size_t SIZES[N_SIZES] = {1, 2, 3, 15, 16, 17, 31, 33, 63, 64, 65, 127, 384, 1536};

extern const struct mg_kernels *portable, *isa;

/* Begins the cases of a kernel. */
void start_of(const char *name);

/* Ends the program. */
__attribute__((noreturn, format(printf, 1, 2))) void fail(const char *format, ...);

uint32_t bits(void);
float normal(void);     /* deviation 1, at most 3.5 */

/* Arrays end where their room ends, before a page that must not be touched; rooms have numbers from 0 to 8. */
void *array(int room, size_t size);
float *floats(int room, size_t n);
int8_t *bytes(int room, size_t rows, size_t k, enum fill fill, int lowest);
void *output(int room, size_t size);    /* with guard bytes before it */

/* The ends of a case: nothing was written before the output; and it is as expected, of sizes a and b. */
void intact(const void *out);
void equal(const int32_t *got, const int32_t *wanted, size_t n, const char *sizes, size_t a, size_t b);
void close_to(const float *got, const float *wanted, size_t n, double bound, const char *sizes, size_t a, size_t b);

void check_panels(void);
void check_int8_rows(void);
void check_rows(void);
void check_interface(void);
void check_bf16(void);     /* of instruction sets that have it */

#endif
