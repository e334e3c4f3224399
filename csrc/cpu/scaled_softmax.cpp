// Scaled masked softmax over the keys on the CPU, and its backward pass: one query's scores are one row.
//
// Forward, for a row: x = scale · scores, masked positions −∞; p = exp(x − max x) / Σ exp(x − max x). Keys that the
// causal rule hides are never read. A row with no visible key gives zeros.
// Backward: with g the gradient of p, the scores' gradient is scale · p (g − Σ p g).

#include "exponential.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr float minus_infinity = -__builtin_inff();

// How many keys query i may see: all, or with the causal rule aligned to the bottom right those up to i + sk − sq.
int64_t visible_keys(bool causal, int64_t i, int64_t sq, int64_t sk) {
  const int64_t visible = causal ? i + sk - sq + 1 : sk;
  return visible < 0 ? 0 : visible > sk ? sk : visible;
}

// Scale and mask a row into x, and return its maximum.
template <typename T>
Acc<T> scale_and_mask(const T* scores, const bool* mask, int64_t mask_stride, Acc<T> scale, Acc<T>* x, int64_t length) {
  Acc<T> maximum = minus_infinity;
#pragma omp simd
  for (int64_t j = 0; j < length; ++j) x[j] = load(scores[j]) * scale;
  if (mask && mask_stride == 1) {
#pragma omp simd
    for (int64_t j = 0; j < length; ++j) x[j] = mask[j] ? minus_infinity : x[j];
  } else if (mask) {
    for (int64_t j = 0; j < length; ++j) x[j] = mask[j * mask_stride] ? minus_infinity : x[j];
  }
#pragma omp simd reduction(max : maximum)
  for (int64_t j = 0; j < length; ++j) maximum = x[j] > maximum ? x[j] : maximum;
  return maximum;
}

template <typename T>
void softmax_rows(const SoftmaxArguments& a, Acc<T>* x, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.scale);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % a.sq, head = row / a.sq % a.n, sample = row / a.sq / a.n;
    const T* scores = static_cast<const T*>(a.scores) + sample * a.stride_b + head * a.stride_n + i * a.stride_q;
    const bool* mask = a.mask;
    if (mask) mask += sample * a.mask_stride_b + head * a.mask_stride_n + i * a.mask_stride_q;
    T* probs = static_cast<T*>(a.probs) + row * a.sk;
    const int64_t visible = visible_keys(a.causal, i, a.sq, a.sk);

    const A maximum = scale_and_mask(scores, mask, a.mask_stride_k, scale, x, visible);
    // With every key masked, subtracting −∞ would give NaN; subtracting 0 leaves exp(−∞) = 0.
    const A shift = maximum == minus_infinity ? A(0) : maximum;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < visible; ++j) {
      x[j] = exponential<A>(x[j] - shift);
      sum += x[j];
    }
    const A factor = sum == 0 ? A(0) : 1 / sum;
#pragma omp simd
    for (int64_t j = 0; j < visible; ++j) probs[j] = store<T>(x[j] * factor);
    memset(static_cast<void*>(probs + visible), 0, static_cast<size_t>(a.sk - visible) * sizeof(T));
  }
}

template <typename T>
void backward_rows(const SoftmaxBackwardArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.scale);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t i = row % a.sq, head = row / a.sq % a.n, sample = row / a.sq / a.n;
    const T* g =
        static_cast<const T*>(a.grad) + sample * a.grad_stride_b + head * a.grad_stride_n + i * a.grad_stride_q;
    const T* p =
        static_cast<const T*>(a.probs) + sample * a.probs_stride_b + head * a.probs_stride_n + i * a.probs_stride_q;
    T* out = static_cast<T*>(a.grad_scores) + row * a.sk;
    const int64_t visible = visible_keys(a.causal, i, a.sq, a.sk);

    A dot = 0;
#pragma omp simd reduction(+ : dot)
    for (int64_t j = 0; j < visible; ++j) dot += load(p[j]) * load(g[j]);
#pragma omp simd
    for (int64_t j = 0; j < visible; ++j) out[j] = store<T>(scale * load(p[j]) * (load(g[j]) - dot));
    memset(static_cast<void*>(out + visible), 0, static_cast<size_t>(a.sk - visible) * sizeof(T));
  }
}

}  // namespace

void Kernels::scaled_softmax(const SoftmaxArguments& a, void* scratch, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::Float: return softmax_rows<float>(a, static_cast<float*>(scratch), begin, end);
    case DType::Double: return softmax_rows<double>(a, static_cast<double*>(scratch), begin, end);
    case DType::Half: return softmax_rows<Half>(a, static_cast<float*>(scratch), begin, end);
    case DType::BFloat16: return softmax_rows<BFloat16>(a, static_cast<float*>(scratch), begin, end);
  }
}

void Kernels::scaled_softmax_backward(const SoftmaxBackwardArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::Float: return backward_rows<float>(a, begin, end);
    case DType::Double: return backward_rows<double>(a, begin, end);
    case DType::Half: return backward_rows<Half>(a, begin, end);
    case DType::BFloat16: return backward_rows<BFloat16>(a, begin, end);
  }
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
