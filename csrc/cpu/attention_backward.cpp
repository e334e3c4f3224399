// Causal attention on the CPU, backward: see attention_task.h.

#include "attention_task.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

template <typename T, typename P, bool capped>
class Backward : Task<T, P> {
  using Base = Task<T, P>;
  using typename Base::A;
  using typename Base::Stored;
  using Base::a, Base::z, Base::width, Base::columns;

 public:
  explicit Backward(const AttentionArguments& a)
      : Base(a),
        keys(z.d_steps * z.t_padded),
        values(z.d_steps * z.t_padded),
        keys_over(z.t_steps * z.d_padded),
        grads_left(z.rows * z.d_steps + columns),
        queries_packed(width == 1 ? 0 : z.row_steps * z.d_padded),
        grads_packed(width == 1 ? 0 : z.row_steps * z.d_padded),
        grads(z.rows * z.keys),
        weights(width == 1 ? 0 : 3 * z.row_steps * z.keys),
        grad_q(z.rows * z.d_padded),
        own_grads(a.parts == 1 ? 2 * z.partial() : 0),
        delta(z.rows),
        lse(z.rows) {}

  void run(int64_t task) {
    Base::enter(task);
    const View<T> k = Base::keys_of(a.k), v = Base::keys_of(a.v);
    pack(View<T>{k.at, k.column, k.row}, z.d, a.t, static_cast<P*>(keys));
    pack(View<T>{v.at, v.column, v.row}, z.d, a.t, static_cast<P*>(values));
    pack(k, a.t, z.d, static_cast<P*>(keys_over));
    // What a task alone adds up stays in its cache.
    const bool alone = a.parts == 1;
    grad_k = alone ? static_cast<A*>(own_grads) : static_cast<A*>(a.partial) + task * 2 * z.partial();
    grad_v = grad_k + z.partial();
    memset(static_cast<void*>(grad_k), 0, sizeof(A) * 2 * z.partial());
    for (int64_t begin = Base::part * z.queries(); begin < a.s; begin += a.parts * z.queries()) attend(begin);
    for (int64_t key = 0; alone && key < a.t; ++key) {
      const int64_t at = ((key * a.b + Base::sample) * a.kv + Base::head) * z.d;
      write(grad_k + key * z.d_padded, static_cast<T*>(a.grad_k) + at);
      write(grad_v + key * z.d_padded, static_cast<T*>(a.grad_v) + at);
    }
  }

 private:
  void attend(int64_t begin) {
    const Rows rows = Base::look(begin);
    Base::gather(a.q, begin, rows, Base::queries_left);
    Base::gather(a.grad, begin, rows, grads_left);
    const Right queries_over = turn(Base::queries_left, rows, queries_packed);
    const Right grads_over = turn(grads_left, rows, grads_packed);
    Base::for_rows(begin, rows, [&](int64_t row, int64_t query, int64_t member) { read_row(row, query, member); });
    memset(static_cast<void*>(grad_q), 0, sizeof(A) * rows.padded * z.d_padded);
    P* const p = width == 1 ? reinterpret_cast<P*>(static_cast<A*>(Base::scores)) : weights;
    P* const turned = width == 1 ? reinterpret_cast<P*>(static_cast<A*>(grads)) : p + z.row_steps * z.keys;
    P* const ds = width == 1 ? turned : turned + z.row_steps * z.keys;
    for (int64_t key = rows.seen.begin / columns * columns; key < rows.seen.end; key += block_keys) {
      const Range block{key, smaller(key + block_keys, rows.seen.end)};
      Base::multiply_by_keys(rows, block, Base::queries_left, keys, Base::scores);
      Base::multiply_by_keys(rows, block, grads_left, values, grads);
      for (int64_t row = 0; row < rows.padded; row += width) {
        const int64_t asked = Base::are_a_head(rows) ? smaller(row + width, a.s) : 0;
        for (int64_t token = row; token < asked; ++token) ask_ahead(token);
        differentiate(row, rows, block, p, turned, ds);
      }
      add_over_rows(rows, block, p, grads_over, grad_v);
      add_over_rows(rows, block, turned, queries_over, grad_k);
      Base::add_over_keys(rows, block, ds, keys_over, grad_q);
    }
    Base::for_rows(begin, rows, [&](int64_t row, int64_t query, int64_t member) {
      write(grad_q + row * z.d_padded, static_cast<T*>(a.result) + Base::place(query, member) * z.d);
    });
  }

