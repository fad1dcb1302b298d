#include <cstddef>

#include "kernels/weight_only.h"

namespace qtoolkit::kernels::portable {
#include "kernels/cpu/multiply_floats_unpack.inl"

namespace {

struct Lanes {
  float lane[kFloatLanes];
};
constexpr int kTileRows = 2;
constexpr int tile_channels(int /*rows*/) { return 2; }

inline Lanes load(const float* from) {
  Lanes result;
  __builtin_memcpy(&result, from, sizeof(result));
  return result;
}
inline void store(float* to, const Lanes& a) { __builtin_memcpy(to, &a, sizeof(a)); }
inline Lanes fma(const Lanes& a, const Lanes& b, const Lanes& c) {
  Lanes result;
  for (int j = 0; j < kFloatLanes; ++j) {
    result.lane[j] = __builtin_fmaf(a.lane[j], b.lane[j], c.lane[j]);
  }
  return result;
}
inline float add_halves(Lanes a) {
  for (int half = kFloatLanes / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) a.lane[j] += a.lane[j + half];
  }
  return a.lane[0];
}

}  // namespace

#include "kernels/cpu/multiply_floats.inl"

void multiply_floats(const MultiplyFloatsArgs& args, int64_t begin, int64_t end) {
  multiply_all_panels(args, UnpackAny(args.weight), begin, end);
}

}  // namespace qtoolkit::kernels::portable
