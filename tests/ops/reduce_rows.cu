// Test kernels for the host run: a row-wise sum over csrc/cuda/reduce.h, which the test also compiles with a barrier
// removed, and two kernels in which only some threads reach a barrier or a shuffle.

#include <cstdint>

#include "reduce.h"

namespace {

// One block sums every row of x [rows, blockDim.x] in turn, so that a row's shared memory meets the next row's.
__global__ void sum_rows(const double* x, double* out, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t i = row * blockDim.x + threadIdx.x;
    out[i] = megascratch::reduce_team(x[i], megascratch::Sum{});
  }
}

__global__ void some_threads_at_a_barrier() {
  if (threadIdx.x < 32) __syncthreads();
}

__global__ void some_lanes_at_a_shuffle(double* out) {
  if (threadIdx.x < 16) *out = __shfl_xor_sync(0xffffffffu, 1.0, 1);
}

}  // namespace

extern "C" void run_sum_rows(const double* x, double* out, int64_t rows, unsigned threads, uint64_t seed) {
  megascratch::fibers::runner.seed(seed);
  MEGASCRATCH_LAUNCH(dim3(1), dim3(threads), nullptr, sum_rows, x, out, rows);
}

// The message of the failed run, or null.
extern "C" const char* run_divergent(bool shuffle) {
  static char message[256];
  double out = 0;
  try {
    if (shuffle) {
      MEGASCRATCH_LAUNCH(dim3(1), dim3(64), nullptr, some_lanes_at_a_shuffle, &out);
    } else {
      MEGASCRATCH_LAUNCH(dim3(1), dim3(64), nullptr, some_threads_at_a_barrier);
    }
  } catch (const std::runtime_error& error) {
    strncpy(message, error.what(), sizeof(message) - 1);
    return message;
  }
  return nullptr;
}
