// From torch tensors to kernel arguments, over the stable ABI; shared by the CPU, CUDA and host-run registrations.
//
// The operators stand in operators/, each a function of tensors that fills its arguments and hands them to
// `Backend::run(arguments, on)`; a registration brings the backend. The Python wrappers tell users in their own words
// what is wrong; the checks here keep memory safe for whoever calls the operators directly.

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
using Library = torch::stable::detail::StableLibrary;

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

// A tensor [..., n] as rows of n elements, one stride apart.
struct Rows {
  Tensor tensor;
  int64_t count, stride;

  const void* data() const { return tensor.const_data_ptr(); }
};

// The tensor itself where one stride leads from each row to the next, else a contiguous copy.
inline Rows rows_of(const Tensor& x) {
  const Tensor rows = with_contiguous_rows(x);
  const int64_t n = rows.size(rows.dim() - 1);
  int64_t count = 1, stride = n;
  bool regular = true;
  for (int64_t dim = rows.dim() - 2; dim >= 0; --dim) {
    if (rows.size(dim) == 1) continue;
    if (count == 1) stride = rows.stride(dim);
    regular = regular && rows.stride(dim) == count * stride;
    count *= rows.size(dim);
  }
  if (regular || count == 0) return {rows, count, stride};
  return {torch::stable::contiguous(rows), count, n};
}

inline void check_same_shape(const Tensor& x, const Tensor& y, const char* names) {
  bool same = x.dim() == y.dim();
  for (int64_t dim = 0; same && dim < x.dim(); ++dim) same = x.size(dim) == y.size(dim);
  STD_TORCH_CHECK(same && x.scalar_type() == y.scalar_type(), names, " must agree in shape and dtype");
}

}  // namespace megascratch
