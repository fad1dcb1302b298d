// 64 channels at a time, then 16, the rest with a mask.
#include <immintrin.h>

#include "kernels/upsample.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int64_t kLanes = 16;

// What every output needs, at 16 channels.
struct Constants {
  __m512i x_zero_point, zero_point;
  __m512 low, high;

  explicit Constants(const UpsampleBilinear2dArgs& args)
      : x_zero_point(_mm512_set1_epi32(args.x_zero_point)),
        zero_point(_mm512_set1_epi32(args.zero_point)),
        low(_mm512_set1_ps(static_cast<float>(args.lo - args.zero_point))),
        high(_mm512_set1_ps(static_cast<float>(args.hi - args.zero_point))) {}

  template <bool kSigned>
  __m512 read(const uint8_t* x, __mmask16 mask) const {
    const __m128i bytes = _mm_maskz_loadu_epi8(mask, x);
    const __m512i codes = kSigned ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes);
    return _mm512_cvtepi32_ps(_mm512_sub_epi32(codes, x_zero_point));
  }

  // round_to_code; the values are finite sums of finite products, or NaN from an infinite weight.
  __m128i code(__m512 value) const {
    const __mmask16 not_nan = _mm512_cmp_ps_mask(value, value, _CMP_ORD_Q);
    value = _mm512_max_ps(_mm512_maskz_mov_ps(not_nan, value), low);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_min_ps(value, high));
    return _mm512_cvtepi32_epi8(_mm512_add_epi32(rounded, zero_point));
  }
};

__m512 weighted(__m512 a, __m512 a_weight, __m512 b, __m512 b_weight) {
  return _mm512_add_ps(_mm512_mul_ps(a, a_weight), _mm512_mul_ps(b, b_weight));
}

// One output row at kVectors * 16 channels, of which the last vector has those of `mask`; x is the
// image, y the row, both at the first channel. What two input rows give in a column is kept while
// output pixels lie beside that column.
template <bool kSigned, int kVectors>
void interpolate_row(const UpsampleBilinear2dArgs& args, const Constants& constants, int64_t i,
                     const uint8_t* x, uint8_t* y, __mmask16 mask) {
  const LinearSource row = args.rows[i];
  const uint8_t* const above = x + row.first * args.x_row_stride;
  const uint8_t* const below = x + row.second * args.x_row_stride;
  const __m512 above_weight = _mm512_set1_ps(row.first_weight);
  const __m512 below_weight = _mm512_set1_ps(row.second_weight);
  const auto column = [&](int64_t at, __m512* result) {
    const int64_t offset = at * args.channels;
    for (int k = 0; k < kVectors; ++k) {
      const int64_t from = offset + k * kLanes;
      result[k] = weighted(constants.read<kSigned>(above + from, mask), above_weight,
                           constants.read<kSigned>(below + from, mask), below_weight);
    }
  };
  __m512 left[kVectors], right[kVectors];
  int64_t first = -1, second = -1;
  for (int64_t j = 0; j < args.out_width; ++j) {
    const LinearSource& source = args.columns[j];
    if (source.first != first || source.second != second) {
      if (source.first == second) {
        for (int k = 0; k < kVectors; ++k) left[k] = right[k];
      } else {
        column(source.first, left);
      }
      column(source.second, right);
      first = source.first;
      second = source.second;
    }
    const __m512 left_weight = _mm512_set1_ps(source.first_weight);
    const __m512 right_weight = _mm512_set1_ps(source.second_weight);
    for (int k = 0; k < kVectors; ++k) {
      const __m512 value = weighted(left[k], left_weight, right[k], right_weight);
      _mm_mask_storeu_epi8(y + j * args.channels + k * kLanes, mask, constants.code(value));
    }
  }
}

// args is a copy, which a store of bytes cannot change.
template <bool kSigned>
void interpolate(const UpsampleBilinear2dArgs args, int64_t begin, int64_t end) {
  const Constants constants(args);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t n = row / args.out_height, i = row % args.out_height;
    const uint8_t* x = args.x + n * args.x_image_stride;
    uint8_t* y = args.y + n * args.y_image_stride + i * args.y_row_stride;
    int64_t rest = args.channels;
    for (; rest >= 4 * kLanes; rest -= 4 * kLanes, x += 4 * kLanes, y += 4 * kLanes) {
      interpolate_row<kSigned, 4>(args, constants, i, x, y, 0xFFFF);
    }
    for (; rest > 0; rest -= kLanes, x += kLanes, y += kLanes) {
      const auto mask = static_cast<__mmask16>(rest >= kLanes ? 0xFFFF : (1 << rest) - 1);
      interpolate_row<kSigned, 1>(args, constants, i, x, y, mask);
    }
  }
}

}  // namespace

void upsample_bilinear2d(const UpsampleBilinear2dArgs& args, int64_t begin, int64_t end) {
  args.x_signed ? interpolate<true>(args, begin, end) : interpolate<false>(args, begin, end);
}

}  // namespace qtoolkit::kernels::avx512vnni
