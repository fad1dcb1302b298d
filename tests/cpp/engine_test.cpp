// Plans: the same bits for every team, batch and way to run, and whatever was saved.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>

#include "engine_programs.h"
#include "kernels/kernels.h"

namespace qtoolkit::engine {
namespace {

using kernels::Random;

std::vector<float> images(int64_t count, int64_t size, uint64_t seed = 5) {
  return Random(seed).reals(count * 3 * size * size, -2.0f, 2.0f);
}

std::vector<Outside> example(int64_t count, int64_t size) {
  return {{shape_of({count, 3, size, size}), Type::float32, true}};
}

// Each image alone, on one thread.
std::vector<float> one_by_one(Plan& plan, const std::vector<float>& x, int64_t count,
                              int64_t size) {
  const int64_t pixels = 3 * size * size;
  std::vector<float> logits, maps;
  for (int64_t i = 0; i < count; ++i) {
    const std::vector<float> image(x.begin() + i * pixels, x.begin() + (i + 1) * pixels);
    const std::vector<float> result = run_plan(plan, image, 1, 3, size, 1);
    logits.insert(logits.end(), result.begin(), result.begin() + 10);
    maps.insert(maps.end(), result.begin() + 10, result.end());
  }
  logits.insert(logits.end(), maps.begin(), maps.end());
  return logits;
}

TEST(Plan, OutputsVary) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const std::vector<float> result = run_plan(plan, images(1, 33), 1, 3, 33, 1);
  ASSERT_EQ(result.size(), 10 + 24 * 9 * 9);
  EXPECT_GT(*std::max_element(result.begin(), result.begin() + 10),
            *std::min_element(result.begin(), result.begin() + 10));
  std::vector<float> map(result.begin() + 10, result.end());
  std::sort(map.begin(), map.end());
  EXPECT_GT(std::unique(map.begin(), map.end()) - map.begin(), 30);
}

// A step whose value is known: 1 x 1, weight 1, so the codes of the input come out.
TEST(Plan, ComputesWhatTheStepsSay) {
  Builder b;
  const int64_t q = b.quantize(0, {0.5f, 10});
  ProgramData data = b.data({b.dequantize(q)});
  Plan plan(data);
  const std::vector<float> x = {0.0f, 0.5f, 0.76f, -4.9f, -100.0f, 1000.0f, 0.25f, 0.75f};
  const std::vector<float> expected = {0.0f, 0.5f, 1.0f, -5.0f, -5.0f, 122.5f, 0.0f, 1.0f};
  EXPECT_EQ(run_plan(plan, x, 2, 1, 2, 1), expected);
}

TEST(Plan, EveryTeamAndBatchGivesTheBitsOfSingleImages) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  for (const int64_t size : {33, 20}) {
    for (const int64_t count : {1, 2, 5}) {
      const std::vector<float> x = images(count, size);
      const std::vector<float> expected = one_by_one(plan, x, count, size);
      for (const int64_t threads : {1, 2, 3, 7}) {
        EXPECT_EQ(run_plan(plan, x, count, 3, size, threads), expected)
            << count << " images of " << size << " on " << threads;
      }
    }
  }
}

TEST(Plan, ASmallNetworkTakesOneThread) {
  Plan plan(small_network());
  int64_t most = 0;
  const Team counting = [&](int64_t threads, const std::function<void(int64_t, int64_t)>& body) {
    most = std::max(most, threads);
    run_threads(threads, body);
  };
  const std::vector<float> x = images(1, 16);
  std::vector<float> logits(10), map(24 * 4 * 4);
  const void* const data[] = {x.data()};
  void* const outputs[] = {logits.data(), map.data()};
  plan.run(example(1, 16), data, outputs, 16, counting);
  EXPECT_EQ(most, 1);
  Plan eager(small_network(), /*work_of_thread=*/1);
  eager.run(example(1, 16), data, outputs, 16, counting);
  EXPECT_EQ(most, 16);
}

