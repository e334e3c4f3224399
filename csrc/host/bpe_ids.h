// The ids that encoding makes: a buffer of them, those of some documents, and those of many threads put together.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <malloc.h>
#include <sys/mman.h>
#endif

namespace megascratch::bpe {

/// Memory for ids, from malloc. The last large piece that comes back is kept for the next who asks: malloc would hand it
/// to the system at once, and new pages, which the system clears, cost a tenth of the time that encoding takes. While it
/// waits here, the system takes from it what it needs elsewhere.
class IdMemory {
  public:
    static void* take(size_t n_bytes) {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            if (spare_ && n_bytes <= size_of(spare_) && size_of(spare_) / 4 <= n_bytes) return std::exchange(spare_, nullptr);
        }
        return std::malloc(n_bytes);
    }
    static void give_back(void* memory) {
        if (!memory) return;
        if (const size_t n_bytes = size_of(memory); n_bytes >= kLarge) {
            let_go(memory, n_bytes);
            const std::lock_guard<std::mutex> lock(mutex_);
            std::swap(memory, spare_);
        }
        std::free(memory);
    }

  private:
    static constexpr size_t kLarge = size_t(1) << 25;  // below this malloc keeps it, too
#if defined(__linux__)
    static size_t size_of(void* memory) { return malloc_usable_size(memory); }
    static void let_go(void* memory, size_t n_bytes) {
        constexpr size_t kPage = 4096;
        const size_t first = (reinterpret_cast<size_t>(memory) + kPage - 1) / kPage * kPage;
        madvise(reinterpret_cast<void*>(first), (reinterpret_cast<size_t>(memory) + n_bytes - first) / kPage * kPage, MADV_FREE);
    }
#else
    static size_t size_of(void*) { return 0; }
    static void let_go(void*, size_t) {}
#endif

    inline static std::mutex mutex_;
    inline static void* spare_ = nullptr;
};

/// Ids that grow without being cleared first; uint16 or uint32, as the file or model wants them.
///
/// They are written once, from front to back, so small pages do. Huge ones would come a twentieth faster where there are
/// some to be had; in a virtual machine it is those that the host has taken back, and a first pass waits for it.
template <class Id>
class IdBuffer {
  public:
    /// Make room for `more` ids and return where they go.
    Id* reserve(size_t more) {
        if (size_ + more > capacity_) {
            capacity_ = std::max(size_ + more, capacity_ + capacity_ / 2);
            const size_t n_bytes = capacity_ * sizeof(Id);
            void* const grown = data_ ? std::realloc(data_.get(), n_bytes) : IdMemory::take(n_bytes);
            if (!grown) throw std::bad_alloc();
            data_.release();
            data_.reset(static_cast<Id*>(grown));
        }
        return data_.get() + size_;
    }
    /// Give back what was expected in vain, where it is much.
    void trim() {
        if (size_ == 0 || size_ > capacity_ / 4 * 3) return;
        if (void* const kept = std::realloc(data_.get(), size_ * sizeof(Id))) {
            data_.release();
            data_.reset(static_cast<Id*>(kept));
            capacity_ = size_;
        }
    }
    void advance(size_t n) { size_ += n; }
    size_t size() const { return size_; }
    const Id* data() const { return data_.get(); }
    Id* release() { return data_.release(); }

  private:
    struct Free {
        void operator()(void* p) const { IdMemory::give_back(p); }
    };
    std::unique_ptr<Id[], Free> data_;
    size_t size_ = 0, capacity_ = 0;
};

/// The ids of some documents end to end, and the number of ids up to each document's end.
template <class Id>
struct Encoded {
    IdBuffer<Id> ids;
    std::vector<int64_t> ends;
};

/// The ids of shares of a text, put together in order while others are still being made.
template <class Id>
class Collector {
  public:
    Collector(size_t n_shares, size_t n_ids_expected) : waiting_(n_shares), is_here_(n_shares) {
        all_.ids.reserve(n_ids_expected);
    }
    void add(size_t share, Encoded<Id>&& made) {
        std::unique_lock<std::mutex> lock(mutex_);
        waiting_[share] = std::move(made);
        is_here_[share] = true;
        if (appending_) return;  // the thread that is at it takes this share, too: nobody waits for new memory but that one
        appending_ = true;
        for (; next_ < waiting_.size() && is_here_[next_]; ++next_) {
            const Encoded<Id> part = std::move(waiting_[next_]);
            lock.unlock();
            append(part);
            lock.lock();
        }
        appending_ = false;
    }
    Encoded<Id> take() { return std::move(all_); }

  private:
    void append(const Encoded<Id>& part) {
        const size_t n_before = all_.ids.size();
        for (int64_t end : part.ends) all_.ends.push_back(int64_t(n_before) + end);
        std::copy_n(part.ids.data(), part.ids.size(), all_.ids.reserve(part.ids.size()));
        all_.ids.advance(part.ids.size());
    }

    Encoded<Id> all_;  // belongs to the thread that appends
    std::mutex mutex_;
    bool appending_ = false;
    std::vector<Encoded<Id>> waiting_;
    std::vector<bool> is_here_;
    size_t next_ = 0;
};

}  // namespace megascratch::bpe
