// One to four planes to pixels without gaps, 48 or 64 codes at a time: the codes of 16 floats are
// the low bytes of a register's lanes; byte shuffles put those of up to four registers beside each
// other within 128-bit lanes, and one permutation of dwords orders the lanes. Other layouts take
// the plain loops.
#include <immintrin.h>

#include "kernels/cpu/rounding.h"
#include "kernels/quantize_image.h"

namespace qtoolkit::kernels::avx512vnni {
namespace plain {
#include "kernels/cpu/quantize_image.inl"
}  // namespace plain

namespace {

constexpr int64_t kLanes = 16;  // floats in a register

// Register v holds pixels 16 * (v / kChannels) + (0 .. 15) of plane v % kChannels.
template <int kChannels>
struct Interleave {
  static constexpr int kRegisters = kChannels == 3 ? 3 : 4;
  static constexpr int kGroups = kRegisters / kChannels;
  static constexpr int64_t kPixels = kGroups * kLanes;
  static constexpr int64_t kBytes = kPixels * kChannels;

  alignas(64) uint8_t bytes[kRegisters][64];
  alignas(64) int32_t dwords[16];

  constexpr Interleave() : bytes(), dwords() {
    for (int v = 0; v < kRegisters; ++v) {
      const int plane = v % kChannels, group = v / kChannels;
      for (uint8_t& byte : bytes[v]) byte = 0x80;  // gives zero
      for (int lane = 0; lane < 4; ++lane) {
        for (int pixel = 0; pixel < 4; ++pixel) {
          bytes[v][16 * lane + (4 * group + pixel) * kChannels + plane] =
              static_cast<uint8_t>(4 * pixel);
        }
      }
    }
    for (int lane = 0; lane < 4; ++lane) {
      for (int dword = 0; dword < kRegisters; ++dword) {
        const int group = dword / kChannels, rest = dword % kChannels;
        dwords[(4 * group + lane) * kChannels + rest] = 4 * lane + dword;
      }
    }
  }
};
template <int kChannels>
constexpr Interleave<kChannels> kInterleave;

struct Rule {
  __m512 inverse, low, high;
  __m512i zero_point;  // in every byte
};

__mmask64 first(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count > 0 ? count : 0)) - 1;
}

// A code less the zero point in every lane's low byte. A NaN passes both bounds, as the second
// operand, and becomes INT_MIN, whose low byte is zero.
inline __attribute__((always_inline)) __m512i rounded(__m512 x, const Rule& rule) {
  const __m512 value = _mm512_max_ps(rule.low, _mm512_mul_ps(x, rule.inverse));
  return _mm512_cvtps_epi32(_mm512_min_ps(rule.high, value));
}

// `pixels` of them if kPart, else as many as fit.
template <int kChannels, bool kPart>
inline __attribute__((always_inline)) void quantize_pixels(const float* x, int64_t channel_stride,
                                                           int64_t pixels, const Rule& rule,
                                                           uint8_t* y) {
  using Order = Interleave<kChannels>;
  const Order& order = kInterleave<kChannels>;
  __m512i codes = rule.zero_point;
#pragma GCC unroll 4
  for (int v = 0; v < Order::kRegisters; ++v) {
    const int64_t pixel = v / kChannels * kLanes;
    const float* const from = x + v % kChannels * channel_stride + pixel;
    const __mmask16 mask = static_cast<__mmask16>(kPart ? first(pixels - pixel) : 0xffff);
    const __m512 values = kPart ? _mm512_maskz_loadu_ps(mask, from) : _mm512_loadu_ps(from);
    codes = _mm512_add_epi8(
        codes, _mm512_shuffle_epi8(rounded(values, rule), _mm512_load_si512(order.bytes[v])));
  }
  if (kChannels != 4) codes = _mm512_permutexvar_epi32(_mm512_load_si512(order.dwords), codes);
  if (!kPart && Order::kBytes == 64) {
    _mm512_storeu_si512(y, codes);
  } else {
    _mm512_mask_storeu_epi8(y, first(kPart ? pixels * kChannels : Order::kBytes), codes);
  }
}

template <int kChannels>
void quantize_planes(const float* x, int64_t channel_stride, int64_t count, const Rule& shared,
                     uint8_t* y) {
  const Rule rule = shared;  // which a store of bytes cannot change
  constexpr int64_t kPixels = Interleave<kChannels>::kPixels;
  int64_t j = 0;
  for (; j + kPixels <= count; j += kPixels) {
    quantize_pixels<kChannels, false>(x + j, channel_stride, kPixels, rule, y + j * kChannels);
  }
  if (j < count) {
    quantize_pixels<kChannels, true>(x + j, channel_stride, count - j, rule, y + j * kChannels);
  }
}

}  // namespace

void quantize_image(const QuantizeImageArgs& args, int64_t begin, int64_t end) {
  const bool dense = args.y_pixel_stride == args.channels;
  const bool pixels = args.x_channel_stride == 1 && args.x_column_stride == args.channels;
  const bool planes = args.x_column_stride == 1 && args.channels <= 4;
  if (!dense || !(pixels || planes)) return plain::quantize_image(args, begin, end);
  // A row whose channels lie side by side on both sides is one plane.
  const int64_t channels = pixels ? 1 : args.channels;
  const int64_t count = pixels ? args.width * args.channels : args.width;
  const Rule rule = {_mm512_set1_ps(1.0f / args.scale),
                     _mm512_set1_ps(static_cast<float>(args.quant_min - args.zero_point)),
                     _mm512_set1_ps(static_cast<float>(args.quant_max - args.zero_point)),
                     _mm512_set1_epi8(static_cast<char>(args.zero_point))};
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.height, i = row % args.height;
    const float* const x = args.x + n * args.x_image_stride + i * args.x_row_stride;
    uint8_t* const y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    if (channels == 1) quantize_planes<1>(x, args.x_channel_stride, count, rule, y);
    if (channels == 2) quantize_planes<2>(x, args.x_channel_stride, count, rule, y);
    if (channels == 3) quantize_planes<3>(x, args.x_channel_stride, count, rule, y);
    if (channels == 4) quantize_planes<4>(x, args.x_channel_stride, count, rule, y);
  }
}

void dequantize_image(const DequantizeImageArgs& args, int64_t begin, int64_t end) {
  plain::dequantize_image(args, begin, end);
}

}  // namespace qtoolkit::kernels::avx512vnni
