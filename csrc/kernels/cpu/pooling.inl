// Pooling in plain C++, compiled once for every baseline: the including file opens the path's
// namespace. No include guard and no includes, on purpose.

namespace {

// Calls tap(codes) for every position of output pixel (i, j)'s window in the image x.
template <class Args, class Tap>
inline void for_each_tap(const Args& args, const uint8_t* x, int64_t i, int64_t j, int64_t row_step,
                         int64_t column_step, Tap tap) {
  const int64_t row_bytes = (args.column_end[j] - args.column_begin[j]) * args.channels;
  x += args.column_begin[j] * args.channels;
  const uint8_t* end = x + args.row_end[i] * args.x_row_stride;
  for (x += args.row_begin[i] * args.x_row_stride; x < end; x += row_step * args.x_row_stride) {
    for (int64_t at = 0; at < row_bytes; at += column_step * args.channels) tap(x + at);
  }
}

// One output pixel at kLanes channels. x is the image at the first of them.
template <class Code>
struct MaxPixel {
  template <int64_t kLanes>
  static void compute(const MaxPool2dArgs& args, const uint8_t* x, int64_t i, int64_t j,
                      uint8_t* y) {
    // Vector types keep the maxima in registers; GCC 12 keeps an array of codes in memory.
    constexpr int64_t kBytes = kLanes < 16 ? kLanes : 16;
    constexpr int64_t kVectors = kLanes / kBytes;
    using Codes [[gnu::vector_size(kBytes)]] = Code;
    Codes largest[kVectors];
    const int64_t first = args.row_begin[i] * args.x_row_stride;
    __builtin_memcpy(largest, x + first + args.column_begin[j] * args.channels, kLanes);
    for_each_tap(args, x, i, j, args.row_step, args.column_step, [&](const uint8_t* tap) {
      Codes codes[kVectors];
      __builtin_memcpy(codes, tap, kLanes);
      for (int64_t k = 0; k < kVectors; ++k) {
        largest[k] = largest[k] > codes[k] ? largest[k] : codes[k];
      }
    });
    __builtin_memcpy(y, largest, kLanes);
  }
};

template <class Code>
struct AveragePixel {
  template <int64_t kLanes>
  static void compute(const AvgPool2dArgs& args, const uint8_t* x, int64_t i, int64_t j,
                      uint8_t* y) {
    const int64_t taps =
        (args.row_end[i] - args.row_begin[i]) * (args.column_end[j] - args.column_begin[j]);
    int32_t sum[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) sum[k] = -args.x_zero_point * static_cast<int32_t>(taps);
    for_each_tap(args, x, i, j, 1, 1, [&](const uint8_t* tap) {
      for (int64_t k = 0; k < kLanes; ++k) sum[k] += static_cast<Code>(tap[k]);
    });
    const int64_t divisor = args.row_divisor[i] * args.column_divisor[j];
    const float multiplier = static_cast<float>(args.multiplier / static_cast<double>(divisor));
    const int32_t zero_point = args.zero_point;
    const float low = static_cast<float>(args.lo - zero_point);
    const float high = static_cast<float>(args.hi - zero_point);
    uint8_t codes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      const float rounded = round_between(static_cast<float>(sum[k]) * multiplier, low, high);
      codes[k] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
    }
    __builtin_memcpy(y, codes, kLanes);
  }
};

// Computes every output pixel in blocks of kLanes channels (there are at least so many); the last
// block overlaps the one before it. args is a copy, which a store of bytes cannot change.
template <int64_t kLanes, class Pixel, class Args>
void pool_in_blocks(const Args args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* x = args.x + n * args.x_image_stride;
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    for (int64_t j = 0; j < args.out_width; ++j, y += args.channels) {
      for (int64_t next = 0; next < args.channels; next += kLanes) {
        const int64_t c = next + kLanes <= args.channels ? next : args.channels - kLanes;
        Pixel::template compute<kLanes>(args, x + c, i, j, y + c);
      }
    }
  }
}

template <class Pixel, class Args>
void pool(const Args& args, int64_t begin, int64_t end) {
  if (args.channels >= 64) {
    pool_in_blocks<64, Pixel>(args, begin, end);
  } else if (args.channels >= 16) {
    pool_in_blocks<16, Pixel>(args, begin, end);
  } else if (args.channels >= 4) {
    pool_in_blocks<4, Pixel>(args, begin, end);
  } else {
    pool_in_blocks<1, Pixel>(args, begin, end);
  }
}

}  // namespace

void max_pool2d(const MaxPool2dArgs& args, int64_t begin, int64_t end) {
  args.is_signed ? pool<MaxPixel<int8_t>>(args, begin, end)
                 : pool<MaxPixel<uint8_t>>(args, begin, end);
}

void avg_pool2d(const AvgPool2dArgs& args, int64_t begin, int64_t end) {
  args.x_signed ? pool<AveragePixel<int8_t>>(args, begin, end)
                : pool<AveragePixel<uint8_t>>(args, begin, end);
}
