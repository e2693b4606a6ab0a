/* The loop of attend_range: SOME_KEYS keys at a time, all heads.  Included once by a file that has defined TARGET,
   SOME_KEYS and, before this, three functions of keys and values as they are held:

   score_some   p[j] = q . key[j] * unit for n <= SOME_KEYS keys -> the largest
   weigh_some   p[j] = 2^(p[j] - top) -> their sum
   add_some     o = o * scale + sum_j p[j] * value[j] */
MG_INLINE TARGET void attend_range(const struct mg_attention_range *r, const enum mg_held held)
{
    float unit = (float)(MG_LOG2_E / sqrt((double)r->d)), p[SOME_KEYS] = {0};
    for (size_t i = 0; i < r->n_query * r->n_head; i++) {
        r->top[i] = MG_LOWEST;
        r->sum[i] = 0.0f;
    }
    memset(r->o, 0, r->n_query * r->n_head * r->d * sizeof *r->o);
    for (size_t key = r->first_key; key < r->end_key; key += SOME_KEYS)
        for (size_t head = 0; head < r->n_head; head++) {
            const void *k = mg_held_at(r->k, key * r->k_row + head * r->d, held);
            const void *v = mg_held_at(r->v, key * r->v_row + head * r->d, held);
            for (size_t l = 0; l < r->n_query; l++) {
                size_t end = mg_min(r->end_key, r->seen[l]), at = l * r->n_head + head;
                if (end <= key)
                    continue;
                size_t n = mg_min(SOME_KEYS, end - key);
                const float *q = r->q[l] + head * r->d;
                float before = r->top[at], scale;
                r->top[at] = fmaxf(before, score_some(p, q, k, r->k_row, n, r->d, unit, held));
                scale = exp2f(before - r->top[at]);
                r->sum[at] = r->sum[at] * scale + weigh_some(p, r->top[at], n);
                add_some(r->o + at * r->d, scale, p, v, r->v_row, n, r->d, held);
            }
        }
}