TEST(Plan, EveryPathGivesTheBitsOfTheReference) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const std::vector<float> x = images(2, 33);
  std::vector<float> expected;
  for (const kernels::Path path : kernels::all_paths()) {
    if (!kernels::supported(path)) continue;
    kernels::force_path(path);
    const std::vector<float> result = run_plan(plan, x, 2, 3, 33, 1);
    kernels::force_path(std::nullopt);
    if (path == kernels::Path::reference) expected = result;
    EXPECT_EQ(result, expected) << kernels::name(path);
  }
}

TEST(Plan, TuningChangesNoBitsAndIsSaved) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const std::vector<float> x = images(5, 33);
  const std::vector<float> expected = one_by_one(plan, x, 5, 33);
  for (const int64_t threads : {1, 2}) {
    plan.tune(example(5, 33), threads, run_threads);
    EXPECT_EQ(run_plan(plan, x, 5, 3, 33, threads), expected);
  }
  const ProgramData saved = plan.data();
  EXPECT_EQ(saved.cpu, cpu_name());
  EXPECT_GE(saved.tuning.size(), 4);
  Plan again(saved, 1);
  EXPECT_EQ(run_plan(again, x, 5, 3, 33, 2), expected);
  EXPECT_EQ(again.data().tuning.size(), saved.tuning.size());
  // On another CPU the same sizes are tuned again.
  ProgramData moved = saved;
  moved.cpu = "another";
  Plan other(moved, 1);
  EXPECT_EQ(run_plan(other, x, 5, 3, 33, 2), expected);
}

TEST(Plan, EveryChoiceOfEveryStepGivesTheSameBits) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const std::vector<float> x = images(1, 65);
  const std::vector<float> expected = run_plan(plan, x, 1, 3, 65, 1);
  plan.tune(example(1, 65), 1, run_threads);
  ProgramData data = plan.data();
  int64_t tried = 0;
  for (TuningData& tuning : data.tuning) {
    if (tuning.choices.size() != data.steps.size()) continue;
    for (int64_t choice = 0; choice < 12; ++choice) {
      // Those of steps with fewer choices are out of range.
      for (size_t i = 0; i < tuning.choices.size(); ++i) {
        const int64_t before = tuning.choices[i];
        tuning.choices[i] = choice;
        try {
          Plan other(data);
          EXPECT_EQ(run_plan(other, x, 1, 3, 65, 1), expected);
          ++tried;
        } catch (const std::invalid_argument& error) {
          EXPECT_NE(std::string(error.what()).find("tuning"), std::string::npos) << error.what();
        }
        tuning.choices[i] = before;
      }
    }
  }
  EXPECT_GT(tried, 20);
}

TEST(Plan, DataGivesTheWeightsBack) {
  const ProgramData before = small_network();
  Plan plan(small_network(), /*work_of_thread=*/1);
  const ProgramData after = plan.data();
  ASSERT_EQ(after.steps.size(), before.steps.size());
  for (size_t i = 0; i < before.steps.size(); ++i) {
    EXPECT_EQ(after.steps[i].kind, before.steps[i].kind);
    EXPECT_EQ(after.steps[i].integers, before.steps[i].integers);
    ASSERT_EQ(after.steps[i].constants.size(), before.steps[i].constants.size());
    for (const auto& [name, constant] : before.steps[i].constants) {
      const Constant& other = after.steps[i].constants.at(name);
      ASSERT_EQ(other.shape, constant.shape);
      EXPECT_EQ(std::memcmp(other.data.get(), constant.data.get(),
                            static_cast<size_t>(constant.elements() * bytes_of(constant.dtype))),
                0)
          << before.steps[i].name << " " << name;
    }
  }
}

TEST(Plan, KeepsABoundedNumberOfSizes) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const std::vector<float> expected = run_plan(plan, images(1, 16), 1, 3, 16, 1);
  for (int64_t size = 16; size < 40; ++size) run_plan(plan, images(1, size), 1, 3, size, 1);
  EXPECT_LE(plan.instances(), Plan::kMostInstances);
  EXPECT_EQ(run_plan(plan, images(1, 16), 1, 3, 16, 1), expected);
}

// The seconds that a test which many threads run takes; longer under a sanitizer, by hand.
double seconds() {
  const char* const text = std::getenv("QTOOLKIT_STRESS_SECONDS");
  return text == nullptr ? 0.3 : std::atof(text);
}

