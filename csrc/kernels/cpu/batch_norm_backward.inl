// The gradient of batch norm, included after batch_norm.inl into the same namespace. No include
// guard and no includes, on purpose.

namespace {

// Bits [i, i + count) of a mask, count <= kStep, the others zero.
inline uint32_t load_bits(const uint8_t* mask, int64_t i, int64_t count) {
  const uint8_t* from = mask + i / 8;
  if (count == 16 && i % 8 == 0) return load<uint16_t>(from);
  const int64_t shift = i % 8, bytes = (shift + count + 7) / 8;
  uint32_t bits = from[0];
  if (bytes > 1) bits |= uint32_t{from[1]} << 8;
  if (bytes > 2) bits |= uint32_t{from[2]} << 16;
  return bits >> shift & ((1u << count) - 1);
}

inline bool bit_of(const uint8_t* mask, int64_t i) {
  return mask == nullptr || (mask[i / 8] >> i % 8 & 1) != 0;
}

// values where the bits are set, else 0.
inline Floats where_set(uint32_t bits, const Floats& values) {
  return (Floats)((Masks)values & masks_of(bits));
}

// --- sums of the gradient -----------------------------------------------------------------------

template <int64_t kGroup, bool kMask, bool kStore>
void reduce_rows(const BatchNormReduceArgs& args, int64_t first, int64_t rows, double* to_sum,
                 double* to_products) {
  Doubles sum[2 * kGroup], products[2 * kGroup];
  __builtin_memcpy(sum, to_sum, sizeof sum);
  __builtin_memcpy(products, to_products, sizeof products);
  const int64_t ahead = 8 * args.channels;  // two streams with gaps are more than CPUs foresee
  for (int64_t row = 0; row < rows; ++row, first += args.channels) {
    for (int64_t g = 0; g < kGroup; ++g) {
      const int64_t i = first + g * kLanes;
      __builtin_prefetch(args.grad + i + ahead);
      __builtin_prefetch(args.x + i + ahead);
      auto dz = load<Floats>(args.grad + i);
      if constexpr (kMask) {
        dz = where_set(load_bits(args.mask, i, kLanes), dz);
      }
      if constexpr (kStore) store(args.dz + i, dz);
      add_to(sum + 2 * g, dz);
      add_product_to(products + 2 * g, dz, load<Floats>(args.x + i));
    }
  }
  __builtin_memcpy(to_sum, sum, sizeof sum);
  __builtin_memcpy(to_products, products, sizeof products);
}

template <bool kMask, bool kStore>
void reduce_row_part(const BatchNormReduceArgs& args, int64_t part) {
  const int64_t channels = args.channels;
  double* sum = args.sum + part * channels;
  double* products = args.products + part * channels;
  const int64_t begin = part * args.part_rows;
  const int64_t end = begin + args.part_rows < args.outer ? begin + args.part_rows : args.outer;
  const int64_t together = rows_together(channels);
  for (int64_t row = begin; row < end; row += together) {
    const int64_t rows = end - row < together ? end - row : together;
    const int64_t first = row * channels;
    int64_t c = 0;
    for (; c + QT_CHANNEL_GROUP <= channels; c += QT_CHANNEL_GROUP) {
      reduce_rows<kGroupVectors, kMask, kStore>(args, first + c, rows, sum + c, products + c);
    }
    for (; c + kLanes <= channels; c += kLanes) {
      reduce_rows<1, kMask, kStore>(args, first + c, rows, sum + c, products + c);
    }
    for (int64_t k = 0; k < rows && c < channels; ++k) {
      for (int64_t rest = c; rest < channels; ++rest) {
        const int64_t i = first + k * channels + rest;
        const float dz = bit_of(args.mask, i) ? args.grad[i] : 0.0f;
        if constexpr (kStore) args.dz[i] = dz;
        sum[rest] += double{dz};
        products[rest] += double{dz} * double{args.x[i]};
      }
    }
  }
}

template <bool kMask, bool kStore>
void reduce_plane(const BatchNormReduceArgs& args, int64_t part) {
  Doubles sum[2 * kVectors] = {}, products[2 * kVectors] = {};
  const int64_t begin = part * args.inner, end = begin + args.inner;
  int64_t i = begin;
  for (; i + kStep <= end; i += kStep) {
    const uint32_t bits = kMask ? load_bits(args.mask, i, kStep) : 0;
    for (int64_t v = 0; v < kVectors; ++v) {
      auto dz = load<Floats>(args.grad + i + v * kLanes);
      if constexpr (kMask) dz = where_set(bits >> v * kLanes, dz);
      if constexpr (kStore) store(args.dz + i + v * kLanes, dz);
      add_to(sum + 2 * v, dz);
      add_product_to(products + 2 * v, dz, load<Floats>(args.x + i + v * kLanes));
    }
  }
  double lane_sum[kStep], lane_products[kStep];
  __builtin_memcpy(lane_sum, sum, sizeof lane_sum);
  __builtin_memcpy(lane_products, products, sizeof lane_products);
  for (int64_t k = 0; i < end; ++i, ++k) {
    const float dz = bit_of(args.mask, i) ? args.grad[i] : 0.0f;
    if constexpr (kStore) args.dz[i] = dz;
    lane_sum[k] += double{dz};
    lane_products[k] += double{dz} * double{args.x[i]};
  }
  args.sum[part] = sum_of(lane_sum);
  args.products[part] = sum_of(lane_products);
}

template <bool kMask, bool kStore>
void reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end) {
  for (int64_t part = begin; part < end; ++part) {
    if (args.inner > 1) {
      reduce_plane<kMask, kStore>(args, part);
      continue;
    }
    for (int64_t r = part * args.channels; r < (part + 1) * args.channels; ++r) {
      args.sum[r] = args.products[r] = 0.0;
    }
    reduce_row_part<kMask, kStore>(args, part);
  }
}

