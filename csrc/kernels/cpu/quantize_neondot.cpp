// 16 elements of one channel at a time; channels that lie side by side take the plain loops.
#include "kernels/cpu/codes_neon.h"
#include "kernels/cpu/rounding.h"
#include "kernels/quantize.h"

namespace qtoolkit::kernels::neondot {
namespace plain {
#include "kernels/cpu/quantize.inl"
}  // namespace plain

namespace {

// Calls run(first, count, channel) for the elements of one channel in a row.
template <class Run>
void for_each_run(const QuantizeArgs& args, int64_t begin, int64_t end, Run run) {
  while (begin < end) {
    const int64_t row_end = args.channels == 1 ? end : (begin / args.inner + 1) * args.inner;
    const int64_t run_end = row_end < end ? row_end : end;
    run(begin, run_end - begin, args.channels == 1 ? 0 : begin / args.inner % args.channels);
    begin = run_end;
  }
}

bool has_runs(const QuantizeArgs& args) { return args.channels == 1 || args.inner >= kCodes; }

}  // namespace

void quantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  if (!has_runs(args)) return plain::quantize(args, begin, end);
  for_each_run(args, begin, end, [&](int64_t first, int64_t count, int64_t channel) {
    quantize_codes(args.x + first, count, 1.0f / args.scale[channel],
                   CodesOut(args.zero_point[channel], args.quant_min, args.quant_max),
                   args.y_codes + first);
  });
}

void dequantize(const QuantizeArgs& args, int64_t begin, int64_t end) {
  if (!has_runs(args)) return plain::dequantize(args, begin, end);
  for_each_run(args, begin, end, [&](int64_t first, int64_t count, int64_t channel) {
    dequantize_codes(args.codes + first, count, args.scale[channel],
                     CodesIn(args.quant_min < 0, args.zero_point[channel]), args.y + first);
  });
}

}  // namespace qtoolkit::kernels::neondot
