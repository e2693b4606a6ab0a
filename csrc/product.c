/* Products in bfloat16.  Both operands are packed in blocks along k, which stay in the caches: one of them as a whole
   at first, the other block by block, of OWN rows, by the task that multiplies it with the former.  Tasks do not
   depend on the number of threads, and neither does a sum's order. */
#include "kernels.h"

enum { OWN = 96, BLOCK = 384 };         /* rows of a task's operand; elements along k of a block */

struct operand {
    const float *x;
    size_t row, column, rows;           /* strides, number */
};

struct product {
    const struct mg_bf16 *kernels;
    float *c;
    const float *bias;
    struct operand a, b;
    const struct operand *shared, *own;
    uint32_t *packed;                   /* shared: (blocks, panels, pairs, 16) */
    size_t n, k, block, blocks, panels; /* block: along k, even; panels of shared */
    struct mg_scratch scratch;
};

static size_t stride_of(const struct product *p) { return p->block / 2 * 16; }

static void pack_some(const struct product *p, uint32_t *to, const struct operand *o, size_t first, size_t rows,
                      size_t block)
{
    size_t k0 = block * p->block;
    (o == &p->a ? p->kernels->pack_a : p->kernels->pack_b)(to, stride_of(p), o->x + first * o->row + k0 * o->column,
                                                           o->row, o->column, rows, mg_min(p->block, p->k - k0));
}

static void pack_shared(void *context, size_t task, size_t worker)
{
    const struct product *p = context;
    size_t block = task % p->blocks, first = task / p->blocks * OWN;
    uint32_t *to = p->packed + (block * p->panels + first / 16) * stride_of(p);
    (void)worker;
    pack_some(p, to, p->shared, first, mg_min(OWN, p->shared->rows - first), block);
}

/* A block along k of some rows of a and columns of b, packed. */
static void multiply(const struct product *p, const uint32_t *a, const uint32_t *b, size_t row0, size_t rows,
                     size_t column0, size_t columns, size_t block)
{
    struct mg_bf16_tile t = {.c_row = p->n, .a_stride = stride_of(p), .b_stride = stride_of(p), .add = block > 0,
                             .pairs = (mg_min(p->block, p->k - block * p->block) + 1) / 2};
    for (size_t j = 0; j < columns; j += 16 * MG_BF16_PANELS) {
        t.columns = mg_min(16 * MG_BF16_PANELS, columns - j);
        t.b = b + j / 16 * stride_of(p);
        t.bias = p->bias != NULL ? p->bias + column0 + j : NULL;
        for (size_t i = 0; i < rows; i += p->kernels->rows) {
            t.rows = mg_min(p->kernels->rows, rows - i);
            t.a = a + i / 16 * stride_of(p) + i % 16;
            t.c = p->c + (row0 + i) * p->n + column0 + j;
            p->kernels->tile(&t);
        }
    }
}

static void multiply_own(void *context, size_t task, size_t worker)
{
    const struct product *p = context;
    size_t first = task * OWN, rows = mg_min(OWN, p->own->rows - first);
    uint32_t *own = mg_scratch_of(&p->scratch, worker);
    for (size_t block = 0; block < p->blocks; block++) {
        const uint32_t *shared = p->packed + block * p->panels * stride_of(p);
        pack_some(p, own, p->own, first, rows, block);
        if (p->own == &p->a)
            multiply(p, own, shared, first, rows, 0, p->n, block);
        else
            multiply(p, shared, own, 0, p->a.rows, first, rows, block);
    }
}

int mg_has_bf16(void) { return mg_bf16() != NULL; }

enum mg_status mg_product_bf16(float *c, const float *a, const float *b, const float *bias, size_t a_row,
                               size_t a_column, size_t b_row, size_t b_column, size_t m, size_t n, size_t k)
{
    struct product p = {.kernels = mg_bf16(), .c = c, .bias = bias, .a = {a, a_row, a_column, m},
                        .b = {b, b_row, b_column, n}, .n = n, .k = k};
    if (p.kernels == NULL)
        return MG_BAD_ISA;
    if ((a_row != 1 && a_column != 1) || (b_row != 1 && b_column != 1))
        return MG_BAD_VALUE;
    if (m == 0 || n == 0)
        return MG_OK;
    p.shared = n <= m ? &p.b : &p.a;
    p.own = n <= m ? &p.a : &p.b;
    p.blocks = mg_max(1, (k + BLOCK - 1) / BLOCK);
    p.block = mg_round_up(mg_max(1, (k + p.blocks - 1) / p.blocks), 2);
    p.panels = (p.shared->rows + 15) / 16;
    size_t n_tasks = (p.own->rows + OWN - 1) / OWN, panel_bytes = stride_of(&p) * sizeof(uint32_t);
    p.packed = mg_take_memory(p.blocks * p.panels * panel_bytes);
    if (p.packed == NULL)
        return MG_NO_MEMORY;
    if (!mg_get_scratch(&p.scratch, OWN / 16 * panel_bytes, n_tasks)) {
        mg_give_memory(p.packed);
        return MG_NO_MEMORY;
    }
    mg_run(pack_shared, &p, p.blocks * ((p.shared->rows + OWN - 1) / OWN), MG_MAX_THREADS);
    mg_run(multiply_own, &p, n_tasks, p.scratch.n_workers);
    mg_free_scratch(&p.scratch);
    mg_give_memory(p.packed);
    return MG_OK;
}
