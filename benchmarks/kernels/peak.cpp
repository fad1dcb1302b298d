#include "peak.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

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
// Twelve of these measured 1.4 % less than twenty-four.
__attribute__((target("avx512f,avx512vnni"))) void run_dot_512() {
  for (int64_t i = 0; i < kLoops / 2; ++i) {
    asm volatile(QT_TWELVE(QT_DOT_512) QT_DOT_512(16) QT_DOT_512(17) QT_DOT_512(18) QT_DOT_512(19)
                     QT_DOT_512(20) QT_DOT_512(21) QT_DOT_512(22) QT_DOT_512(23) QT_DOT_512(24)
                         QT_DOT_512(25) QT_DOT_512(26) QT_DOT_512(27)::
                             : "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
                               "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",
                               "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25",
                               "xmm26", "xmm27");
  }
}
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

#elif defined(__aarch64__)

// Twenty-four independent results. The instruction is "sdot v<n>.4s, v0.16b, v1.16b", by its number
// because this file is for every CPU.
constexpr int64_t kLoops = 2000;
#define QT_SDOT(n) ".inst 0x4e819400 + " #n "\n\t"
void run_sdot() {
  for (int64_t i = 0; i < kLoops; ++i) {
    asm volatile(QT_SDOT(8) QT_SDOT(9) QT_SDOT(10) QT_SDOT(11) QT_SDOT(12) QT_SDOT(13) QT_SDOT(14)
                     QT_SDOT(15) QT_SDOT(16) QT_SDOT(17) QT_SDOT(18) QT_SDOT(19) QT_SDOT(20)
                         QT_SDOT(21) QT_SDOT(22) QT_SDOT(23) QT_SDOT(24) QT_SDOT(25) QT_SDOT(26)
                             QT_SDOT(27) QT_SDOT(28) QT_SDOT(29) QT_SDOT(30) QT_SDOT(31)::
                                 : "v8", "v9", "v10", "v11", "v12", "v13", "v14", "v15", "v16",
                                   "v17", "v18", "v19", "v20", "v21", "v22", "v23", "v24", "v25",
                                   "v26", "v27", "v28", "v29", "v30", "v31");
  }
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
#elif defined(__aarch64__)
    case kernels::Path::neondot:
      return Peak{"sdot", run_sdot, 24 * kLoops * 16};
#endif
    default:
      return std::nullopt;
  }
}

}  // namespace qtoolkit::benchmarks
