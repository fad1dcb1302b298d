// Add and mul, 32 codes at a time, as arithmetic_avx512vnni.cpp does it.
#include <immintrin.h>

#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::avx2 {

#include "kernels/cpu/rows.inl"

namespace {

constexpr int64_t kCodes = 32;
using Bytes = __m256i;
using Floats = __m256;

Bytes load(const uint8_t* x) { return _mm256_loadu_si256(reinterpret_cast<const Bytes*>(x)); }
void store(uint8_t* y, Bytes codes) { _mm256_storeu_si256(reinterpret_cast<Bytes*>(y), codes); }
Bytes load_first(const uint8_t* x, int64_t count) {
  alignas(32) uint8_t codes[kCodes] = {};
  __builtin_memcpy(codes, x, static_cast<size_t>(count));
  return load(codes);
}
void store_first(uint8_t* y, int64_t count, Bytes codes) {
  alignas(32) uint8_t all[kCodes];
  store(all, codes);
  __builtin_memcpy(y, all, static_cast<size_t>(count));
}
Bytes fill(uint8_t code) { return _mm256_set1_epi8(static_cast<char>(code)); }
Floats splat(float value) { return _mm256_set1_ps(value); }

// Part k holds codes 4k to 4k + 3 of each 16, the order in which packing puts four parts together.
template <bool kPlain>
class Spread {
 public:
  Spread(bool is_signed, int32_t zero_point)
      : flip_(fill(is_signed ? 128 : 0)),
        offset_(splat(static_cast<float>((1 << 23) + (is_signed ? 128 : 0) + zero_point))) {}

  void operator()(Bytes codes, Floats (&parts)[4]) const {
    if constexpr (!kPlain) codes = _mm256_xor_si256(codes, flip_);
    const Bytes magic = _mm256_castps_si256(splat(static_cast<float>(1 << 23)));
    for (int k = 0; k < 4; ++k) {
      // The upper bytes of an index are negative, which gives 0.
      const __m128i bytes = _mm_or_si128(_mm_set1_epi32(-256),
                                         _mm_setr_epi32(4 * k, 4 * k + 1, 4 * k + 2, 4 * k + 3));
      const Bytes code = _mm256_shuffle_epi8(codes, _mm256_broadcastsi128_si256(bytes));
      parts[k] = _mm256_castsi256_ps(_mm256_or_si256(code, magic)) - offset_;
    }
  }

 private:
  Bytes flip_;
  Floats offset_;
};

template <bool kPlain, bool kBounded>
class Gather {
 public:
  template <class Args>
  explicit Gather(const Args& args)
      : floor_(splat(static_cast<float>(args.lo - args.zero_point))),
        ceiling_(splat(static_cast<float>(args.hi - args.zero_point))) {
    // int8 codes are packed as codes + 128, which flips their highest bit.
    const int32_t offset = args.lo < 0 ? 128 : 0;
    zero_point_ = _mm256_set1_epi16(static_cast<int16_t>(args.zero_point + offset));
    low_ = fill(static_cast<uint8_t>(args.lo + offset));
    high_ = fill(static_cast<uint8_t>(args.hi + offset));
    flip_ = fill(static_cast<uint8_t>(offset));
  }

  Bytes operator()(const Floats (&parts)[4]) const {
    const Bytes codes = _mm256_packus_epi16(words(parts[0], parts[1]), words(parts[2], parts[3]));
    if constexpr (kPlain) return codes;
    return _mm256_xor_si256(_mm256_min_epu8(_mm256_max_epu8(codes, low_), high_), flip_);
  }

 private:
  Bytes words(Floats a, Floats b) const {
    return _mm256_adds_epi16(_mm256_packs_epi32(rounded(a), rounded(b)), zero_point_);
  }
  Bytes rounded(Floats value) const {
    if constexpr (!kBounded) {
      value = _mm256_and_ps(value, _mm256_cmp_ps(value, value, _CMP_ORD_Q));  // NaN to 0
      value = _mm256_min_ps(_mm256_max_ps(value, floor_), ceiling_);
    }
    return _mm256_cvtps_epi32(value);
  }

  Floats floor_, ceiling_;
  Bytes zero_point_, low_, high_, flip_;
};

}  // namespace

#include "kernels/cpu/arithmetic.inl"

}  // namespace qtoolkit::kernels::avx2
