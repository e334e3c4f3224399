// Vectors of numbers as wide as the instruction set's registers, for the loops that compilers do not vectorise well.

#pragma once

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include "exponential.h"
#include "numeric.h"

namespace megascratch {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename A>
constexpr int lanes_of = vector_bytes / static_cast<int>(sizeof(A));

template <typename A>
struct VectorTypes {
  using Index = typename ExponentialOf<A>::type::Bits;
  typedef A numbers __attribute__((vector_size(vector_bytes)));
  typedef Index integers __attribute__((vector_size(vector_bytes)));
};
template <typename A>
using VectorOf = typename VectorTypes<A>::numbers;
// Unsigned integers as wide as the numbers.
template <typename A>
using IntegersOf = typename VectorTypes<A>::integers;

MEGASCRATCH_DEVICE VectorOf<float> load_vector(const float* from) {
  VectorOf<float> v;
  memcpy(&v, from, sizeof v);
  return v;
}
MEGASCRATCH_DEVICE VectorOf<double> load_vector(const double* from) {
  VectorOf<double> v;
  memcpy(&v, from, sizeof v);
  return v;
}

MEGASCRATCH_DEVICE void store_vector(float* to, VectorOf<float> v) { memcpy(to, &v, sizeof v); }
MEGASCRATCH_DEVICE void store_vector(double* to, VectorOf<double> v) { memcpy(to, &v, sizeof v); }

// 0, 1, 2, …
template <typename A>
MEGASCRATCH_DEVICE IntegersOf<A> lane_numbers() {
  IntegersOf<A> numbers;
  for (int i = 0; i < lanes_of<A>; ++i) numbers[i] = static_cast<typename VectorTypes<A>::Index>(i);
  return numbers;
}

MEGASCRATCH_DEVICE VectorOf<float> exponential(VectorOf<float> x) {
  return exponential_of<ExponentialFloat, IntegersOf<float>>(x);
}
MEGASCRATCH_DEVICE VectorOf<double> exponential(VectorOf<double> x) {
  return exponential_of<ExponentialDouble, IntegersOf<double>>(x);
}

// x between −bound and bound; NaN stays NaN. And 1 / x to a few units in the last place, for x between 1e-30 and 1e30.
#ifdef __AVX512F__
MEGASCRATCH_DEVICE VectorOf<float> clamped(VectorOf<float> x, float bound) {
  const __m512 end = _mm512_set1_ps(bound), above = _mm512_maskz_max_ps(0xffff, -end, bits_of<__m512>(x));
  return bits_of<VectorOf<float>>(_mm512_maskz_min_ps(0xffff, end, above));
}
MEGASCRATCH_DEVICE VectorOf<float> reciprocal(VectorOf<float> x) {
  const VectorOf<float> estimate = bits_of<VectorOf<float>>(_mm512_maskz_rcp14_ps(0xffff, bits_of<__m512>(x)));
  return estimate * (2.0f - x * estimate);
}
#else
MEGASCRATCH_DEVICE VectorOf<float> clamped(VectorOf<float> x, float bound) {
  const VectorOf<float> above = x < -bound ? VectorOf<float>{} - bound : x;
  return above > bound ? VectorOf<float>{} + bound : above;
}
MEGASCRATCH_DEVICE VectorOf<float> reciprocal(VectorOf<float> x) { return 1.0f / x; }
#endif

// erfc(z), as curves.h asks for it; the parity tests' double precision may take its time.
MEGASCRATCH_DEVICE VectorOf<double> upper_tail(VectorOf<double> z, VectorOf<double>) {
  for (int i = 0; i < lanes_of<double>; ++i) z[i] = __builtin_erfc(z[i]);
  return z;
}

// A vector's numbers `by` places further to the front, the first ones behind the last.
template <typename A>
MEGASCRATCH_DEVICE VectorOf<A> turned(VectorOf<A> v, int by) {
  using Index = typename VectorTypes<A>::Index;
  return __builtin_shuffle(v, (lane_numbers<A>() + static_cast<Index>(by)) & static_cast<Index>(lanes_of<A> - 1));
}

// The sum of a vector's numbers, by halves: one after the other, each would wait for the one before.
template <typename A>
MEGASCRATCH_DEVICE A sum_of(VectorOf<A> v) {
#pragma GCC unroll 4
  for (int half = lanes_of<A> / 2; half > 0; half /= 2) v += turned<A>(v, half);
  return v[0];
}

template <typename A>
MEGASCRATCH_DEVICE A largest_of(VectorOf<A> v) {
#pragma GCC unroll 4
  for (int half = lanes_of<A> / 2; half > 0; half /= 2) {
    const VectorOf<A> other = turned<A>(v, half);
    v = v > other ? v : other;
  }
  return v[0];
}

// bfloat16 numbers, each in the upper half of 32 bits, rounded to nearest even. NaN stays NaN, unless all of the 16 bits
// that are rounded away are set: no arithmetic on bfloat16 numbers gives that.
MEGASCRATCH_DEVICE IntegersOf<float> rounded_bits(VectorOf<float> v) {
  const IntegersOf<float> u = bits_of<IntegersOf<float>>(v);
  return u + 0x7fffu + ((u >> 16) & 1u);
}

typedef uint16_t NarrowIntegers __attribute__((vector_size(vector_bytes / 2)));

// Integers of 16 bits to 32 and back: GCC takes ten instructions for what AVX-512 does in one, and warns of the plain
// intrinsics.
#ifdef __AVX512F__
MEGASCRATCH_DEVICE IntegersOf<float> widened(NarrowIntegers x) {
  return bits_of<IntegersOf<float>>(_mm512_maskz_cvtepu16_epi32(0xffff, bits_of<__m256i>(x)));
}
MEGASCRATCH_DEVICE NarrowIntegers narrowed(IntegersOf<float> x) {
  return bits_of<NarrowIntegers>(_mm512_maskz_cvtepi32_epi16(0xffff, bits_of<__m512i>(x)));
}
#else
MEGASCRATCH_DEVICE IntegersOf<float> widened(NarrowIntegers x) {
  return __builtin_convertvector(x, IntegersOf<float>);
}
MEGASCRATCH_DEVICE NarrowIntegers narrowed(IntegersOf<float> x) { return __builtin_convertvector(x, NarrowIntegers); }
#endif

// A vector of 16-bit numbers, widened; and back.
MEGASCRATCH_DEVICE VectorOf<float> load_vector(const BFloat16* from) {
  NarrowIntegers bits;
  memcpy(&bits, from, sizeof bits);
  return bits_of<VectorOf<float>>(widened(bits) << 16);
}

MEGASCRATCH_DEVICE void store_vector(BFloat16* to, VectorOf<float> v) {
  const IntegersOf<float> u = bits_of<IntegersOf<float>>(v);
  const IntegersOf<float> rounded = v == v ? rounded_bits(v) : u | 0x400000u;
  const NarrowIntegers bits = narrowed(rounded >> 16);
  memcpy(static_cast<void*>(to), &bits, sizeof bits);
}

MEGASCRATCH_DEVICE VectorOf<float> load_vector(const Half* from) {
  float wide[lanes_of<float>];
#pragma omp simd
  for (int i = 0; i < lanes_of<float>; ++i) wide[i] = load(from[i]);
  return load_vector(wide);
}

MEGASCRATCH_DEVICE void store_vector(Half* to, VectorOf<float> v) {
  float wide[lanes_of<float>];
  store_vector(wide, v);
#pragma omp simd
  for (int i = 0; i < lanes_of<float>; ++i) to[i] = store<Half>(wide[i]);
}

// The first `count` numbers of a vector; the others are 0.
template <typename T>
MEGASCRATCH_DEVICE VectorOf<Acc<T>> load_vector(const T* from, int64_t count) {
  if (count == lanes_of<Acc<T>>) return load_vector(from);
  T some[lanes_of<Acc<T>>] = {};
  memcpy(static_cast<void*>(some), from, static_cast<size_t>(count) * sizeof(T));
  return load_vector(some);
}

// A number in the first `count` places, 0 in the others.
template <typename A>
MEGASCRATCH_DEVICE VectorOf<A> first_numbers(A x, int64_t count) {
  if (count == lanes_of<A>) return VectorOf<A>{} + x;
  return lane_numbers<A>() < static_cast<typename VectorTypes<A>::Index>(count) ? VectorOf<A>{} + x : VectorOf<A>{};
}

template <typename T>
MEGASCRATCH_DEVICE void store_vector(T* to, VectorOf<Acc<T>> v, int64_t count) {
  if (count == lanes_of<Acc<T>>) return store_vector(to, v);
  T some[lanes_of<Acc<T>>];
  store_vector(some, v);
  memcpy(static_cast<void*>(to), some, static_cast<size_t>(count) * sizeof(T));
}

// A line of the caches, of numbers of type T: as many vectors of them as fill it.
constexpr int64_t line_bytes = 64;
template <typename T>
constexpr int64_t numbers_of_line = line_bytes / static_cast<int64_t>(sizeof(T));
template <typename T>
struct Line {
  static constexpr int n_vectors = static_cast<int>(numbers_of_line<T>) / lanes_of<Acc<T>>;
  VectorOf<Acc<T>> vectors[n_vectors];
};

template <typename T>
MEGASCRATCH_DEVICE void store_line(T* to, const Line<T>& line) {
#pragma GCC unroll 8
  for (int i = 0; i < Line<T>::n_vectors; ++i) store_vector(to + i * lanes_of<Acc<T>>, line.vectors[i]);
}

#ifdef __AVX512BW__
// Both vectors' upper halves by one instruction, where one after the other takes eight.
MEGASCRATCH_DEVICE void store_line(BFloat16* to, const Line<BFloat16>& line) {
  typedef uint16_t Halves __attribute__((vector_size(vector_bytes)));
  Halves upper;
  for (int i = 0; i < lanes_of<float> * 2; ++i) upper[i] = static_cast<uint16_t>(2 * i + 1);
  const auto rounded = [&](int i) {
    const VectorOf<float> v = line.vectors[i];
    return bits_of<Halves>(v == v ? rounded_bits(v) : bits_of<IntegersOf<float>>(v) | 0x400000u);
  };
  const Halves bits = __builtin_shuffle(rounded(0), rounded(1), upper);
  memcpy(static_cast<void*>(to), &bits, sizeof bits);
}
#endif

// As `store_line`, but past the caches, for what would not stay there: memory is then not read before it is written.
// `to` is a multiple of a line. Other threads see it after `end_streams`.
template <typename T>
MEGASCRATCH_DEVICE void stream_line(T* to, const Line<T>& line) {
#ifdef __x86_64__
  alignas(line_bytes) T stored[numbers_of_line<T>];
  store_line(stored, line);
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), *reinterpret_cast<const __m512i*>(stored));
#elif defined(__AVX__)
  for (int i = 0; i < 2; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, reinterpret_cast<const __m256i*>(stored)[i]);
  }
