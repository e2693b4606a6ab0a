/* Which instruction sets this process may use, and which one it does use: the only state besides the thread pool and
   the memory that is kept.
   What the chip can (CPUID), what the operating system saves (XGETBV) and what this process may use are three answers;
   an instruction set is usable if all three are yes for all of its features.  On AArch64 NEON is part of
   the architecture, and for the rest the operating system gives one answer. */
#include "kernels.h"

#include <stdatomic.h>
#include <string.h>

enum { CHIP = 1, SAVED = 2, ALLOWED = 4, USABLE = 7 };

/* The fastest stands last. */
struct isa {
    const struct mg_kernels *kernels;
    const char *needs;          /* features */
    const struct mg_kernels *proven;    /* NULL, or with which its products have to agree before it is chosen unasked */
};

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum reg { EAX, EBX, ECX, EDX };

/* state bits of XCR0: SSE, AVX; and opmask, ZMM_Hi256, Hi16_ZMM; the tiles' configuration and, bit 18, their data */
enum { XMM_YMM = 0x6, ZMM = 0xe6, TILES = 0x60000, TILE_DATA = 18 };

static const struct {
    const char *name;
    unsigned leaf, subleaf;
    enum reg reg;
    unsigned bit, state;
} features[] = {
    {"avx2", 7, 0, EBX, 5, XMM_YMM},
    {"fma", 1, 0, ECX, 12, XMM_YMM},
    {"avxvnni", 7, 1, EAX, 4, XMM_YMM},
    {"avx512f", 7, 0, EBX, 16, ZMM},
    {"avx512bw", 7, 0, EBX, 30, ZMM},
    {"avx512dq", 7, 0, EBX, 17, ZMM},
    {"avx512vl", 7, 0, EBX, 31, ZMM},
    {"avx512vnni", 7, 0, ECX, 11, ZMM},
    {"avx512_bf16", 7, 1, EAX, 5, ZMM},
    {"amx_tile", 7, 0, EDX, 24, TILES},
    {"amx_int8", 7, 0, EDX, 25, TILES},
    {"amx_bf16", 7, 0, EDX, 22, TILES},
};

static unsigned long long saved_state(void)
{
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1))      /* OSXSAVE: XGETBV may be executed */
        return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (unsigned long long)d << 32 | a;
}

/* Linux lets a process use tiles from when it has asked for them, and may refuse; asking again changes nothing. */
static int allowed(unsigned state)
{
    if (state != TILES)
        return 1;
#if defined(__linux__)
    enum { ARCH_REQ_XCOMP_PERM = 0x1023 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
#else
    return 0;
#endif
}

int mg_feature(size_t i)
{
#ifdef MG_AMX_EMULATED
    if (features[i].state == TILES)
        return USABLE;
#endif
    unsigned r[4] = {0};
    int chip = __get_cpuid_count(features[i].leaf, features[i].subleaf, &r[EAX], &r[EBX], &r[ECX], &r[EDX]) &&
               (r[features[i].reg] >> features[i].bit & 1);
    int saved = (saved_state() & features[i].state) == features[i].state;
    return chip * CHIP + saved * SAVED + (chip && saved && allowed(features[i].state)) * ALLOWED;
}

const char *mg_feature_name(size_t i)
{
    return i < sizeof features / sizeof features[0] ? features[i].name : NULL;
}

#define AVX512VNNI "avx2 fma avx512f avx512bw avx512dq avx512vl avx512vnni"
#ifdef MG_EVEX_VNNI
#define AVXVNNI AVX512VNNI
#else
#define AVXVNNI "avx2 fma avxvnni"
#endif
static const struct isa isas[] = {
    {&mg_portable, "", NULL},
    {&mg_avx2, "avx2 fma", NULL},
#ifdef MG_AVXVNNI
    {&mg_avxvnni, AVXVNNI, &mg_avx2},
#endif
    {&mg_avx512vnni, AVX512VNNI, NULL},
#ifdef MG_AMX
    {&mg_amx, AVX512VNNI " amx_tile amx_int8", &mg_avx512vnni},
#endif
};

#elif defined(__aarch64__)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

static const char *const features[] = {"asimd", "asimddp"};     /* as Linux calls them: NEON, its dot products */

static int has_dot_products(void)
{
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, NULL, 0) == 0 && has;
#else
    return 0;
#endif
}

