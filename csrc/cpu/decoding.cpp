// Generation on the CPU, a token of each sequence at a time: attention of one query over a cache, and the draw of a token.
//
// Of attention, a task is one sequence's key/value head. Its keys and values are read once, and nothing is computed from
// them that would pay for packing them, so what counts is that they are at hand in time: while the keys pass the values
// are asked for, and while the values pass the keys of the next task:
//
//     keys [t, d]      scores q k, four keys at a time             ─ asks for the values' rows
//     scores [t]       p = exp(score − largest)
//     values [t, d]    out = Σ p v / Σ p, four values at a time    ─ asks for the next task's keys

#include "attention_task.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr int together = 4;  // keys or values: as many sums as hide the latency of additions

// A sequence's rows of the cache.
template <typename T>
struct CacheRows {
  T* at;
  int64_t stride;

  T* row(int64_t i) const { return at + i * stride; }
  void expect(int64_t i, int64_t d) const {
    for (int64_t j = 0; j < d; j += line_elements<T>) __builtin_prefetch(row(i) + j);
  }
};

template <typename T, bool capped>
struct Decoding {
  using A = Acc<T>;
  using V = VectorOf<A>;
  static constexpr int64_t lanes = lanes_of<A>;

  explicit Decoding(const CachedAttentionArguments& a)
      : a(a), query(round_up(a.d, lanes)), scores(round_up(a.t, lanes) + lanes) {}

  static CacheRows<T> rows(const CacheHeads& heads, int64_t sample, int64_t head) {
    return {static_cast<T*>(heads.at) + sample * heads.stride_b + head * heads.stride_n, heads.stride_t};
  }

  // Returns false if the sequence's position lies outside the cache.
  bool run(int64_t task) {
    const int64_t sample = task / a.kv, head = task % a.kv, g = a.n / a.kv, next = task + 1 < a.b * a.kv ? task + 1 : task;
    const int64_t position = a.positions[sample * a.positions_stride];
    if (position < 0 || position >= a.t) return false;
    const CacheRows<T> keys = rows(a.keys, sample, head), values = rows(a.values, sample, head);
    const CacheRows<T> next_keys = rows(a.keys, next / a.kv, next % a.kv);
    append(a.k, sample, head, keys.row(position));
    append(a.v, sample, head, values.row(position));
    const int64_t first = larger(position - a.window + 1, 0), count = position + 1 - first;
    for (int64_t j = head * g; j < (head + 1) * g; ++j) {
      const T* q = static_cast<const T*>(a.q.at) + sample * a.q.stride_b + j * a.q.stride_n;
      for_vectors<A>(a.d, [&](int64_t i, int64_t n) { store_vector(query + i, load_vector(q + i, n)); });
      score(keys, values, first, count);
      const A total = exponentials(count);
      T* out = static_cast<T*>(a.out) + (sample * a.n + j) * a.d;
      for (int64_t i = 0; i < a.d; i += 2 * lanes) {
        const int64_t width = smaller(a.d - i, 2 * lanes);
        width == 2 * lanes ? add_values(values, next_keys, first, count, i, lanes, lanes, total, out)
                           : add_values(values, next_keys, first, count, i, smaller(width, lanes),
                                        larger(width - lanes, 0), total, out);
      }
    }
    return true;
  }

  void append(const AttentionHeads& heads, int64_t sample, int64_t head, T* to) const {
    const T* from = static_cast<const T*>(heads.at) + sample * heads.stride_b + head * heads.stride_n;
    memcpy(static_cast<void*>(to), from, static_cast<size_t>(a.d) * sizeof(T));
  }

  // The products of the query and each key; behind them −∞ to the end of a vector.
  void score(CacheRows<T> keys, CacheRows<T> values, int64_t first, int64_t count) const {
    for (int64_t i = 0; i < count; i += together) {
      V sums[together] = {};
      const T* row[together];
#pragma GCC unroll 4
      for (int m = 0; m < together; ++m) {
        const int64_t at = first + smaller(i + m, count - 1);
        row[m] = keys.row(at);
        values.expect(at, a.d);
      }
      for_vectors<A>(a.d, [&](int64_t j, int64_t n) {
        const V q = load_vector(query + j);
#pragma GCC unroll 4
        for (int m = 0; m < together; ++m) sums[m] += q * load_vector(row[m] + j, n);
      });
#pragma GCC unroll 4
      for (int m = 0; m < together; ++m) scores[i + m] = sum_of<A>(sums[m]);
    }
    for (int64_t i = count; i < round_up(count, lanes); ++i) scores[i] = minus_infinity;
  }

