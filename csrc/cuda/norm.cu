// RMSNorm, residual-add + RMSNorm and LayerNorm on the GPU, and their backward passes, for any hidden size.
//
// A team of threads takes a row: a warp while its lanes can hold it, then a block. Where everything is
// aligned a thread owns up to K packets of 128 bits of the row and keeps them in registers; a row that does not fit, or
// is not aligned, is walked element by element and read again from cache (K = 0). In the backward pass a team takes
// many rows, so that each thread sums the gradients of its own columns without meeting another; the teams' sums are
// added up by a second kernel. The formulas stand in megascratch/ops/norm.py.

#include "dispatch.h"
#include "launchers.h"
#include "reduce.h"

namespace megascratch {
namespace {

constexpr int kept_packets = 4;
// A block of the backward pass is smaller: its threads need more registers than 512 can have.
constexpr unsigned forward_threads = 512, backward_threads = 384;

__device__ __forceinline__ float reciprocal_root(float x) { return 1.0f / sqrtf(x); }
__device__ __forceinline__ double reciprocal_root(double x) { return 1.0 / sqrt(x); }

// Visit this thread's columns j, j + 1, …, j + V − 1 of a row; k counts the visits.
template <int V, int K, typename Visit>
__device__ __forceinline__ void for_columns(int64_t h, const Visit& visit) {
  if constexpr (K > 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) {
      const int64_t j = static_cast<int64_t>(k * blockDim.x + threadIdx.x) * V;
      if (j < h) visit(k, j);
    }
  } else {
    for (int64_t j = static_cast<int64_t>(threadIdx.x) * V; j < h; j += blockDim.x * V) visit(0, j);
  }
}

// A parameter is stored in the element type or, wide, in the accumulation type.
template <typename T, int V, bool wide>
__device__ __forceinline__ void read_parameter(const void* from, bool wide_parameter, int64_t j, Acc<T> (&x)[V]) {
  if (wide_parameter) {
    read<V, wide>(static_cast<const Acc<T>*>(from) + j, x);
  } else {
    read<V, wide>(static_cast<const T*>(from) + j, x);
  }
}

// Read packet k of the row to normalise; with a residual, add it, round as the sum is stored, and store it.
template <typename T, int V, int K>
__device__ __forceinline__ void read_input(const NormArguments& a, int64_t row, int64_t j, Acc<T> (&x)[V]) {
  constexpr bool wide = V > 1;
  read<V, wide>(static_cast<const T*>(a.x) + row * a.stride_x + j, x);
  if (!a.residual) return;
  Acc<T> residual[V];
  read<V, wide>(static_cast<const T*>(a.residual) + row * a.stride_residual + j, residual);
#pragma unroll
  for (int i = 0; i < V; ++i) x[i] = load(store<T>(x[i] + residual[i]));
  write<V, wide>(static_cast<T*>(a.sum) + row * a.h + j, x);
}

template <typename T, int V, int K>
__device__ __forceinline__ void normalise_row(const NormArguments& a, int64_t row) {
  using A = Acc<T>;
  constexpr bool wide = V > 1;
  A kept[K > 0 ? K : 1][V];
  const auto input = [&](int k, int64_t j, A(&x)[V]) {
    if constexpr (K > 0) {
#pragma unroll
      for (int i = 0; i < V; ++i) x[i] = kept[k][i];
    } else {
      read_input<T, V, K>(a, row, j, x);
    }
  };

  A total = 0, squares = 0;
  for_columns<V, K>(a.h, [&](int k, int64_t j) {
    A(&x)[V] = kept[k];
    read_input<T, V, K>(a, row, j, x);
#pragma unroll
    for (int i = 0; i < V; ++i) total += x[i], squares += x[i] * x[i];
  });
  const A n = static_cast<A>(a.h);
  A mean = 0;
  if (a.mean) {
    mean = reduce_team(total, Sum{}) / n;
    // A second pass over the differences: Σ x² − n mean² would cancel.
    squares = 0;
    for_columns<V, K>(a.h, [&](int k, int64_t j) {
      A x[V];
      input(k, j, x);
#pragma unroll
      for (int i = 0; i < V; ++i) squares += (x[i] - mean) * (x[i] - mean);
    });
  }
  const A rstd = reciprocal_root(reduce_team(squares, Sum{}) / n + static_cast<A>(a.eps));

  for_columns<V, K>(a.h, [&](int k, int64_t j) {
    A x[V], weight[V], bias[V] = {};
    input(k, j, x);
    read_parameter<T, V, wide>(a.weight, a.wide_parameters, j, weight);
    if (a.bias) read_parameter<T, V, wide>(a.bias, a.wide_parameters, j, bias);
#pragma unroll
    for (int i = 0; i < V; ++i) x[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
    write<V, wide>(static_cast<T*>(a.y) + row * a.h + j, x);
  });
  if (threadIdx.x == 0) {
    if (a.mean) static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <typename T, int V, int K>
__global__ void __launch_bounds__(forward_threads) norm_kernel(NormArguments a) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; row < a.rows; row += step) {
    normalise_row<T, V, K>(a, row);
  }
}

// Read what a column contributes: g, the normalised input and u = g · weight.
template <typename T, int V>
__device__ __forceinline__ void read_gradient(
    const NormBackwardArguments& a, int64_t row, int64_t j, Acc<T> mean, Acc<T> rstd, Acc<T> (&g)[V],
    Acc<T> (&normalised)[V], Acc<T> (&u)[V]) {
  constexpr bool wide = V > 1;
  read<V, wide>(static_cast<const T*>(a.grad) + row * a.stride_grad + j, g);
  read<V, wide>(static_cast<const T*>(a.x) + row * a.stride_x + j, normalised);
  read_parameter<T, V, wide>(a.weight, a.wide_parameters, j, u);
#pragma unroll
  for (int i = 0; i < V; ++i) normalised[i] = (normalised[i] - mean) * rstd, u[i] *= g[i];
}

// dx of one row; this thread's columns are added to dweight and dbias, which lie in registers (K > 0) or in `partial`.
template <typename T, int V, int K, bool centred>
__device__ __forceinline__ void backward_row(
    const NormBackwardArguments& a, int64_t row, Acc<T> (&dweight)[K > 0 ? K : 1][V],
    Acc<T> (&dbias)[K > 0 ? K : 1][V], Acc<T>* partial) {
  using A = Acc<T>;
  constexpr bool wide = V > 1;
  const A mean = centred ? static_cast<const A*>(a.mean)[row] : A(0), rstd = static_cast<const A*>(a.rstd)[row];
  A dot = 0, sum = 0;
  for_columns<V, K>(a.h, [&](int k, int64_t j) {
    A g[V], normalised[V], u[V];
    read_gradient<T, V>(a, row, j, mean, rstd, g, normalised, u);
#pragma unroll
    for (int i = 0; i < V; ++i) {
      dot += u[i] * normalised[i];
      if constexpr (centred) sum += u[i];
      if constexpr (K > 0) {
        dweight[k][i] += g[i] * normalised[i];
        if constexpr (centred) dbias[k][i] += g[i];
      } else {
        partial[j + i] += g[i] * normalised[i];
        if constexpr (centred) partial[a.parts * a.h + j + i] += g[i];
      }
    }
  });
  dot = reduce_team(dot, Sum{}) / static_cast<A>(a.h);
  if constexpr (centred) sum = reduce_team(sum, Sum{}) / static_cast<A>(a.h);
  // The second reading hits the first-level cache.
  for_columns<V, K>(a.h, [&](int, int64_t j) {
    A g[V], normalised[V], u[V];
    read_gradient<T, V>(a, row, j, mean, rstd, g, normalised, u);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] = rstd * (u[i] - normalised[i] * dot - sum);
    if (a.grad_sum) {
      read<V, wide>(static_cast<const T*>(a.grad_sum) + row * a.stride_grad_sum + j, g);
#pragma unroll
      for (int i = 0; i < V; ++i) u[i] += g[i];
    }
    write<V, wide>(static_cast<T*>(a.dx) + row * a.h + j, u);
  });
}

// A part is a team: it takes the rows part, part + parts, …
template <typename T, int V, int K, bool centred>
__global__ void __launch_bounds__(backward_threads) norm_backward_kernel(NormBackwardArguments a) {
  using A = Acc<T>;
  constexpr bool wide = V > 1;
  const int64_t part = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (part >= a.parts) return;  // a whole warp: where a team is a block, there is one a block
  A* partial = static_cast<A*>(a.partial) + part * a.h;
  A dweight[K > 0 ? K : 1][V] = {}, dbias[K > 0 ? K : 1][V] = {};
  if constexpr (K == 0) {
    for_columns<V, K>(a.h, [&](int, int64_t j) {
      write<V, wide>(partial + j, dweight[0]);
      if constexpr (centred) write<V, wide>(partial + a.parts * a.h + j, dbias[0]);
    });
  }
  for (int64_t row = part; row < a.rows; row += a.parts) {
    backward_row<T, V, K, centred>(a, row, dweight, dbias, partial);
  }
  if constexpr (K > 0) {
    for_columns<V, K>(a.h, [&](int k, int64_t j) {
      write<V, wide>(partial + j, dweight[k]);
      if constexpr (centred) write<V, wide>(partial + a.parts * a.h + j, dbias[k]);
    });
  }
}

constexpr unsigned sum_columns = 32, sum_teams = 16;

// Add the parts up: a block takes 32 columns, each of its rows of threads every 16th part.
template <typename T>
__global__ void __launch_bounds__(sum_columns * sum_teams) add_parts_kernel(NormBackwardArguments a) {
  using A = Acc<T>;
  __shared__ A sums[sum_teams][sum_columns];
  const int64_t j = static_cast<int64_t>(blockIdx.x) * sum_columns + threadIdx.x;
  const A* partial = static_cast<const A*>(a.partial) + blockIdx.y * a.parts * a.h;
  void* out = blockIdx.y == 0 ? a.dweight : a.dbias;
  A sum = 0;
  if (j < a.h) {
    for (int64_t part = threadIdx.y; part < a.parts; part += sum_teams) sum += partial[part * a.h + j];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || j >= a.h) return;
#pragma unroll
  for (unsigned team = 1; team < sum_teams; ++team) sum += sums[team][threadIdx.x];
  if (a.wide_parameters) {
    static_cast<A*>(out)[j] = sum;
  } else {
    static_cast<T*>(out)[j] = store<T>(sum);
  }
}

template <typename T>
bool fits_packets(int64_t h, unsigned threads) {
  return h % packet_size<T> == 0 && h <= static_cast<int64_t>(threads) * kept_packets * packet_size<T>;
}

// Whether rows that start at a 16-byte boundary and lie `stride` elements apart all do; a null pointer does.
template <typename T>
bool aligned(const void* pointer, int64_t stride) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0 && stride % packet_size<T> == 0;
}

