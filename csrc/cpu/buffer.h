// A thread's scratch memory, for as long as one call of a kernel.

#pragma once

#include <cstdint>
#include <cstdlib>

namespace megascratch {
namespace {

// Not std::vector: its functions are shared between the objects of all instruction-set levels, and the linker might
// keep one that this processor cannot run.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t n)
      : data_(static_cast<T*>(aligned_alloc(64, (static_cast<size_t>(n) * sizeof(T) / 64 + 1) * 64))) {
    if (!data_) abort();
  }
  ~Buffer() { free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  operator T*() const { return data_; }

 private:
  T* data_;
};

}  // namespace
}  // namespace megascratch
