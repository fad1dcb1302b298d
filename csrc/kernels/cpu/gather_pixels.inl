// Moving whole pixels in plain C++, compiled once for every baseline: the including file opens the
// path's namespace. No include guard and no includes, on purpose.

namespace {

// Writes a pixel `times` times, in blocks of kBytes of its at least so many bytes; the last block
// overlaps the one before it.
template <int64_t kBytes>
inline void repeat_pixel(const uint8_t* x, uint8_t* y, int64_t channels, int64_t times) {
  struct Block {
    uint8_t bytes[kBytes];
  };
  for (int64_t next = 0; next < channels; next += kBytes) {
    const int64_t c = next + kBytes <= channels ? next : channels - kBytes;
    Block block;
    __builtin_memcpy(&block, x + c, kBytes);
    for (int64_t k = 0; k < times; ++k) __builtin_memcpy(y + k * channels + c, &block, kBytes);
  }
}

template <int64_t kBytes>
void gather_row(const GatherPixelsArgs& args, const uint8_t* x, uint8_t* y) {
  const int64_t channels = args.channels, width = args.out_width;
  const int64_t* from = args.column_from;
  for (int64_t j = 0, end = 1; j < width; j = end++) {
    uint8_t* const to = y + j * channels;
    if (from[j] < 0) {
      while (end < width && from[end] < 0) ++end;
      __builtin_memset(to, args.fill, (end - j) * channels);
      continue;
    }
    const uint8_t* const pixel = x + from[j] * channels;
    if (end == width || from[end] != from[j] + 1) {
      while (end < width && from[end] == from[j]) ++end;
      repeat_pixel<kBytes>(pixel, to, channels, end - j);
      continue;
    }
    while (end < width && from[end] == from[j] + end - j) ++end;
    __builtin_memcpy(to, pixel, (end - j) * channels);
  }
}

template <int64_t kBytes>
void gather_rows(const GatherPixelsArgs args, int64_t begin, int64_t end) {
  const int64_t row_bytes = args.out_width * args.channels;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const int64_t from = args.row_from[i];
    uint8_t* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    if (from < 0) {
      __builtin_memset(y, args.fill, row_bytes);
    } else if (row > begin && i > 0 && args.row_from[i - 1] == from) {
      __builtin_memcpy(y, y - args.y_row_stride, row_bytes);
    } else {
      gather_row<kBytes>(args, args.x + n * args.x_image_stride + from * args.x_row_stride, y);
    }
  }
}

}  // namespace

void gather_pixels(const GatherPixelsArgs& args, int64_t begin, int64_t end) {
  if (args.channels >= 64) {
    gather_rows<64>(args, begin, end);
  } else if (args.channels >= 16) {
    gather_rows<16>(args, begin, end);
  } else if (args.channels >= 4) {
    gather_rows<4>(args, begin, end);
  } else {
    gather_rows<1>(args, begin, end);
  }
}
