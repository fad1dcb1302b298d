#include "kernels/pooling_train.h"

#include <cmath>
#include <cstdint>
#include <limits>

namespace qtoolkit::kernels::reference {

void max_pool2d_train(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end) {
  const int64_t taps = args.row_kernel * args.column_kernel;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    for (int64_t j = 0; j < args.out_width; ++j) {
      for (int64_t c = 0; c < args.channels; ++c) {
        float largest = -std::numeric_limits<float>::infinity();
        int64_t place = -1;
        for (int64_t t = 0; t < taps; ++t) {
          const int64_t h =
              i * args.row_stride - args.row_padding + t / args.column_kernel * args.row_dilation;
          const int64_t w = j * args.column_stride - args.column_padding +
                            t % args.column_kernel * args.column_dilation;
          if (h < 0 || h >= args.height || w < 0 || w >= args.width) continue;
          const float value = args.x[((n * args.height + h) * args.width + w) * args.channels + c];
          if (place < 0 || value > largest || std::isnan(value)) {
            largest = value;
            place = t;
          }
        }
        const int64_t at = (row * args.out_width + j) * args.channels + c;
        args.y[at] = largest;
        args.taps[at] = static_cast<uint8_t>(place);
      }
    }
  }
}

void max_pool2d_train_backward(const MaxPool2dTrainArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, h = row % args.height;
    for (int64_t w = 0; w < args.width; ++w) {
      for (int64_t c = 0; c < args.channels; ++c) {
        float sum = 0.0f;
        for (int64_t i = 0; i < args.out_height; ++i) {
          for (int64_t j = 0; j < args.out_width; ++j) {
            const int64_t at = ((n * args.out_height + i) * args.out_width + j) * args.channels + c;
            const int64_t t = args.taps[at];
            const bool here = h == i * args.row_stride - args.row_padding +
                                       t / args.column_kernel * args.row_dilation &&
                              w == j * args.column_stride - args.column_padding +
                                       t % args.column_kernel * args.column_dilation;
            if (here) sum += args.grad[at];
          }
        }
        args.grad_x[((n * args.height + h) * args.width + w) * args.channels + c] = sum;
      }
    }
  }
}

}  // namespace qtoolkit::kernels::reference
