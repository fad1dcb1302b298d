// Bilinear interpolation in plain C++, compiled once for every baseline: the including file opens
// the path's namespace. No include guard and no includes, on purpose.

namespace {

// One output row at kLanes channels; x is the image, y the row, both at the first of them. What two
// input rows give in a column is kept while output pixels lie beside that column.
template <class Code, int64_t kLanes>
void interpolate_row(const UpsampleBilinear2dArgs& args, const LinearSource& row, const uint8_t* x,
                     uint8_t* y) {
  const uint8_t* const above = x + row.first * args.x_row_stride;
  const uint8_t* const below = x + row.second * args.x_row_stride;
  const float above_weight = row.first_weight, below_weight = row.second_weight;
  const int32_t x_zero_point = args.x_zero_point, zero_point = args.zero_point;
  const float low = static_cast<float>(args.lo - zero_point);
  const float high = static_cast<float>(args.hi - zero_point);
  const auto column = [=, channels = args.channels](int64_t at, float* result) {
    for (int64_t k = 0; k < kLanes; ++k) {
      const int32_t upper = static_cast<Code>(above[at * channels + k]) - x_zero_point;
      const int32_t lower = static_cast<Code>(below[at * channels + k]) - x_zero_point;
      result[k] =
          static_cast<float>(upper) * above_weight + static_cast<float>(lower) * below_weight;
    }
  };
  float left[kLanes] = {}, right[kLanes] = {};
  int64_t first = -1, second = -1;
  for (int64_t j = 0; j < args.out_width; ++j) {
    const LinearSource source = args.columns[j];
    if (source.first != first || source.second != second) {
      if (source.first == second) {
        __builtin_memcpy(left, right, sizeof(left));
      } else {
        column(source.first, left);
      }
      column(source.second, right);
      first = source.first;
      second = source.second;
    }
    uint8_t codes[kLanes];
    for (int64_t k = 0; k < kLanes; ++k) {
      const float value = left[k] * source.first_weight + right[k] * source.second_weight;
      const float rounded = round_between(value, low, high);
      codes[k] = static_cast<uint8_t>(static_cast<int32_t>(rounded) + zero_point);
    }
    __builtin_memcpy(y + j * args.channels, codes, kLanes);
  }
}

// In blocks of kLanes channels (there are at least so many); the last block overlaps the one before
// it. args is a copy, which a store of bytes cannot change.
template <class Code, int64_t kLanes>
void interpolate_rows(const UpsampleBilinear2dArgs args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* const x = args.x + n * args.x_image_stride;
    uint8_t* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    const LinearSource source = args.rows[i];
    for (int64_t next = 0; next < args.channels; next += kLanes) {
      const int64_t c = next + kLanes <= args.channels ? next : args.channels - kLanes;
      interpolate_row<Code, kLanes>(args, source, x + c, y + c);
    }
  }
}

template <class Code>
void interpolate(const UpsampleBilinear2dArgs& args, int64_t begin, int64_t end) {
  if (args.channels >= 16) {
    interpolate_rows<Code, 16>(args, begin, end);
  } else if (args.channels >= 4) {
    interpolate_rows<Code, 4>(args, begin, end);
  } else {
    interpolate_rows<Code, 1>(args, begin, end);
  }
}

}  // namespace

void upsample_bilinear2d(const UpsampleBilinear2dArgs& args, int64_t begin, int64_t end) {
  args.x_signed ? interpolate<int8_t>(args, begin, end) : interpolate<uint8_t>(args, begin, end);
}
