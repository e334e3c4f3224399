// Registers the CUDA kernels for CUDA tensors, or, compiled with MEGASCRATCH_CUDA_HOST, their host run for CPU tensors
// in the namespace `megascratch_cuda_host`, where the tests find it.

#include <algorithm>

#include "launchers.h"
#include "operators/activation.h"
#include "operators/cast_transpose.h"
#include "operators/logits.h"
#include "operators/norm.h"
#include "operators/optimizer.h"
#include "operators/rope.h"
#include "operators/scaled_softmax.h"

#ifdef MEGASCRATCH_CUDA_HOST
#include "fibers.h"
#else
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/c/shim.h>

// Only a torch with CUDA has this one. Weak, so that the library also loads on one without, where no kernel ever runs.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);
#endif

namespace megascratch {
namespace {

// Launch on the tensor's device and on torch's current stream there.
template <typename Arguments>
void launch(int (*launcher)(const Arguments*, void*), const Arguments& arguments, [[maybe_unused]] const Tensor& on) {
#ifdef MEGASCRATCH_CUDA_HOST
  const int status = launcher(&arguments, nullptr);
#else
  const torch::stable::accelerator::DeviceGuard guard(on.get_device_index());
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "megascratch: this torch has no CUDA");
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(on.get_device_index(), &stream));
  const int status = launcher(&arguments, stream);
#endif
  STD_TORCH_CHECK(status == 0, "megascratch: a kernel did not launch, CUDA error ", status);
}

struct Cuda {
  static void run(const RopeArguments& a, const Tensor& on) { launch(megascratch_cuda_rope, a, on); }
  static void run(const SoftmaxArguments& a, const Tensor& on) { launch(megascratch_cuda_scaled_softmax, a, on); }
  static void run(const SoftmaxBackwardArguments& a, const Tensor& on) {
    launch(megascratch_cuda_scaled_softmax_backward, a, on);
  }
  static void run(const ActivationArguments& a, const Tensor& on) { launch(megascratch_cuda_activation, a, on); }
  static void run(const CastTransposeArguments& a, const Tensor& on) { launch(megascratch_cuda_cast_transpose, a, on); }
  static void run(const AdamWArguments& a, const Tensor& on) { launch(megascratch_cuda_adamw, a, on); }
  static void run(const LogitGradientArguments& a, const Tensor& on) { launch(megascratch_cuda_logit_gradient, a, on); }
  static void run(const LogitStatisticsArguments& a, const Tensor& on) {
    launch(megascratch_cuda_logit_statistics, a, on);
  }
  static void run(const SquaredNormArguments& a, const Tensor& on) { launch(megascratch_cuda_squared_norm, a, on); }
  static void run(const NormArguments& a, const Tensor& on) { launch(megascratch_cuda_norm, a, on); }
  static void run(const NormBackwardArguments& a, const Tensor& on) { launch(megascratch_cuda_norm_backward, a, on); }

  // Teams of threads whose sums over tokens are kept apart: enough for 132 processors with 4 blocks or 32 warps each,
  // but 16 rows a team, so that the sums are a small part of what is read.
  static int64_t norm_parts(const NormBackwardArguments& a) {
    return std::min(a.rows, std::clamp<int64_t>(a.rows / 16, 132, a.h <= 1024 ? 4224 : 528));
  }

  // A block's sum each: 4 blocks on each of 132 processors.
  static int64_t squared_norm_parts(int64_t n) { return std::clamp<int64_t>(n / 16384, 1, 528); }
};

void add_to(Library& library) {
  RopeOperators<Cuda>::add_to(library);
  SoftmaxOperators<Cuda>::add_to(library);
  NormOperators<Cuda>::add_to(library);
  ActivationOperators<Cuda>::add_to(library);
  LogitOperators<Cuda>::add_to(library);
  OptimizerOperators<Cuda>::add_to(library);
  CastTransposeOperators<Cuda>::add_to(library);
}

}  // namespace

#ifdef MEGASCRATCH_CUDA_HOST
STABLE_TORCH_LIBRARY_IMPL(megascratch_cuda_host, CPU, library) { add_to(library); }
#else
STABLE_TORCH_LIBRARY_IMPL(megascratch, CUDA, library) { add_to(library); }
#endif

}  // namespace megascratch

#ifdef MEGASCRATCH_CUDA_HOST
// Draw another sequence of schedules.
extern "C" __attribute__((visibility("default"))) void megascratch_seed_schedules(uint64_t seed) {
  megascratch::fibers::runner.seed(seed);
}
#else
// What this library was built for, for `megascratch inspect`.
extern "C" __attribute__((visibility("default"))) const char* megascratch_describe() { return MEGASCRATCH_GPU_CODES; }
#endif
