// A team's walk along a row of any length and alignment.

#pragma once

#include "portable.h"

namespace megascratch {
namespace {

template <int n>
struct Count {
  static constexpr int value = n;
};

// Visit [0, length) with the team: in packets from where x and y are both 16-byte aligned, if that is ever at the same
// element, and one by one before and after. `visit(j, Count<N>)` takes the elements j to j + N − 1.
template <typename T, typename Visit>
__device__ __forceinline__ void for_row(const T* x, const T* y, int64_t length, const Visit& visit) {
  constexpr int v = packet_size<T>;
  const int64_t x_past = reinterpret_cast<uintptr_t>(x) % 16 / sizeof(T);
  const int64_t y_past = reinterpret_cast<uintptr_t>(y) % 16 / sizeof(T);
  int64_t head = x_past == y_past ? (v - x_past) % v : length;
  head = head < length ? head : length;
  const int64_t packets = (length - head) / v;
  for (int64_t j = threadIdx.x; j < head; j += blockDim.x) visit(j, Count<1>{});
  for (int64_t p = threadIdx.x; p < packets; p += blockDim.x) visit(head + p * v, Count<v>{});
  for (int64_t j = head + packets * v + threadIdx.x; j < length; j += blockDim.x) visit(j, Count<1>{});
}

}  // namespace
}  // namespace megascratch
