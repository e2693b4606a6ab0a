/* Attention in int8: scores and sums of values exact, the softmax between them in float32 over all keys of a query, its
   probabilities rounded to uint8, each to the nearest or with what was left of those before it.  A task is a block of
   queries of one head.

   Many queries share keys: these, and the values, are packed once into panels like weights, and max_rows queries at a
   time are multiplied with them.  A few queries, as in decoding, read keys and values where they are.  What is left out
   of scores, the zero point of the keys times the sum of q - q.zero, is the same for all keys of a query: its softmax
   does not change. */
#include "kernels.h"

#include <math.h>
#include <string.h>

enum { TILE = 48 };             /* rounded up to max_rows, which is at most that: queries of a task */

struct attention {
    const struct mg_kernels *kernels;
    struct mg_target out, ungated;      /* ungated.q: unused */
    float ungated_scale;
    const int8_t *q, *k, *v;
    const float *gate;
    int32_t q_zero, v_zero;
    float unit, v_unit;         /* of a score as a base-2 logarithm; of a probability times a value */
    size_t q_batch, q_row, k_batch, k_row, v_batch, v_row, gate_width;
    int causal, diffuse;
    size_t group, n_head, t_q, t_k, d;
    size_t n_query, tile, tiles;        /* queries that share their keys: group * t_q; of a task; tasks */
    size_t panels, head_bytes, sum_panels;      /* of keys; packed bytes of a head; panels of elements of values */
    int8_t *packed;             /* NULL: few queries.  For each head: keys, values, then start (keys) s32 */
    struct mg_scratch scratch;
};

/* The packed parts of a head. */
struct head {
    int8_t *keys, *values;
    int32_t *start;
};

static size_t key_bytes(const struct attention *job) { return MG_PANEL * mg_round_up(job->d, 4); }

static size_t value_bytes(const struct attention *job) { return MG_PANEL * mg_round_up(job->t_k, MG_PANEL); }

static struct head head_of(const struct attention *job, size_t index)
{
    int8_t *at = job->packed + index * job->head_bytes, *values = at + job->panels * key_bytes(job);
    return (struct head){at, values, (int32_t *)(values + job->sum_panels * value_bytes(job))};
}

/* MG_PANEL keys and values of a head; beyond the last stand copies of it. */
static void pack_some(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    size_t index = task / job->panels, panel = task % job->panels, batch = index / job->n_head;
    size_t column = index % job->n_head * job->d, last = job->t_k - 1;
    const int8_t *k = job->k + batch * job->k_batch + column, *v = job->v + batch * job->v_batch + column;
    struct head head = head_of(job, index);
    (void)worker;
    for (size_t j = panel * MG_PANEL; j < (panel + 1) * MG_PANEL; j++) {
        const int8_t *key = k + mg_min(j, last) * job->k_row;
        int32_t sum = mg_pack_key(head.keys + panel * key_bytes(job), key, j % MG_PANEL, job->d);
        head.start[j] = -(128 + job->q_zero) * sum;     /* queries are offset by 128 */
    }
    for (size_t j = panel * MG_PANEL; j < (panel + 1) * MG_PANEL; j += 4) {
        const int8_t *value[4];
        for (size_t r = 0; r < 4; r++)
            value[r] = v + mg_min(j + r, last) * job->v_row;
        mg_pack_values(head.values + j * MG_PANEL, value_bytes(job), value, job->d);
    }
}

/* Room for `rows` queries. */
struct room {
    int32_t *scores, *acc;      /* (panels, rows, MG_PANEL), (sum_panels, rows, MG_PANEL) */
    uint8_t *q, *p;             /* (rows, d), (rows, n_keys), rounded up to 4 */
};

static size_t room_rows(const struct attention *job) { return job->packed != NULL ? job->kernels->max_rows : 1; }

static size_t room_bytes(const struct attention *job)
{
    size_t numbers = (job->panels + job->sum_panels) * MG_PANEL * sizeof(int32_t);
    return room_rows(job) * (numbers + mg_round_up(job->d, 4) + mg_round_up(job->t_k, 4));
}

static struct room room_of(const struct attention *job, size_t worker)
{
    size_t rows = room_rows(job);
    int32_t *scores = mg_scratch_of(&job->scratch, worker), *acc = scores + rows * job->panels * MG_PANEL;
    uint8_t *q = (uint8_t *)(acc + rows * job->sum_panels * MG_PANEL);
    return (struct room){scores, acc, q, q + rows * mg_round_up(job->d, 4)};
}

