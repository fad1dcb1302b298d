// 32 codes at a time: vpshufb looks up 16 entries at once and gives 0 for an index with the highest
// bit set. The index loses 16 in each step, so it is negative once its row has passed; rows hold
// what differs from the row before, so the exclusive or of all that were not 0 is the entry. Three
// instructions a row of the table; about twice as fast as one load a code.
#include <immintrin.h>

#include <cstdint>

#include "kernels/elementwise.h"

namespace qtoolkit::kernels::avx2 {
namespace {

constexpr int64_t kCodes = 32;
constexpr int kRows = 8;  // of 16 entries, in each half of the table

// The entries of 128 codes.
class Half {
 public:
  explicit Half(const uint8_t* table) {
    __m128i before = _mm_setzero_si128();
    for (int k = 0; k < kRows; ++k) {
      const __m128i entries = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 16 * k));
      rows_[k] = _mm256_broadcastsi128_si256(_mm_xor_si128(entries, before));
      before = entries;
    }
  }

  // 0 for a negative index.
  __m256i operator()(__m256i index) const {
    __m256i result = _mm256_shuffle_epi8(rows_[0], index);
    for (int k = 1; k < kRows; ++k) {
      index = _mm256_subs_epi8(index, _mm256_set1_epi8(16));  // stays negative
      result = _mm256_xor_si256(result, _mm256_shuffle_epi8(rows_[k], index));
    }
    return result;
  }

 private:
  __m256i rows_[kRows];
};

}  // namespace

void lookup(const LookupArgs& args, int64_t begin, int64_t end) {
  const Half low(args.table), high(args.table + 128);
  const __m256i flip = _mm256_set1_epi8(-128);
  const auto one_row = [&](const uint8_t* x, uint8_t* y, int64_t count) {
    int64_t c = 0;
    for (; c + kCodes <= count; c += kCodes) {
      const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + c));
      const __m256i result = _mm256_xor_si256(low(codes), high(_mm256_xor_si256(codes, flip)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + c), result);
    }
    for (; c < count; ++c) y[c] = args.table[x[c]];
  };
  if (args.x_row_stride == args.channels && args.y_row_stride == args.channels) {
    const int64_t offset = begin * args.channels;
    one_row(args.x + offset, args.y + offset, (end - begin) * args.channels);
    return;
  }
  for (int64_t row = begin; row < end; ++row) {
    one_row(args.x + row * args.x_row_stride, args.y + row * args.y_row_stride, args.channels);
  }
}

}  // namespace qtoolkit::kernels::avx2
