// Activations of the feed-forward layer on the GPU, plain and gated, and their backward passes.
//
// A block holds blockDim.y rows; a row's blockDim.x threads walk its columns, V at a time: V fills 128-bit accesses
// where everything is aligned, and is 1 otherwise.

#include "curves.h"
#include "dispatch.h"
#include "launchers.h"
#include "portable.h"

namespace megascratch {
namespace {

template <typename T, int V, typename F>
__device__ __forceinline__ void forward_columns(const ActivationArguments& a, int64_t row, int64_t j) {
  constexpr bool wide = V > 1;
  const T* gate = static_cast<const T*>(a.x) + row * a.stride_x + j;
  Acc<T> x[V], up[V] = {};
  read<V, wide>(gate, x);
  if (a.gated) read<V, wide>(gate + a.f, up);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    x[i] = F::at(x[i]).value;
    if (a.gated) x[i] *= up[i];
  }
  write<V, wide>(static_cast<T*>(a.y) + row * a.f + j, x);
}

template <typename T, int V, typename F>
__device__ __forceinline__ void backward_columns(const ActivationArguments& a, int64_t row, int64_t j) {
  constexpr bool wide = V > 1;
  const T* gate = static_cast<const T*>(a.x) + row * a.stride_x + j;
  T* dgate = static_cast<T*>(a.dx) + row * (a.gated ? 2 * a.f : a.f) + j;
  Acc<T> g[V], x[V], up[V] = {};
  read<V, wide>(static_cast<const T*>(a.grad) + row * a.stride_grad + j, g);
  read<V, wide>(gate, x);
  if (a.gated) read<V, wide>(gate + a.f, up);
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const ValueAndSlope<Acc<T>> at = F::at(x[i]);
    x[i] = g[i] * at.slope;
    if (a.gated) x[i] *= up[i], up[i] = g[i] * at.value;
  }
  write<V, wide>(dgate, x);
  if (a.gated) write<V, wide>(dgate + a.f, up);
}

template <typename T, int V, typename F, bool is_backward>
__global__ void __launch_bounds__(256) activation_kernel(ActivationArguments a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += step) {
    // Unrolled, the narrow kernels would spill registers on sm_100.
#pragma unroll 1
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * V; j < a.f; j += blockDim.x * V) {
      if constexpr (is_backward) {
        backward_columns<T, V, F>(a, row, j);
      } else {
        forward_columns<T, V, F>(a, row, j);
      }
    }
  }
}

template <typename T, int V, typename F>
int launch(const ActivationArguments& a, void* stream) {
  unsigned threads = 32;
  while (threads < 256 && threads < a.f / V) threads *= 2;
  const dim3 block(threads, 256 / threads);
  const unsigned grid = grid_size((a.rows + block.y - 1) / block.y);
  if (a.grad) {
    MEGASCRATCH_LAUNCH(grid, block, stream, (activation_kernel<T, V, F, true>), a);
  } else {
    MEGASCRATCH_LAUNCH(grid, block, stream, (activation_kernel<T, V, F, false>), a);
  }
  return launch_status();
}

template <typename T, typename F>
int launch_widest(const ActivationArguments& a, void* stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y) |
                              reinterpret_cast<uintptr_t>(a.grad) | reinterpret_cast<uintptr_t>(a.dx);
  constexpr int v = packet_size<T>;
  const bool wide = addresses % 16 == 0 && a.f % v == 0 && a.stride_x % v == 0 && a.stride_grad % v == 0;
  return wide ? launch<T, v, F>(a, stream) : launch<T, 1, F>(a, stream);
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_activation(const megascratch::ActivationArguments* arguments, void* stream) {
  using namespace megascratch;
  return for_dtype(arguments->dtype, [&](auto zero) {
    return for_curve(arguments->curve, [&](auto curve) {
      return launch_widest<decltype(zero), decltype(curve)>(*arguments, stream);
    });
  });
}