#else
  for (int i = 0; i < 4; ++i) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to) + i, reinterpret_cast<const __m128i*>(stored)[i]);
  }
#endif
#else
  store_line(to, line);
#endif
}

template <bool streams, typename T>
MEGASCRATCH_DEVICE void write_line(T* to, const Line<T>& line) {
  if constexpr (streams) {
    stream_line(to, line);
  } else {
    store_line(to, line);
  }
}

MEGASCRATCH_DEVICE void end_streams() {
#ifdef __x86_64__
  _mm_sfence();
#endif
}

// Results that take more than this are not in a cache any more when they are read: they need not pass through it.
constexpr int64_t cached_bytes = 4 << 20;

// Whether rows of so many numbers, `bytes` in all, go past the caches: where they are large, and whole lines.
template <typename T>
MEGASCRATCH_DEVICE bool rows_stream(const T* to, int64_t numbers, int64_t bytes) {
  return bytes > cached_bytes && numbers % numbers_of_line<T> == 0 && reinterpret_cast<uintptr_t>(to) % line_bytes == 0;
}

// Write a row of n numbers by lines: `value(j, count)` gives the numbers j to j + count − 1.
template <bool streams, typename T, typename Value>
MEGASCRATCH_DEVICE void write_row(T* to, int64_t n, const Value& value) {
  constexpr int64_t lanes = lanes_of<Acc<T>>;
  int64_t j = 0;
  for (; j + numbers_of_line<T> <= n; j += numbers_of_line<T>) {
    Line<T> line;
#pragma GCC unroll 8
    for (int i = 0; i < Line<T>::n_vectors; ++i) line.vectors[i] = value(j + i * lanes, lanes);
    write_line<streams>(to + j, line);
  }
  for (; j < n; j += lanes) {
    const int64_t count = n - j < lanes ? n - j : lanes;
    store_vector(to + j, value(j, count), count);
  }
}

