/* The packed form of int8 weights, one for all instruction sets, so that a packed model survives a change of them.

   Panels of 64 columns, n rounded up; a panel holds for every 4 elements along k the 4 of each column in turn:
   panel[g][j][4] = w[64 p + j][4 g .. 4 g + 3], zero outside.  After the panels stand the column sums,
   sums[j] = sum_k w[j][k] s32, which a product with an offset input subtracts. */
#include "kernels.h"

#include <stdatomic.h>
#include <string.h>

struct pack_job {
    int8_t *packed;
    int32_t *sums;
    const int8_t *w;
    size_t n, k;
    atomic_int bad;
};

size_t mg_packed_bytes(size_t n, size_t k)
{
    return mg_round_up(n, MG_PANEL) * (mg_round_up(k, 4) + sizeof(int32_t));
}

static void pack_panel(void *context, size_t p, size_t worker)
{
    struct pack_job *job = context;
    size_t k4 = mg_round_up(job->k, 4);
    int8_t *panel = job->packed + p * MG_PANEL * k4;
    int bad = 0;
    (void)worker;
    memset(panel, 0, MG_PANEL * k4);
    for (size_t j = 0; j < MG_PANEL; j++) {
        size_t row = p * MG_PANEL + j;
        int32_t sum = 0;
        if (row < job->n) {
            const int8_t *w = job->w + row * job->k;
            for (size_t i = 0; i < job->k; i++) {
                panel[(i / 4 * MG_PANEL + j) * 4 + i % 4] = w[i];
                sum += w[i];
                bad |= w[i] == -128;
            }
        }
        job->sums[row] = sum;
    }
    if (bad)
        atomic_store(&job->bad, 1);
}

enum mg_status mg_pack_int8(int8_t *packed, const int8_t *w, size_t n, size_t k)
{
    size_t panels = mg_round_up(n, MG_PANEL) / MG_PANEL;
    struct pack_job job = {packed, (int32_t *)(packed + panels * MG_PANEL * mg_round_up(k, 4)), w, n, k, 0};
    if (k > MG_MAX_K)
        return MG_BAD_VALUE;
    mg_run(pack_panel, &job, panels, MG_MAX_THREADS);
    return atomic_load(&job.bad) ? MG_BAD_VALUE : MG_OK;
}

/* ---- keys and values of attention ---- */

int32_t mg_pack_key(int8_t *panel, const int8_t *key, size_t column, size_t d)
{
    int32_t sum = 0;
    for (size_t i = 0; i < d; i += 4) {
        int8_t *to = panel + i * MG_PANEL + 4 * column;
        if (d - i >= 4) {
            memcpy(to, key + i, 4);
        } else {
            memset(to, 0, 4);
            memcpy(to, key + i, d - i);
        }
    }
    for (size_t i = 0; i < d; i++)
        sum += key[i];
    return sum;
}

void mg_pack_values(int8_t *panels, size_t panel_bytes, const int8_t *const *value, size_t d)
{
    for (size_t column = 0; column < d; column += MG_PANEL, panels += panel_bytes) {
        size_t n = mg_min(MG_PANEL, d - column);
        const int8_t *restrict a = value[0] + column, *restrict b = value[1] + column;  /* compilers interleave them */
        const int8_t *restrict c = value[2] + column, *restrict e = value[3] + column;
        int8_t *restrict to = panels;
        for (size_t i = 0; i < n; i++) {
            to[4 * i] = a[i];
            to[4 * i + 1] = b[i];
            to[4 * i + 2] = c[i];
            to[4 * i + 3] = e[i];
        }
        memset(panels + 4 * n, 0, 4 * (MG_PANEL - n));
    }
}
