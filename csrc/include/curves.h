// Activation functions and their slopes, for the C++ and the CUDA kernels. Formulas: megascratch/ops/activation.py.

#pragma once

#include "arguments.h"
#include "exponential.h"
#include "numeric.h"

namespace megascratch {
namespace {

// The type of a number, or of a vector's numbers.
template <typename V>
struct NumberTypes {
  using type = decltype(V{}[0] + 0.0f);
};
template <>
struct NumberTypes<float> {
  using type = float;
};
template <>
struct NumberTypes<double> {
  using type = double;
};
template <typename V>
using NumberOf = typename NumberTypes<V>::type;

#ifdef __CUDACC__
__device__ __noinline__ double upper_tail(double z, double) { return erfc(z); }
#else
inline double upper_tail(double z, double) { return __builtin_erfc(z); }
#endif

// erfc(z) for z ≥ 0, given exp(−z²): times t P(t) with t = 1/(1 + z/2), where P was fitted to 4e-8 relative error.
template <typename V>
MEGASCRATCH_DEVICE V upper_tail(V z, V gauss) {
  const V t = 1.0f / (1.0f + 0.5f * z);
  V p = 0.28348100185394287f - 0.0588456466794014f * t;
  p = p * t - 0.48492416739463806f;
  p = p * t + 0.2754494845867157f;
  p = p * t - 0.02481096237897873f;
  p = p * t + 0.20191332697868347f;
  p = p * t + 0.24330098927021027f;
  p = p * t + 0.2823479175567627f;
  p = p * t + 0.2820880115032196f;
  return gauss * t * p;
}

// The curves are functions of a number, or of a vector of numbers.
template <typename V>
struct ValueAndSlope {
  V value, slope;
};

// 1 / (1 + exp(−x)), by an exponential that cannot overflow.
template <typename V>
MEGASCRATCH_DEVICE V logistic(V x) {
  const V z = exponential(x < 0 ? x : -x), r = 1 / (1 + z);
  return x < 0 ? z * r : r;
}

struct Silu {
  template <typename V>
  static MEGASCRATCH_DEVICE ValueAndSlope<V> at(V x) {
    const V gate = logistic(x);
    return {x * gate, gate + x * gate * (1 - gate)};
  }
};

struct Gelu {
  template <typename V>
  static MEGASCRATCH_DEVICE ValueAndSlope<V> at(V x) {
    using A = NumberOf<V>;
    constexpr A root_half = static_cast<A>(0.70710678118654752440), density = static_cast<A>(0.39894228040143267794);
    const V z = (x < 0 ? -x : x) * root_half, gauss = exponential(-z * z), tail = upper_tail(z, gauss) / 2;
    const V cdf = x < 0 ? tail : 1 - tail;
    return {x * cdf, cdf + x * density * gauss};
  }
};

struct GeluTanh {
  template <typename V>
  static MEGASCRATCH_DEVICE ValueAndSlope<V> at(V x) {
    using A = NumberOf<V>;
    // ½ (1 + tanh u) is the logistic function of 2u.
    constexpr A scale = static_cast<A>(1.59576912160573071176), cubic = static_cast<A>(0.044715);
    const V square = x * x, gate = logistic(scale * x * (1 + cubic * square));
    return {x * gate, gate + x * gate * (1 - gate) * scale * (1 + 3 * cubic * square)};
  }
};

struct ReluSquared {
  template <typename V>
  static MEGASCRATCH_DEVICE ValueAndSlope<V> at(V x) {
    const V positive = x < 0 ? V{} : x;
    return {positive * positive, 2 * positive};
  }
};

// Call `f` with the curve that `curve` names.
template <typename F>
auto for_curve(Curve curve, const F& f) {
  switch (curve) {
    case Curve::Silu: return f(Silu{});
    case Curve::Gelu: return f(Gelu{});
    case Curve::GeluTanh: return f(GeluTanh{});
    default: return f(ReluSquared{});
  }
}

}  // namespace
}  // namespace megascratch
