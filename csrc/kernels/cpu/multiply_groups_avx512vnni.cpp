#include "kernels/cpu/multiply_groups_avx512.h"
#include "kernels/kernels.h"

namespace qtoolkit::kernels::avx512vnni {
namespace {

// --- many rows: 16 rows of activations in a vector, weights broadcast --------------------------

constexpr int64_t kPieceBytes = 256;  // of a group's row that are unpacked before a product
constexpr int64_t kMostRows = 128;    // whose sums stay in the first level cache

// Products of all channels of the block, as `numbers` [16][kStride], with kVectors * 16 rows.
struct Piece {
  const uint8_t* numbers;
  int64_t quads;
  const int8_t* x;  // of the first vector
  int64_t x_stride;
};

using Quad = int32_t __attribute__((may_alias, aligned(1)));

template <int64_t kStride, int kVectors, int kRows>
inline __attribute__((always_inline)) void multiply_tile(const Piece& piece, int first,
                                                         const int32_t* start, int64_t start_stride,
                                                         int32_t* sums) {
  __m512i acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[i][v] = _mm512_load_si512(start + (first + i) * start_stride + v * 16);
    }
  }
  const uint8_t* const numbers = piece.numbers + first * kStride;
  for (int64_t q = 0; q < piece.quads; ++q) {
    __m512i x[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      x[v] = _mm512_load_si512(piece.x + v * piece.x_stride + q * 64);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      // GCC 12 would load into a general register and broadcast from there, which takes a port of
      // the vector units.
      __m512i number;
      asm("vpbroadcastd %1, %0"
          : "=v"(number)
          : "m"(*reinterpret_cast<const Quad*>(numbers + i * kStride + q * 4)));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        acc[i][v] = _mm512_dpbusd_epi32(acc[i][v], number, x[v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_si512(sums + (first + i) * kMostRows + v * 16, acc[i][v]);
    }
  }
}

template <int64_t kStride, int kVectors>
void multiply_piece(const Piece& piece, const int32_t* start, int64_t start_stride, int32_t* sums) {
  constexpr int kRows = kVectors == 1 ? 16 : kVectors == 2 ? 8 : 4;
  for (int first = 0; first < kChannels; first += kRows) {
    multiply_tile<kStride, kVectors, kRows>(piece, first, start, start_stride, sums);
  }
}

template <class Unpack>
class ManyRows {
 public:
  ManyRows(const MultiplyGroupsArgs& args, int64_t block)
      : args_(args), weight_(args.weight), rows_(args.weight, block), unpack_(args.weight) {}

  void run() {
    for (int64_t m = 0; m < args_.rows; m += kMostRows) {
      run(m, args_.rows - m < kMostRows ? args_.rows - m : kMostRows);
    }
  }

 private:
  void run(int64_t first_row, int64_t count) {
    const int64_t groups = weight_.groups();
    const int64_t vectors = (count + 15) / 16;
    alignas(64) float acc[kChannels][kMostRows];
    alignas(64) int32_t sums[kChannels][kMostRows];
    for (auto& row : acc) {
      for (int64_t v = 0; v < vectors; ++v) _mm512_store_ps(row + v * 16, _mm512_setzero_ps());
    }
    const int64_t first_block = first_row / 16;
    for (int64_t g = 0; g < groups; ++g) {
      const GroupPart part = group_part(weight_, g);
      // Every channel begins with the same sums, those that the zero point asks for.
      alignas(64) int32_t start[kMostRows];
      const __m512i zero = _mm512_set1_epi32(weight_.zero_point != nullptr ? 0 : -weight_.zero);
      for (int64_t v = 0; v < vectors; ++v) {
        const __m512i x_sums =
            _mm512_loadu_si512(args_.x_sums + ((first_block + v) * groups + g) * 16);
        _mm512_store_si512(start + v * 16, _mm512_mullo_epi32(x_sums, zero));
      }
      for (int64_t byte = 0; byte < part.bytes; byte += kPieceBytes) {
        multiply(part, byte, first_block, vectors, start, sums[0]);
      }
      for (int64_t v = 0; v < vectors; ++v) {
        const int64_t from = ((first_block + v) * groups + g) * 16;
        const __m512 x_scale = _mm512_loadu_ps(args_.x_scale + from);
#pragma GCC unroll 16
        for (int i = 0; i < kChannels; ++i) {
          const int64_t at = rows_.channel(i) * groups + g;
          __m512i sum = _mm512_load_si512(&sums[i][v * 16]);
          if (weight_.zero_point != nullptr) {
            const __m512i zero = _mm512_set1_epi32(weight_.zero_point[at]);
            const __m512i x_sums = _mm512_loadu_si512(args_.x_sums + from);
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(x_sums, zero));
          }
          const __m512 factor = _mm512_mul_ps(x_scale, _mm512_set1_ps(weight_.scale[at]));
          _mm512_store_ps(&acc[i][v * 16], _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), factor,
                                                           _mm512_load_ps(&acc[i][v * 16])));
        }
      }
    }
    store_rows(args_, rows_, acc[0], kMostRows, first_row, count);
  }

  void multiply(const GroupPart& part, int64_t byte, int64_t first_block, int64_t vectors,
                const int32_t* start, int32_t* sums) {
    constexpr int64_t kStride = kPieceBytes * Unpack::kPlanes;
    alignas(64) uint8_t numbers[kChannels][kStride];
    const int64_t bytes = part.bytes - byte < kPieceBytes ? part.bytes - byte : kPieceBytes;
    const int64_t at = part.first_byte + byte;
    const int64_t ahead = prefetch_distance(weight_, at, kChannels);
    const int64_t real = part.real_bytes - byte < bytes ? part.real_bytes - byte : bytes;
    for (int i = 0; i < kChannels; ++i) {
      const uint8_t* const codes = rows_.codes(i) + at;
      for (int64_t line = 0; line < bytes; line += 64) {
        _mm_prefetch(codes + ahead + line, _MM_HINT_T0);
      }
      unpack_row(unpack_, codes, real, bytes, numbers[i]);
    }
    const int64_t quad = part.first_quad + byte * Unpack::kPlanes / 4;
    const int64_t x_stride = grouped_quads(weight_) * 64;
    Piece piece{.numbers = numbers[0],
                .quads = bytes * Unpack::kPlanes / 4,
                .x = args_.x + first_block * x_stride + quad * 64,
                .x_stride = x_stride};
    const int64_t start_stride = byte == 0 ? 0 : kMostRows;
    if (byte != 0) start = sums;
    for (int64_t v = 0; v < vectors;) {
      const int64_t left = vectors - v;
      if (left >= 4) {
        multiply_piece<kStride, 4>(piece, start + v * 16, start_stride, sums + v * 16);
        v += 4;
        piece.x += 4 * x_stride;
      } else if (left >= 2) {
        multiply_piece<kStride, 2>(piece, start + v * 16, start_stride, sums + v * 16);
        v += 2;
        piece.x += 2 * x_stride;
      } else {
        multiply_piece<kStride, 1>(piece, start + v * 16, start_stride, sums + v * 16);
        ++v;
      }
    }
  }

  const MultiplyGroupsArgs& args_;
  const GroupedWeight& weight_;
  BlockRows rows_;
  Unpack unpack_;
};

}  // namespace

void multiply_groups(const MultiplyGroupsArgs& args, int64_t begin, int64_t end) {
  with_unpack(args.weight, [&]<class Unpack>(const Unpack&) {
    for (int64_t block = begin; block < end; ++block) {
      if (args.lanes == 1) {
        FewRows<Unpack>(args, block).run();
      } else {
        ManyRows<Unpack>(args, block).run();
      }
    }
  });
}

}  // namespace qtoolkit::kernels::avx512vnni
