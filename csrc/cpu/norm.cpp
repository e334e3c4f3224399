// RMSNorm, residual-add + RMSNorm and LayerNorm on the CPU, and their backward passes.
//
// A row is short enough to stay in the first-level cache while it is read several times. The sums over tokens (dweight,
// dbias) are kept for each part of the rows and added up at the end, in an order that does not depend on the number of
// threads. The formulas stand in megascratch/ops/norm.py.

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"
#include "vectors.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

float square_root(float x) { return __builtin_sqrtf(x); }
double square_root(double x) { return __builtin_sqrt(x); }

// Ask for memory one page beyond `at`. The processor asks ahead by itself, but not across the end of a page, and hardly
// for what is only written. LayerNorm's backward pass needs it: its sums and a long row together overflow the first-level
// cache. The others gain nothing, and lose where four tensors stream.
template <bool writes = false, typename T>
MEGASCRATCH_DEVICE void expect(const T* at) {
  __builtin_prefetch(at + 4096 / sizeof(T), writes);
}

// Widen a parameter, which may be stored wide already.
template <typename T>
void widen_parameter(const void* parameter, bool is_wide, Acc<T>* wide, int64_t h) {
  if (is_wide) {
    memcpy(wide, parameter, static_cast<size_t>(h) * sizeof(Acc<T>));
  } else {
    for (int64_t j = 0; j < h; ++j) wide[j] = load(static_cast<const T*>(parameter)[j]);
  }
}

template <typename T>
void rms_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = VectorOf<A>;
  const Buffer<A> weight_buffer(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight_buffer, a.h);
  const A* __restrict weight = weight_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    A squares[1];
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.stride_residual;
      T* sum = static_cast<T*>(a.sum) + row * a.h;
      sum_vectors(a.h, squares, [=](int64_t j, int64_t count, V* sums) {
        store_vector(sum + j, load_vector(x + j, count) + load_vector(residual + j, count), count);
        const V rounded = load_vector(sum + j, count);
        sums[0] += rounded * rounded;
      });
      x = sum;
    } else {
      sum_vectors(a.h, squares, [=](int64_t j, int64_t count, V* sums) {
        const V value = load_vector(x + j, count);
        sums[0] += value * value;
      });
    }
    const A rstd = 1 / square_root(squares[0] / static_cast<A>(a.h) + static_cast<A>(a.eps));
    T* y = static_cast<T*>(a.y) + row * a.h;
    for_vectors<A>(a.h, [=](int64_t j, int64_t count) {
      store_vector(y + j, load_vector(x + j, count) * rstd * load_vector(weight + j, count), count);
    });
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <bool streams, typename T>
void layer_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  using V = VectorOf<A>;
  const Buffer<A> weight_buffer(a.h), bias_buffer(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight_buffer, a.h);
  widen_parameter<T>(a.bias, a.wide_parameters, bias_buffer, a.h);
  const A* __restrict weight = weight_buffer;
  const A* __restrict bias = bias_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    // One pass, over the differences from a number near the mean: Σ x² − h mean² would cancel.
    const int64_t some = a.h < lanes_of<A> ? a.h : lanes_of<A>;
    const A near = sum_of<A>(load_vector(x, some)) / static_cast<A>(some);
    A sums[2];
    sum_vectors(a.h, sums, [=](int64_t j, int64_t count, V* sums) {
      expect(x + j);
      const V difference = load_vector(x + j, count) - first_numbers<A>(near, count);
      sums[0] += difference;
      sums[1] += difference * difference;
    });
    const A n = static_cast<A>(a.h), offset = sums[0] / n, variance = sums[1] / n - offset * offset;
    const A mean = near + offset, rstd = 1 / square_root((variance > 0 ? variance : A(0)) + static_cast<A>(a.eps));
    T* y = static_cast<T*>(a.y) + row * a.h;
    write_row<streams>(y, a.h, [=](int64_t j, int64_t count) {
      if constexpr (!streams) expect<true>(y + j);
      const V normalised = (load_vector(x + j, count) - mean) * rstd;
      return normalised * load_vector(weight + j, count) + load_vector(bias + j, count);
    });
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
  if constexpr (streams) end_streams();
}

// A row of the backward pass.
template <typename T>
struct BackwardRow {
  const T *grad, *x, *grad_sum;
  T* dx;
  Acc<T> mean, rstd;
};

template <typename T>
BackwardRow<T> backward_row(const NormBackwardArguments& a, int64_t row) {
  const auto at = [&](const void* base, int64_t stride) { return static_cast<const T*>(base) + row * stride; };
  const Acc<T> mean = a.mean ? static_cast<const Acc<T>*>(a.mean)[row] : Acc<T>(0);
  return {at(a.grad, a.stride_grad),
          at(a.x, a.stride_x),
          a.grad_sum ? at(a.grad_sum, a.stride_grad_sum) : nullptr,
          static_cast<T*>(a.dx) + row * a.h,
          mean,
          static_cast<const Acc<T>*>(a.rstd)[row]};
}

