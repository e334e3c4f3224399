// What an optimizer step does to flat tensors: the AdamW update, in place, and the sum of squares.

#pragma once

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct OptimizerOperators {
  static bool is_float_or_bfloat16(DType dtype) { return dtype == DType::Float || dtype == DType::BFloat16; }

  static void adamw(
      Tensor value, Tensor grad, Tensor exp_avg, Tensor exp_avg_sq, std::optional<Tensor> model,
      std::optional<Tensor> remainder, Tensor step, double lr_scale, double weight_decay, double beta1, double beta2,
      double eps) {
    AdamWArguments a{};
    a.dtype = dtype_of(value), a.grad_dtype = dtype_of(grad);
    a.exp_avg_dtype = dtype_of(exp_avg), a.exp_avg_sq_dtype = dtype_of(exp_avg_sq);
    for (DType dtype : {a.grad_dtype, a.exp_avg_dtype, a.exp_avg_sq_dtype}) {
      STD_TORCH_CHECK(dtype == a.dtype || (is_float_or_bfloat16(dtype) && is_float_or_bfloat16(a.dtype)),
                      "adamw: grad, exp_avg and exp_avg_sq must be float32 or bfloat16, as value is, or else like value");
    }
    for (const Tensor* t : {&value, &grad, &exp_avg, &exp_avg_sq}) {
      STD_TORCH_CHECK(t->numel() == value.numel() && t->is_contiguous(),
                      "adamw: grad, exp_avg and exp_avg_sq must be like value, and contiguous");
    }
    if (remainder) {
      STD_TORCH_CHECK(!model && a.dtype == DType::BFloat16 && remainder->scalar_type() == ScalarType::Short,
                      "adamw: a remainder, int16, goes with bfloat16 values and no model");
      STD_TORCH_CHECK(remainder->numel() == value.numel() && remainder->is_contiguous(),
                      "adamw: remainder must be like value");
      a.remainder = remainder->mutable_data_ptr();
    }
    if (model) {
      STD_TORCH_CHECK(model->numel() == value.numel() && model->is_contiguous(), "adamw: model must be like value");
      a.model = model->mutable_data_ptr(), a.model_dtype = dtype_of(*model);
      STD_TORCH_CHECK(a.dtype == DType::Float && (a.model_dtype == DType::Half || a.model_dtype == DType::BFloat16),
                      "adamw: a model in half precision goes with float32 values, and no other model with any");
    }
    STD_TORCH_CHECK(step.numel() == 5 && step.is_contiguous() && step.scalar_type() == ScalarType::Double,
                    "adamw: step must be 5 numbers in float64");
    a.value = value.mutable_data_ptr(), a.grad = grad.const_data_ptr();
    a.exp_avg = exp_avg.mutable_data_ptr(), a.exp_avg_sq = exp_avg_sq.mutable_data_ptr();
    a.step = step.template const_data_ptr<double>();
    a.n = value.numel();
    a.lr_scale = lr_scale, a.weight_decay = weight_decay, a.beta1 = beta1, a.beta2 = beta2, a.eps = eps;
    if (a.n > 0) Backend::run(a, value);
  }

  static Tensor squared_norm(Tensor x) {
    x = torch::stable::contiguous(x);
    Tensor out = torch::stable::new_empty(x, {}, ScalarType::Double);
    SquaredNormArguments a{};
    a.x = x.const_data_ptr(), a.n = x.numel(), a.dtype = dtype_of(x), a.out = out.template mutable_data_ptr<double>();
    a.parts = Backend::squared_norm_parts(a.n);
    Tensor partial = torch::stable::new_empty(x, {a.parts}, ScalarType::Double);
    a.partial = partial.template mutable_data_ptr<double>();
    Backend::run(a, x);
    return out;
  }

  static void add_to(Library& library) {
    library.impl("adamw", TORCH_BOX(&adamw));
    library.impl("squared_norm", TORCH_BOX(&squared_norm));
  }
};

}  // namespace megascratch
