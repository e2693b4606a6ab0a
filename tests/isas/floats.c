/* The epilogue, the row kernels, and the interface as a whole, against portable kernels. */
#include "harness.h"

#include <stdlib.h>
#include <string.h>

static const double GELU_ERROR = 1e-6;          /* absolute, of two results that are each within 5e-7 */
static const double RELATIVE = 2e-6;            /* of a float32 result, relative to the largest magnitude */
static const double LAYER_NORM_ERROR = 5e-6;    /* of numbers of order 1; 2e-4 for rows of a few elements */
static const double ATTENTION_ERROR = 3e-6;     /* of averages of values of order 1, with scores of order 1 */
static const double HEARD_ERROR = 2e-4;         /* of the same with queries of 16 bits */
static const double INT8_ERROR = 2e-2;          /* of the same in int8, a few steps at a tie */
static const double LSE_ERROR = 5e-6;
static const double BACKWARD_ERROR = 5e-6;

static double largest(const float *x, size_t n)
{
    double top = 1.0;
    for (size_t i = 0; i < n; i++)
        top = fmax(top, fabs((double)x[i]));
    return top;
}

/* ---- epilogue ---- */

/* n numbers in form 0 to 2, in rooms 0 .. 2: float32, int8, int32. */
static struct mg_source source(int form, int room, size_t n)
{
    struct mg_source s = {.scale = 0.02f, .zero = -37};
    if (form == 0)
        s.x = floats(room, n);
    else if (form == 1)
        s.q = bytes(room, 1, n, RANDOM, -128);
    else
        s.acc = memcpy(array(room, n * sizeof *s.acc), bytes(8, 1, n * sizeof *s.acc, RANDOM, -128),
                       n * sizeof *s.acc);
    s.scale = form == 2 ? 1e-9f : s.scale;
    return s;
}

/* Without GELU all is exact; an int8 result with it is the portable float on the grid, a step off only near a tie. */
static void check_finish_once(struct mg_finish f, int to_int8, size_t n)
{
    float *wanted = array(6, n * sizeof *wanted), *x = output(5, n * sizeof *x);
    int8_t *wanted_q = array(7, n), *q = output(4, n);
    f.out = (struct mg_target){.x = wanted};
    portable->finish(&f, n);
    double error = f.gelu ? GELU_ERROR + RELATIVE * largest(wanted, n) : 0.0;
    if (!to_int8) {
        f.out.x = x;
        isa->finish(&f, n);
        close_to(x, wanted, n, error, "n, gelu", n, (size_t)f.gelu);
        return;
    }
    f.out = (struct mg_target){.q = wanted_q, .inverse = 1.0f / 0.05f, .zero = 13};
    portable->finish(&f, n);
    f.out.q = q;
    isa->finish(&f, n);
    for (size_t i = 0; i < n; i++) {
        double steps = fmin(fmax((double)wanted[i] * (double)f.out.inverse + 13, -128), 127);
        if (q[i] != wanted_q[i] && !(f.gelu && fabs(q[i] - steps) <= 0.5 + error / 0.05))
            fail("n %zu: element %zu is %d, expected %d", n, i, q[i], wanted_q[i]);
    }
    intact(q);
}

static void check_finish(size_t n)
{
    for (unsigned i = 0; i < 3 * 3 * 16; i++) {
        int form = (int)(i % 3), residual = (int)(i / 3 % 3) - 1;
        unsigned options = i / 9;
        struct mg_finish f = {.x = source(form, 0, n), .gelu = options & 1,
                              .factor = options & 2 && form > 0 ? floats(2, n) : NULL,
                              .bias = options & 4 ? floats(3, n) : NULL};
        if (residual >= 0)
            f.residual = source(residual, 1, n);
        check_finish_once(f, options >> 3, n);
    }
}

static int same(float x, float y) { return x == y || (isnan(x) && isnan(y)); }