// Visit the n numbers of a row a vector at a time: `visit(j, count)` takes the numbers j to j + count − 1.
template <typename A, typename Visit>
MEGASCRATCH_DEVICE void for_vectors(int64_t n, const Visit& visit) {
  constexpr int64_t lanes = lanes_of<A>;
  int64_t j = 0;
  for (; j + lanes <= n; j += lanes) visit(j, lanes);
  if (j < n) visit(j, n - j);
}

// Sums over a row: `add(j, count, sums)` adds what the numbers j to j + count − 1 contribute to `n_sums` vectors. There
// are four of each, in turn: one alone would wait for each addition's latency.
template <typename A, int n_sums, typename Add>
MEGASCRATCH_DEVICE void sum_vectors(int64_t n, A (&totals)[n_sums], const Add& add) {
  constexpr int64_t lanes = lanes_of<A>;
  VectorOf<A> sums[4][n_sums] = {};
  int64_t j = 0;
  for (; j + 4 * lanes <= n; j += 4 * lanes) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) add(j + i * lanes, lanes, sums[i]);
  }
  for (; j + lanes <= n; j += lanes) add(j, lanes, sums[0]);
  if (j < n) add(j, n - j, sums[1]);
#pragma GCC unroll 4
  for (int k = 0; k < n_sums; ++k) totals[k] = sum_of<A>((sums[0][k] + sums[1][k]) + (sums[2][k] + sums[3][k]));
}

}  // namespace
}  // namespace megascratch