// --- gradient of x ------------------------------------------------------------------------------

template <bool kMask, bool kStatistics>
void gradient(const BatchNormGradientArgs& args, int64_t begin, int64_t end) {
  const auto step = [&](const float* grad, uint32_t bits, const float* x,
                        const float* const(&numbers)[4], float* grad_x) {
    for (int64_t v = 0; v < kVectors; ++v) {
      const int64_t k = v * kLanes;
      auto dz = load<Floats>(grad + k);
      if constexpr (kMask) dz = where_set(bits >> k, dz);
      Floats result = dz * load<Floats>(numbers[0] + k);
      if constexpr (kStatistics) {
        const Floats centered = load<Floats>(x + k) - load<Floats>(numbers[1] + k);
        result = result + centered * load<Floats>(numbers[2] + k);
        result = result + load<Floats>(numbers[3] + k);
      }
      store(grad_x + k, result);
    }
  };
  const float* parameters[4] = {args.factor, kStatistics ? args.mean : args.factor,
                                kStatistics ? args.slope : args.factor,
                                kStatistics ? args.addend : args.factor};
  for_each_step(args, parameters, begin, end,
                [&](int64_t i, int64_t count, const float* const(&numbers)[4]) {
                  const uint32_t bits = kMask ? load_bits(args.mask, i, count) : 0;
                  const float* x = kStatistics ? args.x + i : nullptr;
                  if (count == kStep) {
                    step(args.grad + i, bits, x, numbers, args.grad_x + i);
                    return;
                  }
                  const PartialStep part(args.grad + i, count), input(x, count);
                  PartialStep result(nullptr, 0);
                  step(part.values, bits, input.values, numbers, result.values);
                  result.store_to(args.grad_x + i, count);
                });
}

}  // namespace

void batch_norm_reduce(const BatchNormReduceArgs& args, int64_t begin, int64_t end) {
  if (args.mask != nullptr) {
    args.dz != nullptr ? reduce<true, true>(args, begin, end)
                       : reduce<true, false>(args, begin, end);
  } else {
    args.dz != nullptr ? reduce<false, true>(args, begin, end)
                       : reduce<false, false>(args, begin, end);
  }
}

void batch_norm_gradient(const BatchNormGradientArgs& args, int64_t begin, int64_t end) {
  if (args.mask != nullptr) {
    args.x != nullptr ? gradient<true, true>(args, begin, end)
                      : gradient<true, false>(args, begin, end);
  } else {
    args.x != nullptr ? gradient<false, true>(args, begin, end)
                      : gradient<false, false>(args, begin, end);
  }
}