/* A tile is its rows, bit for bit; target 0 to 2: float32, int8, bfloat16. */
static void check_finish_tile_once(struct mg_finish_tile t, int target)
{
    enum { WIDEST = 3 * (MG_PANEL + 5) };
    float *x = output(4, WIDEST * sizeof *x), wide[MG_PANEL];
    int8_t *q = output(5, WIDEST), wanted_q[MG_PANEL];
    uint16_t *half = output(7, WIDEST * sizeof *half);
    struct mg_target out = {.x = target == 0 ? x : NULL, .q = target == 1 ? q : NULL, .inverse = 20.0f, .zero = 13};
    memset(x, 1, WIDEST * sizeof *x);
    memset(q, 1, WIDEST);
    memset(half, 1, WIDEST * sizeof *half);     /* what lies between rows stays so */
    t.row.out = target == 2 ? (struct mg_target){.x = NULL} : out;
    t.half = target == 2 ? half : NULL;
    isa->finish_tile(&t);
    for (size_t r = 0; r < t.rows; r++) {
        size_t at = r * t.stride;
        struct mg_finish f = t.row;
        f.out = target == 1 ? (struct mg_target){.q = wanted_q, .inverse = 20.0f, .zero = 13}
                            : (struct mg_target){.x = wide};
        f.x.acc += r * MG_PANEL;
        f.x.scale = t.scale[r * t.scale_step];
        f.residual = mg_source_at(f.residual, at);
        isa->finish(&f, MG_PANEL);
        for (size_t j = 0; j < MG_PANEL; j++) {
            float half_wanted = mg_from_bf16(mg_to_bf16(wide[j])), got = mg_from_bf16(half[at + j]);
            int equal = target == 0 ? same(x[at + j], wide[j]) : same(got, half_wanted);
            if (target == 1 ? q[at + j] != wanted_q[j] : !equal)
                fail("row %zu: element %zu differs from finish's, target %d", r, j, target);
        }
    }
    const uint32_t untouched = 0x01010101;
    for (size_t at = 0; at < (t.rows - 1) * t.stride; at++)
        if (at % t.stride >= MG_PANEL && (q[at] != 1 || half[at] != 0x101 || memcmp(x + at, &untouched, sizeof untouched) != 0))
            fail("element %zu between rows of %zu is written", at, t.stride);
    intact(x);
    intact(q);
    intact(half);
}

static void check_finish_tile(void)
{
    enum { ROWS = 3, SIZE = ROWS * (MG_PANEL + 5) };
    for (unsigned i = 0; i < 3 * 3 * 8; i++) {
        int target = (int)(i % 3), residual = (int)(i / 3 % 3) - 1;
        unsigned options = i / 9;
        float *bias = floats(2, MG_PANEL), *scale = floats(3, ROWS);
        for (size_t r = 0; r < ROWS; r++)
            scale[r] *= 1e-9f;
        bias[5] = options & 4 ? NAN : bias[5];
        bias[6] = options & 4 ? INFINITY : bias[6];
        struct mg_finish_tile t = {.row = {.x = source(2, 0, SIZE), .factor = floats(1, MG_PANEL),
                                           .bias = options & 1 ? bias : NULL, .gelu = options & 2},
                                   .scale = scale, .scale_step = i % 5 % 2,
                                   .stride = MG_PANEL + i % 4 / 2 * 5, .rows = ROWS};
        t.row.x.zero = 0;
        if (residual >= 0)
            t.row.residual = source(residual, 6, SIZE);
        check_finish_tile_once(t, target);
    }
}

/* Ties, numbers off the grid and what is no number: as portable rounds and clips them. */
static void check_rounding(void)
{
    const float x[] = {0.0f, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 137.5f, 138.5f, 1e30f, INFINITY, -117.5f, -118.5f, -1e30f,
                       -INFINITY, NAN, 126.49f};
    enum { N = sizeof x / sizeof x[0] };
    static const int32_t zeros[] = {-128, -10, 0, 127};
    for (size_t i = 0; i < 4; i++) {
        int8_t wanted[N], *q = output(0, N);
        struct mg_finish f = {.x = {.x = x}, .out = {.q = wanted, .inverse = 1.0f, .zero = zeros[i]}};
        portable->finish(&f, N);
        f.out.q = q;
        isa->finish(&f, N);
        for (size_t j = 0; j < N; j++)
            if (q[j] != wanted[j])
                fail("%g with zero %d is %d, expected %d", (double)x[j], zeros[i], q[j], wanted[j]);
        intact(q);
    }
}

