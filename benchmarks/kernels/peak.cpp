#include "peak.h"

#include <immintrin.h>

#include <cstdint>

namespace qtoolkit::benchmarks {
namespace {

#if defined(__x86_64__)

// Twelve independent results, in registers 4 to 15, hide the latency of the vector instructions.
// Registers 0 to 3 are read, or what is in between.
constexpr int64_t kLoops = 4000;
#define QT_TWELVE(I) I(4) I(5) I(6) I(7) I(8) I(9) I(10) I(11) I(12) I(13) I(14) I(15)
#define QT_PEAK(function, isa, instruction)                                                        \
  __attribute__((target(isa))) void function() {                                                   \
    for (int64_t i = 0; i < kLoops; ++i) {                                                         \
      asm volatile(QT_TWELVE(instruction)::                                                        \
                       : "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", \
                         "xmm12", "xmm13", "xmm14", "xmm15");                                      \
    }                                                                                              \
  }
#define QT_DOT_512(n) "vpdpbusd %%zmm1, %%zmm0, %%zmm" #n "\n\t"
#define QT_DOT_256(n) "%{vex%} vpdpbusd %%ymm1, %%ymm0, %%ymm" #n "\n\t"
#define QT_MADD_256(n)                    \
  "vpmaddubsw %%ymm1, %%ymm0, %%ymm3\n\t" \
  "vpmaddwd %%ymm2, %%ymm3, %%ymm3\n\t"   \
  "vpaddd %%ymm3, %%ymm" #n ", %%ymm" #n "\n\t"
QT_PEAK(run_dot_512, "avx512f,avx512vnni", QT_DOT_512)
QT_PEAK(run_dot_256, "avx2,avxvnni", QT_DOT_256)
QT_PEAK(run_madd_256, "avx2", QT_MADD_256)

// Four tiles of sums; each instruction multiplies 16 x 64 bytes by 64 x 16.
constexpr int64_t kTileLoops = 600;
__attribute__((target("amx-tile,amx-int8"))) void run_tiles() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16};
  };
  // Static, because GCC 12 takes the intrinsic to read 8 bytes alone and drops stores of the
  // others.
  static const Config config;
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
      return Peak{"vpmaddubsw, vpmaddwd and vpaddd ymm", run_madd_256, 12 * kLoops * 32};
    case kernels::Path::avxvnni:
      return Peak{"vpdpbusd ymm", run_dot_256, 12 * kLoops * 32};
    case kernels::Path::avx512vnni:
      return Peak{"vpdpbusd zmm", run_dot_512, 12 * kLoops * 64};
    case kernels::Path::amx:
      return Peak{"tdpbusd", run_tiles, 4.0 * kTileLoops * 16 * 16 * 64};
#endif
    default:
      return std::nullopt;
  }
}

}  // namespace qtoolkit::benchmarks
