// Matrix products of a training step, out [m, n] = a [m, k] b [k, n], or added to what out holds.
//
// The three products of a linear layer, with x [t, h] and W [f, h], differ in which operand lies the wrong way round:
//
//     Y  = X Wᵀ     b runs along k: its panels are transposed as they are packed
//     dX = dY W     both lie right
//     dW += dYᵀ X   a runs along m: its rows are packed as well; the sum goes straight into the float32 gradient
//
// The result is cut into blocks of rows × panels of `tile_columns` columns, and the threads share them. A panel of b is
// packed once for all rows of a block and stays in the second-level cache while they pass:
//
//     for each `depth` steps of k            operands: a number, or a pair of bfloat16 of two neighbouring k
//       pack the block's rows of a           only where its rows are not contiguous operands already
//       for each panel: pack b; for each tile of rows: multiply_tile
//
// Where a has few rows, as in generation, packing b would take as long as multiplying it. Then the result is computed
// lying on its side, outᵀ = bᵀ aᵀ, if the columns of b can be read as they lie: b goes through once, a tile of columns at
// a time, and it is a that is packed.
//
// bfloat16 is multiplied as it is by processors with AVX512-BF16, and widened as it is packed by others, as float16 is.

#include "buffer.h"
#include "dispatch.h"
#include "kernels.h"
#include "tile.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

// Rows that a packed panel of b serves: many, where the rows need no packing; else as many as the second-level cache
// holds beside the panel.
constexpr int64_t most_direct_rows = 4096, most_packed_rows = 480;
constexpr int64_t most_steps = 512;
constexpr int64_t few_rows = 96;

// Rows [row, row + rows) and steps [step, step + steps) of a, in panels of tile_rows rows, padded with zeros. Where a
// runs along m, a few steps go through all panels before the next: each cache line is then fetched once.
template <typename P, typename T>
void pack_rows(const MatmulArguments& a, int64_t row, int64_t rows, int64_t step, int64_t steps, P* packed) {
  constexpr int64_t few = 16;
  const T* from = static_cast<const T*>(a.a) + row * a.a_row;
  for (int64_t begin = 0; begin < steps; begin += few) {
    const int64_t end = smaller(begin + few, steps);
    for (int64_t first = 0; first < rows; first += tile_rows) {
      const int64_t count = smaller(tile_rows, rows - first);
      for (int64_t i = begin; i < end; ++i) {
        P* to = packed + first * steps + i * tile_rows;
        if (count == tile_rows && a.a_row == 1) {
          operands<tile_rows>(from + first, a.a_column, step + i, a.k, to);
        } else {
          for (int64_t j = 0; j < count; ++j) {
            to[j] = operand<P>(from + (first + j) * a.a_row, a.a_column, step + i, a.k);
          }
          for (int64_t j = count; j < tile_rows; ++j) to[j] = P{};
        }
      }
    }
  }
}

// Columns [column, column + count) and steps [step, step + steps) of b.
template <typename P, typename T>
void pack_columns(const MatmulArguments& a, int64_t column, int64_t count, int64_t step, int64_t steps, P* packed) {
  const View<T> columns{static_cast<const T*>(a.b) + column * a.b_column, a.b_row, a.b_column};
  pack_panel(columns, a.k, count, step, steps, packed);
}

// A tile of sums to the result, rounded, or added to it.
template <typename A, typename O>
void write_tile(const A* sums, O* out, int64_t out_row, int64_t rows, int64_t count, bool add) {
  constexpr int columns = tile_columns_of<A>;
  for (int64_t row = 0; row < rows; ++row, sums += columns, out += out_row) {
    if (add) {
      for (int64_t j = 0; j < count; ++j) out[j] = store<O>(load(out[j]) + sums[j]);
    } else if (count == columns) {
#pragma omp simd
      for (int64_t j = 0; j < columns; ++j) out[j] = store<O>(sums[j]);
    } else {
      for (int64_t j = 0; j < count; ++j) out[j] = store<O>(sums[j]);
    }
  }
}

#ifdef __AVX512F__
// Whole rows of a tile, rounded by the processor's own instruction.
__attribute__((target("avx512bf16"))) void write_tile(const float* sums, BFloat16* out, int64_t out_row, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row, sums += 32, out += out_row) {
    const __m512bh pair = _mm512_cvtne2ps_pbh(_mm512_loadu_ps(sums + 16), _mm512_loadu_ps(sums));
    memcpy(static_cast<void*>(out), &pair, sizeof pair);
  }
}
#endif