// Write dx of a row, and add it to the part's sums over tokens. The row is computed twice, which costs less than
// keeping what the first pass found: both wait for stores.
template <typename T, bool centred, bool streams>
void backward_through(
    const BackwardRow<T>& row, const Acc<T>* __restrict weight, Acc<T>* __restrict dweight, Acc<T>* __restrict dbias,
    int64_t h) {
  using A = Acc<T>;
  using V = VectorOf<A>;
  const T* grad = row.grad;
  const T* x = row.x;
  const T* grad_sum = row.grad_sum;
  T* dx = row.dx;
  const A mean = row.mean, rstd = row.rstd;
  A totals[2];
  sum_vectors(h, totals, [=](int64_t j, int64_t count, V* sums) {
    if constexpr (centred) expect(grad + j), expect(x + j);
    const V g = load_vector(grad + j, count), w = load_vector(weight + j, count);
    const V product = g * ((load_vector(x + j, count) - mean) * rstd);
    store_vector(dweight + j, load_vector(dweight + j, count) + product, count);
    sums[0] += product * w;
    if constexpr (centred) {
      store_vector(dbias + j, load_vector(dbias + j, count) + g, count);
      sums[1] += g * w;
    }
  });
  const A dot = totals[0] / static_cast<A>(h), sum = totals[1] / static_cast<A>(h);
  write_row<streams>(dx, h, [=](int64_t j, int64_t count) {
    if constexpr (centred && !streams) expect<true>(dx + j);
    const V normalised = (load_vector(x + j, count) - mean) * rstd;
    V gradient = rstd * (load_vector(grad + j, count) * load_vector(weight + j, count) - normalised * dot - sum);
    if (grad_sum) gradient += load_vector(grad_sum + j, count);
    return gradient;
  });
}

template <typename T, bool centred, bool streams>
void backward_parts(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight, a.h);
  const size_t row_bytes = static_cast<size_t>(a.h) * sizeof(A);
  for (int64_t part = begin; part < end; ++part) {
    A* dweight = static_cast<A*>(a.partial) + part * a.h;
    A* dbias = centred ? dweight + a.parts * a.h : nullptr;
    memset(dweight, 0, row_bytes);
    if (centred) memset(dbias, 0, row_bytes);
    for (int64_t row = part * a.rows / a.parts; row < (part + 1) * a.rows / a.parts; ++row) {
      backward_through<T, centred, streams>(backward_row<T>(a, row), weight, dweight, dbias, a.h);
    }
  }
  if constexpr (streams) end_streams();
}

// Add the parts up into columns [begin, end) of dweight and dbias.
template <typename T>
void add_parts(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> total(end - begin);
  A* sum = total;
  const A* part = static_cast<const A*>(a.partial);
  void* const outputs[] = {a.dweight, a.dbias};
  for (void* out : outputs) {
    if (!out) continue;
    memset(sum, 0, static_cast<size_t>(end - begin) * sizeof(A));
    for (int64_t i = 0; i < a.parts; ++i, part += a.h) {
#pragma omp simd
      for (int64_t j = begin; j < end; ++j) sum[j - begin] += part[j];
    }
    for (int64_t j = begin; j < end; ++j) {
      if (a.wide_parameters) {
        static_cast<A*>(out)[j] = sum[j - begin];
      } else {
        static_cast<T*>(out)[j] = store<T>(sum[j - begin]);
      }
    }
  }
}

// Whether a result of LayerNorm goes past the caches. RMSNorm is far ahead of its peers without that.
template <typename T, typename Arguments>
bool result_streams(const Arguments& a, const void* result) {
  return rows_stream(static_cast<const T*>(result), a.h, a.rows * a.h * static_cast<int64_t>(sizeof(T)));
}

template <typename T>
void forward(const NormArguments& a, int64_t begin, int64_t end) {
  if (!a.mean) return rms_rows<T>(a, begin, end);
  result_streams<T>(a, a.y) ? layer_rows<true, T>(a, begin, end) : layer_rows<false, T>(a, begin, end);
}

template <typename T>
void backward(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  if (!a.mean) return backward_parts<T, false, false>(a, begin, end);
  result_streams<T>(a, a.dx) ? backward_parts<T, true, true>(a, begin, end)
                             : backward_parts<T, true, false>(a, begin, end);
}

}  // namespace

void Kernels::norm(const NormArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { forward<decltype(zero)>(a, begin, end); });
}

void Kernels::norm_backward(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { backward<decltype(zero)>(a, begin, end); });
}

void Kernels::norm_add_parts(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { add_parts<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
