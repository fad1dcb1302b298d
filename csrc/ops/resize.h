// The output size of upsampling operators.
#pragma once

#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "ops/checks.h"

namespace qtoolkit::ops {

using OptionalSizes = at::OptionalSymIntArrayRef;
using OptionalFactors = std::optional<c10::ArrayRef<double>>;

struct ResizedImage {
  std::array<c10::SymInt, 4> sizes;
  // Output over input size, where that is what the caller gave.
  std::optional<double> height_factor, width_factor;
};

// x is [N, C, H, W]; either `size` or `scale_factors` holds two numbers.
inline ResizedImage resize(const char* op, const Tensor& x, OptionalSizes size,
                           OptionalFactors scale_factors) {
  check_codes(op, "x", x);
  check_rank(op, "x", x, 4);
  TORCH_CHECK_VALUE(size.has_value() != scale_factors.has_value(), "qtoolkit::", op,
                    ": give either size or scale_factors");
  TORCH_CHECK_VALUE((size ? size->size() : scale_factors->size()) == 2, "qtoolkit::", op,
                    ": size and scale_factors must hold two numbers, for height and width");
  ResizedImage image{
      .sizes = {x.sym_size(0), x.sym_size(1), 0, 0}, .height_factor = {}, .width_factor = {}};
  for (size_t i = 0; i < 2; ++i) {
    const c10::SymInt in_size = x.sym_size(static_cast<int64_t>(i) + 2);
    TORCH_CHECK_VALUE(in_size > 0, "qtoolkit::", op, ": only the batch of x may be empty, got ",
                      describe(x));
    c10::SymInt& out_size = image.sizes[i + 2];
    if (size) {
      out_size = (*size)[i];
    } else {
      const double factor = (*scale_factors)[i];
      constexpr double kMost = std::numeric_limits<int32_t>::max();
      TORCH_CHECK_VALUE(factor > 0 && factor <= kMost, "qtoolkit::", op,
                        ": scale_factors must be positive and finite, got ", factor);
      (i == 0 ? image.height_factor : image.width_factor) = factor;
      out_size = factor == std::floor(factor)
                     ? in_size * static_cast<int64_t>(factor)
                     : c10::SymInt(static_cast<int64_t>(
                           static_cast<double>(in_size.guard_int(__FILE__, __LINE__)) * factor));
    }
    TORCH_CHECK_VALUE(out_size > 0, "qtoolkit::", op, ": the output would be empty: ", out_size,
                      " from ", in_size);
  }
  return image;
}

}  // namespace qtoolkit::ops
