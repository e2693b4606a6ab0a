/* The whole interface of the extension.  C includes this file and cffi reads it as it stands, so it holds no
   preprocessor line.  Order of arguments: outputs, inputs, dims.  Sizes count elements unless they say bytes.
   All arrays are dense and C-ordered unless a stride says otherwise; none may overlap an output, except where noted.
   Every function may be called from several threads at once. */

enum mg_status {
    MG_OK,
    MG_NO_MEMORY,   /* scratch memory was not to be had; the output is unspecified */
    MG_BAD_VALUE,   /* a value or a size is outside its bound */
    MG_BAD_ISA      /* the instruction set is unknown, or this process may not use it */
};

/* Numbers in float32 or, if q is not NULL, in int8: x = scale * (q - zero), scale positive, zero in [-128,127].
   Written is q = clip(rint(x * (1 / scale)) + zero, -128, 127), ties to even.  Where it says const, only read. */
struct mg_tensor {
    float *x;
    int8_t *q;
    float scale;
    int32_t zero;
};

/* Instruction sets, from the plainest to the widest.  mg_isa_name(i) is NULL past the last. */
const char *mg_isa_name(size_t i);
int mg_isa_usable(size_t i);
enum mg_status mg_use_isa(const char *name);    /* "" picks the widest usable that can be trusted */
const char *mg_isa(void);

/* Features of the processor.  mg_feature_name(i) is NULL past the last.  mg_feature(i) adds up
   1: the chip has it (CPUID); 2: the operating system saves its registers (XGETBV); 4: this process may use it.  On
   AArch64 there is one answer for the three. */
const char *mg_feature_name(size_t i);
int mg_feature(size_t i);

/* Number of threads that share a call, the caller included; 1 at first. */
enum mg_status mg_set_threads(size_t n);
size_t mg_threads(void);

/* Memory of an array on a 64 byte boundary, not cleared; NULL if there is none.  mg_give_memory keeps what large arrays
   give back, 40 MiB at most, for the arrays to come; mg_release_memory gives it to the system. */
void *mg_take_memory(size_t bytes);
void mg_give_memory(void *array);
void mg_release_memory(void);

/* Packs w (n,k) s8 in [-127,127] for the products below; packed holds mg_packed_bytes(n,k) bytes on a 64 byte boundary.
   MG_BAD_VALUE: an element is -128, or k > 131072. */
size_t mg_packed_bytes(size_t n, size_t k);
enum mg_status mg_pack_int8(int8_t *packed, const int8_t *w, size_t n, size_t k);

/* acc[i][j] = sum_k a[i][k] * w[j][k].  acc (m,n) s32, a (m,k) s8.  Exact for k <= 131072. */
enum mg_status mg_matmul_int8(int32_t *acc, const int8_t *a, const int8_t *packed, size_t m, size_t n, size_t k);

/* out[i][j] = [gelu](a_scale[i] * w_scale[j] * acc[i][j] + bias[j]) + residual[i][j].  out, residual (m,n), a_scale (m),
   w_scale, bias (n); bias and residual may be NULL, residual may be out.  half, unless NULL, receives the result instead
   of out, rounded to bfloat16, ties to even. */
enum mg_status mg_linear_int8(float *out, uint16_t *half, const int8_t *a, const float *a_scale, const int8_t *packed,
                              const float *w_scale, const float *bias, const float *residual, int gelu,
                              size_t m, size_t n, size_t k);

/* mg_linear_int8 without residual and then mg_quantize_rows: q (m,n), scale (m). */
enum mg_status mg_linear_int8_rows(int8_t *q, float *scale, const int8_t *a, const float *a_scale,
                                   const int8_t *packed, const float *w_scale, const float *bias, int gelu, size_t m,
                                   size_t n, size_t k);

/* scale[i] = max_k |x[i][k]| / 127, q[i][k] = x[i][k] * (127 / max), rounded half to even.  A row whose maximum is below
   1e-30 counts as zero: q 0, scale 1.  x must be finite. */
enum mg_status mg_quantize_rows(int8_t *q, float *scale, const float *x, size_t m, size_t k);

/* out[i][j] = (x[i][j] - mean_i) / sqrt(variance_i + eps) * weight[j] + bias[j].  All (m,n) or (n); out may be x. */
enum mg_status mg_layer_norm(float *out, const float *x, const float *weight, const float *bias, float eps,
                             size_t m, size_t n);

/* mg_layer_norm, and mg_quantize_rows of its result. */
enum mg_status mg_layer_norm_rows(float *out, int8_t *q, float *scale, const float *x, const float *weight,
                                  const float *bias, float eps, size_t m, size_t n);

/* out[i][j] = [gelu](x[i][j] + bias[j]) + residual[i][j].  bias (n) and residual (m,n) may be NULL; out may be x or
   residual.  gelu(x) = x * Phi(x) within 5e-7. */
