// 16-bit floating-point numbers as plain bits, and the type that each element type is accumulated in.
//
// On a GPU the conversions are the hardware's; elsewhere they are integer arithmetic that compilers vectorise. Both
// round to nearest even and keep infinities and NaN.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MEGASCRATCH_DEVICE __host__ __device__ __forceinline__
#else
#define MEGASCRATCH_DEVICE inline __attribute__((always_inline))
#endif

namespace megascratch {

struct Half {
  uint16_t bits;
};

struct BFloat16 {
  uint16_t bits;
};

// The upper 16 bits of a float as they are: what two of them keep of a number, nothing rounds.
struct UpperHalf {
  uint16_t bits;
};

// Anonymous, here and in the kernels: objects built for different instruction sets must not share one inline function.
namespace {

template <typename T>
struct AccumulateIn {
  using type = float;
};
template <>
struct AccumulateIn<double> {
  using type = double;
};
template <typename T>
using Acc = typename AccumulateIn<T>::type;

template <typename To, typename From>
MEGASCRATCH_DEVICE To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

MEGASCRATCH_DEVICE float load(float x) { return x; }
MEGASCRATCH_DEVICE double load(double x) { return x; }

MEGASCRATCH_DEVICE float load(BFloat16 x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }

MEGASCRATCH_DEVICE float load(UpperHalf x) { return bits_of<float>(static_cast<uint32_t>(x.bits) << 16); }

MEGASCRATCH_DEVICE float load(Half x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  // Shifted into place the exponent is 112 too small; the product mends it, for subnormal numbers as well.
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = (x.bits & 0x7fffu) << 13;
  const uint32_t scaled = bits_of<uint32_t>(bits_of<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;  // infinity and NaN
  return bits_of<float>(sign | (magnitude >= 0x0f800000u ? special : scaled));
#endif
}

template <typename T>
MEGASCRATCH_DEVICE T store(Acc<T> x) {
  return x;
}

template <>
MEGASCRATCH_DEVICE BFloat16 store<BFloat16>(float x) {
#ifdef __CUDA_ARCH__
  return BFloat16{__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t u = bits_of<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (u >> 16) | 0x40u;
  const bool is_nan = (u & 0x7fffffffu) > 0x7f800000u;
  return BFloat16{static_cast<uint16_t>(is_nan ? quiet_nan : rounded)};
#endif
}

template <>
MEGASCRATCH_DEVICE UpperHalf store<UpperHalf>(float x) {
  return UpperHalf{static_cast<uint16_t>(bits_of<uint32_t>(x) >> 16)};
}

template <>
MEGASCRATCH_DEVICE Half store<Half>(float x) {
#ifdef __CUDA_ARCH__
  return Half{__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t u = bits_of<uint32_t>(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  // Normal numbers: lower the exponent by 112, then round away 13 bits. A carry may run into the exponent, to infinity.
  const uint32_t lowered = magnitude - (112u << 23);
  const uint32_t normal = (lowered + 0xfffu + ((lowered >> 13) & 1u)) >> 13;
  // Below 2⁻¹⁴: adding 0.5 lets the floating-point unit shift and round, and leaves the bits at the bottom.
  const uint32_t subnormal = bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const uint32_t overflow = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return Half{static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? overflow : finite))};
#endif
}

// A float in two upper halves: the bfloat16 number nearest to it, of two the one further from zero, and the 16 bits that
// were rounded away. From the first of these bits one sees which way the number was rounded:
//     0x3f80'7000 ↔ 0x3f80, 0x7000        0x3f80'9000 ↔ 0x3f81, 0x9000
struct Halves {
  float nearest, remainder;
};

MEGASCRATCH_DEVICE Halves halves_of(float x) {
  const uint32_t u = bits_of<uint32_t>(x);
  return {bits_of<float>(u + 0x8000u), bits_of<float>(u << 16)};
}

MEGASCRATCH_DEVICE float joined(float nearest, float remainder) {
  const uint32_t low = bits_of<uint32_t>(remainder);
  return bits_of<float>((bits_of<uint32_t>(nearest) - (low >> 31 << 16)) | low >> 16);
}

}  // namespace

}  // namespace megascratch
