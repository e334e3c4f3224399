// RMSNorm, residual-add + RMSNorm and LayerNorm on the CPU, and their backward passes.
//
// A row is widened into a buffer of the accumulation type that stays in the first-level cache; so each row is read
// from memory once. The sums over tokens (dweight, dbias) are kept for each part of the rows and added up at the end,
// in an order that does not depend on the number of threads. The formulas stand in megascratch/ops/norm.py.

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

float square_root(float x) { return __builtin_sqrtf(x); }
double square_root(double x) { return __builtin_sqrt(x); }

// Widen a parameter, which may be stored wide already.
template <typename T>
void widen_parameter(const void* parameter, bool is_wide, Acc<T>* wide, int64_t h) {
  if (is_wide) {
    memcpy(wide, parameter, static_cast<size_t>(h) * sizeof(Acc<T>));
  } else {
    for (int64_t j = 0; j < h; ++j) wide[j] = load(static_cast<const T*>(parameter)[j]);
  }
}

// Σ term(j) over j < n, in four sums side by side: one alone would wait for each addition's latency.
template <typename A, typename Term>
inline __attribute__((always_inline)) A sum_of(int64_t n, const Term& term) {
  const int64_t quarter = n / 64 * 16;
  A s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t j = 0; j < quarter; ++j) {
    s0 += term(j);
    s1 += term(j + quarter);
    s2 += term(j + 2 * quarter);
    s3 += term(j + 3 * quarter);
  }
#pragma omp simd reduction(+ : s0)
  for (int64_t j = 4 * quarter; j < n; ++j) s0 += term(j);
  return (s0 + s1) + (s2 + s3);
}

// Widen a row, or the sum of two rounded as it is stored, and return the sum of squares.
template <typename T>
Acc<T> widen_rms_row(const NormArguments& a, int64_t row, Acc<T>* __restrict wide) {
  using A = Acc<T>;
  const T* __restrict x = static_cast<const T*>(a.x) + row * a.stride_x;
  if (!a.residual) {
    return sum_of<A>(a.h, [=](int64_t j) {
      wide[j] = load(x[j]);
      return wide[j] * wide[j];
    });
  }
  const T* __restrict residual = static_cast<const T*>(a.residual) + row * a.stride_residual;
  T* __restrict sum = static_cast<T*>(a.sum) + row * a.h;
  return sum_of<A>(a.h, [=](int64_t j) {
    sum[j] = store<T>(load(x[j]) + load(residual[j]));
    wide[j] = load(sum[j]);
    return wide[j] * wide[j];
  });
}

template <typename T>
void rms_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight_buffer(a.h), wide_buffer(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight_buffer, a.h);
  const A* __restrict weight = weight_buffer;
  A* __restrict wide = wide_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const A squares = widen_rms_row<T>(a, row, wide);
    const A rstd = 1 / square_root(squares / static_cast<A>(a.h) + static_cast<A>(a.eps));
    T* __restrict y = static_cast<T*>(a.y) + row * a.h;
#pragma omp simd
    for (int64_t j = 0; j < a.h; ++j) y[j] = store<T>(wide[j] * rstd * weight[j]);
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <typename T>
void layer_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight_buffer(a.h), bias_buffer(a.h), wide_buffer(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight_buffer, a.h);
  widen_parameter<T>(a.bias, a.wide_parameters, bias_buffer, a.h);
  const A* __restrict weight = weight_buffer;
  const A* __restrict bias = bias_buffer;
  A* __restrict wide = wide_buffer;
  for (int64_t row = begin; row < end; ++row) {
    const T* __restrict x = static_cast<const T*>(a.x) + row * a.stride_x;
    const A sum = sum_of<A>(a.h, [=](int64_t j) { return wide[j] = load(x[j]); });
    const A mean = sum / static_cast<A>(a.h);
    // A second pass over the differences: Σ x² − h mean² would cancel.
    const A squares = sum_of<A>(a.h, [=](int64_t j) { return (wide[j] - mean) * (wide[j] - mean); });
    const A rstd = 1 / square_root(squares / static_cast<A>(a.h) + static_cast<A>(a.eps));
    T* __restrict y = static_cast<T*>(a.y) + row * a.h;
#pragma omp simd
    for (int64_t j = 0; j < a.h; ++j) y[j] = store<T>((wide[j] - mean) * rstd * weight[j] + bias[j]);
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
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
template <typename T, bool centred>
void backward_through(
    const BackwardRow<T>& row, const Acc<T>* __restrict weight, Acc<T>* __restrict dweight, Acc<T>* __restrict dbias,
    int64_t h) {
  using A = Acc<T>;
  const T* __restrict grad = row.grad;
  const T* __restrict x = row.x;
  T* __restrict dx = row.dx;
  const A mean = row.mean, rstd = row.rstd;
  A dot = 0, sum = 0;
#pragma omp simd reduction(+ : dot, sum)
  for (int64_t j = 0; j < h; ++j) {
    const A g = load(grad[j]), product = g * (load(x[j]) - mean) * rstd;
    dweight[j] += product;
    dot += product * weight[j];
    if (centred) {
      dbias[j] += g;
      sum += g * weight[j];
    }
  }
  dot /= static_cast<A>(h), sum /= static_cast<A>(h);
  const auto gradient = [=](int64_t j) {
    return rstd * (load(grad[j]) * weight[j] - (load(x[j]) - mean) * rstd * dot - sum);
  };
  if (row.grad_sum) {
    const T* __restrict grad_sum = row.grad_sum;
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) dx[j] = store<T>(gradient(j) + load(grad_sum[j]));
  } else {
#pragma omp simd
    for (int64_t j = 0; j < h; ++j) dx[j] = store<T>(gradient(j));
  }
}

template <typename T, bool centred>
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
      backward_through<T, centred>(backward_row<T>(a, row), weight, dweight, dbias, a.h);
    }
  }
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

template <typename T>
void forward(const NormArguments& a, int64_t begin, int64_t end) {
  a.mean ? layer_rows<T>(a, begin, end) : rms_rows<T>(a, begin, end);
}

template <typename T>
void backward(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  a.mean ? backward_parts<T, true>(a, begin, end) : backward_parts<T, false>(a, begin, end);
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
