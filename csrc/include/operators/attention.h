// Causal attention: q [s, b, n, d], k and v [t, b, k, d] → out [s, b, n, d] and the logarithm of each row's sum [s, b, n].

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct AttentionOperators {
  static std::tuple<Tensor, Tensor> attention(
      Tensor q, Tensor k, Tensor v, std::optional<Tensor> first, double scale, double softcap) {
    q = with_contiguous_rows(q), k = with_contiguous_rows(k), v = with_contiguous_rows(v);
    AttentionArguments a = arguments(q, k, v, first, scale, softcap);
    Tensor out = empty_output(q), lse = torch::stable::new_empty(q, {a.s, a.b, a.n}, acc_type(a.dtype));
    a.result = out.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
    if (lse.numel() > 0) {
      a.parts = Backend::attention_parts(a);
      Backend::run(a, q);
    }
    return {out, lse};
  }

  static std::tuple<Tensor, Tensor, Tensor> attention_backward(
      Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, std::optional<Tensor> first, double scale,
      double softcap) {
    check_same_shape(grad, q, "attention_backward: grad and q");
    check_same_shape(out, q, "attention_backward: out and q");
    q = with_contiguous_rows(q), k = with_contiguous_rows(k), v = with_contiguous_rows(v);
    grad = with_contiguous_rows(grad), out = with_contiguous_rows(out), lse = torch::stable::contiguous(lse);
    AttentionArguments a = arguments(q, k, v, first, scale, softcap);
    STD_TORCH_CHECK(lse.scalar_type() == acc_type(a.dtype) && lse.numel() == a.s * a.b * a.n,
                    "attention_backward: lse must be what the forward pass gave");
    Tensor grad_q = empty_output(q), grad_k = empty_output(k), grad_v = empty_output(v);
    if (lse.numel() == 0) return {grad_q, torch::stable::zero_(grad_k), torch::stable::zero_(grad_v)};
    a.out = heads(out), a.grad = heads(grad);
    a.result = grad_q.mutable_data_ptr(), a.lse = lse.mutable_data_ptr();
    a.grad_k = grad_k.mutable_data_ptr(), a.grad_v = grad_v.mutable_data_ptr();
    a.parts = Backend::attention_parts(a);
    const int64_t kept = a.parts > 1 ? a.parts * 2 * Backend::attention_partial(a) : 0;
    Tensor partial = torch::stable::new_empty(q, {a.b, a.kv, kept}, acc_type(a.dtype));
    a.partial = partial.mutable_data_ptr();
    Backend::run(a, q);
    return {grad_q, grad_k, grad_v};
  }

  static void add_to(Library& library) {
    library.impl("attention", TORCH_BOX(&attention));
    library.impl("attention_backward", TORCH_BOX(&attention_backward));
  }

 private:
  static AttentionHeads heads(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1), x.stride(2)}; }

  static AttentionArguments arguments(
      const Tensor& q, const Tensor& k, const Tensor& v, const std::optional<Tensor>& first, double scale,
      double softcap) {
    check_same_shape(k, v, "attention: k and v");
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && q.size(1) == k.size(1) && q.size(3) == k.size(3) &&
                        q.scalar_type() == k.scalar_type(),
                    "attention: q must be [s, b, n, d], k and v [t, b, k, d], of one dtype");
    AttentionArguments a{};
    a.q = heads(q), a.k = heads(k), a.v = heads(v);
    a.s = q.size(0), a.t = k.size(0), a.b = q.size(1), a.n = q.size(2), a.kv = k.size(2), a.d = q.size(3);
    STD_TORCH_CHECK(a.kv > 0 ? a.n % a.kv == 0 : a.n == 0, "attention: query heads must divide into groups");
    if (first) {
      STD_TORCH_CHECK(first->scalar_type() == ScalarType::Long && first->dim() == 2 && first->size(1) == a.s &&
                          (first->size(0) == a.b || first->size(0) == 1),
                      "attention: first must be int64 [b or 1, s]");
      a.first = first->const_data_ptr<int64_t>();
      a.first_stride_b = first->size(0) == 1 ? 0 : first->stride(0), a.first_stride_s = first->stride(1);
    }
    a.scale = scale, a.softcap = softcap, a.dtype = dtype_of(q);
    return a;
  }
};

}  // namespace megascratch
