// Sixteen channels at a time. sdot adds four taps of each channel: four input rows of one column,
// a quad, whose bytes are interleaved once and then serve every output that has the column in its
// window: as many as the kernel is wide, in as many output rows as fit the quad's rows (a kernel of
// three rows leaves one for a second output row). So a strip of output rows first interleaves its
// columns into memory that stays in the first-level cache, then multiplies.
#include <arm_neon.h>

#include "kernels/cpu/conv2d_output_neon.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::neondot {
namespace {

constexpr int64_t kChannels = 16;
constexpr int64_t kQuadBytes = 4 * kChannels;
constexpr int64_t kMostWeights = 8192;     // bytes of a strip's weights
constexpr int64_t kMostColumns = 16384;    // bytes of its interleaved columns
constexpr int64_t kMostRows = 16;          // of its input
constexpr int64_t kBandBytes = 128 << 10;  // of the input between two blocks of channels
constexpr int kPixels = 4;                 // outputs at once

// How a layer is cut into strips.
struct Strip {
  explicit Strip(const Conv2dArgs& args)
      : quads((args.shape.kernel_height + 3) / 4),
        width(args.shape.kernel_width),
        // Kernel rows of all output rows lie in the strip's if none is skipped.
        rows(args.shape.dilation_height == 1
                 ? (4 * quads - args.shape.kernel_height) / args.shape.stride_height + 1
                 : 1),
        row_quads(quads * width) {}

  bool fits(const Conv2dShape& s) const {
    return 4 * quads <= kMostRows && rows * row_quads * kQuadBytes <= kMostWeights &&
           quads * ((width - 1) * s.dilation_width + 1) * kQuadBytes <= kMostColumns;
  }

  int64_t quads;      // of input rows
  int64_t width;      // of the kernel
  int64_t rows;       // of the output
  int64_t row_quads;  // of weights for an output row
};

// A block of channels.
struct Block {
  int8_t weight[kMostWeights];  // [rows][quads][width][kChannels][4]
  int32x4_t start[4];
  float32x4_t multiplier[4];
  int64_t channel;  // the first
};

void prepare(const Conv2dArgs& args, const Strip& strip, int64_t channel, Block& block) {
  const Conv2dShape& s = args.shape;
  // The last block may begin earlier and compute some channels again.
  block.channel = channel + kChannels <= s.groups ? channel : s.groups - kChannels;
  int8_t* to = block.weight;
  for (int64_t r = 0; r < strip.rows; ++r) {
    for (int64_t quad = 0; quad < strip.quads; ++quad) {
      for (int64_t kx = 0; kx < strip.width; ++kx, to += kQuadBytes) {
        uint8x16_t taps[4];
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t ky = quad * 4 + i - r * s.stride_height;
          taps[i] = vdupq_n_u8(0);
          if (ky < 0 || ky >= s.kernel_height) continue;
          taps[i] = vreinterpretq_u8_s8(
              vld1q_s8(args.packed + (ky * strip.width + kx) * s.groups + block.channel));
        }
        int8x16_t quads[4];
        interleave(taps, quads);
        for (int v = 0; v < 4; ++v) vst1q_s8(to + 16 * v, quads[v]);
      }
    }
  }
  for (int v = 0; v < 4; ++v) {
    // Codes are multiplied less 128: see conv2d_neondot.cpp.
    int32x4_t sum = vdupq_n_s32(0);
    for (int64_t quad = 0; quad < strip.row_quads; ++quad) {
      sum = vdotq_s32(sum, vld1q_s8(block.weight + quad * kQuadBytes + 16 * v), vdupq_n_s8(1));
    }
    const int64_t c = block.channel + v * kLanes;
    block.start[v] = vaddq_s32(vld1q_s32(args.offset + c), vshlq_n_s32(sum, 7));
    block.multiplier[v] = vld1q_f32(args.multiplier + c);
  }
}

// Interleaves `count` columns of four rows each.
void interleave_columns(const uint8_t* const (&rows)[4], int64_t step, int64_t count, int8_t* to) {
  const uint8x16_t bit = vdupq_n_u8(128);
  int64_t at = 0;
  for (int64_t column = 0; column < count; ++column, at += step, to += kQuadBytes) {
    uint8x16_t taps[4];
    int8x16_t quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) taps[i] = veorq_u8(vld1q_u8(rows[i] + at), bit);
    interleave(taps, quads);
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) vst1q_s8(to + 16 * v, quads[v]);
  }
}

