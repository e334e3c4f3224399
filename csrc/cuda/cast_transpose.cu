// Quantise a matrix to fp8 and transpose it on the GPU.
//
// A block takes a tile of 64 × 64. Each of its 256 threads reads 16 elements of a row and writes them as 16 bytes; the
// bytes also go to shared memory, where each thread then finds 16 of a column side by side. Where everything is
// aligned, all accesses to global memory are 128 bits wide.

#include "dispatch.h"
#include "fp8.h"
#include "launchers.h"
#include "portable.h"

namespace megascratch {
namespace {

constexpr int tile = 64, part = 16, parts = tile / part, threads = tile * parts;
constexpr int pitch = tile + part;  // a column of the tile in shared memory; a multiple of 16 bytes

__device__ __forceinline__ void write_bytes(uint8_t* to, uint4 bytes, int64_t count, bool wide) {
  if (wide) {
    require_aligned(to);
    __stwb(reinterpret_cast<uint4*>(to), bytes);
    return;
  }
  const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
  for (int i = 0; i < part; ++i) {
    if (i < count) to[i] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
  }
}

// Quantise up to 16 elements of a row, the first in the lowest byte of the first word.
template <typename T, typename F, bool wide>
__device__ __forceinline__ uint4 cast_part(const T* x, int64_t count, float scale) {
  Acc<T> values[part];
  if constexpr (wide) {
    read<part, true>(x, values);
  } else {
#pragma unroll
    for (int i = 0; i < part; ++i) values[i] = i < count ? load(x[i]) : Acc<T>(0);
  }
  uint32_t words[4];
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[w] |= static_cast<uint32_t>(to_fp8<F>(static_cast<float>(values[4 * w + i]) * scale)) << (8 * i);
    }
  }
  return uint4{words[0], words[1], words[2], words[3]};
}

template <typename T, typename F, bool wide>
__global__ void __launch_bounds__(threads) cast_transpose_kernel(CastTransposeArguments a) {
  __shared__ uint4 shared[tile * pitch / 16];
  uint8_t* columns = reinterpret_cast<uint8_t*>(shared);
  const int line = static_cast<int>(threadIdx.x) / parts, start = static_cast<int>(threadIdx.x) % parts * part;
  const int64_t tiles_across = (a.columns + tile - 1) / tile, n_tiles = tiles_across * ((a.rows + tile - 1) / tile);
  const float scale = *a.scale;
  for (int64_t at = blockIdx.x; at < n_tiles; at += gridDim.x) {
    const int64_t row = at / tiles_across * tile, column = at % tiles_across * tile;
    const int64_t wanted = a.columns - column - start;  // of this thread's row part; 0 or less beyond the matrix
    if (row + line < a.rows && wanted > 0) {
      const T* x = static_cast<const T*>(a.x) + (row + line) * a.stride_x + column + start;
      const uint4 bytes = cast_part<T, F, wide>(x, wanted, scale);
      write_bytes(a.y + (row + line) * a.columns + column + start, bytes, wanted, wide);
      const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
      for (int i = 0; i < part; ++i) {
        columns[(start + i) * pitch + line] = static_cast<uint8_t>(words[i / 4] >> (8 * (i % 4)));
      }
    }
    __syncthreads();
    const int64_t below = a.rows - row - start;
    if (column + line < a.columns && below > 0) {
      const uint4 bytes = *reinterpret_cast<const uint4*>(columns + line * pitch + start);
      write_bytes(a.transposed + (column + line) * a.rows + row + start, bytes, below, wide);
    }
    __syncthreads();
  }
}

template <typename T, typename F>
int launch(const CastTransposeArguments& a, void* stream) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(a.x) | reinterpret_cast<uintptr_t>(a.y) |
                              reinterpret_cast<uintptr_t>(a.transposed);
  const bool wide = addresses % 16 == 0 && a.rows % part == 0 && a.columns % part == 0 &&
                    a.stride_x % packet_size<T> == 0;
  const unsigned grid = grid_size((a.rows + tile - 1) / tile * ((a.columns + tile - 1) / tile));
  if (wide) {
    MEGASCRATCH_LAUNCH(grid, threads, stream, (cast_transpose_kernel<T, F, true>), a);
  } else {
    MEGASCRATCH_LAUNCH(grid, threads, stream, (cast_transpose_kernel<T, F, false>), a);
  }
  return launch_status();
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_cast_transpose(const megascratch::CastTransposeArguments* arguments, void* stream) {
  using namespace megascratch;
  return for_dtype(arguments->dtype, [&](auto zero) {
    using T = decltype(zero);
    return arguments->e5m2 ? launch<T, E5M2>(*arguments, stream) : launch<T, E4M3>(*arguments, stream);
  });
}