/* All magnitudes, in place. */
static void check_gelu(void)
{
    enum { N = 4001 };
    float *x = output(0, N * sizeof *x), *wanted = array(1, N * sizeof *wanted);
    for (int i = 0; i < N; i++)
        wanted[i] = x[i] = i < 4 ? (float[]){600.0f, -600.0f, -0.0f, 1e-30f}[i] : (float)(i - 2000) * 6e-3f;
    struct mg_finish f = {.x = {.x = wanted}, .out = {.x = wanted}, .gelu = 1};
    portable->finish(&f, N);
    f.x.x = f.out.x = x;
    isa->finish(&f, N);
    close_to(x, wanted, N, GELU_ERROR + RELATIVE, "n, gelu", N, 1);
}

/* ---- rows ---- */

static void check_quantize_row(size_t n)
{
    for (int kind = 0; kind < 12; kind++) {
        float *x = floats(0, n);
        int8_t *q = output(1, n), *wanted = array(2, n);
        for (size_t i = 0; i < n; i++)      /* magnitudes; all equal; ties; too small; zero */
            x[i] = kind < 8 ? x[i] * powf(10.0f, (float)(2 * kind - 8)) : kind == 8 ? -3.7f
                 : kind == 9 ? (i == n / 2 ? 127.0f : (float)(i % 250) - 125.5f) : kind == 10 ? 1e-31f : 0.0f;
        float scale = isa->quantize_row(q, x, n), expected = portable->quantize_row(wanted, x, n);
        if (scale != expected)
            fail("n %zu: scale %.9g, expected %.9g", n, (double)scale, (double)expected);
        for (size_t i = 0; i < n; i++)
            if (q[i] != wanted[i])
                fail("n %zu: element %zu is %d, expected %d", n, i, q[i], wanted[i]);
        intact(q);
    }
}

static void check_layer_norm_row(size_t n, float shift)
{
    const float *weight = floats(1, n), *bias = floats(2, n);
    float *x = floats(0, n), *wanted = array(3, n * sizeof *wanted), *out = output(4, n * sizeof *out);
    double bound = shift != 0.0f ? 5e-5 : LAYER_NORM_ERROR;    /* cancellation in x - mean */
    for (size_t i = 0; i < n; i++)
        x[i] = x[i] * (shift != 0.0f ? 30.0f : 1.0f) + shift;
    portable->layer_norm_row(wanted, x, weight, bias, 1e-5f, n);
    isa->layer_norm_row(out, x, weight, bias, 1e-5f, n);
    close_to(out, wanted, n, n < 15 ? 4e-4 : bound, "n, shift", n, (size_t)shift);
    memcpy(out, x, n * sizeof *x);
    isa->layer_norm_row(out, out, weight, bias, 1e-5f, n);
    close_to(out, wanted, n, n < 15 ? 4e-4 : bound, "in place, n, shift", n, (size_t)shift);
}

void check_rows(void)
{
    start_of("finish");
    for (size_t s = 0; s < N_SIZES; s++)
        check_finish(SIZES[s]);
    if (isa->finish_tile != NULL)
        check_finish_tile();
    check_rounding();
    check_gelu();
    start_of("quantize_row");
    for (size_t s = 0; s < N_SIZES; s++)
        check_quantize_row(SIZES[s]);
    start_of("layer_norm_row");
    for (size_t s = 0; s < N_SIZES; s++)
        for (int i = 0; i < 4; i++)
            check_layer_norm_row(SIZES[s], i % 2 ? 100.0f : 0.0f);
}

/* ---- the interface, two threads ---- */

static void use(const struct mg_kernels *kernels)
{
    if (mg_use_isa(kernels->name) != MG_OK)
        fail("not usable");
}

static void check_products(size_t m, size_t n, size_t k)
{
    const int8_t *a = bytes(0, m, k, RANDOM, -128), *w = bytes(1, n, k, RANDOM, -127);
    int8_t *packed = array(2, mg_packed_bytes(n, k));
    int32_t *acc = output(5, m * n * sizeof *acc), *wanted = array(6, m * n * sizeof *wanted);
    float *w_scale = floats(3, n), *bias = floats(4, n), *y = output(7, m * n * sizeof *y);
    struct mg_tensor out = {.x = y, .scale = 0.05f, .zero = 13}, in = {.q = (int8_t *)(size_t)a, .scale = 0.02f,
                                                                       .zero = -37};
    if (mg_pack_int8(packed, w, n, k) != MG_OK)
        fail("weights are not packed");
    use(portable);
    mg_matmul_int8(wanted, a, packed, m, n, k);
    use(isa);
    mg_matmul_int8(acc, a, packed, m, n, k);
    equal(acc, wanted, m * n, "n, k", n, k);
    use(portable);
    out.x = (float *)wanted;
    mg_linear_static(&out, &in, packed, w_scale, bias, NULL, 0, m, n, k);
    use(isa);
    out.x = y;
    mg_linear_static(&out, &in, packed, w_scale, bias, NULL, 0, m, n, k);
    close_to(y, (float *)wanted, m * n, 0.0, "n, k", n, k);
}

