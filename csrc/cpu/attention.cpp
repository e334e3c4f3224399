// Rows of blocked causal attention on the CPU: what stands between its matrix products.
//
// A block holds the scores of some queries against the keys `start` to `start + w`. Row r is of query r / g; it sees the
// keys of the block from `first[query] − start` on, up to `last + query`.
//
// Forward keeps for each row the maximum m and the sum l of the blocks so far. A new block with scores x gives
//   m' = max(m, max x)    p = exp(x − m')    l' = exp(m − m') l + Σ p    out' = exp(m − m') out  (+ p V, outside)
// Backward gets the logarithm of the whole row's sum, and gives with g the gradient of p
//   p = exp(x − lse)      gradient of the scores = scale · p (g − delta)

#include "dispatch.h"
#include "exponential.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr float minus_infinity = -__builtin_inff();

struct Visible {
  int64_t begin, end;
};

// The columns that a row sees: an empty range where begin = end.
Visible visible_columns(const AttentionBlock& a, int64_t row) {
  const int64_t pair = row / a.r, query = row % a.r / a.g;
  int64_t end = a.last + query + 1;
  end = end < 0 ? 0 : end > a.w ? a.w : end;
  int64_t begin = a.first ? a.first[pair * a.first_stride + query] - a.start : 0;
  begin = begin < 0 ? 0 : begin > end ? end : begin;
  return {begin, end};
}

// tanh by the exponential of a negative number.
template <typename A>
MEGASCRATCH_DEVICE A hyperbolic_tangent(A x) {
  const A magnitude = x < 0 ? -x : x;
  const A e = exponential<A>(-2 * magnitude);
  const A tangent = (1 - e) / (1 + e);
  return x < 0 ? -tangent : tangent;
}

// A score as it enters the exponential.
template <bool capped, typename A>
MEGASCRATCH_DEVICE A scaled(A score, A scale, A cap) {
  if constexpr (capped) return cap * hyperbolic_tangent(score * scale / cap);
  return score * scale;
}

template <typename T>
void clear_hidden(T* row, Visible visible, int64_t w) {
  memset(static_cast<void*>(row), 0, static_cast<size_t>(visible.begin) * sizeof(T));
  memset(static_cast<void*>(row + visible.end), 0, static_cast<size_t>(w - visible.end) * sizeof(T));
}

template <typename T, bool capped>
void forward_rows(const AttentionArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.block.scale), cap = static_cast<A>(a.block.softcap);
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.scores) + row * a.block.w;
    A& peak = static_cast<A*>(a.peak)[row];
    A& total = static_cast<A*>(a.total)[row];
    const Visible visible = visible_columns(a.block, row);
    clear_hidden(x, visible, a.block.w);
    if (visible.begin == visible.end) continue;

    // The scale is positive and tanh grows, so the largest score is the largest afterwards.
    A maximum = minus_infinity;
#pragma omp simd reduction(max : maximum)
    for (int64_t j = visible.begin; j < visible.end; ++j) maximum = load(x[j]) > maximum ? load(x[j]) : maximum;
    maximum = scaled<capped>(maximum, scale, cap);
    const A new_peak = maximum > peak ? maximum : peak;
    const A shift = new_peak == minus_infinity ? A(0) : new_peak;
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = visible.begin; j < visible.end; ++j) {
      const A p = exponential<A>(scaled<capped>(load(x[j]), scale, cap) - shift);
      x[j] = store<T>(p);
      sum += p;
    }
    const A factor = exponential<A>(peak - shift);
    total = total * factor + sum;
    if (a.out && factor != 1) {
      A* out = static_cast<A*>(a.out) + row * a.d;
#pragma omp simd
      for (int64_t j = 0; j < a.d; ++j) out[j] *= factor;
    }
    peak = new_peak;
  }
}

template <typename T, bool capped>
void backward_rows(const AttentionBackwardArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const A scale = static_cast<A>(a.block.scale), cap = static_cast<A>(a.block.softcap);
  for (int64_t row = begin; row < end; ++row) {
    T* x = static_cast<T*>(a.scores) + row * a.block.w;
    T* g = static_cast<T*>(a.grad) + row * a.block.w;
    const A lse = static_cast<const A*>(a.lse)[row], delta = static_cast<const A*>(a.delta)[row];
    const Visible visible = visible_columns(a.block, row);
    clear_hidden(x, visible, a.block.w), clear_hidden(g, visible, a.block.w);
#pragma omp simd
    for (int64_t j = visible.begin; j < visible.end; ++j) {
      const A score = scaled<capped>(load(x[j]), scale, cap);
      const A p = exponential<A>(score - lse < 0 ? score - lse : A(0));
      A slope = scale;
      if constexpr (capped) slope *= 1 - score / cap * (score / cap);
      x[j] = store<T>(p);
      g[j] = store<T>(slope * p * (load(g[j]) - delta));
    }
  }
}

}  // namespace

void Kernels::attention(const AttentionArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.block.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.block.softcap > 0 ? forward_rows<T, true>(a, begin, end) : forward_rows<T, false>(a, begin, end);
  });
}

void Kernels::attention_backward(const AttentionBackwardArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.block.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.block.softcap > 0 ? backward_rows<T, true>(a, begin, end) : backward_rows<T, false>(a, begin, end);
  });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
