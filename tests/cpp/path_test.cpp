#include "kernels/path.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"
#include "paths.h"

namespace qtoolkit::kernels {
namespace {

bool has(Kernel kernel, Path path) {
  const std::vector<Path> paths = paths_of(kernel);
  return std::count(paths.begin(), paths.end(), path) > 0;
}

TEST(Path, NamesGoBothWays) {
  for (Path path : all_paths()) {
    EXPECT_EQ(path_of(name(path)), path);
  }
  EXPECT_EQ(name(Path::avx512vnni), "avx512vnni");
  for (Kernel kernel : all_kernels()) EXPECT_EQ(kernel_of(name(kernel)), kernel);
  EXPECT_EQ(name(Kernel::fake_quantize), "fake_quantize");
}

TEST(Path, UnknownNamesListTheKnownOnes) {
  try {
    path_of("sse9");
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("'sse9'"), std::string::npos) << error.what();
    EXPECT_NE(std::string(error.what()).find("reference, portable, neondot"), std::string::npos)
        << error.what();
  }
  try {
    kernel_of("conv9d");
    FAIL() << "no exception";
  } catch (const std::invalid_argument& error) {
    EXPECT_NE(std::string(error.what()).find("fake_quantize"), std::string::npos) << error.what();
  }
  EXPECT_THROW(path_of(""), std::invalid_argument);
}

TEST(Path, EveryKernelHasReferenceAndPortableOnce) {
  for (Kernel kernel : all_kernels()) {
    const std::vector<Path> paths = paths_of(kernel);
    for (Path path : {Path::reference, Path::portable}) {
      EXPECT_EQ(std::count(paths.begin(), paths.end(), path), 1) << name(kernel);
    }
    for (Path path : paths) {
      EXPECT_EQ(std::count(paths.begin(), paths.end(), path), 1) << name(kernel);
    }
  }
}

TEST(Path, BestSupportedPathIsSelectedAndNeverTheReference) {
  for (Kernel kernel : all_kernels()) {
    const Path selected = selected_path(kernel);
    EXPECT_NE(selected, Path::reference);
    EXPECT_TRUE(supported(selected));
    for (Path path : runnable_paths(kernel)) EXPECT_LE(path, selected) << name(kernel);
  }
}

TEST(Path, ForcingHoldsUntilItIsEnded) {
  const Path best = selected_path(Kernel::add);
  force_path(Path::reference);
  EXPECT_EQ(selected_path(Kernel::add), Path::reference);
  EXPECT_EQ(selected_path(Kernel::histogram), Path::reference);
  force_path(Path::portable);
  EXPECT_EQ(selected_path(Kernel::add), Path::portable);
  force_path(std::nullopt);
  EXPECT_EQ(selected_path(Kernel::add), best);
}

TEST(Path, LastPathIsTheOneThatRan) {
  const AddArgs args;
  for (Path path : runnable_paths(Kernel::add)) {
    force_path(path);
    add(args, 0, 0);
    force_path(std::nullopt);
    EXPECT_EQ(last_path(Kernel::add), path);
  }
  add(args, 0, 0);
  EXPECT_EQ(last_path(Kernel::add), selected_path(Kernel::add));
}

TEST(Path, ForcingAnUnsupportedPathIsAnError) {
  for (Path path : all_paths()) {
    if (supported(path)) continue;
    try {
      force_path(path);
      force_path(std::nullopt);
      ADD_FAILURE() << name(path) << " was forced";
    } catch (const std::invalid_argument& error) {
      EXPECT_NE(std::string(error.what()).find(name(path)), std::string::npos) << error.what();
    }
  }
}

TEST(Path, AKernelWithoutTheForcedPathTakesTheBestBeforeIt) {
  for (Path forced : all_paths()) {
    if (!supported(forced)) continue;
    force_path(forced);
    for (Kernel kernel : all_kernels()) {
      const Path selected = selected_path(kernel);
      EXPECT_LE(selected, forced) << name(kernel);
      for (Path path : runnable_paths(kernel)) {
        EXPECT_TRUE(path <= selected || path > forced) << name(kernel) << ": " << name(path);
      }
      EXPECT_EQ(has(kernel, forced), selected == forced) << name(kernel);
    }
    force_path(std::nullopt);
  }
}

}  // namespace
}  // namespace qtoolkit::kernels
