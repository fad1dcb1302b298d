// The product with a weight of few bits in plain C++, compiled once for every baseline: the including
// file opens the path's namespace. No include guard and no includes, on purpose.

namespace {

constexpr int64_t kMostCodes = kGroupedChunk * 8;

// The planes of one chunk of a row of the weight, as in quantize_groups.
inline void unpack_chunk(const GroupedWeight& weight, const uint8_t* codes, int64_t real,
                         int64_t bytes, uint8_t* numbers) {
  const auto mask = static_cast<uint8_t>((1 << weight.bits) - 1);
  uint8_t padded[kGroupedChunk] = {};
  __builtin_memcpy(padded, codes, static_cast<size_t>(real < bytes ? real : bytes));
  for (int64_t plane = 0; plane < weight.planes(); ++plane) {
    const auto shift = static_cast<int>(plane * weight.bits);
    uint8_t* const to = numbers + plane * bytes;
    for (int64_t byte = 0; byte < bytes; ++byte) to[byte] = padded[byte] >> shift & mask;
    if (weight.table == nullptr) continue;
    for (int64_t byte = 0; byte < bytes; ++byte) to[byte] = weight.table[to[byte]];
  }
}

template <int kLanes>
inline void dot_quads(const uint8_t* numbers, const int8_t* x, int64_t quads, int32_t* sums) {
  if constexpr (kLanes == 1) {
    int32_t sum = 0;
    for (int64_t i = 0; i < quads * 4; ++i) {
      sum += static_cast<int32_t>(numbers[i]) * static_cast<int32_t>(x[i]);
    }
    sums[0] += sum;
  } else {
    for (int64_t q = 0; q < quads; ++q) {
      for (int i = 0; i < kLanes; ++i) {
        const int8_t* const quad = x + (q * kLanes + i) * 4;
        const uint8_t* const n = numbers + q * 4;
        sums[i] += n[0] * quad[0] + n[1] * quad[1] + n[2] * quad[2] + n[3] * quad[3];
      }
    }
  }
}

// One channel and one block of rows.
template <int kLanes>
void multiply_block(const MultiplyGroupsArgs& args, int64_t n, int64_t block) {
  const GroupedWeight& weight = args.weight;
  const int64_t quads = grouped_quads(weight), groups = weight.groups();
  const int8_t* const x = args.x + block * quads * kLanes * 4;
  float acc[kLanes] = {};
  for (int64_t g = 0; g < groups; ++g) {
    const GroupPart part = group_part(weight, g);
    int32_t sums[kLanes] = {};
    for (int64_t byte = 0; byte < part.bytes; byte += kGroupedChunk) {
      const int64_t bytes = part.bytes - byte < kGroupedChunk ? part.bytes - byte : kGroupedChunk;
      uint8_t numbers[kMostCodes];
      unpack_chunk(weight, weight.codes + n * weight.row_stride + part.first_byte + byte,
                   part.real_bytes - byte, bytes, numbers);
      dot_quads<kLanes>(numbers, x + (part.first_quad * 4 + byte * weight.planes()) * kLanes,
                        bytes * weight.planes() / 4, sums);
    }
    const int64_t at = n * groups + g;
    const int32_t zero = weight.zero_point != nullptr ? weight.zero_point[at] : weight.zero;
    for (int i = 0; i < kLanes; ++i) {
      const int64_t from = (block * groups + g) * kLanes + i;
      const int32_t sum = sums[i] - zero * args.x_sums[from];
      acc[i] = __builtin_fmaf(static_cast<float>(sum), weight.scale[at] * args.x_scale[from],
                              acc[i]);
    }
  }
  for (int i = 0; i < kLanes; ++i) {
    const int64_t m = block * kLanes + i;
    if (m >= args.rows) break;
    args.y[m * args.y_row_stride + n] = args.bias != nullptr ? acc[i] + args.bias[n] : acc[i];
  }
}

}  // namespace

void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end) {
  const int64_t last = end * kGroupedChannels;
  const int64_t blocks = (args.rows + args.lanes - 1) / args.lanes;
  for (int64_t n = begin * kGroupedChannels; n < last && n < args.weight.channels; ++n) {
    for (int64_t block = 0; block < blocks; ++block) {
      if (args.lanes == 1) {
        multiply_block<1>(args, n, block);
      } else {
        multiply_block<16>(args, n, block);
      }
    }
  }
}
