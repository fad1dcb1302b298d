#include <array>
#include <atomic>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "kernels/path.h"

namespace qtoolkit::kernels {
namespace {

constexpr std::array kPathNames = {std::string_view("reference"), std::string_view("portable"),
                                   std::string_view("avx2"), std::string_view("avx512vnni")};

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
    if (line.kernel != kernel) continue;
    if (wanted >= 0) {
      if (line.path == static_cast<Path>(wanted)) return line;
      continue;
    }
    if (line.path == Path::reference || !supported(line.path)) continue;
    if (best == nullptr || line.path > best->path) best = &line;
  }
  if (best == nullptr) {
    throw std::invalid_argument("kernel '" + std::string(name(kernel)) + "' has no path '" +
                                std::string(kPathNames.at(static_cast<size_t>(wanted))) + "'");
  }
  return *best;
}

AnyFunction select(Kernel kernel) {
  Choice& choice = choice_of(kernel);
  const Line* line = choice.selected.load(std::memory_order_acquire);
  if (line == nullptr) {
    line = &choose(kernel);
    choice.selected.store(line, std::memory_order_release);
  }
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

bool supported(Path path) {
#if defined(__x86_64__)
  // These built-ins also ask the operating system whether it saves the wide registers.
  if (path == Path::avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c");
  }
  if (path == Path::avx512vnni) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("f16c");
  }
#endif
  return path == Path::reference || path == Path::portable;
}

std::vector<Path> paths_of(Kernel kernel) {
  std::vector<Path> result;
  for (const Line& line : kLines) {
    if (line.kernel == kernel) result.push_back(line.path);
  }
  return result;
}

Path selected_path(Kernel kernel) { return choose(kernel).path; }

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