/* A query: position (row, t) as an index into (n_batch, t_q). */
static const int8_t *query_of(const struct attention *job, size_t index, size_t head)
{
    return job->q + index / job->t_q * job->q_batch + index % job->t_q * job->q_row + head * job->d;
}

static size_t seen_by(const struct attention *job, size_t index)
{
    return job->causal ? index % job->t_q + 1 + job->t_k - job->t_q : job->t_k;
}

static void score_panels(const struct attention *job, const struct room *room, const struct head *packed, size_t index,
                         size_t head, size_t rows, size_t n_keys)
{
    size_t d4 = mg_round_up(job->d, 4);
    for (size_t r = 0; r < rows; r++) {
        const int8_t *q = query_of(job, index + r, head);
        for (size_t i = 0; i < d4; i++)
            room->q[r * d4 + i] = i < job->d ? (uint8_t)(q[i] + 128) : 0;
    }
    for (size_t panel = 0; panel * MG_PANEL < n_keys; panel++)
        job->kernels->int8->score_panel(room->scores + panel * job->kernels->max_rows * MG_PANEL, room->q,
                                      packed->keys + panel * key_bytes(job), packed->start + panel * MG_PANEL, rows,
                                      job->d);
}

static void sum_panels(const struct attention *job, const struct room *room, const struct head *packed, size_t rows,
                       size_t n_keys)
{
    static const int32_t zeros[MG_PANEL];
    for (size_t panel = 0; panel < job->sum_panels; panel++)
        job->kernels->int8->sum_panel(room->acc + panel * job->kernels->max_rows * MG_PANEL, room->p,
                                      packed->values + panel * value_bytes(job), zeros, rows, n_keys);
}

/* Up to MG_PANEL elements of a query's result, from `column` of its head on; total: of its probabilities. */
static void finish_some(const struct attention *job, const int32_t *acc, uint32_t total, size_t index, size_t head,
                        size_t column)
{
    size_t n = mg_min(MG_PANEL, job->d - column), at = index * job->n_head + head;
    int8_t between[MG_PANEL];
    struct mg_target out = mg_target_at(job->out, at * job->d + column);
    struct mg_finish f = {.out = out,
                          .x = {.acc = acc, .scale = job->v_unit, .zero = job->v_zero * (int32_t)total}};
    if (job->gate == NULL) {
        job->kernels->finish(&f, n);
        return;
    }
    const float *gate = job->gate + at * job->gate_width;
    f.out = job->ungated;
    f.out.q = between;
    job->kernels->finish(&f, n);
    struct mg_finish gated = {.out = out,
                              .x = {.q = between, .scale = job->ungated_scale, .zero = job->ungated.zero}};
    if (job->gate_width == 1)
        gated.x.scale *= gate[0];
    else
        gated.factor = gate + column;
    job->kernels->finish(&gated, n);
}

/* Queries index .. index + rows - 1 of one head. */
static void attend_rows(const struct attention *job, const struct room *room, size_t batch, size_t index, size_t head,
                        size_t rows)
{
    const struct mg_int8_attention *int8 = job->kernels->int8;
    struct head packed = {0};
    size_t n_keys = 0, step = room_rows(job) * MG_PANEL;
    const size_t column = head * job->d;
    for (size_t r = 0; r < rows; r++)
        n_keys = mg_max(n_keys, seen_by(job, index + r));
    size_t p_row = mg_round_up(n_keys, 4);
    if (job->packed != NULL) {
        packed = head_of(job, batch * job->n_head + head);
        score_panels(job, room, &packed, index, head, rows, n_keys);
    } else {
        int8->score_keys(room->scores, query_of(job, index, head), job->q_zero, job->k + batch * job->k_batch + column,
                         job->k_row, n_keys, job->d);
    }
    uint32_t total[TILE];
    for (size_t r = 0; r < rows; r++) {
        size_t seen = seen_by(job, index + r);
        uint8_t *p = room->p + r * p_row;
        total[r] = (job->diffuse ? int8->weigh_diffused : int8->weigh)(p, room->scores + r * MG_PANEL, step, seen,
                                                                       job->unit);
        memset(p + seen, 0, p_row - seen);
    }
    if (job->packed != NULL)
        sum_panels(job, room, &packed, rows, n_keys);
    else
        int8->sum_values(room->acc, room->p, job->v + batch * job->v_batch + column, job->v_row, n_keys, job->d);
    for (size_t r = 0; r < rows; r++)
        for (size_t i = 0; i < job->sum_panels; i++)
            finish_some(job, room->acc + i * step + r * MG_PANEL, total[r], index + r, head, i * MG_PANEL);
}

