// The layouts of packed weights one by one; conv2d.h's functions choose between them.
#pragma once

#include "kernels/conv2d.h"

namespace qtoolkit::kernels {

void pack_quads(const Conv2dShape& shape, const int8_t* weight, int8_t* packed);
void unpack_quads(const Conv2dShape& shape, const int8_t* packed, int8_t* weight);

int64_t summed_quad_packed_bytes(const Conv2dShape& shape);
void pack_summed_quads(const Conv2dShape& shape, const int8_t* weight, int8_t* packed);
void unpack_summed_quads(const Conv2dShape& shape, const int8_t* packed, int8_t* weight);

// A multiple of 64.
int64_t step_packed_bytes(const Conv2dShape& shape, const int8_t* weight);
void pack_steps(const Conv2dShape& shape, const int8_t* weight, int8_t* packed);
void unpack_steps(const Conv2dShape& shape, const int8_t* packed, int8_t* weight);

}  // namespace qtoolkit::kernels
