// Runs plan files, which hold a whole INT8 network (`qtoolkit.save_plan` writes them), on the CPU.
// C++17; neither PyTorch nor Python is needed. CMake: find_package(qtoolkit COMPONENTS engine) and
// the target qtoolkit::engine.
//
//   const qtoolkit::Plan plan("model.qtplan");
//   const std::vector<qtoolkit::TensorInfo> inputs = {{qtoolkit::DType::float32, {1, 3, 224,
//   224}}}; const std::vector<qtoolkit::TensorInfo> outputs = plan.outputs(inputs);
//   std::vector<float> scores(outputs[0].elements());
//   plan.run(inputs, {image.data()}, {scores.data()});
//
// The results are the bits that the Python model gives, whatever the instruction set and the number
// of threads. QTOOLKIT_MAX_PATH in the environment holds the kernels to an instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#if defined(__GNUC__)
#define QTOOLKIT_API __attribute__((visibility("default")))
#else
#define QTOOLKIT_API
#endif

namespace qtoolkit {

enum class DType : uint8_t { float32, uint8, int8 };

// How a tensor of rank 4 lies in memory: [N, C, H, W] one after the other, or [N, H, W, C].
enum class Layout : uint8_t { contiguous, channels_last };

// A dense tensor without its data: [N, C], [N, L, C] or [N, C, H, W], N being the batch.
struct TensorInfo {
  DType dtype = DType::float32;
  std::vector<int64_t> shape;  // always in the order [N, C, H, W]
  Layout layout = Layout::contiguous;

  size_t elements() const {
    size_t result = 1;
    for (const int64_t size : shape) result *= static_cast<size_t>(size);
    return result;
  }
  size_t bytes() const { return elements() * (dtype == DType::float32 ? 4 : 1); }
};

// What a plan knows of an input before its sizes.
struct InputInfo {
  DType dtype = DType::float32;
  int64_t rank = 4;
};

// Threads that run a plan together. They sleep between runs. A pool serves one run at a time, and
// other runs wait for it.
class QTOOLKIT_API ThreadPool {
 public:
  // The thread that calls run() is one of them. Throws std::invalid_argument unless threads >= 1.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

 private:
  friend class Plan;
  class Workers;
  std::unique_ptr<Workers> workers_;
};

// A network. Any number of threads may call the const members of one plan at the same time; its
// weights are there once.
class QTOOLKIT_API Plan {
 public:
  // Loads a file. Throws std::runtime_error if it cannot be read and std::invalid_argument if it is
  // damaged, or of a newer version; the message says what is wrong. Every length, index and size in
  // it is checked before it is used.
  explicit Plan(const std::string& path);
  // From the contents of a file, of which nothing is kept. Throws std::invalid_argument.
  static Plan from_bytes(const void* bytes, size_t size);
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  const std::vector<InputInfo>& inputs() const;

  // Of these inputs. Throws std::invalid_argument that names the layer which cannot take them.
  std::vector<TensorInfo> outputs(const std::vector<TensorInfo>& inputs) const;

  // Runs the network on the calling thread, or with all threads of a pool (small networks take
  // fewer). `data` are the tensors that `inputs` describe; `results` has memory for
  // outputs(inputs). The first run of a size plans it, later ones find it planned; eight sizes are
  // kept. Throws as outputs() does, and std::bad_alloc.
  void run(const std::vector<TensorInfo>& inputs, const std::vector<const void*>& data,
           const std::vector<void*>& results) const;
  void run(const std::vector<TensorInfo>& inputs, const std::vector<const void*>& data,
           const std::vector<void*>& results, ThreadPool& pool) const;

  // Measures the fastest way to run these sizes on one thread, or with a pool. It is kept with the
  // plan and changes no result. A plan that was tuned in Python for this CPU, size and number of
  // threads needs none.
  void tune(const std::vector<TensorInfo>& inputs);
  void tune(const std::vector<TensorInfo>& inputs, ThreadPool& pool);

  // Writes a plan file, tuning included; an older file there stays whole if that fails. Throws
  // std::runtime_error.
  void save(const std::string& path) const;

 private:
  class State;
  explicit Plan(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

// The instruction-set path of the convolutions: "avx2", "avx512vnni", ... Throws
// std::invalid_argument if QTOOLKIT_MAX_PATH is no path.
QTOOLKIT_API std::string cpu_path();

}  // namespace qtoolkit
