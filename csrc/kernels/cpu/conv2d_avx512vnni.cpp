#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_output_avx512.h"
#include "kernels/cpu/conv2d_pixels_avx512.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// One call's layer.
struct Layer {
  const Conv2dArgs& args;
  const uint8_t* x;  // of the group of channels
  // The taps of every output, in the order of the packed weights.
  int64_t rows, runs;
  int64_t row_step, run_step;  // bytes of the input
  int64_t run_weights;         // bytes of a run's packed weights
  int64_t block_weights;
  int64_t x_step;  // from one pixel to the next
};

struct Block;
using RunTile = void(const Layer&, const Block&, const Tile&);

// A block of channels.
struct Block {
  const int8_t* w;
  const int32_t* offset;
  Rule rule;
  bool wide;     // channels in both registers
  Store* store;  // for any tile
  RunTile *two_runs, *one_run, *full;
};

// The intrinsic would do the same, but GCC 12 then copies accumulators between registers, which
// measured a third of the speed.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// The quad of bytes at x + kScale * index in every lane. Written out because GCC 12 would rather
// advance one pointer per pixel, and fourteen do not fit the registers. The last operand only tells
// the compiler that memory is read.
template <int kScale = 1>
inline __attribute__((always_inline)) __m512i quad_at(const uint8_t* x, int64_t index) {
  __m512i quad;
  asm("vpbroadcastd (%1, %2, %c3), %0"
      : "=v"(quad)
      : "r"(x), "r"(index), "i"(kScale), "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
  return quad;
}

// A tile of runs. The addresses are made of few registers: two pointers and three steps.
class Runs {
 public:
  Runs(const Layer& layer, const Tile& tile)
      : first_{layer.x + tile.run[0].x, layer.x + tile.run[1].x},
        step_(layer.x_step),
        step3_(3 * step_),
        step5_(5 * step_) {}

  // Goes to the taps at an offset from each pixel's first, and to the next quad.
  __attribute__((always_inline)) void start(int64_t offset) {
    at_[0] = first_[0] + offset;
    at_[1] = first_[1] + offset;
  }
  __attribute__((always_inline)) void next() {
    at_[0] += 4;
    at_[1] += 4;
  }
  __attribute__((always_inline)) __m512i quad(int p) const {
    const uint8_t* const x = at_[p / kTilePixels];
    switch (p % kTilePixels) {
      case 0:
        return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x));
      case 1:
        return quad_at<1>(x, step_);
      case 2:
        return quad_at<2>(x, step_);
      case 3:
        return quad_at<1>(x, step3_);
      case 4:
        return quad_at<4>(x, step_);
      case 5:
        return quad_at<1>(x, step5_);
      default:
        return quad_at<2>(x, step3_);
    }
  }

  static Conv2dPlace place(const Conv2dArgs& args, const Tile& tile, int p) {
    const Position& run = tile.run[p / kTilePixels];
    const int64_t i = p % kTilePixels;
    return {run.y + i * args.y_pixel_stride, run.residual + i * args.residual_pixel_stride};
  }

 private:
  const uint8_t* first_[2];
  const uint8_t* at_[2];
  int64_t step_, step3_, step5_;
};

// A tile of pixels anywhere. Pointers that do not fit the registers are loaded for every quad,
// which costs nothing that could be measured.
class Pixels {
 public:
  Pixels(const Layer&, const Tile& tile) : x_(tile.x) {}

  __attribute__((always_inline)) void start(int64_t offset) { at_ = offset; }
  __attribute__((always_inline)) void next() { at_ += 4; }
  __attribute__((always_inline)) __m512i quad(int p) const { return quad_at(x_[p], at_); }

  static Conv2dPlace place(const Conv2dArgs&, const Tile& tile, int p) { return tile.place[p]; }

 private:
  const uint8_t* const* x_;
  int64_t at_;
};

template <int kPixels, int kVectors>
using Sums = __m512i[kPixels][kVectors];

