// Matrix products into a given result: out [m, n] = a [m, k] b [k, n], or added to it.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct MatmulOperators {
  static void matmul(Tensor out, Tensor a, Tensor b, bool add) {
    STD_TORCH_CHECK(out.dim() == 2 && a.dim() == 2 && b.dim() == 2, "matmul: out, a and b must be matrices");
    MatmulArguments args{};
    args.m = out.size(0), args.n = out.size(1), args.k = a.size(1);
    STD_TORCH_CHECK(a.size(0) == args.m && b.size(0) == args.k && b.size(1) == args.n,
                    "matmul: out [m, n], a [m, k] and b [k, n] disagree");
    args.dtype = dtype_of(a);
    STD_TORCH_CHECK(dtype_of(b) == args.dtype, "matmul: a and b must be of one dtype");
    args.wide_result = out.scalar_type() == acc_type(args.dtype);
    STD_TORCH_CHECK(args.wide_result || dtype_of(out) == args.dtype,
                    "matmul: out must be in the accumulation type, or like a and b");
    STD_TORCH_CHECK(out.stride(1) == 1 || args.n <= 1, "matmul: the rows of out must be contiguous");
    args.a = a.const_data_ptr(), args.b = b.const_data_ptr(), args.out = out.mutable_data_ptr();
    args.a_row = a.stride(0), args.a_column = a.stride(1);
    args.b_row = b.stride(0), args.b_column = b.stride(1);
    args.out_row = out.stride(0), args.add = add;
    if (out.numel() > 0) Backend::run(args, out);
  }

  static void add_to(Library& library) { library.impl("matmul", TORCH_BOX(&matmul)); }
};

}  // namespace megascratch
