// The AdamW update and the sum of squares on the GPU, one pass over flat tensors.
//
// A thread takes 8 parameters at a time: 128-bit accesses for float32 values as for 16-bit model values, where
// everything is aligned; one at a time otherwise, and for the last few.

#include "adamw.h"
#include "dispatch.h"
#include "launchers.h"
#include "reduce.h"

namespace megascratch {
namespace {

constexpr int run_length = 8;
constexpr unsigned threads = 256;

__device__ __forceinline__ float square_root(float x) { return sqrtf(x); }
__device__ __forceinline__ double square_root(double x) { return sqrt(x); }

// The old values, and the new ones, which may lie in two halves.
template <typename T, int V>
__device__ __forceinline__ void read_values(const AdamWArguments& a, int64_t i, Acc<T> (&value)[V]) {
  read<V, (V > 1)>(static_cast<const T*>(a.value) + i, value);
  if constexpr (__is_same(T, UpperHalf)) {
    float remainder[V];
    read<V, (V > 1)>(static_cast<const UpperHalf*>(a.remainder) + i, remainder);
#pragma unroll
    for (int j = 0; j < V; ++j) value[j] = joined(value[j], remainder[j]);
  }
}

template <typename T, int V>
__device__ __forceinline__ void write_values(const AdamWArguments& a, int64_t i, Acc<T> (&value)[V]) {
  if constexpr (__is_same(T, UpperHalf)) {
    float remainder[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const Halves halves = halves_of(value[j]);
      value[j] = halves.nearest, remainder[j] = halves.remainder;
    }
    write<V, (V > 1)>(static_cast<UpperHalf*>(a.remainder) + i, remainder);
  }
  write<V, (V > 1)>(static_cast<T*>(a.value) + i, value);
}

// Numbers that are stored in bfloat16 or else in T. Which of them is one test for all threads, beside an access of memory
// that takes far longer, and saves a kernel for each combination.
template <typename T, bool wide, int V>
__device__ __forceinline__ void read_either(const void* from, DType dtype, int64_t i, Acc<T> (&x)[V]) {
  if constexpr (__is_same(T, float)) {
    if (dtype == DType::BFloat16) return read<V, wide>(static_cast<const BFloat16*>(from) + i, x);
  }
  read<V, wide>(static_cast<const T*>(from) + i, x);
}

template <typename T, bool wide, int V>
__device__ __forceinline__ void write_either(void* to, DType dtype, int64_t i, const Acc<T> (&x)[V]) {
  if constexpr (__is_same(T, float)) {
    if (dtype == DType::BFloat16) return write<V, wide>(static_cast<BFloat16*>(to) + i, x);
  }
  write<V, wide>(static_cast<T*>(to) + i, x);
}

// S is what values are stored in, UpperHalf where they lie in two halves, M the type of the model's values, void for
// none. Gradient and averages are stored in T, or in bfloat16 in its place where T is float.
template <typename S, typename M, typename T, int V>
__device__ __forceinline__ void adamw_run(const AdamWArguments& a, const AdamWStep<Acc<T>>& now, int64_t i) {
  using A = Acc<T>;
  constexpr bool wide = V > 1;
  A value[V], grad[V], exp_avg[V], exp_avg_sq[V];
  read_values<S>(a, i, value);
  read_either<T, wide>(a.grad, a.grad_dtype, i, grad);
  read_either<T, wide>(a.exp_avg, a.exp_avg_dtype, i, exp_avg);
  read_either<T, wide>(a.exp_avg_sq, a.exp_avg_sq_dtype, i, exp_avg_sq);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const A g = grad[j] * now.grad_factor;
    exp_avg[j] += now.new1 * (g - exp_avg[j]);
    exp_avg_sq[j] = now.beta2 * exp_avg_sq[j] + now.new2 * g * g;
    const A root = square_root(exp_avg_sq[j]) * now.root_factor + now.eps;
    value[j] = now.keep * value[j] - now.step_size * exp_avg[j] / root;
  }
  write_either<T, wide>(a.exp_avg, a.exp_avg_dtype, i, exp_avg);
  write_either<T, wide>(a.exp_avg_sq, a.exp_avg_sq_dtype, i, exp_avg_sq);
  if constexpr (!__is_same(M, void)) write<V, wide>(static_cast<M*>(a.model) + i, value);
  write_values<S>(a, i, value);
}

// Two blocks a multiprocessor at least: told nothing, nvcc aims at 64 registers, where values in halves spill.
template <typename S, typename M, typename T>
__global__ void __launch_bounds__(threads, 2) adamw_kernel(AdamWArguments a, bool wide) {
  const AdamWStep<Acc<T>> now(a);
  if (!now.taken) return;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t n_threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t n_wide = wide ? a.n / run_length * run_length : 0;
  for (int64_t i = thread * run_length; i < n_wide; i += n_threads * run_length) {
    adamw_run<S, M, T, run_length>(a, now, i);
  }
  for (int64_t i = n_wide + thread; i < a.n; i += n_threads) adamw_run<S, M, T, 1>(a, now, i);
}

template <typename S, typename M, typename T>
int launch_adamw(const AdamWArguments& a, void* stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.value) | reinterpret_cast<uintptr_t>(a.grad) |
                              reinterpret_cast<uintptr_t>(a.exp_avg) | reinterpret_cast<uintptr_t>(a.exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(a.model) | reinterpret_cast<uintptr_t>(a.remainder);
  const unsigned grid = grid_size((a.n + threads * run_length - 1) / (threads * run_length));
  MEGASCRATCH_LAUNCH(grid, threads, stream, (adamw_kernel<S, M, T>), a, addresses % 16 == 0);
  return launch_status();
}

template <typename T>
__global__ void __launch_bounds__(threads) squares_kernel(SquaredNormArguments a) {
  const T* x = static_cast<const T*>(a.x);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  constexpr int v = packet_size<T>;
  const int64_t n_wide = reinterpret_cast<uintptr_t>(x) % 16 == 0 ? a.n / v : 0;
  double sum = 0;
  // Unrolled further, the loops would spill registers on sm_100.
#pragma unroll 1
  for (int64_t p = first; p < n_wide; p += step) {
    Acc<T> packet[v], part = 0;
    read<v, true>(x + p * v, packet);
#pragma unroll
    for (Acc<T> value : packet) part += value * value;
    sum += static_cast<double>(part);
  }
#pragma unroll 1
  for (int64_t i = n_wide * v + first; i < a.n; i += step) {
    const Acc<T> value = load(x[i]);
    sum += static_cast<double>(value * value);
  }
  sum = reduce_team(sum, Sum{});
  if (threadIdx.x == 0) a.partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(threads) add_partial_kernel(SquaredNormArguments a) {
  double sum = 0;
  for (int64_t part = threadIdx.x; part < a.parts; part += blockDim.x) sum += a.partial[part];
  sum = reduce_team(sum, Sum{});
  if (threadIdx.x == 0) *a.out = sum;
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_adamw(const megascratch::AdamWArguments* arguments, void* stream) {
  using namespace megascratch;
  const AdamWArguments& a = *arguments;
  if (a.remainder) return launch_adamw<UpperHalf, void, float>(a, stream);
  switch (a.dtype) {
    case DType::Double: return launch_adamw<double, void, double>(a, stream);
    case DType::Half: return launch_adamw<Half, void, Half>(a, stream);
    case DType::BFloat16: return launch_adamw<BFloat16, void, float>(a, stream);
    case DType::Float: break;
  }
  if (!a.model) return launch_adamw<float, void, float>(a, stream);
  if (a.model_dtype == DType::Half) return launch_adamw<float, Half, float>(a, stream);
  return launch_adamw<float, BFloat16, float>(a, stream);
}

extern "C" int megascratch_cuda_squared_norm(const megascratch::SquaredNormArguments* arguments, void* stream) {
  using namespace megascratch;
  const SquaredNormArguments& a = *arguments;
  return for_dtype(a.dtype, [&](auto zero) {
    MEGASCRATCH_LAUNCH(grid_size(a.parts), threads, stream, squares_kernel<decltype(zero)>, a);
    MEGASCRATCH_LAUNCH(1, threads, stream, add_partial_kernel, a);
    return launch_status();
  });
}
