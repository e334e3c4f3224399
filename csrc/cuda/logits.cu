// Vocabulary-parallel cross-entropy on the GPU: one reading of the logits for all that the loss needs of a row, and one
// for their gradient. A block takes a row.
//
// Each thread keeps a maximum and a sum of exponentials, rescaled when its maximum grows (Milakov and Gimelshein 2018,
// arXiv:1805.02867); the block's threads are brought to a common maximum at the end.

#include "dispatch.h"
#include "exponential.h"
#include "launchers.h"
#include "reduce.h"
#include "rows.h"

namespace megascratch {
namespace {

constexpr unsigned row_threads = 512;
constexpr float minus_infinity = -__builtin_inff();

template <typename T>
__device__ __forceinline__ void statistics_row(const LogitStatisticsArguments& a, int64_t row) {
  using A = Acc<T>;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  A peak = minus_infinity, sum = 0;
  for_row(logits, logits, a.n_real, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A x[n];
    read<n, (n > 1)>(logits + j, x);
    A grown = peak;
#pragma unroll
    for (A value : x) grown = value > grown ? value : grown;
    // While every logit so far is −∞, subtracting it would give NaN; subtracting 0 leaves exp(−∞) = 0.
    const A shift = grown == minus_infinity ? A(0) : grown;
    sum *= exponential(peak - shift);
#pragma unroll
    for (A value : x) sum += exponential(value - shift);
    peak = grown;
  });
  const A row_peak = reduce_team(peak, Maximum{});
  const A shift = row_peak == minus_infinity ? A(0) : row_peak;
  const A total = reduce_team(sum * exponential(peak - shift), Sum{});
  if (threadIdx.x > 0) return;
  const int64_t column = a.labels[row] - a.first;
  static_cast<A*>(a.peak)[row] = row_peak;
  static_cast<A*>(a.total)[row] = total;
  static_cast<A*>(a.picked)[row] = column >= 0 && column < a.n_real ? load(logits[column]) : A(0);
}

template <typename T>
__device__ __forceinline__ void gradient_row(const LogitGradientArguments& a, int64_t row) {
  using A = Acc<T>;
  const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
  T* out = static_cast<T*>(a.grad_logits) + row * a.stride_out;
  const A grad = static_cast<const A*>(a.grad)[row], log_total = static_cast<const A*>(a.log_total)[row];
  const int64_t column = a.labels[row] - a.first;
  for_row(logits, out, a.n_real, [&](int64_t j, auto count) {
    constexpr int n = decltype(count)::value;
    A x[n];
    read<n, (n > 1)>(logits + j, x);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = grad * ((j + i == column ? A(1) : A(0)) - exponential(x[i] - log_total));
    write<n, (n > 1)>(out + j, x);
  });
  for (int64_t j = a.n_real + threadIdx.x; j < a.columns; j += blockDim.x) out[j] = store<T>(A(0));
}

template <typename T>
__global__ void __launch_bounds__(row_threads) statistics_kernel(LogitStatisticsArguments a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) statistics_row<T>(a, row);
}

template <typename T>
__global__ void __launch_bounds__(row_threads) gradient_kernel(LogitGradientArguments a) {
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x) gradient_row<T>(a, row);
}

// A short row leaves most of a large block without work.
unsigned threads_for(int64_t columns) { return columns <= 1024 ? 64 : columns <= 8192 ? 256 : row_threads; }

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_logit_statistics(
    const megascratch::LogitStatisticsArguments* arguments, void* stream) {
  using namespace megascratch;
  const LogitStatisticsArguments& a = *arguments;
  return for_dtype(a.dtype, [&](auto zero) {
    MEGASCRATCH_LAUNCH(
        grid_size(a.rows), threads_for(a.n_real), stream, statistics_kernel<decltype(zero)>, a);
    return launch_status();
  });
}

extern "C" int megascratch_cuda_logit_gradient(const megascratch::LogitGradientArguments* arguments, void* stream) {
  using namespace megascratch;
  const LogitGradientArguments& a = *arguments;
  return for_dtype(a.dtype, [&](auto zero) {
    MEGASCRATCH_LAUNCH(grid_size(a.rows), threads_for(a.columns), stream, gradient_kernel<decltype(zero)>, a);
    return launch_status();
  });
}
