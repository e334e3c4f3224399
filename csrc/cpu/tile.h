// The heart of a matrix product: a tile of the result that stays in registers while the steps run.
//
// b comes packed in panels of `tile_columns` columns, so that each step reads two vectors of b and one number of a for
// each of `tile_rows` rows:
//
//             b   [ 0 … W | W … 2W ]     packed, steps × 2W
//     a  r0 ·     [ acc00 | acc01  ]
//        r1 ·     [ acc10 | acc11  ]     tile_rows × 2 accumulators
//
// An operand is float or double, or a pair of bfloat16 numbers of two steps that processors with AVX512-BF16 multiply and
// add at once.

#pragma once

#include "vectors.h"

namespace megascratch {
namespace {

// Rows of a tile; a product's last tile may be lower, by whole units.
#if defined(__AVX512F__)
constexpr int tile_rows = 12, row_unit = 4;
#elif defined(__AVX__)
constexpr int tile_rows = 6, row_unit = 2;
#else
constexpr int tile_rows = 4, row_unit = 2;
#endif

struct BFloat16Pair {
  BFloat16 even, odd;
};

MEGASCRATCH_DEVICE void store_pairs(BFloat16Pair* to, VectorOf<float> even, VectorOf<float> odd) {
  const IntegersOf<float> bits = (rounded_bits(even) >> 16) | (rounded_bits(odd) & 0xffff0000u);
  memcpy(static_cast<void*>(to), &bits, sizeof bits);
}

// What a product multiplies: the type it is stored in, how many steps one operand holds, and the type of the sums.
template <typename P>
struct Operand {
  using Stored = P;
  using Sum = P;
  static constexpr int width = 1;
};
template <>
struct Operand<BFloat16Pair> {
  using Stored = BFloat16;
  using Sum = float;
  static constexpr int width = 2;
};

template <typename A>
constexpr int tile_columns_of = 2 * lanes_of<A>;

constexpr int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }
constexpr int64_t larger(int64_t x, int64_t y) { return x < y ? y : x; }
constexpr int64_t divided_up(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Ask for a column of cache lines, one of each of a tile's rows, which are `row` elements apart.
template <typename T>
MEGASCRATCH_DEVICE void prefetch_lines(const T* at, int64_t row) {
  for (int i = 0; i < tile_rows; ++i) __builtin_prefetch(at + i * row);
}
template <typename T>
constexpr int line_elements = 64 / sizeof(T);

// The sums of a tile: at the beginning, and at the end. All loops over them are unrolled, or the compiler would keep them
// in memory.
template <typename Vector, int rows, int vectors>
MEGASCRATCH_DEVICE void clear_sums(Vector (&sums)[rows][vectors]) {
#pragma GCC unroll 12
  for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) sums[row][j] = Vector{};
  }
}

template <bool add, typename A, typename Vector, int rows, int vectors>
MEGASCRATCH_DEVICE void write_sums(Vector (&sums)[rows][vectors], A* out, int64_t out_row) {
#pragma GCC unroll 12
  for (int row = 0; row < rows; ++row, out += out_row) {
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) {
      if (add) sums[row][j] += load_vector(out + j * lanes_of<A>);
      store_vector(out + j * lanes_of<A>, sums[row][j]);
    }
  }
}

// out = a b, or out + a b: `rows` rows of a, of which `a_row` leads from row to row and `a_step` from step to step, and
// `vectors` vectors of b, of which `b_step` leads from step to step.
//
// Where the operands of a layer come from memory, they are waited for: so what the tile adds to is asked for before it
// is summed, and where rows of a are read as they lie, those of the next tile beside this one's.
template <bool add, int rows = tile_rows, int vectors = 2, typename A>
void multiply_tile(
    const A* a, int64_t a_row, int64_t a_step, const A* b, int64_t b_step, int64_t steps, A* out, int64_t out_row) {
  constexpr int lanes = lanes_of<A>;
  for (int j = 0; j < vectors * lanes; j += line_elements<A>) prefetch_lines(out + j, out_row);
  VectorOf<A> sums[rows][vectors];
  clear_sums(sums);
  for (int64_t i = 0; i < steps; ++i, b += b_step, a += a_step) {
    if (a_step == 1 && i % line_elements<A> == 0) prefetch_lines(a + tile_rows * a_row, a_row);
    VectorOf<A> right[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) right[j] = load_vector(b + j * lanes);
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[row][j] += a[row * a_row] * right[j];
    }
  }
  write_sums<add>(sums, out, out_row);
}

