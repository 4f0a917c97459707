// What every op gets, and the checks of it. For ops.cpp and cuda_ops.cpp, by torch's stable ABI.
#pragma once

#include <algorithm>
#include <utility>

#include "tensors.h"

namespace fusedres {

enum Input { kX, kWeight, kBias, kNormWeight, kNormBias, kGate, kResidual, kInputs };
// Beside the inputs' bits in `needs`: nobody will look at the saved z again, so dz may lie there.
constexpr int kOverZ = kInputs;

using torch::stable::detail::from;
using torch::stable::detail::to;

// The operands of an op, which are adjacent on the dispatcher's stack: fusedres/operands.py names
// them. Backward's `dy` and `saved` stand before them; the recipe comes next, then one more.
// Each has its own dtype: weight's is the product's. To backward x and residual may come as
// stand-ins, of their shape and dtype but without memory, where it does not look at their values.
struct Call {
  Tensor x, weight;
  Optional bias, norm_weight, norm_bias, gate, residual, running_mean, running_var, seed;
  int64_t sample_rows;
  const Recipe& recipe;
  static constexpr int kRecipe = 11, kMore = kRecipe + 1, kBefore = 2;

  // Takes them off the stack and checks them. `cuda`: what the op is for; `needs`: backward's.
  Call(StableIValue* stack, bool cuda, std::optional<int64_t> needs = std::nullopt);
  // A link of a chain: weight is the first of `operands`, then come those of bias, norm_weight,
  // norm_bias, gate, running_mean and running_var whose bits are set in `there`.
  Call(const Tensor& x, const std::vector<Tensor>& operands, int there, const Optional& residual,
       const Optional& seed, int64_t sample_rows, const Recipe& recipe);
  Call(const Call&) = delete;

  int64_t M() const { return x.size(0); }
  int64_t N() const { return weight.size(0); }
  int64_t K() const { return weight.size(1); }
  bool in_prologue(Stage stage) const {
    return std::find(recipe.prologue.begin(), recipe.prologue.end(), stage) !=
           recipe.prologue.end();
  }
  int64_t width(Stage stage) const { return in_prologue(stage) ? K() : N(); }

  ScalarType product_dtype() const { return type_of(weight); }
  ScalarType y_dtype() const {
    return recipe.y_dtype ? scalar_type(*recipe.y_dtype) : product_dtype();
  }
  // Whether x is cast for the product by itself, which backward then gets instead of x.
  bool casts() const { return recipe.prologue.empty() && type_of(x) != product_dtype(); }

 private:
  bool reads_x(int64_t needs) const {
    return !recipe.prologue.empty() || ((needs >> kWeight & 1) && !casts()) ||
           (recipe.saves_residual() && !residual);
  }
};

// ---- schemas

const std::string kOperands =
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? seed, SymInt sample_rows";

inline std::string forward_schema(const std::string& op) {
  return op + "(" + kOperands + ", str recipe, bool save) -> Tensor[]";
}

inline std::string backward_schema(const std::string& op) {
  return op + "(Tensor dy, Tensor[] saved, " + kOperands + ", str recipe, int needs) -> Tensor[]";
}

// ---- checks: whoever calls the op directly gets an error, not a crash

// What every tensor of a call shares with x.
struct Common {
  std::pair<int32_t, int32_t> device;
  bool float64;
  Common(const Tensor& x)  // NOLINT: so that x itself will do
      : device(device_of(x)), float64(type_of(x) == ScalarType::Double) {}
};

inline bool together(const Tensor& t, const Common& x) { return device_of(t) == x.device; }

inline void check_vector(const char* name, const Optional& t, int64_t size, const Common& x) {
  if (!t) return;
  STD_TORCH_CHECK(together(*t, x) && t->dim() == 1 && t->size(0) == size, "fusedres: ", name,
                  " has shape ", shape_text(*t), ", expected (", size, ",) on x's device");
  dtype_of(*t);
}

inline void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         const Common& x) {
  STD_TORCH_CHECK(together(t, x) && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                  "fusedres: ", name, " has shape ", shape_text(t), ", expected (", rows, ", ",
                  columns, ") on x's device");
  STD_TORCH_CHECK((type_of(t) == ScalarType::Double) == x.float64, "fusedres: of ", name,
                  " and x only one is float64");
  dtype_of(t);
}

