// Normal numbers that depend on a key and their index alone.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct RandomOperators {
  static void fill_normal(Tensor out, int64_t key, Tensor starts, double mean, double std) {
    STD_TORCH_CHECK(out.dim() == 2 && out.is_contiguous(), "fill_normal: out must be a contiguous matrix");
    STD_TORCH_CHECK(starts.dim() == 1 && starts.is_contiguous() && starts.size(0) == out.size(0) &&
                        starts.scalar_type() == ScalarType::Long,
                    "fill_normal: starts must be contiguous, int64, one a row of out");
    NormalArguments a{};
    a.out = out.mutable_data_ptr(), a.starts = starts.const_data_ptr<int64_t>();
    a.key = static_cast<uint64_t>(key), a.rows = out.size(0), a.n = out.size(1);
    a.mean = mean, a.std = std, a.dtype = dtype_of(out);
    if (out.numel() > 0) Backend::run(a, out);
  }

  static void add_to(Library& library) { library.impl("fill_normal", TORCH_BOX(&fill_normal)); }
};

}  // namespace megascratch
