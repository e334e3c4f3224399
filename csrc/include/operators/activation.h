// Activations of the feed-forward layer: plain x [..., f] → [..., f], gated x [..., 2f] = [gate; up] → [..., f].

#pragma once

#include <vector>

#include "torch_glue.h"

namespace megascratch {

template <typename Backend>
struct ActivationOperators {
  template <Curve curve, bool gated>
  static Tensor forward(Tensor x) {
    STD_TORCH_CHECK(x.dim() > 0 && (!gated || x.size(x.dim() - 1) % 2 == 0),
                    "activation: x must be [..., f], or gated [..., 2f]");
    const Rows rows = rows_of(x);
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    if (gated) sizes.back() /= 2;
    Tensor y = torch::stable::new_empty(x, sizes);
    ActivationArguments a{};
    a.x = rows.data(), a.y = y.mutable_data_ptr();
    a.rows = rows.count, a.f = sizes.back(), a.stride_x = rows.stride;
    a.curve = curve, a.gated = gated, a.dtype = dtype_of(x);
    if (y.numel() > 0) Backend::run(a, x);
    return y;
  }

  template <Curve curve, bool gated>
  static Tensor backward(Tensor grad, Tensor x) {
    constexpr int64_t parts = gated ? 2 : 1;
    STD_TORCH_CHECK(x.dim() > 0 && grad.dim() == x.dim() && grad.numel() * parts == x.numel() &&
                        grad.size(x.dim() - 1) * parts == x.size(x.dim() - 1) && grad.scalar_type() == x.scalar_type(),
                    "activation: grad must be [..., f] like the result");
    const Rows grads = rows_of(grad), rows = rows_of(x);
    Tensor dx = empty_output(x);
    ActivationArguments a{};
    a.x = rows.data(), a.grad = grads.data(), a.dx = dx.mutable_data_ptr();
    a.rows = rows.count, a.f = grad.size(grad.dim() - 1), a.stride_x = rows.stride, a.stride_grad = grads.stride;
    a.curve = curve, a.gated = gated, a.dtype = dtype_of(x);
    if (dx.numel() > 0) Backend::run(a, x);
    return dx;
  }

  static void add_to(Library& library) {
    add<Curve::Gelu, false>(library, "gelu", "gelu_backward");
    add<Curve::GeluTanh, false>(library, "gelu_tanh", "gelu_tanh_backward");
    add<Curve::ReluSquared, false>(library, "relu_squared", "relu_squared_backward");
    add<Curve::Silu, true>(library, "swiglu", "swiglu_backward");
    add<Curve::Gelu, true>(library, "geglu", "geglu_backward");
    add<Curve::GeluTanh, true>(library, "geglu_tanh", "geglu_tanh_backward");
  }

 private:
  template <Curve curve, bool gated>
  static void add(Library& library, const char* name, const char* backward_name) {
    constexpr auto forward_one = &forward<curve, gated>;
    constexpr auto backward_one = &backward<curve, gated>;
    library.impl(name, TORCH_BOX(forward_one));
    library.impl(backward_name, TORCH_BOX(backward_one));
  }
};

}  // namespace megascratch