  MEGASCRATCH_DEVICE void ask_ahead(int64_t token) const {
    Base::ask_ahead(a.q, token, z.g), Base::ask_ahead(a.out, token, z.g), Base::ask_ahead(a.grad, token, z.g);
    Base::ask_ahead(a.k, token, 1), Base::ask_ahead(a.v, token, 1);
    Base::ask_ahead(Base::written(a.result, z.g), token, z.g);
    Base::ask_ahead(Base::written(a.grad_k, 1), token, 1), Base::ask_ahead(Base::written(a.grad_v, 1), token, 1);
  }

  // A right operand of products: `step` leads from step to step, `panel` to the next columns of a tile.
  struct Right {
    const P* at;
    int64_t step, panel;
  };

  // A left operand [rows, d] as a right one. Of numbers it is the same; pairs of neighbours in d become pairs of rows.
  Right turn(const P* left, const Rows& rows, P* packed) const {
    if constexpr (width == 1) return {left, z.d_steps, columns};
    pack(View<Stored>{reinterpret_cast<const Stored*>(left), z.d_steps * width, 1}, rows.padded, z.d, packed);
    return {packed, columns, rows.padded / width * columns};
  }

  // Σ probability × its gradient over a row is the row of dO times that of O.
  void read_row(int64_t row, int64_t query, int64_t member) {
    const T* o = Base::row_of(a.out, query, member);
    const T* g = Base::row_of(a.grad, query, member);
    A sums[1];
    sum_vectors<A, 1>(z.d, sums, [&](int64_t j, int64_t count, VectorOf<A>* sum) {
      sum[0] += load_vector(o + j, count) * load_vector(g + j, count);
    });
    delta[row] = sums[0], lse[row] = static_cast<const A*>(a.lse)[Base::place(query, member)];
  }

  void write(const A* from, T* to) const {
    for_vectors<A>(z.d, [&](int64_t j, int64_t count) { store_vector(to + j, load_vector(from + j), count); });
  }

  struct Gradient {
    VectorOf<A> p, ds;
  };

  // P and dS of a row in the vector at column j.
  Gradient gradient_at(int64_t row, int64_t j, const typename Base::Columns& seen) const {
    using V = VectorOf<A>;
    const A scale = static_cast<A>(a.scale), cap = static_cast<A>(a.softcap);
    const V score = scaled<capped>(load_vector(Base::scores + row * z.keys + j), scale, cap);
    const V g = load_vector(grads + row * z.keys + j);
    const V below = score - lse[row];
    const V p = exponential(below < 0 ? below : V{});
    V slope = V{} + scale;
    if constexpr (capped) slope *= 1 - score / cap * (score / cap);
    const V ds = slope * p * (g - delta[row]);
    return {seen.has(j) ? p : V{}, seen.has(j) ? ds : V{}};
  }

