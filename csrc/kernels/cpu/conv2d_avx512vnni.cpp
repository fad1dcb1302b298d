#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_few_pixels_avx512.h"
#include "kernels/cpu/conv2d_output_avx512.h"
#include "kernels/cpu/conv2d_pixels_avx512.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// Each of a block's first tiles asks for a part of the weights that come next, so that they are in
// the second-level cache in time. Those of a whole network come from further away: ResNet-18's last
// layers took 1.7 times the time without this. A quad's step covers its part of the next block.
constexpr int64_t kAheadParts = 4;
constexpr int64_t kAheadStep = 4 * kChannelBlock / kAheadParts;

struct Layer;
struct Block;
using RunTile = void(const Layer&, const Block&, const Tile&);

// What computes tiles of a block whose channels are in one register or in two.
struct Runners {
  RunTile *two_runs, *one_run;  // of simple codes or int32
  RunTile* full;                // of kMostPixels anywhere, of simple codes
};

// One call's layer.
struct Layer {
  const Conv2dArgs& args;
  const uint8_t* x;  // of the group of channels
  // The taps of every output, in the order of the packed weights.
  int64_t runs;         // of a row
  int64_t run_step;     // bytes of the input from one run to the next in its row
  int64_t row_step;     // and from a row's last run to the next row
  int64_t run_weights;  // bytes of a run's packed weights
  int64_t block_weights;
  int64_t x_step;  // from one pixel to the next
  Runners narrow, wide;
};

// A block of channels.
struct Block {
  const int8_t* w;
  const int32_t* offset;
  Rule rule;
  bool wide;     // channels in both registers
  Store* store;  // for any tile
};

