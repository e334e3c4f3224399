// RMSNorm, residual-add + RMSNorm and LayerNorm over the last dimension: x [..., h], parameters [h].

#pragma once

#include <vector>

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct NormOperators {
  static std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double eps) {
    Normalised n = normalise(x, nullptr, weight, nullptr, eps, false);
    return {n.y, n.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> add_rms_norm(Tensor x, Tensor residual, Tensor weight, double eps) {
    check_same_shape(x, residual, "add_rms_norm: x and residual");
    Normalised n = normalise(x, &residual, weight, nullptr, eps, false);
    return {n.y, n.sum, n.rstd};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm(Tensor x, Tensor weight, Tensor bias, double eps) {
    Normalised n = normalise(x, nullptr, weight, &bias, eps, true);
    return {n.y, n.mean, n.rstd};
  }

  static std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor rstd) {
    Gradients g = backward(grad, nullptr, x, weight, nullptr, rstd);
    return {g.dx, g.dweight};
  }

  static std::tuple<Tensor, Tensor> add_rms_norm_backward(
      Tensor grad, Tensor grad_sum, Tensor sum, Tensor weight, Tensor rstd) {
    check_same_shape(grad_sum, sum, "add_rms_norm_backward: grad_sum and sum");
    Gradients g = backward(grad, &grad_sum, sum, weight, nullptr, rstd);
    return {g.dx, g.dweight};
  }

  static std::tuple<Tensor, Tensor, Tensor> layer_norm_backward(
      Tensor grad, Tensor x, Tensor weight, Tensor mean, Tensor rstd) {
    Gradients g = backward(grad, nullptr, x, weight, &mean, rstd);
    return {g.dx, g.dweight, g.dbias};
  }

  static void add_to(Library& library) {
    library.impl("rms_norm", TORCH_BOX(&rms_norm));
    library.impl("rms_norm_backward", TORCH_BOX(&rms_norm_backward));
    library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
    library.impl("add_rms_norm_backward", TORCH_BOX(&add_rms_norm_backward));
    library.impl("layer_norm", TORCH_BOX(&layer_norm));
    library.impl("layer_norm_backward", TORCH_BOX(&layer_norm_backward));
  }

 private:
  struct Normalised {
    Tensor y, sum, mean, rstd;
  };
  struct Gradients {
    Tensor dx, dweight, dbias;
  };

  // [h], contiguous, in x's dtype or in its accumulation type: what the kernels read.
  static Tensor readable(const Tensor& parameter, const Tensor& x, bool wide) {
    const ScalarType type = wide ? acc_type(dtype_of(x)) : x.scalar_type();
    const bool same = parameter.scalar_type() == type;
    return torch::stable::contiguous(same ? parameter : torch::stable::to(parameter, type));
  }

  static void check_parameter(const Tensor& parameter, const Tensor& x) {
    STD_TORCH_CHECK(x.dim() > 0 && parameter.dim() == 1 && parameter.size(0) == x.size(x.dim() - 1),
                    "norm: x must be [..., h] and its parameters [h]");
  }

  static Tensor empty_statistic(const Tensor& x) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = 1;
    return torch::stable::new_empty(x, sizes, acc_type(dtype_of(x)));
  }

  static Normalised normalise(
      const Tensor& x, const Tensor* residual, const Tensor& weight, const Tensor* bias, double eps, bool centred) {
    check_parameter(weight, x);
    if (bias) check_parameter(*bias, x);
    const bool wide = weight.scalar_type() != x.scalar_type() || (bias && bias->scalar_type() != x.scalar_type());
    const Rows rows = rows_of(x), added = rows_of(residual ? *residual : x);
    const Tensor w = readable(weight, x, wide), b = bias ? readable(*bias, x, wide) : w;
    Normalised n{empty_output(x), residual ? empty_output(x) : x, centred ? empty_statistic(x) : x, empty_statistic(x)};
    NormArguments a{};
    a.x = rows.data(), a.weight = w.const_data_ptr(), a.y = n.y.mutable_data_ptr(), a.rstd = n.rstd.mutable_data_ptr();
    if (residual) a.residual = added.data(), a.sum = n.sum.mutable_data_ptr();
    if (bias) a.bias = b.const_data_ptr();
    if (centred) a.mean = n.mean.mutable_data_ptr();
    a.rows = rows.count, a.h = x.size(x.dim() - 1), a.stride_x = rows.stride, a.stride_residual = added.stride;
    a.eps = eps, a.wide_parameters = wide, a.dtype = dtype_of(x);
    if (a.rows > 0 && a.h > 0) Backend::run(a, x);
    return n;
  }

  static Gradients backward(
      const Tensor& grad, const Tensor* grad_sum, const Tensor& x, const Tensor& weight, const Tensor* mean,
      const Tensor& rstd) {
    check_same_shape(grad, x, "norm: grad and x");
    check_parameter(weight, x);
    const Rows grads = rows_of(grad), rows = rows_of(x), added = rows_of(grad_sum ? *grad_sum : grad);
    const int64_t h = x.size(x.dim() - 1);
    for (const Tensor* statistic : {&rstd, mean}) {
      STD_TORCH_CHECK(!statistic || (statistic->numel() == rows.count && statistic->is_contiguous() &&
                                     statistic->scalar_type() == acc_type(dtype_of(x))),
                      "norm: mean and rstd must be what the forward pass gave");
    }
    const bool wide = weight.scalar_type() != x.scalar_type();
    const Tensor w = readable(weight, x, wide);
    Gradients g{empty_output(x), torch::stable::new_empty(w, {h}), torch::stable::new_empty(w, {mean ? h : 0})};
    if (rows.count == 0 || h == 0) {
      torch::stable::zero_(g.dweight), torch::stable::zero_(g.dbias);
    } else {
      NormBackwardArguments a{};
      a.grad = grads.data(), a.x = rows.data(), a.weight = w.const_data_ptr(), a.rstd = rstd.const_data_ptr();
      if (grad_sum) a.grad_sum = added.data();
      if (mean) a.mean = mean->const_data_ptr(), a.dbias = g.dbias.mutable_data_ptr();
      a.dx = g.dx.mutable_data_ptr(), a.dweight = g.dweight.mutable_data_ptr();
      a.rows = rows.count, a.h = h;
      a.stride_grad = grads.stride, a.stride_x = rows.stride, a.stride_grad_sum = added.stride;
      a.wide_parameters = wide, a.dtype = dtype_of(x);
      a.parts = Backend::norm_parts(a);
      Tensor partial = torch::stable::new_empty(x, {mean ? 2 : 1, a.parts, h}, acc_type(a.dtype));
      a.partial = partial.mutable_data_ptr();
      Backend::run(a, x);
    }
    if (g.dweight.scalar_type() != weight.scalar_type()) {
      g.dweight = torch::stable::to(g.dweight, weight.scalar_type());
      g.dbias = torch::stable::to(g.dbias, weight.scalar_type());
    }
    return g;
  }
};

}  // namespace megascratch
