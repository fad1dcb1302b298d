// The activation functions against long double, and the vector form against the scalar one.

#include "core/activation.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace qtoolkit {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using Function = float(float);
using Exact = long double(long double);

long double exact_gelu(long double x) { return 0.5L * x * erfcl(-x * sqrtl(0.5L)); }
long double exact_silu(long double x) { return x / (1.0L + expl(-x)); }
long double exact_gelu_tanh(long double x) {
  const long double pi = acosl(-1.0L);
  return x / (1.0L + expl(-2.0L * sqrtl(2.0L / pi) * (x + 0.044715L * x * x * x)));
}

// The greatest distance in units of the exact result's last place, over every `step`-th float of a
// sign from the smallest normal number to 100.
long double worst_units(Function* function, Exact* exact, bool negative) {
  constexpr uint32_t step = 4099;
  long double worst = 0.0L;
  for (auto bits = std::bit_cast<uint32_t>(std::numeric_limits<float>::min());
       bits < std::bit_cast<uint32_t>(100.0f); bits += step) {
    const float x = std::bit_cast<float>(bits | (negative ? 0x80000000u : 0u));
    const long double expected = exact(x);
    const long double error = fabsl(function(x) - expected);
    if (fabsl(expected) < 3e-36L) {
      EXPECT_LE(error, 3e-36L) << x;
      continue;
    }
    int exponent = 0;
    frexpl(expected, &exponent);
    worst = std::max(worst, error / ldexpl(1.0L, exponent - 24));
  }
  return worst;
}

TEST(Activation, IsWithinUnitsInTheLastPlaceOfExact) {
  EXPECT_LE(worst_units(gelu<float, int32_t>, exact_gelu, false), 3.0L);
  EXPECT_LE(worst_units(gelu<float, int32_t>, exact_gelu, true), 8.0L);
  EXPECT_LE(worst_units(silu<float, int32_t>, exact_silu, false), 3.0L);
  EXPECT_LE(worst_units(silu<float, int32_t>, exact_silu, true), 3.0L);
  EXPECT_LE(worst_units(gelu_tanh<float, int32_t>, exact_gelu_tanh, false), 3.0L);
  EXPECT_LE(worst_units(gelu_tanh<float, int32_t>, exact_gelu_tanh, true), 200.0L);
}

TEST(Activation, KeepsLimitsAndNaN) {
  for (Function* function :
       {gelu<float, int32_t>, silu<float, int32_t>, gelu_tanh<float, int32_t>}) {
    EXPECT_EQ(function(0.0f), 0.0f);
    EXPECT_EQ(function(kInfinity), kInfinity);
    EXPECT_EQ(function(-kInfinity), 0.0f);
    EXPECT_EQ(function(3e38f), 3e38f);
    EXPECT_EQ(function(-3e38f), 0.0f);
    EXPECT_TRUE(std::isnan(function(kNaN)));
  }
  const auto relu = activate<Activation::relu, float, int32_t>;
  EXPECT_EQ(relu(-1.5f), 0.0f);
  EXPECT_EQ(relu(1.5f), 1.5f);
  EXPECT_TRUE(std::isnan(relu(kNaN)));
}

TEST(Activation, OfAVectorIsThatOfItsElements) {
  using Floats = float __attribute__((vector_size(16)));
  using Ints = int32_t __attribute__((vector_size(16)));
  Function* const scalars[] = {gelu<float, int32_t>, gelu_tanh<float, int32_t>,
                               silu<float, int32_t>};
  for (const Floats x :
       {Floats{-30.0f, -1.25f, -0.0f, 0.5f}, Floats{6.75f, kInfinity, -kInfinity, 14.5f}}) {
    const Floats vectors[] = {gelu<Floats, Ints>(x), gelu_tanh<Floats, Ints>(x),
                              silu<Floats, Ints>(x)};
    for (int f = 0; f < 3; ++f) {
      for (int i = 0; i < 4; ++i) {
        EXPECT_EQ(std::bit_cast<uint32_t>(float{vectors[f][i]}),
                  std::bit_cast<uint32_t>(scalars[f](x[i])))
            << f << " " << x[i];
      }
    }
  }
}

}  // namespace
}  // namespace qtoolkit
