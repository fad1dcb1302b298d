#include <immintrin.h>

#include "kernels/conv2d_output.h"
#include "kernels/cpu/conv2d_depthwise_strips.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// For kernels with more taps than the fast path keeps.
namespace plain {
constexpr auto store_outputs = store_conv2d_outputs;
#include "kernels/cpu/conv2d_depthwise.inl"
}  // namespace plain

// 64 channels at a time, in four registers of int32. Interleaving bytes within 128-bit lanes puts
// channels 16 * lane + 4 * q + (0 .. 3) in register q; packing back puts them in order again.
constexpr int64_t kChannels = 64;
constexpr int64_t kMaxTaps = 128;

// Plain arrays that are passed by reference: GCC 12 keeps them in registers, a struct in memory.
using Vectors = __m512i[kRegisters];

// Lane j of register i to lane i of register j: from channels in order to interleaved ones, and
// back.
inline void transpose_lanes(Vectors& a) {
  const __m512i low01 = _mm512_shuffle_i32x4(a[0], a[1], 0x44);
  const __m512i high01 = _mm512_shuffle_i32x4(a[0], a[1], 0xee);
  const __m512i low23 = _mm512_shuffle_i32x4(a[2], a[3], 0x44);
  const __m512i high23 = _mm512_shuffle_i32x4(a[2], a[3], 0xee);
  a[0] = _mm512_shuffle_i32x4(low01, low23, 0x88);
  a[1] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
  a[2] = _mm512_shuffle_i32x4(high01, high23, 0x88);
  a[3] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
}

// One block of channels, prepared for all its pixels.
struct Block {
  Vectors weight[kMaxTaps / 4];
  int64_t taps[kMaxTaps];  // offset of each tap from a pixel's first
  int64_t quads;           // of taps, filled up with zero weights
  Vectors offset;
  __m512 multiplier[kRegisters];
  __mmask64 channels;  // that exist
  // For codes only. A signed code is computed 128 higher and flipped at the end.
  __m512 high;         // the upper bound less the zero point
  __m512i zero_point;  // int16
  __m512i low, flip;   // uint8
  __m512i residual_flip, residual_zero_point;
  __m512 residual_multiplier;
};

void load_channels(const void* from, __mmask64 channels, Vectors& result) {
  for (int i = 0; i < kRegisters; ++i) {
    result[i] = _mm512_maskz_loadu_epi32(static_cast<__mmask16>(channels >> (16 * i)),
                                         static_cast<const int32_t*>(from) + 16 * i);
  }
  transpose_lanes(result);
}

void prepare(const Conv2dArgs& args, int64_t first_channel, Block& block) {
  const Conv2dShape& s = args.shape;
  const int64_t left = s.groups - first_channel;
  block.channels = left >= kChannels ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
  const int64_t taps = s.kernel_height * s.kernel_width;
  block.quads = (taps + 3) / 4;
  for (int64_t quad = 0; quad < block.quads; ++quad) {
    __m512i weight[4];
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t tap = quad * 4 + i;
      // A tap past the last reads the first one's input, which is there.
      block.taps[quad * 4 + i] = 0;
      weight[i] = _mm512_setzero_si512();
      if (tap >= taps) continue;
      block.taps[quad * 4 + i] = tap / s.kernel_width * s.dilation_height * args.x_row_stride +
                                 tap % s.kernel_width * s.dilation_width * args.x_pixel_stride;
      weight[i] =
          _mm512_maskz_loadu_epi8(block.channels, args.packed + tap * s.groups + first_channel);
    }
    interleave(weight[0], weight[1], weight[2], weight[3], block.weight[quad]);
  }
  load_channels(args.offset + first_channel, block.channels, block.offset);
  Vectors multiplier;
  load_channels(args.multiplier + first_channel, block.channels, multiplier);
  for (int i = 0; i < kRegisters; ++i) block.multiplier[i] = _mm512_castsi512_ps(multiplier[i]);

  const int32_t flip = args.lo < 0 ? 128 : 0;
  const int32_t residual_flip = args.residual_signed ? 128 : 0;
  block.high = _mm512_set1_ps(static_cast<float>(args.hi - args.zero_point));
  block.zero_point = _mm512_set1_epi16(static_cast<int16_t>(args.zero_point + flip));
  block.low = _mm512_set1_epi8(static_cast<char>(args.lo + flip));
  block.flip = _mm512_set1_epi8(static_cast<char>(flip));
  block.residual_flip = _mm512_set1_epi8(static_cast<char>(residual_flip));
  block.residual_zero_point = _mm512_set1_epi32(args.residual_zero_point + residual_flip);
  block.residual_multiplier = _mm512_set1_ps(args.residual_multiplier);
}

