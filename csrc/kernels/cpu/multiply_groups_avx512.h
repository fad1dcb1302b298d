// What the AVX-512 and AMX products with weights of few bits share. Everything is internal.
#pragma once

#include <immintrin.h>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

constexpr int kChannels = kGroupedChannels;  // of a block, one for each lane of a vector

inline __attribute__((always_inline)) __mmask64 first_bytes(int64_t count) {
  return count >= 64 ? ~__mmask64{0} : (__mmask64{1} << count) - 1;
}
inline __attribute__((always_inline)) __mmask16 first_lanes(int64_t count) {
  return count >= 16 ? __mmask16{0xffff} : static_cast<__mmask16>((1u << count) - 1);
}

// Codes to bytes that are multiplied.
template <int kBits, bool kTable>
class Unpack {
 public:
  static constexpr int kPlanes = 8 / kBits;

  explicit Unpack(const GroupedWeight& weight) {
    if constexpr (kTable) {
      table_ =
          _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(weight.table)));
    }
  }

  template <int kPlane>
  inline __attribute__((always_inline)) __m512i plane(__m512i codes) const {
    if constexpr (kBits == 8) return codes;
    __m512i result = codes;
    if constexpr (kPlane != 0) result = _mm512_srli_epi16(codes, kPlane * kBits);
    result = _mm512_and_si512(result, _mm512_set1_epi8((1 << kBits) - 1));
    if constexpr (kTable) result = _mm512_shuffle_epi8(table_, result);
    return result;
  }

 private:
  __m512i table_ = {};
};

// rows[i] lane j becomes rows[j] lane i.
inline __attribute__((always_inline)) void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    rows[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    rows[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Lane i of the result is the sum of the lanes of sums[i].
inline __attribute__((always_inline)) __m512i sums_of_lanes(const __m512i (&sums)[16]) {
  __m512i four[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512i* const s = sums + 4 * i;
    const __m512i ab =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
    const __m512i cd =
        _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
    four[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  }
  const auto halves = [](__m512i a, __m512i b) __attribute__((always_inline)) {
    return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
  };
  return halves(halves(four[0], four[1]), halves(four[2], four[3]));
}

// The rows of a block of channels; those beyond the last one repeat it.
class BlockRows {
 public:
  BlockRows(const GroupedWeight& weight, int64_t block)
      : weight_(weight),
        first_(block * kChannels),
        count_(weight.channels - first_ < kChannels ? static_cast<int>(weight.channels - first_)
                                                    : kChannels) {
    for (int i = 0; i < kChannels; ++i) {
      channel_[i] = first_ + (i < count_ ? i : count_ - 1);
      codes_[i] = weight.codes + channel_[i] * weight.row_stride;
    }
  }

  __mmask16 lanes() const { return first_lanes(count_); }
  int64_t channel(int i) const { return channel_[i]; }
  const uint8_t* codes(int i) const { return codes_[i]; }

  // Scales and zero points of 16 groups from g on, those of one group side by side.
  void scales(int64_t g, float (&to)[16][16]) const {
    __m512i rows[16];
    const __mmask16 mask = first_lanes(weight_.groups() - g);
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm512_maskz_loadu_epi32(mask, weight_.scale + channel(i) * weight_.groups() + g);
    }
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to[i], rows[i]);
  }
  void zero_points(int64_t g, int32_t (&to)[16][16]) const {
    __m512i rows[16];
    const __mmask16 mask = first_lanes(weight_.groups() - g);
    for (int i = 0; i < 16; ++i) {
      rows[i] = _mm512_cvtepu8_epi32(
          _mm_maskz_loadu_epi8(mask, weight_.zero_point + channel(i) * weight_.groups() + g));
    }
    transpose(rows);
    for (int i = 0; i < 16; ++i) _mm512_store_si512(to[i], rows[i]);
  }

 private:
  const GroupedWeight& weight_;
  int64_t first_;
  int count_;
  int64_t channel_[kChannels];
  const uint8_t* codes_[kChannels];
};

// Bytes from a row's place `at` to where it is unpacked a little later: further on in the row, or
// where the row ends, in the one that follows a block of `channels` later.
inline int64_t prefetch_distance(const GroupedWeight& weight, int64_t at, int64_t channels) {
  constexpr int64_t kAhead = 512;
  return at + kAhead < weight.row_stride ? kAhead : kAhead + (channels - 1) * weight.row_stride;
}

// Calls call.operator()<plane>() for every plane.
template <int kPlanes, class Call>
inline __attribute__((always_inline)) void for_each_plane(const Call& call) {
  const auto one = [&]<int kPlane>() __attribute__((always_inline)) {
    if constexpr (kPlane < kPlanes) call.template operator()<kPlane>();
  };
  one.template operator()<0>();
  one.template operator()<1>();
  one.template operator()<2>();
  one.template operator()<3>();
  one.template operator()<4>();
  one.template operator()<5>();
  one.template operator()<6>();
  one.template operator()<7>();
}

// Unpacks `bytes` bytes of one row's group, of which the last ones may lie beyond the row: planes
// of a chunk, one after another. Whole chunks are stored whole, as tiles cannot be loaded from
// masked stores before these have reached the cache.
template <class Unpack>
inline __attribute__((always_inline)) void unpack_row(const Unpack& unpack, const uint8_t* codes,
                                                      int64_t real, int64_t bytes, uint8_t* to) {
  constexpr int64_t kCodes = kGroupedChunk * Unpack::kPlanes;
  int64_t byte = 0;
  for (; byte + kGroupedChunk <= real; byte += kGroupedChunk, to += kCodes) {
    const __m512i chunk = _mm512_loadu_si512(codes + byte);
    for_each_plane<Unpack::kPlanes>([&]<int kPlane>() __attribute__((always_inline)) {
      _mm512_storeu_si512(to + kPlane * kGroupedChunk, unpack.template plane<kPlane>(chunk));
    });
  }
  if (byte >= bytes) return;
  const int64_t here = bytes - byte;
  const __m512i chunk = _mm512_maskz_loadu_epi8(first_bytes(real - byte), codes + byte);
  const __mmask64 mask = first_bytes(here);
  for_each_plane<Unpack::kPlanes>([&]<int kPlane>() __attribute__((always_inline)) {
    _mm512_mask_storeu_epi8(to + kPlane * here, mask, unpack.template plane<kPlane>(chunk));
  });
}

// Rows of y from sums[channel][row], 16 rows at a time.
inline void store_rows(const MultiplyGroupsArgs& args, const BlockRows& block, const float* sums,
                       int64_t sums_stride, int64_t first_row, int64_t rows) {
  const __mmask16 lanes = block.lanes();
  const int64_t n = block.channel(0);
  for (int64_t m = 0; m < rows; m += 16) {
    __m512i values[16];
    for (int i = 0; i < 16; ++i) values[i] = _mm512_loadu_si512(sums + i * sums_stride + m);
    transpose(values);
    const int64_t here = rows - m < 16 ? rows - m : 16;
    for (int64_t i = 0; i < here; ++i) {
      __m512 value = _mm512_castsi512_ps(values[i]);
      if (args.bias != nullptr) {
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, args.bias + n));
      }
      _mm512_mask_storeu_ps(args.y + (first_row + m + i) * args.y_row_stride + n, lanes, value);
    }
  }
}

