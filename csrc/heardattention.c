/* Attention to what the encoder heard, whose keys and values are int8 with a scale for each: they are packed once into
   panels like weights, and then read for each token.  Queries and the weights of values have 16 bits, multiplied as such
   or in two rows of bytes: integer products do what would else be widening of every key, and read nothing but the panels.

   For each head and query: its scores of all keys, their softmax times the values' scales, and the sum of the values. */
#include "heardrows.h"

#include <math.h>
#include <string.h>

enum { TILE = 16 };             /* queries of a task */

/* ---- keys and values ---- */

static size_t panels_of(size_t n) { return mg_round_up(n, MG_PANEL) / MG_PANEL; }

static size_t padded(size_t t_k) { return panels_of(t_k) * MG_PANEL; }

/* Bytes of a head's keys, with the sums of their elements, and of its values. */
static size_t head_keys(size_t t_k, size_t d) { return padded(t_k) * (mg_round_up(d, 4) + sizeof(int32_t)); }

static size_t head_values(size_t t_k, size_t d) { return mg_round_up(t_k, 4) * panels_of(d) * MG_PANEL; }

/* Both begin with a scale for each key or value. */
size_t mg_heard_bytes(int values, size_t n_head, size_t t_k, size_t d)
{
    size_t head = values ? head_values(t_k, d) : head_keys(t_k, d);
    return mg_round_up(padded(t_k) * sizeof(float) + n_head * head, 64);
}

struct pack {
    int8_t *packed;
    const int8_t *x;
    const float *scale;
    size_t n_head, t_k, d;
    int values;
};

static void pack_keys(int8_t *panels, const struct pack *job, const int8_t *key)
{
    size_t panel = MG_PANEL * mg_round_up(job->d, 4), row = job->n_head * job->d;
    int32_t *sums = (int32_t *)(panels + panels_of(job->t_k) * panel);
    memset(panels + (panels_of(job->t_k) - 1) * panel, 0, panel);
    memset(sums, 0, padded(job->t_k) * sizeof *sums);
    for (size_t j = 0; j < job->t_k; j++)
        sums[j] = mg_pack_key(panels + j / MG_PANEL * panel, key + j * row, j % MG_PANEL, job->d);
}

static void pack_values(int8_t *panels, const struct pack *job, const int8_t *value)
{
    static const int8_t zeros[MG_PANEL];
    size_t row = job->n_head * job->d, panel = mg_round_up(job->t_k, 4) * MG_PANEL;
    for (size_t i = 0; i < job->d; i += MG_PANEL, panels += panel)
        for (size_t j = 0; j < job->t_k; j += 4) {
            const int8_t *four[4];
            for (size_t r = 0; r < 4; r++)
                four[r] = j + r < job->t_k ? value + (j + r) * row + i : zeros;
            mg_pack_values(panels + j * MG_PANEL, 0, four, mg_min(MG_PANEL, job->d - i));
        }
}

static int is_zero(const int8_t *x, size_t n)
{
    size_t i = 0;
    while (i < n && x[i] == 0)
        i++;
    return i == n;
}

static void pack_head(void *context, size_t task, size_t worker)
{
    const struct pack *job = context;
    size_t window = task / job->n_head, head = task % job->n_head, row = job->n_head * job->d;
    int8_t *packed = job->packed + window * mg_heard_bytes(job->values, job->n_head, job->t_k, job->d);
    int8_t *panels = packed + padded(job->t_k) * sizeof(float);
    const int8_t *x = job->x + window * job->t_k * row + head * job->d;
    (void)worker;
    if (head == 0) {
        memset(packed, 0, padded(job->t_k) * sizeof(float));
        memcpy(packed, job->scale + window * job->t_k, job->t_k * sizeof(float));
        for (size_t j = 0; job->values && j < job->t_k; j++)
            if (is_zero(x + j * row, row))
                ((float *)packed)[j] = 0.0f;
    }
    if (job->values)
        pack_values(panels + head * head_values(job->t_k, job->d), job, x);
    else
        pack_keys(panels + head * head_keys(job->t_k, job->d), job, x);
}

enum mg_status mg_pack_heard(int8_t *packed, int values, const int8_t *x, const float *scale, size_t n_batch,
                             size_t n_head, size_t t_k, size_t d)
{
    struct pack job = {packed, x, scale, n_head, t_k, d, values};
    if (t_k == 0 || t_k > MG_MAX_ATTENTION || d > MG_MAX_ATTENTION)
        return MG_BAD_VALUE;
    mg_run(pack_head, &job, n_batch * n_head, MG_MAX_THREADS);
    return MG_OK;
}

/* ---- queries ---- */