/* Many rows of a product, quantized where they are made: exact without GELU. */
static void check_quantized_rows(size_t m, size_t n, size_t k)
{
    const int8_t *a = bytes(0, m, k, RANDOM, -128), *w = bytes(1, n, k, RANDOM, -127);
    int8_t *packed = array(2, mg_packed_bytes(n, k)), *q = output(3, m * n), *wanted_q = array(4, m * n);
    float *scale = output(5, m * sizeof *scale), *wanted = array(6, m * sizeof *wanted);
    const float *a_scale = floats(7, m), *w_scale = floats(8, n);
    mg_pack_int8(packed, w, n, k);
    use(portable);
    mg_linear_int8_rows(wanted_q, wanted, a, a_scale, packed, w_scale, NULL, 0, m, n, k);
    use(isa);
    mg_linear_int8_rows(q, scale, a, a_scale, packed, w_scale, NULL, 0, m, n, k);
    if (memcmp(q, wanted_q, m * n) != 0)
        fail("m, n, k %zu, %zu, %zu: rows differ", m, n, k);
    intact(q);
    close_to(scale, wanted, m, 0.0, "n, k", n, k);
}

struct attention {
    size_t n_batch, group, n_head, t_q, t_k, d, gate_width;
    int causal;
};

static void check_attention(const struct attention *c, enum mg_precision precision, float size, double error)
{
    size_t row = c->n_head * c->d, n_q = c->n_batch * c->t_q, n_k = c->n_batch / c->group * c->t_k;
    float *q = floats(0, n_q * row), *k = floats(1, n_k * row), *v = floats(2, n_k * row);
    float *gate = c->gate_width > 0 ? floats(3, n_q * c->n_head * c->gate_width) : NULL;
    float *out = output(4, n_q * row * sizeof *out), *wanted = array(5, n_q * row * sizeof *wanted);
    for (size_t i = 0; i < n_q * row; i++)
        q[i] *= size;
    for (int of_isa = 0; of_isa < 2; of_isa++) {
        use(of_isa ? isa : portable);
        mg_attention(of_isa ? out : wanted, q, k, v, MG_HELD_FLOAT, gate, c->t_q * row, row, c->t_k * row,
                     row, c->t_k * row, row, c->gate_width, c->causal, precision, c->n_batch, c->group, c->n_head,
                     c->t_q, c->t_k, c->d);
    }
    close_to(out, wanted, n_q * row, gate != NULL ? 3.5 * error : error, "queries, keys", n_q, n_k);
}

static void check_attention_half(const struct attention *c)
{
    size_t row = c->n_head * c->d, n_q = c->n_batch * c->t_q, n_k = c->n_batch / c->group * c->t_k;
    float *q = floats(0, n_q * row), *k = floats(1, n_k * row), *v = floats(2, n_k * row), largest = 1.0f;
    float *out = output(4, n_q * row * sizeof *out), *wanted = array(5, n_q * row * sizeof *wanted);
    uint16_t *half_k = array(6, n_k * row * sizeof *half_k), *half_v = array(7, n_k * row * sizeof *half_v);
    for (size_t i = 0; i < n_k * row; i++) {
        k[i] = mg_from_bf16(half_k[i] = mg_to_bf16(k[i]));
        v[i] = mg_from_bf16(half_v[i] = mg_to_bf16(v[i]));
        largest = fmaxf(largest, fabsf(v[i]));
    }
    for (int of_isa = 0; of_isa < 2; of_isa++) {
        use(of_isa ? isa : portable);
        mg_attention(of_isa ? out : wanted, q, of_isa ? (void *)half_k : k, of_isa ? (void *)half_v : v,
                     of_isa ? MG_HELD_HALF : MG_HELD_FLOAT, NULL, c->t_q * row, row, c->t_k * row, row, c->t_k * row, row,
                     0, c->causal, MG_FLOAT32, c->n_batch, c->group, c->n_head, c->t_q, c->t_k, c->d);
    }
    close_to(out, wanted, n_q * row, 2 * ATTENTION_ERROR * (double)largest, "queries, keys", n_q, n_k);
}

