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

// Widen a row, and return the sum of its numbers or of their squares.
template <typename T, bool squares>
Acc<T> widen(const T* __restrict from, Acc<T>* __restrict wide, int64_t h) {
  Acc<T> total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < h; ++j) {
    wide[j] = load(from[j]);
    total += squares ? wide[j] * wide[j] : wide[j];
  }
  return total;
}

// Add two rows, round as the sum is stored, widen it, and return the sum of squares.
template <typename T>
Acc<T> add_and_widen(
    const T* __restrict x, const T* __restrict residual, T* __restrict sum, Acc<T>* __restrict wide, int64_t h) {
  Acc<T> total = 0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < h; ++j) {
    sum[j] = store<T>(load(x[j]) + load(residual[j]));
    wide[j] = load(sum[j]);
    total += wide[j] * wide[j];
  }
  return total;
}

template <typename T>
void rms_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight(a.h), wide(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight, a.h);
  for (int64_t row = begin; row < end; ++row) {
    const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
    A squares;
    if (a.residual) {
      const T* residual = static_cast<const T*>(a.residual) + row * a.stride_residual;
      squares = add_and_widen(x, residual, static_cast<T*>(a.sum) + row * a.h, wide, a.h);
    } else {
      squares = widen<T, true>(x, wide, a.h);
    }
    const A rstd = 1 / square_root(squares / static_cast<A>(a.h) + static_cast<A>(a.eps));
    T* y = static_cast<T*>(a.y) + row * a.h;
#pragma omp simd
    for (int64_t j = 0; j < a.h; ++j) y[j] = store<T>(wide[j] * rstd * weight[j]);
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <typename T>
void layer_rows(const NormArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight(a.h), bias(a.h), wide(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight, a.h);
  widen_parameter<T>(a.bias, a.wide_parameters, bias, a.h);
  for (int64_t row = begin; row < end; ++row) {
    const A mean = widen<T, false>(static_cast<const T*>(a.x) + row * a.stride_x, wide, a.h) / static_cast<A>(a.h);
    A squares = 0;
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < a.h; ++j) {
      wide[j] -= mean;
      squares += wide[j] * wide[j];
    }
    const A rstd = 1 / square_root(squares / static_cast<A>(a.h) + static_cast<A>(a.eps));
    T* y = static_cast<T*>(a.y) + row * a.h;
#pragma omp simd
    for (int64_t j = 0; j < a.h; ++j) y[j] = store<T>(wide[j] * rstd * weight[j] + bias[j]);
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <typename A>
struct BackwardSums {
  A dot, u;
};

// Read a row of grad and x: keep u = grad · weight and the normalised input, add to the part's sums over tokens, and
// return Σ u · normalised and Σ u.
template <typename T, bool centred>
BackwardSums<Acc<T>> read_backward_row(
    const T* __restrict grad, const T* __restrict x, const Acc<T>* __restrict weight, Acc<T> mean, Acc<T> rstd,
    Acc<T>* __restrict u, Acc<T>* __restrict normalised, Acc<T>* __restrict dweight, Acc<T>* __restrict dbias,
    int64_t h) {
  Acc<T> dot = 0, sum = 0;
#pragma omp simd reduction(+ : dot, sum)
  for (int64_t j = 0; j < h; ++j) {
    const Acc<T> g = load(grad[j]), value = (centred ? load(x[j]) - mean : load(x[j])) * rstd;
    u[j] = g * weight[j];
    normalised[j] = value;
    dot += u[j] * value;
    dweight[j] += g * value;
    if (centred) {
      sum += u[j];
      dbias[j] += g;
    }
  }
  return {dot, sum};
}

template <typename T, bool centred>
void backward_parts(const NormBackwardArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> weight(a.h), u_row(a.h), normalised_row(a.h);
  widen_parameter<T>(a.weight, a.wide_parameters, weight, a.h);
  const size_t row_bytes = static_cast<size_t>(a.h) * sizeof(A);
  const A *u = u_row, *normalised = normalised_row;
  for (int64_t part = begin; part < end; ++part) {
    A* dweight = static_cast<A*>(a.partial) + part * a.h;
    A* dbias = centred ? dweight + a.parts * a.h : nullptr;
    memset(dweight, 0, row_bytes);
    if (centred) memset(dbias, 0, row_bytes);
    for (int64_t row = part * a.rows / a.parts; row < (part + 1) * a.rows / a.parts; ++row) {
      const T* grad = static_cast<const T*>(a.grad) + row * a.stride_grad;
      const T* x = static_cast<const T*>(a.x) + row * a.stride_x;
      const A mean = centred ? static_cast<const A*>(a.mean)[row] : A(0), rstd = static_cast<const A*>(a.rstd)[row];
      const BackwardSums<A> sums = read_backward_row<T, centred>(
          grad, x, weight, mean, rstd, u_row, normalised_row, dweight, dbias, a.h);
      const A dot = sums.dot / static_cast<A>(a.h), sum = sums.u / static_cast<A>(a.h);
      T* dx = static_cast<T*>(a.dx) + row * a.h;
      if (a.grad_sum) {
        const T* grad_sum = static_cast<const T*>(a.grad_sum) + row * a.stride_grad_sum;
#pragma omp simd
        for (int64_t j = 0; j < a.h; ++j) {
          dx[j] = store<T>(rstd * (u[j] - normalised[j] * dot - sum) + load(grad_sum[j]));
        }
      } else {
#pragma omp simd
        for (int64_t j = 0; j < a.h; ++j) dx[j] = store<T>(rstd * (u[j] - normalised[j] * dot - sum));
      }
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
