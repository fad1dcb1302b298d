#include <immintrin.h>

#include <cstddef>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::avx512vnni {
#include "kernels/cpu/multiply_floats_unpack.inl"

namespace {

using Lanes = __m512;
constexpr int kTileRows = 6;
constexpr int tile_channels(int rows) { return rows <= 3 ? 8 : 4; }

inline __attribute__((always_inline)) Lanes load(const float* from) {
  return _mm512_loadu_ps(from);
}
inline __attribute__((always_inline)) void store(float* to, Lanes a) { _mm512_storeu_ps(to, a); }
inline __attribute__((always_inline)) Lanes fma(Lanes a, Lanes b, Lanes c) {
  return _mm512_fmadd_ps(a, b, c);
}
inline float add_halves(Lanes a) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The scales and zero points of a block's lanes.
struct Terms {
  __m512 scale, zero;
};

// How they are found for the groups of a weight.
class GroupTerms {
 public:
  explicit GroupTerms(const FloatWeight& weight)
      : weight_(weight), groups_(weight.groups()), whole_(whole_blocks(weight)) {
    if (whole_) {
      blocks_ = weight.group / kFloatBlock;
    } else if (kFloatBlock % weight.group == 0) {
      within_ = kFloatBlock / weight.group;
      alignas(64) int32_t group[16];
      for (int j = 0; j < 16; ++j) group[j] = static_cast<int32_t>(j * kFloatRun / weight.group);
      group_ = _mm512_load_si512(group);
    }
  }

  inline __attribute__((always_inline)) Terms of(int64_t channel, int64_t block) const {
    const int64_t row = channel * groups_;
    if (whole_) {
      const int64_t at = row + block / blocks_;
      return {_mm512_set1_ps(weight_.scale[at]), _mm512_set1_ps(zero_at(weight_, at))};
    }
    if (within_ != 0) {
      const int64_t at = row + block * within_;
      const auto mask = static_cast<__mmask16>((1u << within_) - 1);
      const __m512 scale =
          _mm512_permutexvar_ps(group_, _mm512_maskz_loadu_ps(mask, weight_.scale + at));
      if (weight_.zero_point == nullptr) return {scale, _mm512_set1_ps(weight_.zero)};
      const __m128i zeros = _mm_maskz_loadu_epi8(mask, weight_.zero_point + at);
      const __m512 zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(zeros));
      return {scale, _mm512_permutexvar_ps(group_, zero)};
    }
    alignas(64) float scale[16], zero[16];
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t at = row + (block * kFloatBlock + j * kFloatRun) / weight_.group;
      scale[j] = weight_.scale[at];
      zero[j] = zero_at(weight_, at);
    }
    return {_mm512_load_ps(scale), _mm512_load_ps(zero)};
  }

 private:
  const FloatWeight& weight_;
  int64_t groups_;
  bool whole_;
  int64_t blocks_ = 1;  // of a group, where whole_
  int64_t within_ = 0;  // groups of a block, where these are whole
  __m512i group_ = {};  // of each lane there
};

// Each lane's codes, the first one lowest; reads whole codes only.
template <int kBits>
inline __attribute__((always_inline)) __m512i load_words(const uint8_t* codes) {
  if constexpr (kBits == 4) return _mm512_loadu_si512(codes);
  if constexpr (kBits == 2) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  }
  if constexpr (kBits == 1) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  }
  // 3 bits: four lanes of 12 bytes, spread to three bytes each.
  const __m512i bytes = _mm512_maskz_loadu_epi8((__mmask64{1} << 48) - 1, codes);
  const __m512i parts = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11), bytes);
  return _mm512_shuffle_epi8(parts, _mm512_broadcast_i32x4(_mm_setr_epi8(
                                        0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1)));
}

// call.operator()<i>() for the vectors of a block.
template <class Call>
inline __attribute__((always_inline)) void for_each_vector(const Call& call) {
  call.template operator()<0>();
  call.template operator()<1>();
  call.template operator()<2>();
  call.template operator()<3>();
  call.template operator()<4>();
  call.template operator()<5>();
  call.template operator()<6>();
  call.template operator()<7>();
}

