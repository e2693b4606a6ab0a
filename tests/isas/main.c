/* Every table of kernels that this processor can use, for processors on which the Python tests cannot run: test_isas.py
   compiles this program for them and runs it under an emulator, or with emulated instructions.

   usage: isas NAME...      the instruction sets that must be usable, in the order of the dispatcher, and no others
   Exit status 1 at the first difference. */
#include "harness.h"

#ifdef MG_AMX_EMULATED
#include "amxemulation.h"
#endif

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { ROOMS = 9, PAGE = 65536, ROOM_BYTES = 144 * PAGE, GUARD = 64, GUARD_BYTE = 93 };

const struct mg_kernels *portable, *isa;
static char *rooms[ROOMS];
static const char *kernel = "";
static size_t cases;

void fail(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    printf("FAILED %s%s%s: ", isa != NULL ? isa->name : "detection", isa != NULL ? " " : "", kernel);
    vprintf(format, args);
    printf("\n");
    exit(1);
}

void start_of(const char *name)
{
    if (cases > 0)
        printf("  %s: %zu cases\n", kernel, cases);
    kernel = name;
    cases = 0;
}

/* ---- inputs and outputs ---- */

uint32_t bits(void)
{
    static uint32_t x = 2463534242u;    /* xorshift, after Marsaglia */
    x ^= x << 13;
    x ^= x >> 17;
    x ^= x << 5;
    return x;
}

float normal(void)
{
    double sum = 0.0;
    for (int i = 0; i < 4; i++)
        sum += bits() / 4294967296.0 - 0.5;
    return (float)(sum * sqrt(3.0));
}

