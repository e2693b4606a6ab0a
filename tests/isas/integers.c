/* Integer kernels against the formula. */
#include "harness.h"

#include <string.h>

static const double P_ERROR = 1e-3;             /* of 255 times a probability before it is rounded */
static const double SOME_ERROR = 1e-6;          /* relative, of the same where it is rounded alone */

/* ---- integer products ---- */

/* wanted[r][j] = start[j] + sum_k (a[r][k] + zero) * w[j][k] for one panel. */
static void formula(int32_t *wanted, const int8_t *a, int zero, const int8_t *w, const int32_t *start, size_t rows,
                    size_t k)
{
    for (size_t r = 0; r < rows; r++)
        for (size_t j = 0; j < MG_PANEL; j++) {
            int32_t sum = start[j];
            for (size_t i = 0; i < k; i++)
                sum += (a[r * k + i] + zero) * w[j * k + i];
            wanted[r * MG_PANEL + j] = sum;
        }
}

/* w (MG_PANEL, k), all of whose elements may be -128, as a panel; beyond k stands `beyond`. */
static int8_t *panel_of(int room, const int8_t *w, size_t k, int8_t beyond)
{
    int8_t *panel = array(room, MG_PANEL * mg_round_up(k, 4));
    memset(panel, beyond, MG_PANEL * mg_round_up(k, 4));
    for (size_t j = 0; j < MG_PANEL; j++)
        for (size_t i = 0; i < k; i++)
            panel[(i / 4 * MG_PANEL + j) * 4 + i % 4] = w[j * k + i];
    return panel;
}

static void check_dot(const int8_t *a, size_t rows, size_t k, enum fill of_w, int zero)
{
    static int32_t wanted[64 * MG_PANEL];
    const int8_t *w = bytes(1, MG_PANEL, k, of_w, -127), *panel = panel_of(2, w, k, 0);
    int32_t *start = array(3, MG_PANEL * sizeof *start), plain[MG_PANEL];
    int8_t *packed = output(4, rows * mg_row_bytes(isa, k));
    int32_t *acc = output(5, rows * MG_PANEL * sizeof *acc);
    for (size_t j = 0; j < MG_PANEL; j++) {
        start[j] = plain[j] = (int32_t)(bits() % 2000) - 1000;
        for (size_t i = 0; i < k; i++)
            start[j] -= (isa->takes_zero ? 0 : isa->offset + zero) * w[j * k + i];
    }
    isa->pack_rows(packed, a, rows, k, zero);
    intact(packed);
    isa->dot_panel(acc, packed, panel, start, rows, k);
    formula(wanted, a, -zero, w, plain, rows, k);
    equal(acc, wanted, rows * MG_PANEL, "rows, k", rows, k);
}

static void check_dot_panel(size_t rows, size_t k, enum fill fill, enum fill of_w, int zero)
{
    check_dot(bytes(0, rows, k, fill, -128), rows, k, of_w, zero);
}

/* A row, less -128, whose list in avx2lists.h is as long as one can be: 9, 2, 2, 10 and 2 pieces. */
static void check_longest_list(void)
{
    enum { K = 52 };
    static const struct { int first, end, x; } parts[] = {{0, 4, 255}, {4, 6, 200}, {12, 14, 100}, {20, 22, 100},
                                                          {40, 48, 255}, {48, 50, 64}};
    int8_t *a = array(0, K);
    memset(a, -128, K);
    for (size_t p = 0; p < sizeof parts / sizeof parts[0]; p++)
        for (int i = parts[p].first; i < parts[p].end; i++)
            a[i] = (int8_t)(parts[p].x - 128);
    check_dot(a, 1, K, RANDOM, -128);
}

enum panel { SCORE, SUM, VALUE };

/* An element of a (rows,k) that may stand there, as an unsigned one less 128. */
static int8_t probability(enum panel panel, enum fill fill, int8_t any, size_t i, size_t rows, size_t k)
{
    unsigned dice = bits();
    if (panel == SCORE || (panel == VALUE && fill == RANDOM))
        return any;
    if (panel == SUM)           /* two add up to at most 256: 128 each, or 255 and 1 */
        return (int8_t)(fill == LOW ? 0 : fill == HIGH ? (i % k == k / 2 ? 127 : -127) : (int)(dice % 129) - 128);
    if (fill == LOW)
        return 127;
    if (fill == HIGH)           /* four of them add up to about 256 */
        return (int8_t)((int)(64 + dice % 2) - 128);
    if (fill == ZERO_ROW && i / k == rows / 2)  /* one row is large, the others small but for a few */
        return 127;
    return dice % 32 == 0 ? any : (int8_t)((int)(dice / 32 % 16) - 128);
}