/* x (rows,n) = scale * q, a scale for each row */
static const int8_t *in_int8(int room, float *x, float *scale, size_t rows, size_t n)
{
    int8_t *q = array(room, rows * n);
    for (size_t i = 0; i < rows * n; i++) {
        if (i % n == 0)
            scale[i / n] = 0.01f * fabsf(scale[i / n]);
        q[i] = (int8_t)(36.0f * x[i]);
        x[i] = scale[i / n] * (float)q[i];
    }
    return q;
}

static void check_attention_heard(const struct attention *c)
{
    size_t row = c->n_head * c->d, n_q = c->n_batch * c->t_q, windows = c->n_batch / c->group, n_k = windows * c->t_k;
    float *q = floats(0, n_q * row), *x[2] = {floats(1, n_k * row), floats(2, n_k * row)}, *scale = floats(3, 2 * n_k);
    float *out = output(4, n_q * row * sizeof *out), *wanted = array(5, n_q * row * sizeof *wanted), largest = 0.0f;
    int8_t *packed[2];
    for (int values = 0; values < 2; values++) {
        const int8_t *steps = in_int8(6, x[values], scale + (size_t)values * n_k, n_k, row);
        packed[values] = output(7 + values, windows * mg_heard_bytes(values, c->n_head, c->t_k, c->d));
        mg_pack_heard(packed[values], values, steps, scale + (size_t)values * n_k, windows, c->n_head, c->t_k, c->d);
    }
    for (size_t i = 0; i < n_k * row; i++)
        largest = fmaxf(largest, fabsf(x[1][i]));
    use(portable);
    mg_attention(wanted, q, x[0], x[1], MG_HELD_FLOAT, NULL, c->t_q * row, row, c->t_k * row, row, c->t_k * row, row, 0, 0,
                 MG_FLOAT32, c->n_batch, c->group, c->n_head, c->t_q, c->t_k, c->d);
    use(isa);
    mg_attention_heard(out, q, packed[0], packed[1], NULL, 0, c->n_batch, c->group, c->n_head, c->t_q, c->t_k, c->d);
    close_to(out, wanted, n_q * row, HEARD_ERROR * (double)largest, "queries, keys", n_q, n_k);
}

static void check_attention_training(size_t t_q, size_t t_k, size_t d, int causal)
{
    size_t n_head = 2, row = n_head * d, size = t_q * row, key_size = t_k * row;
    const float *q = floats(0, size), *k = floats(1, key_size), *v = floats(2, key_size), *dout = floats(3, size);
    float *out[2] = {array(4, size * sizeof(float)), output(5, size * sizeof(float))};
    float *lse[2] = {array(6, n_head * t_q * sizeof(float)), output(7, n_head * t_q * sizeof(float))};
    for (int i = 0; i < 2; i++) {
        use(i ? isa : portable);
        mg_attention_lse(out[i], lse[i], q, k, v, 0, row, 0, row, 0, row, causal, 1, n_head, t_q, t_k, d);
    }
    close_to(out[1], out[0], size, ATTENTION_ERROR, "queries, keys", t_q, t_k);
    close_to(lse[1], lse[0], n_head * t_q, LSE_ERROR, "queries, keys", t_q, t_k);
    float *gradients[2];
    for (int i = 0; i < 2; i++) {
        float *dq = gradients[i] = output(i ? 8 : 5, (size + 2 * key_size) * sizeof(float));
        use(i ? isa : portable);
        mg_attention_backward(dq, dq + size, dq + size + key_size, dout, out[0], lse[0], q, k, v, 0, row, 0, row, 0,
                              row, causal, 0, 1, n_head, t_q, t_k, d);
    }
    close_to(gradients[1], gradients[0], size + 2 * key_size, BACKWARD_ERROR, "backward of queries, keys", t_q, t_k);
}

