// exp(x) for x ≤ 0 without a library call, so that a loop of it vectorises; on a GPU the native one.
//
// x = k ln 2 + r with |r| ≤ ln 2 / 2; exp(r) by a polynomial; times 2ᵏ written straight into the exponent. The polynomial
// is Taylor's in double, and in float one of least error, 3e-9, among those that begin with 1 + r.
// Worked example: exp(−1): k = −1, r = −1 + 0.6931 = −0.3069, exp(r) = 0.7358, times 2⁻¹ = 0.3679.
//
// Below the smallest normal number the result is exactly 0 (so exp(−∞) = 0, which is what masked scores need); NaN
// stays NaN. Error against the correctly rounded result: below 2 units in the last place, in float and in double.

#pragma once

#include "numeric.h"

namespace megascratch {
namespace {

#ifdef __CUDACC__

__device__ __forceinline__ float exponential(float x) { return expf(x); }

// Not inlined: copies of the double-precision polynomial and its constants would spill registers.
__device__ __noinline__ double exponential(double x) { return exp(x); }

#else

struct ExponentialFloat {
  using Bits = uint32_t;
  static constexpr float log2_e = 1.44269504088896341f;
  // ln 2 in two parts: k · ln2_high is exact for every k that occurs.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr float smallest = -87.0f;
  // Adding 1.5 · 2²³ rounds to an integer, which then stands in the low bits.
  static constexpr float rounder = 0x1.8p23f;
  static constexpr int mantissa_bits = 23, exponent_bias = 127, degree = 6;
  static constexpr float coefficients[] = {
      1.0f, 1.0f, 0.4999999345f, 0.1666652063f, 0.04166838805f, 0.008368716907f, 0.001381459849f};
};

struct ExponentialDouble {
  using Bits = uint64_t;
  static constexpr double log2_e = 1.44269504088896338700;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double smallest = -708.0;
  static constexpr double rounder = 0x1.8p52;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023, degree = 13;
  static constexpr double coefficients[] = {
      1.0, 1.0, 1.0 / 2, 1.0 / 6, 1.0 / 24, 1.0 / 120, 1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800,
      1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};
};

template <typename T>
struct ExponentialOf;
template <>
struct ExponentialOf<float> {
  using type = ExponentialFloat;
};
template <>
struct ExponentialOf<double> {
  using type = ExponentialDouble;
};

// Horner's scheme in r² over pairs of coefficients, from the first-th on: half as many steps wait for each other.
template <typename E, int first, typename V>
MEGASCRATCH_DEVICE V polynomial(V r, V square) {
  if constexpr (first == E::degree) {
    return V{} + E::coefficients[first];
  } else if constexpr (first + 1 == E::degree) {
    return E::coefficients[first] + r * E::coefficients[first + 1];
  } else {
    return (E::coefficients[first] + r * E::coefficients[first + 1]) + square * polynomial<E, first + 2>(r, square);
  }
}

// V is a number or a vector of numbers, and Bits an unsigned integer, or a vector of them, as wide.
template <typename E, typename Bits, typename V>
MEGASCRATCH_DEVICE V exponential_of(V x) {
  const V clamped = x < E::smallest ? V{} + E::smallest : x;  // NaN passes, and stays one to the end
  const V shifted = clamped * E::log2_e + E::rounder;
  const V k = shifted - E::rounder;
  const V r = (clamped - k * E::ln2_high) - k * E::ln2_low;
  const Bits exponent = bits_of<Bits>(shifted) + (E::exponent_bias - bits_of<typename E::Bits>(E::rounder));
  const V value = polynomial<E, 0>(r, r * r) * bits_of<V>(exponent << E::mantissa_bits);
  return x < E::smallest ? V{} : value;
}

template <typename T>
MEGASCRATCH_DEVICE T exponential(T x) {
  using E = typename ExponentialOf<T>::type;
  return exponential_of<E, typename E::Bits>(x);
}

#endif

}  // namespace
}  // namespace megascratch
