// Quantise a matrix to fp8, once as it lies and once transposed: x [rows, columns] → [rows, columns], [columns, rows].

#pragma once

#include <tuple>

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct CastTransposeOperators {
  static std::tuple<Tensor, Tensor> cast_transpose(Tensor x, Tensor scale, bool e5m2) {
    STD_TORCH_CHECK(x.dim() == 2, "cast_transpose: x must be [rows, columns]");
    STD_TORCH_CHECK(scale.numel() == 1 && scale.scalar_type() == ScalarType::Float,
                    "cast_transpose: scale must be one float32 number");
    const Rows rows = rows_of(x);
    const ScalarType type = e5m2 ? ScalarType::Float8_e5m2 : ScalarType::Float8_e4m3fn;
    Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)}, type);
    Tensor transposed = torch::stable::new_empty(x, {x.size(1), x.size(0)}, type);
    CastTransposeArguments a{};
    a.x = rows.data(), a.scale = scale.const_data_ptr<float>();
    a.y = static_cast<uint8_t*>(y.mutable_data_ptr());
    a.transposed = static_cast<uint8_t*>(transposed.mutable_data_ptr());
    a.rows = x.size(0), a.columns = x.size(1), a.stride_x = rows.stride, a.e5m2 = e5m2, a.dtype = dtype_of(x);
    if (y.numel() > 0) Backend::run(a, x);
    return {y, transposed};
  }

  static void add_to(Library& library) { library.impl("cast_transpose", TORCH_BOX(&cast_transpose)); }
};

}  // namespace megascratch
