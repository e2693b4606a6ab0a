/* Integer products and row kernels as the interface has them: each cuts its work into tiles, which the pool runs through
   the table of the chosen instruction set.  Tiles do not depend on the number of threads, so neither does a result. */
#include "choicerows.h"

#include <stdlib.h>
#include <string.h>

enum {
    TILE_ROWS = 48,             /* rounded up to max_rows: of an integer product, that share a pass over a panel */
    TILE_BYTES = 96 * 1024,     /* of weights in a tile: what is fetched between two looks at the task counter */
    MANY_TILES = 8,             /* of rows: enough for all threads */
    FEW_PRODUCTS = 64 * 1024,   /* a microsecond: not worth another thread */
    ROW_FLOATS = 16 * 1024      /* of a task of the elementwise kernels */
};

int mg_get_scratch(struct mg_scratch *scratch, size_t bytes, size_t n_tasks)
{
    scratch->bytes = mg_round_up(bytes, 64);
    scratch->n_workers = mg_max(1, mg_min(mg_threads(), n_tasks));
    scratch->data = mg_take_memory(scratch->bytes * scratch->n_workers);
    return scratch->data != NULL;
}

void mg_free_scratch(struct mg_scratch *scratch)
{
    if (scratch->data != NULL)
        mg_give_memory(scratch->data);
}

/* ---- integer products ---- */

struct product {
    const struct mg_kernels *kernels;
    int32_t *acc;               /* the result: the one of these that is not NULL, else out */
    uint16_t *half;
    int8_t *rows;               /* with row_scale, as mg_quantize_rows has them */
    float *row_scale;
    struct mg_target out;
    size_t out_row;             /* the row that begins there */
    struct mg_source residual;
    const int8_t *a, *panels;
    int32_t a_zero;
    const int32_t *sums;
    const float *a_scale, *w_scale, *bias;
    size_t a_scale_step;        /* 1: a scale per row; 0: one for all */
    int gelu;
    size_t m, n, k, tile_rows, tile_panels, column_tiles;
    struct mg_scratch scratch;
};

void mg_finish_rows(const struct mg_kernels *kernels, const struct mg_finish_tile *t, size_t n)
{
    if (n == MG_PANEL && kernels->finish_tile != NULL) {
        kernels->finish_tile(t);
        return;
    }
    for (size_t r = 0; r < t->rows; r++) {
        size_t at = r * t->stride;
        float wide[MG_PANEL];
        struct mg_finish f = t->row;
        f.out = t->half != NULL ? (struct mg_target){.x = wide} : mg_target_at(f.out, at);
        f.x.acc += r * MG_PANEL;
        f.x.scale = t->scale[r * t->scale_step];
        f.residual = mg_source_at(f.residual, at);
        kernels->finish(&f, n);
        for (size_t j = 0; t->half != NULL && j < n; j++)
            t->half[at + j] = mg_to_bf16(wide[j]);
    }
}

static void store_tile(const struct product *p, const int32_t *acc, size_t row, size_t rows, size_t column)
{
    size_t n = mg_min(MG_PANEL, p->n - column), at = row * p->n + column;
    for (size_t r = 0; p->acc != NULL && r < rows; r++)
        memcpy(p->acc + at + r * p->n, acc + r * MG_PANEL, n * sizeof *acc);
    if (p->acc != NULL)
        return;
    struct mg_finish_tile t = {
        .row = {.out = mg_target_at(p->out, at - p->out_row * p->n), .x = {.acc = acc},
                .residual = mg_source_at(p->residual, at), .factor = p->w_scale + column,
                .bias = p->bias != NULL ? p->bias + column : NULL, .gelu = p->gelu},
        .scale = p->a_scale + row * p->a_scale_step, .half = p->half != NULL ? p->half + at : NULL,
        .scale_step = p->a_scale_step, .stride = p->n, .rows = rows};
    mg_finish_rows(p->kernels, &t, n);
}

static void quantize_some(const struct product *p, const float *x, size_t row, size_t rows)
{
    for (size_t r = row; r < row + rows; r++, x += p->n)
        p->row_scale[r] = p->kernels->quantize_row(p->rows + r * p->n, x, p->n);
}

/* Of a worker. */
struct room {
    size_t packed;              /* the row after the first of those in a; 0: none */
    _Alignas(64) int32_t acc[]; /* (max_rows, MG_PANEL); then a, the packed rows of a tile; then floats for its rows */
};