// Where the columns of a strip and one output row's weights lie, and how to go on.
struct Columns {
  const int8_t* x;
  const int8_t* weight;
  int64_t quads, width;  // of the kernel
  int64_t quad_step;     // bytes from a column's quad to its next rows'
  int64_t tap_step;      // to the next tap's column
  int64_t pixel_step;    // to the next output's first column
};

// Sums of kCount neighbouring outputs, any kernel.
template <int kCount>
inline __attribute__((always_inline)) void multiply(const Columns& columns,
                                                    int32x4_t (&acc)[kCount][4]) {
  const int8_t* w = columns.weight;
  for (int64_t quad = 0; quad < columns.quads; ++quad) {
    const int8_t* x = columns.x + quad * columns.quad_step;
    for (int64_t kx = 0; kx < columns.width; ++kx, x += columns.tap_step, w += kQuadBytes) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) {
        const int8x16_t weight = vld1q_s8(w + 16 * v);
#pragma GCC unroll 4
        for (int p = 0; p < kCount; ++p) {
          acc[p][v] = vdotq_s32(acc[p][v], weight, vld1q_s8(x + p * columns.pixel_step + 16 * v));
        }
      }
    }
  }
}

// The same for kernels of kWidth taps whose outputs and taps are neighbouring columns: each column
// is loaded once.
template <int kWidth, int kCount>
inline __attribute__((always_inline)) void multiply_neighbours(const Columns& columns,
                                                               int32x4_t (&acc)[kCount][4]) {
  const int8_t* w = columns.weight;
  for (int64_t quad = 0; quad < columns.quads; ++quad, w += kWidth * kQuadBytes) {
    const int8_t* const x = columns.x + quad * columns.quad_step;
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
#pragma GCC unroll 10
      for (int column = 0; column < kWidth + kCount - 1; ++column) {
        const int8x16_t codes = vld1q_s8(x + column * kQuadBytes + 16 * v);
#pragma GCC unroll 4
        for (int p = 0; p < kCount; ++p) {
          if (column < p || column - p >= kWidth) continue;
          const int8x16_t weight = vld1q_s8(w + (column - p) * kQuadBytes + 16 * v);
          acc[p][v] = vdotq_s32(acc[p][v], weight, codes);
        }
      }
    }
  }
}

// `count` outputs of one row; kWidth is 0 for any kernel.
template <int kWidth, bool kResidual>
void run_row(const Conv2dArgs& args, const Block& block, Columns columns, Conv2dPlace place,
             int64_t count) {
  const SumsToCodes rule(args);
  const auto outputs = [&]<int kCount>() {
    int32x4_t acc[kCount][4];
#pragma GCC unroll 4
    for (int p = 0; p < kCount; ++p) {
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) acc[p][v] = block.start[v];
    }
    if constexpr (kWidth == 0) {
      multiply<kCount>(columns, acc);
    } else {
      multiply_neighbours<kWidth, kCount>(columns, acc);
    }
#pragma GCC unroll 4
    for (int p = 0; p < kCount; ++p) {
      uint8x16_t residual = vdupq_n_u8(0);
      if (kResidual) {
        residual = vld1q_u8(static_cast<const uint8_t*>(args.residual) + place.residual +
                            p * args.residual_pixel_stride);
      }
      const uint8x16_t codes = rule.codes<kResidual>(acc[p], block.multiplier, residual);
      uint8_t* const y = static_cast<uint8_t*>(args.y) + place.y + p * args.y_pixel_stride;
      vst1q_u8(y, codes);
    }
    columns.x += kCount * columns.pixel_step;
    place.y += kCount * args.y_pixel_stride;
    place.residual += kCount * args.residual_pixel_stride;
  };
  for (; count >= kPixels; count -= kPixels) outputs.template operator()<kPixels>();
  for (; count > 0; --count) outputs.template operator()<1>();
}

