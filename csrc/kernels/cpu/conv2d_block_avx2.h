// What the 256-bit convolution paths do with a block's finished accumulators. Everything is
// internal: files of different instruction sets include it.
#pragma once

#include <immintrin.h>

#include "kernels/conv2d_output.h"

namespace qtoolkit::kernels::avx2 {
namespace {

constexpr int kLanes = 8;  // int32 in a register
constexpr int kBlockVectors = static_cast<int>(kChannelBlock) / kLanes;
static_assert(kBlockVectors == 4);

// How a block's accumulators become outputs. A signed code is computed 128 higher and flipped at
// the end.
struct Rule {
  int64_t channel;   // the block's first, over all groups
  int64_t channels;  // that exist
  const float* multiplier;
  // For codes only:
  __m256 high;         // the upper bound less the zero point
  __m256i zero_point;  // int16
  __m256i low, flip;   // uint8
  bool residual_signed;
  __m256i residual_zero_point;
  __m256 residual_multiplier;
};

inline Rule rule_of(const Conv2dArgs& args, const float* multiplier, int64_t channel,
                    int64_t channels) {
  const int32_t flip = args.lo < 0 ? 128 : 0;
  Rule rule;
  rule.channel = channel;
  rule.channels = channels;
  rule.multiplier = multiplier;
  rule.high = _mm256_set1_ps(static_cast<float>(args.hi - args.zero_point));
  rule.zero_point = _mm256_set1_epi16(static_cast<int16_t>(args.zero_point + flip));
  rule.low = _mm256_set1_epi8(static_cast<char>(args.lo + flip));
  rule.flip = _mm256_set1_epi8(static_cast<char>(flip));
  rule.residual_signed = args.residual_signed;
  rule.residual_zero_point = _mm256_set1_epi32(args.residual_zero_point);
  rule.residual_multiplier = _mm256_set1_ps(args.residual_multiplier);
  return rule;
}

// Copies fewer bytes than a block has, at most whole octets at once.
inline void copy_bytes(uint8_t* to, const uint8_t* from, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, to += 8, from += 8) __builtin_memcpy(to, from, 8);
  for (; bytes > 0; --bytes) *to++ = *from++;
}

// Float32 or int32 outputs.
template <bool kFloat>
void store_words(const Conv2dArgs& args, const Rule& rule, const Conv2dPlace* place,
                 const int32_t* acc, int pixels) {
  for (int p = 0; p < pixels; ++p, acc += kChannelBlock) {
    alignas(32) int32_t words[kChannelBlock];
    for (int v = 0; v < kBlockVectors; ++v) {
      __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + v * kLanes));
      if (kFloat) {
        __m256 value =
            _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(rule.multiplier + v * kLanes));
        // A NaN, the second operand, passes.
        if (args.relu) value = _mm256_max_ps(_mm256_setzero_ps(), value);
        sum = _mm256_castps_si256(value);
      }
      _mm256_store_si256(reinterpret_cast<__m256i*>(words + v * kLanes), sum);
    }
    constexpr int64_t kBytes = sizeof(int32_t);
    copy_bytes(static_cast<uint8_t*>(args.y) + (place[p].y + rule.channel) * kBytes,
               reinterpret_cast<const uint8_t*>(words), rule.channels * kBytes);
  }
}

// One pixel's codes before the upper bound, the rounding and the zero point at eight channels.
template <bool kResidual, bool kNan>
inline __attribute__((always_inline)) __m256i codes_of(const Rule& rule, const int32_t* acc,
                                                       const uint8_t* residual, int vector) {
  const __m256i sum = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + vector * kLanes));
  __m256 value =
      _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(rule.multiplier + vector * kLanes));
  if (kResidual) {
    const __m128i bytes =
        _mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual + vector * kLanes));
    const __m256i code =
        rule.residual_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    const __m256 centred = _mm256_cvtepi32_ps(_mm256_sub_epi32(code, rule.residual_zero_point));
    value = _mm256_add_ps(value, _mm256_mul_ps(centred, rule.residual_multiplier));
  }
  if (kNan) value = _mm256_and_ps(value, _mm256_cmp_ps(value, value, _CMP_ORD_Q));
  return _mm256_cvtps_epi32(_mm256_min_ps(value, rule.high));
}

// The upper bound comes before the conversion to integers, which could not hold more; what is too
// small ends at the least int16.
template <bool kResidual, bool kNan>
void store_codes(const Conv2dArgs& args, const Rule& rule, const Conv2dPlace* place,
                 const int32_t* acc, int pixels) {
  const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
  const bool whole = rule.channels == kChannelBlock;
  alignas(32) uint8_t part[kChannelBlock] = {};
  for (int p = 0; p < pixels; ++p, acc += kChannelBlock) {
    const uint8_t* residual = nullptr;
    if (kResidual) {
      residual = static_cast<const uint8_t*>(args.residual) + place[p].residual + rule.channel;
      if (!whole) {
        copy_bytes(part, residual, rule.channels);
        residual = part;
      }
    }
    const auto words = [&](int vector) {
      const __m256i codes =
          _mm256_packs_epi32(codes_of<kResidual, kNan>(rule, acc, residual, vector),
                             codes_of<kResidual, kNan>(rule, acc, residual, vector + 1));
      return _mm256_adds_epi16(codes, rule.zero_point);
    };
    __m256i codes = _mm256_max_epu8(_mm256_packus_epi16(words(0), words(2)), rule.low);
    codes = _mm256_permutevar8x32_epi32(_mm256_xor_si256(codes, rule.flip), order);
    uint8_t* const y = static_cast<uint8_t*>(args.y) + place[p].y + rule.channel;
    if (whole) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y), codes);
    } else {
      _mm256_store_si256(reinterpret_cast<__m256i*>(part), codes);
      copy_bytes(y, part, rule.channels);
    }
  }
}

// True if a multiplier is so large, infinite or NaN that a NaN could follow (0 * inf, inf - inf).
inline bool may_give_nan(const Conv2dArgs& args, const Rule& rule) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  int finite = 0xff;
  for (int v = 0; v < kBlockVectors; ++v) {
    const __m256 size = _mm256_andnot_ps(sign, _mm256_loadu_ps(rule.multiplier + v * kLanes));
    finite &= _mm256_movemask_ps(_mm256_cmp_ps(size, _mm256_set1_ps(0x1p64f), _CMP_LE_OQ));
  }
  return finite != 0xff || !(__builtin_fabsf(args.residual_multiplier) <= 0x1p64f);
}

// Writes the outputs of `pixels` pixels, whose sums lie at acc[pixel * kChannelBlock + lane].
using Store = void(const Conv2dArgs&, const Rule&, const Conv2dPlace* place, const int32_t* acc,
                   int pixels);
inline Store* store_of(const Conv2dArgs& args, const Rule& rule) {
  if (args.output == Conv2dOutput::float32) return store_words<true>;
  if (args.output == Conv2dOutput::int32) return store_words<false>;
  const bool nan = may_give_nan(args, rule);
  if (args.residual == nullptr) return nan ? store_codes<false, true> : store_codes<false, false>;
  return nan ? store_codes<true, true> : store_codes<true, false>;
}

}  // namespace
}  // namespace qtoolkit::kernels::avx2
