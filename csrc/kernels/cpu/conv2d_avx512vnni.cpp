#include <immintrin.h>

#include <array>
#include <utility>

#include "kernels/conv2d_input.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int kLanes = 16;  // int32 in a register
static_assert(kChannelBlock == 2 * kLanes);
// Two tiles at once, where there are two: 28 accumulators, two weights and an activation.
constexpr int kMostPixels = 2 * static_cast<int>(kTilePixels);
static_assert(kMostPixels == 14);

// One block of channels at up to kMostPixels pixels.
struct Tile {
  const uint8_t* x[kMostPixels];  // first tap of each pixel
  const int8_t* w;
  const int32_t* offset;
  const float* multiplier;
  int64_t pixel, channel;  // of the output: first pixel, first channel over all groups
  int64_t channels;        // 1 .. kChannelBlock
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

// result[pixel][kVectors * kLanes] in memory: the accumulators, the activation and the weights stay
// in registers through the loop, and the epilogue is one loop over pixels. On ResNet-18's 3x3
// layers fourteen pixels at once measured 90 to 96 % of the peak, seven 83 to 92 %.
template <int kPixels, int kVectors>
void accumulate(const Conv2dArgs& args, const Tile& tile, int32_t* result) {
  const Conv2dShape& s = args.shape;
  __m512i acc[kPixels][kVectors];
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) acc[p][v] = _mm512_loadu_si512(tile.offset + v * kLanes);
  }
  const int64_t runs = s.runs_per_row();
  const int64_t quads = s.run_quads();
  const int8_t* w = tile.w;
  for (int64_t ky = 0; ky < s.kernel_height; ++ky) {
    for (int64_t run = 0; run < runs; ++run) {
      int64_t at =
          ky * s.dilation_height * args.x_row_stride + run * s.dilation_width * args.x_pixel_stride;
      const int8_t* const end = w + quads * 4 * kChannelBlock;
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
#pragma GCC unroll 14
  for (int p = 0; p < kPixels; ++p) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      _mm512_storeu_si512(result + p * kChannelBlock + v * kLanes, acc[p][v]);
    }
  }
}

using Accumulate = void(const Conv2dArgs&, const Tile&, int32_t*);
// [pixels - 1]
template <int kVectors, int... kIndices>
constexpr std::array<Accumulate*, kMostPixels> all_accumulate(
    std::integer_sequence<int, kIndices...>) {
  return {accumulate<kIndices + 1, kVectors>...};
}
constexpr auto kAccumulateOne = all_accumulate<1>(std::make_integer_sequence<int, kMostPixels>());
constexpr auto kAccumulateTwo = all_accumulate<2>(std::make_integer_sequence<int, kMostPixels>());

// How a block's accumulators become outputs. A signed code is computed 128 higher and flipped at
// the end.
struct Rule {
  __m512 multiplier[2];
  __mmask16 lanes[2];  // channels that exist
  // For codes only:
  __m512 high;         // the upper bound less the zero point
  __m512i zero_point;  // int16
  __m512i low, flip;   // uint8
  bool residual_signed;
  __m512i residual_zero_point;
  __m512 residual_multiplier;
};

Rule rule_of(const Conv2dArgs& args, const Tile& tile) {
  const int32_t flip = args.lo < 0 ? 128 : 0;
  Rule rule;
  for (int v = 0; v < 2; ++v) {
    const int64_t left = tile.channels - v * kLanes;
    rule.multiplier[v] = _mm512_loadu_ps(tile.multiplier + v * kLanes);
    rule.lanes[v] =
        left >= kLanes ? 0xffff : static_cast<__mmask16>((1u << (left > 0 ? left : 0)) - 1);
  }
  rule.high = _mm512_set1_ps(static_cast<float>(args.hi - args.zero_point));
  rule.zero_point = _mm512_set1_epi16(static_cast<int16_t>(args.zero_point + flip));
  rule.low = _mm512_set1_epi8(static_cast<char>(args.lo + flip));
  rule.flip = _mm512_set1_epi8(static_cast<char>(flip));
  rule.residual_signed = args.residual_signed;
  rule.residual_zero_point = _mm512_set1_epi32(args.residual_zero_point);
  rule.residual_multiplier = _mm512_set1_ps(args.residual_multiplier);
  return rule;
}

