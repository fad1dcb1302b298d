// What the AVX2 convolution paths do with finished accumulators. Static, and only for files that
// are compiled for AVX2.
#pragma once

#include <immintrin.h>

#include "kernels/conv2d_output.h"

namespace qtoolkit::kernels::avx2 {

static inline void store_eight_floats(const Conv2dArgs& args, __m256 value, float* y) {
  // A NaN, the second operand, passes.
  if (args.relu) value = _mm256_max_ps(_mm256_setzero_ps(), value);
  _mm256_storeu_ps(y, value);
}

// `residual` points to the eight channels' codes, nullptr if absent.
static inline void store_eight_codes(const Conv2dArgs& args, __m256 value, const uint8_t* residual,
                                     uint8_t* y) {
  if (residual != nullptr) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(residual));
    const __m256i codes =
        args.residual_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes);
    const __m256 centred =
        _mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(args.residual_zero_point)));
    value = _mm256_add_ps(value, _mm256_mul_ps(centred, _mm256_set1_ps(args.residual_multiplier)));
  }
  value = _mm256_and_ps(value, _mm256_cmp_ps(value, value, _CMP_ORD_Q));  // NaN to 0
  value = _mm256_max_ps(value, _mm256_set1_ps(static_cast<float>(args.lo - args.zero_point)));
  value = _mm256_min_ps(value, _mm256_set1_ps(static_cast<float>(args.hi - args.zero_point)));
  const __m256i codes =
      _mm256_add_epi32(_mm256_cvtps_epi32(value), _mm256_set1_epi32(args.zero_point));
  // The low bytes, of signed codes as of unsigned ones.
  const __m256i first_bytes = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i bytes = _mm256_shuffle_epi8(codes, first_bytes);
  _mm_storel_epi64(
      reinterpret_cast<__m128i*>(y),
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1)));
}

// One pixel's outputs at `channels` channels of a block.
static inline void store_outputs(const Conv2dArgs& args, Conv2dPlace place, int64_t channel,
                                 int64_t channels, const int32_t* acc, const float* multiplier) {
  int64_t lane = 0;
  for (; lane + 8 <= channels; lane += 8) {
    const __m256i sums = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + lane));
    const __m256 value =
        _mm256_mul_ps(_mm256_cvtepi32_ps(sums), _mm256_loadu_ps(multiplier + lane));
    const int64_t to = place.y + channel + lane;
    if (args.output == Conv2dOutput::int32) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<int32_t*>(args.y) + to), sums);
      continue;
    }
    if (args.output == Conv2dOutput::float32) {
      store_eight_floats(args, value, static_cast<float*>(args.y) + to);
      continue;
    }
    const uint8_t* residual = static_cast<const uint8_t*>(args.residual);
    if (residual != nullptr) residual += place.residual + channel + lane;
    store_eight_codes(args, value, residual, static_cast<uint8_t*>(args.y) + to);
  }
  for (; lane < channels; ++lane) {
    store_conv2d_output(args, place, channel + lane, acc[lane], multiplier[lane]);
  }
}

}  // namespace qtoolkit::kernels::avx2
