/* Attention as the interface has it.  Many queries: a task is a block of queries of one head.  A few, as in decoding,
   where reading keys and values is all the work: a task is a range of keys, with all heads, so that memory is read in
   order; the partial results are merged.  Tasks do not depend on the number of threads, so neither does a result. */
#include "kernels.h"

#include <math.h>
#include <stdlib.h>

enum { MAX_QUERIES = MG_BF16_QUERIES, RANGE_KEYS = 128 };      /* of any instruction set; a multiple of MG_KEYS */

struct attention {
    const struct mg_kernels *kernels;
    const struct mg_bf16 *bf16; /* NULL: in float32 */
    float *out, *lse;
    const float *q, *gate;
    const void *k, *v;          /* as held */
    enum mg_held held;
    size_t q_batch, q_row, k_batch, k_row, v_batch, v_row, gate_width;
    int causal;
    size_t group, n_head, t_q, t_k, d;
    size_t n_query;             /* that share their keys: group * t_q */
    size_t block;               /* queries of a task */
    size_t parts;               /* blocks of queries, or ranges of keys */
    float *top, *sum, *o;       /* partial results: (n_batch / group, parts, n_query, n_head[, d]) */
    struct mg_scratch scratch;
};

/* Query i of those that share keys: position (row, t) as an index into (n_batch, t_q), and where its heads begin. */
static size_t index_of(const struct attention *job, size_t batch, size_t i) { return batch * job->n_query + i; }

static const float *query_of(const struct attention *job, size_t index)
{
    return job->q + index / job->t_q * job->q_batch + index % job->t_q * job->q_row;
}

static size_t seen_by(const struct attention *job, size_t index)
{
    return job->causal ? index % job->t_q + 1 + job->t_k - job->t_q : job->t_k;
}

static void widen(float *out, const uint16_t *x, size_t x_row, size_t rows, size_t n)
{
    for (size_t r = 0; r < rows; r++, out += n)
        for (size_t i = 0; i < n; i++)
            out[i] = mg_from_bf16(x[r * x_row + i]);
}

static size_t widened_floats(const struct attention *job)
{
    return job->held != MG_HELD_FLOAT ? mg_round_up(2 * job->t_k * job->d, 16) : 0;
}

/* The keys and values of a block as floats, in room for those of a head. */
static void widen_block(const struct attention *job, struct mg_attention_block *block, size_t batch, size_t head,
                        float *room)
{
    const void *k = mg_held_at(job->k, batch * job->k_batch + head * job->d, job->held);
    const void *v = mg_held_at(job->v, batch * job->v_batch + head * job->d, job->held);
    float *values = room + job->t_k * job->d;
    widen(room, k, job->k_row, job->t_k, job->d);
    widen(values, v, job->v_row, job->t_k, job->d);
    block->k = room;
    block->v = values;
    block->k_row = block->v_row = job->d;
}

static void attend_block(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    size_t batch = task / job->parts / job->n_head, head = task / job->parts % job->n_head;
    size_t first = task % job->parts * job->block;
    float *out[MAX_QUERIES];
    const float *q[MAX_QUERIES], *gate[MAX_QUERIES];
    size_t seen[MAX_QUERIES];
    struct mg_attention_block block = {
        .out = out, .q = q, .gate = job->gate != NULL ? gate : NULL, .seen = seen,
        .lse = job->lse != NULL ? job->lse + (batch * job->n_head + head) * job->t_q + first : NULL,
        .k = mg_held_at(job->k, batch * job->k_batch + head * job->d, job->held),
        .v = mg_held_at(job->v, batch * job->v_batch + head * job->d, job->held),
        .k_row = job->k_row, .v_row = job->v_row, .gate_width = job->gate_width,
        .n_query = mg_min(job->block, job->n_query - first), .d = job->d};
    for (size_t i = 0; i < block.n_query; i++) {
        size_t index = index_of(job, batch, first + i), at = index * job->n_head + head;
        out[i] = job->out + at * job->d;
        q[i] = query_of(job, index) + head * job->d;
        seen[i] = seen_by(job, index);
        if (job->gate != NULL)
            gate[i] = job->gate + at * job->gate_width;
    }
    float *scratch = mg_scratch_of(&job->scratch, worker);
    if (job->held != MG_HELD_FLOAT) {
        widen_block(job, &block, batch, head, scratch);
        scratch += widened_floats(job);
    }
    if (job->bf16 != NULL)
        job->bf16->attend(job->bf16, &block, (uint32_t *)scratch);
    else
        job->kernels->attend(&block, scratch);
}

