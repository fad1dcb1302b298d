// What the AVX-512 convolution paths do with finished accumulators. Everything is internal: files
// of different instruction sets include it.
#pragma once

#include <immintrin.h>

#include "kernels/conv2d_output.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int kLanes = 16;  // int32 in a register
static_assert(kChannelBlock == 2 * kLanes);

// How simple_codes() centres the residual's codes and multiplies them: `folded` in one instruction,
// where (2^23 + zero point) * multiplier is a float32, as it is for a zero point of 0.
enum class SimpleResidual : uint8_t { none, folded, any };

// How a block's accumulators become outputs. A signed code is computed 128 higher and flipped at
// the end.
struct Rule {
  int64_t channel;  // the block's first, over all groups
  __m512 multiplier[2];
  __mmask16 lanes[2];  // channels that exist
  // For codes only:
  __m512 high;         // the upper bound less the zero point
  __m512i zero_point;  // int16
  __m512i low, flip;   // uint8
  bool residual_signed;
  __m512i residual_zero_point;
  __m512 residual_multiplier;

  bool simple;  // simple_codes() may be used, which reads what follows
  bool whole;   // no register is partly filled with channels
  SimpleResidual simple_residual;
  // A residual code in the mantissa of 2^23 is the number 2^23 + code.
  __m512i residual_base, residual_bytes;
  __m512 residual_offset;  // 2^23 + its zero point; if folded times the multiplier
};

// True if the absolute value of all 32 is at most `bound`, of none if one is NaN.
inline bool at_most(const __m512 (&values)[2], float bound) {
  const __m512 bounds = _mm512_set1_ps(bound);
  const __mmask16 first = _mm512_cmp_ps_mask(_mm512_abs_ps(values[0]), bounds, _CMP_LE_OQ);
  const __mmask16 second = _mm512_cmp_ps_mask(_mm512_abs_ps(values[1]), bounds, _CMP_LE_OQ);
  return (first & second) == 0xffff;
}

inline void set_simple(const Conv2dArgs& args, int64_t channels, Rule& rule) {
  constexpr float kBase = 0x1p23f;
  // Nothing is NaN and all values are below 2^31, so that converting them cannot overflow.
  rule.simple = args.lo == 0 && args.hi == 255 && at_most(rule.multiplier, 0.5f);
  rule.whole = channels % kLanes == 0;
  rule.simple_residual = SimpleResidual::none;
  if (args.residual == nullptr) return;
  const int32_t zero_point = args.residual_zero_point;
  rule.simple = rule.simple && !args.residual_signed && zero_point >= 0 && zero_point <= 255 &&
                __builtin_fabsf(args.residual_multiplier) <= 0x1p20f;
  const float offset = kBase + static_cast<float>(zero_point);
  const double product = static_cast<double>(offset) * args.residual_multiplier;
  const bool folded = static_cast<double>(static_cast<float>(product)) == product;
  rule.simple_residual = folded ? SimpleResidual::folded : SimpleResidual::any;
  rule.residual_offset = _mm512_set1_ps(folded ? static_cast<float>(product) : offset);
  rule.residual_base = _mm512_castps_si512(_mm512_set1_ps(kBase));
  // Lane i's lowest byte from byte i; the others are not written.
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  rule.residual_bytes = lanes;
}

// `multiplier` is that of the block, of which `channels` exist.
inline Rule rule_of(const Conv2dArgs& args, const float* multiplier, int64_t channel,
                    int64_t channels) {
  const int32_t flip = args.lo < 0 ? 128 : 0;
  Rule rule;
  rule.channel = channel;
  for (int v = 0; v < 2; ++v) {
    const int64_t left = channels - v * kLanes;
    rule.multiplier[v] = _mm512_loadu_ps(multiplier + v * kLanes);
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
  set_simple(args, channels, rule);
  return rule;
}

inline void store_float(const Conv2dArgs& args, const Rule& rule, const Conv2dPlace* place,
                        const int32_t* acc, int pixels) {
  float* const y = static_cast<float*>(args.y) + rule.channel;
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < 2; ++v) {
      const __m512i sum = _mm512_loadu_si512(acc + p * kChannelBlock + v * kLanes);
      __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), rule.multiplier[v]);
      // A NaN, the second operand, passes.
      if (args.relu) value = _mm512_max_ps(_mm512_setzero_ps(), value);
      _mm512_mask_storeu_ps(y + place[p].y + v * kLanes, rule.lanes[v], value);
    }
  }
}

