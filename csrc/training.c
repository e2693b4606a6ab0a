/* Row kernels of training as the interface has them.  Work is cut into parts that do not depend on the number of
   threads; what a part sums up lies in a place of its own, and these are added in their order at the end. */
#include "rows.h"

#include <stdlib.h>

enum { MAX_PARTS = 32, PART = 16 * 1024 };      /* of kernels that sum; elements at least, bytes stay in a cache */

struct parts {
    mg_row_kernel kernel;
    const void *job;
    size_t n, size;             /* rows or elements; of a part */
    char *room;                 /* NULL, or bytes for each part */
    size_t bytes;
};

static void run_part(void *context, size_t i, size_t worker)
{
    const struct parts *p = context;
    (void)worker;
    p->kernel(p->job, i * p->size, mg_min((i + 1) * p->size, p->n), p->room != NULL ? p->room + i * p->bytes : NULL);
}

/* -> how many parts there are */
static size_t run_parts(struct parts *p)
{
    size_t n_parts = (p->n + p->size - 1) / p->size;
    mg_run(run_part, p, n_parts, MG_MAX_THREADS);
    return n_parts;
}

/* The same for rows of `width` elements with room, zeroed, for `sums` numbers a part, whose totals go to total. */
static enum mg_status sum_rows(mg_row_kernel kernel, const void *job, float *total, size_t rows, size_t width,
                               size_t sums)
{
    size_t least = mg_max(1, PART / mg_max(width, 1));
    struct parts p = {kernel, job, rows, mg_max(least, (rows + MAX_PARTS - 1) / MAX_PARTS), NULL, sums * sizeof(float)};
    memset(total, 0, sums * sizeof *total);
    if (rows == 0 || sums == 0)
        return MG_OK;
    p.room = calloc((rows + p.size - 1) / p.size, p.bytes);
    if (p.room == NULL)
        return MG_NO_MEMORY;
    size_t n_parts = run_parts(&p);
    for (size_t part = 0; part < n_parts; part++) {
        const float *sum = (const float *)(p.room + part * p.bytes);
        for (size_t i = 0; i < sums; i++)
            total[i] += sum[i];
    }
    free(p.room);
    return MG_OK;
}

/* Elements in parts of PART; room receives a number of each, at most `most` parts of equal size. */
static size_t run_elements(mg_row_kernel kernel, const void *job, size_t n, void *room, size_t bytes)
{
    struct parts p = {kernel, job, n, PART, room, bytes};
    if (room != NULL)
        p.size = mg_max(PART, mg_round_up((n + MAX_PARTS - 1) / MAX_PARTS, MG_SUM_BLOCK));
    return run_parts(&p);
}

enum mg_status mg_layer_norm_backward(float *dx, float *dweight_dbias, const float *dy, const float *x,
                                      const float *weight, float eps, size_t m, size_t n)
{
    struct mg_layer_norm_gradient job = {.dx = dx, .dy = dy, .x = x, .weight = weight, .eps = eps, .n = n};
    return sum_rows(mg_kernels()->rows->layer_norm_backward, &job, dweight_dbias, m, n, 2 * n);
}

enum mg_status mg_column_sums(float *sums, const float *x, size_t m, size_t n)
{
    struct mg_columns job = {.x = x, .n = n};
    return sum_rows(mg_kernels()->rows->column_sums, &job, sums, m, n, n);
}

enum mg_status mg_gelu_backward(float *dx, const float *dy, const float *x, size_t n)
{
    struct mg_gelu_gradient job = {.dx = dx, .dy = dy, .x = x};
    run_elements(mg_kernels()->rows->gelu_backward, &job, n, NULL, 0);
    return MG_OK;
}

struct logit_rows {
    mg_row_kernel kernel;
    const struct mg_logit_losses *job;
    struct mg_scratch scratch;
};

static void logit_row(void *context, size_t i, size_t worker)
{
    const struct logit_rows *rows = context;
    rows->kernel(rows->job, i, i + 1, mg_scratch_of(&rows->scratch, worker));
}

enum mg_status mg_logit_losses(float *dlogits, double *values, const float *logits, const float *teacher,
                               const int64_t *targets, float temperature, float kl_scale, float ce_scale, size_t m,
                               size_t n)
{
    struct mg_logit_losses job = {
        .dlogits = dlogits, .values = values, .logits = logits, .teacher = teacher, .targets = targets,
        .unit = (float)(MG_LOG2_E / (double)temperature), .sharp = (float)MG_LOG2_E, .kl_scale = kl_scale,
        .ce_scale = ce_scale, .n = n};
    struct logit_rows rows = {.kernel = mg_kernels()->rows->logit_losses, .job = &job};
    for (size_t i = 0; i < m; i++)
        if (targets[i] >= (int64_t)n)
            return MG_BAD_VALUE;
    if (!mg_get_scratch(&rows.scratch, 2 * n * sizeof(float), m))
        return MG_NO_MEMORY;
    mg_run(logit_row, &rows, m, rows.scratch.n_workers);
    mg_free_scratch(&rows.scratch);
    return MG_OK;
}

enum mg_status mg_magnitude(float *largest, const float *a, size_t n)
{
    struct mg_power job = {.a = a};
    float tops[MAX_PARTS];
    size_t parts = run_elements(mg_kernels()->rows->magnitude, &job, n, tops, sizeof *tops);
    *largest = 0.0f;
    for (size_t i = 0; i < parts; i++)
        *largest = tops[i] > *largest || isnan(tops[i]) ? tops[i] : *largest;
    return MG_OK;
}

enum mg_status mg_power_sum(double *sum, const float *a, float largest, size_t power, size_t n)
{
    struct mg_power job = {.a = a, .largest = largest, .power = power};
    double sums[MAX_PARTS];
    size_t parts = run_elements(mg_kernels()->rows->power_sum, &job, n, sums, sizeof *sums);
    *sum = 0.0;
    for (size_t i = 0; i < parts; i++)
        *sum += sums[i];
    return MG_OK;
}

enum mg_status mg_power_backward(float *da, const float *a, float largest, float factor, size_t power, size_t n)
{
    struct mg_power job = {.da = da, .a = a, .largest = largest, .factor = factor, .power = power};
    if (power == 0)
        return MG_BAD_VALUE;
    run_elements(mg_kernels()->rows->power_backward, &job, n, NULL, 0);
    return MG_OK;
}

enum mg_status mg_adamw(float *p, float *m, float *v, float *average, const float *g, float beta1, float beta2,
                        float g_mean, float g_root, float step, float eps, float shrink, float average_rate, size_t n)
{
    struct mg_adamw job = {.p = p, .m = m, .v = v, .average = average, .g = g, .beta1 = beta1, .beta2 = beta2,
                           .g_mean = g_mean, .g_root = g_root, .step = step, .eps = eps, .shrink = shrink,
                           .average_rate = average_rate};
    run_elements(mg_kernels()->rows->adamw, &job, n, NULL, 0);
    return MG_OK;
}

enum mg_status mg_sum_squares(double *sum, const float *x, size_t n)
{
    struct mg_adamw job = {.g = x};
    double sums[MAX_PARTS];
    size_t parts = run_elements(mg_kernels()->rows->squares, &job, n, sums, sizeof *sums);
    *sum = 0.0;
    for (size_t i = 0; i < parts; i++)
        *sum += sums[i];
    return MG_OK;
}