// P: what is multiplied, T: what a and b are stored in, O: what the result is.
template <typename P, typename T, typename O>
struct Matmul {
  using Sum = typename Operand<P>::Sum;
  static constexpr bool is_wide = __is_same(O, Sum);
  static constexpr int columns = tile_columns_of<Sum>;
  const MatmulArguments& a;
  const int64_t steps = divided_up(a.k, Operand<P>::width);
  const int64_t depth = is_wide ? smaller(steps, most_steps) : steps;  // half precision is rounded once, at the end
  const bool direct = reads_directly(a);

  static bool reads_directly(const MatmulArguments& a) {
    const int64_t width = Operand<P>::width;
    return __is_same(typename Operand<P>::Stored, T) && a.a_column == 1 && a.k % width == 0 && a.a_row % width == 0;
  }

  // Rows of a block: whole tiles, and blocks of about the same size.
  static int64_t block_rows(const MatmulArguments& a) {
    const int64_t steps = divided_up(a.k, Operand<P>::width);
    const int64_t packed = is_wide || steps <= most_steps ? most_packed_rows : most_packed_rows * most_steps / steps;
    const int64_t blocks = divided_up(a.m, reads_directly(a) ? most_direct_rows : larger(packed, 8 * tile_rows));
    return divided_up(divided_up(a.m, blocks), tile_rows) * tile_rows;
  }

  int64_t units() const { return divided_up(a.m, block_rows(a)) * divided_up(a.n, columns); }

  void run(int64_t begin, int64_t end) const {
    const int64_t panels = divided_up(a.n, columns), most_rows = block_rows(a);
    const Buffer<P> packed_rows((direct ? tile_rows : most_rows) * depth), panel(columns * depth);
    while (begin < end) {
      const int64_t row = begin / panels * most_rows, rows = smaller(most_rows, a.m - row);
      const int64_t first = begin % panels, last = smaller(panels, first + end - begin);
      int64_t step = 0;
      do {
        const int64_t count = smaller(depth, steps - step);
        const int64_t whole = direct ? rows / tile_rows * tile_rows : 0;
        pack_rows<P, T>(a, row + whole, rows - whole, step, count, packed_rows);
        for (int64_t i = first; i < last; ++i) {
          const int64_t width = smaller(columns, a.n - i * columns);
          pack_columns<P, T>(a, i * columns, width, step, count, panel);
          for (int64_t r = 0; r < rows; r += tile_rows) {
            O* out = static_cast<O*>(a.out) + (row + r) * a.out_row + i * columns;
            const int64_t height = smaller(tile_rows, rows - r);
            if (r < whole) {
              const P* left = reinterpret_cast<const P*>(
                  static_cast<const T*>(a.a) + (row + r) * a.a_row + step * Operand<P>::width);
              tile(left, a.a_row / Operand<P>::width, 1, panel, count, out, height, width, a.add || step > 0);
            } else {
              const P* left = packed_rows + (r - whole) * count;
              tile(left, 1, tile_rows, panel, count, out, height, width, a.add || step > 0);
            }
          }
        }
        step += count;
      } while (step < steps);
      begin += last - first;
    }
  }

  void tile(
      const P* left, int64_t left_row, int64_t left_step, const P* panel, int64_t count, O* out, int64_t height,
      int64_t width, bool add) const {
    if constexpr (is_wide) {
      if (height == tile_rows && width == columns) {
        add ? multiply_tile<true>(left, left_row, left_step, panel, columns, count, out, a.out_row)
            : multiply_tile<false>(left, left_row, left_step, panel, columns, count, out, a.out_row);
        return;
      }
    }
    Sum sums[tile_rows * columns];
    multiply_tile<false>(left, left_row, left_step, panel, columns, count, sums, columns);
#ifdef __AVX512F__
    if constexpr (__is_same(P, BFloat16Pair) && __is_same(O, BFloat16)) {
      if (width == columns && !add) return write_tile(sums, out, a.out_row, height);
    }
#endif
    write_tile(sums, out, a.out_row, height, width, add);
  }
};