inline void store_sums(const Conv2dArgs& args, const Rule& rule, const Conv2dPlace* place,
                       const int32_t* acc, int pixels) {
  int32_t* const y = static_cast<int32_t*>(args.y) + rule.channel;
  for (int p = 0; p < pixels; ++p) {
    for (int v = 0; v < 2; ++v) {
      _mm512_mask_storeu_epi32(y + place[p].y + v * kLanes, rule.lanes[v],
                               _mm512_loadu_si512(acc + p * kChannelBlock + v * kLanes));
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
void store_codes(const Conv2dArgs& args, const Rule& rule, const Conv2dPlace* place,
                 const int32_t* acc, int pixels) {
  uint8_t* const y = static_cast<uint8_t*>(args.y) + rule.channel;
  const uint8_t* residual = static_cast<const uint8_t*>(args.residual);
  if (kResidual) residual += rule.channel;
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __mmask32 lanes = rule.lanes[0] | static_cast<__mmask32>(rule.lanes[1]) << kLanes;
  // Two pixels at a time; an odd last one is paired with itself and stored once.
  for (int p = 0; p < pixels; p += 2) {
    const bool pair = p + 1 < pixels;
    const auto words = [&](int i) {
      return words_of<kResidual, kNan>(rule, acc + i * kChannelBlock,
                                       kResidual ? residual + place[i].residual : nullptr);
    };
    const __m512i first = words(p);
    const __m512i second = pair ? words(p + 1) : first;
    __m512i codes = _mm512_max_epu8(_mm512_packus_epi16(first, second), rule.low);
    codes = _mm512_permutexvar_epi32(order, _mm512_xor_si512(codes, rule.flip));
    _mm256_mask_storeu_epi8(y + place[p].y, lanes, _mm512_castsi512_si256(codes));
    if (pair) {
      _mm256_mask_storeu_epi8(y + place[p + 1].y, lanes, _mm512_extracti64x4_epi64(codes, 1));
    }
  }
}

// True if a multiplier is so large, infinite or NaN that a NaN could follow (0 * inf, inf - inf).
inline bool may_give_nan(const Conv2dArgs& args, const Rule& rule) {
  return !at_most(rule.multiplier, 0x1p64f) ||
         !(__builtin_fabsf(args.residual_multiplier) <= 0x1p64f);
}

// Operations whose second operand stays in memory, where GCC 12 would rather keep it in a register
// and spill accumulators instead.
inline __attribute__((always_inline)) __m512 times(__m512 a, const __m512& b) {
  asm("vmulps %1, %0, %0" : "+v"(a) : "m"(b));
  return a;
}
inline __attribute__((always_inline)) __m512 minus(__m512 a, const __m512& b) {
  asm("vsubps %1, %0, %0" : "+v"(a) : "m"(b));
  return a;
}
inline __attribute__((always_inline)) __m512 times_minus(__m512 a, __m512 b, const __m512& c) {
  asm("vfmsub213ps %2, %1, %0" : "+v"(a) : "v"(b), "m"(c));
  return a;
}
inline __attribute__((always_inline)) __m512i add_words(__m512i a, const __m512i& b) {
  asm("vpaddsw %1, %0, %0" : "+v"(a) : "m"(b));
  return a;
}

// Part `index` of the codes: those of sixteen channels, or with kVectors of 2 of thirty-two.
template <int kVectors>
inline __attribute__((always_inline)) void store_bytes(const Rule& rule, uint8_t* to, __m512i codes,
                                                       int index) {
  if (__builtin_expect(rule.whole, 1)) {
    // From any part of a register to memory in one instruction, which GCC 12 makes two of.
    if (kVectors == 2 && index == 0) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_castsi512_si256(codes));
    } else if (kVectors == 2) {
      asm("vextracti64x4 $1, %1, %0" : "=m"(*reinterpret_cast<__m256i_u*>(to)) : "v"(codes));
    } else if (index == 0) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_castsi512_si128(codes));
    } else {
      asm("vextracti32x4 %2, %1, %0"
          : "=m"(*reinterpret_cast<__m128i_u*>(to))
          : "v"(codes), "i"(index));
    }
    return;
  }
  // The bytes of the parts before are not written.
  const __mmask64 lanes = kVectors == 2
                              ? rule.lanes[0] | static_cast<__mmask64>(rule.lanes[1]) << kLanes
                              : rule.lanes[0];
  const int skip = index * kVectors * kLanes;
  _mm512_mask_storeu_epi8(to - skip, lanes << skip, codes);
}

