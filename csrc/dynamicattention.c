/* Attention of float32 numbers, computed in int8 with scales that are found on the way: a scale for each query and each
   key of a head; for BLOCK keys at a time a scale for each element of their values, and one for their
   probabilities, of which the largest becomes 255.  Keys are taken less their mean, which changes no softmax and leaves
   smaller numbers to round: after SageAttention (arXiv 2410.02367).  Sums over a block are exact, those over blocks
   float32, with the softmax online.

   A task is a block of queries of one head, whose keys and values are packed once into panels like weights. */
#include "kernels.h"

#include <math.h>
#include <string.h>

enum { BLOCK = MG_WEIGHED, TILE = 48, AHEAD = 8 };  /* TILE, rounded up to max_rows: queries of a task */

struct attention {
    const struct mg_kernels *kernels;
    const struct mg_attention_call *call;
    size_t tile, tiles, panels, wide, head_bytes;   /* panels of keys; d rounded up to panels; packed bytes of a head */
    char *packed;
    struct mg_scratch scratch;
};

/* The packed parts of a head. */
struct head {
    int8_t *keys, *values;      /* panels of keys; (d panels) for BLOCK keys after the other */
    int32_t *start;             /* of scores, for which queries are offset */
    float *key_scale, *value_scale;         /* (keys), (blocks, wide) */
};

static size_t key_bytes(const struct attention *job) { return MG_PANEL * mg_round_up(job->call->d, 4); }

static size_t blocks_of(const struct attention *job) { return (job->call->t_k + BLOCK - 1) / BLOCK; }

static size_t head_bytes(const struct attention *job)
{
    size_t values = blocks_of(job) * job->wide * (BLOCK + sizeof(float));
    return job->panels * (key_bytes(job) + MG_PANEL * (sizeof(int32_t) + sizeof(float))) + values;
}

static struct head head_of(const struct attention *job, size_t index)
{
    struct head head = {.keys = (int8_t *)job->packed + index * job->head_bytes};
    head.values = head.keys + job->panels * key_bytes(job);
    head.start = (int32_t *)(head.values + blocks_of(job) * job->wide * BLOCK);
    head.key_scale = (float *)(head.start + job->panels * MG_PANEL);
    head.value_scale = head.key_scale + job->panels * MG_PANEL;
    return head;
}

/* ---- keys and values ---- */

/* Rows of a head lie too far from each other for processors to see what comes next. */
MG_INLINE void fetch(uintptr_t row, size_t bytes)
{
    for (size_t i = 0; i < bytes; i += 64)
        __builtin_prefetch((const void *)(row + i));
}

/* d elements of a row as floats, in room if they have to be widened; and AHEAD rows further is fetched. */
static const float *row_at(const struct attention *job, const void *x, size_t at, size_t row, float *room)
{
    const uint16_t *half = (const uint16_t *)x + at;
    if (job->call->held == MG_HELD_HALF) {
        fetch((uintptr_t)half + AHEAD * row * sizeof *half, job->call->d * sizeof *half);
    } else {
        fetch((uintptr_t)x + (at + AHEAD * row) * sizeof(float), job->call->d * sizeof(float));
        return (const float *)x + at;
    }
    for (size_t i = 0; i < job->call->d; i++)
        room[i] = mg_from_bf16(half[i]);
    return room;
}

static void pack_keys(const struct attention *job, const struct head *head, size_t at, float *room)
{
    const struct mg_attention_call *c = job->call;
    float *mean = room, *row = room + job->wide;
    int8_t *q = (int8_t *)(row + job->wide);
    memset(mean, 0, c->d * sizeof *mean);
    for (size_t j = 0; j < c->t_k; j++) {
        const float *key = row_at(job, c->k, at + j * c->k_row, c->k_row, row);
        for (size_t i = 0; i < c->d; i++)
            mean[i] += key[i];
    }
    for (size_t i = 0; i < c->d; i++)
        mean[i] /= (float)c->t_k;
    for (size_t j = 0; j < job->panels * MG_PANEL; j++) {
        head->key_scale[j] = 0.0f;
        memset(q, 0, c->d);
        if (j < c->t_k) {
            const float *key = row_at(job, c->k, at + j * c->k_row, c->k_row, row);
            for (size_t i = 0; i < c->d; i++)
                row[i] = key[i] - mean[i];
            head->key_scale[j] = job->kernels->quantize_row(q, row, c->d);
        }
        int8_t *panel = head->keys + j / MG_PANEL * key_bytes(job);
        head->start[j] = -job->kernels->offset * mg_pack_key(panel, q, j % MG_PANEL, c->d);
    }
}

