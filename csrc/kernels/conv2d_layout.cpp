#include "kernels/conv2d.h"
#include "kernels/conv2d_pack.h"
#include "kernels/conv2d_steps.h"
#include "kernels/conv2d_winograd.h"
#include "kernels/path.h"

namespace qtoolkit::kernels {

Conv2dLayout conv2d_layout(const Conv2dShape& shape) {
  const bool steps = selected_path(Kernel::conv2d) == Path::avx2 && !winograd_fits(shape);
  return steps ? Conv2dLayout::steps : Conv2dLayout::quads;
}

int64_t conv2d_packed_bytes(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight) {
  return layout == Conv2dLayout::steps ? step_packed_bytes(shape, weight) : shape.packed_bytes();
}

const int8_t* conv2d_packed_block(Conv2dLayout layout, const Conv2dShape& shape,
                                  const int8_t* packed, int64_t block) {
  constexpr auto kStepLists = kListsPerBlock * static_cast<int64_t>(sizeof(Conv2dStepList));
  const int64_t blocks = shape.groups * shape.blocks_per_group();
  return packed +
         block * (layout == Conv2dLayout::steps ? kStepLists : shape.packed_bytes() / blocks);
}

void pack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* weight,
                        int8_t* packed) {
  (layout == Conv2dLayout::steps ? pack_steps : pack_quads)(shape, weight, packed);
}

void unpack_conv2d_weight(Conv2dLayout layout, const Conv2dShape& shape, const int8_t* packed,
                          int8_t* weight) {
  (layout == Conv2dLayout::steps ? unpack_steps : unpack_quads)(shape, packed, weight);
}

}  // namespace qtoolkit::kernels
