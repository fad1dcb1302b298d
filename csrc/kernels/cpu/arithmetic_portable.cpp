#include <cstdint>

#include "kernels/cpu/rounding.h"
#include "kernels/elementwise.h"

namespace qtoolkit::kernels::portable {

#include "kernels/cpu/rows.inl"

namespace {

template <class A, class B, class Args, class Combine>
void combine_codes(const Args& args, int64_t begin, int64_t end, Combine combine) {
  const int32_t a_zero_point = args.a_zero_point, b_zero_point = args.b_zero_point;
  const int32_t zero_point = args.zero_point;
  const float low = static_cast<float>(args.lo - zero_point);
  const float high = static_cast<float>(args.hi - zero_point);
  const auto one_row = [=]<bool kSingle>(const uint8_t* a, const uint8_t* b, uint8_t* y,
                                         int64_t count) {
    const int32_t single = static_cast<B>(b[0]) - b_zero_point;
    QT_INDEPENDENT_ITERATIONS
    for (int64_t c = 0; c < count; ++c) {
      const int32_t b_value = kSingle ? single : static_cast<B>(b[c]) - b_zero_point;
      const float value = combine(static_cast<A>(a[c]) - a_zero_point, b_value);
      y[c] =
          static_cast<uint8_t>(static_cast<int32_t>(round_between(value, low, high)) + zero_point);
    }
  };
  walk_rows(
      args, begin, end, [&](const SharedRows& part) __attribute__((noinline)) {
        for (int64_t row = 0; row < part.rows; ++row) {
          const uint8_t* a = part.a + row * part.a_stride;
          uint8_t* y = part.y + row * part.y_stride;
          args.b_single ? one_row.template operator()<true>(a, part.b, y, part.count)
                        : one_row.template operator()<false>(a, part.b, y, part.count);
        }
      });
}

template <class Args, class Combine>
void combine(const Args& args, int64_t begin, int64_t end, Combine combine) {
  if (args.a_signed) {
    args.b_signed ? combine_codes<int8_t, int8_t>(args, begin, end, combine)
                  : combine_codes<int8_t, uint8_t>(args, begin, end, combine);
  } else {
    args.b_signed ? combine_codes<uint8_t, int8_t>(args, begin, end, combine)
                  : combine_codes<uint8_t, uint8_t>(args, begin, end, combine);
  }
}

}  // namespace

void add(const AddArgs& args, int64_t begin, int64_t end) {
  const float a_multiplier = args.a_multiplier, b_multiplier = args.b_multiplier;
  combine(args, begin, end, [=](int32_t a, int32_t b) {
    return static_cast<float>(a) * a_multiplier + static_cast<float>(b) * b_multiplier;
  });
}

void mul(const MulArgs& args, int64_t begin, int64_t end) {
  const float multiplier = args.multiplier;
  // The product of two codes is exact in float32; SSE2 has no 32-bit integer product.
  combine(args, begin, end, [=](int32_t a, int32_t b) {
    return static_cast<float>(a) * static_cast<float>(b) * multiplier;
  });
}

}  // namespace qtoolkit::kernels::portable
