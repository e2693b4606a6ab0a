/* Whether products are what they should be on this very processor.  The kernels of AMX and AVX-VNNI were written without
   one, see amx.h and avxvnni.c: before they are chosen unasked, some of their products are made and compared with those
   of kernels that have run.  Numbers are such that every sum is exact in whatever order it is made, in bfloat16 too. */
#if defined(__x86_64__)
#include "amx.h"

#include <string.h>

enum { MOST_ROWS = 48, MOST_K = 212, MOST_FORM = 4 * MOST_K, MOST_PAIRS = 64, COLUMNS = 16 * MG_BF16_PANELS };

/* Any byte but -128, the i-th of a series. */
static int8_t byte_of(size_t i, unsigned series)
{
    uint32_t x = (uint32_t)i * 2654435761u + series * 40503u;
    x ^= x >> 15;
    x *= 2246822519u;
    return (int8_t)((int)((x >> 20) % 255) - 127);
}

/* ---- int8 ---- */

struct trial {
    int32_t acc[MOST_ROWS * MG_PANEL], wanted[MOST_ROWS * MG_PANEL];
    _Alignas(64) int8_t form[MOST_ROWS * MOST_FORM];
    int8_t a[MOST_ROWS * MOST_K], w[MG_PANEL * MOST_K];
    _Alignas(64) int8_t packed[MG_PANEL * (MOST_K + sizeof(int32_t))];
    int32_t start[MG_PANEL];
};

/* acc (rows, MG_PANEL), as calls.c makes it; zero-points are 0. */
static void multiply(struct trial *t, int32_t *acc, const struct mg_kernels *kernels, size_t rows, size_t k)
{
    const size_t row = mg_row_bytes(kernels, k);
    const int32_t *sums = (const int32_t *)(t->packed + MG_PANEL * mg_round_up(k, 4));
    for (size_t j = 0; j < MG_PANEL; j++)
        t->start[j] = 1000 * (int32_t)j - kernels->offset * sums[j];
    kernels->pack_rows(t->form, t->a, rows, k, 0);
    for (size_t r = 0; r < rows; r += kernels->max_rows)
        kernels->dot_panel(acc + r * MG_PANEL, t->form + r * row, t->packed, t->start,
                           mg_min(kernels->max_rows, rows - r), k);
}

static int agree(struct trial *t, const struct mg_kernels *kernels, const struct mg_kernels *proven)
{
    static const size_t depths[] = {1, 4, 30, 64, 100, 128, MOST_K};
    static const size_t heights[] = {1, 4, 15, 16, 17, 32, MOST_ROWS};
    enum { DEPTHS = sizeof depths / sizeof depths[0], HEIGHTS = sizeof heights / sizeof heights[0] };
    if (mg_max(mg_row_bytes(kernels, MOST_K), mg_row_bytes(proven, MOST_K)) > MOST_FORM)
        return 0;
    for (unsigned i = 0; i < DEPTHS * HEIGHTS; i++) {
        size_t k = depths[i / HEIGHTS], rows = heights[i % HEIGHTS];
        for (size_t j = 0; j < rows * k; j++)
            t->a[j] = byte_of(j, 2 * i);
        for (size_t j = 0; j < MG_PANEL * k; j++)
            t->w[j] = byte_of(j, 2 * i + 1);
        if (mg_pack_int8(t->packed, t->w, MG_PANEL, k) != MG_OK)
            return 0;
        multiply(t, t->wanted, proven, rows, k);
        memset(t->acc, 1, sizeof t->acc);
        multiply(t, t->acc, kernels, rows, k);
        if (memcmp(t->acc, t->wanted, rows * MG_PANEL * sizeof *t->acc) != 0)
            return 0;
    }
    return 1;
}

int mg_products_agree(const struct mg_kernels *kernels, const struct mg_kernels *proven)
{
    struct trial *t = mg_take_memory(sizeof *t);        /* too much for some stacks */
    int good = t != NULL && agree(t, kernels, proven);
    if (t != NULL)
        mg_give_memory(t);
    return good;
}

#ifdef MG_AMX
/* ---- bfloat16 ---- */

struct bf16_trial {
    float a[MG_TILE_ROWS * 2 * MOST_PAIRS], b[COLUMNS * 2 * MOST_PAIRS];
    _Alignas(64) uint32_t packed_a[16 * MOST_PAIRS], packed_b[COLUMNS * MOST_PAIRS];
};

/* c (rows, columns), rows COLUMNS apart, as product.c makes it; twice, the second time on top of the first. */
static void multiply_bf16(struct bf16_trial *t, float *c, const struct mg_bf16 *kernels, size_t rows, size_t columns,
                          size_t pairs)
{
    const size_t stride = 16 * pairs;
    kernels->pack_a(t->packed_a, stride, t->a, 2 * pairs, 1, rows, 2 * pairs);
    kernels->pack_b(t->packed_b, stride, t->b, 2 * pairs, 1, columns, 2 * pairs);
    for (int add = 0; add < 2; add++)
        for (size_t i = 0; i < rows; i += kernels->rows)
            kernels->tile(&(struct mg_bf16_tile){.c = c + i * COLUMNS, .a = t->packed_a + i, .b = t->packed_b,
                                                 .c_row = COLUMNS, .a_stride = stride, .b_stride = stride,
                                                 .rows = mg_min(kernels->rows, rows - i), .columns = columns,
                                                 .pairs = pairs, .add = add});
}

int mg_bf16_tiles_agree(const struct mg_bf16 *kernels, const struct mg_bf16 *proven)
{
    static const size_t depths[] = {1, 15, 16, 33, MOST_PAIRS}, widths[] = {5, 16, 17, 32, 40, COLUMNS};
    enum { DEPTHS = sizeof depths / sizeof depths[0], WIDTHS = sizeof widths / sizeof widths[0] };
    struct bf16_trial t;
    float c[MG_TILE_ROWS * COLUMNS], wanted[MG_TILE_ROWS * COLUMNS];
    for (unsigned i = 0; i < DEPTHS * WIDTHS; i++) {
        size_t pairs = depths[i / WIDTHS], columns = widths[i % WIDTHS], rows = 1 + i % MG_TILE_ROWS;
        for (size_t j = 0; j < rows * 2 * pairs; j++)
            t.a[j] = (float)byte_of(j, 2 * i);
        for (size_t j = 0; j < columns * 2 * pairs; j++)
            t.b[j] = (float)byte_of(j, 2 * i + 1);
        memset(c, 0, sizeof c);
        memset(wanted, 0, sizeof wanted);
        multiply_bf16(&t, wanted, proven, rows, columns, pairs);
        multiply_bf16(&t, c, kernels, rows, columns, pairs);
        if (memcmp(c, wanted, sizeof c) != 0)
            return 0;
    }
    return 1;
}
#endif
#endif