/* n <= BLOCK values.  Adding 1.5 * 2^23 leaves the nearest integer in the low bits. */
static void pack_block(const struct attention *job, int8_t *panels, float *scale, size_t at, size_t n, float *room)
{
    const struct mg_attention_call *c = job->call;
    float *inverse = room, *row = room + job->wide;
    int8_t *q = (int8_t *)(row + job->wide);
    const int8_t *four[4] = {q, q + job->wide, q + 2 * job->wide, q + 3 * job->wide};
    memset(scale, 0, job->wide * sizeof *scale);
    for (size_t j = 0; j < n; j++) {
        const float *value = row_at(job, c->v, at + j * c->v_row, c->v_row, row);
        for (size_t i = 0; i < c->d; i++)
            scale[i] = fabsf(value[i]) > scale[i] ? fabsf(value[i]) : scale[i];
    }
    for (size_t i = 0; i < c->d; i++) {
        inverse[i] = scale[i] < 1e-30f ? 0.0f : 127.0f / scale[i];
        scale[i] /= 127.0f;
    }
    for (size_t j = 0; j < BLOCK; j += 4) {
        memset(q, 0, 4 * job->wide);
        for (size_t r = 0; r < 4 && j + r < n; r++) {
            const float *value = row_at(job, c->v, at + (j + r) * c->v_row, c->v_row, row);
            for (size_t i = 0; i < c->d; i++) {
                float steps = value[i] * inverse[i] + 12582912.0f;
                uint32_t bits;
                memcpy(&bits, &steps, sizeof bits);
                q[r * job->wide + i] = (int8_t)bits;
            }
        }
        mg_pack_values(panels + j * MG_PANEL, MG_PANEL * BLOCK, four, c->d);
    }
}

/* The keys of a head, or some of its values. */
static void pack_some(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    const struct mg_attention_call *c = job->call;
    size_t parts = 1 + blocks_of(job), index = task / parts, part = task % parts;
    size_t batch = index / c->n_head, column = index % c->n_head * c->d;
    struct head head = head_of(job, index);
    float *room = mg_scratch_of(&job->scratch, worker);
    if (part == 0) {
        pack_keys(job, &head, batch * c->k_batch + column, room);
        return;
    }
    size_t block = part - 1, first = block * BLOCK;
    pack_block(job, head.values + block * job->wide * BLOCK, head.value_scale + block * job->wide,
               batch * c->v_batch + first * c->v_row + column, mg_min(BLOCK, c->t_k - first), room);
}

/* ---- queries ---- */

/* Room for max_rows queries. */
struct room {
    int32_t *scores, *acc;      /* (BLOCK / MG_PANEL, rows, MG_PANEL), (rows, MG_PANEL) */
    float *o;                   /* (rows, wide) */
    int8_t *q, *steps;          /* (rows), as dot_panel reads them; (d), as they come */
    uint8_t *p;                 /* (rows, keys of a block), rounded up to 4 */
    size_t *seen;               /* and of each row: keys, and the numbers of the softmax */
    float *scale, *top, *sum, *keep, *add;
};

static size_t q_bytes(const struct attention *job) { return mg_row_bytes(job->kernels, job->call->d); }

static size_t room_bytes(const struct attention *job)
{
    size_t numbers = BLOCK + MG_PANEL + job->wide + 5;
    size_t bytes = job->kernels->max_rows * (numbers * sizeof(float) + sizeof(size_t) + q_bytes(job) + BLOCK);
    return mg_max(bytes + job->wide, job->wide * (2 * sizeof(float) + 4));      /* of pack_keys and pack_block */
}

