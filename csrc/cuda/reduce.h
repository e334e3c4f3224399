// Reductions over a team of threads: a warp (blockDim.x = 32, any blockDim.y) or a whole block (blockDim.y = 1).
//
// Every thread of the team must call, and every thread gets the result, combined in the same order: bit-identical.

#pragma once

#include "portable.h"

namespace megascratch {
namespace {

constexpr unsigned lanes = 32, max_warps = 32;

struct Sum {
  template <typename A>
  __device__ __forceinline__ A operator()(A x, A y) const {
    return x + y;
  }
};

struct Maximum {
  template <typename A>
  __device__ __forceinline__ A operator()(A x, A y) const {
    return x > y ? x : y;
  }
};

template <typename A, typename Combine>
__device__ __forceinline__ A reduce_team(A value, Combine combine) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  if (blockDim.x == lanes) return value;

  __shared__ A partial[max_warps];
  const unsigned n_warps = blockDim.x / lanes;
  if (threadIdx.x % lanes == 0) partial[threadIdx.x / lanes] = value;
  __syncthreads();
  A total = partial[0];
  for (unsigned warp = 1; warp < n_warps; ++warp) total = combine(total, partial[warp]);
  // The next reduction writes `partial` again: not before everyone has read it.
  __syncthreads();
  return total;
}

}  // namespace
}  // namespace megascratch
