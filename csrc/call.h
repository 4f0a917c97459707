// What every op gets, in one place, and the checks of it. For ops.cpp and cuda_ops.cpp, through torch's stable ABI.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace fusedres {

enum Input { kX, kWeight, kBias, kNormWeight, kNormBias, kGate, kResidual, kInputs };

using torch::stable::detail::from;
using torch::stable::detail::to;

// The operands of an op, which are adjacent on the dispatcher's stack: fusedres/operands.py names
// them. Backward's `dy`, `z` and `stats` stand before them; the recipe comes next, then one more.
struct Call {
  Tensor x, weight;
  Optional bias, norm_weight, norm_bias, gate, residual, running_mean, running_var, seed;
  int64_t sample_rows;
  const Recipe& recipe;
  static constexpr int kRecipe = 11, kMore = kRecipe + 1;

  // Takes them off the stack and checks them. `cuda`: what the op is for.
  Call(StableIValue* stack, bool cuda);
  Call(const Call&) = delete;

  int64_t M() const { return x.size(0); }
  int64_t N() const { return weight.size(0); }
  int64_t K() const { return weight.size(1); }
  bool in_prologue(Stage stage) const {
    return std::find(recipe.prologue.begin(), recipe.prologue.end(), stage) !=
           recipe.prologue.end();
  }
  int64_t width(Stage stage) const { return in_prologue(stage) ? K() : N(); }
};

// ---- schemas

const std::string kOperands =
    "Tensor x, Tensor weight, Tensor? bias, Tensor? norm_weight, Tensor? norm_bias, Tensor? gate, "
    "Tensor? residual, Tensor? running_mean, Tensor? running_var, Tensor? seed, SymInt sample_rows";

inline std::string forward_schema(const std::string& op) {
  return op + "(" + kOperands + ", str recipe, bool save) -> (Tensor y, Tensor z, Tensor stats)";
}

inline std::string backward_schema(const std::string& op) {
  return op + "(Tensor dy, Tensor z, Tensor stats, " + kOperands +
         ", str recipe, int needs) -> Tensor[]";
}

// ---- checks: whoever calls the op directly gets an error, not a crash

inline bool together(const Tensor& t, const Tensor& x) { return t.device() == x.device(); }

inline void check_vector(const char* name, const Optional& t, int64_t size, const Tensor& x) {
  if (!t) return;
  STD_TORCH_CHECK(together(*t, x) && t->dim() == 1 && t->size(0) == size, "fusedres: ", name,
                  " has shape ", shape_text(*t), ", expected (", size, ",) on x's device");
  dtype_of(*t);
}

inline void check_matrix(const char* name, const Tensor& t, int64_t rows, int64_t columns,
                         const Tensor& x) {
  STD_TORCH_CHECK(together(t, x) && t.dim() == 2 && t.size(0) == rows && t.size(1) == columns,
                  "fusedres: ", name, " has shape ", shape_text(t), ", expected (", rows, ", ",
                  columns, ") on x's device");
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "fusedres: ", name,
                  " and x have different dtypes");
}

inline void check(const Call& c, bool cuda) {
  const Recipe& r = c.recipe;
  STD_TORCH_CHECK((cuda ? c.x.is_cuda() : c.x.is_cpu()) && c.x.dim() == 2, "fusedres: x has shape ",
                  shape_text(c.x), ", expected (M, K) on ", cuda ? "a CUDA device" : "the CPU");
  STD_TORCH_CHECK(c.weight.dim() == 2, "fusedres: weight has shape ", shape_text(c.weight),
                  ", expected (N, K)");
  check_matrix("x", c.x, c.x.size(0), c.weight.size(1), c.x);
  check_matrix("weight", c.weight, c.N(), c.K(), c.x);
  dtype_of(c.x);
  check_vector("bias", c.bias, c.N(), c.x);
  STD_TORCH_CHECK(!c.bias || c.bias->scalar_type() == c.weight.scalar_type(),
                  "fusedres: bias and weight have different dtypes");
  check_vector("norm_weight", c.norm_weight, c.width(Stage::norm), c.x);
  check_vector("norm_bias", c.norm_bias, c.width(Stage::norm), c.x);
  check_vector("running_mean", c.running_mean, c.width(Stage::norm), c.x);
  check_vector("running_var", c.running_var, c.width(Stage::norm), c.x);
  check_vector("gate", c.gate, r.scalar_gate ? 1 : c.width(Stage::gate), c.x);
  STD_TORCH_CHECK(c.gate || !r.has(Stage::gate),
                  "fusedres: the recipe has a gate stage, but gate is None");
  const bool running = r.has(Stage::norm) && r.norm == Norm::batch && !r.batch_stats;
  STD_TORCH_CHECK(!running || (c.running_mean && c.running_var),
                  "fusedres: batch norm without batch statistics needs ",
                  "running_mean and running_var");
  STD_TORCH_CHECK(c.sample_rows > 0, "fusedres: sample_rows must be positive, got ", c.sample_rows);
  if (r.has(Stage::dropout) || r.has(Stage::droppath))
    STD_TORCH_CHECK(c.seed && together(*c.seed, c.x) && c.seed->numel() == 1 &&
                        c.seed->scalar_type() == ScalarType::Long,
                    "fusedres: dropout and drop-path need seed, one int64 on x's device");
  if (c.residual) {
    STD_TORCH_CHECK(c.residual->dim() == 2 && c.residual->size(1) <= c.width(Stage::add),
                    "fusedres: residual has shape ", shape_text(*c.residual), ", expected (", c.M(),
                    ", ", c.width(Stage::add), ")");
    check_matrix("residual", *c.residual, c.M(), c.residual->size(1), c.x);
  } else {
    STD_TORCH_CHECK(!r.has(Stage::add) || c.K() <= c.width(Stage::add),
                    "fusedres: residual is None, but x has ", c.K(), " features and the sum ",
                    c.width(Stage::add));
  }
}

inline Optional adjacent_columns(const Optional& t) {
  return t ? Optional(adjacent_columns(*t)) : std::nullopt;
}

inline Call::Call(StableIValue* stack, bool cuda)
    : x(adjacent_columns(to<Tensor>(stack[0]))),
      weight(to<Tensor>(stack[1])),
      bias(to<Optional>(stack[2])),
      norm_weight(to<Optional>(stack[3])),
      norm_bias(to<Optional>(stack[4])),
      gate(to<Optional>(stack[5])),
      residual(adjacent_columns(to<Optional>(stack[6]))),
      running_mean(to<Optional>(stack[7])),
      running_var(to<Optional>(stack[8])),
      seed(to<Optional>(stack[9])),
      sample_rows(to<int64_t>(stack[10])),
      recipe(fusedres::recipe(take_text(to<StringHandle>(stack[kRecipe])))) {
  check(*this, cuda);
}

// What backward gets before its operands.
struct Saved {
  static constexpr int kCount = 3;
  Tensor dy, z, stats;
  explicit Saved(StableIValue* stack)
      : dy(adjacent_columns(to<Tensor>(stack[0]))),
        z(to<Tensor>(stack[1])),
        stats(to<Tensor>(stack[2])) {}
};

inline void check(const Saved& s, const Call& c) {
  check_matrix("dy", s.dy, c.M(), c.N(), c.x);
  if (!c.recipe.saves_z()) return;
  check_matrix("z", s.z, c.M(), c.N(), c.x);
  STD_TORCH_CHECK(s.z.is_contiguous(), "fusedres: z must be contiguous");
}

}  // namespace fusedres
