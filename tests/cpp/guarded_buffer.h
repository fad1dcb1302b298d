// Memory that ends at a page which cannot be touched: one byte past the end stops the program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <utility>

namespace qtoolkit::testing {

template <class T>
class GuardedBuffer {
 public:
  explicit GuardedBuffer(int64_t count, T value = T{}) : count_(count) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = static_cast<size_t>(count) * sizeof(T);
    const size_t usable = (bytes + page - 1) / page * page;
    size_ = usable + page;
    pages_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages_ == MAP_FAILED || mprotect(static_cast<char*>(pages_) + usable, page, PROT_NONE)) {
      throw std::bad_alloc();
    }
    data_ = reinterpret_cast<T*>(static_cast<char*>(pages_) + usable - bytes);
    for (T& element : *this) element = value;
  }
  GuardedBuffer(GuardedBuffer&& other) noexcept
      : pages_(std::exchange(other.pages_, nullptr)),
        size_(other.size_),
        data_(other.data_),
        count_(other.count_) {}
  GuardedBuffer& operator=(GuardedBuffer&&) = delete;
  ~GuardedBuffer() {
    if (pages_ != nullptr) munmap(pages_, size_);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return count_; }
  T* begin() { return data_; }
  T* end() { return data_ + count_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  void* pages_ = nullptr;
  size_t size_ = 0;
  T* data_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace qtoolkit::testing