static void product_tile(void *context, size_t i, size_t worker)
{
    struct product own = *(const struct product *)context, *p = &own;
    const struct mg_kernels *kernels = p->kernels;
    size_t k4 = mg_round_up(p->k, 4), a_row = mg_row_bytes(kernels, p->k), row0 = i / p->column_tiles * p->tile_rows;
    size_t rows = mg_min(p->tile_rows, p->m - row0);
    size_t panel0 = i % p->column_tiles * p->tile_panels;
    size_t panel1 = mg_min(panel0 + p->tile_panels, mg_round_up(p->n, MG_PANEL) / MG_PANEL);
    struct room *room = mg_scratch_of(&p->scratch, worker);
    int32_t *acc = room->acc;
    int8_t *a = (int8_t *)(acc + kernels->max_rows * MG_PANEL);
    if (p->rows != NULL) {
        p->out.x = (float *)(a + mg_round_up(p->tile_rows * a_row, 64));
        p->out_row = row0;
    }
    if (room->packed != row0 + 1)
        kernels->pack_rows(a, p->a + row0 * p->k, rows, p->k, p->a_zero);
    room->packed = row0 + 1;
    for (size_t panel = panel0; panel < panel1; panel++) {
        int32_t start[MG_PANEL];
        for (size_t j = 0; j < MG_PANEL; j++)
            start[j] = -(kernels->takes_zero ? 0 : kernels->offset + p->a_zero) * p->sums[panel * MG_PANEL + j];
        for (size_t r = 0; r < rows; r += kernels->max_rows) {
            size_t some = mg_min(kernels->max_rows, rows - r);
            kernels->dot_panel(acc, a + r * a_row, p->panels + panel * MG_PANEL * k4, start, some, p->k);
            store_tile(p, acc, row0 + r, some, panel * MG_PANEL);
        }
    }
    if (p->rows != NULL)
        quantize_some(p, p->out.x, row0, rows);
}

/* Panels of a tile: all if there are enough rows to share, or too little work, or whole rows are wanted; else about a
   quarter of them, few enough to be fetched in one go. */
static size_t tile_panels(const struct product *p, size_t row_tiles, size_t panels)
{
    if (p->rows != NULL || row_tiles > MANY_TILES || p->m * p->n * p->k <= FEW_PRODUCTS)
        return mg_max(panels, 1);
    return mg_max(1, mg_min(TILE_BYTES / (MG_PANEL * mg_round_up(p->k, 4)), panels / 4));
}

static enum mg_status run_product(struct product *p, const int8_t *packed)
{
    size_t k4 = mg_round_up(p->k, 4), panels = mg_round_up(p->n, MG_PANEL) / MG_PANEL;
    if (p->k > MG_MAX_K)
        return MG_BAD_VALUE;
    p->kernels = mg_kernels();
    p->tile_rows = mg_round_up(TILE_ROWS, p->kernels->max_rows);
    size_t row_tiles = (p->m + p->tile_rows - 1) / p->tile_rows;
    p->panels = packed;
    p->sums = (const int32_t *)(packed + panels * MG_PANEL * k4);
    p->tile_panels = tile_panels(p, row_tiles, panels);
    p->column_tiles = (panels + p->tile_panels - 1) / p->tile_panels;
    size_t n_tasks = row_tiles * p->column_tiles;
    size_t bytes = sizeof(struct room) + p->kernels->max_rows * MG_PANEL * sizeof(int32_t);
    bytes += mg_round_up(p->tile_rows * mg_row_bytes(p->kernels, p->k), 64);
    if (p->rows != NULL)
        bytes += p->tile_rows * p->n * sizeof(float);
    if (!mg_get_scratch(&p->scratch, bytes, n_tasks))
        return MG_NO_MEMORY;
    for (size_t worker = 0; worker < p->scratch.n_workers; worker++)
        *(struct room *)mg_scratch_of(&p->scratch, worker) = (struct room){0};
    mg_run(product_tile, p, n_tasks, p->scratch.n_workers);
    mg_free_scratch(&p->scratch);
    return MG_OK;
}

enum mg_status mg_matmul_int8(int32_t *acc, const int8_t *a, const int8_t *packed, size_t m, size_t n, size_t k)
{
    struct product p = {.acc = acc, .a = a, .m = m, .n = n, .k = k};
    return run_product(&p, packed);
}

enum mg_status mg_linear_int8(float *out, uint16_t *half, const int8_t *a, const float *a_scale, const int8_t *packed,
                              const float *w_scale, const float *bias, const float *residual, int gelu,
                              size_t m, size_t n, size_t k)
{
    struct product p = {.half = half, .out = {.x = out}, .a = a, .a_scale = a_scale, .a_scale_step = 1, .w_scale = w_scale,
                        .bias = bias, .residual = {.x = residual}, .gelu = gelu, .m = m, .n = n, .k = k};
    return run_product(&p, packed);
}

