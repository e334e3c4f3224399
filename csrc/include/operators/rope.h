// Rotary position embedding: q [s, b, n, d], k [s, b, m, d] → the same, contiguous.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct RopeOperators {
  static std::tuple<Tensor, Tensor> rope(
      Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t offset, bool interleaved,
      bool inverse) {
    STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4, "rope: q and k must be [s, b, n, d] and [s, b, m, d]");
    STD_TORCH_CHECK(q.size(0) == k.size(0) && q.size(1) == k.size(1) && q.size(3) == k.size(3),
                    "rope: q and k disagree");
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
      STD_TORCH_CHECK(positions->scalar_type() == ScalarType::Long && positions->dim() == 2 &&
                          positions->size(0) == b && positions->size(1) == s,
                      "rope: positions must be int64 [b, s]");
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
    if (s * b > 0) Backend::run(a, q);
    return {q_out, k_out};
  }

  static RopeHeads rope_heads(const Tensor& x, const Tensor& out) {
    return {x.const_data_ptr(), out.mutable_data_ptr(), x.size(2), x.stride(0), x.stride(1), x.stride(2)};
  }

  static void add_to(Library& library) { library.impl("rope", TORCH_BOX(&rope)); }
};

}  // namespace megascratch