// The intrinsic would do the same, but GCC 12 then copies accumulators between registers, which
// measured a third of the speed.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// The quad of bytes at x + kScale * index + kBytes in every lane. Written out because GCC 12 would
// rather advance one pointer per pixel, and fourteen do not fit the registers. The last operand
// only tells the compiler that memory is read.
template <int kScale, int kBytes>
inline __attribute__((always_inline)) __m512i quad_at(const uint8_t* x, int64_t index) {
  __m512i quad;
  asm("vpbroadcastd %c4(%1, %2, %c3), %0"
      : "=v"(quad)
      : "r"(x), "r"(index), "i"(kScale), "i"(kBytes),
        "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
  return quad;
}

// The same object, about which the compiler knows nothing. Else it keeps all that a loop reads in
// registers, of which there are too few.
template <class T>
inline __attribute__((always_inline)) const T& unknown(const T& object) {
  const T* pointer = &object;
  asm("" : "+r"(pointer));
  return *pointer;
}

// A tile of runs. The addresses are made of few registers: two pointers and three steps.
class Runs {
 public:
  // Quads a turn of the loop, as what counts and compares takes the multiplier's ports.
  static constexpr int kAtOnce = 2;

  Runs(const Layer& layer, const Tile& tile)
      : layer_(layer), tile_(tile), step_(layer.x_step), step3_(3 * step_), step5_(5 * step_) {}

  // Goes to the taps at an offset from each pixel's first, and to the quads after these.
  __attribute__((always_inline)) void start(int64_t offset) {
    const uint8_t* const x = unknown(layer_).x + offset;
    at0_ = x + unknown(tile_).run[0].x;
    at1_ = x + unknown(tile_).run[1].x;
  }
  __attribute__((always_inline)) void advance(int quads) {
    at0_ += 4 * quads;
    at1_ += 4 * quads;
  }
  template <int kQuad>
  __attribute__((always_inline)) __m512i quad(int p) const {
    constexpr int kBytes = 4 * kQuad;
    const uint8_t* const x = p < kTilePixels ? at0_ : at1_;
    switch (p % kTilePixels) {
      case 0:
        return _mm512_set1_epi32(*reinterpret_cast<const int32_t*>(x + kBytes));
      case 1:
        return quad_at<1, kBytes>(x, step_);
      case 2:
        return quad_at<2, kBytes>(x, step_);
      case 3:
        return quad_at<1, kBytes>(x, step3_);
      case 4:
        return quad_at<4, kBytes>(x, step_);
      case 5:
        return quad_at<1, kBytes>(x, step5_);
      default:
        return quad_at<2, kBytes>(x, step3_);
    }
  }

  class Places {
   public:
    Places(const Conv2dArgs& args, const Tile& tile)
        : y0_(scalar(tile.run[0].y)),
          y1_(scalar(tile.run[1].y)),
          y_step_(scalar(args.y_pixel_stride)),
          residual0_(scalar(tile.run[0].residual)),
          residual1_(scalar(tile.run[1].residual)),
          residual_step_(scalar(args.residual_pixel_stride)) {}
    int64_t y(int p) const { return (p < kTilePixels ? y0_ : y1_) + p % kTilePixels * y_step_; }
    int64_t residual(int p) const {
      return (p < kTilePixels ? residual0_ : residual1_) + p % kTilePixels * residual_step_;
    }

   private:
    int64_t y0_, y1_, y_step_, residual0_, residual1_, residual_step_;
  };

 private:
  const Layer& layer_;
  const Tile& tile_;
  const uint8_t *at0_, *at1_;
  int64_t step_, step3_, step5_;
};

// A tile of pixels anywhere. Pointers that do not fit the registers are loaded for every quad,
// which costs nothing that could be measured.
class Pixels {
 public:
  static constexpr int kAtOnce = 1;  // with two GCC 12 spills sums

  Pixels(const Layer&, const Tile& tile) : x_(tile.x) {}

  __attribute__((always_inline)) void start(int64_t offset) { at_ = offset; }
  __attribute__((always_inline)) void advance(int quads) { at_ += 4 * quads; }
  template <int kQuad>
  __attribute__((always_inline)) __m512i quad(int p) const {
    return quad_at<1, 4 * kQuad>(x_[p], at_);
  }

  class Places {
   public:
    Places(const Conv2dArgs&, const Tile& tile) : place_(tile.place) {}
    int64_t y(int p) const { return place_[p].y; }
    int64_t residual(int p) const { return place_[p].residual; }

   private:
    const Conv2dPlace* place_;
  };

 private:
  const uint8_t* const* x_;
  int64_t at_;
};

template <int kPixels, int kVectors>
using Sums = __m512i[kPixels][kVectors];

// The sums stay in registers, as the activation and the weights do.
template <int kPixels, int kVectors, class Input>
inline __attribute__((always_inline)) void accumulate(const Layer& layer, const Block& block,
                                                      const Tile& tile, Input input,
                                                      Sums<kPixels, kVectors>& acc) {
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[p][v] = _mm512_loadu_si512(block.offset + v * kLanes);
  }
  const int8_t* w = block.w;
  const int8_t* ahead = w + tile.ahead;
  const int8_t* const last = w + layer.block_weights;
  int64_t offset = 0, run = 0;
  while (w != last) {
    const Layer& l = unknown(layer);
    input.start(offset);
    const int8_t* const end = w + l.run_weights;
    const auto multiply = [&]<int kQuad>() __attribute__((always_inline)) {
      const int8_t* const from = w + kQuad * kQuadBytes;
      __m512i weight[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(from + v * 4 * kLanes);
#pragma GCC unroll 14
      for (int p = 0; p < kPixels; ++p) {
        const __m512i quad = input.template quad<kQuad>(p);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) dot(acc[p][v], quad, weight[v]);
      }
    };
    if constexpr (Input::kAtOnce == 2) {
      for (; end - w >= 2 * kQuadBytes; w += 2 * kQuadBytes, input.advance(2)) {
        _mm_prefetch(ahead, _MM_HINT_T1);
        ahead += 2 * kAheadStep;
        multiply.template operator()<0>();
        multiply.template operator()<1>();
      }
    }
    for (; w != end; w += kQuadBytes, input.advance(1)) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += kAheadStep;
      multiply.template operator()<0>();
    }
    ++run;
    const bool row_ends = run == l.runs;
    offset += row_ends ? l.row_step : l.run_step;
    run = row_ends ? 0 : run;
  }
}

