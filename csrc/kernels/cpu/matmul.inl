// Packing and sums for products of matrices in plain C++ with vector types, compiled once for every
// baseline: the including file opens the path's namespace and defines QT_VECTOR_BYTES, Sums, a
// vector of int32 of that size, and
//   Sums add_signed_quads(Sums, Sums bytes): each lane's four int8 added to it
//   Sums add_unsigned_bytes(Sums, Sums bytes): all uint8 added to any of the lanes
//   int32_t total(Sums): the sum of the lanes.
// No include guard and no includes, on purpose.

namespace {

// Packing moves 16 bytes at once on every baseline: wider registers interleave in halves of 16
// bytes only, and one such step a cycle is faster than the bytes come from memory.
using Bytes = uint8_t __attribute__((vector_size(16)));
using Pairs = uint16_t __attribute__((vector_size(16)));
using Quads = uint32_t __attribute__((vector_size(16)));
using Twins = uint64_t __attribute__((vector_size(16)));

constexpr int64_t kTileBytes = 4 * kChannelBlock;  // of a quad of rows and a block of columns

template <class Vector>
inline Vector load(const uint8_t* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof vector);
  return vector;
}
template <class Vector>
inline void store(int8_t* to, Vector vector) {
  __builtin_memcpy(to, &vector, sizeof vector);
}

// Four rows of 16 bytes, interleaved.
inline void pack_rows(const uint8_t* const (&rows)[4], uint8_t flip, int8_t* to) {
  Bytes row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = load<Bytes>(rows[i]) ^ flip;
  const auto low = [](Bytes a, Bytes b) {
    return (Pairs)__builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7,
                                          23);
  };
  const auto high = [](Bytes a, Bytes b) {
    return (Pairs)__builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14,
                                          30, 15, 31);
  };
  const Pairs first[2] = {low(row[0], row[1]), high(row[0], row[1])};
  const Pairs second[2] = {low(row[2], row[3]), high(row[2], row[3])};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Pairs a = first[i], b = second[i];
    store(to + 32 * i, __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11));
    store(to + 32 * i + 16, __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15));
  }
}

// Four columns of 16 bytes: 4 x 4 quads, transposed; `to` is the first of four tiles.
inline void pack_columns(const uint8_t* const (&columns)[4], uint8_t flip, int8_t* to) {
  Quads column[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) column[i] = (Quads)(load<Bytes>(columns[i]) ^ flip);
  const auto low = [](Quads a, Quads b) {
    return (Twins)__builtin_shufflevector(a, b, 0, 4, 1, 5);
  };
  const auto high = [](Quads a, Quads b) {
    return (Twins)__builtin_shufflevector(a, b, 2, 6, 3, 7);
  };
  const Twins first[2] = {low(column[0], column[1]), high(column[0], column[1])};
  const Twins second[2] = {low(column[2], column[3]), high(column[2], column[3])};
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i) {
    const Twins a = first[i], b = second[i];
    store(to + 2 * i * kTileBytes, __builtin_shufflevector(a, b, 0, 2));
    store(to + (2 * i + 1) * kTileBytes, __builtin_shufflevector(a, b, 1, 3));
  }
}

// A tile at the matrix's edge, or with strides other than 1: its four rows, side by side.
void pack_tile(const PackMatrixArgs& args, int64_t row, int64_t column, int8_t* to) {
  uint8_t tile[4][kChannelBlock];
  __builtin_memset(tile, args.flip, sizeof tile);
  const int64_t rows = args.rows - row < 4 ? args.rows - row : 4;
  const int64_t left = args.columns - column;
  const int64_t columns = left < kChannelBlock ? left : kChannelBlock;
  const uint8_t* from = args.codes + row * args.row_stride + column * args.column_stride;
  for (int64_t r = 0; r < rows; ++r, from += args.row_stride) {
    if (args.column_stride == 1) {
      __builtin_memcpy(tile[r], from, static_cast<size_t>(columns));
      continue;
    }
    for (int64_t c = 0; c < columns; ++c) tile[r][c] = from[c * args.column_stride];
  }
  for (int half = 0; half < kChannelBlock; half += 16) {
    const uint8_t* const lines[4] = {tile[0] + half, tile[1] + half, tile[2] + half,
                                     tile[3] + half};
    pack_rows(lines, args.flip, to + 4 * half);
  }
}

void pack_block(const PackMatrixArgs& args, int64_t column, int8_t* to) {
  const bool whole = args.columns - column >= kChannelBlock;
  const uint8_t* const from = args.codes + column * args.column_stride;
  int64_t row = 0;
  if (whole && args.column_stride == 1) {
    for (; row + 4 <= args.rows; row += 4, to += kTileBytes) {
      for (int half = 0; half < kChannelBlock; half += 16) {
        const uint8_t* const line = from + row * args.row_stride + half;
        const uint8_t* const lines[4] = {line, line + args.row_stride, line + 2 * args.row_stride,
                                         line + 3 * args.row_stride};
        pack_rows(lines, args.flip, to + 4 * half);
      }
    }
  } else if (whole && args.row_stride == 1) {
    for (; row + 16 <= args.rows; row += 16, to += 4 * kTileBytes) {
      for (int64_t lane = 0; lane < kChannelBlock; lane += 4) {
        const uint8_t* const line = from + row + lane * args.column_stride;
        const uint8_t* const lines[4] = {line, line + args.column_stride,
                                         line + 2 * args.column_stride,
                                         line + 3 * args.column_stride};
        pack_columns(lines, args.flip, to + 4 * lane);
      }
    }
  }
  for (; row < args.rows; row += 4, to += kTileBytes) pack_tile(args, row, column, to);
}

// The sums of a packed block's columns.
void sum_block(const int8_t* packed, int64_t quads, int32_t* sums) {
  constexpr int64_t kVectors = kTileBytes / QT_VECTOR_BYTES;
  Sums acc[kVectors] = {};
  for (int64_t quad = 0; quad < quads; ++quad, packed += kTileBytes) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < kVectors; ++v) {
      Sums x;
      __builtin_memcpy(&x, packed + v * QT_VECTOR_BYTES, sizeof x);
      acc[v] = add_signed_quads(acc[v], x);
    }
  }
  __builtin_memcpy(sums, acc, sizeof acc);
}

inline int32_t sum_bytes(const uint8_t* x, int64_t count) {
  Sums acc = {};
  int64_t i = 0;
  for (; i + QT_VECTOR_BYTES <= count; i += QT_VECTOR_BYTES) {
    Sums bytes;
    __builtin_memcpy(&bytes, x + i, sizeof bytes);
    acc = add_unsigned_bytes(acc, bytes);
  }
  int32_t sum = total(acc);
  for (; i < count; ++i) sum += x[i];
  return sum;
}

}  // namespace

void pack_matrix(const PackMatrixArgs& args, int64_t begin, int64_t end) {
  const int64_t quads = (args.rows + 3) / 4;
  for (int64_t block = begin; block < end; ++block) {
    int8_t* const to = args.packed + block * quads * kTileBytes;
    pack_block(args, block * kChannelBlock, to);
    sum_block(to, quads, args.sums + block * kChannelBlock);
  }
}

void sum_rows(const SumRowsArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    args.sums[row] = sum_bytes(args.codes + row * args.row_stride, args.width);
  }
}
