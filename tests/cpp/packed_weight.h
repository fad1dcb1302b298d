// The weights of a call, packed for the path that is forced when they are packed.
#pragma once

#include <cstdint>
#include <optional>

#include "guarded_buffer.h"
#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

// Packs args.weight, in the path's layout unless one is given; the result must outlive the calls.
inline testing::GuardedBuffer<int8_t> pack_weight(Conv2dArgs& args,
                                                  std::optional<Conv2dLayout> layout = {}) {
  args.layout = layout ? *layout : conv2d_layout(args.shape);
  testing::GuardedBuffer<int8_t> packed(conv2d_packed_bytes(args.layout, args.shape, args.weight));
  pack_conv2d_weight(args.layout, args.shape, args.weight, packed.data());
  args.packed = packed.data();
  return packed;
}

inline testing::GuardedBuffer<int8_t> pack_depthwise_weight(Conv2dArgs& args) {
  const Conv2dShape& s = args.shape;
  testing::GuardedBuffer<int8_t> packed(s.groups * s.kernel_height * s.kernel_width);
  pack_conv2d_depthwise_weight(s, args.weight, packed.data());
  args.packed = packed.data();
  return packed;
}

}  // namespace qtoolkit::kernels
