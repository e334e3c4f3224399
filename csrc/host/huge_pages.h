// Memory for large tables that are read at random: on huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace megascratch::bpe {

constexpr size_t kHugePage = size_t(1) << 21;

/// Ask for huge pages in a stretch of memory. A wish: without them all works the same, only slower.
inline void wish_huge_pages(void* begin, size_t n_bytes) {
#if defined(__linux__)
    constexpr size_t kPage = 4096;
    const size_t first = (reinterpret_cast<size_t>(begin) + kPage - 1) / kPage * kPage;
    const size_t last = (reinterpret_cast<size_t>(begin) + n_bytes) / kPage * kPage;
    if (last >= first + kHugePage) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    (void)begin, (void)n_bytes;
#endif
}

/// An array of zeros, met at random: with small pages half of the time would go into finding the addresses.
template <class T>
class HugeArray {
  public:
    explicit HugeArray(size_t n) {
        static_assert(std::is_trivially_copyable_v<T>);
        const size_t n_bytes = (n * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage;
        void* const bytes = std::aligned_alloc(kHugePage, n_bytes);
        if (!bytes) throw std::bad_alloc();
        wish_huge_pages(bytes, n_bytes);
        items_.reset(static_cast<T*>(std::memset(bytes, 0, n_bytes)));
    }
    T& operator[](size_t i) const { return items_.get()[i]; }

  private:
    struct Free {
        void operator()(T* items) const { std::free(items); }
    };
    std::unique_ptr<T, Free> items_;
};

}  // namespace megascratch::bpe
