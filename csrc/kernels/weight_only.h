// The product of float rows with a weight of few bits, in groups along the reduced dimension.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// A weight [channels, width] of unsigned codes. A row of codes is a little-endian stream of bits:
// with 4 bits, the even code of a byte is its low half. Every `group` codes have one scale (and
// zero point); the last group may be shorter.
struct GroupedWeight {
  int64_t bits = 4;  // 1, 2, 4 or 8
  int64_t channels = 0, width = 0;
  int64_t group = 0;  // group * bits is a multiple of 32
  const uint8_t* codes = nullptr;
  int64_t row_stride = 0;               // bytes
  const float* scale = nullptr;         // [channels, groups]
  const uint8_t* zero_point = nullptr;  // [channels, groups]; `zero` everywhere if absent
  int32_t zero = 0;
  // 16 numbers that stand for the codes (of fewer bits: repeated); absent: the codes themselves.
  // 8 bits have none.
  const uint8_t* table = nullptr;

  int64_t groups() const { return (width + group - 1) / group; }
  int64_t planes() const { return 8 / bits; }
};

// What is multiplied with one group: `bytes` bytes of each row of the weight, of which the last
// ones may lie beyond the row, and the quads of activations from `quad` on.
struct GroupPart {
  int64_t bytes;       // a multiple of 4
  int64_t real_bytes;  // of the row
  int64_t first_byte, first_quad;
};
static inline GroupPart group_part(const GroupedWeight& weight, int64_t g) {
  const int64_t begin = g * weight.group;
  const int64_t left = weight.width - begin;
  const int64_t real = ((left < weight.group ? left : weight.group) * weight.bits + 7) / 8;
  return {(real + 3) / 4 * 4, real, begin * weight.bits / 8, begin / 4};
}

inline constexpr int64_t kGroupedChunk = 64;  // bytes of a row that are unpacked together

// Quads of a row of activations, behind zeros for what lies beyond the width.
static inline int64_t grouped_quads(const GroupedWeight& weight) {
  const GroupPart last = group_part(weight, weight.groups() - 1);
  return last.first_quad + last.bytes * weight.planes() / 4;
}

// Activations are kept in quads, four codes that are multiplied with four bytes of unpacked
// weights. Unpacking a chunk of up to kGroupedChunk bytes of a group gives one plane of bytes for
// each shift: code `byte * planes + plane`. So the quads of a chunk are those of its first plane,
// then those of the second, and so on.
//
// Rows of activations come in blocks of `lanes` (1 or 16): [block][quad][lane][4], and scales and
// sums [block][group][lane].

// Symmetric int8 codes of float32 rows, for each group of a row by its own range: scale as in
// core/value_range.h (symmetric, [-127, 127]), codes as in core/rounding.h. A group with NaN or
// infinity has scale NaN and codes 0. Begin and end count blocks; lanes beyond the last row hold
// zeros.
struct QuantizeGroupsArgs {
  GroupedWeight weight;  // bits, width and group count
  const float* x = nullptr;
  int64_t rows = 0, x_row_stride = 0;
  int64_t lanes = 1;
  int8_t* codes = nullptr;  // [blocks, quads, lanes, 4]
  float* scale = nullptr;   // [blocks, groups, lanes]
  int32_t* sums = nullptr;  // [blocks, groups, lanes], of the codes
};
void quantize_groups(const QuantizeGroupsArgs& args, int64_t begin, int64_t end);

// For row m and channel n, in float32, over the groups g in order:
//   S   = sum over the group of (number(weight code) - zero_point[n, g]) * x code, in int32
//   acc = fma(float(S), scale[n, g] * x_scale[m, g], acc)      beginning at 0
// and y[m, n] = acc + bias[n]. Begin and end count blocks of kGroupedChannels channels.
inline constexpr int64_t kGroupedChannels = 16;
inline constexpr int64_t kGroupedOverread = 1024;  // bytes behind x that may be read
struct MultiplyGroupsArgs {
  GroupedWeight weight;
  int64_t rows = 0, lanes = 1;
  const int8_t* x = nullptr;  // as quantize_groups makes them
  const float* x_scale = nullptr;
  const int32_t* x_sums = nullptr;
  const float* bias = nullptr;  // [channels]; nothing is added if absent
  float* y = nullptr;
  int64_t y_row_stride = 0;
};
void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end);

// --- float32 activations -----------------------------------------------------------------------

// A weight [channels, width] of codes of 1 to 8 bits, packed as in GroupedWeight, in groups of any
// length. In float32, the number of code c of channel n in group g is
//   (float(c) - zero[n, g]) * scale[n, g]        or, with numbers, numbers[c] * scale[n, g].
struct FloatWeight {
  int64_t bits = 4;
  int64_t channels = 0, width = 0;
  int64_t group = 0;
  const uint8_t* codes = nullptr;
  int64_t row_stride = 0;               // bytes
  const float* scale = nullptr;         // [channels, groups]
  const uint8_t* zero_point = nullptr;  // [channels, groups]; `zero` everywhere if absent
  float zero = 0.0f;
  const float* numbers = nullptr;  // 2^bits; with them zero_point is absent and zero is 0

  int64_t groups() const { return (width + group - 1) / group; }
  int64_t blocks() const { return (width + 127) / 128; }
};

// Element k of a row is in block k / 128 and there in lane k / 8 % 16, so that a lane has 8 codes
// in a row, which are whole bytes at any width. Rows of activations lie as [block][k % 8][lane],
// with zeros beyond the width.
inline constexpr int64_t kFloatBlock = 128, kFloatLanes = 16, kFloatRun = 8;
static inline int64_t float_position(int64_t k) {
  return k / kFloatBlock * kFloatBlock + k % kFloatRun * kFloatLanes + k % kFloatBlock / kFloatRun;
}

// For row m and channel n, in float32 and with p[j] = 0 for the 16 lanes j at first: for k in order
// up to the end of the last block, p[j] = fma(w[n, k], x[m, k], p[j]) in its lane j, with w = 0
// beyond the width; the lanes are added by halves (p[j] += p[j + 8] for the first 8, then 4, 2, 1),
// and y[m, n] = p[0] + bias[n]. Begin and end count blocks of kFloatChannels channels.
inline constexpr int64_t kFloatChannels = 8;
struct MultiplyFloatsArgs {
  FloatWeight weight;
  int64_t rows = 0;
  const float* x = nullptr;     // [rows, blocks, 8, 16]
  const float* bias = nullptr;  // [channels]; nothing is added if absent
  float* y = nullptr;
  int64_t y_row_stride = 0;
};
void multiply_floats(const MultiplyFloatsArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