enum mg_status mg_finish(float *out, const float *x, const float *bias, const float *residual, int gelu,
                         size_t m, size_t n);

/* out = softmax(q k^T / sqrt(d)) v * gate, head by head; key j is seen by query i if j <= i + t_k - t_q or not causal.
   out (n_batch, t_q, n_head*d); q (n_batch, t_q, n_head*d), k and v (n_batch/group, t_k, n_head*d) with strides in
   elements between batches and between rows; row b of the batch attends to k[b / group].
   held: k and v are float or bfloat16 (uint16_t).  Numbers must be finite: some instruction sets hide a key that is none.
   gate: NULL, or (n_batch, t_q, n_head*gate_width) dense, gate_width 1 or d.
   precision: MG_BF16: many queries, where the instruction set can, and keys, values and the softmax are rounded to
   bfloat16.  MG_INT8: to 8 bits with scales found on the way (dynamicattention.c); all numbers are finite.
   MG_BAD_VALUE: t_k is 0, group does not divide n_batch, gate_width is neither, or causal and t_q > t_k; for MG_INT8
   d > 32768. */
enum mg_held { MG_HELD_FLOAT, MG_HELD_HALF };
enum mg_precision { MG_FLOAT32, MG_BF16, MG_INT8 };
enum mg_status mg_attention(float *out, const float *q, const void *k, const void *v, enum mg_held held,
                            const float *gate, size_t q_batch, size_t q_row, size_t k_batch, size_t k_row,
                            size_t v_batch, size_t v_row, size_t gate_width, int causal, enum mg_precision precision,
                            size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k, size_t d);

/* Packs what attention listens to, keys or (values: 1) values x (n_batch, t_k, n_head*d) in [-127,127], each with a scale
   (n_batch, t_k) above or equal to 0, which of values that are all zeros becomes 0, for mg_attention_heard; packed: n_batch
   times mg_heard_bytes, on a boundary of 4.
   MG_BAD_VALUE: t_k or d is above 32768, or t_k 0. */
size_t mg_heard_bytes(int values, size_t n_head, size_t t_k, size_t d);
enum mg_status mg_pack_heard(int8_t *packed, int values, const int8_t *x, const float *scale, size_t n_batch,
                             size_t n_head, size_t t_k, size_t d);

/* mg_attention, all keys seen, of packed keys and values; q (n_batch, t_q, n_head*d) dense and finite.  Rounded are
   queries, to 16256 steps of their largest element of a head, and softmax times the values' scales, to 32767 steps.
   MG_BAD_VALUE: as mg_pack_heard, and as mg_attention of group and gate_width. */
enum mg_status mg_attention_heard(float *out, const float *q, const int8_t *k, const int8_t *v, const float *gate,
                                  size_t gate_width, size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k,
                                  size_t d);

/* What of the logits (m,n) may come next; the others become -infinity.  Not never (n_never); of the ids below begin
   those from ranges[i][0] to ranges[i][1]-1, of the others those from ranges[i][2] to ranges[i][3]-1.  prefer: and if
   the others together are likelier than the likeliest below begin, only they.  ids and values (m,k): the largest,
   descending, of equals the smaller id first; totals (m): sum exp(logit - values[i][0]), not a number if a logit of the
   row is none, and of no meaning if values[i][0] is infinite.
   MG_BAD_VALUE: k is not 1 to n, or an id or a range is outside n. */
enum mg_status mg_choose(int64_t *ids, float *values, double *totals, float *logits, const int64_t *never,
                         const int64_t *ranges, size_t n_never, size_t begin, int prefer, size_t k, size_t m, size_t n);

/* ---- gates ---- */

enum mg_gate_kind { MG_NO_GATE, MG_PER_HEAD, MG_PER_HEAD_MLP, MG_ALL_HEADS };

/* The gate of an attention module, as minigate/attention.py has it.  weight, bias: (n_head, d), (n_head);
   MG_PER_HEAD_MLP: (n_head, n_hidden, d), (n_head, n_hidden), and those of the second linear (n_head, n_hidden), (n_head);
   MG_ALL_HEADS: (n_head, n_head*d), (n_head). */
struct mg_gate {
    enum mg_gate_kind kind;
    size_t n_hidden;
    float scale;
    const float *weight, *bias, *weight_2, *bias_2;
};

/* out (m, n_head) = scale * sigmoid(logits of h (m, n_head*d)).  MG_BAD_VALUE: the kind is MG_NO_GATE, or none at all. */
enum mg_status mg_gate(float *out, const struct mg_gate *gate, const float *h, size_t m, size_t n_head, size_t d);

/* ---- the decoder, of w8a8-dynamic and w8a8-static ---- */