// The sums stay in registers, as the activation and the weights do.
template <int kPixels, int kVectors, class Input>
inline __attribute__((always_inline)) void accumulate(const Layer& layer, const Block& block,
                                                      Input input, Sums<kPixels, kVectors>& acc) {
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[p][v] = _mm512_loadu_si512(block.offset + v * kLanes);
  }
  const int8_t* w = block.w;
  for (int64_t row = 0; row < layer.rows; ++row) {
    for (int64_t run = 0; run < layer.runs; ++run) {
      input.start(row * layer.row_step + run * layer.run_step);
      const int8_t* const end = w + layer.run_weights;
      for (; w != end; w += 4 * kChannelBlock, input.next()) {
        __m512i weight[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(w + v * 4 * kLanes);
#pragma GCC unroll 14
        for (int p = 0; p < kPixels; ++p) {
          const __m512i quad = input.quad(p);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) dot(acc[p][v], quad, weight[v]);
        }
      }
    }
  }
}

// The outputs go through memory to one loop over pixels.
template <int kPixels, int kVectors>
void run_any(const Layer& layer, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(layer, block, Pixels(layer, tile), acc);
  alignas(64) int32_t sums[kPixels * kChannelBlock];
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_si512(sums + p * kChannelBlock + v * kLanes, acc[p][v]);
    }
    if (kVectors == 1) _mm512_store_si512(sums + p * kChannelBlock + kLanes, acc[p][0]);
  }
  block.store(layer.args, block.rule, tile.place, sums, kPixels);
}

// The outputs come straight from the registers: every store of a register takes the time of about
// one multiply-add.
template <class Input, int kPixels, int kVectors, bool kZeroPoint, SimpleResidual kResidual>
void run_simple(const Layer& layer, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(layer, block, Input(layer, tile), acc);
  const Conv2dArgs& args = layer.args;
  uint8_t* const y = static_cast<uint8_t*>(args.y) + block.rule.channel;
  const uint8_t* const residual = static_cast<const uint8_t*>(args.residual) + block.rule.channel;
  store_simple<kPixels, kVectors, kZeroPoint, kResidual>(
      block.rule, [&](int p, int v) __attribute__((always_inline)) { return acc[p][v]; },
      [&](int p) __attribute__((always_inline)) { return y + Input::place(args, tile, p).y; },
      [&](int p) __attribute__((always_inline)) {
        return residual + Input::place(args, tile, p).residual;
      });
}

// [pixels - 1]
template <int kVectors, int... kIndices>
constexpr std::array<RunTile*, kMostPixels> all_run_any(std::integer_sequence<int, kIndices...>) {
  return {run_any<kIndices + 1, kVectors>...};
}
constexpr auto kRunNarrow = all_run_any<1>(std::make_integer_sequence<int, kMostPixels>());
constexpr auto kRunWide = all_run_any<2>(std::make_integer_sequence<int, kMostPixels>());

template <int kVectors, bool kZeroPoint, SimpleResidual kResidual>
void set_run(Block& block) {
  constexpr int kHalf = static_cast<int>(kTilePixels);
  block.two_runs = run_simple<Runs, kMostPixels, kVectors, kZeroPoint, kResidual>;
  block.one_run = run_simple<Runs, kHalf, kVectors, kZeroPoint, kResidual>;
  block.full = run_simple<Pixels, kMostPixels, kVectors, kZeroPoint, kResidual>;
}
template <int kVectors, bool kZeroPoint>
void set_run(Block& block) {
  switch (block.rule.simple_residual) {
    case SimpleResidual::none:
      return set_run<kVectors, kZeroPoint, SimpleResidual::none>(block);
    case SimpleResidual::folded:
      return set_run<kVectors, kZeroPoint, SimpleResidual::folded>(block);
    default:
      return set_run<kVectors, kZeroPoint, SimpleResidual::any>(block);
  }
}

