// qtoolkit._C: what needs Python and is not a tensor operator.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/version.h>

#include <optional>
#include <string>
#include <vector>

#include "core/formats.h"
#include "kernels/path.h"
#include "ops/weight_cache.h"

namespace py = pybind11;

namespace qtoolkit::bindings {
namespace {

using kernels::Path;

py::dict build_info() {
  py::dict info;
  info["compiler"] =
#if defined(__clang__)
      "clang " __clang_version__;
#else
      "gcc " __VERSION__;
#endif
  info["cxx_standard"] = __cplusplus;
  info["torch"] = TORCH_VERSION;
  info["cuda"] = static_cast<bool>(QTOOLKIT_CUDA_ENABLED);
  return info;
}

std::vector<std::string> names_of(const std::vector<Path>& paths) {
  std::vector<std::string> names;
  for (const Path path : paths) names.emplace_back(kernels::name(path));
  return names;
}

std::vector<std::string> cpu_paths() {
  std::vector<Path> paths;
  for (const Path path : kernels::all_paths()) {
    if (kernels::supported(path)) paths.push_back(path);
  }
  return names_of(paths);
}

std::vector<std::string> kernel_names() {
  std::vector<std::string> names;
  for (const kernels::Kernel kernel : kernels::all_kernels()) {
    names.emplace_back(kernels::name(kernel));
  }
  return names;
}

std::vector<std::string> kernel_paths(const std::string& kernel) {
  return names_of(kernels::paths_of(kernels::kernel_of(kernel)));
}

std::string selected_path(const std::string& kernel) {
  return std::string(kernels::name(kernels::selected_path(kernels::kernel_of(kernel))));
}

std::optional<std::string> last_path(const std::string& kernel) {
  const std::optional<Path> path = kernels::last_path(kernels::kernel_of(kernel));
  return path ? std::optional(std::string(kernels::name(*path))) : std::nullopt;
}

void force_path(const std::optional<std::string>& path) {
  kernels::force_path(path ? std::optional(kernels::path_of(*path)) : std::nullopt);
}

py::dict weight_cache_state() {
  const ops::WeightCacheState state = ops::weight_cache_state();
  py::dict result;
  result["packed_weights"] = state.packed_weights;
  result["packed_bytes"] = state.packed_bytes;
  result["channel_terms"] = state.channel_terms;
  result["packings"] = state.packings;
  return result;
}

std::vector<py::dict> format_table() {
  std::vector<py::dict> table;
  for (const Format& format : formats()) {
    py::dict row;
    row["name"] = format.name;
    row["kind"] = format.kind;
    row["bits"] = format.bits;
    row["quant_min"] = format.quant_min;
    row["quant_max"] = format.quant_max;
    row["mantissa_bits"] = format.mantissa_bits;
    row["min_exponent"] = format.min_exponent;
    row["max_value"] = format.max_value;
    row["block_size"] = format.block_size;
    row["scale_format"] = format.scale_format;
    table.push_back(row);
  }
  return table;
}

}  // namespace

// std::invalid_argument becomes ValueError.
PYBIND11_MODULE(_C, m) {
  m.def("build_info", build_info,
        "Compiler, C++ standard, PyTorch built against, and whether CUDA operators were built.");
  m.def("cpu_paths", cpu_paths, "The instruction-set paths that this CPU can run.");
  m.def("kernel_names", kernel_names, "The names of all kernels.");
  m.def("kernel_paths", kernel_paths, py::arg("kernel"),
        "The paths that this build has for a kernel. ValueError if there is no such kernel.");
  m.def("selected_path", selected_path, py::arg("kernel"),
        "The path that the kernel's next call takes.");
  m.def("last_path", last_path, py::arg("kernel"),
        "The path of the kernel's latest call in this process, None before the first.");
  m.def("force_path", force_path, py::arg("path").none(true),
        "Makes every kernel take this path, for tests and benchmarks; None ends it. ValueError "
        "if this CPU cannot run it; a kernel without that path then raises when called.");
  m.def("weight_cache_state", weight_cache_state,
        "Packed weights kept now, their bytes, the sets of offsets and multipliers kept with them, "
        "and how often this process has packed a weight.");
  m.def("formats", format_table, "The rows of the table of number formats, by column.");
}

}  // namespace qtoolkit::bindings