// The outputs go through memory to one loop over pixels.
template <int kPixels, int kVectors>
void run_any(const Layer& layer, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(layer, block, tile, Pixels(layer, tile), acc);
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
  accumulate<kPixels, kVectors>(layer, block, tile, Input(layer, tile), acc);
  uint8_t* const y = static_cast<uint8_t*>(layer.args.y) + block.rule.channel;
  const uint8_t* const residual =
      static_cast<const uint8_t*>(layer.args.residual) + block.rule.channel;
  // Copies, which the compiler need not load again after each output.
  const typename Input::Places places(layer.args, tile);
  store_simple<kPixels, kVectors, kZeroPoint, kResidual>(
      block.rule, [&](int p, int v) __attribute__((always_inline)) { return acc[p][v]; },
      [&](int p) __attribute__((always_inline)) { return y + places.y(p); },
      [&](int p) __attribute__((always_inline)) { return residual + places.residual(p); });
}

// int32 outputs of runs.
template <int kPixels, int kVectors>
void run_sums(const Layer& layer, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(layer, block, tile, Runs(layer, tile), acc);
  int32_t* const y = static_cast<int32_t*>(layer.args.y) + block.rule.channel;
  const Runs::Places places(layer.args, tile);
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm512_mask_storeu_epi32(y + places.y(p) + v * kLanes, block.rule.lanes[v], acc[p][v]);
    }
  }
}

// [pixels - 1]
template <int kVectors, int... kIndices>
constexpr std::array<RunTile*, kMostPixels> all_run_any(std::integer_sequence<int, kIndices...>) {
  return {run_any<kIndices + 1, kVectors>...};
}
constexpr auto kRunNarrow = all_run_any<1>(std::make_integer_sequence<int, kMostPixels>());
constexpr auto kRunWide = all_run_any<2>(std::make_integer_sequence<int, kMostPixels>());

template <int kVectors, bool kZeroPoint, SimpleResidual kResidual>
Runners runners_of() {
  constexpr int kHalf = static_cast<int>(kTilePixels);
  return {run_simple<Runs, kMostPixels, kVectors, kZeroPoint, kResidual>,
          run_simple<Runs, kHalf, kVectors, kZeroPoint, kResidual>,
          run_simple<Pixels, kMostPixels, kVectors, kZeroPoint, kResidual>};
}
template <int kVectors, bool kZeroPoint>
Runners runners_of(SimpleResidual residual) {
  switch (residual) {
    case SimpleResidual::none:
      return runners_of<kVectors, kZeroPoint, SimpleResidual::none>();
    case SimpleResidual::folded:
      return runners_of<kVectors, kZeroPoint, SimpleResidual::folded>();
    default:
      return runners_of<kVectors, kZeroPoint, SimpleResidual::any>();
  }
}

template <int kVectors>
constexpr Runners kSumRunners = {run_sums<kMostPixels, kVectors>,
                                 run_sums<static_cast<int>(kTilePixels), kVectors>, nullptr};

RunTile* run_of(const Layer& layer, const Block& block, const Tile& tile) {
  const Runners& simple = block.wide ? layer.wide : layer.narrow;
  if (tile.in_runs) return tile.pixels == kMostPixels ? simple.two_runs : simple.one_run;
  if (tile.pixels == kMostPixels && block.rule.simple) return simple.full;
  return (block.wide ? kRunWide : kRunNarrow)[tile.pixels - 1];
}

void set_block(const Layer& layer, int64_t index, Block& block) {
  const Conv2dArgs& args = layer.args;
  const Conv2dShape& s = args.shape;
  const int64_t group = index / s.blocks_per_group();
  const int64_t first_channel = index % s.blocks_per_group() * kChannelBlock;
  const int64_t left = s.out_channels - first_channel;
  block.w = args.packed + index * layer.block_weights;
  block.offset = args.offset + index * kChannelBlock;
  block.wide = left > kLanes;
  set_block(args.multiplier + index * kChannelBlock, group * s.out_channels + first_channel,
            left < kChannelBlock ? left : kChannelBlock, block.rule);
  block.store = store_of(args, block.rule);
}

