// Fake-quantize in plain C++ with vector types, compiled once for every baseline: the including
// file opens the path's namespace, defines QT_VECTOR_BYTES and
//   uint32_t bits_of(Masks) (bit k is set where lane k is not 0, lanes being 0 or -1).
// No include guard and no includes, on purpose.

namespace {

constexpr int64_t kChunk = 64;  // elements that are computed together: a word of the mask

template <class Vector, class Element>
inline Vector load(const Element* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}

struct Channel {
  float scale, inverse, low, high;
};

inline Channel channel_at(const FakeQuantizeArgs& args, int64_t c) {
  const int32_t zero_point = args.zero_point[c];
  return {args.scale[c], 1.0f / args.scale[c], static_cast<float>(args.quant_min - zero_point),
          static_cast<float>(args.quant_max - zero_point)};
}

// Parameters of the elements in a vector, and where a chunk gets them from: the same for all, or
// from arrays with one for each element.
struct Parameters {
  Floats scale, inverse, low, high;
};

struct SameForAll {
  Parameters parameters;

  explicit SameForAll(const Channel& channel)
      : parameters{Floats{} + channel.scale, Floats{} + channel.inverse, Floats{} + channel.low,
                   Floats{} + channel.high} {}
  const Parameters& at(int64_t) const { return parameters; }
};

struct Arrays {
  const float *scale, *inverse, *low, *high;

  Parameters at(int64_t k) const {
    return {load<Floats>(scale + k), load<Floats>(inverse + k), load<Floats>(low + k),
            load<Floats>(high + k)};
  }
};

template <int64_t size>
struct Table {
  float scale[size] = {}, inverse[size] = {}, low[size] = {}, high[size] = {};

  Arrays from(int64_t k) const { return {scale + k, inverse + k, low + k, high + k}; }

  void put(int64_t k, const Channel& channel) {
    scale[k] = channel.scale;
    inverse[k] = channel.inverse;
    low[k] = channel.low;
    high[k] = channel.high;
  }
  // Elements [begin, end), and up to kLanes - 1 after them.
  void put(int64_t begin, int64_t end, const Channel& channel) {
    const Parameters same = SameForAll(channel).parameters;
    for (int64_t k = begin; k < end; k += kLanes) {
      __builtin_memcpy(scale + k, &same.scale, sizeof(Floats));
      __builtin_memcpy(inverse + k, &same.inverse, sizeof(Floats));
      __builtin_memcpy(low + k, &same.low, sizeof(Floats));
      __builtin_memcpy(high + k, &same.high, sizeof(Floats));
    }
  }
};

// Writes y and returns where the gradient passes.
template <bool relu>
inline Masks fake_quantize_vector(Floats input, const Parameters& p, float* y) {
  const Floats zero = {};
  const Floats x = relu ? (input < zero ? zero : input) : input;
  // One step beyond the range is enough to know that a value is outside. NaN stays NaN.
  Floats value = x * p.inverse;
  value = value < p.low - 1.0f ? p.low - 1.0f : value;
  value = value > p.high + 1.0f ? p.high + 1.0f : value;
  value = (value + 12582912.0f) - 12582912.0f;  // see round_small in rounding.h
  Masks passes = (value >= p.low) & (value <= p.high);
  if (relu) passes &= input > zero;
  value = value == value ? value : zero;
  value = value < p.low ? p.low : value;
  value = value > p.high ? p.high : value;
  const Floats result = x == x ? value * p.scale : x;
  __builtin_memcpy(y, &result, sizeof result);
  return passes;
}

// Elements [0, kChunk); the bits of its mask.
template <bool relu, class Source>
inline uint64_t fake_quantize_chunk(const float* x, float* y, const Source& source) {
  uint64_t bits = 0;
#pragma GCC unroll 16
  for (int64_t k = 0; k < kChunk; k += kLanes) {
    const Masks passes = fake_quantize_vector<relu>(load<Floats>(x + k), source.at(k), y + k);
    bits |= static_cast<uint64_t>(bits_of(passes)) << k;
  }
  return bits;
}

// The chunk at element i, of which `count` elements are there.
template <bool relu, class Source>
inline void fake_quantize_at(const FakeQuantizeArgs& args, int64_t i, int64_t count,
                             const Source& source) {
  const float* x = args.x + (i - args.first);
  float* y = args.y + (i - args.first);
  if (count == kChunk) {
    const uint64_t bits = fake_quantize_chunk<relu>(x, y, source);
    if (args.mask != nullptr) __builtin_memcpy(args.mask + i / 8, &bits, sizeof bits);
    return;
  }
  float padded[kChunk] = {};
  __builtin_memcpy(padded, x, count * sizeof(float));
  uint64_t bits = fake_quantize_chunk<relu>(padded, padded, source);
  __builtin_memcpy(y, padded, count * sizeof(float));
  bits &= (uint64_t{1} << count) - 1;
  if (args.mask != nullptr) {
    __builtin_memcpy(args.mask + i / 8, &bits, (count + 7) / 8);
  }
}

// The run of elements with the same parameters that holds element i, and those after it.
struct Run {
  const FakeQuantizeArgs& args;
  int64_t channel, end, row_end;