/* Float results may differ by a few probabilities of 255 that are rounded the other way at a tie, and seldom do. */
static void check_attention_static(const struct attention *c, int diffuse)
{
    size_t row = c->n_head * c->d, n_q = c->n_batch * c->t_q, n_k = c->n_batch / c->group * c->t_k, off = 0;
    struct mg_tensor q = {.q = bytes(0, n_q, row, RANDOM, -128), .scale = 0.05f, .zero = -100};
    struct mg_tensor k = {.q = bytes(1, n_k, row, RANDOM, -128), .scale = 0.05f, .zero = 31};
    struct mg_tensor v = {.q = bytes(2, n_k, row, RANDOM, -128), .scale = 0.01f, .zero = 77};
    float *out[2] = {array(5, n_q * row * sizeof(float)), output(4, n_q * row * sizeof(float))};
    for (int i = 0; i < 2; i++) {
        struct mg_tensor to = {.x = out[i], .scale = 0.01f, .zero = -3};
        use(i ? isa : portable);
        mg_attention_static(&to, NULL, &q, &k, &v, NULL, c->t_q * row, row, c->t_k * row, row, c->t_k * row, row, 0,
                            c->causal, diffuse, c->n_batch, c->group, c->n_head, c->t_q, c->t_k, c->d);
    }
    for (size_t i = 0; i < n_q * row; i++)
        off += out[0][i] != out[1][i];
    if (off > n_q * row / 20 + c->d)
        fail("%zu queries, %zu keys: %zu of %zu differ", n_q, n_k, off, n_q * row);
    close_to(out[1], out[0], n_q * row, 4 * 205 * 0.01 / 255.0, "queries, keys", n_q, n_k);
}

static const struct attention CASES[] = {
    {1, 1, 1, 1, 1, 1, 0, 0},     {1, 1, 2, 1, 300, 64, 1, 0},    {1, 1, 2, 3, 65, 15, 0, 0},
    {1, 1, 2, 5, 129, 17, 0, 0},  {1, 1, 2, 6, 33, 65, 17, 0},    {1, 1, 3, 7, 70, 31, 0, 0},
    {1, 1, 2, 8, 63, 3, 0, 0},    {1, 1, 2, 9, 127, 16, 0, 0},    {1, 1, 1, 15, 16, 80, 80, 0},
    {1, 1, 2, 16, 64, 64, 1, 0},  {1, 1, 2, 17, 66, 64, 0, 1},    {2, 2, 2, 70, 70, 24, 24, 1},
    {6, 2, 2, 1, 150, 24, 1, 0},  {6, 3, 2, 20, 33, 24, 24, 0},   {2, 1, 1, 49, 200, 33, 0, 0},
    {1, 1, 1, 2, 260, 129, 0, 1}, {1, 1, 1, 127, 128, 63, 0, 1},  {1, 1, 1, 18, 40, 16, 0, 1},
    {1, 1, 2, 290, 600, 8, 1, 1}, {4, 2, 1, 3, 300, 20, 0, 0},
};

void check_interface(void)
{
    start_of("matmul_int8, linear_static");
    for (size_t s = 0; s < N_SIZES; s++) {
        check_products(SIZES[s], 17, 33);
        check_products(5, SIZES[s], 65);
        check_products(7, 67, SIZES[s]);
        check_products(1, 100, SIZES[s]);
    }
    start_of("linear_int8_rows");
    check_quantized_rows(500, 129, 37);
    check_quantized_rows(50, 129, 37);
    start_of("attention");
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        struct attention c = CASES[i];
        c.gate_width = c.gate_width > 1 ? c.d : c.gate_width;
        check_attention(&c, MG_FLOAT32, 1.0f, 2 * ATTENTION_ERROR);
        check_attention(&c, MG_FLOAT32, 40.0f, 4e-4);   /* scores of order 100, where float32 leaves 1e-5 in the exponent */
    }
    start_of("attention to keys and values in bfloat16");
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        check_attention_half(&CASES[i]);
    start_of("attention_heard");
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        check_attention_heard(&CASES[i]);
    start_of("attention in int8");
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++) {
        struct attention c = CASES[i];
        c.gate_width = c.gate_width > 1 ? c.d : c.gate_width;
        check_attention(&c, MG_INT8, 1.0f, INT8_ERROR);
    }
    start_of("attention of training");
    for (int causal = 0; causal < 2; causal++)
        for (size_t t_q = 1; t_q < 60; t_q += 19)
            check_attention_training(t_q, t_q + 7, 2 * t_q + 1, causal);
    start_of("attention_static");
    for (size_t i = 0; i < sizeof CASES / sizeof CASES[0]; i++)
        for (int diffuse = 0; diffuse < 2; diffuse++)
            check_attention_static(&CASES[i], diffuse);
}