#ifdef __AVX512F__

inline bool multiplies_pairs() { return __builtin_cpu_supports("avx512bf16"); }

template <bool add, int rows = tile_rows, int vectors = 2>
__attribute__((target("avx512bf16"))) void multiply_tile(
    const BFloat16Pair* a, int64_t a_row, int64_t a_step, const BFloat16Pair* b, int64_t b_step, int64_t steps,
    float* out, int64_t out_row) {
  constexpr int lanes = 16;
  for (int j = 0; j < vectors * lanes; j += line_elements<float>) prefetch_lines(out + j, out_row);
  VectorOf<float> sums[rows][vectors];
  clear_sums(sums);
  for (int64_t i = 0; i < steps; ++i, b += b_step, a += a_step) {
    if (a_step == 1 && i % line_elements<BFloat16Pair> == 0) prefetch_lines(a + tile_rows * a_row, a_row);
    __m512bh right[vectors];
#pragma GCC unroll 2
    for (int j = 0; j < vectors; ++j) right[j] = (__m512bh)_mm512_loadu_si512(b + j * lanes);
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(bits_of<int32_t>(a[row * a_row]));
#pragma GCC unroll 2
      for (int j = 0; j < vectors; ++j) sums[row][j] = _mm512_dpbf16_ps(sums[row][j], x, right[j]);
    }
  }
  write_sums<add>(sums, out, out_row);
}

#else

inline bool multiplies_pairs() { return false; }

#endif

typedef uint32_t Eight __attribute__((vector_size(32), aligned(4)));

// Eight columns of eight operands each, all of four bytes, to eight rows: pairs of columns exchange every other operand,
// then every other two, then four.
MEGASCRATCH_DEVICE void transpose_eight(const char* from, int64_t column_bytes, uint32_t* to, int64_t to_row) {
  Eight x[8], y[8];
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) memcpy(&x[j], from + j * column_bytes, sizeof x[j]);
#pragma GCC unroll 4
  for (int j = 0; j < 8; j += 2) {
    y[j] = __builtin_shuffle(x[j], x[j + 1], Eight{0, 8, 2, 10, 4, 12, 6, 14});
    y[j + 1] = __builtin_shuffle(x[j], x[j + 1], Eight{1, 9, 3, 11, 5, 13, 7, 15});
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const int j = i / 2 * 4 + i % 2;
    x[j] = __builtin_shuffle(y[j], y[j + 2], Eight{0, 1, 8, 9, 4, 5, 12, 13});
    x[j + 2] = __builtin_shuffle(y[j], y[j + 2], Eight{2, 3, 10, 11, 6, 7, 14, 15});
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    y[j] = __builtin_shuffle(x[j], x[j + 4], Eight{0, 1, 2, 3, 8, 9, 10, 11});
    y[j + 4] = __builtin_shuffle(x[j], x[j + 4], Eight{4, 5, 6, 7, 12, 13, 14, 15});
  }
#pragma GCC unroll 8
  for (int j = 0; j < 8; ++j) memcpy(to + j * to_row, &y[j], sizeof y[j]);
}

