// Add and mul, 16 codes at a time.
#include <cstdint>

#include "kernels/cpu/codes_neon.h"
#include "kernels/elementwise.h"

namespace qtoolkit::kernels::neondot {

#include "kernels/cpu/rows.inl"

namespace {

using Bytes = uint8x16_t;
using Floats = float32x4_t;

Bytes load(const uint8_t* x) { return vld1q_u8(x); }
void store(uint8_t* y, Bytes codes) { vst1q_u8(y, codes); }
Bytes load_first(const uint8_t* x, int64_t count) { return load_codes(x, count); }
void store_first(uint8_t* y, int64_t count, Bytes codes) { store_codes(y, count, codes); }
Bytes fill(uint8_t code) { return vdupq_n_u8(code); }
Floats splat(float value) { return vdupq_n_f32(value); }

// The conversions take any value, and the bounds cost less than a second form without them.
template <bool kPlain>
using Spread = CodesIn;

template <bool kPlain, bool kBounded>
class Gather : public CodesOut {
 public:
  template <class Args>
  explicit Gather(const Args& args) : CodesOut(args.zero_point, args.lo, args.hi) {}
};

}  // namespace

#include "kernels/cpu/arithmetic.inl"

}  // namespace qtoolkit::kernels::neondot
