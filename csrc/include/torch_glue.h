// From torch tensors to kernel arguments, over the stable ABI; shared by the CPU, CUDA and host-run registrations.
//
// A registration wraps each function here around its own way to run a kernel: `Launch` takes the filled arguments.
// The Python wrappers tell users in their own words what is wrong; the checks here keep memory safe for whoever calls
// the operators directly.

#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "arguments.h"

namespace megascratch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::Float;
    case ScalarType::Double: return DType::Double;
    case ScalarType::Half: return DType::Half;
    case ScalarType::BFloat16: return DType::BFloat16;
    default: STD_TORCH_CHECK(false, "megascratch: only float16, bfloat16, float32 and float64 are supported");
  }
}

inline ScalarType acc_type(DType dtype) { return dtype == DType::Double ? ScalarType::Double : ScalarType::Float; }

// Kernels read the last dimension without a stride; the others keep theirs, so that views are not copied.
inline Tensor with_contiguous_rows(const Tensor& x) {
  return x.stride(x.dim() - 1) == 1 || x.size(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

inline Tensor empty_output(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

inline RopeHeads rope_heads(const Tensor& x, const Tensor& out) {
  return {x.const_data_ptr(), out.mutable_data_ptr(), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
}

template <typename Launch>
std::tuple<Tensor, Tensor> run_rope(
    Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t offset, bool interleaved,
    bool inverse, const Launch& launch) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "rope: q and k must be [s, b, n, d] and [s, b, m, d]");
  STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3), "rope: q and k disagree");
  STD_TORCH_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(0) == sin.size(0) && cos.size(1) == sin.size(1),
                  "rope: cos and sin must be [s_max, r/2]");
  const DType dtype = dtype_of(q);
  STD_TORCH_CHECK(dtype_of(k) == dtype, "rope: q and k differ in dtype");
  STD_TORCH_CHECK(cos.scalar_type() == acc_type(dtype) && sin.scalar_type() == acc_type(dtype),
                  "rope: the table must be in the accumulation dtype");
  const int64_t s = q.size(0), b = q.size(1), d = q.size(3), r = 2 * cos.size(1), s_max = cos.size(0);
  STD_TORCH_CHECK(r <= d, "rope: the table has more rotary dimensions than a head");
  STD_TORCH_CHECK(positions || (offset >= 0 && offset + s <= s_max), "rope: positions run past the table");
  if (positions) {
    STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Long && positions->dim() == 2 && positions->size(0) == b &&
                        positions->size(1) == s, "rope: positions must be int64 [b, s]");
  }
  q = with_contiguous_rows(q), k = with_contiguous_rows(k);
  cos = torch::stable::contiguous(cos), sin = torch::stable::contiguous(sin);
  Tensor q_out = empty_output(q), k_out = empty_output(k);
  RopeArguments a{};
  a.q = rope_heads(q, q_out), a.k = rope_heads(k, k_out);
  a.cos = cos.const_data_ptr(), a.sin = sin.const_data_ptr();
  if (positions) {
    a.positions = positions->const_data_ptr<int64_t>();
    a.positions_stride_b = positions->stride(0), a.positions_stride_s = positions->stride(1);
  }
  a.offset = offset, a.s = s, a.b = b, a.d = d, a.r = r, a.s_max = s_max;
  a.interleaved = interleaved, a.inverse = inverse, a.dtype = dtype;
  if (s * b > 0) launch(a, q);
  return {q_out, k_out};
}

template <typename Launch>
Tensor run_scaled_softmax(Tensor scores, double scale, bool causal, std::optional<Tensor> mask, const Launch& launch) {
  STD_TORCH_CHECK(scores.dim() == 4, "scaled_softmax: scores must be [b, n, sq, sk]");
  const DType dtype = dtype_of(scores);
  scores = with_contiguous_rows(scores);
  Tensor probs = empty_output(scores);
  SoftmaxArguments a{};
  a.scores = scores.const_data_ptr(), a.probs = probs.mutable_data_ptr();
  a.b = scores.size(0), a.n = scores.size(1), a.sq = scores.size(2), a.sk = scores.size(3);
  a.stride_b = scores.stride(0), a.stride_n = scores.stride(1), a.stride_q = scores.stride(2);
  if (mask) {
    STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Bool && mask->dim() == 4, "scaled_softmax: mask must be bool");
    int64_t* strides[] = {&a.mask_stride_b, &a.mask_stride_n, &a.mask_stride_q, &a.mask_stride_k};
    for (int64_t dim = 0; dim < 4; ++dim) {
      const bool fits = mask->size(dim) == 1 || mask->size(dim) == scores.size(dim);
      STD_TORCH_CHECK(fits, "scaled_softmax: the mask does not broadcast to the scores");
      *strides[dim] = mask->size(dim) == 1 ? 0 : mask->stride(dim);
    }
    a.mask = mask->const_data_ptr<bool>();
  }
  a.scale = scale, a.causal = causal, a.dtype = dtype;
  if (probs.numel() > 0) launch(a, scores);
  return probs;
}

template <typename Launch>
Tensor run_scaled_softmax_backward(Tensor grad, Tensor probs, double scale, bool causal, const Launch& launch) {
  STD_TORCH_CHECK(grad.dim() == 4 && probs.dim() == 4, "scaled_softmax_backward: must be [b, n, sq, sk]");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(grad.size(dim) == probs.size(dim), "scaled_softmax_backward: grad and probs disagree");
  }
  const DType dtype = dtype_of(probs);
  STD_TORCH_CHECK(dtype_of(grad) == dtype, "scaled_softmax_backward: grad and probs differ in dtype");
  grad = with_contiguous_rows(grad), probs = with_contiguous_rows(probs);
  Tensor grad_scores = empty_output(probs);
  SoftmaxBackwardArguments a{};
  a.grad = grad.const_data_ptr(), a.probs = probs.const_data_ptr(), a.grad_scores = grad_scores.mutable_data_ptr();
  a.b = probs.size(0), a.n = probs.size(1), a.sq = probs.size(2), a.sk = probs.size(3);
  a.grad_stride_b = grad.stride(0), a.grad_stride_n = grad.stride(1), a.grad_stride_q = grad.stride(2);
  a.probs_stride_b = probs.stride(0), a.probs_stride_n = probs.stride(1), a.probs_stride_q = probs.stride(2);
  a.scale = scale, a.causal = causal, a.dtype = dtype;
  if (grad_scores.numel() > 0) launch(a, probs);
  return grad_scores;
}

}  // namespace megascratch
