// Rotary position embedding on the GPU: q and k in one launch.
//
// A block holds blockDim.y tokens; a token's blockDim.x threads walk its work items. An item is V pairs of one head, or
// V of the dimensions that pass through. V fills 128-bit accesses where everything is aligned, and is 1 otherwise.

#include "launchers.h"
#include "portable.h"

namespace megascratch {
namespace {

template <typename A>
__device__ __forceinline__ A not_a_number() {
  return static_cast<A>(bits_of<float>(0x7fc00000u));
}

// Rotate pairs [j, j + V) of one head.
template <typename T, int V>
__device__ __forceinline__ void rotate(const RopeArguments& a, const T* x, T* out, int64_t position, int64_t j) {
  using A = Acc<T>;
  constexpr bool wide = V > 1;
  const int64_t pairs = a.r / 2;
  A cos[V], sin[V], x1[V], x2[V], both[2 * V];
  if (position >= 0 && position < a.s_max) {
    read<V, wide>(static_cast<const A*>(a.cos) + position * pairs + j, cos);
    read<V, wide>(static_cast<const A*>(a.sin) + position * pairs + j, sin);
  } else {
#pragma unroll
    for (int i = 0; i < V; ++i) cos[i] = sin[i] = not_a_number<A>();
  }
  if (a.interleaved) {
    read<2 * V, wide>(x + 2 * j, both);
#pragma unroll
    for (int i = 0; i < V; ++i) x1[i] = both[2 * i], x2[i] = both[2 * i + 1];
  } else {
    read<V, wide>(x + j, x1);
    read<V, wide>(x + j + pairs, x2);
  }
#pragma unroll
  for (int i = 0; i < V; ++i) {
    const A u = x1[i], v = x2[i], s = a.inverse ? -sin[i] : sin[i];
    x1[i] = u * cos[i] - v * s;
    x2[i] = v * cos[i] + u * s;
  }
  if (a.interleaved) {
#pragma unroll
    for (int i = 0; i < V; ++i) both[2 * i] = x1[i], both[2 * i + 1] = x2[i];
    write<2 * V, wide>(out + 2 * j, both);
  } else {
    write<V, wide>(out + j, x1);
    write<V, wide>(out + j + pairs, x2);
  }
}

template <typename T, int V>
__global__ void __launch_bounds__(256) rope_kernel(RopeArguments a) {
  constexpr bool wide = V > 1;
  const int64_t tokens = a.s * a.b;
  const unsigned rotated_items = static_cast<unsigned>(a.r / 2 / V);
  const unsigned items_per_head = rotated_items + static_cast<unsigned>((a.d - a.r) / V);
  const unsigned items = static_cast<unsigned>(a.q.n + a.k.n) * items_per_head;
  for (int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; token < tokens;
       token += static_cast<int64_t>(gridDim.x) * blockDim.y) {
    const int64_t i_s = token / a.b, i_b = token % a.b;
    const int64_t index = a.positions ? a.positions[i_b * a.positions_stride_b + i_s * a.positions_stride_s] : i_s;
    for (unsigned item = threadIdx.x; item < items; item += blockDim.x) {
      const int64_t any_head = item / items_per_head;
      const unsigned part = item % items_per_head;
      const bool is_query = any_head < a.q.n;
      const RopeHeads& heads = is_query ? a.q : a.k;
      const int64_t head = is_query ? any_head : any_head - a.q.n;
      const T* x = static_cast<const T*>(heads.x) + i_s * heads.stride_s + i_b * heads.stride_b + head * heads.stride_n;
      T* out = static_cast<T*>(heads.out) + (token * heads.n + head) * a.d;
      if (part < rotated_items) {
        rotate<T, V>(a, x, out, a.offset + index, static_cast<int64_t>(part) * V);
      } else {
        const int64_t j = a.r + static_cast<int64_t>(part - rotated_items) * V;
        Acc<T> rest[V];
        read<V, wide>(x + j, rest);
        write<V, wide>(out + j, rest);
      }
    }
  }
}

bool heads_aligned(const RopeHeads& heads, int64_t v) {
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(heads.x) | reinterpret_cast<uintptr_t>(heads.out);
  return addresses % 16 == 0 && heads.stride_s % v == 0 && heads.stride_b % v == 0 && heads.stride_n % v == 0;
}

template <typename T, int V>
int launch(const RopeArguments& a, void* stream) {
  const int64_t items = (a.q.n + a.k.n) * (a.d - a.r / 2) / V;
  unsigned threads = 32;
  while (threads < 256 && threads < items) threads *= 2;
  const dim3 block(threads, 256 / threads);
  const unsigned grid = grid_size((a.s * a.b + block.y - 1) / block.y);
  MEGASCRATCH_LAUNCH(grid, block, stream, (rope_kernel<T, V>), a);
  return launch_status();
}

template <typename T>
int launch_widest(const RopeArguments& a, void* stream) {
  constexpr int v = packet_size<T>;
  const uintptr_t tables = reinterpret_cast<uintptr_t>(a.cos) | reinterpret_cast<uintptr_t>(a.sin);
  const bool sizes_fit = a.r / 2 % v == 0 && a.d % v == 0;
  const bool wide = sizes_fit && tables % 16 == 0 && heads_aligned(a.q, v) && heads_aligned(a.k, v);
  return wide ? launch<T, v>(a, stream) : launch<T, 1>(a, stream);
}

}  // namespace
}  // namespace megascratch

extern "C" int megascratch_cuda_rope(const megascratch::RopeArguments* arguments, void* stream) {
  using namespace megascratch;
  switch (arguments->dtype) {
    case DType::Float: return launch_widest<float>(*arguments, stream);
    case DType::Double: return launch_widest<double>(*arguments, stream);
    case DType::Half: return launch_widest<Half>(*arguments, stream);
    case DType::BFloat16: return launch_widest<BFloat16>(*arguments, stream);
  }
  return -1;
}
