// Activations of the feed-forward layer on the CPU, plain and gated, and their backward passes.

#include "vectors.h"
// After the vectors, whose exponential it calls.
#include "curves.h"
#include "dispatch.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

// c₀ + c₁ u + … + c₅ u⁵, in pairs: half as many steps wait for each other.
template <typename V>
MEGASCRATCH_DEVICE V quintic(const float (&c)[6], V u) {
  const V square = u * u;
  return (c[0] + c[1] * u) + square * ((c[2] + c[3] * u) + square * (c[4] + c[5] * u));
}

// GELU of numbers with 16 bits: Φ(x) and the slope are ½ + x P(x²) / Q(x²) up to |x| = 5.5, fitted to 1e-7. No exponential
// is waited for.
struct NarrowGelu {
  template <typename V>
  static MEGASCRATCH_DEVICE ValueAndSlope<V> at(V x) {
    constexpr float end = 5.5f;
    constexpr float cdf_p[] = {0.39894158f, 0.0581643614f, 0.00614556045f, 0.000409648406f, 7.35038351e-06f, 0.0f};
    constexpr float cdf_q[] = {1.0f, 0.312451945f, 0.0425000452f, 0.00325865248f, 0.000147133806f, 6.03745428e-07f};
    constexpr float slope_p[] = {
        0.79788532f, -0.0309439103f, 0.0142190396f, 2.05932494e-05f, 3.58032136e-05f, 1.90872378e-07f};
    constexpr float slope_q[] = {1.0f, 0.294558748f, 0.0409885213f, 0.00352182049f, 0.000192060415f, 8.88712546e-06f};
    const V inside = clamped(x, end), u = inside * inside;
    const V cdf = 0.5f + inside * quintic(cdf_p, u) * reciprocal(quintic(cdf_q, u));
    const V slope = 0.5f + inside * quintic(slope_p, u) * reciprocal(quintic(slope_q, u));
    return {x < -end ? V{} : x * cdf, slope};
  }
};

// The curve for an element type.
template <typename T, typename F>
struct CurveOf {
  using type = F;
};
template <>
struct CurveOf<BFloat16, Gelu> {
  using type = NarrowGelu;
};
template <>
struct CurveOf<Half, Gelu> {
  using type = NarrowGelu;
};

template <bool streams, typename T, typename F>
void plain_row(const T* x, T* y, int64_t f) {
  write_row<streams>(y, f, [=](int64_t j, int64_t count) { return F::at(load_vector(x + j, count)).value; });
}

template <bool streams, typename T, typename F>
void gated_row(const T* gate, const T* up, T* y, int64_t f) {
  write_row<streams>(y, f, [=](int64_t j, int64_t count) {
    return F::at(load_vector(gate + j, count)).value * load_vector(up + j, count);
  });
}

template <bool streams, typename T, typename F>
void plain_backward_row(const T* grad, const T* x, T* dx, int64_t f) {
  write_row<streams>(dx, f, [=](int64_t j, int64_t count) {
    return load_vector(grad + j, count) * F::at(load_vector(x + j, count)).slope;
  });
}

template <typename V>
struct GatedGradients {
  V gate, up;
};

template <bool streams, typename T, typename F>
void gated_backward_row(const T* grad, const T* gate, const T* up, T* dgate, T* dup, int64_t f) {
  constexpr int64_t lanes = lanes_of<Acc<T>>;
  const auto gradients = [=](int64_t j, int64_t count) {
    const auto g = load_vector(grad + j, count);
    const auto a = F::at(load_vector(gate + j, count));
    return GatedGradients<VectorOf<Acc<T>>>{g * load_vector(up + j, count) * a.slope, g * a.value};
  };
  int64_t j = 0;
  for (; j + numbers_of_line<T> <= f; j += numbers_of_line<T>) {
    Line<T> of_gate, of_up;
#pragma GCC unroll 8
    for (int i = 0; i < Line<T>::n_vectors; ++i) {
      const auto both = gradients(j + i * lanes, lanes);
      of_gate.vectors[i] = both.gate, of_up.vectors[i] = both.up;
    }
    write_line<streams>(dgate + j, of_gate), write_line<streams>(dup + j, of_up);
  }
  for (; j < f; j += lanes) {
    const int64_t count = f - j < lanes ? f - j : lanes;
    const auto both = gradients(j, count);
    store_vector(dgate + j, both.gate, count), store_vector(dup + j, both.up, count);
  }
}

template <bool streams, typename T, typename F>
void forward_rows(const ActivationArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    T* y = static_cast<T*>(a.y) + row * a.f;
    a.gated ? gated_row<streams, T, F>(x, x + a.f, y, a.f) : plain_row<streams, T, F>(x, y, a.f);
  }
  if constexpr (streams) end_streams();
}

template <bool streams, typename T, typename F>
void backward_rows(const ActivationArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    const T* grad = static_cast<const T*>(a.grad) + row * a.stride_grad;
    T* dx = static_cast<T*>(a.dx) + row * (a.gated ? 2 * a.f : a.f);
    a.gated ? gated_backward_row<streams, T, F>(grad, x, x + a.f, dx, dx + a.f, a.f)
            : plain_backward_row<streams, T, F>(grad, x, dx, a.f);
  }
  if constexpr (streams) end_streams();
}

template <typename T, typename F>
void run(const ActivationArguments& a, int64_t begin, int64_t end) {
  const int64_t bytes = a.rows * a.f * static_cast<int64_t>(sizeof(T));  // of dx, gated ones have two
  if (a.grad) {
    const bool streams = rows_stream(static_cast<const T*>(a.dx), a.f, a.gated ? 2 * bytes : bytes);
    return streams ? backward_rows<true, T, F>(a, begin, end) : backward_rows<false, T, F>(a, begin, end);
  }
  const bool streams = rows_stream(static_cast<const T*>(a.y), a.f, bytes);
  streams ? forward_rows<true, T, F>(a, begin, end) : forward_rows<false, T, F>(a, begin, end);
}

}  // namespace

void Kernels::activation(const ActivationArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    for_curve(a.curve, [&](auto curve) {
      using T = decltype(zero);
      using F = typename CurveOf<T, decltype(curve)>::type;
      run<T, F>(a, begin, end);
    });
  });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
