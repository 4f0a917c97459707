// Plain structs between ops and kernels: pointers, sizes, strides in elements, enums. No torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// For element maths in headers. Files that are compiled for several instruction sets include them,
// so that no function of theirs may stand by itself: the linker would keep one for all.
#define FUSEDRES_INLINE inline __attribute__((always_inline))

namespace fusedres {

enum class Stage { norm, act, linear, gate, dropout, droppath, add };
enum class Norm { none, layer, rms, batch };
enum class Act {
  none,
  relu,
  leaky_relu,
  relu2,
  relu6,
  elu,
  selu,
  gelu,
  gelu_tanh,
  silu,
  mish,
  softplus,
  hardswish,
  hardsigmoid,
  sigmoid,
  tanh,
  sin,
  softsign,
};
enum class DType { float32, bfloat16, float16, float64 };

// One layer's recipe: what fusedres/spec.py writes with str(spec), read once per text.
struct Recipe {
  std::vector<Stage> prologue, epilogue;
  Norm norm = Norm::none;
  Act act = Act::none;
  bool scalar_gate = false;
  bool batch_stats = false;
  std::optional<DType> x_dtype, residual_dtype, y_dtype;  // where they are not weight's
  double eps = 1e-5, dropout = 0, drop_path = 0, residual_scale = 1;

  bool has(Stage stage) const;
  bool saves_residual() const;  // a stage after `add` needs its sum
  bool saves_z() const;         // backward needs z: a stage after linear needs the value it acts on
};

// The recipe of `text`, which lives as long as the process. Throws std::invalid_argument.
const Recipe& recipe(const std::string& text);

// Whether a stage's backward needs the value it acted on.
inline bool needs_input(Stage stage) {
  return stage == Stage::norm || stage == Stage::act || stage == Stage::gate;
}

// Dropout with probability p: an element is kept if its random word is not below this, and scaled.
inline uint64_t drop_threshold(double p) { return static_cast<uint64_t>(p * 0x1p32); }
inline double keep_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

// Rows of a matrix whose columns are adjacent: element (m, n) is at data[m * stride + n].
struct Rows {
  void* data = nullptr;
  int64_t stride = 0;
  int64_t features = 0;
  DType dtype = DType::float32;
};

}  // namespace fusedres