static void check_int8_panel(enum panel which, size_t rows, size_t k, enum fill fill, enum fill of_w)
{
    static int32_t wanted[64 * MG_PANEL];
    const size_t k4 = mg_round_up(k, 4);
    int8_t *a = bytes(0, rows, k, fill, -128), *w = bytes(1, MG_PANEL, k, of_w, -128), *panel = panel_of(2, w, k, 77);
    int32_t *start = array(3, MG_PANEL * sizeof *start), *acc = output(5, rows * MG_PANEL * sizeof *acc);
    uint8_t *p = array(4, rows * k4);
    memset(p, 0, rows * k4);
    for (size_t i = 0; i < rows * k; i++) {
        a[i] = probability(which, fill, a[i], i, rows, k);
        p[i / k * k4 + i % k] = (uint8_t)(a[i] + 128);
    }
    for (size_t j = 0; j < MG_PANEL; j++)
        start[j] = (int32_t)(bits() % 2000) - 1000;
    const struct mg_int8_attention *int8 = isa->int8;
    (which == SCORE ? int8->score_panel : which == SUM ? int8->sum_panel : int8->value_panel)
        (acc, p, panel, start, rows, k);
    formula(wanted, a, 128, w, start, rows, k);
    equal(acc, wanted, rows * MG_PANEL, "rows, k", rows, k);
}

static void check_products(enum panel which)
{
    static const char *const names[] = {"score_panel", "sum_panel", "value_panel"};
    start_of(names[which]);
    for (size_t rows = 1; rows <= isa->max_rows; rows++)
        for (size_t s = 0; s < N_SIZES; s++)
            for (enum fill fill = 0; fill < FILLS; fill++) {
                check_int8_panel(which, rows, SIZES[s], fill, fill);
                check_int8_panel(which, rows, SIZES[s], fill, LOW);
            }
    check_int8_panel(which, 4, MG_MAX_ATTENTION, LOW, LOW);
}

void check_panels(void)
{
    static const int zeros[4] = {0, -128, 127, 33};
    start_of("dot_panel, pack_rows");
    for (size_t rows = 1; rows <= isa->max_rows; rows++)
        for (size_t s = 0; s < N_SIZES; s++)
            for (enum fill fill = 0; fill < FILLS; fill++)
                for (enum fill of_w = 0; of_w < FILLS; of_w++)
                    check_dot_panel(rows, SIZES[s], fill, of_w, of_w == RANDOM ? 0 : zeros[bits() % 4]);
    for (enum fill of_w = LOW; of_w <= HIGH; of_w++) {
        check_dot_panel(4, MG_MAX_K, LOW, of_w, 0);
        check_dot_panel(4, MG_MAX_STATIC_K, LOW, of_w, 127);
    }
    check_longest_list();
    for (enum panel which = SCORE; which <= VALUE; which++)
        check_products(which);
}

static void check_score_keys(size_t n, size_t d, enum fill fill, int32_t zero)
{
    static int32_t wanted[4096];
    size_t k_row = d + 5, room = mg_round_up(n, MG_PANEL);
    const int8_t *q = bytes(0, 1, d, fill, -128), *k = bytes(1, 1, (n - 1) * k_row + d, fill, -128);
    int32_t *scores = output(2, room * sizeof *scores);
    isa->int8->score_keys(scores, q, zero, k, k_row, n, d);
    for (size_t j = 0; j < n; j++) {
        wanted[j] = 0;
        for (size_t i = 0; i < d; i++)
            wanted[j] += (q[i] - zero) * k[j * k_row + i];
    }
    equal(scores, wanted, n, "n, d", n, d);
}

static void check_sum_values(size_t n, size_t d, enum fill fill)
{
    static int32_t wanted[4096];
    size_t v_row = d + 3, n4 = mg_round_up(n, 4);
    const int8_t *v = bytes(1, 1, (n - 1) * v_row + d, fill, -128);
    uint8_t *p = array(0, n4);
    int32_t *acc = output(2, mg_round_up(d, MG_PANEL) * sizeof *acc);
    for (size_t j = 0; j < n4; j++)
        p[j] = (uint8_t)(j >= n ? 0 : fill == LOW ? 128 : fill == HIGH ? (j == n / 2 ? 255 : bits() % 2)
                                                                       : bits() % 2 * (bits() % 129));
    isa->int8->sum_values(acc, p, v, v_row, n, d);
    for (size_t i = 0; i < d; i++) {
        wanted[i] = 0;
        for (size_t j = 0; j < n; j++)
            wanted[i] += p[j] * v[j * v_row + i];
    }
    equal(acc, wanted, d, "n, d", n, d);
}

static const int32_t *score_of(const int32_t *scores, size_t stride, size_t j)
{
    return scores + j / MG_PANEL * stride + j % MG_PANEL;
}