static struct room room_of(const struct attention *job, size_t worker)
{
    size_t rows = job->kernels->max_rows;
    struct room room = {.scores = mg_scratch_of(&job->scratch, worker)};
    room.acc = room.scores + rows * BLOCK;
    room.o = (float *)(room.acc + rows * MG_PANEL);
    room.seen = (size_t *)(room.o + rows * job->wide);
    room.scale = (float *)(room.seen + rows);
    room.top = room.scale + rows;
    room.sum = room.top + rows;
    room.keep = room.sum + rows;
    room.add = room.keep + rows;
    room.q = (int8_t *)(room.add + rows);
    room.steps = room.q + rows * q_bytes(job);
    room.p = (uint8_t *)room.steps + job->wide;
    return room;
}

static const float *query_of(const struct mg_attention_call *c, size_t index, size_t head)
{
    return c->q + index / c->t_q * c->q_batch + index % c->t_q * c->q_row + head * c->d;
}

static float *out_of(const struct mg_attention_call *c, size_t index, size_t head)
{
    return c->out + (index * c->n_head + head) * c->d;
}

static void load_queries(const struct attention *job, const struct room *room, size_t index, size_t head, size_t rows)
{
    const struct mg_attention_call *c = job->call;
    const float unit = (float)(MG_LOG2_E / sqrt((double)c->d));
    for (size_t r = 0; r < rows; r++) {
        size_t t = (index + r) % c->t_q;
        room->scale[r] = unit * job->kernels->quantize_row(room->steps, query_of(c, index + r, head), c->d);
        job->kernels->pack_rows(room->q + r * q_bytes(job), room->steps, 1, c->d, 0);
        room->seen[r] = c->causal ? t + 1 + c->t_k - c->t_q : c->t_k;
        room->top[r] = MG_LOWEST;
        room->sum[r] = 0.0f;
    }
    memset(room->o, 0, rows * job->wide * sizeof *room->o);
}

/* Probabilities of n keys from `first` on, and what they do to the sums so far. */
static void weigh(const struct attention *job, const struct room *room, const struct head *head, size_t first,
                  size_t n, size_t rows)
{
    size_t step = job->kernels->max_rows * MG_PANEL, p_row = mg_round_up(n, 4);
    for (size_t r = 0; r < rows; r++) {
        size_t some = room->seen[r] > first ? mg_min(n, room->seen[r] - first) : 0;
        float before = room->top[r], top = MG_LOWEST, sum = 0.0f;
        if (some > 0)
            sum = job->kernels->int8->weigh_some(room->p + r * p_row, room->scores + r * MG_PANEL, step,
                                                 head->key_scale + first, some, room->scale[r], &top);
        memset(room->p + r * p_row + some, 0, p_row - some);
        room->top[r] = fmaxf(before, top);
        room->keep[r] = top > before ? exp2f(before - top) : 1.0f;
        room->add[r] = top > before ? 1.0f : exp2f(top - before);
        room->sum[r] = room->sum[r] * room->keep[r] + sum * room->add[r];
    }
}

static void add_values(const struct attention *job, const struct room *room, const struct head *head, size_t first,
                       size_t n, size_t rows)
{
    static const int32_t zeros[MG_PANEL];
    const int8_t *values = head->values + first * job->wide;
    const float *scale = head->value_scale + first / BLOCK * job->wide;
    for (size_t r = 0; r < rows; r++) {
        float keep = room->keep[r], *o = room->o + r * job->wide;
        if (keep == 1.0f)
            continue;
        for (size_t i = 0; i < job->wide; i++)
            o[i] *= keep;
    }
    for (size_t i = 0; i < job->wide; i += MG_PANEL) {
        job->kernels->int8->value_panel(room->acc, room->p, values + i * BLOCK, zeros, rows, n);
        struct mg_finish_tile t = {.row = {.out = {.x = room->o + i}, .x = {.acc = room->acc},
                                           .residual = {.x = room->o + i}, .factor = scale + i},
                                   .scale = room->add, .scale_step = 1, .stride = job->wide, .rows = rows};
        mg_finish_rows(job->kernels, &t, MG_PANEL);
    }
}