static enum mg_status attend_many(struct attention *job, size_t n_shared)
{
    size_t floats = job->bf16 != NULL ? job->bf16->attend_words(job->t_k, job->d) : job->kernels->attend_floats(job->d);
    job->block = job->bf16 != NULL ? MG_BF16_QUERIES : job->kernels->max_queries;
    job->parts = (job->n_query + job->block - 1) / job->block;
    size_t n_tasks = n_shared * job->n_head * job->parts;
    if (!mg_get_scratch(&job->scratch, (widened_floats(job) + floats) * sizeof(float), n_tasks))
        return MG_NO_MEMORY;
    mg_run(attend_block, job, n_tasks, job->scratch.n_workers);
    mg_free_scratch(&job->scratch);
    return MG_OK;
}

/* The keys and values of a range as floats, in room for RANGE_KEYS of each.  Keys are counted from the first one. */
static void widen_range(const struct attention *job, struct mg_attention_range *range, float *room)
{
    size_t n = job->n_head * job->d, keys = range->end_key - range->first_key;
    float *values = room + RANGE_KEYS * n;
    widen(room, mg_held_at(range->k, range->first_key * range->k_row, job->held), range->k_row, keys, n);
    widen(values, mg_held_at(range->v, range->first_key * range->v_row, job->held), range->v_row, keys, n);
    range->k = room - range->first_key * n;
    range->v = values - range->first_key * n;
    range->k_row = range->v_row = n;
    range->held = MG_HELD_FLOAT;
}

static void attend_range(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    size_t batch = task / job->parts, first = task % job->parts * RANGE_KEYS;
    size_t at = task * job->n_query * job->n_head;
    const float *q[MAX_QUERIES];
    size_t seen[MAX_QUERIES];
    struct mg_attention_range range = {
        .top = job->top + at, .sum = job->sum + at, .o = job->o + at * job->d, .q = q, .seen = seen,
        .k = mg_held_at(job->k, batch * job->k_batch, job->held),
        .v = mg_held_at(job->v, batch * job->v_batch, job->held),
        .held = job->held, .k_row = job->k_row, .v_row = job->v_row, .first_key = first,
        .end_key = mg_min(first + RANGE_KEYS, job->t_k),
        .n_query = job->n_query, .n_head = job->n_head, .d = job->d};
    if (job->held != MG_HELD_FLOAT && !job->kernels->reads_narrow)
        widen_range(job, &range, mg_scratch_of(&job->scratch, worker));
    for (size_t i = 0; i < job->n_query; i++) {
        q[i] = query_of(job, index_of(job, batch, i));
        seen[i] = seen_by(job, index_of(job, batch, i));
    }
    job->kernels->attend_range(&range);
}

