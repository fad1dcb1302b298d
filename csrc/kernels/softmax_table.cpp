#include "core/activation.h"
#include "kernels/softmax.h"

namespace qtoolkit::kernels {
namespace {

// exp(-scale * difference), accurate to float32's last place. What is below 1e-15 is 0: then no
// product is subnormal, which would be slow, and 0 where the program flushes such numbers.
float exponential(float scale, int difference) {
  const double power = static_cast<double>(scale) * difference;
  if (power > 34.5) return 0.0f;
  const auto rounded = static_cast<float>(power);
  const auto rest = static_cast<float>(power - static_cast<double>(rounded));
  return activation_parts::exp_minus<float, int32_t>(rounded, rest);
}

}  // namespace

SoftmaxTable softmax_table(float scale) {
  SoftmaxTable table;
  for (int i = 0; i < 16; ++i) {
    table.high[i] = exponential(scale, 16 * i);
    table.low[i] = exponential(scale, i);
  }
  return table;
}

}  // namespace qtoolkit::kernels
