// Registers the CPU kernels: in `megascratch` those of the best instruction-set level that this processor has, and each
// level that it has in a namespace of its own (`megascratch_v3`, ...), where the tests find them.

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "operators/activation.h"
#include "operators/attention.h"
#include "operators/cast_transpose.h"
#include "operators/decoding.h"
#include "operators/logits.h"
#include "operators/matmul.h"
#include "operators/norm.h"
#include "operators/optimizer.h"
#include "operators/random.h"
#include "operators/rope.h"
#include "operators/scaled_softmax.h"

namespace megascratch {
namespace {

// Elements that are worth a thread: below this, waking one costs more than it saves.
constexpr int64_t grain_elements = 16384;

int64_t grain_rows(int64_t elements_per_row) {
  return elements_per_row >= grain_elements ? 1 : grain_elements / (elements_per_row + 1) + 1;
}

// Runs an operator's kernel of one level, its rows split over torch's threads.
template <typename Kernels>
struct Cpu {
  static void run(const RopeArguments& a, const Tensor&) {
    std::atomic<bool> inside = true;
    torch::stable::parallel_for(0, a.s * a.b, grain_rows((a.q.n + a.k.n) * a.d), [&](int64_t begin, int64_t end) {
      if (!Kernels::rope(a, begin, end)) inside = false;
    });
    STD_TORCH_CHECK(inside, "rope: a position lies outside the table's ", a.s_max);
  }

  static void run(const SoftmaxArguments& a, const Tensor&) {
    torch::stable::parallel_for(0, a.b * a.n * a.sq, grain_rows(a.sk), [&](int64_t begin, int64_t end) {
      std::vector<double> scratch(static_cast<size_t>(a.sk));  // doubles: room for either accumulation type
      Kernels::scaled_softmax(a, scratch.data(), begin, end);
    });
  }

  static void run(const SoftmaxBackwardArguments& a, const Tensor&) {
    torch::stable::parallel_for(0, a.b * a.n * a.sq, grain_rows(a.sk), [&](int64_t begin, int64_t end) {
      Kernels::scaled_softmax_backward(a, begin, end);
    });
  }

  static void run(const NormArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.rows, grain_rows(a.h), [&](int64_t begin, int64_t end) { Kernels::norm(a, begin, end); });
  }

  // Parts of the rows whose sums over tokens are kept apart: few enough that adding them up costs little, and as many
  // whatever the number of threads, so that the sums do not depend on it.
  static int64_t norm_parts(const NormBackwardArguments& a) {
    const int64_t rows_per_part = std::max<int64_t>(grain_rows(a.h), 64);
    return std::min<int64_t>((a.rows + rows_per_part - 1) / rows_per_part, 256);
  }

  static void run(const NormBackwardArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.parts, 1, [&](int64_t begin, int64_t end) { Kernels::norm_backward(a, begin, end); });
    torch::stable::parallel_for(0, a.h, grain_rows(a.parts), [&](int64_t begin, int64_t end) {
      Kernels::norm_add_parts(a, begin, end);
    });
  }

