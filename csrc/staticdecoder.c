/* The decoder's blocks in one call, in w8a8-static: as decoder.c, of tensors in int8. */
#include "kernels.h"

#include <string.h>

struct decoder {
    const struct mg_decoder_block *block;
    const struct mg_decoder_grids *grids;
    const struct mg_decoder_cache *cache;       /* all of the block */
    const struct mg_decoder_dims *dims;
    int diffuse;
    size_t rows;                /* m * t */
    int8_t *x, *h, *q, *some;   /* (rows, n_state): residual stream; layer norms and attention; queries; new keys, values */
    int8_t *hidden;             /* (rows, n_hidden) */
    float *floats, *gate;       /* (rows, n_state): h; (rows, n_head) */
};

static struct mg_tensor on(void *q, const struct mg_grid *grid) { return (struct mg_tensor){NULL, q, grid->scale, grid->zero}; }

static enum mg_status norm(const struct decoder *d, const struct mg_norm *ln, const struct mg_grid *from,
                           const struct mg_grid *to)
{
    struct mg_tensor out = on(d->h, to), x = on(d->x, from);
    return mg_layer_norm_static(&out, &x, ln->weight, ln->bias, d->dims->eps, d->rows, d->dims->n_state);
}

/* A linear of h, n_state to n_state. */
static enum mg_status project(const struct decoder *d, int8_t *to, const struct mg_linear *w, const struct mg_grid *from,
                              const struct mg_grid *grid)
{
    struct mg_tensor out = on(to, grid), a = on(d->h, from);
    size_t n = d->dims->n_state;
    return mg_linear_static(&out, &a, w->packed, w->scale, w->bias, NULL, 0, d->rows, n, n);
}

/* x += a linear of a (rows, k) */
static enum mg_status add(const struct decoder *d, const struct mg_tensor *a, size_t k, const struct mg_linear *w,
                          const struct mg_grid *from, const struct mg_grid *to)
{
    struct mg_tensor out = on(d->x, to), x = on(d->x, from);
    return mg_linear_static(&out, a, w->packed, w->scale, w->bias, &x, 0, d->rows, d->dims->n_state, k);
}

/* Keys or values of the new positions go behind those of the others. */
static enum mg_status keep(const struct decoder *d, int8_t *kept, const struct mg_linear *w, const struct mg_grid *from,
                           const struct mg_grid *to)
{
    const struct mg_decoder_dims *s = d->dims;
    size_t some = s->t * s->n_state;
    enum mg_status status = project(d, d->some, w, from, to);
    for (size_t i = 0; status == MG_OK && i < s->m; i++)
        memcpy(kept + (i * s->n_ctx + s->length) * s->n_state, d->some + i * some, some);
    return status;
}

/* The gate of h, whose layer norm it is; NULL if there is none. */
static enum mg_status open_gate(const struct decoder *d, const struct mg_gate *gate, const struct mg_grid *grid,
                                const float **found)
{
    const struct mg_decoder_dims *s = d->dims;
    struct mg_tensor floats = {.x = d->floats, .scale = 1.0f}, h = on(d->h, grid);
    *found = gate->kind == MG_NO_GATE ? NULL : d->gate;
    if (*found == NULL)
        return MG_OK;
    enum mg_status status = mg_add_static(&floats, &h, NULL, d->rows * s->n_state);
    return status == MG_OK ? mg_gate(d->gate, gate, d->floats, d->rows, s->n_head, s->n_state / s->n_head) : status;
}

static enum mg_status self_attention(const struct decoder *d)
{
    const struct mg_decoder_dims *s = d->dims;
    const struct mg_decoder_block *b = d->block;
    const struct mg_decoder_grids *g = d->grids;
    const float *gate = NULL;
    size_t n = s->n_state, batch = s->n_ctx * n;
    struct mg_tensor q = on(d->q, &g->attn_query), k = on(d->cache->k, &g->attn_key), v = on(d->cache->v, &g->attn_value);
    struct mg_tensor ungated = on(NULL, &g->attn), out = on(d->h, &g->attn);
    enum mg_status status = norm(d, &b->attn_ln, &g->input, &g->attn_ln);
    if (status == MG_OK)
        status = project(d, d->q, &b->attn_query, &g->attn_ln, &g->attn_query);
    if (status == MG_OK)
        status = keep(d, d->cache->k, &b->attn_key, &g->attn_ln, &g->attn_key);
    if (status == MG_OK)
        status = keep(d, d->cache->v, &b->attn_value, &g->attn_ln, &g->attn_value);
    if (status == MG_OK)
        status = open_gate(d, &b->attn_gate, &g->attn_ln, &gate);
    if (gate != NULL)
        out = on(d->h, &g->attn_gate);
    if (status == MG_OK)
        status = mg_attention_static(&out, &ungated, &q, &k, &v, gate, s->t * n, n, batch, n, batch, n, 1, 1, d->diffuse,
                                     s->m, 1, s->n_head, s->t, s->length + s->t, n / s->n_head);
    return status == MG_OK ? add(d, &out, n, &b->attn_out, &g->input, &g->attn_out) : status;
}