// The numbers of codes of up to 4 bits, by way of a table. kWhole: whole_blocks(weight).
template <int kBits, bool kWhole>
class FewBits {
 public:
  explicit FewBits(const FloatWeight& weight) : weight_(weight), terms_(weight) {
    alignas(64) float numbers[16];
    few_numbers<kBits>(weight, numbers);
    numbers_ = _mm512_load_ps(numbers);
  }

  // A block that does not reach beyond the width, and its vectors.
  struct Block {
    __m512i words;
    __m512 table;
    Terms terms;
  };
  inline __attribute__((always_inline)) Block block(int64_t channel, int64_t block) const {
    const uint8_t* const codes =
        weight_.codes + channel * weight_.row_stride + block * kFloatLanes * kBits;
    const Terms terms = terms_.of(channel, block);
    const __m512 table =
        kWhole ? _mm512_mul_ps(_mm512_sub_ps(numbers_, terms.zero), terms.scale) : numbers_;
    return {load_words<kBits>(codes), table, terms};
  }
  template <int kVector>
  static inline __attribute__((always_inline)) __m512 vector(const Block& block) {
    const __m512 number =
        _mm512_permutexvar_ps(_mm512_srli_epi32(block.words, kVector * kBits), block.table);
    if constexpr (kWhole) return number;
    return _mm512_mul_ps(_mm512_sub_ps(number, block.terms.zero), block.terms.scale);
  }

  inline __attribute__((always_inline)) void operator()(int64_t channel, int64_t block,
                                                        float* to) const {
    if (!inside(weight_, block)) return unpack_any(weight_, channel, block, to);
    const Block here = this->block(channel, block);
    for_each_vector([&]<int kVector>() __attribute__((always_inline)) {
      store(to + kVector * kFloatLanes, vector<kVector>(here));
    });
  }

 private:
  const FloatWeight& weight_;
  GroupTerms terms_;
  __m512 numbers_;
};

// The numbers of codes of 5 to 8 bits: those of a lane are a word of 64 bits.
template <int kBits>
class ManyBits {
 public:
  explicit ManyBits(const FloatWeight& weight)
      : weight_(weight),
        terms_(weight),
        end_(weight.codes + weight.channels * weight.row_stride),
        step_(_mm256_mullo_epi32(_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7),
                                 _mm256_set1_epi32(kBits))) {}

  inline __attribute__((always_inline)) void operator()(int64_t channel, int64_t block,
                                                        float* to) const {
    constexpr int64_t kBytes = kFloatLanes * kBits;
    const uint8_t* const codes = weight_.codes + channel * weight_.row_stride + block * kBytes;
    // A word has 8 - kBits bytes more than its codes.
    if (!inside(weight_, block) || codes + kBytes + 8 - kBits > end_) {
      return unpack_any(weight_, channel, block, to);
    }
    const Terms terms = terms_.of(channel, block);
    const __m512i low = words(codes), high = words(codes + kBytes / 2);
    const __m512i even =
        _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    for_each_vector([&]<int kVector>() __attribute__((always_inline)) {
      const __m512i both = _mm512_permutex2var_epi32(_mm512_srli_epi64(low, kVector * kBits), even,
                                                     _mm512_srli_epi64(high, kVector * kBits));
      const __m512i code = _mm512_and_si512(both, _mm512_set1_epi32((1 << kBits) - 1));
      const __m512 number = weight_.numbers != nullptr
                                ? _mm512_i32gather_ps(code, weight_.numbers, 4)
                                : _mm512_cvtepi32_ps(code);
      store(to + kVector * kFloatLanes,
            _mm512_mul_ps(_mm512_sub_ps(number, terms.zero), terms.scale));
    });
  }

 private:
  inline __attribute__((always_inline)) __m512i words(const uint8_t* codes) const {
    return kBits == 8 ? _mm512_loadu_si512(codes) : _mm512_i32gather_epi64(step_, codes, 1);
  }

  const FloatWeight& weight_;
  GroupTerms terms_;
  const uint8_t* end_;
  __m256i step_;
};

// --- few rows: numbers are multiplied as they are made ------------------------------------------

constexpr int kTogether = 4;  // channels whose chains of fma run beside each other
constexpr int kFewRows = 4;

