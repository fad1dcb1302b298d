// The range by fmin and fmax, which the portable vectors have no word for, and 16 codes at a time.
#include "kernels/cpu/codes_neon.h"
#include "kernels/cpu/rounding.h"
#include "kernels/quantize_rows.h"

#define QT_VECTOR_BYTES 16

namespace qtoolkit::kernels::neondot {
namespace plain {
#include "kernels/cpu/quantize_rows.inl"
}  // namespace plain

namespace {

constexpr int64_t kLanes = 4;
constexpr int kUnroll = 4;  // hides the latency of fmin and fmax

// As plain::extremes_of, but for the sign of a zero, which changes neither scale nor zero point,
// and a row with a NaN, whose magnitude tells.
plain::Extremes<float, int32_t> extremes_of(const float* x, int64_t count) {
  float32x4_t low[kUnroll] = {}, high[kUnroll] = {};
  int64_t i = 0;
  for (; i + kLanes * kUnroll <= count; i += kLanes * kUnroll) {
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const float32x4_t values = vld1q_f32(x + i + u * kLanes);
      low[u] = vminq_f32(low[u], values);
      high[u] = vmaxq_f32(high[u], values);
    }
  }
  for (int u = 1; u < kUnroll; ++u) {
    low[0] = vminq_f32(low[0], low[u]);
    high[0] = vmaxq_f32(high[0], high[u]);
  }
  plain::Extremes<float, int32_t> result;
  // A NaN comes out of every minimum and maximum, an infinity is one of them.
  result.take(vminvq_f32(low[0]));
  result.take(vmaxvq_f32(high[0]));
  for (; i < count; ++i) result.take(x[i]);
  return result;
}

}  // namespace

void quantize_rows(const QuantizeRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float* x = args.x + row * args.x_row_stride;
    uint8_t* codes = args.codes + row * args.codes_row_stride;
    const auto extremes = extremes_of(x, args.width);
    if (extremes.magnitude >= plain::kInfinityBits) {
      args.scale[row] = __builtin_nanf("");
      args.zero_point[row] = 0;
      __builtin_memset(codes, 0, static_cast<size_t>(args.width));
      continue;
    }
    plain::choose_qparams(extremes.low, extremes.high, args.scale[row], args.zero_point[row]);
    quantize_codes(x, args.width, 1.0f / args.scale[row], CodesOut(args.zero_point[row], 0, 255),
                   codes);
  }
}

}  // namespace qtoolkit::kernels::neondot
