// The values between steps: what is known of them beforehand, their shapes, and where they lie.
#pragma once

#include <cstdint>
#include <vector>

#include "engine/error.h"

namespace qtoolkit::engine {

enum class Type : uint8_t { codes, float32 };

// What a plan knows of a value before any shape. Inside a plan all codes are unsigned: int8 codes
// are kept as code + 128, with a zero point 128 higher, which changes no result.
struct ValueInfo {
  Type type = Type::codes;
  int32_t zero_point = 0;
};

// A batch of images in NHWC order. Rank 2 is [images, channels], rank 3 [images, height, channels],
// rank 4 [images, channels, height, width] in the user's order.
struct Shape {
  int64_t rank = 4;
  int64_t images = 1, height = 1, width = 1, channels = 1;

  int64_t rows() const { return images * height; }
  int64_t pixels() const { return images * height * width; }
  int64_t elements() const { return pixels() * channels; }
  std::vector<int64_t> sizes() const {
    if (rank == 2) return {images, channels};
    if (rank == 3) return {images, height, channels};
    return {images, channels, height, width};
  }
  bool operator==(const Shape&) const = default;
};

// From sizes in the user's order.
inline Shape shape_of(const std::vector<int64_t>& sizes) {
  require(sizes.size() >= 2 && sizes.size() <= 4, "a plan takes tensors of 2 to 4 dimensions, got ",
          sizes.size());
  Shape shape;
  shape.rank = static_cast<int64_t>(sizes.size());
  shape.images = sizes[0];
  shape.channels = shape.rank == 4 ? sizes[1] : sizes.back();
  if (shape.rank == 3) shape.height = sizes[1];
  if (shape.rank == 4) {
    shape.height = sizes[2];
    shape.width = sizes[3];
  }
  return shape;
}

// Pixels around each image that hold the zero point.
struct Border {
  int64_t height = 0, width = 0;
  bool operator==(const Border&) const = default;
};

// The memory of one run.
struct Memory {
  uint8_t* arena = nullptr;
  const void* const* inputs = nullptr;
  void* const* outputs = nullptr;
};

// Where a value lies, and how.
struct View {
  enum class Place : uint8_t { arena, input, output };

  Place place = Place::arena;
  int64_t start = 0;  // byte in the arena of the first element inside the border; else the number
                      // of the input or output
  Shape shape;
  Type type = Type::codes;
  int32_t zero_point = 0;
  Border border;
  int64_t image_stride = 0, row_stride = 0, pixel_stride = 0, channel_stride = 1;  // elements

  int64_t element_bytes() const { return type == Type::codes ? 1 : 4; }
  // Bytes in the arena, border included, and where they begin.
  int64_t bytes() const { return shape.images * image_stride * element_bytes(); }
  int64_t first_byte() const {
    return start - (border.height * row_stride + border.width * pixel_stride) * element_bytes();
  }

  const uint8_t* read(const Memory& memory) const {
    if (place == Place::input) return static_cast<const uint8_t*>(memory.inputs[start]);
    return place == Place::arena ? memory.arena + start
                                 : static_cast<const uint8_t*>(memory.outputs[start]);
  }
  uint8_t* write(const Memory& memory) const {
    return place == Place::arena ? memory.arena + start
                                 : static_cast<uint8_t*>(memory.outputs[start]);
  }
  // In elements from the first one: row `row` of all images.
  int64_t row_offset(int64_t row) const {
    return row / shape.height * image_stride + row % shape.height * row_stride;
  }
  // True if nothing but the border lies between rows.
  bool dense_pixels() const { return channel_stride == 1 && pixel_stride == shape.channels; }
};

// A view whose rows and images follow each other with only the border between.
inline View dense_view(const Shape& shape, Type type, Border border = {}) {
  View view;
  view.shape = shape;
  view.type = type;
  view.border = border;
  view.pixel_stride = shape.channels;
  view.row_stride = checked_product(shape.width + 2 * border.width, shape.channels);
  view.image_stride = checked_product(shape.height + 2 * border.height, view.row_stride);
  checked_product(checked_product(shape.images, view.image_stride), view.element_bytes());
  return view;
}

}  // namespace qtoolkit::engine
