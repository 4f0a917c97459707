// The ops fusedres::residual_forward and fusedres::residual_backward on CPU tensors.
//
//   z = prologue(x) @ weight.T        vendor library; saved for backward
//   y = epilogue(z + bias)            cpu/forward.cpp, one pass; but for fp32, z has the bias
//
// This file, cuda_ops.cpp and their headers alone know torch, through its stable ABI: one binary
// loads on every torch from 2.11 on.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <algorithm>
#include <new>
#include <tuple>

#include "side.h"

namespace fusedres {
namespace {

// ---- forward

// y, and what backward needs if `save`: see Saved.
template <class A>
std::vector<Tensor> forward(const Call& c, bool save) {
  const Recipe& r = c.recipe;
  const ScalarType exact = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;
  Optional stats;
  const auto keep_statistics = [&](const Side<A>& side) {
    if (!side.batch_norm) return;
    stats = empty({2, side.program.width}, exact);
    A* data = static_cast<A*>(stats->data_ptr());
    std::copy(side.mean.begin(), side.mean.end(), data);
    std::copy(side.var.begin(), side.var.end(), data + side.program.width);
  };

  Tensor operand = c.x;
  if (!r.prologue.empty()) {
    Side<A> side(c, true, c.x);
    operand = side.forward(c.product_dtype());
    keep_statistics(side);
  } else if (c.casts()) {
    operand = torch::stable::to(c.x, c.product_dtype());
  }
  const bool early = bias_in_product(dtype_of(c.weight));
  const Tensor z = multiply(operand, transposed(c.weight), early ? c.bias : std::nullopt);
  std::vector<Tensor> out = {z};
  if (!r.epilogue.empty() || (c.bias && !early) || z.scalar_type() != c.y_dtype()) {
    Side<A> side(c, false, z);
    out[0] = side.forward(c.y_dtype());
    keep_statistics(side);
  }
  if (save && r.saves_z()) out.push_back(z);
  if (stats) out.push_back(*stats);
  if (save && c.casts()) out.push_back(operand);
  return out;
}

// An op, whose scratch may find no memory either.
template <void (*op)(StableIValue*)>
void told(StableIValue* stack, uint64_t, uint64_t) {
  try {
    op(stack);
  } catch (const std::bad_alloc& error) {
    STD_TORCH_CHECK(false, kNoMemory, error.what());
  }
}

void residual_forward(StableIValue* stack) {
  const Call c(stack, false);
  const bool save = to<bool>(stack[Call::kMore]);
  stack[0] = from(c.product_dtype() == ScalarType::Double ? forward<double>(c, save)
                                                          : forward<float>(c, save));
}

// ---- backward

template <class A>
struct Gradients {
  Optional of[kInputs];
};

// Backward through one side: column sums wanted of it go to `grads`; returns its input's gradient.
template <class A>
Optional backward_side(const Call& c, Side<A>& side, const Tensor& dy, int64_t needs,
                       std::optional<ScalarType> input_dtype, bool want_bias, const Rows& skip,
                       double skip_scale, const Optional& dresidual, Gradients<A>& grads) {
  const Recipe& r = c.recipe;
  Program<A>& p = side.program;
  const int64_t C = p.width;
  const Chunks chunks(p.M, C);
  const auto wants = [&](Input input, Stage stage) {
    const auto& stages = *p.stages;
    return (needs >> input & 1) && std::find(stages.begin(), stages.end(), stage) != stages.end();
  };
  Backward<A> b;
  b.program = p;
  b.dy = rows_of(dy);
  b.skip = skip;
  b.skip_scale = skip_scale;

  std::vector<A> norm_sums;
  if (side.batch_norm) {
    norm_sums = column_sums<A>(chunks, 2, C, [&](A* sums, int64_t begin, int64_t end) {
      cpu::norm_gradient_sums(b, sums, sums + C, begin, end);
    });
    b.dh_sum = norm_sums.data();
    b.dhc_sum = norm_sums.data() + C;
    if (wants(kNormWeight, Stage::norm))
      grads.of[kNormWeight] = vector_like(b.dhc_sum, C, *c.norm_weight);
    if (wants(kNormBias, Stage::norm)) grads.of[kNormBias] = vector_like(b.dh_sum, C, *c.norm_bias);
  }

  const bool want_norm = !side.batch_norm;
  const bool want[4] = {want_norm && wants(kNormWeight, Stage::norm),
                        want_norm && wants(kNormBias, Stage::norm), wants(kGate, Stage::gate),
                        want_bias};
  Optional dinput;
  if (input_dtype) {
    dinput = empty({p.M, C}, *input_dtype);
    b.dinput = rows_of(*dinput);
  }
  if (dresidual && c.recipe.has(Stage::add)) b.dresidual = rows_of(*dresidual);
  const int64_t vectors = want[0] + want[1] + want[2] + want[3];
  const std::vector<A> sums =
      column_sums<A>(chunks, vectors, C, [&](A* partial, int64_t begin, int64_t end) {
        Backward<A> mine = b;
        A** targets[4] = {&mine.dgamma, &mine.dbeta, &mine.dgate, &mine.dbias};
        for (int i = 0; i < 4; ++i)
          if (want[i]) {
            *targets[i] = partial;
            partial += C;
          }
        cpu::backward_rows(mine, begin, end);
      });
  const A* next = sums.data();
  const auto take = [&](const Tensor& like) {
    const Tensor t = vector_like(next, C, like);
    next += C;
    return t;
  };
  if (want[0]) grads.of[kNormWeight] = take(*c.norm_weight);
  if (want[1]) grads.of[kNormBias] = take(*c.norm_bias);
  if (want[2]) {
    if (r.scalar_gate) {
      A total = 0;
      for (int64_t n = 0; n < C; ++n) total += next[n];
      grads.of[kGate] = vector_like(&total, 1, *c.gate);
      next += C;
    } else {
      grads.of[kGate] = take(*c.gate);
    }
  }
  if (want[3]) grads.of[kBias] = take(c.bias ? *c.bias : c.weight);
  return dinput;
}

template <class A>
std::vector<Tensor> backward(const Call& c, const Tensor& dy, const Saved& saved, int64_t needs) {
  const Recipe& r = c.recipe;
  const Tensor& x = c.x;
  const auto wants = [&](Input input) { return (needs >> input & 1) != 0; };
  Gradients<A> grads;
  const auto load_statistics = [&](Side<A>& side) {
    if (!side.batch_norm) return;
    const A* data = static_cast<const A*>(saved.stats->data_ptr());
    const int64_t C = side.program.width;
    side.set_statistics({data, data + C}, {data + C, data + 2 * C});
  };

  // The skip: `add` sends s * d to the residual. Where the residual is x and `add` comes last, that
  // is s * dy itself.
  const bool adds_after = r.has(Stage::add) && !c.in_prologue(Stage::add);
  const bool skip_to_x = adds_after && !c.residual && wants(kX);
  const bool last = adds_after && r.epilogue.back() == Stage::add;
  if (c.residual && wants(kResidual))
    grads.of[kResidual] = empty({c.M(), c.residual->size(1)}, *c.residual);
  Optional skip;
  if (skip_to_x) skip = last ? dy : empty({c.M(), std::min(c.K(), c.N())}, x);
  const Optional dresidual = skip_to_x && !last ? skip : grads.of[kResidual];

  const bool before = !r.prologue.empty();
  const bool want_operand =
      wants(kX) || (before && (wants(kNormWeight) || wants(kNormBias) || wants(kGate)));
  const bool prologue_residual = before && c.in_prologue(Stage::add);
  const bool want_dz = want_operand || wants(kWeight) || (prologue_residual && wants(kResidual));

  const ScalarType product = c.product_dtype();
  Tensor dz = dy;  // an empty epilogue's dz
  const bool changes = !r.epilogue.empty() || dy.scalar_type() != product;
  if (changes || wants(kBias)) {
    Side<A> side(c, false, saved.z ? *saved.z : dy);
    load_statistics(side);
    const auto dtype = want_dz && changes ? std::optional(product) : std::nullopt;
    const Optional d = backward_side(c, side, dy, needs, dtype, wants(kBias), Rows{}, 1.0,
                                     prologue_residual ? Optional() : dresidual, grads);
    if (d) dz = *d;
  }

  std::optional<Side<A>> prologue;
  if (before && (wants(kWeight) || want_operand || (prologue_residual && wants(kResidual)))) {
    prologue.emplace(c, true, x);
    load_statistics(*prologue);
  }
  if (wants(kWeight)) {
    Tensor operand = saved.operand ? *saved.operand : x;
    if (before) {
      Side<A> side(c, true, x);  // the operand is recomputed, with the statistics of forward
      load_statistics(side);
      side.batch_norm = false;
      operand = side.forward(product);
    }
    grads.of[kWeight] = multiply(transposed(dz), operand);
  }
  if (want_operand || (prologue_residual && wants(kResidual))) {
    Tensor doperand = multiply(dz, c.weight);
    const Rows skip_rows = skip ? Rows{skip->data_ptr(), skip->stride(0),
                                       std::min(skip->size(1), c.K()), dtype_of(*skip)}
                                : Rows{};
    const double scale = last ? r.residual_scale : 1.0;
    if (before) {
      const auto dtype = wants(kX) ? std::optional(x.scalar_type()) : std::nullopt;
      grads.of[kX] = backward_side(c, *prologue, doperand, needs, dtype, false, skip_rows, scale,
                                   prologue_residual ? grads.of[kResidual] : Optional(), grads);
    } else {
      grads.of[kX] = doperand;
      if (c.casts()) grads.of[kX] = empty({c.M(), c.K()}, x);
      if (skip ||
          c.casts()) {  // dx = doperand + scale * skip, in place where it may be: dx is ours
        static const std::vector<Stage> none;
        Backward<A> b;
        b.program.stages = &none;
        b.program.recipe = &r;
        b.program.M = c.M();
        b.program.width = c.K();
        b.dy = rows_of(doperand);
        b.dinput = rows_of(*grads.of[kX]);
        b.skip = skip_rows;
        b.skip_scale = scale;
        for_each_chunk(Chunks(c.M(), c.K()), [&](int64_t, int64_t begin, int64_t end) {
          cpu::backward_rows(b, begin, end);
        });
      }
    }
  }
  std::vector<Tensor> out;
  for (int i = 0; i < kInputs; ++i)
    if (needs >> i & 1) {
      STD_TORCH_CHECK(grads.of[i].has_value(), "fusedres: the gradient of input ", i,
                      " was asked for, but there is none");
      out.push_back(*grads.of[i]);
    }
  return out;
}

void residual_backward(StableIValue* stack) {
  const Tensor dy = adjacent_columns(to<Tensor>(stack[0]));
  const std::vector<Tensor> kept = to<std::vector<Tensor>>(stack[1]);
  StableIValue* operands = stack + Call::kBefore;
  const int64_t needs = to<int64_t>(operands[Call::kMore]);
  const Call c(operands, false, needs);
  const Saved saved(c, kept, c.recipe.batch_stats);
  check_matrix("dy", dy, c.M(), c.N(), c.x);
  const bool wide = c.product_dtype() == ScalarType::Double;
  if (saved.stats)
    STD_TORCH_CHECK(
        saved.stats->is_cpu() && saved.stats->is_contiguous() &&
            saved.stats->numel() == 2 * c.width(Stage::norm) &&
            saved.stats->scalar_type() == (wide ? ScalarType::Double : ScalarType::Float),
        "fusedres: stats has shape ", shape_text(*saved.stats), ", expected (2, ",
        c.width(Stage::norm), ")");
  stack[0] =
      from(wide ? backward<double>(c, dy, saved, needs) : backward<float>(c, dy, saved, needs));
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY(fusedres, m) {
  m.def(fusedres::forward_schema("residual_forward").c_str());
  m.def(fusedres::backward_schema("residual_backward").c_str());
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("residual_forward", &fusedres::told<fusedres::residual_forward>);
  m.impl("residual_backward", &fusedres::told<fusedres::residual_backward>);
}
