// Normal numbers by index: SplitMix64 of a counter, then Box and Muller's transform, in double precision.
//
// Of an element's 64 random bits the upper half, as u in (0, 1), gives a radius √(−2 ln u), and the lower half, as a part
// of a turn, the angle whose cosine is taken. Worked example: u = 1/2 and a third of a turn give √1.386 · (−1/2) = −0.589.
//
// Every number is computed by the same instructions on a whole vector, the last few of a row too: its bits depend on its
// index alone, not on where a row begins. Against a library's functions the error is a few units in the last place.

#include "dispatch.h"
#include "kernels.h"
#include "vectors.h"

namespace megascratch::MEGASCRATCH_LEVEL {
namespace {

using Numbers = VectorOf<double>;
using Bits = IntegersOf<double>;

// 1.5 · 2⁵², in whose last bits a small whole number stands as it is: adding its bits, and subtracting it, converts.
constexpr double base = 0x1.8p52;

MEGASCRATCH_DEVICE Numbers number_of(Bits whole) { return bits_of<Numbers>(whole + bits_of<uint64_t>(base)) - base; }

MEGASCRATCH_DEVICE Bits random_bits(uint64_t key, Bits index) {
  Bits z = (index + 1) * 0x9E3779B97F4A7C15u + key;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9u;
  z = (z ^ z >> 27) * 0x94D049BB133111EBu;
  return z ^ z >> 31;
}

// c[0] + c[1] x + c[2] x² + …
template <int n>
MEGASCRATCH_DEVICE Numbers polynomial(const double (&c)[n], Numbers x) {
  Numbers sum = Numbers{} + c[n - 1];
#pragma GCC unroll 16
  for (int i = n - 2; i >= 0; --i) sum = sum * x + c[i];
  return sum;
}

// ln x for normal x: x = 2ᵏ m with m between √½ and √2, and ln m = 2 artanh((m − 1) / (m + 1)) by its series.
MEGASCRATCH_DEVICE Numbers logarithm(Numbers x) {
  constexpr double series[] = {2.0,      2.0 / 3,  2.0 / 5,  2.0 / 7,  2.0 / 9,
                               2.0 / 11, 2.0 / 13, 2.0 / 15, 2.0 / 17, 2.0 / 19};
  constexpr uint64_t one = 0x3FF0000000000000u, half_root = 0x3FE6A09E667F3BCDu, mantissa = 0x000FFFFFFFFFFFFFu;
  const Bits above = bits_of<Bits>(x) - half_root + one;  // its exponent is k, for mantissas that begin at √½
  const Bits k = (above >> 52) - 1023;
  const Numbers m = bits_of<Numbers>((above & mantissa) + half_root);
  const Numbers s = (m - 1.0) / (m + 1.0);
  return number_of(k) * 0.69314718055994530942 + s * polynomial(series, s * s);
}

MEGASCRATCH_DEVICE Numbers root(Numbers x) {
  double numbers[lanes_of<double>];
  store_vector(numbers, x);
#pragma omp simd
  for (int i = 0; i < lanes_of<double>; ++i) numbers[i] = __builtin_sqrt(numbers[i]);
  return load_vector(numbers);
}

// The cosine of a part of a turn, in 2⁻³²: of the angle to the nearest quarter turn, or its sine, by Taylor's series.
MEGASCRATCH_DEVICE Numbers cosine_of_turn(Bits part) {
  constexpr double of_cosine[] = {1.0,
                                  -1.0 / 2,
                                  1.0 / 24,
                                  -1.0 / 720,
                                  1.0 / 40320,
                                  -1.0 / 3628800,
                                  1.0 / 479001600,
                                  -1.0 / 87178291200,
                                  1.0 / 20922789888000};
  constexpr double of_sine[] = {1.0,
                                -1.0 / 6,
                                1.0 / 120,
                                -1.0 / 5040,
                                1.0 / 362880,
                                -1.0 / 39916800,
                                1.0 / 6227020800,
                                -1.0 / 1307674368000,
                                1.0 / 355687428096000};
  const Bits quarter = (part + (1u << 29)) >> 30;
  const Numbers angle = number_of(part - (quarter << 30)) * 0x1.921fb54442d18p-30;  // 2π · 2⁻³²
  const Numbers square = angle * angle;
  const Numbers value = (quarter & 1u) != 0u ? angle * polynomial(of_sine, square) : polynomial(of_cosine, square);
  return bits_of<Numbers>(bits_of<Bits>(value) ^ ((quarter + 1u) & 2u) << 62);
}

MEGASCRATCH_DEVICE Numbers normal(uint64_t key, Bits index) {
  const Bits bits = random_bits(key, index);
  const Numbers u = (number_of(bits >> 32) + 0.5) * 0x1p-32;
  return root(-2.0 * logarithm(u)) * cosine_of_turn(bits & 0xFFFFFFFFu);
}

template <typename T>
MEGASCRATCH_DEVICE void store_numbers(T* to, Numbers numbers, int64_t count) {
  double wide[lanes_of<double>];
  T some[lanes_of<double>];
  store_vector(wide, numbers);
#pragma omp simd
  for (int i = 0; i < lanes_of<double>; ++i) some[i] = store<T>(static_cast<Acc<T>>(wide[i]));
  memcpy(static_cast<void*>(to), some, static_cast<size_t>(count) * sizeof(T));
}

template <typename T>
void fill_rows(const NormalArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    T* out = static_cast<T*>(a.out) + row * a.n;
    const Bits first = lane_numbers<double>() + static_cast<uint64_t>(a.starts[row]);
    for_vectors<double>(a.n, [&](int64_t j, int64_t count) {
      store_numbers(out + j, normal(a.key, first + static_cast<uint64_t>(j)) * a.std + a.mean, count);
    });
  }
}

}  // namespace

void Kernels::fill_normal(const NormalArguments& a, int64_t begin, int64_t end) {
  for_dtype(a.dtype, [&](auto zero) { fill_rows<decltype(zero)>(a, begin, end); });
}

}  // namespace megascratch::MEGASCRATCH_LEVEL
