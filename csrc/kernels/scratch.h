// Memory that a kernel needs while it runs.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// At least so many bytes at a cache line. They belong to the calling thread, which keeps them, and
// hold until its next call of this.
uint8_t* thread_scratch(int64_t bytes);

}  // namespace qtoolkit::kernels
