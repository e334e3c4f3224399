// Quantise a matrix to fp8 and transpose it on the CPU, in tiles whose bytes stay in the first cache.

#include <algorithm>

#include "dispatch.h"
#include "fp8.h"
#include "kernels.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

constexpr int64_t tile = 64;

template <typename T, typename F>
void cast_row(const T* __restrict x, uint8_t* __restrict y, float scale, int64_t n) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) y[j] = to_fp8<F>(static_cast<float>(load(x[j])) * scale);
}

template <typename T, typename F>
void cast_tiles(const CastTransposeArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin * tile; row < std::min(end * tile, a.rows); row += tile) {
    const int64_t height = std::min(tile, a.rows - row);
    for (int64_t column = 0; column < a.columns; column += tile) {
      const int64_t width = std::min(tile, a.columns - column);
      for (int64_t i = 0; i < height; ++i) {
        const T* x = static_cast<const T*>(a.x) + (row + i) * a.stride_x + column;
        cast_row<T, F>(x, a.y + (row + i) * a.columns + column, *a.scale, width);
      }
      for (int64_t j = 0; j < width; ++j) {
        const uint8_t* __restrict from = a.y + row * a.columns + column + j;
        uint8_t* __restrict to = a.transposed + (column + j) * a.rows + row;
        for (int64_t i = 0; i < height; ++i) to[i] = from[i * a.columns];
      }
    }
  }
}

}  // namespace

int64_t Kernels::cast_transpose_tile() { return tile; }

void Kernels::cast_transpose(const CastTransposeArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) {
    using T = decltype(zero);
    a.e5m2 ? cast_tiles<T, E5M2>(a, begin, end) : cast_tiles<T, E4M3>(a, begin, end);
  });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
