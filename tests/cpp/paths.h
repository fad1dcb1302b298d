// For the tests of kernels: the paths that this CPU can run, one of them forced, buffers that
// notice a write outside, and random numbers that are the same everywhere.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "kernels/path.h"

namespace qtoolkit::kernels {

inline std::vector<Path> runnable_paths(Kernel kernel) {
  std::vector<Path> result;
  for (Path path : paths_of(kernel)) {
    if (supported(path)) result.push_back(path);
  }
  return result;
}

// Runs call() on one path, and fails if the kernel took another.
template <class Call>
void run_on(Path path, Kernel kernel, Call call) {
  struct Forced {
    explicit Forced(Path path) { force_path(path); }
    ~Forced() { force_path(std::nullopt); }
  };
  const Forced forced(path);
  call();
  EXPECT_EQ(last_path(kernel), path) << name(kernel);
}

// `size` elements, `shift` bytes' worth of elements off the alignment, between guards.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t size, int64_t shift = 0)
      : size_(size),
        first_(kGuard + shift),
        bytes_((size + shift + 2 * kGuard) * sizeof(T), 0xA5) {}

  T* data() { return reinterpret_cast<T*>(bytes_.data()) + first_; }
  // All bytes, guards included: comparing them with a reference's finds stray writes too.
  const std::vector<uint8_t>& bytes() const { return bytes_; }
  std::vector<T> values() { return std::vector<T>(data(), data() + size_); }

 private:
  static constexpr int64_t kGuard = 64;
  int64_t size_, first_;
  std::vector<uint8_t> bytes_;
};

// A 64-bit linear congruential generator's upper half.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}

  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  int64_t integer(int64_t low, int64_t high) { return low + bits() % (high - low + 1); }
  float real(float low, float high) {
    return low + (high - low) * (static_cast<float>(bits() >> 8) / 16777216.0f);
  }
  std::vector<uint8_t> codes(int64_t size) {
    std::vector<uint8_t> result(static_cast<size_t>(size));
    for (uint8_t& code : result) code = static_cast<uint8_t>(bits());
    return result;
  }
  std::vector<float> reals(int64_t size, float low, float high) {
    std::vector<float> result(static_cast<size_t>(size));
    for (float& value : result) value = real(low, high);
    return result;
  }

 private:
  uint64_t state_;
};

struct PathName {
  template <class Info>
  std::string operator()(const Info& info) const {
    return std::string(name(info.param));
  }
};

// A fixture per kernel: TEST_P(kernel##Paths, …) runs on every runnable path.
#define QT_FOR_EACH_PATH(Fixture, kernel)                                                     \
  class Fixture : public ::testing::TestWithParam<Path> {};                                   \
  INSTANTIATE_TEST_SUITE_P(All, Fixture, ::testing::ValuesIn(runnable_paths(Kernel::kernel)), \
                           PathName())

}  // namespace qtoolkit::kernels
