/* Integer products and row kernels as the interface has them: each cuts its work into tiles, which the pool runs through
   the table of the chosen instruction set.  Tiles do not depend on the number of threads, so neither does a result. */
#include "kernels.h"

#include <stdlib.h>
#include <string.h>

enum {
    TILE_ROWS = 48,             /* rows of an integer product that share a pass over a panel */
    TILE_BYTES = 96 * 1024,     /* of weights in a tile: what is fetched between two looks at the task counter */
    FEW_PRODUCTS = 256 * 1024,  /* a few microseconds: not worth another thread */
    ROW_FLOATS = 16 * 1024      /* of a task of the elementwise kernels */
};

int mg_get_scratch(struct mg_scratch *scratch, size_t bytes, size_t n_tasks)
{
    void *data = NULL;
    scratch->bytes = mg_round_up(bytes, 64);
    scratch->n_workers = mg_max(1, mg_min(mg_threads(), n_tasks));
    int failed = posix_memalign(&data, 64, scratch->bytes * scratch->n_workers);
    scratch->data = data;
    return !failed;
}

/* ---- integer products ---- */

struct product {
    const struct mg_kernels *kernels;
    int32_t *acc;               /* the result, or NULL: then out is */
    float *out;
    const int8_t *a, *panels;
    const int32_t *sums;
    const float *a_scale, *w_scale, *bias, *residual;
    int gelu;
    size_t m, n, k, tile_panels, column_tiles;
    struct mg_scratch scratch;
};

static void store_tile(const struct product *p, const int32_t *acc, size_t row, size_t rows, size_t column)
{
    size_t n = mg_min(MG_PANEL, p->n - column);
    for (size_t r = row; r < row + rows; r++, acc += MG_PANEL) {
        size_t at = r * p->n + column;
        if (p->acc != NULL)
            memcpy(p->acc + at, acc, n * sizeof *acc);
        else
            p->kernels->finish_int(p->out + at, acc, p->a_scale[r], p->w_scale + column,
                                   p->bias != NULL ? p->bias + column : NULL,
                                   p->residual != NULL ? p->residual + at : NULL, p->gelu, n);
    }
}

static void product_tile(void *context, size_t i, size_t worker)
{
    const struct product *p = context;
    const struct mg_kernels *kernels = p->kernels;
    size_t k4 = mg_round_up(p->k, 4), row0 = i / p->column_tiles * TILE_ROWS;
    size_t rows = mg_min(TILE_ROWS, p->m - row0);
    size_t panel0 = i % p->column_tiles * p->tile_panels;
    size_t panel1 = mg_min(panel0 + p->tile_panels, mg_round_up(p->n, MG_PANEL) / MG_PANEL);
    int32_t *acc = mg_scratch_of(&p->scratch, worker);
    int8_t *a = (int8_t *)(acc + kernels->max_rows * MG_PANEL);
    kernels->pack_rows(a, p->a + row0 * p->k, rows, p->k);
    for (size_t panel = panel0; panel < panel1; panel++)
        for (size_t r = 0; r < rows; r += kernels->max_rows) {
            size_t some = mg_min(kernels->max_rows, rows - r);
            kernels->dot_panel(acc, a + r * k4, p->panels + panel * MG_PANEL * k4,
                               p->sums + panel * MG_PANEL, some, p->k);
            store_tile(p, acc, row0 + r, some, panel * MG_PANEL);
        }
}

/* Panels of a tile: all if there are enough rows to share, or too little work; else about a quarter of them, few enough
   to be fetched in one go. */
static size_t tile_panels(const struct product *p, size_t row_tiles, size_t panels)
{
    if (row_tiles > 8 || p->m * p->n * p->k <= FEW_PRODUCTS)
        return mg_max(panels, 1);
    return mg_max(1, mg_min(TILE_BYTES / (MG_PANEL * mg_round_up(p->k, 4)), panels / 4));
}

