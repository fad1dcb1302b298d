// add and mul on vectors: the including file opens the path's namespace and says what a vector is.
// No include guard and no includes, on purpose. It gives
//   kCodes                    codes in a vector; a part of them is kCodes / 4 floats
//   Bytes, Floats             the vectors, Floats with the operators of float
//   load, store, fill         of Bytes; load_first and store_first of fewer than kCodes codes
//   splat                     of Floats
//   spread<kPlain>            codes to four parts of float(code - zero_point)
//   gather<kPlain, kBounded>  four parts to codes, as round_to_code does
// kPlain: all codes are uint8, and any of them is a valid result. kBounded: no part of a value is
// 2^31 or more, or NaN.

namespace {

struct Sum {
  explicit Sum(const AddArgs& args)
      : a_multiplier(splat(args.a_multiplier)), b_multiplier(splat(args.b_multiplier)) {}

  Floats operator()(Floats a, Floats b) const { return a * a_multiplier + b * b_multiplier; }

  Floats a_multiplier, b_multiplier;
};

struct Product {
  explicit Product(const MulArgs& args) : multiplier(splat(args.multiplier)) {}

  // The product of two codes is exact in float32.
  Floats operator()(Floats a, Floats b) const { return a * b * multiplier; }

  Floats multiplier;
};

// Rows for which a vector of b stays in registers; their lines stay in the first-level cache until
// the next vector's turn.
constexpr int64_t kRowsAtOnce = 32;

template <class Combine, bool kSingle, bool kPlain, bool kBounded>
class Rows {
 public:
  template <class Args>
  explicit Rows(const Args& args)
      : spread_a_(args.a_signed, args.a_zero_point),
        spread_b_(args.b_signed, args.b_zero_point),
        gather_(args),
        combine_(args) {}

  // Not inlined, or the machine code would hold it for every kind of rows.
  __attribute__((noinline)) void operator()(const SharedRows& part) const {
    const Rows self = *this;  // a copy that no store to y can change stays in registers
    Floats b[4];
    if constexpr (kSingle) self.spread_b_(fill(part.b[0]), b);
    for (int64_t first = 0; first < part.rows; first += kRowsAtOnce) {
      const int64_t rest = part.rows - first, rows = rest < kRowsAtOnce ? rest : kRowsAtOnce;
      const uint8_t* first_a = part.a + first * part.a_stride;
      uint8_t* first_y = part.y + first * part.y_stride;
      int64_t c = 0;
      for (; c + kCodes <= part.count; c += kCodes) {
        if constexpr (!kSingle) self.spread_b_(load(part.b + c), b);
        const uint8_t* a = first_a + c;
        uint8_t* y = first_y + c;
        for (int64_t row = 0; row < rows; ++row, a += part.a_stride, y += part.y_stride) {
          store(y, self.codes(load(a), b));
        }
      }
      if (const int64_t count = part.count - c; count > 0) {
        if constexpr (!kSingle) self.spread_b_(load_first(part.b + c, count), b);
        const uint8_t* a = first_a + c;
        uint8_t* y = first_y + c;
        for (int64_t row = 0; row < rows; ++row, a += part.a_stride, y += part.y_stride) {
          store_first(y, count, self.codes(load_first(a, count), b));
        }
      }
    }
  }

 private:
  Bytes codes(Bytes a, const Floats (&b)[4]) const {
    Floats values[4];
    spread_a_(a, values);
    for (int k = 0; k < 4; ++k) values[k] = combine_(values[k], b[k]);
    return gather_(values);
  }

  Spread<kPlain> spread_a_, spread_b_;
  Gather<kPlain, kBounded> gather_;
  Combine combine_;
};

template <class Combine, bool kSingle, class Args>
void combine_codes(const Args& args, int64_t begin, int64_t end, bool bounded) {
  const bool plain = !args.a_signed && !args.b_signed && args.lo == 0 && args.hi == 255;
  if (!bounded) {
    walk_rows(args, begin, end, Rows<Combine, kSingle, false, false>(args));
  } else if (plain) {
    walk_rows(args, begin, end, Rows<Combine, kSingle, true, true>(args));
  } else {
    walk_rows(args, begin, end, Rows<Combine, kSingle, false, true>(args));
  }
}

// Centred codes are below 2^9.
bool within(float value, int bits) {
  const float bound = static_cast<float>(1 << bits);
  return value >= -bound && value <= bound;
}

}  // namespace

void add(const AddArgs& args, int64_t begin, int64_t end) {
  const bool bounded = within(args.a_multiplier, 20) && within(args.b_multiplier, 20);
  args.b_single ? combine_codes<Sum, true>(args, begin, end, bounded)
                : combine_codes<Sum, false>(args, begin, end, bounded);
}

void mul(const MulArgs& args, int64_t begin, int64_t end) {
  const bool bounded = within(args.multiplier, 12);
  args.b_single ? combine_codes<Product, true>(args, begin, end, bounded)
                : combine_codes<Product, false>(args, begin, end, bounded);
}
