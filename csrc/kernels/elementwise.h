// Element-wise arithmetic on 8-bit codes.
#pragma once

#include <cstdint>

namespace qtoolkit::kernels {

// Arithmetic on two operands works on rows of `channels` codes; begin and end count rows. A row
// stride (in bytes) of 0 repeats an operand's row, and with b_single a row of b is one code, which
// serves the whole row: so b is broadcast. The default is plain arrays, where a row is one element.
// y may be a; y holds int8 codes if lo < 0; ReLU is in lo.

// y = clamp(rne(float(a - a_zero_point) * a_multiplier + float(b - b_zero_point) * b_multiplier)
//           + zero_point, lo, hi)
struct AddArgs {
  const uint8_t* a = nullptr;
  const uint8_t* b = nullptr;
  uint8_t* y = nullptr;
  int64_t channels = 1;
  int64_t a_row_stride = 1, b_row_stride = 1, y_row_stride = 1;
  bool b_single = false;
  bool a_signed = false, b_signed = false;
  int32_t a_zero_point = 0, b_zero_point = 0;
  float a_multiplier = 1.0f, b_multiplier = 1.0f;
  int32_t zero_point = 0, lo = 0, hi = 255;
};
void add(const AddArgs& args, int64_t begin, int64_t end);

// y = clamp(rne(float((a - a_zero_point) * (b - b_zero_point)) * multiplier) + zero_point, lo, hi)
struct MulArgs {
  const uint8_t* a = nullptr;
  const uint8_t* b = nullptr;
  uint8_t* y = nullptr;
  int64_t channels = 1;
  int64_t a_row_stride = 1, b_row_stride = 1, y_row_stride = 1;
  bool b_single = false;
  bool a_signed = false, b_signed = false;
  int32_t a_zero_point = 0, b_zero_point = 0;
  float multiplier = 1.0f;
  int32_t zero_point = 0, lo = 0, hi = 255;
};
void mul(const MulArgs& args, int64_t begin, int64_t end);

// y = clamp(rne(float(x - x_zero_point) * multiplier[c] + addend[c]) + zero_point, lo, hi) on rows
// of `channels` codes, c the position in the row. begin and end count rows. With channels_apart
// false multiplier[0] and addend[0] serve every channel. addend may be nullptr (nothing is added).
// It is requantization (also into a slice of a wider row: concatenation) and batch norm.
struct RequantizeArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  int64_t channels = 0;
  int64_t x_row_stride = 0, y_row_stride = 0;  // bytes
  bool x_signed = false;
  int32_t x_zero_point = 0;
  bool channels_apart = false;
  const float* multiplier = nullptr;
  const float* addend = nullptr;
  int32_t zero_point = 0, lo = 0, hi = 255;
};
void requantize(const RequantizeArgs& args, int64_t begin, int64_t end);

// y = table[x] on rows of `channels` codes: any function of one code, in place too. begin and end
// count rows.
struct LookupArgs {
  const uint8_t* x = nullptr;
  uint8_t* y = nullptr;
  const uint8_t* table = nullptr;  // [256], by the byte of the code: an int8 code -1 is entry 255
  int64_t channels = 0;
  int64_t x_row_stride = 0, y_row_stride = 0;  // bytes
};
void lookup(const LookupArgs& args, int64_t begin, int64_t end);

}  // namespace qtoolkit::kernels
