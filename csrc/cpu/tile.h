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

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "numeric.h"

namespace megascratch {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_rows = 12;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, tile_rows = 6;
#else
constexpr int vector_bytes = 16, tile_rows = 4;
#endif

struct BFloat16Pair {
  BFloat16 even, odd;
};

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
constexpr int tile_columns_of = 2 * vector_bytes / static_cast<int>(sizeof(A));

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(vector_bytes), aligned(sizeof(A))));
};

template <typename A>
MEGASCRATCH_DEVICE typename VectorOf<A>::type load_vector(const A* from) {
  typename VectorOf<A>::type v;
  memcpy(&v, from, sizeof v);
  return v;
}

// out = a b, or out + a b: `tile_rows` rows of a, of which `a_row` leads from row to row and `a_step` from step to step.
template <bool add, typename A>
void multiply_tile(
    const A* a, int64_t a_row, int64_t a_step, const A* packed, int64_t steps, A* out, int64_t out_row) {
  using Vector = typename VectorOf<A>::type;
  constexpr int lanes = vector_bytes / sizeof(A);
  Vector sums[tile_rows][2] = {};
  for (int64_t i = 0; i < steps; ++i, packed += 2 * lanes, a += a_step) {
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
  __m512 sums[tile_rows][2] = {};
  for (int64_t i = 0; i < steps; ++i, packed += 2 * lanes, a += a_step) {
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

}  // namespace
}  // namespace megascratch