// True if a multiplier is so large, infinite or NaN that a NaN could follow (0 * inf, inf - inf).
bool may_give_nan(const Conv2dArgs& args, const Block& block) {
  const __m512 bound = _mm512_set1_ps(0x1p64f);
  __mmask16 finite = 0xffff;
  for (const __m512& multiplier : block.multiplier) {
    finite &= _mm512_cmp_ps_mask(_mm512_abs_ps(multiplier), bound, _CMP_LE_OQ);
  }
  return finite != 0xffff || !(__builtin_fabsf(args.residual_multiplier) <= 0x1p64f);
}

template <bool kWhole>
inline __attribute__((always_inline)) __m512i load_bytes(const Block& block, const uint8_t* from) {
  return kWhole ? _mm512_loadu_si512(from) : _mm512_maskz_loadu_epi8(block.channels, from);
}

template <bool kWhole>
inline __attribute__((always_inline)) void accumulate(const Block& block, const uint8_t* x,
                                                      Vectors& result) {
  Vectors acc, codes;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) acc[i] = block.offset[i];
  const int64_t* taps = block.taps;
  const Vectors* weight = block.weight;
  for (int64_t quad = block.quads; quad > 0; --quad, taps += 4, ++weight) {
    interleave(load_bytes<kWhole>(block, x + taps[0]), load_bytes<kWhole>(block, x + taps[1]),
               load_bytes<kWhole>(block, x + taps[2]), load_bytes<kWhole>(block, x + taps[3]),
               codes);
#pragma GCC unroll 4
    for (int i = 0; i < kRegisters; ++i) dot(acc[i], codes[i], (*weight)[i]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) result[i] = acc[i];
}

template <bool kResidual, bool kNan>
inline __attribute__((always_inline)) __m512i codes_of(const Block& block, const Vectors& acc,
                                                       const uint8_t* residual) {
  Vectors residuals;
  if (kResidual) {
    const __m512i bytes = _mm512_maskz_loadu_epi8(block.channels, residual);
    const __m512i zero = _mm512_setzero_si512();
    interleave(_mm512_xor_si512(bytes, block.residual_flip), zero, zero, zero, residuals);
  }
  Vectors codes;
#pragma GCC unroll 4
  for (int i = 0; i < kRegisters; ++i) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i]), block.multiplier[i]);
    if (kResidual) {
      const __m512 centred =
          _mm512_cvtepi32_ps(_mm512_sub_epi32(residuals[i], block.residual_zero_point));
      value = _mm512_add_ps(value, _mm512_mul_ps(centred, block.residual_multiplier));
    }
    if (kNan) value = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(value, value, _CMP_ORD_Q), value);
    codes[i] = _mm512_cvtps_epi32(_mm512_min_ps(value, block.high));
  }
  // The packs saturate what is too small; the upper bound was before the conversion.
  const __m512i low = _mm512_adds_epi16(_mm512_packs_epi32(codes[0], codes[1]), block.zero_point);
  const __m512i high = _mm512_adds_epi16(_mm512_packs_epi32(codes[2], codes[3]), block.zero_point);
  return _mm512_xor_si512(_mm512_max_epu8(_mm512_packus_epi16(low, high), block.low), block.flip);
}