enum mg_status mg_linear_int8_rows(int8_t *q, float *scale, const int8_t *a, const float *a_scale,
                                   const int8_t *packed, const float *w_scale, const float *bias, int gelu, size_t m,
                                   size_t n, size_t k)
{
    struct product p = {.rows = q, .row_scale = scale, .a = a, .a_scale = a_scale, .a_scale_step = 1,
                        .w_scale = w_scale, .bias = bias, .gelu = gelu, .m = m, .n = n, .k = k};
    if (n > 0 && m > MANY_TILES * TILE_ROWS)
        return run_product(&p, packed);
    float *x = mg_take_memory(mg_max(1, m * n) * sizeof *x);    /* few rows: threads share their columns */
    if (x == NULL)
        return MG_NO_MEMORY;
    enum mg_status status = mg_linear_int8(x, NULL, a, a_scale, packed, w_scale, bias, NULL, gelu, m, n, k);
    if (status == MG_OK)
        status = mg_quantize_rows(q, scale, x, m, n);
    mg_give_memory(x);
    return status;
}

enum mg_status mg_linear_static(const struct mg_tensor *out, const struct mg_tensor *a, const int8_t *packed,
                                const float *w_scale, const float *bias, const struct mg_tensor *residual, int gelu,
                                size_t m, size_t n, size_t k)
{
    struct product p = {.out = mg_target_of(out), .a = a->q, .a_zero = a->zero, .a_scale = &a->scale,
                        .w_scale = w_scale, .bias = bias, .gelu = gelu, .m = m, .n = n, .k = k};
    if (residual != NULL)
        p.residual = mg_source_of(residual);
    if (a->q == NULL || k > MG_MAX_STATIC_K || !mg_is_grid(out) || !mg_is_grid(a) ||
        (residual != NULL && !mg_is_grid(residual)))
        return MG_BAD_VALUE;
    return run_product(&p, packed);
}

/* ---- the next token ---- */

static void choose_row(void *context, size_t i, size_t worker)
{
    (void)worker;
    mg_kernels()->rows->choose(context, i, i + 1, NULL);
}

static int is_range(const int64_t *range, size_t first, size_t last)
{
    return range[0] >= (int64_t)first && range[0] <= range[1] && range[1] <= (int64_t)last;
}

enum mg_status mg_choose(int64_t *ids, float *values, double *totals, float *logits, const int64_t *never,
                         const int64_t *ranges, size_t n_never, size_t begin, int prefer, size_t k, size_t m, size_t n)
{
    struct mg_choice job = {.ids = ids, .values = values, .totals = totals, .logits = logits, .never = never,
                            .ranges = ranges, .n_never = n_never, .begin = begin, .k = k, .n = n, .prefer = prefer};
    int good = k >= 1 && k <= n && begin <= n;
    for (size_t i = 0; i < n_never; i++)
        good &= never[i] >= 0 && (size_t)never[i] < n;
    for (size_t i = 0; i < m; i++)
        good &= is_range(ranges + 4 * i, 0, begin) && is_range(ranges + 4 * i + 2, begin, n);
    if (!good)
        return MG_BAD_VALUE;
    mg_run(choose_row, &job, m, MG_MAX_THREADS);
    return MG_OK;
}

/* ---- row by row ---- */

struct rows {
    const struct mg_kernels *kernels;
    void (*row)(const struct rows *job, size_t i, float *room);
    float *scale;               /* a number for each row */
    int8_t *q;
    struct mg_target out;
    struct mg_source x, residual;
    const float *weight, *bias;
    float eps;
    int gelu;
    size_t m, n, rows_per_task;
    struct mg_scratch scratch;  /* room for a row, if there is any */
};

static void some_rows(void *context, size_t task, size_t worker)
{
    const struct rows *job = context;
    size_t end = mg_min((task + 1) * job->rows_per_task, job->m);
    float *room = job->scratch.data != NULL ? mg_scratch_of(&job->scratch, worker) : NULL;
    for (size_t i = task * job->rows_per_task; i < end; i++)
        job->row(job, i, room);
}

static enum mg_status run_rows(struct rows *job)
{
    job->kernels = mg_kernels();
    job->rows_per_task = mg_max(1, ROW_FLOATS / mg_max(job->n, 1));
    size_t n_tasks = (job->m + job->rows_per_task - 1) / job->rows_per_task;
    mg_run(some_rows, job, n_tasks, job->scratch.data != NULL ? job->scratch.n_workers : MG_MAX_THREADS);
    return MG_OK;
}

static void quantize_one(const struct rows *job, size_t i, float *room)
{
    (void)room;
    job->scale[i] = job->kernels->quantize_row(job->q + i * job->n, job->x.x + i * job->n, job->n);
}

enum mg_status mg_quantize_rows(int8_t *q, float *scale, const float *x, size_t m, size_t k)
{
    struct rows job = {.row = quantize_one, .scale = scale, .q = q, .x = {.x = x}, .m = m, .n = k};
    return run_rows(&job);
}

