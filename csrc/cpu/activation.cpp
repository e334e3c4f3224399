// Activations of the feed-forward layer on the CPU, plain and gated, and their backward passes.

#include "vectors.h"
// After the vectors, whose exponential it calls.
#include "curves.h"
#include "dispatch.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

template <typename T, typename F>
void plain_row(const T* x, T* y, int64_t f) {
  for_vectors<Acc<T>>(f, [=](int64_t j, int64_t count) {
    store_vector(y + j, F::at(load_vector(x + j, count)).value, count);
  });
}

template <typename T, typename F>
void gated_row(const T* gate, const T* up, T* y, int64_t f) {
  for_vectors<Acc<T>>(f, [=](int64_t j, int64_t count) {
    store_vector(y + j, F::at(load_vector(gate + j, count)).value * load_vector(up + j, count), count);
  });
}

template <typename T, typename F>
void plain_backward_row(const T* grad, const T* x, T* dx, int64_t f) {
  for_vectors<Acc<T>>(f, [=](int64_t j, int64_t count) {
    store_vector(dx + j, load_vector(grad + j, count) * F::at(load_vector(x + j, count)).slope, count);
  });
}

template <typename T, typename F>
void gated_backward_row(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t f) {
  for_vectors<Acc<T>>(f, [=](int64_t j, int64_t count) {
    const auto g = load_vector(grad + j, count);
    const auto a = F::at(load_vector(gate + j, count));
    store_vector(dgate + j, g * load_vector(up + j, count) * a.slope, count);
    store_vector(dup + j, g * a.value, count);
  });
}

template <typename T, typename F>
void forward(const ActivationArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    T* y = static_cast<T*>(a.y) + row * a.f;
    a.gated ? gated_row<T, F>(x, x + a.f, y, a.f) : plain_row<T, F>(x, y, a.f);
  }
}

template <typename T, typename F>
void backward(const ActivationArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    const T* grad = static_cast<const T*>(a.grad) + row * a.stride_grad;
    T* dx = static_cast<T*>(a.dx) + row * (a.gated ? 2 * a.f : a.f);
    a.gated ? gated_backward_row<T, F>(grad, x, x + a.f, dx, dx + a.f, a.f)
            : plain_backward_row<T, F>(grad, x, dx, a.f);
  }
}

}  // namespace

void Kernels::activation(const ActivationArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    for_curve(a.curve, [&](auto curve) {
      using T = decltype(zero);
      using F = decltype(curve);
      a.grad ? backward<T, F>(a, begin, end) : forward<T, F>(a, begin, end);
    });
  });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