using RunRow = void(const Conv2dArgs&, const Block&, Columns, Conv2dPlace, int64_t);
template <bool kResidual>
RunRow* run_row_of(const Conv2dShape& s) {
  if (s.stride_width != 1 || s.dilation_width != 1) return run_row<0, kResidual>;
  if (s.kernel_width == 3) return run_row<3, kResidual>;
  if (s.kernel_width == 5) return run_row<5, kResidual>;
  if (s.kernel_width == 7) return run_row<7, kResidual>;
  return run_row<0, kResidual>;
}

// `rows` output rows of one image, at most a strip's, from `row` on.
void run_strip(const Conv2dArgs& args, const Strip& strip, const Block& block, RunRow* run,
               int64_t image, int64_t row, int64_t rows) {
  const Conv2dShape& s = args.shape;
  alignas(16) int8_t memory[kMostColumns];
  const uint8_t* const x = args.x + image * args.x_image_stride +
                           row * s.stride_height * args.x_row_stride + block.channel;
  // Rows past the last one that an output reads may not be there; their weights are zero.
  const int64_t last_row = (rows - 1) * s.stride_height + s.kernel_height - 1;
  const uint8_t* lines[kMostRows];
  for (int64_t i = 0; i < 4 * strip.quads; ++i) {
    lines[i] = x + (i < last_row ? i : last_row) * s.dilation_height * args.x_row_stride;
  }
  // Outputs whose columns fit the memory.
  const int64_t reach = (strip.width - 1) * s.dilation_width + 1;
  const int64_t most_columns = kMostColumns / (strip.quads * kQuadBytes);
  const int64_t most = (most_columns - reach) / s.stride_width + 1;
  for (int64_t column = 0; column < s.out_width; column += most) {
    const int64_t left = s.out_width - column;
    const int64_t count = left < most ? left : most;
    const int64_t columns = (count - 1) * s.stride_width + reach;
    const int64_t at = column * s.stride_width * args.x_pixel_stride;
    for (int64_t quad = 0; quad < strip.quads; ++quad) {
      const uint8_t* const* const from = lines + 4 * quad;
      const uint8_t* const four[4] = {from[0] + at, from[1] + at, from[2] + at, from[3] + at};
      interleave_columns(four, args.x_pixel_stride, columns, memory + quad * columns * kQuadBytes);
    }
    for (int64_t r = 0; r < rows; ++r) {
      Conv2dPlace place = conv2d_place(args, image, row + r, column);
      place.y += block.channel;
      place.residual += block.channel;
      run(args, block,
          {.x = memory,
           .weight = block.weight + r * strip.row_quads * kQuadBytes,
           .quads = strip.quads,
           .width = strip.width,
           .quad_step = columns * kQuadBytes,
           .tap_step = s.dilation_width * kQuadBytes,
           .pixel_step = s.stride_width * kQuadBytes},
          place, count);
    }
  }
}

}  // namespace

void conv2d_depthwise(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const Strip strip(args);
  if (args.output != Conv2dOutput::codes || s.groups < kChannels || !strip.fits(s)) {
    return portable::conv2d_depthwise(args, begin, end);
  }
  RunRow* const run = args.residual != nullptr ? run_row_of<true>(s) : run_row_of<false>(s);
  // Every block of channels reads all lines again, so they stay in the second-level cache.
  const int64_t row_bytes = s.stride_height * args.x_row_stride;
  const int64_t strips = kBandBytes / (row_bytes * strip.rows + 1);
  const int64_t band = (strips < 1 ? 1 : strips) * strip.rows;
  Block block;
  while (begin < end) {
    const int64_t band_end = begin + band < end ? begin + band : end;
    for (int64_t channel = 0; channel < s.groups; channel += kChannels) {
      prepare(args, strip, channel, block);
      for (int64_t unit = begin; unit < band_end;) {
        const int64_t row = unit % s.out_height;
        int64_t rows = s.out_height - row;
        if (rows > strip.rows) rows = strip.rows;
        if (rows > band_end - unit) rows = band_end - unit;
        run_strip(args, strip, block, run, unit / s.out_height, row, rows);
        unit += rows;
      }
    }
    begin = band_end;
  }
}

}  // namespace qtoolkit::kernels::neondot
