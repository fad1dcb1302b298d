#include "kernels/range_errors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/path.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

std::vector<double> masses(int64_t size, uint64_t seed) {
  Random random(seed);
  std::vector<double> result(static_cast<size_t>(size));
  for (double& mass : result) {
    mass = random.integer(0, 2) == 0 ? 0.0 : static_cast<double>(random.integer(1, 1000000));
  }
  return result;
}

QT_FOR_EACH_PATH(CellErrors, cell_errors);
QT_FOR_EACH_PATH(ScaleErrors, scale_errors);

std::vector<uint8_t> cell_errors_on(Path path, const std::vector<double>& mass, int32_t levels) {
  const auto bins = static_cast<int32_t>(mass.size());
  const std::vector<int32_t> first = {0, bins / 3, bins - 1, 0};
  const std::vector<int32_t> last = {bins - 1, bins - bins / 5 - 1, bins - 1, 0};
  Guarded<double> errors(4);
  CellErrorsArgs args;
  args.mass = mass.data();
  args.bins = bins;
  args.first = first.data();
  args.last = last.data();
  args.levels = levels;
  args.errors = errors.data();
  run_on(path, Kernel::cell_errors, [&] { cell_errors(args, 0, 4); });
  return errors.bytes();
}

TEST_P(CellErrors, GivesTheReferencesBits) {
  for (int64_t bins : {1, 2, 7, 8, 9, 63, 64, 65, 2048, 2051}) {
    for (int32_t levels : {2, 3, 16, 255, 256}) {
      const std::vector<double> mass = masses(bins, static_cast<uint64_t>(bins * 7 + levels));
      EXPECT_EQ(cell_errors_on(GetParam(), mass, levels),
                cell_errors_on(Path::reference, mass, levels))
          << bins << " bins, " << levels << " levels";
    }
  }
}

TEST_P(CellErrors, HandComputedErrors) {
  // Two cells of two bins, whose centres are 1 and 3. A bin that ends at its centre has 1/3.
  const std::vector<double> mass = {3.0, 0.0, 0.0, 6.0, 1.0};
  const int32_t first = 0, last = 3;
  double error = 0.0;
  CellErrorsArgs args;
  args.mass = mass.data();
  args.bins = 5;
  args.first = &first;
  args.last = &last;
  args.levels = 2;
  args.errors = &error;
  run_on(GetParam(), Kernel::cell_errors, [&] { cell_errors(args, 0, 1); });
  EXPECT_NEAR(error, 3.0 / 3 + 6.0 / 3 + (8.0 - 1.0) / 3, 1e-12);  // beyond: from 1 to 2 away
}

std::vector<uint8_t> scale_errors_on(Path path, const std::vector<float>& x,
                                     const std::vector<double>& mass, bool with_mass) {
  const std::vector<float> scale = {0.1f, 3e-30f, 1e30f, 0.7f};
  const std::vector<int32_t> zero_point = {0, 127, -128, 5};
  Guarded<double> errors(4);
  ScaleErrorsArgs args;
  args.x = x.data();
  args.mass = with_mass ? mass.data() : nullptr;
  args.size = static_cast<int64_t>(x.size());
  args.scale = scale.data();
  args.zero_point = zero_point.data();
  args.quant_min = -128;
  args.quant_max = 127;
  args.errors = errors.data();
  run_on(path, Kernel::scale_errors, [&] { scale_errors(args, 0, 4); });
  return errors.bytes();
}

TEST_P(ScaleErrors, GivesTheReferencesBits) {
  for (int64_t size : {0, 1, 7, 8, 9, 15, 16, 17, 64, 1000}) {
    Random random(static_cast<uint64_t>(size) + 1);
    std::vector<float> x = random.reals(size, -20.0f, 20.0f);
    for (float& value : x) {
      if (random.integer(0, 9) == 0) value = random.integer(0, 1) == 0 ? 3e38f : -0.0f;
      if (random.integer(0, 9) == 0) value = std::round(value * 2) * 0.05f;  // ties
    }
    for (bool with_mass : {false, true}) {
      const std::vector<double> mass = masses(size, static_cast<uint64_t>(size));
      EXPECT_EQ(scale_errors_on(GetParam(), x, mass, with_mass),
                scale_errors_on(Path::reference, x, mass, with_mass))
          << size << " values";
    }
  }
}

TEST_P(ScaleErrors, HandComputedErrors) {
  const std::vector<float> x = {0.25f, 1.0f, -1.0f, 10.0f};
  const std::vector<double> mass = {2.0, 5.0, 1.0, 3.0};
  const float scale = 1.0f;
  const int32_t zero_point = 0;
  double error = 0.0;
  ScaleErrorsArgs args;
  args.x = x.data();
  args.mass = mass.data();
  args.size = 4;
  args.scale = &scale;
  args.zero_point = &zero_point;
  args.quant_min = 0;
  args.quant_max = 8;
  args.errors = &error;
  run_on(GetParam(), Kernel::scale_errors, [&] { scale_errors(args, 0, 1); });
  EXPECT_EQ(error, 2 * 0.0625 + 0 + 1 + 3 * 4);
}

}  // namespace
}  // namespace qtoolkit::kernels
