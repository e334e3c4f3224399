// Blocked attention: what stands between the matrix products, scores [p, r, w] changed in place, and the products.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct AttentionOperators {
  static void attention_block(
      Tensor scores, Tensor peak, Tensor total, Tensor out, std::optional<Tensor> first, int64_t start, int64_t last,
      int64_t group, double scale, double softcap) {
    AttentionArguments a{};
    a.block = block_of(scores, first, start, last, group, scale, softcap);
    const int64_t rows = a.block.p * a.block.r;
    a.scores = scores.mutable_data_ptr();
    a.peak = per_row(peak, rows, a.block.dtype), a.total = per_row(total, rows, a.block.dtype);
    a.out = per_row(out, out.numel(), a.block.dtype);
    STD_TORCH_CHECK(rows == 0 || out.numel() % rows == 0, "attention_block: out must be [p, r, d]");
    a.d = rows == 0 ? 0 : out.numel() / rows;
    if (scores.numel() > 0) Backend::run(a, scores);
  }

  static void attention_block_backward(
      Tensor scores, Tensor grad, Tensor lse, Tensor delta, std::optional<Tensor> first, int64_t start, int64_t last,
      int64_t group, double scale, double softcap) {
    AttentionBackwardArguments a{};
    a.block = block_of(scores, first, start, last, group, scale, softcap);
    check_same_shape(scores, grad, "attention_block_backward: scores and grad");
    STD_TORCH_CHECK(grad.is_contiguous(), "attention_block_backward: grad must be contiguous");
    a.scores = scores.mutable_data_ptr(), a.grad = grad.mutable_data_ptr();
    a.lse = per_row(lse, a.block.p * a.block.r, a.block.dtype);
    a.delta = per_row(delta, a.block.p * a.block.r, a.block.dtype);
    if (scores.numel() > 0) Backend::run(a, scores);
  }

  static void product(Tensor out, Tensor a, Tensor b, bool add) {
    STD_TORCH_CHECK(out.dim() == 3 && a.dim() == 3 && b.dim() == 3, "product: out, a and b must be [p, m, n]");
    ProductArguments args{};
    args.p = out.size(0), args.m = out.size(1), args.n = out.size(2), args.k = a.size(2);
    STD_TORCH_CHECK(a.size(0) == args.p && b.size(0) == args.p && a.size(1) == args.m && b.size(1) == args.k &&
                        b.size(2) == args.n, "product: out [p, m, n], a [p, m, k] and b [p, k, n] disagree");
    for (const Tensor* x : {&out, &a, &b}) {
      STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float, "product: only float32 is supported");
    }
    STD_TORCH_CHECK(out.stride(2) == 1 || args.n <= 1, "product: the rows of out must be contiguous");
    args.a = static_cast<const float*>(a.const_data_ptr()), args.b = static_cast<const float*>(b.const_data_ptr());
    args.out = static_cast<float*>(out.mutable_data_ptr());
    args.a_pair = a.stride(0), args.a_row = a.stride(1), args.a_column = a.stride(2);
    args.b_pair = b.stride(0), args.b_row = b.stride(1), args.b_column = b.stride(2);
    args.out_pair = out.stride(0), args.out_row = out.stride(1);
    args.add = add;
    if (out.numel() > 0) Backend::run(args, out);
  }

  static void add_to(Library& library) {
    library.impl("attention_block", TORCH_BOX(&attention_block));
    library.impl("attention_block_backward", TORCH_BOX(&attention_block_backward));
    library.impl("product", TORCH_BOX(&product));
  }

 private:
  static AttentionBlock block_of(
      const Tensor& scores, const std::optional<Tensor>& first, int64_t start, int64_t last, int64_t group,
      double scale, double softcap) {
    STD_TORCH_CHECK(scores.dim() == 3 && scores.is_contiguous(), "attention: scores must be contiguous [p, r, w]");
    AttentionBlock block{};
    block.p = scores.size(0), block.r = scores.size(1), block.w = scores.size(2), block.g = group;
    STD_TORCH_CHECK(group > 0 && block.r % group == 0, "attention: the rows must divide into groups");
    if (first) {
      STD_TORCH_CHECK(first->scalar_type() == ScalarType::Long && first->dim() == 2 && first->size(0) == block.p &&
                          first->size(1) == block.r / group && (first->stride(1) == 1 || first->size(1) == 1),
                      "attention: first must be int64 [p, r/g], its rows contiguous");
      block.first = first->const_data_ptr<int64_t>(), block.first_stride = first->stride(0);
    }
    block.start = start, block.last = last;
    block.scale = scale, block.softcap = softcap, block.dtype = dtype_of(scores);
    return block;
  }

  static void* per_row(const Tensor& x, int64_t count, DType dtype) {
    STD_TORCH_CHECK(x.is_contiguous() && x.numel() == count && x.scalar_type() == acc_type(dtype),
                    "attention: the rows' numbers must be contiguous and in the accumulation dtype");
    return x.mutable_data_ptr();
  }
};

}  // namespace megascratch