/* p in float64, from scores of which MG_PANEL at a time are dense; diffused: the sums of p. */
static void check_weigh(size_t n, size_t stride, double unit, int diffused)
{
    static double e[4096];
    size_t room = (mg_round_up(n, MG_PANEL) / MG_PANEL - 1) * stride + MG_PANEL;
    int32_t *scores = (int32_t *)bytes(0, room, sizeof *scores, RANDOM, -128), top = INT32_MIN;
    uint8_t *p = output(1, n);
    uint32_t total = 0;
    double sum = 0.0, so_far = 0.0;
    for (size_t i = 0; i < room; i++)
        scores[i] >>= 12;               /* what stands beyond n too */
    for (size_t j = 0; j < n; j++)
        top = *score_of(scores, stride, j) > top ? *score_of(scores, stride, j) : top;
    for (size_t j = 0; j < n; j++)
        sum += e[j] = exp2((*score_of(scores, stride, j) - top) * unit);
    uint32_t got = (diffused ? isa->int8->weigh_diffused : isa->int8->weigh)(p, scores, stride, n, (float)unit);
    for (size_t j = 0; j < n; j++) {
        total += p[j];
        so_far += 255.0 * e[j] / sum;
        double wanted = diffused ? so_far - (total - p[j]) : 255.0 * e[j] / sum;
        if (!(fabs(p[j] - wanted) <= 0.5 + P_ERROR))
            fail("n, stride %zu, %zu: element %zu is %d, expected %g", n, stride, j, p[j], wanted);
    }
    if (total != got || (diffused && total != 255))
        fail("n, stride %zu, %zu: sum %u, expected %u", n, stride, got, total);
    intact(p);
}

/* p and its sum in float64, from scores of which MG_PANEL at a time are dense, each with a scale. */
static void check_weigh_some(size_t n, size_t stride, double unit)
{
    static double x[MG_WEIGHED];
    size_t room = (MG_WEIGHED / MG_PANEL - 1) * stride + MG_PANEL;
    int32_t *scores = (int32_t *)bytes(0, room, sizeof *scores, RANDOM, -128);
    float *scale = floats(2, n), top = 0.0f;
    uint8_t *p = output(1, n);
    double sum = 0.0, largest = -INFINITY;
    for (size_t i = 0; i < room; i++)
        scores[i] >>= 12;               /* what stands beyond n too */
    for (size_t j = 0; j < n; j++) {
        scale[j] = fabsf(scale[j]);
        x[j] = *score_of(scores, stride, j) * unit * (double)scale[j];
        largest = fmax(largest, x[j]);
    }
    double error = SOME_ERROR + 3e-7 * fabs(largest);   /* float32 in scores */
    float got = isa->int8->weigh_some(p, scores, stride, scale, n, (float)unit, &top);
    for (size_t j = 0; j < n; j++) {
        double e = 255.0 * exp2(x[j] - largest);
        sum += e;
        if (!(fabs(p[j] - e) <= 0.5 + error * e + P_ERROR))
            fail("n, stride %zu, %zu: element %zu is %d, expected %g", n, stride, j, p[j], e);
    }
    if (!(fabs((double)got - sum) <= error * sum) || !(fabs((double)top - largest) <= 1e-6 * (1 + fabs(largest))))
        fail("n, stride %zu, %zu: sum %g, expected %g; largest %g, expected %g", n, stride, (double)got, sum,
             (double)top, largest);
    intact(p);
}

void check_int8_rows(void)
{
    static const int32_t zeros[] = {-128, 0, 77, 127};
    start_of("score_keys");
    for (size_t s = 0; s < N_SMALL; s++)
        for (size_t d = 0; d < N_SMALL; d++)
            for (enum fill fill = 0; fill < ZERO_ROW; fill++)
                check_score_keys(SIZES[s], SIZES[d], fill, zeros[bits() % 4]);
    start_of("sum_values");
    for (size_t s = 0; s < N_SIZES; s++)
        for (size_t d = 0; d < N_SMALL; d++)
            for (enum fill fill = 0; fill < ZERO_ROW; fill++)
                check_sum_values(SIZES[s], SIZES[d], fill);
    start_of("weigh, weigh_diffused");
    for (size_t s = 0; s < N_SIZES; s++)
        for (double unit = 1e-8; unit < 1.0; unit *= 30.0)
            for (size_t stride = MG_PANEL; stride <= 4 * MG_PANEL; stride += 3 * MG_PANEL)
                for (int diffused = 0; diffused < 2; diffused++)
                    check_weigh(SIZES[s], stride, unit, diffused);
    start_of("weigh_some");
    for (size_t n = 1; n <= MG_WEIGHED; n += n < 70 || n > 250 ? 1 : 9)
        for (double unit = 1e-8; unit < 1.0; unit *= 30.0)
            for (size_t stride = MG_PANEL; stride <= 4 * MG_PANEL; stride += 3 * MG_PANEL)
                check_weigh_some(n, stride, unit);
}
