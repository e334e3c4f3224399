// Rotary position embedding on the CPU: each pair (x₁, x₂) of a head becomes (x₁ cos − x₂ sin, x₂ cos + x₁ sin).
//
// A token's cosines and sines are read once for all heads of q and k. The r rotary dimensions come first; the d − r
// others pass through.

#include "kernels.h"
#include "vectors.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

// One token's heads of q or of k: x is its first head, the next one lies `stride` further; out is contiguous.
template <typename T>
struct TokenHeads {
  const T* x;
  T* out;
  int64_t n, stride, d;
};

// The cosines and sines of a token's pairs; the sines are those of the negative angle for the inverse rotation.
template <typename A>
struct Angles {
  const A *cos, *sin;
  A sign;
  int64_t pairs;
};

// Rotate as many pairs of a head as fill a line of the caches, those from j on.
template <bool streams, typename T>
MEGASCRATCH_DEVICE void rotate_line(const T* x, T* out, const Angles<Acc<T>>& angles, int64_t j) {
  Line<T> first, second;
#pragma GCC unroll 8
  for (int i = 0; i < Line<T>::n_vectors; ++i) {
    const int64_t at = j + i * lanes_of<Acc<T>>;
    const auto x1 = load_vector(x + at), x2 = load_vector(x + angles.pairs + at);
    const auto c = load_vector(angles.cos + at), s = angles.sign * load_vector(angles.sin + at);
    first.vectors[i] = x1 * c - x2 * s, second.vectors[i] = x2 * c + x1 * s;
  }
  write_line<streams>(out + j, first), write_line<streams>(out + angles.pairs + j, second);
}

template <bool streams, typename T>
void rotate_halves(const TokenHeads<T>& heads, const Angles<Acc<T>>& angles) {
  const T* x = heads.x;
  T* out = heads.out;
  for (int64_t head = 0; head < heads.n; ++head, x += heads.stride, out += heads.d) {
    int64_t j = 0;
    for (; j + numbers_of_line<T> <= angles.pairs; j += numbers_of_line<T>) rotate_line<streams>(x, out, angles, j);
    for (; j < angles.pairs; j += lanes_of<Acc<T>>) {
      const int64_t count = angles.pairs - j < lanes_of<Acc<T>> ? angles.pairs - j : lanes_of<Acc<T>>;
      const auto x1 = load_vector(x + j, count), x2 = load_vector(x + angles.pairs + j, count);
      const auto c = load_vector(angles.cos + j, count), s = angles.sign * load_vector(angles.sin + j, count);
      store_vector(out + j, x1 * c - x2 * s, count);
      store_vector(out + angles.pairs + j, x2 * c + x1 * s, count);
    }
  }
}

template <typename T>
void rotate_interleaved(const TokenHeads<T>& heads, const Angles<Acc<T>>& angles) {
  for (int64_t head = 0; head < heads.n; ++head) {
    const T* x = heads.x + head * heads.stride;
    T* out = heads.out + head * heads.d;
#pragma omp simd
    for (int64_t j = 0; j < angles.pairs; ++j) {
      const Acc<T> x1 = load(x[2 * j]), x2 = load(x[2 * j + 1]), c = angles.cos[j], s = angles.sign * angles.sin[j];
      out[2 * j] = store<T>(x1 * c - x2 * s);
      out[2 * j + 1] = store<T>(x2 * c + x1 * s);
    }
  }
}

// Whether the results go past the caches: each head's halves must be whole lines.
template <typename T>
bool results_stream(const RopeArguments& a) {
  const int64_t bytes = a.s * a.b * (a.q.n + a.k.n) * a.d * static_cast<int64_t>(sizeof(T));
  return a.d % numbers_of_line<T> == 0 && rows_stream(static_cast<const T*>(a.q.out), a.r / 2, bytes) &&
         rows_stream(static_cast<const T*>(a.k.out), a.r / 2, bytes);
}

template <bool streams, typename T>
void rotate_heads(const RopeArguments& a, const RopeHeads& of, int64_t i_s, int64_t i_b, int64_t position) {
  using A = Acc<T>;
  const int64_t pairs = a.r / 2;
  const Angles<A> angles{
      static_cast<const A*>(a.cos) + position * pairs, static_cast<const A*>(a.sin) + position * pairs,
      static_cast<A>(a.inverse ? -1 : 1), pairs};
  const TokenHeads<T> heads{
      static_cast<const T*>(of.x) + i_s * of.stride_s + i_b * of.stride_b,
      static_cast<T*>(of.out) + (i_s * a.b + i_b) * of.n * a.d, of.n, of.stride_n, a.d};
  a.interleaved ? rotate_interleaved(heads, angles) : rotate_halves<streams>(heads, angles);
  if (a.r == a.d) return;
  for (int64_t head = 0; head < heads.n; ++head) {
    const size_t rest_bytes = static_cast<size_t>(a.d - a.r) * sizeof(T);
    memcpy(heads.out + head * a.d + a.r, heads.x + head * heads.stride + a.r, rest_bytes);
  }
}

template <bool streams, typename T>
bool rotate_tokens(const RopeArguments& a, int64_t begin, int64_t end) {
  for (int64_t token = begin; token < end; ++token) {
    const int64_t i_s = token / a.b, i_b = token % a.b;
    const int64_t index = a.positions ? a.positions[i_b * a.positions_stride_b + i_s * a.positions_stride_s] : i_s;
    const int64_t position = a.offset + index;
    if (position < 0 || position >= a.s_max) return false;
    rotate_heads<streams, T>(a, a.q, i_s, i_b, position);
    rotate_heads<streams, T>(a, a.k, i_s, i_b, position);
  }
  if constexpr (streams) end_streams();
  return true;
}

template <typename T>
bool rotate(const RopeArguments& a, int64_t begin, int64_t end) {
  return results_stream<T>(a) ? rotate_tokens<true, T>(a, begin, end) : rotate_tokens<false, T>(a, begin, end);
}

}  // namespace

bool Kernels::rope(const RopeArguments& a, int64_t begin, int64_t end) {
  switch (a.dtype) {
    case DType::Float: return rotate<float>(a, begin, end);
    case DType::Double: return rotate<double>(a, begin, end);
    case DType::Half: return rotate<Half>(a, begin, end);
    case DType::BFloat16: return rotate<BFloat16>(a, begin, end);
  }
  return false;
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
