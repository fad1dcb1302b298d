// The peaks of kernels/peak.h for benchmarks/_machine.py, which builds and loads this.

#include <chrono>
#include <cstdint>
#include <optional>
#include <string_view>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "kernels/peak.h"

namespace {

namespace b = qtoolkit::benchmarks;
using qtoolkit::kernels::Path;

#if defined(__x86_64__)
bool may_use_amx() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-int8") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// nullopt where this process cannot run the path's instruction.
std::optional<b::Peak> peak_of(std::string_view path) {
  if (path == "amx" && may_use_amx()) return b::peak_of(Path::amx);
  if (path == "avx512vnni" && __builtin_cpu_supports("avx512vnni")) {
    return b::peak_of(Path::avx512vnni);
  }
  if (path == "avxvnni" && __builtin_cpu_supports("avxvnni")) return b::peak_of(Path::avxvnni);
  if (path == "avx2" && __builtin_cpu_supports("avx2")) return b::peak_of(Path::avx2);
  return std::nullopt;
}
#else
std::optional<b::Peak> peak_of(std::string_view) { return std::nullopt; }
#endif

}  // namespace

// Multiply-adds a second of all threads together over about `seconds`; 0 where the instruction of
// the path cannot run.
extern "C" double peak_macs(const char* path, int threads, double seconds) {
  using Clock = std::chrono::steady_clock;
  const std::optional<b::Peak> peak = peak_of(std::string_view(path));
  if (!peak) return 0;
  for (int64_t loops = 16;; loops *= 2) {
    const auto work = [&] {
      for (int64_t i = 0; i < loops; ++i) peak->run();
    };
    const Clock::time_point start = Clock::now();
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    const double elapsed = std::chrono::duration<double>(Clock::now() - start).count();
    if (elapsed >= seconds) return static_cast<double>(loops) * threads * peak->macs / elapsed;
  }
}