static enum mg_status cross_attention(const struct decoder *d)
{
    const struct mg_decoder_dims *s = d->dims;
    const struct mg_decoder_block *b = d->block;
    const struct mg_decoder_grids *g = d->grids;
    const float *gate = NULL;
    size_t n = s->n_state, batch = s->t_audio * n;
    struct mg_tensor q = on(d->q, &g->cross_attn_query), k = on((void *)d->cache->cross_k, &g->cross_attn_key);
    struct mg_tensor v = on((void *)d->cache->cross_v, &g->cross_attn_value);
    struct mg_tensor ungated = on(NULL, &g->cross_attn), out = on(d->h, &g->cross_attn);
    enum mg_status status = norm(d, &b->cross_attn_ln, &g->attn_out, &g->cross_attn_ln);
    if (status == MG_OK)
        status = project(d, d->q, &b->cross_attn_query, &g->cross_attn_ln, &g->cross_attn_query);
    if (status == MG_OK)
        status = open_gate(d, &b->cross_attn_gate, &g->cross_attn_ln, &gate);
    if (gate != NULL)
        out = on(d->h, &g->cross_attn_gate);
    if (status == MG_OK)
        status = mg_attention_static(&out, &ungated, &q, &k, &v, gate, s->t * n, n, batch, n, batch, n, 1, 0, d->diffuse,
                                     s->m, s->group, s->n_head, s->t, s->t_audio, n / s->n_head);
    return status == MG_OK ? add(d, &out, n, &b->cross_attn_out, &g->attn_out, &g->cross_attn_out) : status;
}

static enum mg_status mlp(const struct decoder *d)
{
    const struct mg_linear *up = &d->block->mlp_0;
    const struct mg_decoder_grids *g = d->grids;
    size_t n = d->dims->n_state, n_hidden = d->dims->n_hidden;
    struct mg_tensor h = on(d->h, &g->mlp_ln), hidden = on(d->hidden, &g->mlp_0);
    enum mg_status status = norm(d, &d->block->mlp_ln, &g->cross_attn_out, &g->mlp_ln);
    if (status == MG_OK)
        status = mg_linear_static(&hidden, &h, up->packed, up->scale, up->bias, NULL, 1, d->rows, n_hidden, n);
    return status == MG_OK ? add(d, &hidden, n_hidden, &d->block->mlp_2, &g->cross_attn_out, &g->mlp_2) : status;
}

enum mg_status mg_decoder_static(int8_t *x, const struct mg_decoder_block *blocks, const struct mg_decoder_grids *grids,
                                 const struct mg_decoder_cache *caches, size_t n_blocks, int diffuse,
                                 const struct mg_decoder_dims *dims)
{
    size_t rows = dims->m * dims->t, some = rows * dims->n_state;
    if (!mg_fits(dims))
        return MG_BAD_VALUE;
    char *room = mg_take_memory((some + rows * dims->n_head) * sizeof(float) + 3 * some + rows * dims->n_hidden);
    if (room == NULL)
        return MG_NO_MEMORY;
    struct decoder d = {.dims = dims, .diffuse = diffuse, .rows = rows, .x = x, .floats = (float *)room};
    d.gate = d.floats + some;
    d.h = (int8_t *)(d.gate + rows * dims->n_head);
    d.q = d.h + some;
    d.some = d.q + some;
    d.hidden = d.some + some;
    enum mg_status status = MG_OK;
    for (size_t i = 0; i < n_blocks && status == MG_OK; i++) {
        d.block = &blocks[i];
        d.grids = &grids[i];
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