/* One query: what its ranges have found, brought to the largest of their maxima. */
static void merge_ranges(void *context, size_t index, size_t worker)
{
    const struct attention *job = context;
    size_t batch = index / job->n_query, stride = job->n_query * job->n_head, d = job->d;
    (void)worker;
    for (size_t head = 0; head < job->n_head; head++) {
        size_t first = batch * job->parts * stride + index % job->n_query * job->n_head + head;
        size_t at = index * job->n_head + head;
        float *out = job->out + at * d, top = MG_LOWEST, sum = 0.0f;
        for (size_t r = 0; r < job->parts; r++)
            top = fmaxf(top, job->top[first + r * stride]);
        for (size_t i = 0; i < d; i++)
            out[i] = 0.0f;
        for (size_t r = 0; r < job->parts; r++) {
            const float *o = job->o + (first + r * stride) * d;
            float scale = exp2f(job->top[first + r * stride] - top);
            sum += scale * job->sum[first + r * stride];
            for (size_t i = 0; i < d; i++)
                out[i] += scale * o[i];
        }
        for (size_t i = 0; i < d; i++) {
            float gate = job->gate == NULL ? 1.0f : job->gate[at * job->gate_width + (job->gate_width == 1 ? 0 : i)];
            out[i] = out[i] / sum * gate;
        }
    }
}

static enum mg_status attend_few(struct attention *job, size_t n_shared)
{
    job->parts = (job->t_k + RANGE_KEYS - 1) / RANGE_KEYS;
    size_t n_results = n_shared * job->parts * job->n_query * job->n_head;
    job->top = malloc(n_results * (job->d + 2) * sizeof(float));
    if (job->top == NULL)
        return MG_NO_MEMORY;
    job->sum = job->top + n_results;
    job->o = job->sum + n_results;
    size_t room = 0;
    if (job->held != MG_HELD_FLOAT && !job->kernels->reads_narrow)
        room = 2 * RANGE_KEYS * job->n_head * job->d * sizeof(float);
    if (!mg_get_scratch(&job->scratch, room, n_shared * job->parts)) {
        free(job->top);
        return MG_NO_MEMORY;
    }
    mg_run(attend_range, job, n_shared * job->parts, job->scratch.n_workers);
    mg_run(merge_ranges, job, n_shared * job->n_query, MG_MAX_THREADS);
    mg_free_scratch(&job->scratch);
    free(job->top);
    return MG_OK;
}

enum mg_status mg_attention(float *out, const float *q, const void *k, const void *v, enum mg_held held,
                            const float *gate, size_t q_batch, size_t q_row, size_t k_batch, size_t k_row,
                            size_t v_batch, size_t v_row, size_t gate_width, int causal, enum mg_precision precision,
                            size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k, size_t d)
{
    struct attention job = {
        .kernels = mg_kernels(), .bf16 = precision == MG_BF16 ? mg_bf16() : NULL, .out = out, .q = q, .k = k, .v = v,
        .held = held, .gate = gate, .q_batch = q_batch, .q_row = q_row,
        .k_batch = k_batch, .k_row = k_row, .v_batch = v_batch, .v_row = v_row, .gate_width = gate_width,
        .causal = causal, .group = group, .n_head = n_head, .t_q = t_q, .t_k = t_k, .d = d, .n_query = group * t_q};
    if (t_k == 0 || group == 0 || n_batch % group != 0 || (causal && t_q > t_k))
        return MG_BAD_VALUE;
    if ((gate != NULL && gate_width != 1 && gate_width != d) || precision > MG_INT8 || held > MG_HELD_HALF)
        return MG_BAD_VALUE;
    if (precision == MG_INT8 && d > MG_MAX_ATTENTION)
        return MG_BAD_VALUE;
    if (n_batch == 0 || n_head == 0 || d == 0 || t_q == 0)
        return MG_OK;
    if (precision == MG_INT8) {
        struct mg_attention_call call = {
            .out = out, .q = q, .k = k, .v = v, .held = held, .gate = gate, .q_batch = q_batch,
            .q_row = q_row, .k_batch = k_batch, .k_row = k_row, .v_batch = v_batch, .v_row = v_row,
            .gate_width = gate_width, .causal = causal, .group = group, .n_head = n_head, .t_q = t_q, .t_k = t_k, .d = d};
        return mg_attend_int8(&call, n_batch / group);
    }
    if (job.n_query <= job.kernels->few_queries)
        return attend_few(&job, n_batch / group);
    return attend_many(&job, n_batch / group);
}