inline void check(const Call& c, bool cuda) {
  const Recipe& r = c.recipe;
  STD_TORCH_CHECK((cuda ? c.x.is_cuda() : c.x.is_cpu()) && c.x.dim() == 2, "fusedres: x has shape ",
                  shape_text(c.x), ", expected (M, K) on ", cuda ? "a CUDA device" : "the CPU");
  STD_TORCH_CHECK(c.weight.dim() == 2, "fusedres: weight has shape ", shape_text(c.weight),
                  ", expected (N, K)");
  const Common x(c.x);
  check_matrix("x", c.x, c.x.size(0), c.weight.size(1), x);
  check_matrix("weight", c.weight, c.N(), c.K(), x);
  check_vector("bias", c.bias, c.N(), x);
  STD_TORCH_CHECK(!c.bias || type_of(*c.bias) == c.product_dtype(),
                  "fusedres: bias and weight have different dtypes");
  check_vector("norm_weight", c.norm_weight, c.width(Stage::norm), x);
  check_vector("norm_bias", c.norm_bias, c.width(Stage::norm), x);
  check_vector("running_mean", c.running_mean, c.width(Stage::norm), x);
  check_vector("running_var", c.running_var, c.width(Stage::norm), x);
  check_vector("gate", c.gate, r.scalar_gate ? 1 : c.width(Stage::gate), x);
  STD_TORCH_CHECK(c.gate || !r.has(Stage::gate),
                  "fusedres: the recipe has a gate stage, but gate is None");
  const bool running = r.has(Stage::norm) && r.norm == Norm::batch && !r.batch_stats;
  STD_TORCH_CHECK(!running || (c.running_mean && c.running_var),
                  "fusedres: batch norm without batch statistics needs ",
                  "running_mean and running_var");
  STD_TORCH_CHECK(c.sample_rows > 0, "fusedres: sample_rows must be positive, got ", c.sample_rows);
  if (r.has(Stage::dropout) || r.has(Stage::droppath))
    STD_TORCH_CHECK(c.seed && together(*c.seed, x) && c.seed->numel() == 1 &&
                        type_of(*c.seed) == ScalarType::Long,
                    "fusedres: dropout and drop-path need seed, one int64 on x's device");
  if (c.residual) {
    STD_TORCH_CHECK(c.residual->dim() == 2 && c.residual->size(1) <= c.width(Stage::add),
                    "fusedres: residual has shape ", shape_text(*c.residual), ", expected (", c.M(),
                    ", ", c.width(Stage::add), ")");
    check_matrix("residual", *c.residual, c.M(), c.residual->size(1), x);
  } else {
    STD_TORCH_CHECK(!r.has(Stage::add) || c.K() <= c.width(Stage::add),
                    "fusedres: residual is None, but x has ", c.K(), " features and the sum ",
                    c.width(Stage::add));
  }
}

inline Call::Call(StableIValue* stack, bool cuda, std::optional<int64_t> needs)
    : x(to<Tensor>(stack[0])),
      weight(to<Tensor>(stack[1])),
      bias(to<Optional>(stack[2])),
      norm_weight(to<Optional>(stack[3])),
      norm_bias(to<Optional>(stack[4])),
      gate(to<Optional>(stack[5])),
      residual(to<Optional>(stack[6])),
      running_mean(to<Optional>(stack[7])),
      running_var(to<Optional>(stack[8])),
      seed(to<Optional>(stack[9])),
      sample_rows(to<int64_t>(stack[10])),
      recipe(fusedres::recipe(take_text(to<StringHandle>(stack[kRecipe])))) {
  check(*this, cuda);
  if (!needs || reads_x(*needs)) x = adjacent_columns(x);
  if (residual && (!needs || recipe.saves_residual())) residual = adjacent_columns(*residual);
}

inline Call::Call(const Tensor& x, const std::vector<Tensor>& operands, int there,
                  const Optional& residual, const Optional& seed, int64_t sample_rows,
                  const Recipe& recipe)
    : x(x),
      weight(operands.at(0)),
      residual(residual),
      seed(seed),
      sample_rows(sample_rows),
      recipe(recipe) {
  size_t next = 1;
  Optional* const into[] = {&bias, &norm_weight, &norm_bias, &gate, &running_mean, &running_var};
  for (int i = 0; i < 6; ++i)
    if (there >> i & 1) *into[i] = operands.at(next++);
  check(*this, false);
}

// What forward kept for backward, in this order, each if there is something to keep.
struct Saved {
  Optional z;        // (M, N), product_dtype
  Optional stats;    // of batch norm in training, (2, C); CUDA: of a norm over rows, (2 M)
  Optional operand;  // x (M, K) in product_dtype, where Call::casts

  Saved(const Call& c, const std::vector<Tensor>& saved, bool has_stats) {
    const bool there[] = {c.recipe.saves_z(), has_stats, c.casts()};
    Optional* const into[] = {&z, &stats, &operand};
    size_t next = 0;
    for (int i = 0; i < 3; ++i)
      if (there[i] && next < saved.size()) *into[i] = saved[next++];
    STD_TORCH_CHECK(next == saved.size() && next == size_t(there[0] + there[1] + there[2]),
                    "fusedres: backward got ", saved.size(), " saved tensors, expected ",
                    there[0] + there[1] + there[2]);
    const auto check_kept = [&](const char* name, const Optional& t, int64_t features) {
      if (!t) return;
      check_matrix(name, *t, c.M(), features, c.x);
      STD_TORCH_CHECK(type_of(*t) == c.product_dtype(), "fusedres: ", name,
                      " and weight have different dtypes");
    };
    check_kept("z", z, c.N());
    check_kept("operand", operand, c.K());
    STD_TORCH_CHECK(!z || z->is_contiguous(), "fusedres: z must be contiguous");
  }
};

}  // namespace fusedres
