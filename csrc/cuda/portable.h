// What the kernels use of CUDA, so that one source serves nvcc and, through fibers, g++.

#pragma once

#include "numeric.h"

#ifdef __CUDACC__
#include <cuda_runtime.h>
#define MEGASCRATCH_LAUNCH(grid, block, stream, kernel, ...) \
  kernel<<<grid, block, 0, static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__)
#else
#include <cassert>

#include "fibers.h"
#define MEGASCRATCH_LAUNCH(grid, block, stream, kernel, ...) \
  (static_cast<void>(stream), megascratch::fibers::runner.run(grid, block, [&] { kernel(__VA_ARGS__); }))
#endif

namespace megascratch {
namespace {

// 0, or the CUDA error code of the launch just made.
inline int launch_status() {
#ifdef __CUDACC__
  return static_cast<int>(cudaGetLastError());
#else
  return 0;
#endif
}

constexpr unsigned max_grid = 0x7fffffff;

inline unsigned grid_size(int64_t blocks) { return static_cast<unsigned>(blocks < max_grid ? blocks : max_grid); }

// How many elements of T one 128-bit access moves.
template <typename T>
constexpr int packet_size = 16 / sizeof(T);

// A misaligned 128-bit access faults on a GPU; a host processor lets most of them pass, so the host run looks itself.
__device__ __forceinline__ void require_aligned([[maybe_unused]] const void* pointer) {
#ifndef __CUDACC__
  assert(reinterpret_cast<uintptr_t>(pointer) % 16 == 0);
#endif
}

// Read N elements: in 128-bit accesses, which N fills and `from` is aligned for, or one by one.
template <int N, bool in_packets, typename T>
__device__ __forceinline__ void read(const T* from, Acc<T> (&x)[N]) {
  T values[N];
  if constexpr (in_packets) {
    static_assert(N % packet_size<T> == 0);
    require_aligned(from);
    uint4 packets[N / packet_size<T>];
#pragma unroll
    for (int i = 0; i < N / packet_size<T>; ++i) packets[i] = reinterpret_cast<const uint4*>(from)[i];
    memcpy(values, packets, sizeof(values));
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = from[i];
  }
#pragma unroll
  for (int i = 0; i < N; ++i) x[i] = load(values[i]);
}

// Write N elements, likewise.
template <int N, bool in_packets, typename T>
__device__ __forceinline__ void write(T* to, const Acc<T> (&x)[N]) {
  T values[N];
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] = store<T>(x[i]);
  if constexpr (in_packets) {
    static_assert(N % packet_size<T> == 0);
    require_aligned(to);
    uint4 packets[N / packet_size<T>];
    memcpy(packets, values, sizeof(values));
    // Plain assignments of a packet built from smaller numbers compile to narrow stores; the intrinsic does not.
#pragma unroll
    for (int i = 0; i < N / packet_size<T>; ++i) __stwb(reinterpret_cast<uint4*>(to) + i, packets[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = values[i];
  }
}

}  // namespace
}  // namespace megascratch
