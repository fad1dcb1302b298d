// The matrix tiles of AMX, whose registers the compiler does not know. Everything is internal.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels::amx {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // Makes it the thread's. Takes about 200 cycles.
  void load() const {
    // The intrinsic says of its operand only that it reads eight bytes.
    asm volatile("ldtilecfg %0" : : "m"(*this));
  }
};

// As the intrinsics, which do not say that they read memory.
template <int kTile>
inline __attribute__((always_inline)) void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline __attribute__((always_inline)) void clear_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// Adds the products of unsigned bytes and signed ones.
template <int kSum, int kUnsigned, int kSigned>
inline __attribute__((always_inline)) void dot() {
  asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kUnsigned), "i"(kSigned));
}
// Adds the products of signed bytes.
template <int kSum, int kFirst, int kSecond>
inline __attribute__((always_inline)) void dot_signed() {
  asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kFirst), "i"(kSecond));
}

}  // namespace
}  // namespace qtoolkit::kernels::amx
