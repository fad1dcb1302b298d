// The multiply-adds that a CPU can do at most: loops of the instruction that a convolution path is
// made of, which touch no memory.
#pragma once

#include <optional>

#include "kernels/path.h"

namespace qtoolkit::benchmarks {

struct Peak {
  const char* instruction;
  void (*run)();
  double macs;  // of one run, which takes some 10 microseconds
};

// That of a path whose instruction is known; the CPU must have it.
std::optional<Peak> peak_of(kernels::Path path);

}  // namespace qtoolkit::benchmarks
