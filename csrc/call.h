// What every op gets, and the checks of it. For ops.cpp and cuda_ops.cpp, through torch's stable ABI.
#pragma once

#include <algorithm>

#include "tensors.h"

namespace fusedres {

enum Input { kX, kWeight, kBias, kNormWeight, kNormBias, kGate, kResidual, kInputs };

// What every call has: see fusedres/autograd.py. The columns of x and residual are adjacent.
struct Call {
  const Tensor &x, &weight;
  const Optional &bias, &norm_weight, &norm_bias, &gate, &residual, &running_mean, &running_var,
      &seed;
  int64_t sample_rows;
  const Recipe& recipe;

  int64_t M() const { return x.size(0); }
  int64_t N() const { return weight.size(0); }
  int64_t K() const { return weight.size(1); }
  bool in_prologue(Stage stage) const {
    return std::find(recipe.prologue.begin(), recipe.prologue.end(), stage) !=
           recipe.prologue.end();
  }
  int64_t width(Stage stage) const { return in_prologue(stage) ? K() : N(); }
};

// ---- checks: whoever calls the op directly gets an error, not a crash

inline bool together(const Tensor& t, const Tensor& x) {
  return t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index();
}

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

// `cuda`: what the op is for.
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

// An op's arguments, checked, and what its Call refers to.
struct Given {
  const Tensor x;
  const Optional residual;
  const Call call;

  Given(const Tensor& x_any, const Tensor& weight, const Optional& bias,
        const Optional& norm_weight, const Optional& norm_bias, const Optional& gate,
        const Optional& residual_any, const Optional& running_mean, const Optional& running_var,
        const Optional& seed, int64_t sample_rows, StringHandle text, bool cuda)
      : x(adjacent_columns(x_any)),
        residual(residual_any ? Optional(adjacent_columns(*residual_any)) : std::nullopt),
        call{x,           weight, bias,        norm_weight,
             norm_bias,   gate,   residual,    running_mean,
             running_var, seed,   sample_rows, recipe(take_text(text))} {
    check(call, cuda);
  }
  Given(const Given&) = delete;  // the call refers to this
};

// What backward gets beside.
inline void check_saved(const Call& c, const Tensor& dy, const Tensor& z) {
  check_matrix("dy", dy, c.M(), c.N(), c.x);
  if (!c.recipe.saves_z()) return;
  check_matrix("z", z, c.M(), c.N(), c.x);
  STD_TORCH_CHECK(z.is_contiguous(), "fusedres: z must be contiguous");
}

}  // namespace fusedres