  // From scores and G to P and dS, of one row or of a pair: as left operands of products, P and `turned` with rows as
  // steps, ds with keys as steps. Of numbers in pairs the first two hold rows 2i and 2i + 1 side by side; otherwise
  // there is one layout, in place.
  void differentiate(int64_t row, const Rows& rows, Range block, P* p, P* turned, P* ds) {
    const auto columns = Base::clip(rows.of_row[row], block);
    if constexpr (width == 1) {
      Base::clear_around(p + row * z.keys, columns), Base::clear_around(ds + row * z.keys, columns);
      for (int64_t j = columns.first_vector(); j < columns.last_vector(); j += Base::lanes) {
        const Gradient at = gradient_at(row, j, columns);
        store_vector(p + row * z.keys + j, at.p), store_vector(ds + row * z.keys + j, at.ds);
      }
    } else {
      const auto odd_columns = Base::clip(rows.of_row[row + 1], block);
      const typename Base::Columns both{
          smaller(columns.begin, odd_columns.begin), larger(columns.end, odd_columns.end)};
      p += row / 2 * z.keys, turned += row / 2 * z.keys;
      Stored* even_ds = reinterpret_cast<Stored*>(ds) + row * z.keys;
      Base::clear_around(p, both), Base::clear_around(turned, both);
      Base::clear_around(even_ds, both), Base::clear_around(even_ds + z.keys, both);
      for (int64_t j = both.first_vector(); j < both.last_vector(); j += Base::lanes) {
        const Gradient even = gradient_at(row, j, columns), odd = gradient_at(row + 1, j, odd_columns);
        store_pairs(p + j, even.p, odd.p), store_pairs(turned + j, even.ds, odd.ds);
        store_vector(even_ds + j, even.ds), store_vector(even_ds + z.keys + j, odd.ds);
      }
    }
  }

  // out [keys of the block, d] += turned weights [keys, rows] times the packed [rows, d].
  void add_over_rows(const Rows& rows, Range block, const P* turned, Right right, A* out) const {
    for (int64_t panel = 0; panel < z.d_panels; ++panel, right.at += right.panel) {
      for (int64_t key = block.begin; key < block.end; key += tile_rows) {
        const Range range = rows_that_see(rows, key);
        if (range.begin == range.end) continue;
        const int64_t begin = range.begin / width, end = range.end / width;
        multiply_rows<true, 2>(
            block.end - key, turned + begin * z.keys + key - block.begin, 1, z.keys, right.at + begin * right.step,
            right.step, end - begin, out + key * z.d_padded + panel * columns, z.d_padded);
      }
    }
  }

  static Range rows_that_see(const Rows& rows, int64_t key) {
    const auto sees = [&](int64_t row) {
      const Range seen = rows.of_tile[row / tile_rows];
      return seen.begin < key + tile_rows && seen.end > key;
    };
    Range range{0, rows.padded};
    while (range.begin < range.end && !sees(range.begin)) range.begin += tile_rows;
    while (range.begin < range.end && !sees(range.end - 1)) range.end = (range.end - 1) / tile_rows * tile_rows;
    return range;
  }

  const Buffer<P> keys, values, keys_over, grads_left, queries_packed, grads_packed;
  const Buffer<A> grads;
  const Buffer<P> weights;
  const Buffer<A> grad_q, own_grads, delta, lse;
  A *grad_k = nullptr, *grad_v = nullptr;
};

// Keys are rows here: those of all samples and key/value heads, in the order of grad_k and grad_v.
template <typename T>
void add_parts(const AttentionArguments& a, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const Shape<A> z(a);
  const Buffer<A> buffer(z.d);
  A* __restrict sum = buffer;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t pair = row % (a.b * a.kv), key = row / (a.b * a.kv);
    const A* part = static_cast<const A*>(a.partial) + pair * a.parts * 2 * z.partial() + key * z.d_padded;
    void* const outputs[] = {a.grad_k, a.grad_v};
    for (int which = 0; which < 2; ++which) {
      memcpy(sum, part + which * z.partial(), sizeof(A) * z.d);
      for (int64_t i = 1; i < a.parts; ++i) {
        const A* __restrict other = part + (2 * i + which) * z.partial();
#pragma omp simd
        for (int64_t j = 0; j < z.d; ++j) sum[j] += other[j];
      }
      T* __restrict out = static_cast<T*>(outputs[which]) + row * z.d;
#pragma omp simd
      for (int64_t j = 0; j < z.d; ++j) out[j] = store<T>(sum[j]);
    }
  }
}

}  // namespace

void Kernels::attention_backward(const AttentionArguments& a, int64_t begin, int64_t end) {
  run_tasks<Backward>(a, begin, end);
}

int64_t Kernels::attention_partial(const AttentionArguments& a) {
  return a.dtype == DType::Double ? Shape<double>(a).partial() : Shape<float>(a).partial();
}

void Kernels::attention_add_parts(const AttentionArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { add_parts<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
