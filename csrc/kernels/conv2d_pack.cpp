#include "kernels/conv2d_pack.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace qtoolkit::kernels {
namespace {

// Calls visit(index in the canonical weight, index in the packed one) for every weight.
template <class Visit>
void for_each_weight(const Conv2dShape& s, const Visit& visit) {
  const int64_t taps_per_run = s.kernel_width / s.runs_per_row();
  int64_t from = 0;
  for (int64_t group = 0; group < s.groups; ++group) {
    for (int64_t channel = 0; channel < s.out_channels; ++channel) {
      const int64_t block = group * s.blocks_per_group() + channel / kChannelBlock;
      const int64_t lane = channel % kChannelBlock;
      for (int64_t i = 0; i < s.in_channels; ++i) {
        for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
          const int64_t row = (block * s.kernel_height + ky) * s.runs_per_row();
          for (int64_t kx = 0; kx < s.kernel_width; ++kx) {
            const int64_t byte = kx % taps_per_run * s.in_channels + i;
            const int64_t quad = (row + kx / taps_per_run) * s.run_quads() + byte / 4;
            visit(from++, (quad * kChannelBlock + lane) * 4 + byte % 4);
          }
        }
      }
    }
  }
}

int64_t blocks_of(const Conv2dShape& s) { return s.groups * s.blocks_per_group(); }

// Where a byte of the quads lies when each block begins with its sums.
int64_t after_sums(const Conv2dShape& s, int64_t at) {
  return at + (at / (s.packed_bytes() / blocks_of(s)) + 1) * kBlockSumBytes;
}

template <class Visit>
void for_each_depthwise_weight(const Conv2dShape& s, const Visit& visit) {
  const int64_t taps = s.kernel_height * s.kernel_width;
  for (int64_t channel = 0; channel < s.groups; ++channel) {
    for (int64_t tap = 0; tap < taps; ++tap) visit(channel * taps + tap, tap * s.groups + channel);
  }
}

}  // namespace

void pack_quads(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  std::fill_n(packed, shape.packed_bytes(), int8_t{0});
  for_each_weight(shape, [&](int64_t i, int64_t at) { packed[at] = weight[i]; });
}

void unpack_quads(const Conv2dShape& shape, const int8_t* packed, int8_t* weight) {
  for_each_weight(shape, [&](int64_t i, int64_t at) { weight[i] = packed[at]; });
}

int64_t summed_quad_packed_bytes(const Conv2dShape& shape) {
  return shape.packed_bytes() + blocks_of(shape) * kBlockSumBytes;
}

void pack_summed_quads(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  const int64_t bytes = shape.packed_bytes() / blocks_of(shape);  // of a block's quads
  std::fill_n(packed, summed_quad_packed_bytes(shape), int8_t{0});
  std::vector<uint32_t> sums(static_cast<size_t>(shape.padded_channels()));
  for_each_weight(shape, [&](int64_t i, int64_t at) {
    packed[after_sums(shape, at)] = weight[i];
    const int64_t channel = at / bytes * kChannelBlock + at / 4 % kChannelBlock;
    sums[static_cast<size_t>(channel)] += 128 * static_cast<uint32_t>(weight[i]);
  });
  for (int64_t block = 0; block < blocks_of(shape); ++block) {
    std::memcpy(packed + block * (kBlockSumBytes + bytes), &sums[block * kChannelBlock],
                kBlockSumBytes);
  }
}

void unpack_summed_quads(const Conv2dShape& shape, const int8_t* packed, int8_t* weight) {
  for_each_weight(shape, [&](int64_t i, int64_t at) { weight[i] = packed[after_sums(shape, at)]; });
}

void pack_conv2d_depthwise_weight(const Conv2dShape& shape, const int8_t* weight, int8_t* packed) {
  for_each_depthwise_weight(shape, [&](int64_t i, int64_t at) { packed[at] = weight[i]; });
}

void unpack_conv2d_depthwise_weight(const Conv2dShape& shape, const int8_t* packed,
                                    int8_t* weight) {
  for_each_depthwise_weight(shape, [&](int64_t i, int64_t at) { weight[i] = packed[at]; });
}

}  // namespace qtoolkit::kernels
