// The backward of fake-quantize with learned parameters: the gradient of x, and the sums that the
// gradients of the parameters are made of, in one pass.
//
// Sums have the same bits on every path: each is made of a fixed order of additions in double.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Memory seen as [rows, channels]: element i has channel i % channels. begin and end count rows.
//
// Channel c's terms are added to its sums in the order of rows. With one channel, terms are first
// added in float by fours: of each 64 in the order of the call, t[k] + t[k + 16] and t[k + 32] +
// t[k + 48], then those two, for k < 16 (terms that are missing are 0). These are added in order to
// s[k], 16 sums, which become one by halves: s[k] += s[k + 8], then 4, 2 and 1.
struct SumArgs {
  int64_t channels = 1;
  const float* x = nullptr;
  const float* grad = nullptr;
  float* grad_x = nullptr;  // may be grad
};

// Where low <= rne(x * inverse_scale) <= high, grad_x = grad and the term of scale_sums is
// grad * (rne(x * inverse_scale) - x * inverse_scale). Elsewhere grad_x = 0, the term of
// scale_sums is grad * low or grad * high, and that of outside_sums is grad. Where x is NaN,
// everything is 0.
struct LsqBackwardArgs {
  SumArgs sum;
  const float* inverse_scale = nullptr;  // [channels], 1.0f / scale
  const float* low = nullptr;            // [channels], integers: quant_min - zero_point
  const float* high = nullptr;           // [channels], integers: quant_max - zero_point
  double* scale_sums = nullptr;          // [channels]
  double* outside_sums = nullptr;        // [channels]
};
void fake_quantize_lsq_backward(const LsqBackwardArgs& args, int64_t begin, int64_t end);

// grad_x = grad where 0 <= x < alpha, else 0; the sum is that of grad where x >= alpha. One
// channel.
struct PactBackwardArgs {
  SumArgs sum;
  float alpha = 1.0f;
  double* alpha_sum = nullptr;  // [1]
};
void fake_quantize_pact_backward(const PactBackwardArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