void store_float(const Conv2dArgs& args, const Block& block, const Vectors& acc, float* y) {
  Vectors values;
  for (int i = 0; i < kRegisters; ++i) {
    __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(acc[i]), block.multiplier[i]);
    // A NaN, the second operand, passes.
    if (args.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
    values[i] = _mm512_castps_si512(value);
  }
  transpose_lanes(values);
  for (int i = 0; i < kRegisters; ++i) {
    _mm512_mask_storeu_epi32(y + 16 * i, static_cast<__mmask16>(block.channels >> (16 * i)),
                             values[i]);
  }
}

enum class Output { codes, codes_with_residual, codes_with_nan, float32 };

template <Output kOutput>
inline __attribute__((always_inline)) void store(const Conv2dArgs& args, const Block& block,
                                                 int64_t image, int64_t row, int64_t column,
                                                 int64_t channel, const Vectors& acc) {
  const Conv2dPlace place = conv2d_place(args, image, row, column);
  const int64_t to = place.y + channel;
  if (kOutput == Output::float32) {
    return store_float(args, block, acc, static_cast<float*>(args.y) + to);
  }
  const uint8_t* residual = static_cast<const uint8_t*>(args.residual);
  if (residual != nullptr) residual += place.residual + channel;
  __m512i codes;
  if (kOutput == Output::codes) {
    codes = codes_of<false, false>(block, acc, residual);
  } else if (kOutput == Output::codes_with_residual) {
    codes = codes_of<true, false>(block, acc, residual);
  } else {
    codes = residual == nullptr ? codes_of<false, true>(block, acc, residual)
                                : codes_of<true, true>(block, acc, residual);
  }
  _mm512_mask_storeu_epi8(static_cast<uint8_t*>(args.y) + to, block.channels, codes);
}

template <bool kWhole, Output kOutput>
void run_row(const Conv2dArgs& args, const Block& block, int64_t image, int64_t row,
             int64_t channel) {
  const Conv2dShape& s = args.shape;
  const uint8_t* x =
      args.x + image * args.x_image_stride + row * s.stride_height * args.x_row_stride + channel;
  const int64_t step = s.stride_width * args.x_pixel_stride;
  for (int64_t column = 0; column < s.out_width; ++column, x += step) {
    Vectors acc;
    accumulate<kWhole>(block, x, acc);
    store<kOutput>(args, block, image, row, column, channel, acc);
  }
}

using RunRow = void(const Conv2dArgs&, const Block&, int64_t, int64_t, int64_t);
template <bool kWhole>
RunRow* run_row_of(const Conv2dArgs& args, const Block& block) {
  if (args.output == Conv2dOutput::float32) return run_row<kWhole, Output::float32>;
  if (may_give_nan(args, block)) return run_row<kWhole, Output::codes_with_nan>;
  return args.residual != nullptr ? run_row<kWhole, Output::codes_with_residual>
                                  : run_row<kWhole, Output::codes>;
}

}  // namespace

void conv2d_depthwise(const Conv2dArgs& args, int64_t begin, int64_t end) {
  const Conv2dShape& s = args.shape;
  if (s.kernel_height * s.kernel_width > kMaxTaps) {
    return plain::conv2d_depthwise(args, begin, end);
  }
  if (begin >= end || s.out_width == 0) return;
  if (run_strips(args, begin, end)) return;
  Block block;
  for (int64_t channel = 0; channel < s.groups; channel += kChannels) {
    prepare(args, channel, block);
    const bool whole = channel + kChannels <= s.groups;
    RunRow* const run = whole ? run_row_of<true>(args, block) : run_row_of<false>(args, block);
    for (int64_t unit = begin; unit < end; ++unit) {
      run(args, block, unit / s.out_height, unit % s.out_height, channel);
    }
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
