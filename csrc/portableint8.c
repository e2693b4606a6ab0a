/* Plain C: attention in int8, the specification of the other instruction sets.  Keys and values are read where they
   are; compilers make vectors of 16 bits and 32 bits of the products. */
#include "lanes.h"

typedef int8_t bytes __attribute__((vector_size(8)));
typedef int16_t shorts __attribute__((vector_size(16)));
typedef int32_t ints __attribute__((vector_size(16)));
typedef uint32_t bits __attribute__((vector_size(16)));

static void score_keys(int32_t *scores, const int8_t *q, int32_t zero, const int8_t *k, size_t k_row, size_t n,
                       size_t d)
{
    for (size_t j = 0; j < n; j++, k += k_row) {
        int32_t score = 0;
        for (size_t i = 0; i < d; i++)
            score += (int16_t)(q[i] - zero) * (int16_t)k[i];
        scores[j] = score;
    }
}

/* As dot_row in portable.c, but products fill 16 bits, so that they are added in 32 bits. */
static void score_row(int32_t *sum, const uint8_t *row, const int8_t *panel, const int32_t *start, size_t k4)
{
    enum { COLUMNS = 16, SUMS = COLUMNS / 2 };
    for (size_t column = 0; column < MG_PANEL; column += COLUMNS) {
        ints c[SUMS] = {{0}};
        int32_t halves[2 * COLUMNS];
        for (size_t i = 0; i < k4; i += 4) {
            shorts a = {row[i], row[i + 1], row[i + 2], row[i + 3], row[i], row[i + 1], row[i + 2], row[i + 3]};
            MG_UNROLL
            for (size_t v = 0; v < SUMS; v++) {
                bytes w;
                memcpy(&w, panel + i * MG_PANEL + 4 * column + 8 * v, sizeof w);
                shorts x = a * __builtin_convertvector(w, shorts);      /* 255 * 128 < 2^15 */
                c[v] += ((ints)((bits)x << 16) >> 16) + ((ints)x >> 16);
            }
        }
        memcpy(halves, c, sizeof c);
        for (size_t j = 0; j < COLUMNS; j++)
            sum[column + j] = start[column + j] + halves[2 * j] + halves[2 * j + 1];
    }
}

static void score_panel(int32_t *acc, const uint8_t *a, const int8_t *panel, const int32_t *start, size_t rows, size_t k)
{
    size_t k4 = mg_round_up(k, 4);
    for (size_t r = 0; r < rows; r++)
        score_row(acc + r * MG_PANEL, a + r * k4, panel, start, k4);
}

static const float ROUND = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, half to even */

static int32_t largest(const int32_t *scores, size_t stride, size_t n)
{
    int32_t top = scores[0];
    for (size_t j = 0; j < n; j++) {
        int32_t score = scores[j / MG_PANEL * stride + j % MG_PANEL];
        top = score > top ? score : top;
    }
    return top;
}

/* Scores become exponentials, floats in the integers' places; -> their sum */
static float raise(int32_t *scores, size_t stride, size_t n, float unit)
{
    int32_t top = largest(scores, stride, n);
    float lanes[MG_LANES] = {0}, e[MG_PANEL];
    for (size_t j = 0; j < n; j += MG_PANEL) {
        int32_t *some = scores + j / MG_PANEL * stride;
        size_t size = mg_min(MG_PANEL, n - j);
        memset(e, 0, sizeof e);
        for (size_t i = 0; i < size; i++)
            e[i] = mg_exp2((float)(some[i] - top) * unit);
        for (size_t i = 0; i < MG_PANEL; i++)
            lanes[i % MG_LANES] += e[i];
        memcpy(some, e, size * sizeof *e);
    }
    return mg_total(lanes);
}

static uint32_t weigh(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    float scale = 255.0f / raise(scores, stride, n, unit);
    uint32_t total = 0;
    for (size_t j = 0; j < n; j += MG_PANEL) {
        float e[MG_PANEL];
        size_t size = mg_min(MG_PANEL, n - j);
        memcpy(e, scores + j / MG_PANEL * stride, size * sizeof *e);
        for (size_t i = 0; i < size; i++) {
            p[j + i] = (uint8_t)(e[i] * scale + ROUND - ROUND);
            total += p[j + i];
        }
    }
    return total;
}

static uint32_t weigh_diffused(uint8_t *p, int32_t *scores, size_t stride, size_t n, float unit)
{
    float scale = (float)(255 << MG_DIFFUSED_BITS) / raise(scores, stride, n, unit);
    uint32_t sum = 1 << (MG_DIFFUSED_BITS - 1), before = 0;
    for (size_t j = 0; j < n; j++) {
        float e;
        memcpy(&e, scores + j / MG_PANEL * stride + j % MG_PANEL, sizeof e);
        sum += (uint32_t)lrintf(e * scale);
        p[j] = (uint8_t)((sum >> MG_DIFFUSED_BITS) - before);
        before = sum >> MG_DIFFUSED_BITS;
    }
    return before;
}

static float weigh_some(uint8_t *p, const int32_t *scores, size_t stride, const float *key_scale, size_t n, float scale,
                        float *top)
{
    float x[MG_WEIGHED], lanes[MG_LANES] = {0}, largest = MG_LOWEST;
    for (size_t j = 0; j < n; j++) {
        x[j] = (float)scores[j / MG_PANEL * stride + j % MG_PANEL] * key_scale[j];
        largest = x[j] > largest ? x[j] : largest;
    }
    *top = largest * scale;
    for (size_t j = 0; j < n; j++) {
        float e = 255.0f * mg_exp2((x[j] - largest) * scale);
        lanes[j % MG_LANES] += e;
        p[j] = (uint8_t)(e + ROUND - ROUND);
    }
    return mg_total(lanes);
}

static void sum_values(int32_t *acc, const uint8_t *p, const int8_t *v, size_t v_row, size_t n, size_t d)
{
    memset(acc, 0, d * sizeof *acc);
    for (size_t j = 0; j < n; j++) {
        const int8_t *value = v + j * v_row;
        int16_t weight = p[j];
        for (size_t i = 0; weight != 0 && i < d; i++)
            acc[i] += (int16_t)(weight * value[i]);     /* 255 * 128 < 2^15 */
    }
}

const struct mg_int8_attention mg_portable_int8 = {
    .few_queries = SIZE_MAX,    /* panels are no faster */
    .score_panel = score_panel,
    .sum_panel = score_panel,
    .value_panel = score_panel,
    .score_keys = score_keys,
    .weigh = weigh,
    .weigh_diffused = weigh_diffused,
    .weigh_some = weigh_some,
    .sum_values = sum_values,
};