void store_float(const Conv2dArgs& args, const Tile& tile, const Rule& rule, const int32_t* acc,
                 int pixels) {
  float* y = static_cast<float*>(args.y) + tile.pixel * args.y_pixel_stride + tile.channel;
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < 2; ++v) {
      const __m512i sum = _mm512_loadu_si512(acc + p * kChannelBlock + v * kLanes);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), rule.multiplier[v]);
      // A NaN, the second operand, passes.
      if (args.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
      _mm512_mask_storeu_ps(y + p * args.y_pixel_stride + v * kLanes, rule.lanes[v], value);
    }
  }
}

// One pixel's 32 codes as int16, zero point added, without the lower bound; in every 128-bit lane
// four of the first sixteen channels, then four of the others. The upper bound comes before the
// conversion, which could not hold more; what is too small ends at the least int16.
template <bool kResidual, bool kNan>
inline __attribute__((always_inline)) __m512i words_of(const Rule& rule, const int32_t* acc,
                                                       const uint8_t* residual) {
  __m512i codes[2];
#pragma GCC unroll 2
  for (int v = 0; v < 2; ++v) {
    const __m512i sum = _mm512_loadu_si512(acc + v * kLanes);
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), rule.multiplier[v]);
    if (kResidual) {
      const __m128i bytes = _mm_maskz_loadu_epi8(rule.lanes[v], residual + v * kLanes);
      const __m512i code =
          rule.residual_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
      const __m512 centred = _mm512_cvtepi32_ps(_mm512_sub_epi32(code, rule.residual_zero_point));
      value = _mm512_add_ps(value, _mm512_mul_ps(centred, rule.residual_multiplier));
    }
    if (kNan) value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), value);
    codes[v] = _mm512_cvtps_epi32(_mm512_min_ps(value, rule.high));
  }
  return _mm512_adds_epi16(_mm512_packs_epi32(codes[0], codes[1]), rule.zero_point);
}

