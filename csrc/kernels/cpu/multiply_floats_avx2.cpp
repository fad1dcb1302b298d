#include <immintrin.h>

#include <cstddef>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::avx2 {
#include "kernels/cpu/multiply_floats_unpack.inl"

namespace {

struct Lanes {
  __m256 low, high;
};
constexpr int kTileRows = 3;
constexpr int tile_channels(int rows) { return rows == 1 ? 4 : 2; }

inline Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, const Lanes& a) {
  _mm256_storeu_ps(to, a.low);
  _mm256_storeu_ps(to + 8, a.high);
}
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline float add_halves(const Lanes& a) {
  const __m256 eight = _mm256_add_ps(a.low, a.high);
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The scale and zero point of each lane of a block.
inline void lane_terms(const FloatWeight& weight, int64_t channel, int64_t block,
                       float (&scale)[16], float (&zero)[16]) {
  for (int64_t lane = 0; lane < kFloatLanes; ++lane) {
    const int64_t k = block * kFloatBlock + lane * kFloatRun;
    const int64_t at = channel * weight.groups() + k / weight.group;
    scale[lane] = weight.scale[at];
    zero[lane] = zero_at(weight, at);
  }
}

// The numbers of codes of up to 4 bits, by way of a table.
template <int kBits>
class FewBits {
 public:
  explicit FewBits(const FloatWeight& weight) : weight_(weight) {
    alignas(32) float numbers[16];
    few_numbers<kBits>(weight, numbers);
    low_ = _mm256_load_ps(numbers);
    high_ = _mm256_load_ps(numbers + 8);
  }

  void operator()(int64_t channel, int64_t block, float* to) const {
    if (!inside(weight_, block)) return unpack_any(weight_, channel, block, to);
    alignas(32) uint32_t words[16];
    const uint8_t* const codes =
        weight_.codes + channel * weight_.row_stride + block * kFloatLanes * kBits;
    for (int j = 0; j < 16; ++j) {
      words[j] = 0;
      __builtin_memcpy(words + j, codes + j * kBits, kBits);
    }
    alignas(32) float scale[16], zero[16];
    lane_terms(weight_, channel, block, scale, zero);
    for (int half = 0; half < 16; half += 8) {
      __m256i word = _mm256_load_si256(reinterpret_cast<const __m256i*>(words + half));
      for (int i = 0; i < kFloatRun; ++i) {
        const __m256 is_high = _mm256_castsi256_ps(_mm256_slli_epi32(word, 28));
        const __m256 number = _mm256_blendv_ps(_mm256_permutevar8x32_ps(low_, word),
                                               _mm256_permutevar8x32_ps(high_, word), is_high);
        const __m256 centred = _mm256_sub_ps(number, _mm256_load_ps(zero + half));
        _mm256_storeu_ps(to + i * kFloatLanes + half,
                         _mm256_mul_ps(centred, _mm256_load_ps(scale + half)));
        word = _mm256_srli_epi32(word, kBits);
      }
    }
  }

 private:
  const FloatWeight& weight_;
  __m256 low_, high_;
};

}  // namespace

#include "kernels/cpu/multiply_floats.inl"

void multiply_floats(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  const FloatWeight& weight = args.weight;
  switch (whole_runs(weight) ? weight.bits : 8) {
    case 1:
      return multiply_all_panels(args, FewBits<1>(weight), begin, end);
    case 2:
      return multiply_all_panels(args, FewBits<2>(weight), begin, end);
    case 3:
      return multiply_all_panels(args, FewBits<3>(weight), begin, end);
    case 4:
      return multiply_all_panels(args, FewBits<4>(weight), begin, end);
    default:
      return multiply_all_panels(args, UnpackAny(weight), begin, end);
  }
}

}  // namespace qtoolkit::kernels::avx2
