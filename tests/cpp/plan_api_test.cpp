// include/qtoolkit/plan.h: the engine's bits through the public interface, alone and by many.
#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <thread>

#include "engine/plan_file.h"
#include "engine/thread_pool.h"
#include "engine_programs.h"
#include "qtoolkit/plan.h"

namespace qtoolkit {
namespace {

using Results = std::vector<float>;

std::vector<TensorInfo> shapes(int64_t images, int64_t size) {
  return {{DType::float32, {images, 3, size, size}}};
}

std::vector<float> pixels(int64_t images, int64_t size) {
  return kernels::Random(7).reals(images * 3 * size * size, -2.0f, 2.0f);
}

Plan load() {
  const std::vector<uint8_t> bytes = engine::plan_bytes(engine::small_network());
  return Plan::from_bytes(bytes.data(), bytes.size());
}

Results run(const Plan& plan, int64_t images, int64_t size, ThreadPool* pool = nullptr) {
  const std::vector<TensorInfo> inputs = shapes(images, size);
  const std::vector<float> x = pixels(images, size);
  const std::vector<TensorInfo> outputs = plan.outputs(inputs);
  Results logits(outputs[0].elements()), map(outputs[1].elements());
  if (pool == nullptr) {
    plan.run(inputs, {x.data()}, {logits.data(), map.data()});
  } else {
    plan.run(inputs, {x.data()}, {logits.data(), map.data()}, *pool);
  }
  logits.insert(logits.end(), map.begin(), map.end());
  return logits;
}

Results expected(int64_t images, int64_t size) {
  engine::Plan plan(engine::small_network());
  return engine::run_plan(plan, pixels(images, size), images, 3, size, 1);
}

template <class Call>
std::string error_of(const Call& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    return error.what();
  }
  return "no error";
}

TEST(PlanApi, DescribesInputsAndOutputs) {
  const Plan plan = load();
  ASSERT_EQ(plan.inputs().size(), 1u);
  EXPECT_EQ(plan.inputs()[0].dtype, DType::float32);
  EXPECT_EQ(plan.inputs()[0].rank, 4);
  const std::vector<TensorInfo> outputs = plan.outputs(shapes(2, 33));
  ASSERT_EQ(outputs.size(), 2u);
  EXPECT_EQ(outputs[0].shape, (std::vector<int64_t>{2, 10}));
  EXPECT_EQ(outputs[1].shape, (std::vector<int64_t>{2, 24, 9, 9}));
  EXPECT_EQ(outputs[1].layout, Layout::contiguous);
  EXPECT_EQ(outputs[1].bytes(), size_t{2 * 24 * 9 * 9 * 4});
}

TEST(PlanApi, GivesTheEnginesBitsOnEveryPool) {
  Plan plan = load();
  const Results single = expected(1, 65), batch = expected(5, 20);
  EXPECT_EQ(run(plan, 1, 65), single);
  for (const int threads : {1, 2, 3, 6}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (int round = 0; round < 3; ++round) {
      EXPECT_EQ(run(plan, 1, 65, &pool), single) << threads;
      EXPECT_EQ(run(plan, 5, 20, &pool), batch) << threads;
    }
    plan.tune(shapes(5, 20), pool);
    EXPECT_EQ(run(plan, 5, 20, &pool), batch) << threads;
  }
}

TEST(PlanApi, ChannelsLastInputsGiveTheSameBits) {
  const Plan plan = load();
  std::vector<TensorInfo> inputs = shapes(1, 17);
  inputs[0].layout = Layout::channels_last;
  const std::vector<float> planar = pixels(1, 17);
  std::vector<float> x(planar.size());
  for (size_t i = 0; i < 17 * 17; ++i) {
    for (size_t c = 0; c < 3; ++c) x[3 * i + c] = planar[c * 17 * 17 + i];
  }
  const std::vector<TensorInfo> outputs = plan.outputs(inputs);
  Results logits(outputs[0].elements()), map(outputs[1].elements());
  plan.run(inputs, {x.data()}, {logits.data(), map.data()});
  logits.insert(logits.end(), map.begin(), map.end());
  EXPECT_EQ(logits, expected(1, 17));
}

TEST(PlanApi, AnEmptyBatchGivesNothing) { EXPECT_TRUE(run(load(), 0, 17).empty()); }

TEST(PlanApi, ManyThreadsShareAPlanWithAndWithoutPools) {
  const Plan plan = load();
  const Results single = expected(1, 33), batch = expected(3, 16);
  ThreadPool shared(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> clients;
  for (int client = 0; client < 6; ++client) {
    clients.emplace_back([&, client] {
      ThreadPool own(2);
      ThreadPool* const pools[] = {nullptr, &shared, &own};
      for (int round = 0; round < 5; ++round) {
        ThreadPool* const pool = pools[(client + round) % 3];
        wrong += run(plan, 1, 33, pool) != single;
        wrong += run(plan, 3, 16, pool) != batch;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  EXPECT_EQ(wrong, 0);
}

TEST(PlanApi, SavesWhatItLoadedAndItsTuning) {
  Plan plan = load();
  plan.tune(shapes(2, 16));
  const std::string path =
      std::filesystem::path(testing::TempDir()) / "qtoolkit_plan_api_test.qtplan";
  plan.save(path);
  const engine::ProgramData saved = engine::read_plan_file(path);
  EXPECT_FALSE(saved.tuning.empty());
  EXPECT_EQ(saved.cpu, engine::cpu_name());
  plan = Plan(path);
  std::filesystem::remove(path);
  EXPECT_EQ(run(plan, 2, 16), expected(2, 16));
}

TEST(PlanApi, ErrorsSayWhatIsWrong) {
  const Plan plan = load();
  std::vector<float> x(3 * 17 * 17), y(10), map(24 * 25);
  const auto check = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  check(error_of([&] { plan.outputs({}); }), "takes 1 inputs, got 0");
  check(error_of([&] {
          plan.outputs({{DType::uint8, {1, 3, 17, 17}}});
        }),
        "input 0 must be float32, got uint8");
  check(error_of([&] {
          plan.outputs({{DType::float32, {3, 17, 17}}});
        }),
        "input 0 must have 4 dimensions, got 3");
  check(error_of([&] {
          plan.outputs({{DType::float32, {1, 4, 17, 17}}});
        }),
        "step 'conv' (conv2d): takes 3 channels, got 4");
  check(error_of([&] { plan.outputs({{DType::float32, {-1, 3, 17, 17}}}); }), "negative");
  check(error_of([&] { plan.run(shapes(1, 17), {x.data()}, {y.data()}); }),
        "gives 2 tensors; got pointers to 1 and 1");
  check(error_of([&] { plan.run(shapes(1, 17), {x.data()}, {y.data(), nullptr}); }), "null");
  check(error_of([] { ThreadPool pool(0); }), "needs one at least");
  check(error_of([] { Plan::from_bytes("QTPLAN", 6); }), "no plan file");
  EXPECT_THROW(Plan("/nowhere/model.qtplan"), std::runtime_error);
}

// Small networks take one thread of a pool unless they are told to take more.
TEST(PlanApi, APoolIsATeam) {
  engine::Plan plan(engine::small_network(), /*work_of_thread=*/1);
  engine::WorkerPool pool(3);
  const engine::Team team = [&](int64_t threads, const auto& body) { pool.run(threads, body); };
  const std::vector<engine::Outside> inputs = {
      {engine::shape_of({1, 3, 33, 33}), engine::Type::float32, true}};
  const std::vector<float> x = pixels(1, 33);
  const Results wanted = expected(1, 33);
  for (int round = 0; round < 50; ++round) {
    Results found(wanted.size());
    plan.run(inputs, std::vector<const void*>{x.data()},
             std::vector<void*>{found.data(), found.data() + 10}, 3, team);
    EXPECT_EQ(found, wanted);
  }
}

TEST(PlanApi, APoolThrowsWhatABodyThrowsAndGoesOn) {
  engine::WorkerPool pool(4);
  for (int round = 0; round < 20; ++round) {
    EXPECT_THROW(pool.run(4,
                          [](int64_t thread, int64_t) {
                            if (thread == 2) throw std::runtime_error("thread 2");
                          }),
                 std::runtime_error);
    std::atomic<int64_t> sum{0};
    pool.run(3, [&](int64_t thread, int64_t threads) { sum += 10 * threads + thread; });
    EXPECT_EQ(sum, 3 * 30 + 0 + 1 + 2);
  }
}

}  // namespace
}  // namespace qtoolkit
