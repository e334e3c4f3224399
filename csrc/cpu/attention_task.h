// Causal attention on the CPU, forward and backward, in blocks that stay in a core's cache.
//
// A task has queries of one sample and key/value head; the g query heads of the group are more rows of the same
// products, row = query · g + head. For each block of queries the keys that any of them sees come by in blocks:
//
//     queries 0 … 63      ▓                     forward    S = Q Kᵀ               P = exp(cap(scale · S) − m)
//     queries 64 … 127    █▓                               O += P V
//     queries 128 … 191   ██▓                   backward   S = Q Kᵀ, G = dO Vᵀ     P = exp(… − lse), dS = P (G − δ)
//     queries 192 … 255   ███▓                             dV += Pᵀ dO, dK += dSᵀ Q, dQ += dS K
//
// with the running maximum m and sum l of each row: a new block with the scores x gives
//     m' = max(m, max x)    l' = exp(m − m') l + Σ exp(x − m')    O' = exp(m − m') O + exp(x − m') V
// and δ = Σ P G over a whole row, which is dO · O. What is not seen is zero in P and dS, and a tile of a product whose
// rows see none of its columns, or none of its steps, is left out: of the diagonal's squares little more than the half
// is computed.
//
// Source: Dao 2023, arXiv:2307.08691.

#pragma once

#include "buffer.h"
#include "dispatch.h"
#include "exponential.h"
#include "kernels.h"
#include "tile.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr float minus_infinity = -__builtin_inff();
constexpr int64_t block_rows = 192, block_keys = 512;

int64_t round_up(int64_t x, int64_t multiple) { return divided_up(x, multiple) * multiple; }

// tanh by the exponential of a negative number.
template <typename A>
MEGASCRATCH_DEVICE VectorOf<A> hyperbolic_tangent(VectorOf<A> x) {
  const VectorOf<A> e = exponential(x < 0 ? 2 * x : -2 * x);
  const VectorOf<A> tangent = (1 - e) / (1 + e);
  return x < 0 ? -tangent : tangent;
}

// Scores as they enter the exponential.
template <bool capped, typename A>
MEGASCRATCH_DEVICE VectorOf<A> scaled(VectorOf<A> scores, A scale, A cap) {
  if constexpr (capped) return cap * hyperbolic_tangent<A>(scores * (scale / cap));
  return scores * scale;
}

struct Range {
  int64_t begin, end;
};

// Some rows and the keys [begin, end) that any of them sees, and the same for each tile of rows.
struct Rows {
  int64_t queries, count, padded;  // `padded` to whole units of a tile's rows
  Range seen;
  Range* of_row;
  Range* of_tile;
};

// The sizes that all blocks of a call share.
template <typename P>
struct Shape {
  using A = typename Operand<P>::Sum;
  static constexpr int64_t width = Operand<P>::width, columns = tile_columns_of<A>;
  int64_t g, d, d_steps, d_panels, d_padded, t_steps, t_padded, t_rows, rows, row_steps, keys;

  explicit Shape(const AttentionArguments& a)
      : g(a.n / a.kv),
        d(a.d),
        d_steps(divided_up(d, width)),
        d_panels(divided_up(d, columns)),
        d_padded(d_panels * columns),
        t_steps(divided_up(a.t, width)),
        t_padded(round_up(a.t, columns)),
        t_rows(round_up(a.t, row_unit)),
        rows(round_up(smaller(larger(block_rows / g, 1), a.s) * g, row_unit)),
        row_steps(rows / width),
        // Room for whole tiles and panels beyond the last key; and no multiple of the cache's page.
        keys(round_up(smaller(block_keys, a.t), columns) + columns) {}

  int64_t queries() const { return larger(block_rows / g, 1); }
  // The elements that a task adds to the gradient of its keys, or values.
  int64_t partial() const { return t_rows * d_padded; }
};

// One task: what it reads of q, k, v and the rest, and the scratch memory of its blocks.
template <typename T, typename P>
class Task {
 protected:
  using A = Acc<T>;
  using Stored = typename Operand<P>::Stored;
  static constexpr int64_t width = Operand<P>::width, lanes = lanes_of<A>, columns = tile_columns_of<A>;

  explicit Task(const AttentionArguments& a)
      : a(a),
        z(a),
        queries_left(z.rows * z.d_steps + columns),  // the last row as a right operand is read by whole panels
        scores(z.rows * z.keys),
        ranges(2 * z.rows) {}

