#include "kernels/conv2d.h"
#include "kernels/conv2d_pack.h"
#include "kernels/conv2d_steps.h"
#include "kernels/conv2d_winograd.h"
#include "kernels/path.h"

namespace qtoolkit::kernels {

Conv2dLayout conv2d_layout(const Conv2dShape& shape) {
  const Path path = selected_path(Kernel::conv2d);
  if (path == Path::neondot) return Conv2dLayout::summed_quads;
  const bool steps = path == Path::avx2 && !winograd_fits(shape);
  return steps ? Conv2dLayout::steps : Conv2dLayout::quads;
}

int64_t conv2d_packed_bytes(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight) {
  switch (layout) {
    case Conv2dLayout::steps:
      return step_packed_bytes(shape, weight);
    case Conv2dLayout::summed_quads:
      return summed_quad_packed_bytes(shape);
    default:
      return shape.packed_bytes();
  }
}

const int8_t* conv2d_packed_block(Conv2dLayout layout, const Conv2dShape& shape,
                                  const int8_t* packed, int64_t block) {
  constexpr auto kStepLists = kListsPerBlock * static_cast<int64_t>(sizeof(Conv2dStepList));
  const int64_t quads = shape.packed_bytes() / (shape.groups * shape.blocks_per_group());
  switch (layout) {
    case Conv2dLayout::steps:
      return packed + block * kStepLists;
    case Conv2dLayout::summed_quads:
      return packed + block * (kBlockSumBytes + quads);
    default:
      return packed + block * quads;
  }
}

void pack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight,
                        int8_t* packed) {
  switch (layout) {
    case Conv2dLayout::steps:
      return pack_steps(shape, weight, packed);
    case Conv2dLayout::summed_quads:
      return pack_summed_quads(shape, weight, packed);
    default:
      return pack_quads(shape, weight, packed);
  }
}

void unpack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* packed,
                          int8_t* weight) {
  switch (layout) {
    case Conv2dLayout::steps:
      return unpack_steps(shape, packed, weight);
    case Conv2dLayout::summed_quads:
      return unpack_summed_quads(shape, packed, weight);
    default:
      return unpack_quads(shape, packed, weight);
  }
}

}  // namespace qtoolkit::kernels
