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

#if defined(__AVX512F__)
constexpr int tile_rows = 12;
#elif defined(__AVX__)
constexpr int tile_rows = 6;
#else
constexpr int tile_rows = 4;
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

// Ask for a column of cache lines, one of each of a tile's rows, which are `row` elements apart.
template <typename T>
MEGASCRATCH_DEVICE void prefetch_lines(const T* at, int64_t row) {
  for (int i = 0; i < tile_rows; ++i) __builtin_prefetch(at + i * row);
}
template <typename T>
constexpr int line_elements = 64 / sizeof(T);

// out = a b, or out + a b: `tile_rows` rows of a, of which `a_row` leads from row to row and `a_step` from step to step.
//
// Where the operands of a layer come from memory, they are waited for: so what the tile adds to is asked for before it
// is summed, and where rows of a are read as they lie, those of the next tile beside this one's.
template <bool add, typename A>
void multiply_tile(
    const A* a, int64_t a_row, int64_t a_step, const A* packed, int64_t steps, A* out, int64_t out_row) {
  using Vector = VectorOf<A>;
  constexpr int lanes = lanes_of<A>;
  for (int j = 0; j < 2 * lanes; j += line_elements<A>) prefetch_lines(out + j, out_row);
  Vector sums[tile_rows][2] = {};
  for (int64_t i = 0; i < steps; ++i, packed += 2 * lanes, a += a_step) {
    if (a_step == 1 && i % line_elements<A> == 0) prefetch_lines(a + tile_rows * a_row, a_row);
    const Vector first = load_vector(packed), second = load_vector(packed + lanes);
#pragma GCC unroll 12
    for (int row = 0; row < tile_rows; ++row) {
      const A x = a[row * a_row];
      sums[row][0] += x * first;
      sums[row][1] += x * second;
    }
  }
  for (int row = 0; row < tile_rows; ++row, out += out_row) {
    if (add) sums[row][0] += load_vector(out), sums[row][1] += load_vector(out + lanes);
    memcpy(out, sums[row], sizeof sums[row]);
  }
}

#ifdef __AVX512F__

inline bool multiplies_pairs() { return __builtin_cpu_supports("avx512bf16"); }

template <bool add>
__attribute__((target("avx512bf16"))) void multiply_tile(
    const BFloat16Pair* a, int64_t a_row, int64_t a_step, const BFloat16Pair* packed, int64_t steps, float* out,
    int64_t out_row) {
  constexpr int lanes = 16;
  for (int j = 0; j < 2 * lanes; j += line_elements<float>) prefetch_lines(out + j, out_row);
  __m512 sums[tile_rows][2] = {};
  for (int64_t i = 0; i < steps; ++i, packed += 2 * lanes, a += a_step) {
    if (a_step == 1 && i % line_elements<BFloat16Pair> == 0) prefetch_lines(a + tile_rows * a_row, a_row);
    const __m512bh first = (__m512bh)_mm512_loadu_si512(packed);
    const __m512bh second = (__m512bh)_mm512_loadu_si512(packed + lanes);
#pragma GCC unroll 12
    for (int row = 0; row < tile_rows; ++row) {
      const __m512bh x = (__m512bh)_mm512_set1_epi32(bits_of<int32_t>(a[row * a_row]));
      sums[row][0] = _mm512_dpbf16_ps(sums[row][0], x, first);
      sums[row][1] = _mm512_dpbf16_ps(sums[row][1], x, second);
    }
  }
  for (int row = 0; row < tile_rows; ++row, out += out_row) {
    if (add) sums[row][0] += _mm512_loadu_ps(out), sums[row][1] += _mm512_loadu_ps(out + lanes);
    _mm512_storeu_ps(out, sums[row][0]), _mm512_storeu_ps(out + lanes, sums[row][1]);
  }
}

#else

inline bool multiplies_pairs() { return false; }

#endif

typedef uint32_t Eight __attribute__((vector_size(32), aligned(4)));

// Eight columns of eight operands each, all of four bytes, to eight rows.
MEGASCRATCH_DEVICE void transpose_eight(const char* from, int64_t column_bytes, uint32_t* to, int64_t to_row) {
  Eight x[8], y[8];
  for (int j = 0; j < 8; ++j) memcpy(&x[j], from + j * column_bytes, sizeof x[j]);
  for (int j = 0; j < 8; j += 2) {
    y[j] = __builtin_shuffle(x[j], x[j + 1], Eight{0, 8, 2, 10, 4, 12, 6, 14});
    y[j + 1] = __builtin_shuffle(x[j], x[j + 1], Eight{1, 9, 3, 11, 5, 13, 7, 15});
  }
  for (int j = 0; j < 8; j += (j & 1) ? 3 : 1) {
    x[j] = __builtin_shuffle(y[j], y[j + 2], Eight{0, 1, 8, 9, 4, 5, 12, 13});
    x[j + 2] = __builtin_shuffle(y[j], y[j + 2], Eight{2, 3, 10, 11, 6, 7, 14, 15});
  }
  for (int j = 0; j < 4; ++j) {
    y[j] = __builtin_shuffle(x[j], x[j + 4], Eight{0, 1, 2, 3, 8, 9, 10, 11});
    y[j + 4] = __builtin_shuffle(x[j], x[j + 4], Eight{4, 5, 6, 7, 12, 13, 14, 15});
  }
  for (int j = 0; j < 8; ++j) memcpy(to + j * to_row, &y[j], sizeof y[j]);
}

// A matrix of a tensor's elements.
template <typename T>
struct View {
  const T* at;
  int64_t row, column;
};

// Pack x [steps, columns] into panels of `tile_columns`, padded with zeros: panel, step, column.
template <typename T, typename P>
void pack(View<T> x, int64_t steps, int64_t columns, P* packed) {
  using A = typename Operand<P>::Sum;
  using Stored = typename Operand<P>::Stored;
  constexpr int width = Operand<P>::width, lanes = tile_columns_of<A>;
  const auto element = [&](int64_t step, int64_t column) {
    const T value = x.at[step * x.row + column * x.column];
    if constexpr (__is_same(T, Stored)) return value;
    else return static_cast<Stored>(load(value));
  };
  for (int64_t panel = 0; panel < columns; panel += lanes) {
    const int64_t count = columns - panel < lanes ? columns - panel : lanes;
    int64_t step = 0;
    if constexpr (sizeof(P) == 4 && __is_same(T, Stored)) {
      for (; count == lanes && x.row == 1 && step + 8 * width <= steps; step += 8 * width, packed += 8 * lanes) {
        for (int64_t j = 0; j < lanes; j += 8) {
          transpose_eight(
              reinterpret_cast<const char*>(x.at + (panel + j) * x.column + step),
              x.column * static_cast<int64_t>(sizeof(T)), reinterpret_cast<uint32_t*>(packed + j), lanes);
        }
      }
    }
    for (; step < steps; step += width, packed += lanes) {
      const auto operand = [&](int64_t j) -> P {
        if constexpr (width == 1) {
          return element(step, panel + j);
        } else {
          return {element(step, panel + j), step + 1 < steps ? element(step + 1, panel + j) : Stored{}};
        }
      };
      if (count == lanes) {
#pragma GCC unroll 8
        for (int64_t j = 0; j < lanes; ++j) packed[j] = operand(j);
      } else {
        for (int64_t j = 0; j < lanes; ++j) packed[j] = j < count ? operand(j) : P{};
      }
    }
  }
}

}  // namespace
}  // namespace megascratch
