// Plain structs between ops and kernels: pointers, sizes, strides in elements, enums. No torch.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

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

// The stages on one side of `linear`, over M rows of `width` features. `A`: float; double for fp64.
template <class A>
struct Program {
  const std::vector<Stage>* stages = nullptr;
  const Recipe* recipe = nullptr;
  int64_t M = 0, width = 0;
  Rows input;                      // x before linear, x @ weight.T after it
  const A* bias = nullptr;         // (width) or null: added to the input first
  Rows residual;                   // what `add` adds; features beyond its own count as 0
  bool residual_is_input = false;  // `add` adds this program's own input (an `add` before linear)
  const A* gamma = nullptr;        // (width) or null: 1
  const A* beta = nullptr;         // (width) or null: 0
  const A* gate = nullptr;         // (1) or (width)
  const A* mean = nullptr;         // (width), batch norm
  const A* rstd = nullptr;         // (width), batch norm
  uint64_t seed = 0;
  int64_t sample_rows = 1;
};

template <class A>
struct Backward {
  Program<A> program;
  Rows dy;    // (M, width)
  Rows skip;  // (M, skip.features), added to dinput times skip_scale; data may be null
  double skip_scale = 1;
  Rows dinput;          // written where data is not null
  Rows dresidual;       // written where data is not null
  A* dgamma = nullptr;  // column sums, each (width) or null
  A* dbeta = nullptr;
  A* dgate = nullptr;
  A* dbias = nullptr;   // column sums of dinput
  A* dh_sum = nullptr;  // batch statistics only: sum over rows of dh, and of dh * c
  A* dhc_sum = nullptr;
};

}  // namespace fusedres
