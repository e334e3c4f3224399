// Scaled masked softmax over the keys on the GPU, and its backward pass, for any length.
//
// A team reads its row twice: once for the maximum and the sum of exponentials together (each thread rescales its sum
// when its maximum grows), once to write. The second reading hits the cache: L1 for rows up to 1024 (a warp a row, 8
// rows a block), L2 for longer ones (a block a row). Keys that the causal rule hides are neither read nor waited for.
//
// Source of the one-pass maximum and sum: Milakov and Gimelshein 2018, arXiv:1805.02867.

#include "exponential.h"
#include "launchers.h"
#include "reduce.h"
#include "rows.h"

namespace megascratch {
namespace {

constexpr float minus_infinity = -__builtin_inff();

// Where a row stands: its sample, head and query, and how many keys it may see.
struct Row {
  int64_t sample, head, query, visible;
};

__device__ __forceinline__ Row row_at(int64_t row, int64_t n, int64_t sq, int64_t sk, bool causal) {
  const int64_t query = row % sq, head = row / sq % n, sample = row / sq / n;
  const int64_t last = causal ? query + sk - sq + 1 : sk;
  return {sample, head, query, last < 0 ? 0 : last > sk ? sk : last};
}

template <typename T>
__device__ __forceinline__ void write_zeros(T* out, int64_t length) {
  for_row(out, out, length, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    Acc<T> zeros[n] = {};
    write<n, (n > 1)>(out + j, zeros);
  });
}

template <typename T>
__device__ __forceinline__ void softmax_row(const SoftmaxArguments& a, int64_t index) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.scale);
  const Row row = row_at(index, a.n, a.sq, a.sk, a.causal);
  const T* scores =
      static_cast<const T*>(a.scores) + row.sample * a.stride_b + row.head * a.stride_n + row.query * a.stride_q;
  const bool* mask = a.mask;
  if (mask) mask += row.sample * a.mask_stride_b + row.head * a.mask_stride_n + row.query * a.mask_stride_q;
  T* probs = static_cast<T*>(a.probs) + index * a.sk;

  const auto read_scores = [&](int64_t j, auto& x) {
    constexpr int n = sizeof(x) / sizeof(A);
    read<n, (n > 1)>(scores + j, x);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      x[i] = mask && mask[(j + i) * a.mask_stride_k] ? static_cast<A>(minus_infinity) : x[i] * scale;
    }
  };

  A maximum = minus_infinity, sum = 0;
  for_row(scores, probs, row.visible, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A x[n];
    read_scores(j, x);
    A grown = maximum;
#pragma unroll
    for (A value : x) grown = value > grown ? value : grown;
    // While every key so far is hidden, subtracting −∞ would give NaN; subtracting 0 leaves exp(−∞) = 0.
    const A shift = grown == minus_infinity ? A(0) : grown;
    sum *= exponential(maximum - shift);
#pragma unroll
    for (A value : x) sum += exponential(value - shift);
    maximum = grown;
  });

  const A row_maximum = reduce_team(maximum, Maximum{});
  const A shift = row_maximum == minus_infinity ? A(0) : row_maximum;
  const A total = reduce_team(sum * exponential(maximum - shift), Sum{});
  const A factor = total == 0 ? A(0) : 1 / total;
  for_row(scores, probs, row.visible, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A x[n];
    read_scores(j, x);
#pragma unroll
    for (A& value : x) value = exponential(value - shift) * factor;
    write<n, (n > 1)>(probs + j, x);
  });
  write_zeros(probs + row.visible, a.sk - row.visible);
}

template <typename T>
__device__ __forceinline__ void backward_row(const SoftmaxBackwardArguments& a, int64_t index) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.scale);
  const Row row = row_at(index, a.n, a.sq, a.sk, a.causal);
  const T* grad = static_cast<const T*>(a.grad) + row.sample * a.grad_stride_b + row.head * a.grad_stride_n +
                  row.query * a.grad_stride_q;
  const T* probs = static_cast<const T*>(a.probs) + row.sample * a.probs_stride_b + row.head * a.probs_stride_n +
                   row.query * a.probs_stride_q;
  T* out = static_cast<T*>(a.grad_scores) + index * a.sk;

  A dot = 0;
  for_row(grad, probs, row.visible, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A g[n], p[n];
    read<n, (n > 1)>(grad + j, g);
    read<n, (n > 1)>(probs + j, p);
#pragma unroll
    for (int i = 0; i < n; ++i) dot += g[i] * p[i];
  });
  dot = reduce_team(dot, Sum{});

  const auto write_one = [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A g[n], p[n];
    read<n, (n > 1)>(grad + j, g);
    read<n, (n > 1)>(probs + j, p);
#pragma unroll
    for (int i = 0; i < n; ++i) p[i] *= scale * (g[i] - dot);
    write<n, (n > 1)>(out + j, p);
  };
  // Packets need all three pointers aligned alike; for_row looks at two.
  if (reinterpret_cast<uintptr_t>(out) % 16 == reinterpret_cast<uintptr_t>(probs) % 16) {
    for_row(grad, probs, row.visible, write_one);
  } else {
    for (int64_t j = threadIdx.x; j < row.visible; j += blockDim.x) write_one(j, Count<1>{});
  }
  write_zeros(out + row.visible, a.sk - row.visible);
}

template <typename T>
__global__ void __launch_bounds__(512) softmax_kernel(SoftmaxArguments a) {
  const int64_t rows = a.b * a.n * a.sq, step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    softmax_row<T>(a, row);
  }
}

template <typename T>
__global__ void __launch_bounds__(512) softmax_backward_kernel(SoftmaxBackwardArguments a) {
  const int64_t rows = a.b * a.n * a.sq, step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < rows; row += step) {
    backward_row<T>(a, row);
  }
}

// A warp a row while a row is short, then a block a row.
dim3 block_for(int64_t sk) {
  if (sk <= 1024) return dim3(32, 8);
  return dim3(sk <= 8192 ? 256 : 512);
}

template <typename T>
int launch(const SoftmaxArguments& a, void* stream) {
  const dim3 block = block_for(a.sk);
  const unsigned grid = grid_size((a.b * a.n * a.sq + block.y - 1) / block.y);
  MEGASCRATCH_LAUNCH(grid, block, stream, softmax_kernel<T>, a);
  return launch_status();
}

template <typename T>
int launch_backward(const SoftmaxBackwardArguments& a, void* stream) {
  const dim3 block = block_for(a.sk);
  const unsigned grid = grid_size((a.b * a.n * a.sq + block.y - 1) / block.y);
  MEGASCRATCH_LAUNCH(grid, block, stream, softmax_backward_kernel<T>, a);
  return launch_status();
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_scaled_softmax(const megascratch::SoftmaxArguments* arguments, void* stream) {
  using namespace megascratch;
  switch (arguments->dtype) {
    case DType::Float: return launch<float>(*arguments, stream);
    case DType::Double: return launch<double>(*arguments, stream);
    case DType::Half: return launch<Half>(*arguments, stream);
    case DType::BFloat16: return launch<BFloat16>(*arguments, stream);
  }
  return -1;
}

extern "C" int megascratch_cuda_scaled_softmax_backward(
    const megascratch::SoftmaxBackwardArguments* arguments, void* stream) {
  using namespace megascratch;
  switch (arguments->dtype) {
    case DType::Float: return launch_backward<float>(*arguments, stream);
    case DType::Double: return launch_backward<double>(*arguments, stream);
    case DType::Half: return launch_backward<Half>(*arguments, stream);
    case DType::BFloat16: return launch_backward<BFloat16>(*arguments, stream);
  }
  return -1;
}
