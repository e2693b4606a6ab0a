/* Gates of attention, one number for each head. */
#include "lanes.h"

enum { ROWS = 16 };             /* of a task */

struct gates {
    float *out;
    const struct mg_gate *gate;
    const float *h;
    size_t m, n_head, d;
};

static float logit(const struct gates *job, const float *h, size_t head)
{
    const struct mg_gate *g = job->gate;
    size_t d = job->d;
    if (g->kind == MG_ALL_HEADS)
        return mg_dot(h, g->weight + head * job->n_head * d, 0.0f, job->n_head * d) + g->bias[head];
    if (g->kind == MG_PER_HEAD)
        return mg_dot(h + head * d, g->weight + head * d, 0.0f, d) + g->bias[head];
    float sum = g->bias_2[head];
    for (size_t i = head * g->n_hidden; i < (head + 1) * g->n_hidden; i++) {
        float hidden = mg_dot(h + head * d, g->weight + i * d, 0.0f, d) + g->bias[i];
        sum += hidden > 0.0f ? hidden * g->weight_2[i] : 0.0f;
    }
    return sum;
}

static void some_rows(void *context, size_t task, size_t worker)
{
    const struct gates *job = context;
    (void)worker;
    for (size_t row = task * ROWS; row < mg_min((task + 1) * ROWS, job->m); row++)
        for (size_t head = 0; head < job->n_head; head++) {
            float x = logit(job, job->h + row * job->n_head * job->d, head);
            job->out[row * job->n_head + head] = job->gate->scale / (1.0f + expf(-x));
        }
}

enum mg_status mg_gate(float *out, const struct mg_gate *gate, const float *h, size_t m, size_t n_head, size_t d)
{
    struct gates job = {out, gate, h, m, n_head, d};
    if (gate->kind != MG_PER_HEAD && gate->kind != MG_PER_HEAD_MLP && gate->kind != MG_ALL_HEADS)
        return MG_BAD_VALUE;
    mg_run(some_rows, &job, (m + ROWS - 1) / ROWS, MG_MAX_THREADS);
    return MG_OK;
}