// --- few rows: sums of products lie along the width, and are added up for each group ----------

constexpr int64_t kAhead = 2048;  // bytes that the weights are prefetched ahead

template <class Unpack>
class FewRows {
 public:
  FewRows(const MultiplyGroupsArgs& args, int64_t block)
      : args_(args), weight_(args.weight), rows_(args.weight, block), unpack_(args.weight) {}

  void run() {
    for (int64_t m = 0; m < args_.rows; m += kMost) {
      run(m, args_.rows - m < kMost ? args_.rows - m : kMost);
    }
  }

 private:
  static constexpr int64_t kMost = 4;     // rows of activations at once
  static constexpr int64_t kGroups = 64;  // whose sums are kept; a row of weights is read so far

  void run(int64_t first_row, int64_t count) {
    const int64_t groups = weight_.groups();
    __m512 acc[kMost];
    for (int64_t m = 0; m < count; ++m) acc[m] = _mm512_setzero_ps();
    for (int64_t begin = 0; begin < groups; begin += kGroups) {
      const int64_t end = groups - begin < kGroups ? groups : begin + kGroups;
      alignas(64) int32_t sums[kMost][kChannels][kGroups];
      for (int i = 0; i < kChannels; ++i) {
        for (int64_t g = begin; g < end; g += 16) {
          const int64_t here = end - g < 16 ? end - g : 16;
          for (int64_t m = 0; m < count; ++m) {
            const __m512i sum = group_sums(rows_.codes(i), first_row + m, g, here, m == 0);
            _mm512_store_si512(&sums[m][i][g - begin], sum);
          }
        }
      }
      for (int64_t g = begin; g < end; g += 16) {
        const int64_t here = end - g < 16 ? end - g : 16;
        alignas(64) float scale[16][16];
        alignas(64) int32_t zero[16][16];
        rows_.scales(g, scale);
        if (weight_.zero_point != nullptr) rows_.zero_points(g, zero);
        for (int64_t m = 0; m < count; ++m) {
          accumulate(&sums[m][0][g - begin], (first_row + m) * groups + g, here, scale, zero,
                     acc[m]);
        }
      }
    }
    const int64_t n = rows_.channel(0);
    const __mmask16 lanes = rows_.lanes();
    for (int64_t m = 0; m < count; ++m) {
      if (args_.bias != nullptr) {
        acc[m] = _mm512_add_ps(acc[m], _mm512_maskz_loadu_ps(lanes, args_.bias + n));
      }
      _mm512_mask_storeu_ps(args_.y + (first_row + m) * args_.y_row_stride + n, lanes, acc[m]);
    }
  }