template <bool kResidual, bool kNan>
void store_codes(const Conv2dArgs& args, const Tile& tile, const Rule& rule, const int32_t* acc,
                 int pixels) {
  uint8_t* y = static_cast<uint8_t*>(args.y) + tile.pixel * args.y_pixel_stride + tile.channel;
  const uint8_t* residual = nullptr;
  if (kResidual) {
    residual = static_cast<const uint8_t*>(args.residual) +
               tile.pixel * args.residual_pixel_stride + tile.channel;
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask32 lanes = rule.lanes[0] | static_cast<__mmask32>(rule.lanes[1]) << kLanes;
  // Two pixels at a time; an odd last one is paired with itself and stored once.
  for (int p = 0; p < pixels; p += 2) {
    const bool pair = p + 1 < pixels;
    const __m512i first = words_of<kResidual, kNan>(rule, acc, residual);
    __m512i second = first;
    if (pair) {
      second = words_of<kResidual, kNan>(rule, acc + kChannelBlock,
                                         residual + args.residual_pixel_stride);
    }
    __m512i codes = _mm512_max_epu8(_mm512_packus_epi16(first, second), rule.low);
    codes = _mm512_permutexvar_epi32(order, _mm512_xor_si512(codes, rule.flip));
    _mm256_mask_storeu_epi8(y, lanes, _mm512_castsi512_si256(codes));
    if (pair) {
      _mm256_mask_storeu_epi8(y + args.y_pixel_stride, lanes, _mm512_extracti64x4_epi64(codes, 1));
    }
    acc += 2 * kChannelBlock;
    y += 2 * args.y_pixel_stride;
    if (kResidual) residual += 2 * args.residual_pixel_stride;
  }
}

// True if a multiplier is so large, infinite or NaN that a NaN could follow (0 * inf, inf - inf).
bool may_give_nan(const Conv2dArgs& args, const Rule& rule) {
  const __m512 bound = _mm512_set1_ps(0x1p64f);
  const __mmask16 first = _mm512_cmp_ps_mask(_mm512_abs_ps(rule.multiplier[0]), bound, _CMP_LE_OQ);
  const __mmask16 second = _mm512_cmp_ps_mask(_mm512_abs_ps(rule.multiplier[1]), bound, _CMP_LE_OQ);
  return (first & second) != 0xffff || !(__builtin_fabsf(args.residual_multiplier) <= 0x1p64f);
}

using Store = void(const Conv2dArgs&, const Tile&, const Rule&, const int32_t*, int);
Store* store_of(const Conv2dArgs& args, const Rule& rule) {
  if (args.output == Conv2dOutput::float32) return store_float;
  const bool nan = may_give_nan(args, rule);
  if (args.residual == nullptr) return nan ? store_codes<false, true> : store_codes<false, false>;
  return nan ? store_codes<true, true> : store_codes<true, false>;
}

// An output pixel and its input, without divisions from one to the next: between tiles their
// latency would show.
class Cursor {
 public:
  Cursor(const Conv2dArgs& args, int64_t pixel, int64_t group)
      : width_(args.shape.out_width),
        height_(args.shape.out_height),
        step_(args.shape.stride_width * args.x_pixel_stride),
        row_step_(args.shape.stride_height * args.x_row_stride),
        image_step_(args.x_image_stride - height_ * row_step_),
        column_(pixel % width_),
        line_(pixel / width_ % height_),
        x_(conv2d_input(args, pixel) + group * args.shape.in_channels),
        row_(x_ - column_ * step_) {}

  // Writes the pointers of the next `count` pixels. Loops of fixed length and conditional moves:
  // with runs as long as the row allows, mispredicted branches took up to a tenth of the time of
  // layers with few taps.
  void take(int count, const uint8_t** x) {
    while (count > 0) {
      int taken = 1;
      x[0] = x_;
      if (count >= kTilePixels && width_ - column_ >= kTilePixels) {
        taken = kTilePixels;
        for (int p = 1; p < kTilePixels; ++p) x[p] = x_ + p * step_;
      }
      x += taken;
      count -= taken;
      advance(taken);
    }
  }

 private:
  // By pixels of one row.
  void advance(int pixels) {
    column_ += pixels;
    const bool row_ends = column_ == width_;
    column_ = row_ends ? 0 : column_;
    line_ += row_ends;
    row_ = row_ends ? row_ + row_step_ : row_;
    const bool image_ends = line_ == height_;
    line_ = image_ends ? 0 : line_;
    row_ = image_ends ? row_ + image_step_ : row_;
    x_ = row_ends ? row_ : x_ + pixels * step_;
  }

  int64_t width_, height_, step_, row_step_;
  int64_t image_step_;  // from the end of an image's last row to the next image
  int64_t column_, line_;
  const uint8_t *x_, *row_;
};

}  // namespace

void conv2d(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  const int64_t tiles = conv2d_tiles(s);
  const int64_t pixels = s.pixels();
  const int64_t block_bytes =
      s.kernel_height * s.runs_per_row() * s.run_quads() * 4 * kChannelBlock;
  alignas(64) int32_t acc[kMostPixels * kChannelBlock] = {};
  for (int64_t unit = begin; unit < end;) {
    const int64_t block = unit / tiles;  // over all groups
    const int64_t group = block / s.blocks_per_group();
    const int64_t first_channel = block % s.blocks_per_group() * kChannelBlock;
    const int64_t channels_left = s.out_channels - first_channel;
    Tile tile;
    tile.w = args.packed + block * block_bytes;
    tile.offset = args.offset + block * kChannelBlock;
    tile.multiplier = args.multiplier + block * kChannelBlock;
    tile.channel = group * s.out_channels + first_channel;
    tile.channels = channels_left < kChannelBlock ? channels_left : kChannelBlock;
    tile.pixel = unit % tiles * kTilePixels;

    const Rule rule = rule_of(args, tile);
    Store* const store = store_of(args, rule);

    const int64_t block_end = (block + 1) * tiles < end ? (block + 1) * tiles : end;
    Cursor cursor(args, tile.pixel, group);
    const bool wide = tile.channels > kLanes;
    while (unit < block_end) {
      const bool two = unit + 1 < block_end;
      const int64_t left = pixels - tile.pixel;
      const int64_t most = two ? kMostPixels : kTilePixels;
      const int count = static_cast<int>(left < most ? left : most);
      cursor.take(count, tile.x);
      (wide ? kAccumulateTwo : kAccumulateOne)[count - 1](args, tile, acc);
      store(args, tile, rule, acc, count);
      unit += two ? 2 : 1;
      tile.pixel += most;
    }
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