struct attention {
    const struct mg_kernels *kernels;
    float *out;
    const float *q, *gate;
    const int8_t *k, *v;
    size_t k_bytes, v_bytes, gate_width, n_query, n_head, t_k, d, tiles;       /* n_query: that share their keys */
    size_t some;                /* queries at a time */
    int wide;                   /* whether the instruction set multiplies 16 bits */
    struct mg_scratch scratch;
};

/* Of a worker, for some queries; of q and p either wide or the bytes. */
struct room {
    float *scores, *sums;       /* (panels of keys, some, MG_PANEL), (some, MG_PANEL) */
    float *weights, *scale;     /* (keys), those of a query; (some): what its sums are multiplied by */
    int32_t *acc;               /* (2 some, MG_PANEL) */
    int16_t *wide_q, *wide_p;   /* (some, d), (some, keys), rounded up to 4 */
    int8_t *q, *steps;          /* (2 some), as dot_panel reads them; (2, d), as they come */
    uint8_t *p;                 /* (2 some, keys rounded up to 4) */
};

static size_t q_bytes(const struct attention *job) { return mg_row_bytes(job->kernels, job->d); }

static size_t p_row(const struct attention *job) { return mg_round_up(job->t_k, 4); }

static size_t room_bytes(const struct attention *job)
{
    size_t floats = job->some * (padded(job->t_k) + 3 * MG_PANEL + 1) + padded(job->t_k);
    size_t bytes = 2 * job->some * (q_bytes(job) + p_row(job)) + 2 * job->d;
    if (job->wide)
        bytes = job->some * (mg_round_up(job->d, 4) + p_row(job)) * sizeof(int16_t);
    return floats * sizeof(float) + bytes;
}

static struct room room_of(const struct attention *job, size_t worker)
{
    struct room room = {.scores = mg_scratch_of(&job->scratch, worker)};
    room.sums = room.scores + job->some * padded(job->t_k);
    room.weights = room.sums + job->some * MG_PANEL;
    room.scale = room.weights + padded(job->t_k);
    room.acc = (int32_t *)(room.scale + job->some);
    room.wide_q = (int16_t *)(room.acc + 2 * job->some * MG_PANEL);
    room.wide_p = room.wide_q + job->some * mg_round_up(job->d, 4);
    room.q = (int8_t *)room.wide_q;
    room.p = (uint8_t *)room.q + 2 * job->some * q_bytes(job);
    room.steps = (int8_t *)room.p + 2 * job->some * p_row(job);
    return room;
}

/* n queries; scale: of their products with keys, as base-2 logarithms. */
static void load_queries(const struct attention *job, const struct room *room, const float *q, size_t n)
{
    const float unit = (float)(MG_LOG2_E / sqrt((double)job->d));
    for (size_t r = 0; r < n; r++) {
        struct mg_wide to = {room->wide_q + r * mg_round_up(job->d, 4), NULL, NULL};
        if (!job->wide)
            to = (struct mg_wide){NULL, (uint8_t *)room->steps, (uint8_t *)room->steps + job->d};
        room->scale[r] = unit * mg_wide_query(&to, q + r * job->n_head * job->d, job->d);
        if (!job->wide)
            job->kernels->pack_rows(room->q + 2 * r * q_bytes(job), room->steps, 2, job->d, 0);
    }
}

/* out (n, MG_PANEL): n queries times a panel of keys, the sums of whose elements are given, or weights times one of
   values. */
static void multiply(const struct attention *job, const struct room *room, float *out, const int8_t *panel,
                     const int32_t *sums, size_t n)
{
    const struct mg_kernels *kernels = job->kernels;
    int32_t start[MG_PANEL] = {0};
    if (job->wide) {
        kernels->int8->wide_panel(out, sums != NULL ? room->wide_q : room->wide_p, panel, n,
                                  sums != NULL ? job->d : job->t_k);
        return;
    }
    for (size_t j = 0; sums != NULL && !kernels->takes_zero && j < MG_PANEL; j++)
        start[j] = -kernels->offset * sums[j];
    if (sums != NULL)
        kernels->dot_panel(room->acc, room->q, panel, start, 2 * n, job->d);
    else
        kernels->int8->value_panel(room->acc, room->p, panel, start, 2 * n, job->t_k);
    for (size_t r = 0; r < n; r++, out += MG_PANEL) {
        const int32_t *high = room->acc + 2 * r * MG_PANEL, *low = high + MG_PANEL;
        for (size_t j = 0; j < MG_PANEL; j++)
            out[j] = MG_LOW_STEPS * (float)high[j] + (float)low[j];
    }
}