static void layer_norm_one(const struct rows *job, size_t i, float *room)
{
    size_t at = i * job->n;
    float *out = job->out.x + at;
    (void)room;
    job->kernels->layer_norm_row(out, job->x.x + at, job->weight, job->bias, job->eps, job->n);
    if (job->q != NULL)
        job->scale[i] = job->kernels->quantize_row(job->q + at, out, job->n);
}

enum mg_status mg_layer_norm_rows(float *out, int8_t *q, float *scale, const float *x, const float *weight,
                                  const float *bias, float eps, size_t m, size_t n)
{
    struct rows job = {.row = layer_norm_one, .q = q, .scale = scale, .out = {.x = out}, .x = {.x = x},
                       .weight = weight, .bias = bias, .eps = eps, .m = m, .n = n};
    return run_rows(&job);
}

enum mg_status mg_layer_norm(float *out, const float *x, const float *weight, const float *bias, float eps,
                             size_t m, size_t n)
{
    struct rows job = {.row = layer_norm_one, .out = {.x = out}, .x = {.x = x}, .weight = weight, .bias = bias,
                       .eps = eps, .m = m, .n = n};
    return run_rows(&job);
}

/* By way of floats in the room. */
static void layer_norm_static_one(const struct rows *job, size_t i, float *room)
{
    size_t at = i * job->n;
    struct mg_finish in = {.out = {.x = room}, .x = mg_source_at(job->x, at)};
    struct mg_finish out = {.out = mg_target_at(job->out, at), .x = {.x = room}};
    job->kernels->finish(&in, job->n);
    job->kernels->layer_norm_row(room, room, job->weight, job->bias, job->eps, job->n);
    job->kernels->finish(&out, job->n);
}

enum mg_status mg_layer_norm_static(const struct mg_tensor *out, const struct mg_tensor *x, const float *weight,
                                    const float *bias, float eps, size_t m, size_t n)
{
    struct rows job = {.row = layer_norm_static_one, .out = mg_target_of(out), .x = mg_source_of(x), .weight = weight,
                       .bias = bias, .eps = eps, .m = m, .n = n};
    if (!mg_is_grid(out) || !mg_is_grid(x))
        return MG_BAD_VALUE;
    if (!mg_get_scratch(&job.scratch, n * sizeof(float), m))
        return MG_NO_MEMORY;
    enum mg_status status = run_rows(&job);
    mg_free_scratch(&job.scratch);
    return status;
}

static void finish_one(const struct rows *job, size_t i, float *room)
{
    size_t at = i * job->n;
    struct mg_finish f = {.out = mg_target_at(job->out, at), .x = mg_source_at(job->x, at), .bias = job->bias,
                          .residual = mg_source_at(job->residual, at), .gelu = job->gelu};
    (void)room;
    job->kernels->finish(&f, job->n);
}

enum mg_status mg_finish(float *out, const float *x, const float *bias, const float *residual, int gelu,
                         size_t m, size_t n)
{
    struct rows job = {.row = finish_one, .out = {.x = out}, .x = {.x = x}, .bias = bias, .residual = {.x = residual},
                       .gelu = gelu, .m = m, .n = n};
    return run_rows(&job);
}

static void expand_one(const struct rows *job, size_t i, float *room)
{
    struct mg_finish f = {.out = mg_target_at(job->out, i * job->n), .x = mg_source_at(job->x, i * job->n)};
    (void)room;
    f.x.scale = job->weight[i];
    job->kernels->finish(&f, job->n);
}

enum mg_status mg_expand(float *out, const int8_t *q, const float *scale, size_t m, size_t n)
{
    struct rows job = {.row = expand_one, .out = {.x = out}, .x = {.q = q}, .weight = scale, .m = m, .n = n};
    return run_rows(&job);
}

/* ROW_FLOATS numbers, or what is left of them. */
static void add_some(void *context, size_t task, size_t worker)
{
    const struct rows *job = context;
    size_t at = task * ROW_FLOATS;
    struct mg_finish f = {.out = mg_target_at(job->out, at), .x = mg_source_at(job->x, at),
                          .residual = mg_source_at(job->residual, at)};
    (void)worker;
    job->kernels->finish(&f, mg_min(ROW_FLOATS, job->n - at));
}

enum mg_status mg_add_static(const struct mg_tensor *out, const struct mg_tensor *x, const struct mg_tensor *y,
                             size_t n)
{
    struct rows job = {.kernels = mg_kernels(), .out = mg_target_of(out), .x = mg_source_of(x), .n = n};
    if (y != NULL)
        job.residual = mg_source_of(y);
    if (!mg_is_grid(out) || !mg_is_grid(x) || (y != NULL && !mg_is_grid(y)))
        return MG_BAD_VALUE;
    mg_run(add_some, &job, (n + ROW_FLOATS - 1) / ROW_FLOATS, MG_MAX_THREADS);
    return MG_OK;
}
