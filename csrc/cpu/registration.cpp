// Registers the CPU kernels: in `megascratch` those of the best instruction-set level that this processor has, and each
// level that it has in a namespace of its own (`megascratch_v3`, ...), where the tests find them.

#include <atomic>
#include <vector>

#include "kernels.h"
#include "torch_glue.h"

namespace megascratch {
namespace {

// Elements that are worth a thread: below this, waking one costs more than it saves.
constexpr int64_t grain_elements = 16384;

int64_t grain_rows(int64_t elements_per_row) {
  return elements_per_row >= grain_elements ? 1 : grain_elements / (elements_per_row + 1) + 1;
}

// The kernels of one level, as functions with the operators' signatures.
template <auto rope_kernel, auto softmax_kernel, auto softmax_backward_kernel>
struct Operators {
  static std::tuple<Tensor, Tensor> rope(
      Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t offset, bool interleaved,
      bool inverse) {
    return run_rope(q, k, cos, sin, positions, offset, interleaved, inverse, [](const RopeArguments& a, const Tensor&) {
      std::atomic<bool> inside = true;
      torch::stable::parallel_for(0, a.s * a.b, grain_rows((a.q.n + a.k.n) * a.d), [&](int64_t begin, int64_t end) {
        if (!rope_kernel(a, begin, end)) inside = false;
      });
      STD_TORCH_CHECK(inside, "rope: a position lies outside the table's ", a.s_max);
    });
  }

  static Tensor scaled_softmax(Tensor scores, double scale, bool causal, std::optional<Tensor> mask) {
    return run_scaled_softmax(scores, scale, causal, mask, [](const SoftmaxArguments& a, const Tensor&) {
      torch::stable::parallel_for(0, a.b * a.n * a.sq, grain_rows(a.sk), [&](int64_t begin, int64_t end) {
        std::vector<double> scratch(static_cast<size_t>(a.sk));  // doubles: room for either accumulation type
        softmax_kernel(a, scratch.data(), begin, end);
      });
    });
  }

  static Tensor scaled_softmax_backward(Tensor grad, Tensor probs, double scale, bool causal) {
    return run_scaled_softmax_backward(
        grad, probs, scale, causal, [](const SoftmaxBackwardArguments& a, const Tensor&) {
          torch::stable::parallel_for(0, a.b * a.n * a.sq, grain_rows(a.sk), [&](int64_t begin, int64_t end) {
            softmax_backward_kernel(a, begin, end);
          });
        });
  }

  static void add_to(torch::stable::detail::StableLibrary& library) {
    library.impl("rope", TORCH_BOX(&rope));
    library.impl("scaled_softmax", TORCH_BOX(&scaled_softmax));
    library.impl("scaled_softmax_backward", TORCH_BOX(&scaled_softmax_backward));
  }
};

#define MEGASCRATCH_OPERATORS(level) Operators<&level::rope, &level::scaled_softmax, &level::scaled_softmax_backward>

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
    case '4': return MEGASCRATCH_OPERATORS(v4)::add_to(library);
    case '3': return MEGASCRATCH_OPERATORS(v3)::add_to(library);
    default: return MEGASCRATCH_OPERATORS(v2)::add_to(library);
  }
}
STABLE_TORCH_LIBRARY_IMPL(megascratch_v2, CPU, library) { MEGASCRATCH_OPERATORS(v2)::add_to(library); }
STABLE_TORCH_LIBRARY_IMPL(megascratch_v3, CPU, library) {
  if (__builtin_cpu_supports("x86-64-v3")) MEGASCRATCH_OPERATORS(v3)::add_to(library);
}
STABLE_TORCH_LIBRARY_IMPL(megascratch_v4, CPU, library) {
  if (__builtin_cpu_supports("x86-64-v4")) MEGASCRATCH_OPERATORS(v4)::add_to(library);
}
#else
STABLE_TORCH_LIBRARY_IMPL(megascratch, CPU, library) { MEGASCRATCH_OPERATORS(baseline)::add_to(library); }
STABLE_TORCH_LIBRARY_IMPL(megascratch_baseline, CPU, library) { MEGASCRATCH_OPERATORS(baseline)::add_to(library); }
#endif

}  // namespace megascratch

// What this library runs on this machine, for `megascratch inspect`.
extern "C" __attribute__((visibility("default"))) const char* megascratch_describe() {
  return megascratch::best_level();
}
