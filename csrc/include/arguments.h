// What a fused operator's kernel is told: raw pointers, 64-bit sizes and strides, no torch.
//
// The same structures serve the C++ kernels, the CUDA kernels and the host run of the CUDA kernels. Sizes and strides
// count elements. Inputs may be strided, with a contiguous last dimension; outputs are contiguous.
//
// Legend: s sequence, b micro-batch, n heads, d head dimension, r rotary dimensions, sq/sk query/key length, h hidden;
// rows: all leading dimensions as one, a single stride apart.

#pragma once

#include <cstdint>

namespace megascratch {

enum class DType : int32_t { Float, Double, Half, BFloat16 };

// One of q and k: x [s, b, n, d] → out [s, b, n, d].
struct RopeHeads {
  const void* x;
  void* out;
  int64_t n;
  int64_t stride_s, stride_b, stride_n;
};

struct RopeArguments {
  RopeHeads q, k;
  const void* cos;           // [s_max, r/2], in the accumulation type
  const void* sin;           // [s_max, r/2]
  const int64_t* positions;  // [b, s], or null: position = offset + index along s
  int64_t positions_stride_b, positions_stride_s;
  int64_t offset;
  int64_t s, b, d, r, s_max;
  bool interleaved;          // pairs (2j, 2j+1) instead of (j, j + r/2)
  bool inverse;              // rotate by the negative angle: the backward pass
  DType dtype;
};

struct SoftmaxArguments {
  const void* scores;  // [b, n, sq, sk]
  void* probs;         // [b, n, sq, sk]
  int64_t b, n, sq, sk;
  int64_t stride_b, stride_n, stride_q;
  const bool* mask;    // true = masked out; null for none. A broadcast dimension has stride 0.
  int64_t mask_stride_b, mask_stride_n, mask_stride_q, mask_stride_k;
  double scale;
  bool causal;         // query i sees the keys up to i + sk − sq
  DType dtype;
};

struct SoftmaxBackwardArguments {
  const void* grad;    // [b, n, sq, sk], of the probabilities
  const void* probs;   // [b, n, sq, sk]
  void* grad_scores;   // [b, n, sq, sk]
  int64_t b, n, sq, sk;
  int64_t grad_stride_b, grad_stride_n, grad_stride_q;
  int64_t probs_stride_b, probs_stride_n, probs_stride_q;
  double scale;
  bool causal;
  DType dtype;
};

// RMSNorm, LayerNorm, and residual-add + RMSNorm.
struct NormArguments {
  const void* x;         // [rows, h]
  const void* residual;  // [rows, h], or null: normalise x + residual, which goes to `sum`
  const void* weight;    // [h], in the dtype or, with `wide_parameters`, in the accumulation type
  const void* bias;      // [h], likewise; LayerNorm only
  void* sum;             // [rows, h]
  void* y;               // [rows, h]
  void* mean;            // [rows], in the accumulation type; null for RMSNorm
  void* rstd;            // [rows]
  int64_t rows, h, stride_x, stride_residual;
  double eps;
  bool wide_parameters;
  DType dtype;
};

// Each part of the rows leaves its sums over tokens in `partial`; a second step adds the parts up.
struct NormBackwardArguments {
  const void* grad;      // [rows, h], of y
  const void* grad_sum;  // [rows, h], or null: added to the gradient of x
  const void* x;         // [rows, h], what was normalised
  const void* weight;    // [h]
  const void* mean;      // [rows], null for RMSNorm
  const void* rstd;      // [rows]
  void* dx;              // [rows, h]
  void* dweight;         // [h], like weight
  void* dbias;           // [h], null for RMSNorm
  void* partial;         // [parts, h] of dweight, then [parts, h] of dbias, in the accumulation type
  int64_t rows, h, parts, stride_grad, stride_grad_sum, stride_x;
  bool wide_parameters;
  DType dtype;
};

enum class Curve : int32_t { Silu, Gelu, GeluTanh, ReluSquared };

// y = curve(x), or gated, with x = [gate; up] along the last dimension, y = curve(gate) · up.
struct ActivationArguments {
  const void* x;     // [rows, f], or gated [rows, 2f]
  void* y;           // [rows, f]; forward only
  const void* grad;  // [rows, f], of y; null in the forward pass
  void* dx;          // like x, contiguous
  int64_t rows, f, stride_x, stride_grad;
  Curve curve;
  bool gated;
  DType dtype;
};

// A rank's columns of the logits, [rows, columns], of which the first n_real are words: first, first + 1, …
struct LogitStatisticsArguments {
  const void* logits;
  const int64_t* labels;       // [rows], of the whole vocabulary
  void *peak, *total, *picked;  // [rows], in the accumulation type: maximum, Σ exp(logit − maximum), the label's logit
  int64_t rows, stride, first, n_real;
  DType dtype;
};

struct LogitGradientArguments {
  const void* grad;       // [rows], of the label's log-probability, in the accumulation type
  const void* logits;     // [rows, columns]
  const int64_t* labels;  // [rows]
  const void* log_total;  // [rows], log Σ exp(logit) over the whole vocabulary
  void* grad_logits;      // [rows, columns]; may be the logits themselves
  int64_t rows, columns, stride, stride_out, first, n_real;
  DType dtype;
};

// Everything that the step has of n parameters; the formula stands in megascratch/ops/adamw.py. Each is stored in a dtype
// of its own: gradient and averages in float32 or bfloat16 where the values are in either, else like the values.
struct AdamWArguments {
  void *value, *exp_avg, *exp_avg_sq;  // [n]
  void* remainder;                     // [n] or null: of float32 values whose nearest bfloat16 numbers `value` holds
  const void* grad;                    // [n]
  void* model;                         // [n] or null: the new float32 values, rounded to half precision
  const double* step;  // [5]: factor of the gradients, lr, 1 / (1 − β₁ᵗ), 1 / √(1 − β₂ᵗ), and 0 if nothing is to change
  int64_t n;
  double lr_scale, weight_decay, beta1, beta2, eps;
  DType dtype, grad_dtype, exp_avg_dtype, exp_avg_sq_dtype, model_dtype;
};

// Rows of normal numbers: mean + std · normal(key, index), where a row's first element has the index `starts` says.
struct NormalArguments {
  void* out;              // [rows, n]
  const int64_t* starts;  // [rows]
  uint64_t key;
  int64_t rows, n;
  double mean, std;
  DType dtype;
};

// x · scale in fp8, as it lies and transposed.
struct CastTransposeArguments {
  const void* x;         // [rows, columns]
  const float* scale;    // one number
  uint8_t *y, *transposed;  // [rows, columns], [columns, rows]
  int64_t rows, columns, stride_x;
  bool e5m2;             // else e4m3
  DType dtype;
};

// Σ x² in double precision, by parts whose sums are added up at the end.
struct SquaredNormArguments {
  const void* x;     // [n]
  double* partial;   // [parts]
  double* out;       // one number
  int64_t n, parts;
  DType dtype;
};

// One tensor of attention, [s, b, n, d] or [t, b, k, d].
struct AttentionHeads {
  const void* at;
  int64_t stride_s, stride_b, stride_n;
};

// Causal attention: query i is token t − s + i. A task is a part of the queries of one sample and key/value head.
struct AttentionArguments {
  AttentionHeads q, k, v;
  AttentionHeads out, grad;  // read in the backward pass
  void* result;              // [s, b, n, d]: the output, or the gradient of q
  void* lse;                 // [s, b, n], log Σ exp(score), in the accumulation type: written forward, read backward
  void *grad_k, *grad_v;     // [t, b, k, d]; null in the forward pass
  void* partial;             // [b, k, parts, 2, t_rows, d_padded], in the accumulation type: what several parts add to them
  const int64_t* first;      // [b or 1, s], the first key that each query sees; null: key 0
  int64_t first_stride_b, first_stride_s;
  int64_t s, t, b, n, kv, d;
  int64_t parts;             // of a sample's and key/value head's queries
  double scale, softcap;     // softcap 0: none
  DType dtype;
};

struct CacheHeads {
  void* at;
  int64_t stride_t, stride_b, stride_n;
};

// Attention of one query of each sequence over a cache, which its own key and value are first put into. A task is one
// sequence's key/value head.
struct CachedAttentionArguments {
  AttentionHeads q, k, v;     // [1, b, n or kv, d]
  CacheHeads keys, values;    // [t, b, kv, d]
  void* out;                  // [b, n, d]
  const int64_t* positions;   // [b], of the query: it sees itself and the `window` − 1 tokens before
  int64_t positions_stride;
  int64_t t, b, n, kv, d, window;
  double scale, softcap;      // softcap 0: none
  DType dtype;
};

// A column of each row of logits, by the share u of Σ exp(logit / temperature) that the columns up to it reach.
struct DrawArguments {
  const void* logits;  // [rows, columns]
  const double* u;     // [rows]
  int64_t* drawn;      // [rows]
  int64_t rows, columns, stride;
  double temperature;
  DType dtype;
};

// out = a b, or added to it: [m, n] = [m, k] [k, n], a and b of any strides; out's rows are contiguous.
struct MatmulArguments {
  const void *a, *b;
  void* out;         // in the dtype, or with `wide_result` in the accumulation type
  int64_t m, n, k;
  int64_t a_row, a_column, b_row, b_column, out_row;
  bool add, wide_result;
  DType dtype;       // of a and b
};

}  // namespace megascratch