TEST(Plan, ManyThreadsRunOneAtOnce) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  struct Case {
    std::vector<float> x, expected;
    int64_t count, size;
  };
  std::vector<Case> cases;
  for (const int64_t count : {1, 3}) {
    for (const int64_t size : {16, 24, 33}) {
      Case one{images(count, size, 9 + count), {}, count, size};
      one.expected = one_by_one(plan, one.x, count, size);
      cases.push_back(one);
    }
  }
  std::atomic<int64_t> wrong{0}, runs{0};
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds());
  run_threads(8, [&](int64_t thread, int64_t) {
    for (size_t i = static_cast<size_t>(thread); std::chrono::steady_clock::now() < end; ++i) {
      const Case& one = cases[i % cases.size()];
      const int64_t threads = 1 + thread % 2;
      wrong += run_plan(plan, one.x, one.count, 3, one.size, threads) != one.expected;
      ++runs;
      if (thread == 0 && i % 50 == 0) plan.tune(example(one.count, one.size), 1, run_threads);
    }
  });
  EXPECT_EQ(wrong, 0);
  EXPECT_GT(runs, 8);
}

TEST(Plan, ReportNamesEveryStep) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const PlanReport report = plan.report(example(1, 33), 1, run_threads, /*profile=*/true);
  ASSERT_EQ(report.steps.size(), small_network().steps.size());
  EXPECT_EQ(report.steps[1].kind, "conv2d");
  EXPECT_EQ(report.steps[1].multiplications, 17 * 17 * 16 * 27);
  EXPECT_EQ(report.steps[1].shape.sizes(), (std::vector<int64_t>{1, 16, 17, 17}));
  for (const StepReport& step : report.steps) EXPECT_GE(step.milliseconds, 0) << step.name;
  EXPECT_GT(report.arena_bytes, 3 * 33 * 33);
  EXPECT_GT(report.packed_bytes, 40 * 24 * 25);
}

// --- what is refused
// -------------------------------------------------------------------------------