// A tile of `rows` ≤ tile_rows rows, rounded up to whole units.
template <bool add, int vectors, int height = tile_rows, typename P, typename A>
void multiply_rows(
    int64_t rows, const P* a, int64_t a_row, int64_t a_step, const P* b, int64_t b_step, int64_t steps, A* out,
    int64_t out_row) {
  if constexpr (height > row_unit) {
    if (rows <= height - row_unit) {
      return multiply_rows<add, vectors, height - row_unit>(rows, a, a_row, a_step, b, b_step, steps, out, out_row);
    }
  }
  multiply_tile<add, height, vectors>(a, a_row, a_step, b, b_step, steps, out, out_row);
}

// The operand of step i of k: where a pair ends with the last k, it is filled up with zero.
template <typename P, typename T>
MEGASCRATCH_DEVICE P operand(const T* at, int64_t stride, int64_t i, int64_t k) {
  using Stored = typename Operand<P>::Stored;
  const auto element = [&](int64_t step) -> Stored {
    if constexpr (__is_same(T, Stored)) return at[step * stride];
    else return load(at[step * stride]);
  };
  if constexpr (Operand<P>::width == 1) {
    return element(i);
  } else {
    return {element(2 * i), 2 * i + 1 < k ? element(2 * i + 1) : Stored{}};
  }
}

// The same for neighbouring rows or columns, `n` of them.
template <int n, typename P, typename T>
MEGASCRATCH_DEVICE void operands(const T* at, int64_t stride, int64_t i, int64_t k, P* to) {
  if constexpr (Operand<P>::width == 1) {
#pragma omp simd
    for (int j = 0; j < n; ++j) to[j] = load(at[i * stride + j]);
  } else {
    const T* even = at + 2 * i * stride;
    const T* odd = even + stride;
    uint32_t pairs[n];
    if (2 * i + 1 < k) {
#pragma omp simd
      for (int j = 0; j < n; ++j) pairs[j] = even[j].bits | static_cast<uint32_t>(odd[j].bits) << 16;
    } else {
      for (int j = 0; j < n; ++j) pairs[j] = even[j].bits;
    }
    memcpy(static_cast<void*>(to), pairs, sizeof pairs);
  }
}

// A matrix of a tensor's elements.
template <typename T>
struct View {
  const T* at;
  int64_t row, column;
};

// Pack `count` ≤ tile_columns columns of b [k, count], steps [step, step + steps), as a panel, padded with zeros.
template <typename P, typename T>
void pack_panel(View<T> b, int64_t k, int64_t count, int64_t step, int64_t steps, P* packed) {
  constexpr int columns = tile_columns_of<typename Operand<P>::Sum>;
  constexpr int width = Operand<P>::width;
  int64_t i = step;
  if (count == columns && b.row == 1 && sizeof(P) == 4 && sizeof(typename Operand<P>::Stored) == sizeof(T)) {
    const int64_t whole = step + smaller(steps, k / width - step) / 8 * 8;
    for (; i < whole; i += 8, packed += 8 * columns) {
      for (int64_t j = 0; j < columns; j += 8) {
        transpose_eight(
            reinterpret_cast<const char*>(b.at + j * b.column + i * width), b.column * static_cast<int64_t>(sizeof(T)),
            reinterpret_cast<uint32_t*>(packed + j), columns);
      }
    }
  }
  for (; i < step + steps; ++i, packed += columns) {
    if (count == columns && b.column == 1) {
      operands<columns>(b.at, b.row, i, k, packed);
    } else {
      for (int64_t j = 0; j < count; ++j) packed[j] = operand<P>(b.at + j * b.column, b.row, i, k);
      for (int64_t j = count; j < columns; ++j) packed[j] = P{};
    }
  }
}

// Pack all of b [k, columns]: panel, step, column.
template <typename P, typename T>
void pack(View<T> b, int64_t k, int64_t columns, P* packed) {
  constexpr int64_t width = tile_columns_of<typename Operand<P>::Sum>;
  const int64_t steps = divided_up(k, Operand<P>::width);
  for (int64_t j = 0; j < columns; j += width, b.at += width * b.column, packed += width * steps) {
    pack_panel(b, k, smaller(width, columns - j), 0, steps, packed);
  }
}

}  // namespace
}  // namespace megascratch
