#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/cpu/conv2d_cursor.h"
#include "kernels/cpu/conv2d_few_pixels_avx512.h"
#include "kernels/cpu/conv2d_output_avx512.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// Two tiles at once, where there are two: 28 accumulators, two weights and an activation.
constexpr int kMostPixels = 2 * static_cast<int>(kTilePixels);
static_assert(kMostPixels == 14);

// The taps of every output, in the order of the packed weights.
struct Taps {
  int64_t rows, runs;
  int64_t run_weights;         // bytes of the packed weights of a run
  int64_t row_step, run_step;  // bytes of the input
};

// Up to kMostPixels output pixels.
struct Tile {
  const uint8_t* x[kMostPixels];   // first tap of each pixel
  Conv2dPlace place[kMostPixels];  // of the output
};

struct Block;
using RunTile = void(const Conv2dArgs&, const Taps&, const Block&, const Tile&);

// A block of channels.
struct Block {
  const int8_t* w;
  const int32_t* offset;
  Rule rule;
  RunTile *full, *half;  // for kMostPixels and for kTilePixels
  int vectors;           // registers that hold channels
  Store* store;
};

// The intrinsic would do the same, but GCC 12 then copies accumulators between registers, which
// measured a third of the speed.
inline __attribute__((always_inline)) void dot(__m512i& acc, __m512i x, __m512i w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(x), "v"(w));
}

// The quad of bytes at x + at in every lane. Written out because GCC 12 would rather advance one
// pointer per pixel, and fourteen do not fit the registers; so those that do not are loaded for
// every quad, which costs nothing that could be measured. The last operand only tells the compiler
// that memory is read.
inline __attribute__((always_inline)) __m512i quad_at(const uint8_t* x, int64_t at) {
  __m512i quad;
  asm("vpbroadcastd (%1, %2), %0"
      : "=v"(quad)
      : "r"(x), "r"(at), "m"(*reinterpret_cast<const char(*)[1 << 20]>(x)));
  return quad;
}

template <int kPixels, int kVectors>
using Sums = __m512i[kPixels][kVectors];

// The sums stay in registers, as the activation and the weights do.
template <int kPixels, int kVectors>
inline __attribute__((always_inline)) void accumulate(const Taps& taps, const Block& block,
                                                      const Tile& tile,
                                                      Sums<kPixels, kVectors>& acc) {
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[p][v] = _mm512_loadu_si512(block.offset + v * kLanes);
  }
  const int8_t* w = block.w;
  for (int64_t row = 0; row < taps.rows; ++row) {
    for (int64_t run = 0; run < taps.runs; ++run) {
      int64_t at = row * taps.row_step + run * taps.run_step;
      const int8_t* const end = w + taps.run_weights;
      for (; w != end; w += 4 * kChannelBlock, at += 4) {
        __m512i weight[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) weight[v] = _mm512_loadu_si512(w + v * 4 * kLanes);
#pragma GCC unroll 14
        for (int p = 0; p < kPixels; ++p) {
          const __m512i quad = quad_at(tile.x[p], at);
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) dot(acc[p][v], quad, weight[v]);
        }
      }
    }
  }
}

// The outputs go through memory to one loop over pixels.
template <int kPixels, int kVectors>
void run_any(const Conv2dArgs& args, const Taps& taps, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(taps, block, tile, acc);
  alignas(64) int32_t sums[kPixels * kChannelBlock];
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_si512(sums + p * kChannelBlock + v * kLanes, acc[p][v]);
    }
    if (kVectors == 1) _mm512_store_si512(sums + p * kChannelBlock + kLanes, acc[p][0]);
  }
  block.store(args, block.rule, tile.place, sums, kPixels);
}

// The outputs come straight from the registers: every store of a register takes the time of about
// one multiply-add.
template <int kPixels, int kVectors, bool kZeroPoint, SimpleResidual kResidual>
void run_simple(const Conv2dArgs& args, const Taps& taps, const Block& block, const Tile& tile) {
  Sums<kPixels, kVectors> acc;
  accumulate<kPixels, kVectors>(taps, block, tile, acc);
  store_simple<kPixels, kVectors, kZeroPoint, kResidual>(
      args, block.rule,
      tile.place, [&](int p, int v) __attribute__((always_inline)) { return acc[p][v]; });
}

