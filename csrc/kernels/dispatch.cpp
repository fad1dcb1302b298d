#if defined(__linux__)
#include <sys/auxv.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <array>
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "kernels/path.h"

namespace qtoolkit::kernels {
namespace {

constexpr std::array<std::string_view, 7> kPathNames = {
    "reference", "portable", "neondot", "avx2", "avxvnni", "avx512vnni", "amx"};

constexpr std::array kKernelNames = {
#define QT_KERNEL(kernel, Args) std::string_view(#kernel),
#include "kernels/kernels.inc"
#undef QT_KERNEL
};

// One line of the list of paths. The pointer is cast back to the kernel's own type before a call.
using AnyFunction = void (*)();
struct Line {
  Kernel kernel;
  Path path;
  AnyFunction function;
};
const std::array kLines = {
#define QT_KERNEL_PATH(kernel, path) \
  Line{Kernel::kernel, Path::path, reinterpret_cast<AnyFunction>(&path::kernel)},
#include "kernels/kernels.inc"
#undef QT_KERNEL_PATH
};

std::atomic<int> forced{-1};  // a Path, or -1

// What one kernel runs: found once, and found again whenever another path is forced.
struct Choice {
  std::atomic<const Line*> selected{nullptr};
  std::atomic<const Line*> latest{nullptr};
};
std::array<Choice, kKernelNames.size()> choices;

Choice& choice_of(Kernel kernel) { return choices[static_cast<size_t>(kernel)]; }

const Line& choose(Kernel kernel) {
  const int wanted = forced.load();
  const Line* best = nullptr;
  for (const Line& line : kLines) {
    if (line.kernel != kernel || !supported(line.path)) continue;
    if (wanted == static_cast<int>(line.path)) return line;
    if (line.path == Path::reference) continue;
    if (wanted >= 0 && line.path > static_cast<Path>(wanted)) continue;
    if (best == nullptr || line.path > best->path) best = &line;
  }
  return *best;  // every kernel has a portable path
}

const Line* selected(Choice& choice, Kernel kernel) {
  const Line* line = choice.selected.load(std::memory_order_acquire);
  if (line == nullptr) {
    line = &choose(kernel);
    choice.selected.store(line, std::memory_order_release);
  }
  return line;
}

AnyFunction select(Kernel kernel) {
  Choice& choice = choice_of(kernel);
  const Line* line = selected(choice, kernel);
  if (choice.latest.load(std::memory_order_relaxed) != line) choice.latest.store(line);
  return line->function;
}

template <class Names>
size_t index_of(const Names& names, std::string_view wanted, const char* what) {
  std::string known;
  for (size_t i = 0; i < names.size(); ++i) {
    if (names[i] == wanted) return i;
    known += (i == 0 ? "" : ", ") + std::string(names[i]);
  }
  throw std::invalid_argument("unknown " + std::string(what) + " '" + std::string(wanted) +
                              "'; known: " + known);
}

#if defined(__x86_64__)
// Linux saves the tiles' state only for a process that asked for it.
bool may_use_amx() {
#if defined(__linux__)
  static const bool granted = [] {
    constexpr long kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr long kTileData = 18;               // XFEATURE_XTILEDATA
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return granted;
#else
  return false;
#endif
}
#endif

bool cpu_has(Path path) {
  switch (path) {
    case Path::reference:
    case Path::portable:
      return true;
#if defined(__x86_64__)
    // These built-ins also ask the operating system whether it saves the wide registers.
    case Path::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c") &&
             __builtin_cpu_supports("fma");
    case Path::avxvnni:
      return cpu_has(Path::avx2) && __builtin_cpu_supports("avxvnni");
    case Path::avx512vnni:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
             __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
    case Path::amx:
      return cpu_has(Path::avx512vnni) && may_use_amx();
#elif defined(__aarch64__) && defined(__linux__)
    case Path::neondot:
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    default:
      return false;
  }
}

// The best path that the environment variable QTOOLKIT_MAX_PATH allows.
Path best_allowed() {
  static const Path best = [] {
    const char* const text = std::getenv("QTOOLKIT_MAX_PATH");
    if (text == nullptr || *text == '\0') return Path::amx;
    const auto path = static_cast<Path>(index_of(kPathNames, text, "QTOOLKIT_MAX_PATH"));
    if (path == Path::reference) {
      throw std::invalid_argument(
          "QTOOLKIT_MAX_PATH must be 'portable' or better, got 'reference'");
    }
    return path;
  }();
  return best;
}

}  // namespace

std::string_view name(Path path) { return kPathNames[static_cast<size_t>(path)]; }
std::string_view name(Kernel kernel) { return kKernelNames[static_cast<size_t>(kernel)]; }

Path path_of(std::string_view name) {
  return static_cast<Path>(index_of(kPathNames, name, "kernel path"));
}
Kernel kernel_of(std::string_view name) {
  return static_cast<Kernel>(index_of(kKernelNames, name, "kernel"));
}

std::vector<Kernel> all_kernels() {
  std::vector<Kernel> result;
  for (size_t i = 0; i < kKernelNames.size(); ++i) result.push_back(static_cast<Kernel>(i));
  return result;
}

std::vector<Path> all_paths() {
  std::vector<Path> result;
  for (size_t i = 0; i < kPathNames.size(); ++i) result.push_back(static_cast<Path>(i));
  return result;
}

bool supported(Path path) { return path <= best_allowed() && cpu_has(path); }

std::vector<Path> paths_of(Kernel kernel) {
  std::vector<Path> result;
  for (const Line& line : kLines) {
    if (line.kernel == kernel) result.push_back(line.path);
  }
  return result;
}

Path selected_path(Kernel kernel) { return selected(choice_of(kernel), kernel)->path; }

void force_path(std::optional<Path> path) {
  if (path && !supported(*path)) {
    throw std::invalid_argument("this CPU cannot run the kernel path '" + std::string(name(*path)) +
                                "'");
  }
  forced.store(path ? static_cast<int>(*path) : -1);
  for (Choice& choice : choices) choice.selected.store(nullptr);
}

std::optional<Path> last_path(Kernel kernel) {
  const Line* line = choice_of(kernel).latest.load();
  return line == nullptr ? std::nullopt : std::optional(line->path);
}

#define QT_KERNEL(kernel, Args)                                                     \
  void kernel(const Args& args, int64_t begin, int64_t end) {                       \
    reinterpret_cast<kernel##_function*>(select(Kernel::kernel))(args, begin, end); \
  }
#include "kernels/kernels.inc"
#undef QT_KERNEL

}  // namespace qtoolkit::kernels