  void enter(int64_t task) {
    part = task % a.parts, head = task / a.parts % a.kv, sample = task / a.parts / a.kv;
  }

  View<T> keys_of(const AttentionHeads& x) const {
    return {static_cast<const T*>(x.at) + sample * x.stride_b + head * x.stride_n, x.stride_s, 1};
  }

  const T* row_of(const AttentionHeads& x, int64_t query, int64_t member) const {
    return static_cast<const T*>(x.at) + query * x.stride_s + sample * x.stride_b + (head * z.g + member) * x.stride_n;
  }

  // Where a row stands among [s, b, n].
  int64_t place(int64_t query, int64_t member) const { return (query * a.b + sample) * a.n + head * z.g + member; }

  // Visit the rows of queries from `begin` on: `visit(row, query, member)`. Dividing a row by g would take longer.
  template <typename Visit>
  void for_rows(int64_t begin, const Rows& rows, const Visit& visit) const {
    int64_t row = 0;
    for (int64_t query = begin; query < begin + rows.queries; ++query) {
      for (int64_t member = 0; member < z.g; ++member) visit(row++, query, member);
    }
  }

  // A result [s or t, b, k · heads, d].
  AttentionHeads written(const void* at, int64_t heads) const {
    return {at, a.b * a.kv * heads * z.d, a.kv * heads * z.d, z.d};
  }

  // Ask for the next head's `heads` rows of x at a token while this head is computed: the rows of a head lie so far apart
  // that the processor does not foresee them. Behind the last head of a sample lies, in contiguous tensors, the next one.
  // (Always inline: GCC drops calls of functions that only prefetch.)
  MEGASCRATCH_DEVICE void ask_ahead(const AttentionHeads& x, int64_t token, int64_t heads) const {
    const T* at = static_cast<const T*>(x.at) + token * x.stride_s + sample * x.stride_b + (head + 1) * heads * x.stride_n;
    for (int64_t i = 0; i < heads; ++i, at += x.stride_n) {
      for (int64_t j = 0; j < z.d; j += line_elements<T>) __builtin_prefetch(at + j, 0, 2);
    }
  }

  // Whether a block is a whole head. Where a head has several, memory is a small part of its time.
  bool are_a_head(const Rows& rows) const { return rows.queries == a.s; }

  // Find what the queries [begin, begin + rows.queries) see.
  Rows look(int64_t begin) {
    Rows rows{smaller(z.queries(), a.s - begin), 0, 0, {a.t, 0}, ranges, ranges + z.rows};
    rows.count = rows.queries * z.g, rows.padded = round_up(rows.count, row_unit);
    for (int64_t row = 0; row < rows.padded; row += tile_rows) rows.of_tile[row / tile_rows] = {a.t, 0};
    for (int64_t row = rows.count; row < rows.padded; ++row) rows.of_row[row] = {0, 0};
    for_rows(begin, rows, [&](int64_t row, int64_t query, int64_t) {
      Range seen{0, larger(0, a.t - a.s + query + 1)};
      if (a.first) seen.begin = larger(0, a.first[sample * a.first_stride_b + query * a.first_stride_s]);
      rows.of_row[row] = seen;
      if (seen.begin >= seen.end) return;
      Range& tile = rows.of_tile[row / tile_rows];
      tile = {smaller(tile.begin, seen.begin), larger(tile.end, seen.end)};
      rows.seen = {smaller(rows.seen.begin, seen.begin), larger(rows.seen.end, seen.end)};
    });
    return rows;
  }

  // Gather rows [queries · g, d] as the left operand of a product.
  void gather(const AttentionHeads& x, int64_t begin, const Rows& rows, P* left) const {
    Stored* out = reinterpret_cast<Stored*>(left);
    const int64_t stride = z.d_steps * width;
    if (rows.count < rows.padded || stride > z.d) memset(static_cast<void*>(left), 0, sizeof(P) * rows.padded * z.d_steps);
    for_rows(begin, rows, [&](int64_t row, int64_t query, int64_t member) {
      const T* from = row_of(x, query, member);
      for (int64_t j = 0; j < z.d; ++j) {
        if constexpr (__is_same(T, Stored)) out[row * stride + j] = from[j];
        else out[row * stride + j] = load(from[j]);
      }
    });
  }

