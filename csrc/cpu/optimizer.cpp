// The AdamW update and the sum of squares on the CPU, one pass over flat tensors.

#include "adamw.h"
#include "dispatch.h"
#include "kernels.h"
#include "vectors.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

float square_root(float x) { return __builtin_sqrtf(x); }
double square_root(double x) { return __builtin_sqrt(x); }

// V is what values are stored in, UpperHalf where they lie in two halves; M the type of the model's values, to which the
// new ones are rounded, void for none; G, E and S are those of the gradient and of the averages of it and its square.
template <typename V, typename M, typename G, typename E, typename S>
void adamw_run(const AdamWArguments& a, int64_t begin, int64_t end) {
  using A = Acc<V>;
  constexpr bool in_halves = __is_same(V, UpperHalf);
  V* __restrict value = static_cast<V*>(a.value);
  UpperHalf* __restrict remainder = static_cast<UpperHalf*>(a.remainder);
  M* __restrict model = static_cast<M*>(a.model);
  E* __restrict exp_avg = static_cast<E*>(a.exp_avg);
  S* __restrict exp_avg_sq = static_cast<S*>(a.exp_avg_sq);
  const G* __restrict grad = static_cast<const G*>(a.grad);
  const AdamWStep<A> now(a);
  if (!now.taken) return;
#pragma omp simd
  for (int64_t i = begin; i < end; ++i) {
    const A g = load(grad[i]) * now.grad_factor;
    const A mean = load(exp_avg[i]) + now.new1 * (g - load(exp_avg[i]));
    const A square = now.beta2 * load(exp_avg_sq[i]) + now.new2 * g * g;
    A old = load(value[i]);
    if constexpr (in_halves) old = joined(old, load(remainder[i]));
    const A next = now.keep * old - now.step_size * mean / (square_root(square) * now.root_factor + now.eps);
    exp_avg[i] = store<E>(mean), exp_avg_sq[i] = store<S>(square);
    if constexpr (in_halves) {
      const Halves halves = halves_of(next);
      value[i] = store<UpperHalf>(halves.nearest), remainder[i] = store<UpperHalf>(halves.remainder);
    } else {
      value[i] = store<V>(next);
    }
    if constexpr (!__is_same(M, void)) model[i] = store<M>(next);
  }
}

// Call `f` with a number of the type that `dtype` names, of the two that go together.
template <typename F>
void for_float_or_bfloat16(DType dtype, const F& f) {
  dtype == DType::BFloat16 ? f(BFloat16{}) : f(float{});
}

template <typename V, typename M>
void adamw_beside(const AdamWArguments& a, int64_t begin, int64_t end) {
  for_float_or_bfloat16(a.grad_dtype, [&](auto grad) {
    for_float_or_bfloat16(a.exp_avg_dtype, [&](auto exp_avg) {
      for_float_or_bfloat16(a.exp_avg_sq_dtype, [&](auto exp_avg_sq) {
        adamw_run<V, M, decltype(grad), decltype(exp_avg), decltype(exp_avg_sq)>(a, begin, end);
      });
    });
  });
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
      Acc<T> sum[1];
      sum_vectors(n, sum, [=](int64_t j, int64_t count, VectorOf<Acc<T>>* sums) {
        const auto value = load_vector(x + start + j, count);
        sums[0] += value * value;
      });
      total += static_cast<double>(sum[0]);
    }
    a.partial[part] = total;
  }
}

}  // namespace

void Kernels::adamw(const AdamWArguments& a, int64_t begin, int64_t end) {
  if (a.remainder) return adamw_beside<UpperHalf, void>(a, begin, end);
  switch (a.dtype) {
    case DType::Double: return adamw_run<double, void, double, double, double>(a, begin, end);
    case DType::Half: return adamw_run<Half, void, Half, Half, Half>(a, begin, end);
    case DType::BFloat16: return adamw_beside<BFloat16, void>(a, begin, end);
    case DType::Float: break;
  }
  if (!a.model) return adamw_beside<float, void>(a, begin, end);
  if (a.model_dtype == DType::Half) return adamw_beside<float, Half>(a, begin, end);
  adamw_beside<float, BFloat16>(a, begin, end);
}

void Kernels::squared_norm(const SquaredNormArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { squares<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