// [pixels - 1]
template <int kVectors, int... kIndices>
constexpr std::array<RunTile*, kMostPixels> all_run_any(std::integer_sequence<int, kIndices...>) {
  return {run_any<kIndices + 1, kVectors>...};
}
constexpr auto kRunOne = all_run_any<1>(std::make_integer_sequence<int, kMostPixels>());
constexpr auto kRunTwo = all_run_any<2>(std::make_integer_sequence<int, kMostPixels>());

template <int kPixels, int kVectors, bool kZeroPoint>
RunTile* run_simple_of(SimpleResidual residual) {
  switch (residual) {
    case SimpleResidual::none:
      return run_simple<kPixels, kVectors, kZeroPoint, SimpleResidual::none>;
    case SimpleResidual::folded:
      return run_simple<kPixels, kVectors, kZeroPoint, SimpleResidual::folded>;
    default:
      return run_simple<kPixels, kVectors, kZeroPoint, SimpleResidual::any>;
  }
}
template <int kPixels, int kVectors>
RunTile* run_of(const Conv2dArgs& args, const Rule& rule) {
  if (!rule.simple || args.output != Conv2dOutput::codes) return run_any<kPixels, kVectors>;
  return args.zero_point == 0 ? run_simple_of<kPixels, kVectors, false>(rule.simple_residual)
                              : run_simple_of<kPixels, kVectors, true>(rule.simple_residual);
}

Block block_of(const Conv2dArgs& args, int64_t index, int64_t block_bytes) {
  const Conv2dShape& s = args.shape;
  const int64_t group = index / s.blocks_per_group();
  const int64_t first_channel = index % s.blocks_per_group() * kChannelBlock;
  const int64_t left = s.out_channels - first_channel;
  Block block;
  block.w = args.packed + index * block_bytes;
  block.offset = args.offset + index * kChannelBlock;
  block.rule =
      rule_of(args, args.multiplier + index * kChannelBlock, group * s.out_channels + first_channel,
              left < kChannelBlock ? left : kChannelBlock);
  block.vectors = left > kLanes ? 2 : 1;
  block.full = left > kLanes ? run_of<kMostPixels, 2>(args, block.rule)
                             : run_of<kMostPixels, 1>(args, block.rule);
  block.half = left > kLanes ? run_of<kTilePixels, 2>(args, block.rule)
                             : run_of<kTilePixels, 1>(args, block.rule);
  block.store = store_of(args, block.rule);
  return block;
}

// Blocks whose weights stay in the first-level cache together go through a tile one after the
// other: its input and its outputs then are in that cache, too.
constexpr int64_t kMostBlocks = 8;
constexpr int64_t kMostWeights = int64_t{16} << 10;

// Blocks [first, first + count) of one group at tiles [begin, end).
void run_blocks(const Conv2dArgs& args, const Taps& taps, int64_t block_bytes, int64_t first,
                int64_t count, int64_t begin, int64_t end) {
  Block blocks[kMostBlocks];
  for (int64_t i = 0; i < count; ++i) blocks[i] = block_of(args, first + i, block_bytes);
  int64_t pixel = begin * kTilePixels;
  Cursor<kTilePixels> cursor(args, pixel, first / args.shape.blocks_per_group());
  Tile tile;
  for (int64_t at = begin; at < end;) {
    const bool two = at + 1 < end;
    const int64_t most = two ? kMostPixels : kTilePixels;
    const int64_t left = args.shape.pixels() - pixel;
    const int pixels = static_cast<int>(left < most ? left : most);
    cursor.take(pixels, tile.x, tile.place);
    for (int64_t i = 0; i < count; ++i) {
      const Block& block = blocks[i];
      RunTile* const run = pixels == kMostPixels   ? block.full
                           : pixels == kTilePixels ? block.half
                           : block.vectors == 2    ? kRunTwo[pixels - 1]
                                                   : kRunOne[pixels - 1];
      run(args, taps, block, tile);
    }
    at += two ? 2 : 1;
    pixel += most;
  }
}

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  if (args.layout != Conv2dLayout::quads) return portable::conv2d(args, begin, end);
  if (few_pixels(args, begin, end)) return;
  const Conv2dShape& s = args.shape;
  const Taps taps = {.rows = s.kernel_height,
                     .runs = s.runs_per_row(),
                     .run_weights = s.run_quads() * 4 * kChannelBlock,
                     .row_step = s.dilation_height * args.x_row_stride,
                     .run_step = s.dilation_width * args.x_pixel_stride};
  const int64_t block_bytes = taps.rows * taps.runs * taps.run_weights;
  const int64_t fitting = kMostWeights / block_bytes;
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
    run_blocks(args, taps, block_bytes, block, count, first, last);
    unit += count * (last - first);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