static void make_rooms(void)
{
    for (int i = 0; i < ROOMS; i++) {
        rooms[i] = mmap(NULL, ROOM_BYTES + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (rooms[i] == MAP_FAILED || mprotect(rooms[i] + ROOM_BYTES, PAGE, PROT_NONE) != 0)
            fail("no memory");
    }
}

void *array(int room, size_t size)
{
    if (size + GUARD > ROOM_BYTES)
        fail("an array of %zu bytes", size);
    return rooms[room] + ROOM_BYTES - size;
}

float *floats(int room, size_t n)
{
    float *x = array(room, n * sizeof *x);
    for (size_t i = 0; i < n; i++)
        x[i] = normal();
    return x;
}

int8_t *bytes(int room, size_t rows, size_t k, enum fill fill, int lowest)
{
    int8_t *x = array(room, rows * k);
    for (size_t i = 0; i < rows * k; i++) {
        int any = (int)(bits() % (unsigned)(128 - lowest)) + lowest;
        if (fill == SMALL && bits() % 32 != 0)
            any = ((i / 8) % 2 == 0 ? 1 : -1) * (31 + (int)(bits() % 3));
        x[i] = (int8_t)(fill == LOW ? lowest : fill == HIGH ? 127 : fill == ZERO_ROW && i / k == rows / 2 ? 0 : any);
    }
    return x;
}

void *output(int room, size_t size)
{
    char *out = array(room, size);
    memset(out - GUARD, GUARD_BYTE, size + GUARD);
    return out;
}

void intact(const void *out)
{
    for (const char *at = (const char *)out - GUARD; at < (const char *)out; at++)
        if (*at != GUARD_BYTE)
            fail("writes before its output");
    cases++;
}

void equal(const int32_t *got, const int32_t *wanted, size_t n, const char *sizes, size_t a, size_t b)
{
    for (size_t i = 0; i < n; i++)
        if (got[i] != wanted[i])
            fail("%s %zu, %zu: element %zu is %d, expected %d", sizes, a, b, i, got[i], wanted[i]);
    intact(got);
}

void close_to(const float *got, const float *wanted, size_t n, double bound, const char *sizes, size_t a, size_t b)
{
    for (size_t i = 0; i < n; i++)
        if (!(fabs((double)got[i] - (double)wanted[i]) <= bound))
            fail("%s %zu, %zu: element %zu is %.9g, expected %.9g within %g", sizes, a, b, i, (double)got[i],
                 (double)wanted[i], bound);
    intact(got);
}

/* ---- all instruction sets ---- */

#ifdef MG_AMX_EMULATED
/* Tiles with a fault are not chosen unasked, but if they are asked for. */
static void check_trial(const char *others)
{
    for (mg_tmm_wrong = TMM_RIGHT; mg_tmm_wrong < TMM_FAULTS; mg_tmm_wrong++) {
        int bad_int8 = mg_tmm_wrong >= INT8_FULL && mg_tmm_wrong < BF16_FULL, bad_bf16 = mg_tmm_wrong >= BF16_FULL;
        mg_use_isa("");
        if (strcmp(mg_isa(), bad_int8 ? others : "amx") != 0)
            fail("fault %d: %s is chosen", mg_tmm_wrong, mg_isa());
        if (mg_has_bf16() && (mg_bf16() == &mg_amxbf16) == (bad_int8 || bad_bf16))
            fail("fault %d: bfloat16 is multiplied %s", mg_tmm_wrong, bad_int8 || bad_bf16 ? "on tiles" : "elsewhere");
        mg_use_isa("amx");
        if (strcmp(mg_isa(), "amx") != 0 || (mg_has_bf16() && mg_bf16() != &mg_amxbf16))
            fail("fault %d: amx is not what was asked for", mg_tmm_wrong);
    }
    mg_tmm_wrong = TMM_RIGHT;
}
#endif

#ifdef MG_EVEX_VNNI
static size_t wrong_rows;

/* A sum is one too large, in products of so many rows. */
static void wrong_panel(int32_t *acc, const int8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    mg_avxvnni.dot_panel(acc, a, panel, start, rows, k);
    acc[rows * MG_PANEL - 1] += rows == wrong_rows;
}

static void check_trial_of_vnni(void)
{
    struct mg_kernels wrong = mg_avxvnni;
    wrong.dot_panel = wrong_panel;
    for (size_t i = 0; mg_isa_name(i) != NULL; i++) {
        int is_vnni = strcmp(mg_isa_name(i), "avxvnni") == 0, is_amx = strcmp(mg_isa_name(i), "amx") == 0;
        if (mg_isa_proven(i) != (is_vnni ? &mg_avx2 : is_amx ? &mg_avx512vnni : NULL))
            fail("%s is not tried against what it should be", mg_isa_name(i));
    }
    if (!mg_products_agree(&mg_avxvnni, &mg_avx2) || !mg_products_agree(&wrong, &mg_avx2))
        fail("avxvnni's products are not avx2's");
    for (wrong_rows = 1; wrong_rows <= mg_avxvnni.max_rows; wrong_rows++)
        if (mg_products_agree(&wrong, &mg_avx2))
            fail("a wrong sum in products of %zu rows passes the trial", wrong_rows);
}
#endif

/* The usable ones are those that were named. */
static void check_detection(int n, char **names)
{
    int found = 0;
    for (size_t i = 0; mg_isa_name(i) != NULL; i++) {
        const char *expected = found < n ? names[found] : "no more";
        if (!mg_isa_usable(i) == (strcmp(mg_isa_name(i), expected) == 0))
            fail("%s is %susable, expected is %s", mg_isa_name(i), mg_isa_usable(i) ? "" : "not ", expected);
        found += mg_isa_usable(i);
        if (mg_use_isa(mg_isa_name(i)) != (mg_isa_usable(i) ? MG_OK : MG_BAD_ISA))
            fail("%s is chosen, but not usable, or the reverse", mg_isa_name(i));
    }
    if (found != n)
        fail("%d instruction sets are usable, expected %d", found, n);
    if (mg_use_isa("") != MG_OK || strcmp(mg_isa(), names[n - 1]) != 0)
        fail("%s is chosen, expected %s", mg_isa(), names[n - 1]);
#ifdef MG_AMX_EMULATED
    check_trial(names[n - 2]);
#endif
#ifdef MG_EVEX_VNNI
    check_trial_of_vnni();
#endif
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    make_rooms();
    if (argc < 2)
        fail("expected the names of instruction sets");
    check_detection(argc - 1, argv + 1);
    mg_use_isa("portable");
    portable = mg_kernels();
    mg_set_threads(2);
    for (int i = 1; i < argc; i++) {
        mg_use_isa(argv[i]);
        isa = mg_kernels();
        printf("%s\n", isa->name);
        check_panels();
        check_int8_rows();
        check_rows();
        check_interface();
        check_bf16();
        start_of("");
    }
    printf("all agree\n");
    return 0;
}
