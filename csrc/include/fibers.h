// Runs CUDA kernels on the host: g++ compiles the .cu files against this header, and every thread becomes a fiber.
//
// Blocks run one after another. Within a block the warps run in random order, each as far as it gets before a barrier;
// the order is redrawn at each barrier. So a warp that reads what another has not yet written, because a barrier is
// missing, reads something wrong in most schedules. Within a warp the lanes run in random order up to the next shuffle.
// A barrier or a shuffle that only some threads reach ends the run with an exception, where a GPU would hang.
//
// Worked example, 2 warps: "write partial[warp]; barrier; read partial[1 − warp]". With the barrier, every order works.
// Without it, whichever warp is drawn first reads its partner's slot before the partner has run at all.

#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct __attribute__((may_alias, aligned(16))) uint4 {
  uint32_t x, y, z, w;
};

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
// Blocks run one at a time, so one static copy is each block's own; what an earlier block left there is the garbage
// that shared memory starts with.
#define __shared__ static

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace megascratch::fibers {

constexpr unsigned warp_size = 32;
constexpr size_t stack_bytes = 64 * 1024;

enum class State { Ready, AtShuffle, AtBarrier, Done };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state;
  dim3 index;
  uint64_t offered, received;  // the bits that a shuffle gives and gets
  unsigned source_lane;
};

class Runner {
 public:
  void seed(uint64_t value) { random_.seed(value); }

  // Run a kernel over a grid; `body` is the kernel with its arguments bound.
  template <typename Body>
  void run(dim3 grid, dim3 block, const Body& body) {
    const std::lock_guard<std::mutex> lock(mutex_);
    call_ = [](const void* context) { (*static_cast<const Body*>(context))(); };
    context_ = &body;
    gridDim = grid, blockDim = block;
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
          blockIdx = dim3(x, y, z);
          run_block(block);
        }
      }
    }
  }

  void barrier() { suspend(State::AtBarrier); }

  template <typename T>
  T shuffle_xor(T value, unsigned lane_mask) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    Fiber& fiber = fibers_[current_];
    memcpy(&fiber.offered, &value, sizeof(T));
    fiber.source_lane = (current_ % warp_size) ^ lane_mask;
    suspend(State::AtShuffle);
    memcpy(&value, &fibers_[current_].received, sizeof(T));
    return value;
  }

 private:
  void run_block(dim3 block) {
    prepare(block);
    std::vector<unsigned> order((count_ + warp_size - 1) / warp_size);
    std::iota(order.begin(), order.end(), 0u);
    while (true) {
      std::shuffle(order.begin(), order.end(), random_);
      for (unsigned warp : order) run_warp(warp);
      const unsigned done = count_in(0, count_, State::Done);
      if (done == count_) return;
      if (done > 0) throw std::runtime_error("host run: some threads of a block ended, others wait at a barrier");
      release(0, count_);
    }
  }

  // One fresh fiber for each of the block's threads. Stacks are kept from block to block.
  void prepare(dim3 block) {
    count_ = block.x * block.y * block.z;
    while (fibers_.size() < count_) {
      fibers_.emplace_back();
      fibers_.back().stack.reset(new char[stack_bytes]);
    }
    for (unsigned i = 0; i < count_; ++i) {
      Fiber& fiber = fibers_[i];
      fiber.state = State::Ready;
      fiber.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = stack_bytes;
      fiber.context.uc_link = &scheduler_;
      makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Runner::enter), 2, high(this), low(this));
    }
  }

  // Run a warp until each of its lanes waits at a barrier or has ended.
  void run_warp(unsigned warp) {
    const unsigned first = warp * warp_size, last = std::min(first + warp_size, count_);
    std::vector<unsigned> lanes(last - first);
    std::iota(lanes.begin(), lanes.end(), first);
    while (true) {
      std::shuffle(lanes.begin(), lanes.end(), random_);
      for (unsigned lane : lanes) {
        if (fibers_[lane].state == State::Ready) resume(lane);
      }
      const unsigned shuffling = count_in(first, last, State::AtShuffle);
      if (shuffling == 0) return;
      if (shuffling < warp_size) throw std::runtime_error("host run: a shuffle that only some lanes of a warp reach");
      for (unsigned lane : lanes) fibers_[lane].received = fibers_[first + fibers_[lane].source_lane].offered;
      release(first, last);
    }
  }

  void resume(unsigned i) {
    current_ = i;
    threadIdx = fibers_[i].index;
    swapcontext(&scheduler_, &fibers_[i].context);
  }

  void suspend(State state) {
    Fiber& fiber = fibers_[current_];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler_);
  }

  void release(unsigned first, unsigned last) {
    for (unsigned i = first; i < last; ++i) fibers_[i].state = State::Ready;
  }

  unsigned count_in(unsigned first, unsigned last, State state) const {
    unsigned count = 0;
    for (unsigned i = first; i < last; ++i) count += fibers_[i].state == state;
    return count;
  }

  // makecontext passes ints only: the runner's address travels in two halves.
  static unsigned high(const Runner* r) { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(r) >> 32); }
  static unsigned low(const Runner* r) { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(r)); }

  static void enter(unsigned high, unsigned low) {
    Runner* runner = reinterpret_cast<Runner*>(static_cast<uintptr_t>(high) << 32 | low);
    runner->call_(runner->context_);
    runner->fibers_[runner->current_].state = State::Done;
  }

  std::mutex mutex_;
  std::mt19937_64 random_;
  std::vector<Fiber> fibers_;
  unsigned count_ = 0, current_ = 0;
  ucontext_t scheduler_;
  void (*call_)(const void*) = nullptr;
  const void* context_ = nullptr;
};

inline Runner runner;

}  // namespace megascratch::fibers

inline void __syncthreads() { megascratch::fibers::runner.barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int lane_mask) {
  return megascratch::fibers::runner.shuffle_xor(value, static_cast<unsigned>(lane_mask));
}

inline void __stwb(uint4* to, uint4 value) { *to = value; }
