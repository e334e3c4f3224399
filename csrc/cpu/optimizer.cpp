// The AdamW update and the sum of squares on the CPU, one pass over flat tensors.

#include "dispatch.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

float square_root(float x) { return __builtin_sqrtf(x); }
double square_root(double x) { return __builtin_sqrt(x); }

// T is what values, gradients and averages are stored in, M the type of the model's values, to which the new ones are
// rounded; void for none. Values in two halves have the type UpperHalf.
template <typename T, typename M, typename V = T>
void adamw_run(const AdamWArguments& a, M* __restrict model, int64_t begin, int64_t end) {
  using A = Acc<T>;
  constexpr bool in_halves = __is_same(V, UpperHalf);
  V* __restrict value = static_cast<V*>(a.value);
  UpperHalf* __restrict remainder = static_cast<UpperHalf*>(a.remainder);
  T* __restrict exp_avg = static_cast<T*>(a.exp_avg);
  T* __restrict exp_avg_sq = static_cast<T*>(a.exp_avg_sq);
  const T* __restrict grad = static_cast<const T*>(a.grad);
  const A grad_factor = static_cast<A>(a.grad_factor), keep = static_cast<A>(a.keep), eps = static_cast<A>(a.eps);
  const A new1 = static_cast<A>(1 - a.beta1), beta2 = static_cast<A>(a.beta2), new2 = static_cast<A>(1 - a.beta2);
  const A step_size = static_cast<A>(a.step_size), root_factor = static_cast<A>(a.root_factor);
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const A g = load(grad[i]) * grad_factor;
    const A mean = load(exp_avg[i]) + new1 * (g - load(exp_avg[i]));
    const A square = beta2 * load(exp_avg_sq[i]) + new2 * g * g;
    A old = load(value[i]);
    if constexpr (in_halves) old = joined(old, load(remainder[i]));
    const A next = keep * old - step_size * mean / (square_root(square) * root_factor + eps);
    exp_avg[i] = store<T>(mean), exp_avg_sq[i] = store<T>(square);
    if constexpr (in_halves) {
      const Halves halves = halves_of(next);
      value[i] = store<UpperHalf>(halves.nearest), remainder[i] = store<UpperHalf>(halves.remainder);
    } else {
      value[i] = store<T>(next);
    }
    if constexpr (!__is_same(M, void)) model[i] = store<M>(next);
  }
}

// One sum in float would lose small squares beside large ones: blocks are summed in the accumulation type, and their
// sums in double.
constexpr int64_t block_elements = 1024;

template <typename T>
void squares(const SquaredNormArguments& a, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(a.x);
  for (int64_t part = begin; part < end; ++part) {
    const int64_t last = (part + 1) * a.n / a.parts;
    double total = 0;
    for (int64_t start = part * a.n / a.parts; start < last; start += block_elements) {
      const int64_t n = last - start < block_elements ? last - start : block_elements;
      Acc<T> sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < n; ++i) sum += load(x[start + i]) * load(x[start + i]);
      total += static_cast<double>(sum);
    }
    a.partial[part] = total;
  }
}

}  // namespace

void Kernels::adamw(const AdamWArguments& a, int64_t begin, int64_t end) {
  if (a.remainder) {
    adamw_run<float, void, UpperHalf>(a, nullptr, begin, end);
  } else if (!a.model) {
    for_dtype(a.dtype, [&](auto zero) { adamw_run<decltype(zero), void>(a, nullptr, begin, end); });
  } else if (a.dtype == DType::Double) {
    adamw_run<double, double>(a, static_cast<double*>(a.model), begin, end);
  } else if (a.model_dtype == DType::Float) {
    adamw_run<float, float>(a, static_cast<float*>(a.model), begin, end);
  } else if (a.model_dtype == DType::Half) {
    adamw_run<float, Half>(a, static_cast<Half*>(a.model), begin, end);
  } else {
    adamw_run<float, BFloat16>(a, static_cast<BFloat16*>(a.model), begin, end);
  }
}

void Kernels::squared_norm(const SquaredNormArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { squares<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