int mg_feature(size_t i)
{
    return i == 0 || (i == 1 && has_dot_products()) ? USABLE : 0;
}

const char *mg_feature_name(size_t i) { return i < sizeof features / sizeof features[0] ? features[i] : NULL; }

static const struct isa isas[] = {
    {&mg_portable, "", NULL},
    {&mg_neon, "asimd", NULL},
#ifdef MG_NEON_DOT
    {&mg_neondot, "asimd asimddp", NULL},
#endif
};

#else   /* other processors run the portable code */

int mg_feature(size_t i)
{
    (void)i;
    return 0;
}

const char *mg_feature_name(size_t i)
{
    (void)i;
    return NULL;
}

static const struct isa isas[] = {{&mg_portable, "", NULL}};

#endif

enum { N_ISA = sizeof isas / sizeof isas[0] };
static _Atomic(const struct mg_kernels *) current;
static _Atomic(const struct mg_bf16 *) current_bf16;

const char *mg_isa_name(size_t i) { return i < N_ISA ? isas[i].kernels->name : NULL; }

static int among(const char *name, const char *words)
{
    size_t n = strlen(name);
    for (const char *at = words; (at = strstr(at, name)) != NULL; at += n)
        if ((at == words || at[-1] == ' ') && (at[n] == ' ' || at[n] == 0))
            return 1;
    return 0;
}

static int all_usable(const char *words)
{
    for (size_t f = 0; mg_feature_name(f) != NULL; f++)
        if (among(mg_feature_name(f), words) && mg_feature(f) != USABLE)
            return 0;
    return 1;
}

int mg_isa_usable(size_t i) { return i < N_ISA && all_usable(isas[i].needs); }

/* Beside the instruction set: some processors with VNNI have it, some have not; AMX's packs with AVX-512's. */
static const struct mg_bf16 *bf16_of(const struct mg_kernels *kernels, int is_asked_for)
{
#ifdef MG_AMX
    if (kernels == &mg_amx && all_usable("avx512_bf16")) {
        int good = all_usable("amx_bf16") && (is_asked_for || mg_bf16_tiles_agree(&mg_amxbf16, &mg_avx512bf16));
        return good ? &mg_amxbf16 : &mg_avx512bf16;
    }
#endif
#if defined(__x86_64__)
    if (kernels == &mg_avx512vnni && all_usable("avx512_bf16"))
        return &mg_avx512bf16;
#endif
    (void)kernels;
    (void)is_asked_for;
    return NULL;
}

const struct mg_kernels *mg_isa_proven(size_t i) { return isas[i].proven; }

/* Whether to choose it unasked: what was written without its processor has to pass a trial there (trial.c). */
static int is_trusted(const struct isa *isa)
{
#if defined(__x86_64__)
    return isa->proven == NULL || mg_products_agree(isa->kernels, isa->proven);
#else
    return isa->proven == NULL;
#endif
}

enum mg_status mg_use_isa(const char *name)
{
    int is_asked_for = name[0] != 0;
    for (size_t i = N_ISA; i-- > 0;) {
        const struct mg_kernels *kernels = isas[i].kernels;
        if (mg_isa_usable(i) && (is_asked_for ? strcmp(name, kernels->name) == 0 : is_trusted(&isas[i]))) {
            atomic_store(&current_bf16, bf16_of(kernels, is_asked_for));
            atomic_store(&current, kernels);
            return MG_OK;
        }
    }
    return MG_BAD_ISA;
}

const struct mg_kernels *mg_kernels(void)
{
    const struct mg_kernels *kernels = atomic_load(&current);
    if (kernels == NULL) {
        mg_use_isa("");
        kernels = atomic_load(&current);
    }
    return kernels;
}

const struct mg_bf16 *mg_bf16(void)
{
    mg_kernels();
    return atomic_load(&current_bf16);
}

const char *mg_isa(void) { return mg_kernels()->name; }