Block block_of(const Layer& layer, int64_t index) {
  const Conv2dArgs& args = layer.args;
  const Conv2dShape& s = args.shape;
  const int64_t group = index / s.blocks_per_group();
  const int64_t first_channel = index % s.blocks_per_group() * kChannelBlock;
  const int64_t left = s.out_channels - first_channel;
  Block block;
  block.w = args.packed + index * layer.block_weights;
  block.offset = args.offset + index * kChannelBlock;
  block.rule =
      rule_of(args, args.multiplier + index * kChannelBlock, group * s.out_channels + first_channel,
              left < kChannelBlock ? left : kChannelBlock);
  block.rule.simple = block.rule.simple && args.output == Conv2dOutput::codes;
  block.wide = left > kLanes;
  block.store = store_of(args, block.rule);
  if (!block.rule.simple) {
    block.full = (block.wide ? kRunWide : kRunNarrow)[kMostPixels - 1];
  } else if (block.wide) {
    args.zero_point == 0 ? set_run<2, false>(block) : set_run<2, true>(block);
  } else {
    args.zero_point == 0 ? set_run<1, false>(block) : set_run<1, true>(block);
  }
  return block;
}

RunTile* run_of(const Block& block, const Tile& tile) {
  if (tile.in_runs) return tile.pixels == kMostPixels ? block.two_runs : block.one_run;
  if (tile.pixels == kMostPixels) return block.full;
  return (block.wide ? kRunWide : kRunNarrow)[tile.pixels - 1];
}

// Blocks whose weights stay in the first-level cache together go through a tile one after the
// other: its input and its outputs then are in that cache, too.
constexpr int64_t kMostBlocks = 8;
constexpr int64_t kMostWeights = int64_t{16} << 10;

// Blocks [first, first + count) of one group at tiles [begin, end).
void run_blocks(Layer layer, int64_t first, int64_t count, int64_t begin, int64_t end) {
  Block blocks[kMostBlocks];
  bool simple = true;
  for (int64_t i = 0; i < count; ++i) {
    blocks[i] = block_of(layer, first + i);
    simple = simple && blocks[i].rule.simple;
  }
  const int64_t last_pixel = layer.args.shape.pixels();
  int64_t pixel = begin * kTilePixels;
  Cursor cursor(layer.args, pixel, first / layer.args.shape.blocks_per_group());
  layer.x = cursor.x();
  const int64_t end_pixel = end * kTilePixels < last_pixel ? end * kTilePixels : last_pixel;
  Tile tile;
  while (pixel < end_pixel) {
    const int64_t left = end_pixel - pixel;
    cursor.take(static_cast<int>(left < kMostPixels ? left : kMostPixels), simple, tile);
    for (int64_t i = 0; i < count; ++i) run_of(blocks[i], tile)(layer, blocks[i], tile);
    pixel += kMostPixels;
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t run_weights = s.run_quads() * 4 * kChannelBlock;
  const Layer layer = {.args = args,
                       .x = args.x,
                       .rows = s.kernel_height,
                       .runs = s.runs_per_row(),
                       .row_step = s.dilation_height * args.x_row_stride,
                       .run_step = s.dilation_width * args.x_pixel_stride,
                       .run_weights = run_weights,
                       .block_weights = s.kernel_height * s.runs_per_row() * run_weights,
                       .x_step = s.stride_width * args.x_pixel_stride};
  const int64_t fitting = kMostWeights / layer.block_weights;
  const int64_t most = fitting < 1 ? 1 : fitting < kMostBlocks ? fitting : kMostBlocks;
  const int64_t tiles = conv2d_tiles(s);
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t first = unit % tiles;
    const int64_t last = end - unit < tiles - first ? first + (end - unit) : tiles;
    int64_t count = 1;
    if (first == 0) {
      const int64_t left = s.blocks_per_group() - block % s.blocks_per_group();
      const int64_t whole = (end - unit) / tiles;
      const int64_t wanted = most < left ? most : left;
      count = whole < 1 ? 1 : whole < wanted ? whole : wanted;
    }
    run_blocks(layer, block, count, first, last);
    unit += count * (last - first);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