  // From sums[channel][group] of 16 groups, `at` their first place in x_scale and x_sums.
  inline __attribute__((always_inline)) void accumulate(const int32_t* sums, int64_t at,
                                                        int64_t count, const float (&scale)[16][16],
                                                        const int32_t (&zero)[16][16],
                                                        __m512& acc) const {
    __m512i rows[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) rows[i] = _mm512_load_si512(sums + i * kGroups);
    transpose(rows);
    for (int64_t g = 0; g < count; ++g) {
      const __m512i zeros = weight_.zero_point != nullptr ? _mm512_load_si512(zero[g])
                                                          : _mm512_set1_epi32(weight_.zero);
      const __m512i x_sum = _mm512_set1_epi32(args_.x_sums[at + g]);
      const __m512i sum = _mm512_sub_epi32(rows[g], _mm512_mullo_epi32(zeros, x_sum));
      const __m512 factor =
          _mm512_mul_ps(_mm512_load_ps(scale[g]), _mm512_set1_ps(args_.x_scale[at + g]));
      acc = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor, acc);
    }
  }

  // The sums of products of groups [g, g + count), one for each lane.
  inline __attribute__((always_inline)) __m512i group_sums(const uint8_t* codes, int64_t row,
                                                           int64_t g, int64_t count,
                                                           bool prefetch) const {
    const GroupPart first = group_part(weight_, g);
    const int8_t* x = args_.x + (row * grouped_quads(weight_) + first.first_quad) * 4;
    codes += first.first_byte;
    __m512i sums[16];
    const int64_t bytes = weight_.group * weight_.bits / 8;
    const bool whole = count == 16 && (g + 16) * weight_.group <= weight_.width;
    if (whole && bytes == kGroupedChunk) {  // such as 4 bits in groups of 128
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const __m512i chunk = _mm512_loadu_si512(codes + i * kGroupedChunk);
        if (prefetch) _mm_prefetch(codes + i * kGroupedChunk + kAhead, _MM_HINT_T0);
        sums[i] = dot(chunk, ~__mmask64{0}, x + i * kGroupedChunk * Unpack::kPlanes, kGroupedChunk,
                      _mm512_setzero_si512());
      }
      return sums_of_lanes(sums);
    }
    for (int64_t i = 0; i < 16; ++i) {
      sums[i] = _mm512_setzero_si512();
      if (i >= count) continue;
      const GroupPart part = group_part(weight_, g + i);
      for (int64_t byte = 0; byte < part.bytes; byte += kGroupedChunk) {
        const int64_t here = part.bytes - byte < kGroupedChunk ? part.bytes - byte : kGroupedChunk;
        const __mmask64 real = first_bytes(part.real_bytes - byte);
        const __m512i chunk = _mm512_maskz_loadu_epi8(real, codes + byte);
        if (prefetch) _mm_prefetch(codes + byte + kAhead, _MM_HINT_T0);
        sums[i] = dot(chunk, first_bytes(here), x, here, sums[i]);
        x += here * Unpack::kPlanes;
      }
      codes += part.bytes;
    }
    return sums_of_lanes(sums);
  }

  // Adds the products of a chunk, `bytes` apart in x for each plane.
  inline __attribute__((always_inline)) __m512i dot(__m512i chunk, __mmask64 mask, const int8_t* x,
                                                    int64_t bytes, __m512i sum) const {
    for_each_plane<Unpack::kPlanes>([&]<int kPlane>() __attribute__((always_inline)) {
      sum = _mm512_dpbusd_epi32(sum, unpack_.template plane<kPlane>(chunk),
                                _mm512_maskz_loadu_epi8(mask, x + kPlane * bytes));
    });
    return sum;
  }

  const MultiplyGroupsArgs& args_;
  const GroupedWeight& weight_;
  BlockRows rows_;
  Unpack unpack_;
};

// Calls call(Unpack) for the weight's bits and table.
template <class Call>
void with_unpack(const GroupedWeight& weight, const Call& call) {
  const bool table = weight.table != nullptr;
  switch (weight.bits) {
    case 1:
      return table ? call(Unpack<1, true>(weight)) : call(Unpack<1, false>(weight));
    case 2:
      return table ? call(Unpack<2, true>(weight)) : call(Unpack<2, false>(weight));
    case 4:
      return table ? call(Unpack<4, true>(weight)) : call(Unpack<4, false>(weight));
    default:
      return call(Unpack<8, false>(weight));
  }
}

}  // namespace
}  // namespace qtoolkit::kernels::avx512vnni
