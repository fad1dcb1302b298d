#include "kernels/weight_only.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/rounding.h"
#include "core/value_range.h"

namespace qtoolkit::kernels::reference {
namespace {

// Where code `k` of group `part` stands in a row of activations.
int64_t position(const GroupedWeight& weight, const GroupPart& part, int64_t k) {
  const int64_t byte = k / weight.planes(), plane = k % weight.planes();
  const int64_t chunk = byte / kGroupedChunk * kGroupedChunk;
  const int64_t bytes = std::min(part.bytes - chunk, kGroupedChunk);
  return part.first_quad * 4 + chunk * weight.planes() + plane * bytes + byte - chunk;
}

int64_t lane_position(int64_t position, int64_t lane, int64_t lanes) {
  return (position / 4 * lanes + lane) * 4 + position % 4;
}

}  // namespace

void quantize_groups(const QuantizeGroupsArgs& args, int64_t begin, int64_t end) {
  const GroupedWeight& weight = args.weight;
  const int64_t quads = grouped_quads(weight), groups = weight.groups();
  for (int64_t block = begin; block < end; ++block) {
    int8_t* const codes = args.codes + block * quads * args.lanes * 4;
    std::fill_n(codes, quads * args.lanes * 4, int8_t{0});
    for (int64_t lane = 0; lane < args.lanes; ++lane) {
      const int64_t row = block * args.lanes + lane;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t out = (block * groups + g) * args.lanes + lane;
        args.scale[out] = 0.0f;
        args.sums[out] = 0;
        if (row >= args.rows) continue;
        const float* const x = args.x + row * args.x_row_stride + g * weight.group;
        const int64_t count = std::min(weight.group, weight.width - g * weight.group);
        ValueRange range{0.0f, 0.0f};
        bool finite = true;
        for (int64_t k = 0; k < count; ++k) {
          finite = finite && std::isfinite(x[k]);
          range = {std::min(range.min, x[k]), std::max(range.max, x[k])};
        }
        if (!finite) {
          args.scale[out] = std::numeric_limits<float>::quiet_NaN();
          continue;
        }
        const float scale = range_to_qparams(range, /*symmetric=*/true, -127, 127).scale;
        args.scale[out] = scale;
        const GroupPart part = group_part(weight, g);
        for (int64_t k = 0; k < count; ++k) {
          const int32_t code = quantize_value(x[k], 1.0f / scale, 0, -127, 127);
          codes[lane_position(position(weight, part, k), lane, args.lanes)] =
              static_cast<int8_t>(code);
          args.sums[out] += code;
        }
      }
    }
  }
}

void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end) {
  const GroupedWeight& weight = args.weight;
  const int64_t quads = grouped_quads(weight), groups = weight.groups();
  const int64_t last = std::min(end * kGroupedChannels, weight.channels);
  for (int64_t n = begin * kGroupedChannels; n < last; ++n) {
    for (int64_t m = 0; m < args.rows; ++m) {
      const int64_t block = m / args.lanes, lane = m % args.lanes;
      const int8_t* const x = args.x + block * quads * args.lanes * 4;
      float acc = 0.0f;
      for (int64_t g = 0; g < groups; ++g) {
        const GroupPart part = group_part(weight, g);
        const int64_t at = n * groups + g;
        const int32_t zero = weight.zero_point ? weight.zero_point[at] : weight.zero;
        int32_t sum = 0;
        const int64_t count = std::min(weight.group, weight.width - g * weight.group);
        for (int64_t k = 0; k < count; ++k) {
          const int64_t bit = (g * weight.group + k) * weight.bits;
          const int code =
              weight.codes[n * weight.row_stride + bit / 8] >> (bit % 8) & ((1 << weight.bits) - 1);
          const int32_t number = weight.table ? weight.table[code] : code;
          sum += (number - zero) * x[lane_position(position(weight, part, k), lane, args.lanes)];
        }
        const float scale =
            weight.scale[at] * args.x_scale[(block * groups + g) * args.lanes + lane];
        acc = std::fma(static_cast<float>(sum), scale, acc);
      }
      args.y[m * args.y_row_stride + n] = args.bias ? acc + args.bias[n] : acc;
    }
  }
}

}  // namespace qtoolkit::kernels::reference
