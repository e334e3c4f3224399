// Rotary position embedding on the CPU: each pair (x₁, x₂) of a head becomes (x₁ cos − x₂ sin, x₂ cos + x₁ sin).
//
// A token's cosines and sines are read once for all heads of q and k. The r rotary dimensions come first; the d − r
// others pass through.

#include "kernels.h"
#include "vectors.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

// Rotate the r rotary dimensions of one head; sign is −1 for the inverse rotation.
template <typename T>
void rotate_halves(const T* x, T* out, const Acc<T>* cos, const Acc<T>* sin, Acc<T> sign, int64_t pairs) {
  for_vectors<Acc<T>>(pairs, [=](int64_t j, int64_t count) {
    const auto x1 = load_vector(x + j, count), x2 = load_vector(x + pairs + j, count);
    const auto c = load_vector(cos + j, count), s = sign * load_vector(sin + j, count);
    store_vector(out + j, x1 * c - x2 * s, count);
    store_vector(out + pairs + j, x2 * c + x1 * s, count);
  });
}

template <typename T>
void rotate_interleaved(const T* x, T* out, const Acc<T>* cos, const Acc<T>* sin, Acc<T> sign, int64_t pairs) {
#pragma omp simd
  for (int64_t j = 0; j < pairs; ++j) {
    const Acc<T> x1 = load(x[2 * j]), x2 = load(x[2 * j + 1]), c = cos[j], s = sign * sin[j];
    out[2 * j] = store<T>(x1 * c - x2 * s);
    out[2 * j + 1] = store<T>(x2 * c + x1 * s);
  }
}

template <typename T>
void rotate_heads(const RopeArguments& a, const RopeHeads& heads, int64_t i_s, int64_t i_b, int64_t position) {
  const int64_t pairs = a.r / 2;
  const Acc<T>* cos = static_cast<const Acc<T>*>(a.cos) + position * pairs;
  const Acc<T>* sin = static_cast<const Acc<T>*>(a.sin) + position * pairs;
  const Acc<T> sign = a.inverse ? -1 : 1;
  const T* x = static_cast<const T*>(heads.x) + i_s * heads.stride_s + i_b * heads.stride_b;
  T* out = static_cast<T*>(heads.out) + (i_s * a.b + i_b) * heads.n * a.d;
  for (int64_t head = 0; head < heads.n; ++head, x += heads.stride_n, out += a.d) {
    if (a.interleaved) {
      rotate_interleaved(x, out, cos, sin, sign, pairs);
    } else {
      rotate_halves(x, out, cos, sin, sign, pairs);
    }
    if (a.r < a.d) memcpy(out + a.r, x + a.r, static_cast<size_t>(a.d - a.r) * sizeof(T));
  }
}

template <typename T>
bool rotate_tokens(const RopeArguments& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t i_s = token / a.b, i_b = token % a.b;
    const int64_t index = a.positions ? a.positions[i_b * a.positions_stride_b + i_s * a.positions_stride_s] : i_s;
    const int64_t position = a.offset + index;
    if (position < 0 || position >= a.s_max) return false;
    rotate_heads<T>(a, a.q, i_s, i_b, position);
    rotate_heads<T>(a, a.k, i_s, i_b, position);
  }
  return true;
}

}  // namespace

bool Kernels::rope(const RopeArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::Float: return rotate_tokens<float>(a, begin, end);
    case DType::Double: return rotate_tokens<double>(a, begin, end);
    case DType::Half: return rotate_tokens<Half>(a, begin, end);
    case DType::BFloat16: return rotate_tokens<BFloat16>(a, begin, end);
  }
  return false;
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
