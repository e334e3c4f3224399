// Activations of the feed-forward layer on the CPU, plain and gated, and their backward passes.

#include "curves.h"
#include "dispatch.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

template <typename T, typename F>
void plain_row(const T* __restrict x, T* __restrict y, int64_t f) {
#pragma omp simd
  for (int64_t j = 0; j < f; ++j) y[j] = store<T>(F::at(load(x[j])).value);
}

template <typename T, typename F>
void gated_row(const T* __restrict gate, const T* __restrict up, T* __restrict y, int64_t f) {
#pragma omp simd
  for (int64_t j = 0; j < f; ++j) y[j] = store<T>(F::at(load(gate[j])).value * load(up[j]));
}

template <typename T, typename F>
void plain_backward_row(const T* __restrict grad, const T* __restrict x, T* __restrict dx, int64_t f) {
#pragma omp simd
  for (int64_t j = 0; j < f; ++j) dx[j] = store<T>(load(grad[j]) * F::at(load(x[j])).slope);
}

template <typename T, typename F>
void gated_backward_row(
    const T* __restrict grad, const T* __restrict gate, const T* __restrict up, T* __restrict dgate,
    T* __restrict dup, int64_t f) {
#pragma omp simd
  for (int64_t j = 0; j < f; ++j) {
    const Acc<T> g = load(grad[j]);
    const ValueAndSlope<Acc<T>> a = F::at(load(gate[j]));
    dgate[j] = store<T>(g * load(up[j]) * a.slope);
    dup[j] = store<T>(g * a.value);
  }
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
