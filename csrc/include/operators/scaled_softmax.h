// Scaled masked softmax: scores [b, n, sq, sk] → probabilities, and its backward pass.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct SoftmaxOperators {
  static Tensor scaled_softmax(Tensor scores, double scale, bool causal, std::optional<Tensor> mask) {
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
    if (probs.numel() > 0) Backend::run(a, scores);
    return probs;
  }

  static Tensor scaled_softmax_backward(Tensor grad, Tensor probs, double scale, bool causal) {
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
    if (grad_scores.numel() > 0) Backend::run(a, probs);
    return grad_scores;
  }

  static void add_to(Library& library) {
    library.impl("scaled_softmax", TORCH_BOX(&scaled_softmax));
    library.impl("scaled_softmax_backward", TORCH_BOX(&scaled_softmax_backward));
  }
};

}  // namespace megascratch
