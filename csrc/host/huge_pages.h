// Memory for large tables that are read at random: on huge pages where the system has them.
#pragma once

#include <cstddef>
#include <cstdlib>
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
    explicit HugeArray(size_t n) : n_bytes_((n * sizeof(T) + kHugePage - 1) / kHugePage * kHugePage) {
        static_assert(std::is_trivially_copyable_v<T>);
#if defined(__linux__)
        // The kernel's own zeros, so that nothing is cleared twice. One page more, to begin at a border of huge pages.
        void* const mapped = mmap(nullptr, n_bytes_ + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (mapped == MAP_FAILED) throw std::bad_alloc();
        mapped_ = mapped;
        const size_t begin = (reinterpret_cast<size_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage;
        items_ = reinterpret_cast<T*>(begin);
        wish_huge_pages(items_, n_bytes_);
#else
        mapped_ = std::calloc(n_bytes_, 1);
        if (!mapped_) throw std::bad_alloc();
        items_ = static_cast<T*>(mapped_);
#endif
    }
    ~HugeArray() {
#if defined(__linux__)
        munmap(mapped_, n_bytes_ + kHugePage);
#else
        std::free(mapped_);
#endif
    }
    HugeArray(const HugeArray&) = delete;
    HugeArray& operator=(const HugeArray&) = delete;

    T& operator[](size_t i) const { return items_[i]; }

  private:
    size_t n_bytes_;
    void* mapped_;
    T* items_;
};

}  // namespace megascratch::bpe