static void store_queries(const struct attention *job, const struct room *room, size_t index, size_t head, size_t rows)
{
    const struct mg_attention_call *c = job->call;
    for (size_t r = 0; r < rows; r++) {
        size_t at = (index + r) * c->n_head + head;
        const float *o = room->o + r * job->wide, *gate = c->gate != NULL ? c->gate + at * c->gate_width : NULL;
        float *out = out_of(c, index + r, head), scale = 1.0f / room->sum[r];
        if (gate != NULL && c->gate_width == 1)
            scale *= gate[0];
        for (size_t i = 0; i < c->d; i++)
            out[i] = o[i] * scale;
        for (size_t i = 0; gate != NULL && c->gate_width != 1 && i < c->d; i++)
            out[i] *= gate[i];
    }
}

static void attend_rows(const struct attention *job, const struct room *room, const struct head *packed, size_t index,
                        size_t head, size_t rows)
{
    size_t n_keys = 0, step = job->kernels->max_rows * MG_PANEL;
    load_queries(job, room, index, head, rows);
    for (size_t r = 0; r < rows; r++)
        n_keys = mg_max(n_keys, room->seen[r]);
    for (size_t first = 0; first < n_keys; first += BLOCK) {
        size_t n = mg_min(BLOCK, n_keys - first);
        for (size_t i = 0; i * MG_PANEL < n; i++)
            job->kernels->dot_panel(room->scores + i * step, room->q,
                                    packed->keys + (first / MG_PANEL + i) * key_bytes(job),
                                    packed->start + first + i * MG_PANEL, rows, job->call->d);
        weigh(job, room, packed, first, n, rows);
        add_values(job, room, packed, first, n, rows);
    }
    store_queries(job, room, index, head, rows);
}

static void attend_tile(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    struct room room = room_of(job, worker);
    size_t index = task / job->tiles, batch = index / job->call->n_head, n_query = job->call->group * job->call->t_q;
    size_t first = task % job->tiles * job->tile, end = mg_min(first + job->tile, n_query);
    struct head packed = head_of(job, index);
    for (size_t i = first, rows = job->kernels->max_rows; i < end; i += rows) {
        size_t some = mg_min(rows, end - i), head = index % job->call->n_head, at = batch * n_query + i;
        for (size_t r = 0; r < some; r++)
            fetch((uintptr_t)out_of(job->call, at + r, head), job->call->d * sizeof(float));
        for (size_t r = some; r < mg_min(2 * rows, end - i); r++)
            fetch((uintptr_t)query_of(job->call, at + r, head), job->call->d * sizeof(float));
        attend_rows(job, &room, &packed, at, head, some);
    }
}

enum mg_status mg_attend_int8(const struct mg_attention_call *call, size_t n_shared)
{
    struct attention job = {.kernels = mg_kernels(), .call = call};
    size_t n_heads = n_shared * call->n_head, n_query = call->group * call->t_q;
    job.tile = mg_round_up(TILE, job.kernels->max_rows);
    job.tiles = (n_query + job.tile - 1) / job.tile;
    job.panels = mg_round_up(call->t_k, MG_PANEL) / MG_PANEL;
    job.wide = mg_round_up(call->d, MG_PANEL);
    job.head_bytes = head_bytes(&job);
    job.packed = mg_take_memory(n_heads * job.head_bytes);
    if (job.packed == NULL)
        return MG_NO_MEMORY;
    enum mg_status status = MG_NO_MEMORY;
    if (mg_get_scratch(&job.scratch, room_bytes(&job), n_heads * mg_max(job.tiles, 1 + blocks_of(&job)))) {
        mg_run(pack_some, &job, n_heads * (1 + blocks_of(&job)), job.scratch.n_workers);
        mg_run(attend_tile, &job, n_heads * job.tiles, job.scratch.n_workers);
        mg_free_scratch(&job.scratch);
        status = MG_OK;
    }
    mg_give_memory(job.packed);
    return status;
}
