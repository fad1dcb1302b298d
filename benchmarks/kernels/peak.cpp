#include "peak.h"

#include <immintrin.h>

#include <cstdint>

namespace qtoolkit::benchmarks {
namespace {

#if defined(__x86_64__)

// The instruction's own results would not be ready in time with fewer registers: twelve measured
// 1.4 % less than twenty-four.
constexpr int64_t kLoops = 2000;
#define QT_EACH_OF_14(I) I(2) I(3) I(4) I(5) I(6) I(7) I(8) I(9) I(10) I(11) I(12) I(13) I(14) I(15)
#define QT_EACH_OF_24(I) \
  QT_EACH_OF_14(I) I(16) I(17) I(18) I(19) I(20) I(21) I(22) I(23) I(24) I(25)
#define QT_14_CLOBBERED                                                                      \
  "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", \
      "xmm13", "xmm14", "xmm15"
#define QT_DOT_512(n) "vpdpbusd %%zmm1, %%zmm0, %%zmm" #n "\n\t"
#define QT_DOT_256(n) "%{vex%} vpdpbusd %%ymm1, %%ymm0, %%ymm" #n "\n\t"
#define QT_MADD_256(n) "vpmaddwd %%ymm1, %%ymm0, %%ymm" #n "\n\t"

__attribute__((target("avx512f,avx512vnni"))) void run_dot_512() {
  for (int64_t i = 0; i < kLoops; ++i) {
    asm volatile(QT_EACH_OF_24(QT_DOT_512)::
                     : QT_14_CLOBBERED, "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21",
                       "xmm22", "xmm23", "xmm24", "xmm25");
  }
}
__attribute__((target("avx2,avxvnni"))) void run_dot_256() {
  for (int64_t i = 0; i < kLoops; ++i) asm volatile(QT_EACH_OF_14(QT_DOT_256)::: QT_14_CLOBBERED);
}
__attribute__((target("avx2"))) void run_madd_256() {
  for (int64_t i = 0; i < kLoops; ++i) asm volatile(QT_EACH_OF_14(QT_MADD_256)::: QT_14_CLOBBERED);
}

// Four tiles of sums; each instruction multiplies 16 x 64 bytes by 64 x 16.
constexpr int64_t kTileLoops = 600;
__attribute__((target("amx-tile,amx-int8"))) void run_tiles() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  };
  const Config config;
  _tile_loadconfig(&config);
  for (int64_t i = 0; i < kTileLoops; ++i) {
    _tile_dpbusd(0, 4, 5);
    _tile_dpbusd(1, 4, 5);
    _tile_dpbusd(2, 4, 5);
    _tile_dpbusd(3, 4, 5);
  }
  _tile_release();
}
#endif

}  // namespace

std::optional<Peak> peak_of(kernels::Path path) {
  switch (path) {
#if defined(__x86_64__)
    case kernels::Path::avx2:
      return Peak{"vpmaddwd ymm", run_madd_256, 14 * kLoops * 16};
    case kernels::Path::avxvnni:
      return Peak{"vpdpbusd ymm", run_dot_256, 14 * kLoops * 32};
    case kernels::Path::avx512vnni:
      return Peak{"vpdpbusd zmm", run_dot_512, 24 * kLoops * 64};
    case kernels::Path::amx:
      return Peak{"tdpbusd", run_tiles, 4.0 * kTileLoops * 16 * 16 * 64};
#endif
    default:
      return std::nullopt;
  }
}

}  // namespace qtoolkit::benchmarks
