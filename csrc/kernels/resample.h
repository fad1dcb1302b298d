// Which input positions an output position of upsampling and padding is made of, along one axis, as
// torch.nn.functional has them.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "kernels/upsample.h"

namespace qtoolkit::kernels {

// Nearest upsampling of in_size positions to out_size. With a factor (of output over input size)
// positions are computed from it, else from the sizes. `exact` looks up the middle of an output
// position, not its begin.
std::vector<int64_t> nearest_sources(int64_t in_size, int64_t out_size,
                                     std::optional<double> factor, bool exact);

// Linear interpolation. With align_corners the first and last positions are those of the input and
// the factor does not matter; else positions are the middles of equal intervals.
std::vector<LinearSource> linear_sources(int64_t in_size, int64_t out_size,
                                         std::optional<double> factor, bool align_corners);

enum class Padding : uint8_t { constant, reflect, replicate, circular };
// `before` and `after` may be negative: positions are cut off. -1 stands for the constant. Padding
// other than a constant is less than in_size for reflect, at most in_size for circular, and in_size
// is not 0.
std::vector<int64_t> padded_sources(int64_t in_size, int64_t before, int64_t after,
                                    Padding padding);

}  // namespace qtoolkit::kernels