template <int kRows, class Unpack>
void multiply_few_rows(const MultiplyFloatsArgs& args, const Unpack& unpack, int64_t begin,
                       int64_t end) {
  const FloatWeight& weight = args.weight;
  const int64_t whole = weight.width / kFloatBlock, x_stride = weight.blocks() * kFloatBlock;
  const int64_t last =
      end * kFloatChannels < weight.channels ? end * kFloatChannels : weight.channels;
  for (int64_t first = begin * kFloatChannels; first < last; first += kTogether) {
    Lanes sums[kRows][kTogether];
    int64_t channel[kTogether];
#pragma GCC unroll 8
    for (int c = 0; c < kTogether; ++c) {
      for (int m = 0; m < kRows; ++m) sums[m][c] = _mm512_setzero_ps();
      channel[c] = first + c < last ? first + c : last - 1;
    }
    for (int64_t block = 0; block < whole; ++block) {
      typename Unpack::Block blocks[kTogether];
#pragma GCC unroll 8
      for (int c = 0; c < kTogether; ++c) {
        blocks[c] = unpack.block(channel[c], block);
        _mm_prefetch(weight.codes + (channel[c] + kTogether) * weight.row_stride +
                         block * kFloatLanes * weight.bits,
                     _MM_HINT_T0);
      }
      const float* const x = args.x + block * kFloatBlock;
      for_each_vector([&]<int kVector>() __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int c = 0; c < kTogether; ++c) {
          const Lanes numbers = Unpack::template vector<kVector>(blocks[c]);
#pragma GCC unroll 8
          for (int m = 0; m < kRows; ++m) {
            sums[m][c] = fma(numbers, load(x + m * x_stride + kVector * kFloatLanes), sums[m][c]);
          }
        }
      });
    }
    for (int c = 0; c < kTogether && first + c < last; ++c) {
      const int64_t n = first + c;
      alignas(64) float rest[kFloatBlock];
      if (whole < weight.blocks()) unpack_any(weight, n, whole, rest);
      for (int m = 0; m < kRows; ++m) {
        for (int64_t i = whole * kFloatBlock; i < x_stride; i += kFloatLanes) {
          sums[m][c] =
              fma(load(rest + i % kFloatBlock), load(args.x + m * x_stride + i), sums[m][c]);
        }
        const float sum = add_halves(sums[m][c]);
        args.y[m * args.y_row_stride + n] = args.bias != nullptr ? sum + args.bias[n] : sum;
      }
    }
  }
}

}  // namespace

#include "kernels/cpu/multiply_floats.inl"

namespace {

template <int kBits, bool kWhole>
void multiply_few_bits(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  const FewBits<kBits, kWhole> unpack(args.weight);
  switch (args.rows) {
    case 1:
      return multiply_few_rows<1>(args, unpack, begin, end);
    case 2:
      return multiply_few_rows<2>(args, unpack, begin, end);
    case 3:
      return multiply_few_rows<3>(args, unpack, begin, end);
    case kFewRows:
      return multiply_few_rows<kFewRows>(args, unpack, begin, end);
    default:
      return multiply_all_panels(args, unpack, begin, end);
  }
}

template <int kBits>
void multiply_bits(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  if constexpr (kBits > 4) {
    multiply_all_panels(args, ManyBits<kBits>(args.weight), begin, end);
  } else if (whole_blocks(args.weight)) {
    multiply_few_bits<kBits, true>(args, begin, end);
  } else {
    multiply_few_bits<kBits, false>(args, begin, end);
  }
}

}  // namespace

void multiply_floats(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  if (!whole_runs(args.weight)) {
    return multiply_all_panels(args, UnpackAny(args.weight), begin, end);
  }
  switch (args.weight.bits) {
    case 1:
      return multiply_bits<1>(args, begin, end);
    case 2:
      return multiply_bits<2>(args, begin, end);
    case 3:
      return multiply_bits<3>(args, begin, end);
    case 4:
      return multiply_bits<4>(args, begin, end);
    case 5:
      return multiply_bits<5>(args, begin, end);
    case 6:
      return multiply_bits<6>(args, begin, end);
    case 7:
      return multiply_bits<7>(args, begin, end);
    default:
      return multiply_bits<8>(args, begin, end);
  }
}

}  // namespace qtoolkit::kernels::avx512vnni