  // out [rows, keys of the block] = left times the packed [d, keys], where rows see keys: in both vectors of a panel,
  // or in one.
  void multiply_by_keys(const Rows& rows, Range block, const P* left, const P* packed, A* out) const {
    for (int64_t j = block.begin; j < block.end; j += columns) {
      const P* panel = packed + j / columns * z.d_steps * columns;
      for (int64_t row = 0; row < rows.padded; row += tile_rows) {
        const Range seen = rows.of_tile[row / tile_rows];
        if (seen.begin >= j + columns || seen.end <= j) continue;
        const P* a = left + row * z.d_steps;
        A* to = out + row * z.keys + j - block.begin;
        if (seen.begin < j + lanes && seen.end > j + lanes) {
          multiply_rows<false, 2>(rows.padded - row, a, z.d_steps, 1, panel, columns, z.d_steps, to, z.keys);
        } else {
          const int64_t at = seen.begin < j + lanes ? 0 : lanes;
          multiply_rows<false, 1>(rows.padded - row, a, z.d_steps, 1, panel + at, columns, z.d_steps, to + at, z.keys);
        }
      }
    }
  }

  // out [rows, d] += weights [rows, keys of the block] times the packed [keys, d].
  void add_over_keys(const Rows& rows, Range block, const P* weights, const P* packed, A* out) const {
    const int64_t stride = z.keys / width;
    for (int64_t panel = 0; panel < z.d_panels; ++panel, packed += z.t_steps * columns) {
      for (int64_t row = 0; row < rows.padded; row += tile_rows) {
        const Range seen = rows.of_tile[row / tile_rows];
        const int64_t begin = larger(seen.begin, block.begin) / width;
        const int64_t end = divided_up(smaller(seen.end, block.end), width);
        if (begin >= end) continue;
        multiply_rows<true, 2>(
            rows.padded - row, weights + row * stride + begin - block.begin / width, stride, 1, packed + begin * columns,
            columns, end - begin, out + row * z.d_padded + panel * columns, z.d_padded);
      }
    }
  }

  // The columns [begin, end) of a block that a row sees, and the whole vectors that hold them.
  struct Columns {
    int64_t begin, end;

    int64_t first_vector() const { return begin / lanes * lanes; }
    int64_t last_vector() const { return round_up(end, lanes); }
    // Which numbers of the vector at column j are seen.
    auto has(int64_t j) const {
      using Index = typename VectorTypes<A>::Index;
      const IntegersOf<A> at = lane_numbers<A>() + static_cast<Index>(j);
      return (at >= static_cast<Index>(begin)) & (at < static_cast<Index>(end));
    }
  };

  static Columns clip(Range seen, Range block) {
    const int64_t width = block.end - block.begin;
    const Columns columns{larger(seen.begin - block.begin, 0), smaller(seen.end - block.begin, width)};
    return columns.begin < columns.end ? columns : Columns{0, 0};
  }

  template <typename S>
  void clear_around(S* row, Columns seen) const {
    constexpr size_t bytes = sizeof(S) * lanes;
    for (int64_t j = 0; j < seen.first_vector(); j += lanes) memset(static_cast<void*>(row + j), 0, bytes);
    for (int64_t j = seen.last_vector(); j < z.keys; j += lanes) memset(static_cast<void*>(row + j), 0, bytes);
  }

  const AttentionArguments& a;
  const Shape<P> z;
  int64_t part = 0, head = 0, sample = 0;
  const Buffer<P> queries_left;
  const Buffer<A> scores;
  const Buffer<Range> ranges;
};

// Run the tasks [begin, end) of a pass: Forward or Backward, for the element type, with or without a cap, and on pairs of
// bfloat16 where the processor multiplies them.
template <template <typename T, typename P, bool capped> class Pass>
void run_tasks(const AttentionArguments& a, int64_t begin, int64_t end) {
  const auto run = [&](auto pass) {
    for (int64_t task = begin; task < end; ++task) pass.run(task);
  };
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto with_operand = [&](auto operand) {
      using P = decltype(operand);
      a.softcap > 0 ? run(Pass<T, P, true>(a)) : run(Pass<T, P, false>(a));
    };
#ifdef __AVX512F__
    if constexpr (__is_same(T, BFloat16)) {
      if (multiplies_pairs()) return with_operand(BFloat16Pair{});
    }
#endif
    with_operand(Acc<T>{});
  });
}

}  // namespace
}  // namespace megascratch::MEGASCRATCH_LEVEL