// Blocks whose weights stay in the first-level cache together go through a tile one after the
// other: its input and its outputs then are in that cache, too.
constexpr int64_t kMostBlocks = 8;
constexpr int64_t kMostWeights = int64_t{16} << 10;

// Blocks [first, first + count) of one group at tiles [begin, end).
void run_blocks(Layer& layer, Block* blocks, int64_t first, int64_t count, int64_t begin,
                int64_t end) {
  const bool sums = layer.args.output == Conv2dOutput::int32;
  bool simple = true;
  for (int64_t i = 0; i < count; ++i) {
    set_block(layer, first + i, blocks[i]);
    simple = simple && blocks[i].rule.simple;
  }
  const int64_t last_pixel = layer.args.shape.pixels();
  int64_t pixel = begin * kTilePixels;
  Cursor<kTilePixels> cursor(layer.args, pixel, first / layer.args.shape.blocks_per_group());
  layer.x = cursor.x();
  const int64_t end_pixel = end * kTilePixels < last_pixel ? end * kTilePixels : last_pixel;
  const int64_t ahead = count * layer.block_weights;
  int64_t part = 0;
  Tile tile;
  for (; pixel < end_pixel; pixel += kMostPixels) {
    const int64_t left = end_pixel - pixel;
    take(cursor, static_cast<int>(left < kMostPixels ? left : kMostPixels), simple || sums, tile);
    tile.ahead = part < kAheadParts ? ahead + part * layer.block_weights / kAheadParts : 0;
    ++part;
    for (int64_t i = 0; i < count; ++i) {
      run_of(layer, blocks[i], tile)(layer, blocks[i], tile);
    }
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  if (args.layout != Conv2dLayout::quads) return portable::conv2d(args, begin, end);
  if (few_pixels(args, begin, end)) return;
  const Conv2dShape& s = args.shape;
  const Rule rule = layer_rule(args);
  const SimpleResidual residual = rule.simple_residual;
  const bool zero = args.zero_point == 0;
  const int64_t run_weights = s.run_quads() * 4 * kChannelBlock;
  const int64_t run_step = s.dilation_width * args.x_pixel_stride;
  Layer layer = {
      .args = args,
      .x = args.x,
      .runs = s.runs_per_row(),
      .run_step = run_step,
      .row_step = s.dilation_height * args.x_row_stride - (s.runs_per_row() - 1) * run_step,
      .run_weights = run_weights,
      .block_weights = s.kernel_height * s.runs_per_row() * run_weights,
      .x_step = s.stride_width * args.x_pixel_stride,
      .narrow = zero ? runners_of<1, false>(residual) : runners_of<1, true>(residual),
      .wide = zero ? runners_of<2, false>(residual) : runners_of<2, true>(residual)};
  if (args.output == Conv2dOutput::int32) {
    layer.narrow = kSumRunners<1>;
    layer.wide = kSumRunners<2>;
  }
  const int64_t in_group = s.blocks_per_group();
  const int64_t fitting = kMostWeights / layer.block_weights;
  int64_t most = fitting < 1 ? 1 : fitting < kMostBlocks ? fitting : kMostBlocks;
  if (most > in_group) most = in_group;
  Block blocks[kMostBlocks];
  for (int64_t i = 0; i < most; ++i) blocks[i].rule = rule;
  const int64_t tiles = conv2d_tiles(s);
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t first = unit % tiles;
    const int64_t last = end - unit < tiles - first ? first + (end - unit) : tiles;
    int64_t count = 1;
    if (first == 0) {
      const int64_t left = in_group - block % in_group;
      const int64_t whole = (end - unit) / tiles;
      const int64_t wanted = most < left ? most : left;
      count = whole < 1 ? 1 : whole < wanted ? whole : wanted;
    }
    run_blocks(layer, blocks, block, count, first, last);
    unit += count * (last - first);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