  // Scores to probabilities, up to the division by their sum, which is returned.
  A exponentials(int64_t count) const {
    const A scale = static_cast<A>(a.scale), cap = static_cast<A>(a.softcap);
    V maxima = V{} + minus_infinity;
    for (int64_t i = 0; i < count; i += lanes) {
      const V score = load_vector(scores + i);
      maxima = score > maxima ? score : maxima;
    }
    // The scale is positive and tanh grows, so the largest score is the largest afterwards.
    const A peak = scaled<capped>(V{} + largest_of<A>(maxima), scale, cap)[0];
    V sums = {};
    for (int64_t i = 0; i < count; i += lanes) {
      const V seen = load_vector(scores + i);
      const V p = exponential(scaled<capped>(seen, scale, cap) - peak);
      const V probability = seen == minus_infinity ? V{} : p;  // a cap would make a number of it
      store_vector(scores + i, probability);
      sums += probability;
    }
    return sum_of<A>(sums);
  }

  // The columns [column, column + n + more) of the result; behind the last score there are zeros.
  MEGASCRATCH_DEVICE void add_values(
      CacheRows<T> values, CacheRows<T> next_keys, int64_t first, int64_t count, int64_t column, int64_t n,
      int64_t more, A total, T* out) const {
    V sums[together][2] = {};
    for (int64_t i = 0; i < count; i += together) {
#pragma GCC unroll 4
      for (int m = 0; m < together; ++m) {
        const int64_t at = first + smaller(i + m, count - 1);
        const A p = i + m < count ? scores[i + m] : A(0);
        sums[m][0] += p * load_vector(values.row(at) + column, n);
        sums[m][1] += p * load_vector(values.row(at) + column + lanes, more);
        if (column == 0) next_keys.expect(at, a.d);
      }
    }
    for (int half = 0; half < 2; ++half) {
      const V sum = (sums[0][half] + sums[1][half]) + (sums[2][half] + sums[3][half]);
      store_vector(out + column + half * lanes, sum * (1 / total), half ? more : n);
    }
  }

  const CachedAttentionArguments& a;
  const Buffer<A> query, scores;
};

template <typename A>
constexpr int64_t draw_block = 16 * lanes_of<A>;  // columns whose sum is looked at before they are

// The first column at which the running sum of exp((logit − largest) / temperature) reaches u of the whole.
template <typename T>
int64_t drawn_column(const T* logits, int64_t n, Acc<T> scale, double u, Acc<T>* weights, double* of_block) {
  using A = Acc<T>;
  using V = VectorOf<A>;
  constexpr int64_t lanes = lanes_of<A>;
  V maxima = V{} + minus_infinity;
  for_vectors<A>(n, [&](int64_t j, int64_t count) {
    const V logit = load_vector(logits + j, count);
    if (count == lanes) {
      maxima = logit > maxima ? logit : maxima;
    } else {
      for (int64_t i = 0; i < count; ++i) maxima[i] = logit[i] > maxima[i] ? logit[i] : maxima[i];
    }
  });
  const A peak = largest_of<A>(maxima);
  double total = 0;
  for (int64_t start = 0; start < n; start += draw_block<A>) {
    V sums = {};
    for_vectors<A>(smaller(draw_block<A>, n - start), [&](int64_t j, int64_t count) {
      store_vector(weights + start + j, exponential((load_vector(logits + start + j, count) - peak) * scale), count);
      sums += load_vector(weights + start + j, count);
    });
    total += of_block[start / draw_block<A>] = static_cast<double>(sum_of<A>(sums));
  }
  // The block that reaches it, then the column, or what rounding makes the last one.
  double reached = 0;
  int64_t start = 0;
  for (; start + draw_block<A> < n && reached + of_block[start / draw_block<A>] < u * total; start += draw_block<A>) {
    reached += of_block[start / draw_block<A>];
  }
  int64_t last = start;
  for (int64_t j = start; j < smaller(start + draw_block<A>, n); ++j) {
    if (!(weights[j] > 0)) continue;
    reached += static_cast<double>(weights[j]), last = j;
    if (reached >= u * total) break;
  }
  return last;
}

}  // namespace

bool Kernels::cached_attention(const CachedAttentionArguments& a, int64_t begin, int64_t end) {
  const auto run = [&](auto decoding) {
    bool inside = true;
    for (int64_t task = begin; task < end; ++task) inside = decoding.run(task) && inside;
    return inside;
  };
  return for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    return a.softcap > 0 ? run(Decoding<T, true>(a)) : run(Decoding<T, false>(a));
  });
}

void Kernels::draw(const DrawArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Buffer<Acc<T>> weights(a.columns);
    const Buffer<double> of_block(a.columns / draw_block<Acc<T>> + 1);
    const Acc<T> scale = static_cast<Acc<T>>(1 / a.temperature);
    for (int64_t row = begin; row < end; ++row) {
      const T* logits = static_cast<const T*>(a.logits) + row * a.stride;
      a.drawn[row] = drawn_column<T>(logits, a.columns, scale, a.u[row], weights, of_block);
    }
  });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
