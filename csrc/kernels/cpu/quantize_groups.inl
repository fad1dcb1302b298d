// Quantization of activations for weights of few bits, in plain C++, compiled once for every
// baseline: the including file opens the path's namespace. No include guard and no includes, on
// purpose.

namespace {

constexpr int64_t kPiece = 512;  // codes that are made at once, whole chunks of every bit width

// The bits of the least magnitude that is not finite; as integers, magnitudes are in order.
constexpr int32_t kInfinityBits = 0x7f800000;

inline int32_t greatest_magnitude(const float* x, int64_t count) {
  int32_t result = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = __builtin_bit_cast(int32_t, x[i]) & 0x7fffffff;
    result = bits > result ? bits : result;
  }
  return result;
}

// range_to_qparams of core/value_range.h, symmetric with codes in [-127, 127].
inline float scale_of(float magnitude) {
  constexpr float kSmallest = 0x1p-100f;
  const float scale = magnitude / 127.0f;
  if (scale == 0.0f) return __FLT_EPSILON__;
  return scale < kSmallest ? kSmallest : scale;
}

// Codes of `count` values, zeros up to `padded`; returns their sum.
inline int32_t quantize_piece(const float* x, int64_t count, int64_t padded, float inverse,
                              int8_t* codes) {
  int32_t sum = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto code = static_cast<int32_t>(round_between(x[i] * inverse, -127.0f, 127.0f));
    codes[i] = static_cast<int8_t>(code);
    sum += code;
  }
  __builtin_memset(codes + count, 0, static_cast<size_t>(padded - count));
  return sum;
}

// One chunk: codes in their order to planes of `bytes` bytes.
template <int kPlanes>
inline void split_planes(const int8_t* codes, int64_t bytes, int8_t* planes) {
  for (int plane = 0; plane < kPlanes; ++plane) {
    for (int64_t byte = 0; byte < bytes; ++byte) {
      planes[plane * bytes + byte] = codes[byte * kPlanes + plane];
    }
  }
}

// From quads that follow each other to quads `lanes` apart.
inline void spread_quads(const int8_t* from, int64_t count, int64_t lanes, int8_t* to) {
  for (int64_t i = 0; i < count; ++i) __builtin_memcpy(to + i * lanes * 4, from + i * 4, 4);
}

template <int kPlanes>
int32_t quantize_group(const float* x, int64_t count, const GroupPart& part, float inverse,
                       int64_t lanes, int8_t* to) {
  int8_t codes[kPiece], planes[kPiece];
  int32_t sum = 0;
  constexpr int64_t kCodes = kGroupedChunk * kPlanes;
  for (int64_t byte = 0; byte < part.bytes; byte += kGroupedChunk) {
    const int64_t bytes = part.bytes - byte < kGroupedChunk ? part.bytes - byte : kGroupedChunk;
    const int64_t first = byte * kPlanes, padded = bytes * kPlanes;
    const int64_t here = count - first < padded ? count - first : padded;
    sum += quantize_piece(x + first, here, padded, inverse, codes);
    split_planes<kPlanes>(codes, bytes, planes);
    spread_quads(planes, padded / 4, lanes, to + first * lanes);
    static_assert(kCodes <= kPiece);
  }
  return sum;
}

template <int kPlanes>
void quantize_block(const QuantizeGroupsArgs& args, int64_t block) {
  const GroupedWeight& weight = args.weight;
  const int64_t quads = grouped_quads(weight), groups = weight.groups(), lanes = args.lanes;
  int8_t* const codes = args.codes + block * quads * lanes * 4;
  float* const scale = args.scale + block * groups * lanes;
  int32_t* const sums = args.sums + block * groups * lanes;
  const int64_t left = args.rows - block * lanes;
  if (left < lanes) {
    __builtin_memset(codes, 0, static_cast<size_t>(quads * lanes * 4));
    __builtin_memset(scale, 0, sizeof(float) * static_cast<size_t>(groups * lanes));
    __builtin_memset(sums, 0, sizeof(int32_t) * static_cast<size_t>(groups * lanes));
  }
  for (int64_t lane = 0; lane < lanes && lane < left; ++lane) {
    const float* const row = args.x + (block * lanes + lane) * args.x_row_stride;
    for (int64_t g = 0; g < groups; ++g) {
      const GroupPart part = group_part(weight, g);
      const float* const x = row + g * weight.group;
      const int64_t rest = weight.width - g * weight.group;
      const int64_t count = rest < weight.group ? rest : weight.group;
      const int32_t magnitude = greatest_magnitude(x, count);
      int8_t* const to = codes + part.first_quad * lanes * 4 + lane * 4;
      const int64_t out = g * lanes + lane;
      if (magnitude >= kInfinityBits) {
        scale[out] = __builtin_nanf("");
        sums[out] = 0;
        for (int64_t i = 0; i < part.bytes * kPlanes / 4; ++i) {
          __builtin_memset(to + i * lanes * 4, 0, 4);
        }
        continue;
      }
      scale[out] = scale_of(__builtin_bit_cast(float, magnitude));
      sums[out] = quantize_group<kPlanes>(x, count, part, 1.0f / scale[out], lanes, to);
    }
  }
}

}  // namespace

void quantize_groups(const QuantizeGroupsArgs& args, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) {
    switch (args.weight.bits) {
      case 1:
        quantize_block<8>(args, block);
        break;
      case 2:
        quantize_block<4>(args, block);
        break;
      case 4:
        quantize_block<2>(args, block);
        break;
      default:
        quantize_block<1>(args, block);
    }
  }
}
