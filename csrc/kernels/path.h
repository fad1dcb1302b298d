// Instruction-set paths: which exist, which this CPU can run, and the choice between them.
#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

namespace qtoolkit::kernels {

// In order of preference, the best last. `reference` is the scalar truth and is never chosen by
// itself; `portable` runs everywhere.
// `neondot` is Arm with the dot-product instructions; `avxvnni` is the 256-bit form of the VNNI
// instructions, on CPUs without AVX-512; `amx` is avx512vnni with int8 matrix tiles.
enum class Path : uint8_t { reference, portable, neondot, avx2, avxvnni, avx512vnni, amx };

enum class Kernel : uint8_t {
#define QT_KERNEL(kernel, Args) kernel,
#include "kernels/kernels.inc"
#undef QT_KERNEL
};

std::string_view name(Path path);
std::string_view name(Kernel kernel);

// Throws std::invalid_argument that lists the known names.
Path path_of(std::string_view name);
Kernel kernel_of(std::string_view name);

std::vector<Kernel> all_kernels();
std::vector<Path> all_paths();

// True if this CPU (and operating system) can run the path, and the environment variable
// QTOOLKIT_MAX_PATH, where it is set, names no lesser one: with `avx2` there the process runs as on
// a CPU with AVX2 and nothing above. Throws std::invalid_argument if its value is unknown or
// `reference`.
bool supported(Path path);

// The paths that the build has for a kernel, whether or not this CPU can run them.
std::vector<Path> paths_of(Kernel kernel);

// The path that the next call of the kernel takes: the forced one if there is one, else the best
// supported one.
Path selected_path(Kernel kernel);

// Makes every kernel take this path (process-wide), and one without it the best of those before it
// in the order above; nullopt ends it. Throws std::invalid_argument for a path this CPU cannot run.
// For tests and benchmarks: no kernel may run meanwhile, its choice of the old path could outlast
// the call.
void force_path(std::optional<Path> path);

// The path of the kernel's latest call in this process, nullopt before the first.
std::optional<Path> last_path(Kernel kernel);

}  // namespace qtoolkit::kernels