  static void run(const ActivationArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.rows, grain_rows(a.f), [&](int64_t begin, int64_t end) { Kernels::activation(a, begin, end); });
  }

  static void run(const LogitStatisticsArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.rows, grain_rows(a.n_real), [&](int64_t begin, int64_t end) { Kernels::logit_statistics(a, begin, end); });
  }

  static void run(const LogitGradientArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.rows, grain_rows(a.columns), [&](int64_t begin, int64_t end) { Kernels::logit_gradient(a, begin, end); });
  }

  static void run(const AdamWArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.n, grain_elements, [&](int64_t begin, int64_t end) { Kernels::adamw(a, begin, end); });
  }

  static void run(const NormalArguments& a, const Tensor&) {
    // A logarithm, a root and a cosine: a number takes as long as eight elements elsewhere.
    torch::stable::parallel_for(
        0, a.rows, grain_rows(8 * a.n), [&](int64_t begin, int64_t end) { Kernels::fill_normal(a, begin, end); });
  }

  static void run(const CastTransposeArguments& a, const Tensor&) {
    const int64_t tile = Kernels::cast_transpose_tile();
    torch::stable::parallel_for(
        0, (a.rows + tile - 1) / tile, grain_rows(tile * a.columns),
        [&](int64_t begin, int64_t end) { Kernels::cast_transpose(a, begin, end); });
  }

  static int64_t squared_norm_parts(int64_t n) { return (n + grain_elements - 1) / grain_elements; }

  static void run(const SquaredNormArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.parts, 1, [&](int64_t begin, int64_t end) { Kernels::squared_norm(a, begin, end); });
    *a.out = std::accumulate(a.partial, a.partial + a.parts, 0.0);
  }

  // Parts of a sample's and key/value head's queries: so many that few heads still keep several processors busy, and as
  // many whatever the number of threads, so that the sums over queries do not depend on it.
  static int64_t attention_parts(const AttentionArguments& a) {
    const int64_t rows = a.s * (a.n / a.kv);
    return std::clamp<int64_t>(8 / (a.b * a.kv), 1, std::max<int64_t>(rows / 768, 1));
  }

  static int64_t attention_partial(const AttentionArguments& a) { return Kernels::attention_partial(a); }

  static void run(const AttentionArguments& a, const Tensor&) {
    const int64_t tasks = a.b * a.kv * a.parts, scores = a.s * a.t * a.n / a.kv / a.parts;
    if (!a.grad_k) {
      torch::stable::parallel_for(
          0, tasks, grain_rows(scores), [&](int64_t begin, int64_t end) { Kernels::attention(a, begin, end); });
      return;
    }
    torch::stable::parallel_for(
        0, tasks, grain_rows(scores), [&](int64_t begin, int64_t end) { Kernels::attention_backward(a, begin, end); });
    if (a.parts == 1) return;
    torch::stable::parallel_for(0, a.t * a.b * a.kv, grain_rows(a.d), [&](int64_t begin, int64_t end) {
      Kernels::attention_add_parts(a, begin, end);
    });
  }

  static void run(const CachedAttentionArguments& a, const Tensor&) {
    std::atomic<bool> inside = true;
    const int64_t grain = grain_rows(a.t * a.d * a.n / a.kv);
    torch::stable::parallel_for(0, a.b * a.kv, grain, [&](int64_t begin, int64_t end) {
      if (!Kernels::cached_attention(a, begin, end)) inside = false;
    });
    STD_TORCH_CHECK(inside, "cached_attention: a position lies outside the cache's ", a.t);
  }

  static void run(const DrawArguments& a, const Tensor&) {
    torch::stable::parallel_for(
        0, a.rows, grain_rows(a.columns), [&](int64_t begin, int64_t end) { Kernels::draw(a, begin, end); });
  }

  static void run(const MatmulArguments& a, const Tensor&) {
    const int64_t units = Kernels::matmul_units(a);
    // A product of 32 numbers takes as long as an element elsewhere.
    const int64_t grain = grain_rows(a.m * a.n * a.k / 32 / units);
    torch::stable::parallel_for(
        0, units, grain, [&](int64_t begin, int64_t end) { Kernels::matmul(a, begin, end); });
  }
};

template <typename Kernels>
void add_to(Library& library) {
  RopeOperators<Cpu<Kernels>>::add_to(library);
  SoftmaxOperators<Cpu<Kernels>>::add_to(library);
  NormOperators<Cpu<Kernels>>::add_to(library);
  ActivationOperators<Cpu<Kernels>>::add_to(library);
  LogitOperators<Cpu<Kernels>>::add_to(library);
  OptimizerOperators<Cpu<Kernels>>::add_to(library);
  RandomOperators<Cpu<Kernels>>::add_to(library);
  MatmulOperators<Cpu<Kernels>>::add_to(library);
  CastTransposeOperators<Cpu<Kernels>>::add_to(library);
  AttentionOperators<Cpu<Kernels>>::add_to(library);
  DecodingOperators<Cpu<Kernels>>::add_to(library);
}

#ifdef __x86_64__
const char* best_level() {
  return __builtin_cpu_supports("x86-64-v4") ? "v4" : __builtin_cpu_supports("x86-64-v3") ? "v3" : "v2";
}
#else
const char* best_level() { return "baseline"; }
#endif

}  // namespace

#ifdef __x86_64__
STABLE_TORCH_LIBRARY_IMPL(megascratch, CPU, library) {
  switch (best_level()[1]) {
    case '4': return add_to<v4::Kernels>(library);
    case '3': return add_to<v3::Kernels>(library);
    default: return add_to<v2::Kernels>(library);
  }
}
STABLE_TORCH_LIBRARY_IMPL(megascratch_v2, CPU, library) { add_to<v2::Kernels>(library); }
STABLE_TORCH_LIBRARY_IMPL(megascratch_v3, CPU, library) {
  if (__builtin_cpu_supports("x86-64-v3")) add_to<v3::Kernels>(library);
}
STABLE_TORCH_LIBRARY_IMPL(megascratch_v4, CPU, library) {
  if (__builtin_cpu_supports("x86-64-v4")) add_to<v4::Kernels>(library);
}
#else
STABLE_TORCH_LIBRARY_IMPL(megascratch, CPU, library) { add_to<baseline::Kernels>(library); }
STABLE_TORCH_LIBRARY_IMPL(megascratch_baseline, CPU, library) { add_to<baseline::Kernels>(library); }
#endif

}  // namespace megascratch

// What this library runs on this machine, for `megascratch inspect`.
extern "C" __attribute__((visibility("default"))) const char* megascratch_describe() {
  return megascratch::best_level();
}