template <class Change>
std::string refusal(const Change& change) {
  ProgramData data = small_network();
  change(data);
  try {
    Plan plan(data);
    run_plan(plan, images(1, 33), 1, 3, 33, 1);
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "accepted";
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST(PlanErrors, SayWhatIsWrongAndWhere) {
  const auto check = [](const std::string& text, const std::string& part) {
    EXPECT_TRUE(contains(text, part)) << text;
  };
  check(refusal([](ProgramData& d) { d.version = 2; }), "version 2");
  check(refusal([](ProgramData& d) { d.steps[3].kind = "conv9d"; }), "no step 'conv9d'");
  check(refusal([](ProgramData& d) { d.steps[3].inputs = {99}; }), "reads the value 99");
  check(refusal([](ProgramData& d) { d.steps[3].inputs = {4}; }), "reads the value 4");
  check(refusal([](ProgramData& d) { d.steps[3].inputs = {-1}; }), "reads the value -1");
  check(refusal([](ProgramData& d) { d.steps[3].inputs = {}; }), "has no input");
  check(refusal([](ProgramData& d) { d.steps[3].integers["groups"] = {0}; }),
        "step 'conv' (conv2d): 'groups'");
  check(refusal([](ProgramData& d) { d.steps[3].integers["stride"] = {1}; }), "'stride'");
  check(refusal([](ProgramData& d) { d.steps[3].integers.erase("padding"); }), "'padding'");
  check(refusal([](ProgramData& d) { d.steps[3].integers["new"] = {1}; }), "'new'");
  check(refusal([](ProgramData& d) { d.steps[3].constants.erase("weight"); }), "'weight'");
  check(refusal([](ProgramData& d) {
          d.steps[3].constants["weight"].shape = {24, 16, 3};
        }),
        "'weight'");
  check(refusal([](ProgramData& d) { d.steps[3].integers["input_zero_point"] = {1}; }),
        "not that of the value");
  check(refusal([](ProgramData& d) { d.steps[5].constants["table"].shape = {255}; }), "256");
  check(refusal([](ProgramData& d) { d.steps[5].constants["table"].dtype = DType::int8; }),
        "'table' has the wrong type");
  check(refusal([](ProgramData& d) { d.outputs = {0}; }), "no step computes the output");
  check(refusal([](ProgramData& d) { d.outputs = {5, 5}; }), "twice");
  check(refusal([](ProgramData& d) { d.outputs = {}; }), "needs an output");
  check(refusal([](ProgramData& d) {
          d.tuning = {{{0, 1, 4, 1, 33, 33, 3, 1}, {1, 2, 3}}}, d.cpu = cpu_name();
        }),
        "tuning");
}

TEST(PlanErrors, ShapesThatDoNotFit) {
  Plan plan(small_network(), /*work_of_thread=*/1);
  const auto outputs = [&](const std::vector<int64_t>& sizes) {
    const std::vector<Outside> inputs = {{shape_of(sizes), Type::float32, true}};
    return plan.outputs(inputs);
  };
  EXPECT_THROW(outputs({1, 4, 33, 33}), std::invalid_argument);
  EXPECT_THROW(outputs({1, 3}), std::invalid_argument);
  EXPECT_THROW(outputs({1, 3, 0, 33}), std::invalid_argument);
  EXPECT_THROW(outputs({1, 3, int64_t{1} << 40, int64_t{1} << 40}), std::invalid_argument);
  EXPECT_EQ(outputs({0, 3, 33, 33})[0].shape.sizes(), (std::vector<int64_t>{0, 10}));
  EXPECT_THROW(plan.outputs({}), std::invalid_argument);
}

// Any change of a plan's numbers is refused or runs: under a sanitizer, without reading or writing
// what is not its own.
TEST(PlanErrors, DamagedPlansAreRefusedOrRun) {
  Random random(3);
  int64_t refused = 0, ran = 0;
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds());
  while (std::chrono::steady_clock::now() < end) {
    ProgramData data = small_network();
    const int64_t interesting[] = {-1,
                                   0,
                                   1,
                                   2,
                                   3,
                                   7,
                                   127,
                                   128,
                                   255,
                                   256,
                                   1000,
                                   1 << 24,
                                   int64_t{1} << 31,
                                   int64_t{1} << 40,
                                   INT64_MAX,
                                   INT64_MIN};
    for (int64_t changes = random.integer(1, 3); changes > 0; --changes) {
      StepData& step = data.steps[static_cast<size_t>(
          random.integer(0, static_cast<int64_t>(data.steps.size()) - 1))];
      const int64_t value = interesting[random.integer(0, 15)];
      const int64_t what = random.integer(0, 4);
      if (what == 0) {
        step.inputs[static_cast<size_t>(
            random.integer(0, static_cast<int64_t>(step.inputs.size()) - 1))] = value;
      } else if (what == 1 && !step.integers.empty()) {
        auto at = step.integers.begin();
        std::advance(at, random.integer(0, static_cast<int64_t>(step.integers.size()) - 1));
        at->second[static_cast<size_t>(
            random.integer(0, static_cast<int64_t>(at->second.size()) - 1))] = value;
      } else if (what == 2 && !step.constants.empty()) {
        auto at = step.constants.begin();
        std::advance(at, random.integer(0, static_cast<int64_t>(step.constants.size()) - 1));
        // Never more elements than there are.
        if (!at->second.shape.empty()) at->second.shape[0] = random.integer(-1, 3);
      } else if (what == 3) {
        data.outputs[0] = random.integer(0, 12);
      } else {
        const size_t other =
            static_cast<size_t>(random.integer(0, static_cast<int64_t>(data.steps.size()) - 1));
        std::swap(step, data.steps[other]);
      }
    }
    try {
      Plan plan(data);
      run_plan(plan, images(1, 17), 1, 3, 17, 1);
      ++ran;
    } catch (const std::invalid_argument&) {
      ++refused;
    } catch (const std::bad_alloc&) {
      ++refused;
    }
  }
  EXPECT_GT(refused, 10);
  EXPECT_GT(ran, 0);
}

}  // namespace
}  // namespace qtoolkit::engine
