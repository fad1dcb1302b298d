// Codes to float32 in plain C++, for every format and group; included as multiply_floats.inl is,
// and before it. No include guard and no includes, on purpose.

namespace {

// Where there are numbers it is 0, and they stay as they are.
inline float zero_at(const FloatWeight& weight, int64_t at) {
  return weight.zero_point != nullptr ? static_cast<float>(weight.zero_point[at]) : weight.zero;
}

// The numbers of a block of a channel, [k % 8][lane], with zeros beyond the width.
inline void unpack_any(const FloatWeight& weight, int64_t channel, int64_t block, float* to) {
  const uint32_t mask = (uint32_t{1} << weight.bits) - 1;
  for (int64_t lane = 0; lane < kFloatLanes; ++lane) {
    const int64_t first = block * kFloatBlock + lane * kFloatRun;
    const int64_t left = weight.width - first;
    const int64_t count = left < kFloatRun ? left : kFloatRun;
    for (int64_t i = count < 0 ? 0 : count; i < kFloatRun; ++i) to[i * kFloatLanes + lane] = 0.0f;
    if (count <= 0) continue;
    uint64_t word = 0;
    __builtin_memcpy(&word, weight.codes + channel * weight.row_stride + first / 8 * weight.bits,
                     static_cast<size_t>((count * weight.bits + 7) / 8));
    for (int64_t i = 0; i < count; ++i, word >>= weight.bits) {
      const auto code = static_cast<uint32_t>(word) & mask;
      const int64_t at = channel * weight.groups() + (first + i) / weight.group;
      const float number =
          weight.numbers != nullptr ? weight.numbers[code] : static_cast<float>(code);
      to[i * kFloatLanes + lane] = (number - zero_at(weight, at)) * weight.scale[at];
    }
  }
}

// Whether a lane's run of codes has one scale, and all runs of a block have.
inline bool whole_runs(const FloatWeight& weight) { return weight.group % kFloatRun == 0; }
inline bool whole_blocks(const FloatWeight& weight) { return weight.group % kFloatBlock == 0; }

inline bool inside(const FloatWeight& weight, int64_t block) {
  return (block + 1) * kFloatBlock <= weight.width;
}

// 16 numbers, one for each low half of a byte: those of the codes of up to 4 bits, repeated.
template <int kBits>
inline void few_numbers(const FloatWeight& weight, float (&to)[16]) {
  for (int i = 0; i < 16; ++i) {
    const int code = i & ((1 << kBits) - 1);
    to[i] = weight.numbers != nullptr ? weight.numbers[code] : static_cast<float>(code);
  }
}

class UnpackAny {
 public:
  explicit UnpackAny(const FloatWeight& weight) : weight_(weight) {}
  void operator()(int64_t channel, int64_t block, float* to) const {
    unpack_any(weight_, channel, block, to);
  }

 private:
  const FloatWeight& weight_;
};

}  // namespace