// Sixteen channels' residual.
template <SimpleResidual kResidual>
inline __attribute__((always_inline)) __m512 simple_residual(const Rule& rule, int lanes,
                                                             const uint8_t* from) {
  // A masked load would take the place of one more multiply-add.
  const __m128i bytes = rule.whole ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(from))
                                   : _mm_maskz_loadu_epi8(rule.lanes[lanes], from);
  __m512 value = _mm512_castsi512_ps(rule.residual_base);
  const __mmask64 lowest = 0x1111111111111111;
  asm("vpshufb %2, %1, %0%{%3%}"
      : "+v"(value)
      : "v"(_mm512_broadcast_i32x4(bytes)), "m"(rule.residual_bytes), "Yk"(lowest));
  if (kResidual == SimpleResidual::folded) {
    return times_minus(value, rule.residual_multiplier, rule.residual_offset);
  }
  return times(minus(value, rule.residual_offset), rule.residual_multiplier);
}

// The codes of four registers of sums, side by side. Register i holds channels of half `lanes[i]`
// of the block, its residual begins at residual[i]. With 4 to 7 instructions a register besides
// loads, less than words_of() takes; what they compute is the same.
template <bool kZeroPoint, SimpleResidual kResidual>
inline __attribute__((always_inline)) __m512i simple_codes(const Rule& rule,
                                                           const __m512i (&sums)[4],
                                                           const int (&lanes)[4],
                                                           const uint8_t* const (&residual)[4]) {
  __m512i codes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    __m512 value = times(_mm512_cvtepi32_ps(sums[i]), rule.multiplier[lanes[i]]);
    if (kResidual != SimpleResidual::none) {
      value = _mm512_add_ps(value, simple_residual<kResidual>(rule, lanes[i], residual[i]));
    }
    codes[i] = _mm512_cvtps_epi32(value);
  }
  __m512i low = _mm512_packs_epi32(codes[0], codes[1]);
  __m512i high = _mm512_packs_epi32(codes[2], codes[3]);
  if (kZeroPoint) {
    low = add_words(low, rule.zero_point);
    high = add_words(high, rule.zero_point);
  }
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high));
}

// Writes the codes of `kPixels` pixels of kVectors registers of channels. sum(pixel, vector) gives
// the sums.
template <int kPixels, int kVectors, bool kZeroPoint, SimpleResidual kResidual, class Sum>
inline __attribute__((always_inline)) void store_simple(const Conv2dArgs& args, const Rule& rule,
                                                        const Conv2dPlace* place, Sum sum) {
  uint8_t* const y = static_cast<uint8_t*>(args.y) + rule.channel;
  const uint8_t* const from = static_cast<const uint8_t*>(args.residual) + rule.channel;
  constexpr int kStep = 4 / kVectors;  // pixels in four registers
#pragma GCC unroll 7
  for (int first = 0; first < kPixels; first += kStep) {
    __m512i sums[4];
    int lanes[4];
    const uint8_t* residual[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      // After the last pixel it once more.
      const int p = first + i / kVectors < kPixels ? first + i / kVectors : kPixels - 1;
      lanes[i] = i % kVectors;
      sums[i] = sum(p, lanes[i]);
      residual[i] = kResidual == SimpleResidual::none
                        ? nullptr
                        : from + place[p].residual + lanes[i] * kLanes;
    }
    const __m512i codes = simple_codes<kZeroPoint, kResidual>(rule, sums, lanes, residual);
#pragma GCC unroll 4
    for (int i = 0; i < kStep; ++i) {
      if (first + i >= kPixels) continue;
      store_bytes<kVectors>(rule, y + place[first + i].y, codes, i);
    }
  }
}

// Writes the outputs of `pixels` pixels, whose sums lie at acc[pixel * kChannelBlock + lane].
using Store = void(const Conv2dArgs&, const Rule&, const Conv2dPlace* place, const int32_t* acc,
                   int pixels);
inline Store* store_of(const Conv2dArgs& args, const Rule& rule) {
  if (args.output == Conv2dOutput::int32) return store_sums;
  if (args.output == Conv2dOutput::float32) return store_float;
  const bool nan = may_give_nan(args, rule);
  if (args.residual == nullptr) return nan ? store_codes<false, true> : store_codes<false, false>;
  return nan ? store_codes<true, true> : store_codes<true, false>;
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