// A warp a row while its lanes can keep it, then a block a row.
dim3 team_for(int64_t h, int64_t packet, unsigned threads) {
  const int64_t wanted = (h + kept_packets * packet - 1) / (kept_packets * packet);
  if (wanted <= lanes) return dim3(lanes, 8);
  const int64_t rounded = (wanted + lanes - 1) / lanes * lanes;
  return dim3(static_cast<unsigned>(rounded < threads ? rounded : threads));
}

template <typename T, int V, int K>
int launch(const NormArguments& a, void* stream) {
  const dim3 block = team_for(a.h, V, forward_threads);
  const unsigned grid = grid_size((a.rows + block.y - 1) / block.y);
  MEGASCRATCH_LAUNCH(grid, block, stream, (norm_kernel<T, V, K>), a);
  return launch_status();
}

template <typename T>
int launch_widest(const NormArguments& a, void* stream) {
  const bool wide = fits_packets<T>(a.h, forward_threads) && aligned<T>(a.x, a.stride_x) &&
                    aligned<T>(a.residual, a.stride_residual) && aligned<T>(a.sum, 0) && aligned<T>(a.y, 0) &&
                    aligned<T>(a.weight, 0) && aligned<T>(a.bias, 0);
  return wide ? launch<T, packet_size<T>, kept_packets>(a, stream) : launch<T, 1, 0>(a, stream);
}