/* ---- training ---- */

enum mg_status mg_attention_lse(float *out, float *lse, const float *q, const float *k, const float *v,
                                size_t q_batch, size_t q_row, size_t k_batch, size_t k_row, size_t v_batch,
                                size_t v_row, int causal, size_t n_batch, size_t n_head, size_t t_q, size_t t_k,
                                size_t d)
{
    struct attention job = {
        .kernels = mg_kernels(), .out = out, .lse = lse, .q = q, .k = k, .v = v, .q_batch = q_batch, .q_row = q_row,
        .k_batch = k_batch, .k_row = k_row, .v_batch = v_batch, .v_row = v_row, .causal = causal, .group = 1,
        .n_head = n_head, .t_q = t_q, .t_k = t_k, .d = d, .n_query = t_q};
    if (t_k == 0 || (causal && t_q > t_k))
        return MG_BAD_VALUE;
    return n_batch == 0 || n_head == 0 || d == 0 || t_q == 0 ? MG_OK : attend_many(&job, n_batch);
}

struct backward {
    const struct mg_kernels *kernels;
    const struct mg_bf16 *bf16;         /* NULL: in float32 */
    struct mg_attention_head all;
    size_t q_batch, k_batch, v_batch, n_head;
    struct mg_scratch scratch;
};

static void backward_head(void *context, size_t task, size_t worker)
{
    const struct backward *job = context;
    struct mg_attention_head head = job->all;
    size_t batch = task / job->n_head, column = task % job->n_head * head.d;
    size_t queries = batch * head.t_q * head.dense_row + column, keys = batch * head.t_k * head.dense_row + column;
    head.dq += queries;
    head.dout += queries;
    head.out += queries;
    head.dk += keys;
    head.dv += keys;
    head.lse += task * head.t_q;
    head.q += batch * job->q_batch + column;
    head.k += batch * job->k_batch + column;
    head.v += batch * job->v_batch + column;
    if (job->bf16 != NULL)
        job->bf16->attend_backward(&head, mg_scratch_of(&job->scratch, worker));
    else
        job->kernels->attend_backward(&head, mg_scratch_of(&job->scratch, worker));
}

enum mg_status mg_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out,
                                     const float *lse, const float *q, const float *k, const float *v,
                                     size_t q_batch, size_t q_row, size_t k_batch, size_t k_row, size_t v_batch,
                                     size_t v_row, int causal, int bf16, size_t n_batch, size_t n_head, size_t t_q,
                                     size_t t_k, size_t d)
{
    struct backward job = {
        .kernels = mg_kernels(), .bf16 = bf16 ? mg_bf16() : NULL, .q_batch = q_batch, .k_batch = k_batch,
        .v_batch = v_batch, .n_head = n_head,
        .all = {.dq = dq, .dk = dk, .dv = dv, .dout = dout, .out = out, .lse = lse, .q = q, .k = k, .v = v,
                .dense_row = n_head * d, .q_row = q_row, .k_row = k_row, .v_row = v_row, .causal = causal,
                .t_q = t_q, .t_k = t_k, .d = d}};
    if (t_k == 0 || (causal && t_q > t_k))
        return MG_BAD_VALUE;
    if (n_batch == 0 || n_head == 0 || d == 0)
        return MG_OK;
    size_t words = job.bf16 != NULL ? job.bf16->attend_backward_words(t_k, d) : job.kernels->attend_backward_floats(d);
    if (!mg_get_scratch(&job.scratch, words * sizeof(float), n_batch * n_head))
        return MG_NO_MEMORY;
    mg_run(backward_head, &job, n_batch * n_head, job.scratch.n_workers);
    mg_free_scratch(&job.scratch);
    return MG_OK;
}