/* Packed weights (n,k) with a scale for each output; bias (n) or NULL. */
struct mg_linear {
    const int8_t *packed;
    const float *scale, *bias;
};

struct mg_norm {
    const float *weight, *bias;
};

struct mg_decoder_block {
    struct mg_norm attn_ln, cross_attn_ln, mlp_ln;
    struct mg_linear attn_query, attn_key, attn_value, attn_out, cross_attn_query, cross_attn_out, mlp_0, mlp_2;
    struct mg_gate attn_gate, cross_attn_gate;
};

/* Keys and values of a block: of m rows of tokens (m, n_ctx, n_state), bfloat16 or in w8a8-static int8, of which those
   before `length` are there; of what the encoder heard, m/group windows packed by mg_pack_heard, or in w8a8-static
   (m/group, t_audio, n_state). */
struct mg_decoder_cache {
    void *k, *v;
    const int8_t *cross_k, *cross_v;
};

struct mg_decoder_dims {
    size_t m, group, t, length, n_ctx, t_audio, n_head, n_state, n_hidden;
    float eps;      /* of the layer norms */
};

/* x (m, t, n_state), t new tokens of each row after `length` others, through all blocks, in place; their keys and
   values are added to the caches.  Row b listens to what was heard in b / group.  As mg_layer_norm_rows, mg_linear_int8,
   mg_linear_int8_rows, mg_quantize_rows, mg_gate, mg_attention (MG_BF16) and mg_attention_heard one after the other.
   MG_BAD_VALUE: n_head does not divide n_state, or group m; length + t > n_ctx; t_audio is 0. */
enum mg_status mg_decoder_blocks(float *x, const struct mg_decoder_block *blocks, const struct mg_decoder_cache *caches,
                                 size_t n_blocks, const struct mg_decoder_dims *dims);

struct mg_grid {
    float scale;
    int32_t zero;
};

/* Of a block's tensors, `input` before it; X and X_gate: attention without its gate and with it. */
struct mg_decoder_grids {
    struct mg_grid input, attn_ln, attn_query, attn_key, attn_value, attn, attn_gate, attn_out, cross_attn_ln,
        cross_attn_query, cross_attn_key, cross_attn_value, cross_attn, cross_attn_gate, cross_attn_out, mlp_ln, mlp_0,
        mlp_2;
};

/* mg_decoder_blocks of x in int8, as mg_layer_norm_static, mg_linear_static, mg_gate and mg_attention_static one after the
   other. */
enum mg_status mg_decoder_static(int8_t *x, const struct mg_decoder_block *blocks, const struct mg_decoder_grids *grids,
                                 const struct mg_decoder_cache *caches, size_t n_blocks, int diffuse,
                                 const struct mg_decoder_dims *dims);

/* ---- w8a8-static ---- */

/* out = x + y of n numbers; y may be NULL. */
enum mg_status mg_add_static(const struct mg_tensor *out, const struct mg_tensor *x, const struct mg_tensor *y,
                             size_t n);

/* out[i][j] = scale[i] * q[i][j].  out, q (m,n), scale (m). */
enum mg_status mg_expand(float *out, const int8_t *q, const float *scale, size_t m, size_t n);

/* out[i][j] = [gelu](a.scale * w_scale[j] * acc[i][j] + bias[j]) + residual[i][j], acc = (a - a.zero) w^T exact.
   a int8 (m,k), w packed, out and residual (m,n), w_scale and bias (n); bias and residual may be NULL.
   MG_BAD_VALUE: a is not int8, or k > 65536. */
enum mg_status mg_linear_static(const struct mg_tensor *out, const struct mg_tensor *a, const int8_t *packed,
                                const float *w_scale, const float *bias, const struct mg_tensor *residual, int gelu,
                                size_t m, size_t n, size_t k);

/* mg_layer_norm; x and out may be int8. */
enum mg_status mg_layer_norm_static(const struct mg_tensor *out, const struct mg_tensor *x, const float *weight,
                                    const float *bias, float eps, size_t m, size_t n);

/* mg_attention of q, k, v in int8 with P = rint(255 softmax) in uint8 for the softmax; scores and P v are exact.
   diffuse: what rounding leaves of a probability is added to the next key's.  With a gate, P v is rounded to the grid
   of `ungated`, whose pointers are not used, before it is gated.
   MG_BAD_VALUE: as mg_attention; or q, k or v is not int8, t_k or d is above 32768, a gate comes without `ungated`. */
enum mg_status mg_attention_static(const struct mg_tensor *out, const struct mg_tensor *ungated,
                                   const struct mg_tensor *q, const struct mg_tensor *k, const struct mg_tensor *v,
                                   const float *gate, size_t q_batch, size_t q_row, size_t k_batch, size_t k_row,
                                   size_t v_batch, size_t v_row, size_t gate_width, int causal, int diffuse,
                                   size_t n_batch, size_t group, size_t n_head, size_t t_q, size_t t_k, size_t d);