template <typename T, int V, int K>
int launch_backward(const NormBackwardArguments& a, void* stream) {
  const dim3 block = team_for(a.h, V, backward_threads);
  const unsigned grid = grid_size((a.parts + block.y - 1) / block.y);
  if (a.mean) {
    MEGASCRATCH_LAUNCH(grid, block, stream, (norm_backward_kernel<T, V, K, true>), a);
  } else {
    MEGASCRATCH_LAUNCH(grid, block, stream, (norm_backward_kernel<T, V, K, false>), a);
  }
  const dim3 columns(grid_size((a.h + sum_columns - 1) / sum_columns), a.dbias ? 2 : 1);
  MEGASCRATCH_LAUNCH(columns, dim3(sum_columns, sum_teams), stream, add_parts_kernel<T>, a);
  return launch_status();
}

template <typename T>
int launch_backward_widest(const NormBackwardArguments& a, void* stream) {
  const bool wide = fits_packets<T>(a.h, backward_threads) && aligned<T>(a.grad, a.stride_grad) &&
                    aligned<T>(a.x, a.stride_x) && aligned<T>(a.grad_sum, a.stride_grad_sum) &&
                    aligned<T>(a.dx, 0) && aligned<T>(a.weight, 0) && aligned<T>(a.partial, 0);
  return wide ? launch_backward<T, packet_size<T>, kept_packets>(a, stream) : launch_backward<T, 1, 0>(a, stream);
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_norm(const megascratch::NormArguments* arguments, void* stream) {
  using namespace megascratch;
  return for_dtype(arguments->dtype, [&](auto zero) { return launch_widest<decltype(zero)>(*arguments, stream); });
}

extern "C" int megascratch_cuda_norm_backward(const megascratch::NormBackwardArguments* arguments, void* stream) {
  using namespace megascratch;
  return for_dtype(
      arguments->dtype, [&](auto zero) { return launch_backward_widest<decltype(zero)>(*arguments, stream); });
}
