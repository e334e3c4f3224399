// Batched matrix products in float32: out[p] = a[p] b[p], or added to what out[p] holds.
//
// For the blocks of attention: some hundred rows and columns, over 64 to some hundred products each. There the call of a
// BLAS costs as much as the product, and the BLAS that torch brings reaches less than half of what an AMD core can do.
//
// A tile of rows × (two vectors) of the result stays in registers while k runs; columns of b are packed so that each
// step reads two vectors of b and one number of a for each row:
//
//             b   [ 0 … W | W … 2W ]     packed, k × 2W
//     a  r0 ·     [ acc00 | acc01  ]
//        r1 ·     [ acc10 | acc11  ]     tile_rows × 2 accumulators

#include "kernels.h"
#include "numeric.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64, tile_rows = 12;
#elif defined(__AVX__)
constexpr int vector_bytes = 32, tile_rows = 6;
#else
constexpr int vector_bytes = 16, tile_rows = 4;
#endif
constexpr int lanes = vector_bytes / 4, tile_columns = 2 * lanes;
typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4)));

Vector load_vector(const float* from) {
  Vector v;
  memcpy(&v, from, sizeof v);
  return v;
}

// Columns [begin, begin + count) of b as k rows of tile_columns, padded with zeros.
void pack(const ProductArguments& a, const float* b, int64_t begin, int64_t count, float* packed) {
  for (int64_t i = 0; i < a.k; ++i, packed += tile_columns) {
    const float* row = b + i * a.b_row + begin * a.b_column;
    if (count == tile_columns && a.b_column == 1) {
      memcpy(packed, row, sizeof(float) * tile_columns);
    } else {
      for (int64_t j = 0; j < count; ++j) packed[j] = row[j * a.b_column];
      for (int64_t j = count; j < tile_columns; ++j) packed[j] = 0;
    }
  }
}

// A tile of the result: `rows` of a against the packed columns, of which `count` exist.
template <int rows>
void multiply_tile(const ProductArguments& a, const float* left, const float* packed, float* out, int64_t count) {
  Vector sums[rows][2] = {};
  for (int64_t i = 0; i < a.k; ++i, packed += tile_columns, left += a.a_column) {
    const Vector first = load_vector(packed), second = load_vector(packed + lanes);
#pragma GCC unroll 12
    for (int row = 0; row < rows; ++row) {
      const float x = left[row * a.a_row];
      sums[row][0] += x * first;
      sums[row][1] += x * second;
    }
  }
  for (int row = 0; row < rows; ++row, out += a.out_row) {
    Vector line[2] = {sums[row][0], sums[row][1]};
    if (count == tile_columns) {
      if (a.add) line[0] += load_vector(out), line[1] += load_vector(out + lanes);
      memcpy(out, line, sizeof line);
    } else {
      float numbers[tile_columns];
      memcpy(numbers, line, sizeof line);
      for (int64_t j = 0; j < count; ++j) out[j] = a.add ? out[j] + numbers[j] : numbers[j];
    }
  }
}

}  // namespace

int64_t Kernels::product_columns() { return tile_columns; }

void Kernels::product(const ProductArguments& a, float* packed, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    const int64_t panels = (a.n + tile_columns - 1) / tile_columns;
    const int64_t pair = part / panels, column = part % panels * tile_columns;
    const int64_t count = a.n - column < tile_columns ? a.n - column : tile_columns;
    pack(a, a.b + pair * a.b_pair, column, count, packed);
    const float* left = a.a + pair * a.a_pair;
    float* out = a.out + pair * a.out_pair + column;
    int64_t row = 0;
    for (; row + tile_rows <= a.m; row += tile_rows) {
      multiply_tile<tile_rows>(a, left + row * a.a_row, packed, out + row * a.out_row, count);
    }
    for (; row + 4 <= a.m; row += 4) multiply_tile<4>(a, left + row * a.a_row, packed, out + row * a.out_row, count);
    for (; row < a.m; ++row) multiply_tile<1>(a, left + row * a.a_row, packed, out + row * a.out_row, count);
  }
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