static void attend_tile(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    struct room room = room_of(job, worker);
    size_t batch = task / job->tiles / job->n_head, head = task / job->tiles % job->n_head;
    size_t first = task % job->tiles * job->tile, end = mg_min(first + job->tile, job->n_query);
    for (size_t i = first, rows = room_rows(job); i < end; i += rows)
        attend_rows(job, &room, batch, batch * job->n_query + i, head, mg_min(rows, end - i));
}

static enum mg_status run(struct attention *job, size_t n_heads)
{
    size_t n_tasks = n_heads * job->tiles;
    if (!mg_get_scratch(&job->scratch, room_bytes(job), n_tasks))
        return MG_NO_MEMORY;
    if (job->packed != NULL)
        mg_run(pack_some, job, n_heads * job->panels, MG_MAX_THREADS);
    mg_run(attend_tile, job, n_tasks, job->scratch.n_workers);
    mg_free_scratch(&job->scratch);
    return MG_OK;
}

/* With what the sizes lead to, and memory for panels if they are wanted. */
static enum mg_status plan_and_run(struct attention *job, size_t n_shared)
{
    job->n_query = job->group * job->t_q;
    job->tile = mg_round_up(TILE, job->kernels->max_rows);
    job->tiles = (job->n_query + job->tile - 1) / job->tile;
    job->panels = mg_round_up(job->t_k, MG_PANEL) / MG_PANEL;
    job->sum_panels = mg_round_up(job->d, MG_PANEL) / MG_PANEL;
    job->head_bytes = job->panels * (key_bytes(job) + MG_PANEL * sizeof(int32_t)) + job->sum_panels * value_bytes(job);
    if (job->n_query <= job->kernels->int8->few_queries)
        return run(job, n_shared * job->n_head);
    job->packed = mg_take_memory(n_shared * job->n_head * job->head_bytes);
    if (job->packed == NULL)
        return MG_NO_MEMORY;
    enum mg_status status = run(job, n_shared * job->n_head);
    mg_give_memory(job->packed);
    return status;
}

enum mg_status mg_attention_static(const struct mg_tensor *out, const struct mg_tensor *ungated,
                                   const struct mg_tensor *q, const struct mg_tensor *k, const struct mg_tensor *v,
                                   const float *gate, size_t q_batch, size_t q_row, size_t k_batch, size_t k_row,
                                   size_t v_batch, size_t v_row, size_t gate_width, int causal, int diffuse,
                                   size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k, size_t d)
{
    struct attention job = {
        .kernels = mg_kernels(), .out = mg_target_of(out), .q = q->q, .k = k->q, .v = v->q, .gate = gate,
        .q_zero = q->zero, .v_zero = v->zero, .v_unit = v->scale / 255.0f,
        .unit = (float)(MG_LOG2_E * (double)q->scale * (double)k->scale / sqrt((double)d)),
        .q_batch = q_batch, .q_row = q_row, .k_batch = k_batch, .k_row = k_row, .v_batch = v_batch, .v_row = v_row,
        .gate_width = gate_width, .causal = causal, .diffuse = diffuse, .group = group, .n_head = n_head, .t_q = t_q,
        .t_k = t_k, .d = d};
    if (t_k == 0 || group == 0 || n_batch % group != 0 || (causal && t_q > t_k))
        return MG_BAD_VALUE;
    if (t_k > MG_MAX_ATTENTION || d > MG_MAX_ATTENTION || q->q == NULL || k->q == NULL || v->q == NULL)
        return MG_BAD_VALUE;
    if (!mg_is_grid(out) || !mg_is_grid(q) || !mg_is_grid(k) || !mg_is_grid(v))
        return MG_BAD_VALUE;
    if (gate != NULL) {
        if ((gate_width != 1 && gate_width != d) || ungated == NULL || !mg_is_grid(ungated))
            return MG_BAD_VALUE;
        job.ungated = mg_target_of(ungated);
        job.ungated_scale = ungated->scale;
    }
    if (n_batch == 0 || n_head == 0 || d == 0 || t_q == 0)
        return MG_OK;
    return plan_and_run(&job, n_batch / group);
}
