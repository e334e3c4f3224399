// Causal attention on the CPU, forward: see attention_task.h.

#include "attention_task.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

float logarithm(float x) { return __builtin_logf(x); }
double logarithm(double x) { return __builtin_log(x); }

template <typename T, typename P, bool capped>
class Forward : Task<T, P> {
  using Base = Task<T, P>;
  using typename Base::A;
  using typename Base::Stored;
  using Base::a, Base::z;

 public:
  explicit Forward(const AttentionArguments& a)
      : Base(a),
        keys(z.d_steps * z.t_padded),
        values(z.t_steps * z.d_padded),
        weights(Base::width == 1 ? 0 : z.rows * z.keys / Base::width),
        out(z.rows * z.d_padded),
        peak(z.rows),
        total(z.rows) {}

  void run(int64_t task) {
    Base::enter(task);
    const View<T> k = Base::keys_of(a.k), v = Base::keys_of(a.v);
    pack(View<T>{k.at, k.column, k.row}, z.d, a.t, static_cast<P*>(keys));
    pack(v, a.t, z.d, static_cast<P*>(values));
    for (int64_t begin = Base::part * z.queries(); begin < a.s; begin += a.parts * z.queries()) attend(begin);
  }

 private:
  void attend(int64_t begin) {
    const Rows rows = Base::look(begin);
    Base::gather(a.q, begin, rows, Base::queries_left);
    memset(static_cast<void*>(out), 0, sizeof(A) * rows.padded * z.d_padded);
    for (int64_t row = 0; row < rows.padded; ++row) peak[row] = minus_infinity, total[row] = 0;
    // In float and double the probabilities take the place of the scores.
    P* const probabilities = Base::width == 1 ? reinterpret_cast<P*>(static_cast<A*>(Base::scores)) : weights;
    const int64_t columns = Base::columns;
    for (int64_t key = rows.seen.begin / columns * columns; key < rows.seen.end; key += block_keys) {
      const Range block{key, smaller(key + block_keys, rows.seen.end)};
      Base::multiply_by_keys(rows, block, Base::queries_left, keys, Base::scores);
      for (int64_t row = 0; row < rows.padded; ++row) {
        if (Base::are_a_head(rows) && row < a.s) ask_ahead(row);
        normalise(row, rows.of_row[row], block, reinterpret_cast<Stored*>(probabilities) + row * z.keys);
      }
      Base::add_over_keys(rows, block, probabilities, values, out);
    }
    Base::for_rows(begin, rows, [&](int64_t row, int64_t query, int64_t member) {
      write(row, Base::place(query, member));
    });
  }

  MEGASCRATCH_DEVICE void ask_ahead(int64_t token) const {
    Base::ask_ahead(a.q, token, z.g), Base::ask_ahead(a.k, token, 1), Base::ask_ahead(a.v, token, 1);
    Base::ask_ahead(Base::written(a.result, z.g), token, z.g);
  }

  // Scores to probabilities, up to the division by their sum.
  void normalise(int64_t row, Range seen, Range block, Stored* p) {
    using V = VectorOf<A>;
    const A scale = static_cast<A>(a.scale), cap = static_cast<A>(a.softcap);
    const auto columns = Base::clip(seen, block);
    Base::clear_around(p, columns);
    if (columns.begin == columns.end) return;
    const A* x = Base::scores + row * z.keys;
    const int64_t first = columns.first_vector(), last = columns.last_vector();
    V maxima = V{} + minus_infinity;
    for (int64_t j = first; j < last; j += Base::lanes) {
      const V score = columns.has(j) ? load_vector(x + j) : V{} + minus_infinity;
      maxima = score > maxima ? score : maxima;
    }
    // The scale is positive and tanh grows, so the largest score is the largest afterwards.
    const A maximum = scaled<capped>(V{} + largest_of<A>(maxima), scale, cap)[0];
    const A old_peak = peak[row], new_peak = maximum > old_peak ? maximum : old_peak;
    const A shift = new_peak == minus_infinity ? A(0) : new_peak;
    V sums = {};
    for (int64_t j = first; j < last; j += Base::lanes) {
      const V probability = exponential(scaled<capped>(load_vector(x + j), scale, cap) - shift);
      const V seen_probability = columns.has(j) ? probability : V{};
      store_vector(p + j, seen_probability);
      sums += seen_probability;
    }
    peak[row] = new_peak;
    if (old_peak == minus_infinity) {
      total[row] = sum_of<A>(sums);
      return;
    }
    const A factor = exponential<A>(old_peak - shift);
    total[row] = total[row] * factor + sum_of<A>(sums);
    if (factor == 1) return;
    A* o = out + row * z.d_padded;
#pragma omp simd
    for (int64_t j = 0; j < z.d_padded; ++j) o[j] *= factor;
  }

  void write(int64_t row, int64_t place) {
    T* to = static_cast<T*>(a.result) + place * z.d;
    const A* from = out + row * z.d_padded;
    // The largest score counts exp(0): a sum below 1 is that of a query that saw no key.
    const A factor = total[row] < 1 ? A(1) : 1 / total[row];
    for_vectors<A>(z.d, [&](int64_t j, int64_t count) { store_vector(to + j, load_vector(from + j) * factor, count); });
    static_cast<A*>(a.lse)[place] = peak[row] + logarithm(total[row]);
  }

  const Buffer<P> keys, values, weights;
  const Buffer<A> out, peak, total;
};

}  // namespace

void Kernels::attention(const AttentionArguments& a, int64_t begin, int64_t end) { run_tasks<Forward>(a, begin, end); }

}  // namespace megascratch::MEGASCRATCH_LEVEL
