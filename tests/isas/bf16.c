/* Products and attention in bfloat16 against the formula on rounded numbers. */
#include "harness.h"

#include <string.h>

static const double PRODUCT_ERROR = 2e-7;       /* relative to the sum of the products' magnitudes */
static const double PROBABILITY_ERROR = 1.0 / 256.0;    /* of a value, whose weights are rounded to 8 bits */

static float narrow(float x) { return mg_from_bf16(mg_to_bf16(x)); }

/* Numbers of which a third need no rounding. */
static float *operand(int room, size_t n)
{
    float *x = floats(room, n);
    for (size_t i = 0; i < n; i += 3)
        x[i] = narrow(x[i]);
    return x;
}

/* c = a b^T + bias; bit 0 of form: a is stored as (k,m), bit 1: b is (k,n), bit 2: bias. */
static void check_product(size_t m, size_t n, size_t k, unsigned form)
{
    size_t a_row = form & 1 ? 1 : k, a_column = form & 1 ? m : 1, b_row = form & 2 ? 1 : k, b_column = form & 2 ? n : 1;
    const float *a = operand(0, m * k), *b = operand(1, n * k), *bias = form & 4 ? floats(2, n) : NULL;
    float *c = output(3, m * n * sizeof *c);
    if (mg_product_bf16(c, a, b, bias, a_row, a_column, b_row, b_column, m, n, k) != MG_OK)
        fail("no product");
    for (size_t i = 0; i < m; i++)
        for (size_t j = 0; j < n; j++) {
            double sum = bias != NULL ? (double)bias[j] : 0.0, size = fabs(sum);
            for (size_t l = 0; l < k; l++) {
                double x = (double)narrow(a[i * a_row + l * a_column]) * (double)narrow(b[j * b_row + l * b_column]);
                sum += x;
                size += fabs(x);
            }
            if (!(fabs((double)c[i * n + j] - sum) <= PRODUCT_ERROR * size))
                fail("m %zu, n %zu, k %zu, form %u: element %zu, %zu is %.9g, expected %.9g", m, n, k, form, i, j,
                     (double)c[i * n + j], sum);
        }
    intact(c);
}

/* Numbers that are not finite stay in their row and column: no zero that fills up a tile is multiplied by them. */
static void check_infinity(size_t k)
{
    enum { M = 20, N = 35, ROW = 17, COLUMN = 33 };
    float *a = floats(0, M * k), *b = floats(1, N * k), *c = output(3, M * N * sizeof *c);
    for (size_t i = 0; i < M * k; i++)
        a[i] = 1.0f;
    for (size_t i = 0; i < N * k; i++)
        b[i] = 1.0f;
    a[ROW * k] = INFINITY;
    b[COLUMN * k + k - 1] = -INFINITY;
    mg_product_bf16(c, a, b, NULL, k, 1, k, 1, M, N, k);
    for (size_t i = 0; i < M; i++)
        for (size_t j = 0; j < N; j++) {
            float wanted = i == ROW ? INFINITY : j == COLUMN ? -INFINITY : (float)k;
            if (i == ROW && j == COLUMN ? !isnan(c[i * N + j]) : !(c[i * N + j] == wanted))
                fail("infinities, k %zu: element %zu, %zu is %g, expected %g", k, i, j, (double)c[i * N + j],
                     (double)wanted);
        }
    intact(c);
}

static void check_attention(size_t t_q, size_t t_k, size_t d, int causal)
{
    size_t n_head = 2, row = n_head * d;
    float *q = floats(0, t_q * row), *k = floats(1, t_k * row), *v = floats(2, t_k * row), largest = 0.0f;
    float *out = output(4, t_q * row * sizeof *out), *wanted = array(5, t_q * row * sizeof *wanted);
    const float unit = (float)(MG_LOG2_E / sqrt((double)d));
    mg_attention(out, q, k, v, MG_HELD_FLOAT, NULL, 0, row, 0, row, 0, row, 0, causal, MG_BF16, 1, 1,
                 n_head, t_q, t_k, d);
    for (size_t i = 0; i < t_q * row; i++)
        q[i] = narrow(q[i] * unit) / unit;
    for (size_t i = 0; i < t_k * row; i++) {
        k[i] = narrow(k[i]);
        v[i] = narrow(v[i]);
        largest = fmaxf(largest, fabsf(v[i]));
    }
    mg_use_isa(portable->name);
    mg_attention(wanted, q, k, v, MG_HELD_FLOAT, NULL, 0, row, 0, row, 0, row, 0, causal, MG_FLOAT32, 1, 1,
                 n_head, t_q, t_k, d);
    mg_use_isa(isa->name);
    close_to(out, wanted, t_q * row, PROBABILITY_ERROR * (double)largest, "queries, keys", t_q, t_k);
}

void check_bf16(void)
{
    static const size_t depths[] = {0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 384, 385, 800};
    if (!mg_has_bf16())
        return;
    start_of("product in bfloat16");
    for (size_t s = 0; s < sizeof depths / sizeof depths[0]; s++)
        for (unsigned form = 0; form < 8; form++) {
            check_product(17, 50, depths[s], form);
            check_product(9, 16, depths[s], form);
        }
    for (size_t m = 1; m < 40; m++)
        for (size_t n = 1; n < 60; n += 3)
            check_product(m, n, 37, (unsigned)(m + n));
    check_product(130, 97, 70, 4);
    check_product(97, 130, 70, 3);
    for (size_t k = 2; k < 80; k += 7)
        check_infinity(k);
    start_of("attention in bfloat16");
    for (size_t d = 1; d < 100; d += 21)
        for (size_t t_q = 9; t_q < 70; t_q += 20)
            for (int causal = 0; causal < 2; causal++)
                check_attention(t_q, t_q + 4 * d, d, causal);
    check_attention(50, 300, 64, 0);
    check_attention(33, 257, 80, 0);
}