/* ---- training ---- */

/* mg_attention without group and gate; lse (n_batch, n_head, t_q) receives ln sum_j exp(score[j]) of each query. */
enum mg_status mg_attention_lse(float *out, float *lse, const float *q, const float *k, const float *v,
                                size_t q_batch, size_t q_row, size_t k_batch, size_t k_row, size_t v_batch,
                                size_t v_row, int causal, size_t n_batch, size_t n_head, size_t t_q, size_t t_k,
                                size_t d);

/* P = exp(score - lse), dscore = P (dout v^T - sum(dout out)) / sqrt(d); dq = dscore k, dk = dscore^T q, dv = P^T dout.
   dq, dout, out (n_batch, t_q, n_head*d) and dk, dv (n_batch, t_k, n_head*d) dense; out and lse are mg_attention_lse's;
   the rest as there.  One thread works on a head, so that no result depends on their number.
   bf16: where mg_has_bf16(), products other than scores take numbers rounded to bfloat16. */
enum mg_status mg_attention_backward(float *dq, float *dk, float *dv, const float *dout, const float *out,
                                     const float *lse, const float *q, const float *k, const float *v,
                                     size_t q_batch, size_t q_row, size_t k_batch, size_t k_row, size_t v_batch,
                                     size_t v_row, int causal, int bf16, size_t n_batch, size_t n_head, size_t t_q,
                                     size_t t_k, size_t d);

/* Whether the instruction set in use multiplies bfloat16. */
int mg_has_bf16(void);

/* c[i][j] = bias[j] + sum_k a(i,k) b(j,k), a and b rounded to bfloat16 (ties to even, what is below 2^-126 to zero),
   sums in float32.  c (m,n) dense; a(i,k) = a[i * a_row + k * a_column], one of these strides being 1; b alike, j for i; bias
   (n) or NULL.  MG_BAD_ISA: mg_has_bf16() is 0. */
enum mg_status mg_product_bf16(float *c, const float *a, const float *b, const float *bias, size_t a_row,
                               size_t a_column, size_t b_row, size_t b_column, size_t m, size_t n, size_t k);

/* With xn the normalized x and g = dy * weight: dx = (g - mean(g) - xn * mean(g xn)) / sqrt(variance + eps) row by row;
   dweight = sum dy xn and dbias = sum dy over the rows, one after the other, (2,n).  dx, dy, x (m,n), weight (n). */
enum mg_status mg_layer_norm_backward(float *dx, float *dweight_dbias, const float *dy, const float *x,
                                      const float *weight, float eps, size_t m, size_t n);

/* sums[j] = sum_i x[i][j].  x (m,n). */
enum mg_status mg_column_sums(float *sums, const float *x, size_t m, size_t n);

/* dx = dy * (Phi(x) + x phi(x)), Phi within 2e-6. */
enum mg_status mg_gelu_backward(float *dx, const float *dy, const float *x, size_t n);

/* Row by row, p = softmax(logits / T), q = softmax(teacher / T), T the temperature, s = softmax(logits):
   values[i] = (sum q (ln q - ln p), -ln s[target]); dlogits = kl_scale * (p - q) + ce_scale * (s - onehot(target));
   all zeros where target < 0.  values (m,2); teacher may be NULL: its parts are 0; dlogits may be logits.  What is not
   finite makes the row's values and gradient NaN.  MG_BAD_VALUE: a target is n or more. */
enum mg_status mg_logit_losses(float *dlogits, double *values, const float *logits, const float *teacher,
                               const int64_t *targets, float temperature, float kl_scale, float ce_scale, size_t m,
                               size_t n);

/* largest = max |a|, NaN if an element is not finite; sum = sum (|a| / largest)^power;
   da = factor * sign(a) (|a| / largest)^(power - 1). */
enum mg_status mg_magnitude(float *largest, const float *a, size_t n);
enum mg_status mg_power_sum(double *sum, const float *a, float largest, size_t power, size_t n);
enum mg_status mg_power_backward(float *da, const float *a, float largest, float factor, size_t power, size_t n);

/* m = beta1 * m + g_mean * g; v = beta2 * v + (g_root * g)^2; p = shrink * p - m / (sqrt(v) + eps) * step;
   average = average + average_rate * (p - average), unless it is NULL.  Every operation is rounded by itself. */
enum mg_status mg_adamw(float *p, float *m, float *v, float *average, const float *g, float beta1, float beta2,
                        float g_mean, float g_root, float step, float eps, float shrink, float average_rate, size_t n);

/* sum = sum x^2 in float64. */
enum mg_status mg_sum_squares(double *sum, const float *x, size_t n);