static enum mg_status run_product(struct product *p, const int8_t *packed)
{
    size_t k4 = mg_round_up(p->k, 4), panels = mg_round_up(p->n, MG_PANEL) / MG_PANEL;
    size_t row_tiles = mg_round_up(p->m, TILE_ROWS) / TILE_ROWS;
    if (p->k > MG_MAX_K)
        return MG_BAD_VALUE;
    p->kernels = mg_kernels();
    p->panels = packed;
    p->sums = (const int32_t *)(packed + panels * MG_PANEL * k4);
    p->tile_panels = tile_panels(p, row_tiles, panels);
    p->column_tiles = (panels + p->tile_panels - 1) / p->tile_panels;
    size_t n_tasks = row_tiles * p->column_tiles;
    size_t bytes = p->kernels->max_rows * MG_PANEL * sizeof(int32_t) + TILE_ROWS * k4;
    if (!mg_get_scratch(&p->scratch, bytes, n_tasks))
        return MG_NO_MEMORY;
    mg_run(product_tile, p, n_tasks, p->scratch.n_workers);
    free(p->scratch.data);
    return MG_OK;
}

enum mg_status mg_matmul_int8(int32_t *acc, const int8_t *a, const int8_t *packed, size_t m, size_t n, size_t k)
{
    struct product p = {.acc = acc, .a = a, .m = m, .n = n, .k = k};
    return run_product(&p, packed);
}

enum mg_status mg_linear_int8(float *out, const int8_t *a, const float *a_scale, const int8_t *packed,
                              const float *w_scale, const float *bias, const float *residual, int gelu,
                              size_t m, size_t n, size_t k)
{
    struct product p = {.out = out, .a = a, .a_scale = a_scale, .w_scale = w_scale, .bias = bias,
                        .residual = residual, .gelu = gelu, .m = m, .n = n, .k = k};
    return run_product(&p, packed);
}

/* ---- row by row ---- */

struct rows {
    const struct mg_kernels *kernels;
    void (*row)(const struct rows *job, size_t i);
    float *out;
    int8_t *q;
    const float *x, *weight, *bias, *residual;
    float eps;
    int gelu;
    size_t m, n, rows_per_task;
};

static void some_rows(void *context, size_t task, size_t worker)
{
    const struct rows *job = context;
    size_t end = mg_min((task + 1) * job->rows_per_task, job->m);
    (void)worker;
    for (size_t i = task * job->rows_per_task; i < end; i++)
        job->row(job, i);
}

static enum mg_status run_rows(struct rows *job)
{
    job->kernels = mg_kernels();
    job->rows_per_task = mg_max(1, ROW_FLOATS / mg_max(job->n, 1));
    mg_run(some_rows, job, (job->m + job->rows_per_task - 1) / job->rows_per_task, MG_MAX_THREADS);
    return MG_OK;
}

static void quantize_one(const struct rows *job, size_t i)
{
    job->out[i] = job->kernels->quantize_row(job->q + i * job->n, job->x + i * job->n, job->n);
}

enum mg_status mg_quantize_rows(int8_t *q, float *scale, const float *x, size_t m, size_t k)
{
    struct rows job = {.row = quantize_one, .out = scale, .q = q, .x = x, .m = m, .n = k};
    return run_rows(&job);
}

static void layer_norm_one(const struct rows *job, size_t i)
{
    job->kernels->layer_norm_row(job->out + i * job->n, job->x + i * job->n, job->weight, job->bias, job->eps, job->n);
}

enum mg_status mg_layer_norm(float *out, const float *x, const float *weight, const float *bias, float eps,
                             size_t m, size_t n)
{
    struct rows job = {.row = layer_norm_one, .out = out, .x = x, .weight = weight, .bias = bias, .eps = eps,
                       .m = m, .n = n};
    return run_rows(&job);
}

static void finish_one(const struct rows *job, size_t i)
{
    size_t at = i * job->n;
    job->kernels->finish(job->out + at, job->x + at, job->bias, job->residual != NULL ? job->residual + at : NULL,
                         job->gelu, job->n);
}

enum mg_status mg_finish(float *out, const float *x, const float *bias, const float *residual, int gelu,
                         size_t m, size_t n)
{
    struct rows job = {.row = finish_one, .out = out, .x = x, .bias = bias, .residual = residual, .gelu = gelu,
                       .m = m, .n = n};
    return run_rows(&job);
}
