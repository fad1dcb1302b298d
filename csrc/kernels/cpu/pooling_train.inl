// Max pooling for training in plain C++ with vector types, compiled once for every baseline: the
// including file opens the path's namespace. No include guard and no includes, on purpose.

namespace {

template <int64_t kLanes>
struct Vectors {
  using Float [[gnu::vector_size(4 * kLanes)]] = float;
  using Int [[gnu::vector_size(4 * kLanes)]] = int32_t;
  using Byte [[gnu::vector_size(kLanes)]] = uint8_t;
};

// A tap of one axis that lies inside the other tensor: its number, and the place there.
struct Reach {
  int64_t tap, place;
};

// The taps of window i of one axis that lie inside the input.
inline int64_t taps_of_window(int64_t i, int64_t kernel, int64_t stride, int64_t padding,
                              int64_t dilation, int64_t size, Reach* reach) {
  int64_t count = 0;
  for (int64_t t = 0; t < kernel; ++t) {
    const int64_t place = i * stride - padding + t * dilation;
    if (place >= 0 && place < size) reach[count++] = {t, place};
  }
  return count;
}

// The windows of one axis that have a tap on input element `place`, in their order.
inline int64_t windows_on(int64_t place, int64_t kernel, int64_t stride, int64_t padding,
                          int64_t dilation, int64_t out_size, Reach* reach) {
  int64_t count = 0;
  for (int64_t t = kernel - 1; t >= 0; --t) {
    const int64_t start = place + padding - t * dilation;
    if (start >= 0 && start % stride == 0 && start / stride < out_size) {
      reach[count++] = {t, start / stride};
    }
  }
  return count;
}

constexpr int64_t kMostTaps = 256;

template <int64_t kLanes>
inline void forward_pixel(const MaxPool2dTrainArgs& args, const float* image, const Reach* rows,
                          int64_t row_count, const Reach* columns, int64_t column_count, float* y,
                          uint8_t* taps) {
  using V = Vectors<kLanes>;
  const auto number = [&](int64_t r, int64_t k) {
    return static_cast<int32_t>(rows[r].tap * args.column_kernel + columns[k].tap);
  };
  const auto load = [&](int64_t r, int64_t k, typename V::Float& value) {
    const int64_t pixel = rows[r].place * args.width + columns[k].place;
    __builtin_memcpy(&value, image + pixel * args.channels, sizeof value);
  };
  typename V::Float largest, value;
  load(0, 0, largest);
  typename V::Int place = typename V::Int{} + number(0, 0);
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t k = r == 0 ? 1 : 0; k < column_count; ++k) {
      load(r, k, value);
      const typename V::Int greater = (value > largest) | (value != value);
      largest = greater ? value : largest;
      place = greater ? typename V::Int{} + number(r, k) : place;
    }
  }
  __builtin_memcpy(y, &largest, sizeof largest);
  const auto bytes = __builtin_convertvector(place, typename V::Byte);
  __builtin_memcpy(taps, &bytes, sizeof bytes);
}

template <int64_t kLanes>
inline void backward_pixel(const MaxPool2dTrainArgs& args, int64_t first_pixel, const Reach* rows,
                           int64_t row_count, const Reach* columns, int64_t column_count, int64_t c,
                           float* grad_x) {
  using V = Vectors<kLanes>;
  typename V::Float sum = {};
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t k = 0; k < column_count; ++k) {
      const int64_t at =
          (first_pixel + rows[r].place * args.out_width + columns[k].place) * args.channels + c;
      typename V::Float grad;
      typename V::Byte taps;
      __builtin_memcpy(&grad, args.grad + at, sizeof grad);
      __builtin_memcpy(&taps, args.taps + at, sizeof taps);
      const int32_t t = static_cast<int32_t>(rows[r].tap * args.column_kernel + columns[k].tap);
      const typename V::Int here = __builtin_convertvector(taps, typename V::Int) == t;
      sum = here ? sum + grad : sum;
    }
  }
  __builtin_memcpy(grad_x, &sum, sizeof sum);
}

// Calls block<lanes>(first channel) for all channels: blocks of 16, then of 4, then single ones.
template <class Block>
inline void for_channel_blocks(int64_t channels, Block block) {
  int64_t c = 0;
  for (; c + 16 <= channels; c += 16) block.template operator()<16>(c);
  for (; c + 4 <= channels; c += 4) block.template operator()<4>(c);
  for (; c < channels; ++c) block.template operator()<1>(c);
}

}  // namespace

void max_pool2d_train(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end) {
  Reach rows[kMostTaps], columns[kMostTaps];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const float* image = args.x + n * args.height * args.width * args.channels;
    const int64_t row_count = taps_of_window(i, args.row_kernel, args.row_stride, args.row_padding,
                                             args.row_dilation, args.height, rows);
    for (int64_t j = 0; j < args.out_width; ++j) {
      const int64_t column_count =
          taps_of_window(j, args.column_kernel, args.column_stride, args.column_padding,
                         args.column_dilation, args.width, columns);
      const int64_t at = (row * args.out_width + j) * args.channels;
      for_channel_blocks(args.channels, [&]<int64_t kLanes>(int64_t c) {
        forward_pixel<kLanes>(args, image + c, rows, row_count, columns, column_count,
                              args.y + at + c, args.taps + at + c);
      });
    }
  }
}

void max_pool2d_train_backward(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end) {
  Reach rows[kMostTaps], columns[kMostTaps];
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, h = row % args.height;
    const int64_t first_pixel = n * args.out_height * args.out_width;
    const int64_t row_count = windows_on(h, args.row_kernel, args.row_stride, args.row_padding,
                                         args.row_dilation, args.out_height, rows);
    for (int64_t w = 0; w < args.width; ++w) {
      const int64_t column_count =
          windows_on(w, args.column_kernel, args.column_stride, args.column_padding,
                     args.column_dilation, args.out_width, columns);
      float* grad_x = args.grad_x + (row * args.width + w) * args.channels;
      for_channel_blocks(args.channels, [&]<int64_t kLanes>(int64_t c) {
        backward_pixel<kLanes>(args, first_pixel, rows, row_count, columns, column_count, c,
                               grad_x + c);
      });
    }
  }
}
