// Registers the CUDA kernels for CUDA tensors, or, compiled with MEGASCRATCH_CUDA_HOST, their host run for CPU tensors
// in the namespace `megascratch_cuda_host`, where the tests find it.

#include "launchers.h"
#include "torch_glue.h"

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

std::tuple<Tensor, Tensor> rope(
    Tensor q, Tensor k, Tensor cos, Tensor sin, std::optional<Tensor> positions, int64_t offset, bool interleaved,
    bool inverse) {
  return run_rope(q, k, cos, sin, positions, offset, interleaved, inverse,
                  [](const RopeArguments& a, const Tensor& on) { launch(megascratch_cuda_rope, a, on); });
}

Tensor scaled_softmax(Tensor scores, double scale, bool causal, std::optional<Tensor> mask) {
  return run_scaled_softmax(scores, scale, causal, mask, [](const SoftmaxArguments& a, const Tensor& on) {
    launch(megascratch_cuda_scaled_softmax, a, on);
  });
}

Tensor scaled_softmax_backward(Tensor grad, Tensor probs, double scale, bool causal) {
  return run_scaled_softmax_backward(
      grad, probs, scale, causal, [](const SoftmaxBackwardArguments& a, const Tensor& on) {
        launch(megascratch_cuda_scaled_softmax_backward, a, on);
      });
}

void add_to(torch::stable::detail::StableLibrary& library) {
  library.impl("rope", TORCH_BOX(&rope));
  library.impl("scaled_softmax", TORCH_BOX(&scaled_softmax));
  library.impl("scaled_softmax_backward", TORCH_BOX(&scaled_softmax_backward));
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