  Run(const FakeQuantizeArgs& args, int64_t i) : args(args) {
    const int64_t row = i / args.inner, group = i % args.inner / args.group;
    const int64_t groups = (args.inner + args.group - 1) / args.group;
    channel = (row * groups + group) % args.channels;
    row_end = (row + 1) * args.inner;
    end = row * args.inner + (group + 1) * args.group;
    end = end < row_end ? end : row_end;
  }
  void next() {
    channel = channel + 1 == args.channels ? 0 : channel + 1;
    if (end == row_end) row_end += args.inner;
    end = end + args.group < row_end ? end + args.group : row_end;
  }
};

// The parameters of `count` elements from i on, which lies in `run`; leaves the run of the element
// after them.
inline void fill(Table<kChunk + kLanes>& table, Run& run, int64_t i, int64_t count) {
  for (int64_t k = 0; k < count;) {
    const int64_t end = run.end - i < count ? run.end - i : count;
    table.put(k, end, channel_at(run.args, run.channel));
    if (end == run.end - i) run.next();
    k = end;
  }
}

// The same where neighbours have different parameters.
inline void fill_across(Table<kChunk + kLanes>& table, const FakeQuantizeArgs& args, int64_t i,
                        int64_t count) {
  for (int64_t filled = 0; filled < count;) {
    const int64_t c = (i + filled) % args.channels;
    const int64_t rest = args.channels - c;
    const int64_t end = rest < count - filled ? filled + rest : count;
    for (int64_t k = filled; k < end; ++k) table.put(k, channel_at(args, c + k - filled));
    filled = end;
  }
}

template <bool relu>
void fake_quantize_all(const FakeQuantizeArgs& args, int64_t begin, int64_t end) {
  if (begin >= end) return;
  if (args.channels == 1) {
    const SameForAll source(channel_at(args, 0));
    for (; begin < end; begin += kChunk) {
      fake_quantize_at<relu>(args, begin, end - begin < kChunk ? end - begin : kChunk, source);
    }
    return;
  }
  if (args.inner == 1 && args.channels < kChunk) {
    // A chunk's parameters repeat, so that every chunk finds its own in one table.
    Table<2 * kChunk> table;
    for (int64_t k = 0; k < 2 * kChunk; ++k) table.put(k, channel_at(args, k % args.channels));
    for (; begin < end; begin += kChunk) {
      const int64_t count = end - begin < kChunk ? end - begin : kChunk;
      fake_quantize_at<relu>(args, begin, count, table.from(begin % args.channels));
    }
    return;
  }
  Table<kChunk + kLanes> table;
  if (args.inner == 1) {
    for (; begin < end; begin += kChunk) {
      const int64_t count = end - begin < kChunk ? end - begin : kChunk;
      fill_across(table, args, begin, count);
      fake_quantize_at<relu>(args, begin, count, table.from(0));
    }
    return;
  }
  for (Run run(args, begin); begin < end;) {
    const int64_t run_end = run.end < end ? run.end : end;
    if (run_end - begin >= kChunk) {
      const SameForAll source(channel_at(args, run.channel));
      for (; run_end - begin >= kChunk; begin += kChunk) {
        fake_quantize_at<relu>(args, begin, kChunk, source);
      }
      if (begin == run.end) run.next();
    } else {
      const int64_t count = end - begin < kChunk ? end - begin : kChunk;
      fill(table, run, begin, count);
      fake_quantize_at<relu>(args, begin, count, table.from(0));
      begin += count;
    }
  }
}

// At most 16 lanes, whose numbers as bits fit one of them.
using Words = uint32_t __attribute__((vector_size(QT_VECTOR_BYTES)));
using Halves = uint16_t __attribute__((vector_size(QT_VECTOR_BYTES < 32 ? QT_VECTOR_BYTES : 32)));

// Elements [0, kChunk), whose mask is `bits`.
template <class Vector, class Bits>
inline void mask_chunk(const Bits* grad, uint64_t bits, Bits* y) {
  constexpr int64_t kCount = sizeof(Vector) / sizeof(Bits);
  Vector powers;
  for (int64_t k = 0; k < kCount; ++k) powers[k] = static_cast<Bits>(1u << k);
#pragma GCC unroll 16
  for (int64_t k = 0; k < kChunk; k += kCount) {
    const Vector own = (Vector{} + static_cast<Bits>(bits >> k)) & powers;
    const Vector result = own != 0 ? load<Vector>(grad + k) : Vector{};
    __builtin_memcpy(y + k, &result, sizeof result);
  }
}

template <class Vector, class Bits>
void mask_all(const MaskGradientArgs& args, int64_t begin, int64_t end) {
  const auto* grad = static_cast<const Bits*>(args.grad);
  auto* y = static_cast<Bits*>(args.y);
  for (; end - begin >= kChunk; begin += kChunk) {
    mask_chunk<Vector>(grad + begin, load<uint64_t>(args.mask + begin / 8), y + begin);
  }
  for (int64_t i = begin; i < end; ++i) {
    y[i] = ((args.mask[i / 8] >> (i % 8)) & 1) != 0 ? grad[i] : Bits{0};
  }
}

}  // namespace

void fake_quantize(const FakeQuantizeArgs& args, int64_t begin, int64_t end) {
  if (args.relu) {
    fake_quantize_all<true>(args, begin, end);
  } else {
    fake_quantize_all<false>(args, begin, end);
  }
}

void mask_gradient(const MaskGradientArgs& args, int64_t begin, int64_t end) {
  if (args.element_bytes == 2) {
    mask_all<Halves, uint16_t>(args, begin, end);
  } else {
    mask_all<Words, uint32_t>(args, begin, end);
  }
}
