// Vocabulary-parallel cross-entropy on the CPU: one reading of the logits for all that the loss needs of a row, and one
// for their gradient.
//
// A row is taken in blocks that stay in the first-level cache. A block's maximum comes first; where it exceeds the
// row's, the sum so far is rescaled (Milakov and Gimelshein 2018, arXiv:1805.02867).

#include "buffer.h"
#include "dispatch.h"
#include "exponential.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr int64_t block_columns = 2048;
constexpr float minus_infinity = -__builtin_inff();

int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

template <typename T>
void statistics_rows(const LogitStatisticsArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Buffer<A> buffer(block_columns);
  A* block = buffer;
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    A peak = minus_infinity, total = 0;
    for (int64_t start = 0; start < a.n_real; start += block_columns) {
      const int64_t n = smaller(block_columns, a.n_real - start);
      A grown = peak;
#pragma omp simd reduction(max : grown)
      for (int64_t j = 0; j < n; ++j) {
        block[j] = load(logits[start + j]);
        grown = block[j] > grown ? block[j] : grown;
      }
      // While every logit so far is −∞, subtracting it would give NaN; subtracting 0 leaves exp(−∞) = 0.
      const A shift = grown == minus_infinity ? A(0) : grown;
      A sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < n; ++j) sum += exponential(block[j] - shift);
      total = total * exponential(peak - shift) + sum;
      peak = grown;
    }
    const int64_t column = a.labels[row] - a.first;
    static_cast<A*>(a.peak)[row] = peak;
    static_cast<A*>(a.total)[row] = total;
    static_cast<A*>(a.picked)[row] = column >= 0 && column < a.n_real ? load(logits[column]) : A(0);
  }
}

template <typename T>
void gradient_rows(const LogitGradientArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  for (int64_t row = begin; row < end; ++row) {
    const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
    T* out = static_cast<T*>(a.grad_logits) + row * a.stride_out;
    const A grad = static_cast<const A*>(a.grad)[row], log_total = static_cast<const A*>(a.log_total)[row];
    const int64_t column = a.labels[row] - a.first;
    const bool here = column >= 0 && column < a.n_real;
    // Before the row is overwritten, which may be in place.
    const A label_probability = here ? exponential(load(logits[column]) - log_total) : A(0);
#pragma omp simd
    for (int64_t j = 0; j < a.n_real; ++j) out[j] = store<T>(-grad * exponential(load(logits[j]) - log_total));
    if (here) out[column] = store<T>(grad * (1 - label_probability));
    memset(static_cast<void*>(out + a.n_real), 0, static_cast<size_t>(a.columns - a.n_real) * sizeof(T));
  }
}

}  // namespace

void Kernels::logit_statistics(const LogitStatisticsArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { statistics_rows<decltype(zero)>(a, begin, end); });
}

void Kernels::logit_gradient(const LogitGradientArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { gradient_rows<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