static void score(const struct attention *job, const struct room *room, const int8_t *keys, size_t n)
{
    size_t panel = MG_PANEL * mg_round_up(job->d, 4);
    const int32_t *sums = (const int32_t *)(keys + panels_of(job->t_k) * panel);
    for (size_t i = 0; i < panels_of(job->t_k); i++)
        multiply(job, room, room->scores + i * job->some * MG_PANEL, keys + i * panel, sums + i * MG_PANEL, n);
}

/* Scores become weights of values. */
static void weigh(const struct attention *job, const struct room *room, const float *k_scale, const float *v_scale,
                  size_t n)
{
    for (size_t r = 0; r < n; r++) {
        uint8_t *high = room->p + 2 * r * p_row(job);
        struct mg_heard_row row = {
            .to = {NULL, high, high + p_row(job)}, .weights = room->weights, .scores = room->scores + r * MG_PANEL,
            .stride = job->some * MG_PANEL, .k_scale = k_scale, .v_scale = v_scale, .unit = room->scale[r],
            .n = job->t_k};
        if (job->wide)
            row.to = (struct mg_wide){room->wide_p + r * p_row(job), NULL, NULL};
        job->kernels->rows->weigh_heard(&row, 0, 1, &room->scale[r]);
    }
}

static void add_values(const struct attention *job, const struct room *room, const int8_t *values, size_t index,
                       size_t head, size_t n)
{
    for (size_t i = 0; i < job->d; i += MG_PANEL, values += p_row(job) * MG_PANEL) {
        multiply(job, room, room->sums, values, NULL, n);
        for (size_t r = 0; r < n; r++) {
            size_t at = (index + r) * job->n_head + head, columns = mg_min(MG_PANEL, job->d - i);
            const float *gate = job->gate != NULL ? job->gate + at * job->gate_width : NULL;
            float *out = job->out + at * job->d + i;
            for (size_t j = 0; j < columns; j++)
                out[j] = room->sums[r * MG_PANEL + j] * room->scale[r];
            for (size_t j = 0; gate != NULL && j < columns; j++)
                out[j] *= gate[job->gate_width == 1 ? 0 : i + j];
        }
    }
}

static void attend_tile(void *context, size_t task, size_t worker)
{
    const struct attention *job = context;
    struct room room = room_of(job, worker);
    size_t window = task / job->tiles / job->n_head, head = task / job->tiles % job->n_head;
    size_t first = task % job->tiles * TILE, end = mg_min(first + TILE, job->n_query);
    const int8_t *k = job->k + window * job->k_bytes, *v = job->v + window * job->v_bytes;
    size_t scales = padded(job->t_k) * sizeof(float);
    for (size_t i = first; i < end; i += job->some) {
        size_t index = window * job->n_query + i, n = mg_min(job->some, end - i);
        load_queries(job, &room, job->q + (index * job->n_head + head) * job->d, n);
        score(job, &room, k + scales + head * head_keys(job->t_k, job->d), n);
        weigh(job, &room, (const float *)k, (const float *)v, n);
        add_values(job, &room, v + scales + head * head_values(job->t_k, job->d), index, head, n);
    }
}

enum mg_status mg_attention_heard(float *out, const float *q, const int8_t *k, const int8_t *v, const float *gate,
                                  size_t gate_width, size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k,
                                  size_t d)
{
    struct attention job = {
        .kernels = mg_kernels(), .out = out, .q = q, .gate = gate, .k = k, .v = v, .gate_width = gate_width,
        .k_bytes = mg_heard_bytes(0, n_head, t_k, d), .v_bytes = mg_heard_bytes(1, n_head, t_k, d),
        .n_query = group * t_q, .n_head = n_head, .t_k = t_k, .d = d};
    if (t_k == 0 || t_k > MG_MAX_ATTENTION || d > MG_MAX_ATTENTION || group == 0 || n_batch % group != 0)
        return MG_BAD_VALUE;
    if (gate != NULL && gate_width != 1 && gate_width != d)
        return MG_BAD_VALUE;
    if (n_batch == 0 || n_head == 0 || d == 0 || t_q == 0)
        return MG_OK;
    job.tiles = (job.n_query + TILE - 1) / TILE;
    job.some = mg_max(1, mg_min(job.n_query, job.kernels->max_rows / 2));
    job.wide = job.kernels->int8->wide_panel != NULL;
    size_t n_tasks = n_batch / group * n_head * job.tiles;
    if (!mg_get_scratch(&job.scratch, room_bytes(&job), n_tasks))
        return MG_NO_MEMORY;
    mg_run(attend_tile, &job, n_tasks, job.scratch.n_workers);
    mg_free_scratch(&job.scratch);
    return MG_OK;
}
