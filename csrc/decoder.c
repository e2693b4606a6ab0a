/* The decoder's blocks in one call, in w8a8-dynamic: what minigate/model.py says of them, made of the calls that its
   operators make, with the same results to the bit.  For one token these do so little that calling them one by one from
   Python takes a fifth to a third of the time. */
#include "kernels.h"

#include <string.h>

struct decoder {
    const struct mg_decoder_block *block;
    const struct mg_decoder_cache *cache;       /* of the block */
    const struct mg_decoder_dims *dims;
    size_t rows;                /* m * t */
    float *x, *h, *q;           /* (rows, n_state): residual stream; layer norms and attention; queries */
    float *gate;                /* (rows, n_head) */
    uint16_t *half;             /* (rows, n_state): keys or values of the new positions */
    int8_t *steps, *hidden;     /* (rows, n_state), (rows, n_hidden) in int8, with */
    float *scale, *hidden_scale;        /* (rows) */
};

static enum mg_status norm(const struct decoder *d, const struct mg_norm *ln)
{
    return mg_layer_norm_rows(d->h, d->steps, d->scale, d->x, ln->weight, ln->bias, d->dims->eps, d->rows,
                              d->dims->n_state);
}

/* A linear of `steps`, n_state to n_state. */
static enum mg_status project(const struct decoder *d, float *out, uint16_t *half, const struct mg_linear *w,
                              const float *residual)
{
    size_t n = d->dims->n_state;
    return mg_linear_int8(out, half, d->steps, d->scale, w->packed, w->scale, w->bias, residual, 0, d->rows, n, n);
}

/* Keys or values of the new positions go behind those of the others. */
static enum mg_status keep(const struct decoder *d, uint16_t *kept, const struct mg_linear *w)
{
    const struct mg_decoder_dims *s = d->dims;
    size_t some = s->t * s->n_state;
    enum mg_status status = project(d, NULL, d->half, w, NULL);
    for (size_t i = 0; status == MG_OK && i < s->m; i++)
        memcpy(kept + (i * s->n_ctx + s->length) * s->n_state, d->half + i * some, some * sizeof *kept);
    return status;
}

/* The gate of h, whose layer norm it is; NULL if there is none. */
static enum mg_status open_gate(const struct decoder *d, const struct mg_gate *gate, const float **found)
{
    const struct mg_decoder_dims *s = d->dims;
    *found = gate->kind == MG_NO_GATE ? NULL : d->gate;
    return *found != NULL ? mg_gate(d->gate, gate, d->h, d->rows, s->n_head, s->n_state / s->n_head) : MG_OK;
}

/* x += linear of what attention made of h */
static enum mg_status add_attended(const struct decoder *d, const struct mg_linear *w)
{
    enum mg_status status = mg_quantize_rows(d->steps, d->scale, d->h, d->rows, d->dims->n_state);
    return status != MG_OK ? status : project(d, d->x, NULL, w, d->x);
}

static enum mg_status self_attention(const struct decoder *d)
{
    const struct mg_decoder_dims *s = d->dims;
    const struct mg_decoder_block *b = d->block;
    const float *gate = NULL;
    size_t n = s->n_state, batch = s->n_ctx * n;
    enum mg_status status = norm(d, &b->attn_ln);
    if (status == MG_OK)
        status = project(d, d->q, NULL, &b->attn_query, NULL);
    if (status == MG_OK)
        status = keep(d, d->cache->k, &b->attn_key);
    if (status == MG_OK)
        status = keep(d, d->cache->v, &b->attn_value);
    if (status == MG_OK)
        status = open_gate(d, &b->attn_gate, &gate);
    if (status == MG_OK)
        status = mg_attention(d->h, d->q, d->cache->k, d->cache->v, MG_HELD_HALF, gate, s->t * n, n, batch, n, batch, n, 1,
                              1, MG_BF16, s->m, 1, s->n_head, s->t, s->length + s->t, n / s->n_head);
    return status == MG_OK ? add_attended(d, &b->attn_out) : status;
}

static enum mg_status cross_attention(const struct decoder *d)
{
    const struct mg_decoder_dims *s = d->dims;
    const struct mg_decoder_block *b = d->block;
    const float *gate = NULL;
    enum mg_status status = norm(d, &b->cross_attn_ln);
    if (status == MG_OK)
        status = project(d, d->q, NULL, &b->cross_attn_query, NULL);
    if (status == MG_OK)
        status = open_gate(d, &b->cross_attn_gate, &gate);
    if (status == MG_OK)
        status = mg_attention_heard(d->h, d->q, d->cache->cross_k, d->cache->cross_v, gate, 1, s->m, s->group, s->n_head,
                                    s->t, s->t_audio, s->n_state / s->n_head);
    return status == MG_OK ? add_attended(d, &b->cross_attn_out) : status;
}

static enum mg_status mlp(const struct decoder *d)
{
    const struct mg_linear *up = &d->block->mlp_0, *down = &d->block->mlp_2;
    size_t n = d->dims->n_state, hidden = d->dims->n_hidden;
    enum mg_status status = norm(d, &d->block->mlp_ln);
    if (status == MG_OK)
        status = mg_linear_int8_rows(d->hidden, d->hidden_scale, d->steps, d->scale, up->packed, up->scale, up->bias, 1,
                                     d->rows, hidden, n);
    if (status == MG_OK)
        status = mg_linear_int8(d->x, NULL, d->hidden, d->hidden_scale, down->packed, down->scale, down->bias, d->x, 0,
                                d->rows, n, hidden);
    return status;
}

int mg_fits(const struct mg_decoder_dims *d)
{
    if (d->n_head == 0 || d->group == 0 || d->n_state % d->n_head != 0 || d->m % d->group != 0)
        return 0;
    return d->length <= d->n_ctx && d->t <= d->n_ctx - d->length && d->t_audio > 0;
}

enum mg_status mg_decoder_blocks(float *x, const struct mg_decoder_block *blocks, const struct mg_decoder_cache *caches,
                                 size_t n_blocks, const struct mg_decoder_dims *dims)
{
    size_t rows = dims->m * dims->t, some = rows * dims->n_state;
    if (!mg_fits(dims))
        return MG_BAD_VALUE;
    char *room = mg_take_memory((2 + dims->n_head) * rows * sizeof(float) +
                                some * (2 * sizeof(float) + sizeof(uint16_t) + 1) + rows * dims->n_hidden);
    if (room == NULL)
        return MG_NO_MEMORY;
    struct decoder d = {.dims = dims, .rows = rows, .x = x, .h = (float *)room};
    d.q = d.h + some;
    d.scale = d.q + some;
    d.hidden_scale = d.scale + rows;
    d.gate = d.hidden_scale + rows;
    d.half = (uint16_t *)(d.gate + rows * dims->n_head);
    d.steps = (int8_t *)(d.half + some);
    d.hidden = d.steps + some;
    enum mg_status status = MG_OK;
    for (size_t i = 0; i < n_blocks && status == MG_OK; i++) {
        d.block = &blocks[i];
        d.cache = &caches[i];
        status = self_attention(&d);
        if (status == MG_OK)
            status = cross_attention(&d);
        if (status == MG_OK)
            status = mlp(&d);
    }
    mg_give_memory(room);
    return status;
}
