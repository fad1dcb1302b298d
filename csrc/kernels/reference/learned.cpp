#include "kernels/learned.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "core/rounding.h"

namespace qtoolkit::kernels::reference {
namespace {

// The sum of term(i) for i in [begin, end), in the order of SumArgs.
template <class Term>
double sum_of(int64_t begin, int64_t end, Term term) {
  std::array<double, 16> lanes{};
  for (; begin < end; begin += 64) {
    std::array<float, 64> terms{};
    for (int64_t k = 0; k < std::min<int64_t>(64, end - begin); ++k) terms[k] = term(begin + k);
    for (int64_t k = 0; k < 16; ++k) {
      const float four = (terms[k] + terms[k + 16]) + (terms[k + 32] + terms[k + 48]);
      lanes[k] += static_cast<double>(four);
    }
  }
  for (int64_t half = 8; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) lanes[k] += lanes[k + half];
  }
  return lanes[0];
}

struct Terms {
  float grad_x = 0.0f, scale = 0.0f, outside = 0.0f;
};

Terms lsq_terms(const LsqBackwardArgs& args, int64_t i) {
  const int64_t c = i % args.sum.channels;
  const float grad = args.sum.grad[i], low = args.low[c], high = args.high[c];
  const float value = args.sum.x[i] * args.inverse_scale[c];
  const float rounded = round_half_even(value);
  if (std::isnan(value)) return {};
  if (rounded < low) return {0.0f, grad * low, grad};
  if (rounded > high) return {0.0f, grad * high, grad};
  return {grad, grad * (rounded - value), 0.0f};
}

}  // namespace

void fake_quantize_lsq_backward(const LsqBackwardArgs& args, int64_t begin, int64_t end) {
  const int64_t channels = args.sum.channels;
  for (int64_t i = begin * channels; i < end * channels; ++i) {
    const Terms terms = lsq_terms(args, i);
    args.sum.grad_x[i] = terms.grad_x;
    if (channels == 1) continue;
    args.scale_sums[i % channels] += static_cast<double>(terms.scale);
    args.outside_sums[i % channels] += static_cast<double>(terms.outside);
  }
  if (channels > 1) return;
  args.scale_sums[0] += sum_of(begin, end, [&](int64_t i) { return lsq_terms(args, i).scale; });
  args.outside_sums[0] += sum_of(begin, end, [&](int64_t i) { return lsq_terms(args, i).outside; });
}

void fake_quantize_pact_backward(const PactBackwardArgs& args, int64_t begin, int64_t end) {
  const float* x = args.sum.x;
  const float* grad = args.sum.grad;
  for (int64_t i = begin; i < end; ++i) {
    args.sum.grad_x[i] = x[i] >= 0.0f && x[i] < args.alpha ? grad[i] : 0.0f;
  }
  args.alpha_sum[0] +=
      sum_of(begin, end, [&](int64_t i) { return x[i] >= args.alpha ? grad[i] : 0.0f; });
}

}  // namespace qtoolkit::kernels::reference
