// 8-bit floating-point numbers as plain bits: e4m3 (finite up to 448, no infinity) and e5m2 (finite up to 57344).
//
// Conversion rounds to nearest even and saturates: what is beyond the largest finite number becomes it, infinity too;
// NaN stays. On a GPU that has the instruction it does the work; elsewhere it is integer arithmetic.

#pragma once

#include "numeric.h"

#ifdef __CUDACC__
#include <cuda_fp8.h>
#endif

namespace megascratch {
namespace {

struct E4M3 {
  static constexpr int mantissa = 3, bias = 7;
  static constexpr float largest = 448.0f, smallest_normal = 0x1p-6f;
  static constexpr float rounder = 0x1p14f;  // its last bit is the spacing of subnormal numbers, 2⁻⁹
};

struct E5M2 {
  static constexpr int mantissa = 2, bias = 15;
  static constexpr float largest = 57344.0f, smallest_normal = 0x1p-14f;
  static constexpr float rounder = 0x1p7f;  // 2⁻¹⁶
};

template <typename F>
MEGASCRATCH_DEVICE uint8_t to_fp8(float x) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  return __nv_cvt_float_to_fp8(x, __NV_SATFINITE, F::mantissa == 3 ? __NV_E4M3 : __NV_E5M2);
#else
  constexpr uint32_t shift = 23 - F::mantissa;
  const uint32_t u = bits_of<uint32_t>(x);
  const uint32_t sign = (u >> 24) & 0x80u;
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t largest = bits_of<uint32_t>(F::largest);
  const uint32_t clamped = magnitude < largest ? magnitude : largest;
  const uint32_t lowered = clamped - (static_cast<uint32_t>(127 - F::bias) << 23);
  const uint32_t normal = (lowered + ((1u << (shift - 1)) - 1u) + ((lowered >> shift) & 1u)) >> shift;
  // Adding the rounder lets the floating-point unit shift and round, and leaves the bits at the bottom.
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(clamped) + F::rounder) - bits_of<uint32_t>(F::rounder);
  const uint32_t finite = clamped < bits_of<uint32_t>(F::smallest_normal) ? subnormal : normal;
  return static_cast<uint8_t>(sign | (magnitude > 0x7f800000u ? 0x7fu : finite));
#endif
}

}  // namespace
}  // namespace megascratch
