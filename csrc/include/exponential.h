// exp(x) for x ≤ 0 without a library call, so that a loop of it vectorises; on a GPU the native one.
//
// x = k ln 2 + r with |r| ≤ ln 2 / 2; exp(r) by its Taylor polynomial; times 2ᵏ written straight into the exponent.
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
  using Bits = int32_t;
  static constexpr float log2_e = 1.44269504088896341f;
  // ln 2 in two parts: k · ln2_high is exact for every k that occurs.
  static constexpr float ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
  static constexpr float smallest = -87.0f;
  // Adding 1.5 · 2²³ rounds to an integer, which then stands in the low bits.
  static constexpr float rounder = 0x1.8p23f;
  static constexpr int mantissa_bits = 23, exponent_bias = 127, degree = 7;
};

struct ExponentialDouble {
  using Bits = int64_t;
  static constexpr double log2_e = 1.44269504088896338700;
  static constexpr double ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  static constexpr double smallest = -708.0;
  static constexpr double rounder = 0x1.8p52;
  static constexpr int mantissa_bits = 52, exponent_bias = 1023, degree = 13;
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

constexpr double reciprocal_factorial(int n) { return n <= 1 ? 1.0 : reciprocal_factorial(n - 1) / n; }

template <typename T, int first, int last>
MEGASCRATCH_DEVICE T taylor(T r) {
  // Horner's scheme from 1/last! down to 1/first!.
  if constexpr (first == last) {
    return static_cast<T>(reciprocal_factorial(last));
  } else {
    return static_cast<T>(reciprocal_factorial(first)) + r * taylor<T, first + 1, last>(r);
  }
}

template <typename T>
MEGASCRATCH_DEVICE T exponential(T x) {
  using E = typename ExponentialOf<T>::type;
  using Bits = typename E::Bits;
  const T clamped = x > E::smallest ? x : E::smallest;  // also takes NaN out of the integer arithmetic
  const T shifted = clamped * E::log2_e + E::rounder;
  const T k = shifted - E::rounder;
  const T r = (clamped - k * E::ln2_high) - k * E::ln2_low;
  const Bits exponent = bits_of<Bits>(shifted) - bits_of<Bits>(E::rounder) + E::exponent_bias;
  const T power = bits_of<T>(static_cast<Bits>(exponent << E::mantissa_bits));
  const T value = taylor<T, 0, E::degree>(r) * power;
  const T in_range = x < E::smallest ? T(0) : value;
  return x != x ? x : in_range;
}

#endif

}  // namespace
}  // namespace megascratch