// The same product, lying on its side. A unit is a tile of columns of b.
template <typename P, typename T, typename O>
struct SideMatmul {
  using Sum = typename Operand<P>::Sum;
  static constexpr int columns = tile_columns_of<Sum>;
  const MatmulArguments a;  // of the product that is computed
  const int64_t out_column, steps = divided_up(a.k, Operand<P>::width);

  explicit SideMatmul(const MatmulArguments& x) : a(on_its_side(x)), out_column(x.out_row) {}

  static MatmulArguments on_its_side(MatmulArguments x) {
    return {x.b, x.a, x.out, x.n, x.m, x.k, x.b_column, x.b_row, x.a_column, x.a_row, 1, x.add, x.wide_result, x.dtype};
  }

  // Pairs are multiplied so fast that writing across the rows would be half of the time.
  static bool serves(const MatmulArguments& x) {
    const bool is_few = x.m <= few_rows && x.n >= few_rows;
    return is_few && Operand<P>::width == 1 && Matmul<P, T, O>::reads_directly(on_its_side(x));
  }

  int64_t units() const { return divided_up(a.m, tile_rows); }

  void run(int64_t begin, int64_t end) const {
    const int64_t depth = __is_same(O, Sum) ? smaller(steps, most_steps) : steps, panels = divided_up(a.n, columns);
    const Buffer<P> packed(panels * columns * depth), last_rows(tile_rows * depth);
    int64_t step = 0;
    do {
      const int64_t count = smaller(depth, steps - step);
      for (int64_t i = 0; i < panels; ++i) {
        const int64_t width = smaller(columns, a.n - i * columns);
        pack_columns<P, T>(a, i * columns, width, step, count, packed + i * columns * count);
      }
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t row = unit * tile_rows, height = smaller(tile_rows, a.m - row);
        const P* left = reinterpret_cast<const P*>(static_cast<const T*>(a.a) + row * a.a_row + step * Operand<P>::width);
        int64_t left_row = a.a_row / Operand<P>::width, left_step = 1;
        if (height < tile_rows) {
          pack_rows<P, T>(a, row, height, step, count, last_rows);
          left = last_rows, left_row = 1, left_step = tile_rows;
        }
        for (int64_t i = 0; i < panels; ++i) {
          Sum sums[tile_rows * columns];
          multiply_tile<false>(left, left_row, left_step, packed + i * columns * count, columns, count, sums, columns);
          write(sums, row, i * columns, height, a.add || step > 0);
        }
      }
      step += count;
    } while (step < steps);
  }

  void write(const Sum* sums, int64_t row, int64_t column, int64_t height, bool add) const {
    const int64_t end = smaller(column + columns, a.n);
    for (O* out = static_cast<O*>(a.out) + column * out_column + row; column < end; ++column, ++sums, out += out_column) {
      for (int64_t i = 0; i < height; ++i) out[i] = store<O>((add ? load(out[i]) : Sum(0)) + sums[i * columns]);
    }
  }
};

// Call `f` with the product that the operands, the dtypes and the processor ask for.
template <typename F>
auto for_matmul(const MatmulArguments& a, const F& f) {
  const auto chosen = [&]<typename P, typename T, typename O>(P, T, O) {
    return SideMatmul<P, T, O>::serves(a) ? f(SideMatmul<P, T, O>(a)) : f(Matmul<P, T, O>{a});
  };
  const auto with_result = [&]<typename P, typename T>(P operand, T stored) {
    return a.wide_result ? chosen(operand, stored, float{}) : chosen(operand, stored, stored);
  };
  if (a.dtype == DType::Double) return chosen(double{}, double{}, double{});
  if (a.dtype == DType::Float) return chosen(float{}, float{}, float{});
  if (a.dtype == DType::Half) return with_result(float{}, Half{});
#ifdef __AVX512F__
  if (multiplies_pairs()) return with_result(BFloat16Pair{}, BFloat16{});
#endif
  return with_result(float{}, BFloat16{});
}

}  // namespace

int64_t Kernels::matmul_units(const MatmulArguments& a) {
  return for_matmul(a, [](const auto& product) { return product.units(); });
}

void Kernels::matmul(const MatmulArguments& a, int64_t begin, int64_t end) {
  for_matmul(a, [=](const auto& product) { product.run(begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
