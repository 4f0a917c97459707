// The ops fusedres::residual_forward and fusedres::residual_backward on CPU tensors.
//
//   y = epilogue(prologue(x) @ weight.T + bias)
//
// By passes over blocks of rows (cpu/kernels.h), with the product in them; where the weight is too
// large for that, the library multiplies the whole matrix between two passes.
//
// This file, cuda_ops.cpp and their headers alone know torch, through its stable ABI: one binary
// loads on every torch from 2.11 on.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <algorithm>
#include <new>
#include <tuple>

#include "gradients.h"

namespace fusedres {
namespace {

// ---- forward

template <class A>
constexpr ScalarType kExact = std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float;

bool own_product(const Call& c, bool backward) {
  return cpu::own_product(c.M(), c.N(), c.K(), dtype_of(c.weight), backward);
}

// y, and what backward needs if `save`: see Saved.
template <class A>
std::vector<Tensor> forward(const Call& c, bool save) {
  const Recipe& r = c.recipe;
  const Layer layer(c);
  const int64_t M = c.M();
  const bool own = own_product(c, false), keeps_z = save && r.saves_z();
  const bool early = c.bias && bias_in_product(dtype_of(c.weight));
  Optional stats, operand, z;
  const auto keep_statistics = [&](const Side<A>& side) {
    stats = empty({2, side.program.width}, kExact<A>);
    A* data = static_cast<A*>(stats->data_ptr());
    std::copy(side.mean.begin(), side.mean.end(), data);
    std::copy(side.var.begin(), side.var.end(), data + side.program.width);
  };

  cpu::Forward<A> pass;
  pass.product = layer.product;
  pass.x = layer.x;
  std::optional<Side<A>> before, after;
  if (!r.prologue.empty()) {
    before.emplace(layer, true, layer.x);
    pass.before = &before->program;
    if (before->batch_norm) {
      run(pass, M, *before);
      keep_statistics(*before);
    }
  } else if (c.casts() && (save || !own)) {
    operand =
        own ? empty({M, c.K()}, c.product_dtype()) : torch::stable::to(c.x, c.product_dtype());
    if (own) pass.operand = rows_of(*operand);
  }

  std::optional<PackedMatrix<A>> weight;
  std::vector<A> bias;
  const bool batch = r.batch_stats && !r.epilogue.empty() && !c.in_prologue(Stage::norm);
  if (own) {
    weight.emplace(rows_of(adjacent_columns(c.weight)), c.N(), true);
    pass.weight = weight->packed;
    if (early) pass.early_bias = values(layer.bias, c.N(), bias);
    if (keeps_z || batch) z = empty({M, c.N()}, c.product_dtype());
    if (z) pass.z = rows_of(*z);
  } else {
    const Tensor left = before ? make_operand(layer, before) : operand ? *operand : c.x;
    z = multiply(left, transposed(c.weight), early ? c.bias : std::nullopt);
    pass.before = nullptr;
    pass.x = rows_of(*z);
  }

  Tensor y = z ? *z : c.x;
  if (!r.epilogue.empty() || (c.bias && !early)) {
    after.emplace(layer, false, rows_of(y));
    pass.after = &after->program;
    if (after->batch_norm) {
      run(pass, M, *after);
      keep_statistics(*after);
      pass = {.after = pass.after, .product = pass.product, .x = rows_of(*z)};
    }
  }
  if (own || after || type_of(y) != c.y_dtype()) {
    const bool over_z = !own && !keeps_z && type_of(y) == c.y_dtype();  // row by row
    if (!over_z) y = empty({M, c.N()}, c.y_dtype());
    pass.y = rows_of(y);
    run(pass, M);
  }
  std::vector<Tensor> out = {y};
  if (keeps_z) out.push_back(*z);
  if (stats) out.push_back(*stats);
  if (save && c.casts()) out.push_back(*operand);
  return out;
}

void residual_forward(StableIValue* stack) {
  const Call c(stack, false);
  const bool save = to<bool>(stack[Call::kMore]);
  stack[0] = from(c.product_dtype() == ScalarType::Double ? forward<double>(c, save)
                                                          : forward<float>(c, save));
}

// ---- backward

template <class A>
std::vector<Tensor> backward(const Call& c, const Tensor& dy, const Saved& saved, int64_t needs) {
  // Rows of z are read before those of dz are written.
  const bool over_z = saved.z && (needs >> kOverZ & 1) != 0;
  const Recipe& r = c.recipe;
  const Tensor& x = c.x;
  const Layer layer(c);
  const int64_t M = c.M();
  const ScalarType product = c.product_dtype();
  const bool own = own_product(c, true);
  Gradients<A> grads{layer, needs};
  const auto wants = [&](Input input) { return grads.wants(input); };
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
    grads.of[kResidual] = empty({M, c.residual->size(1)}, *c.residual);
  Optional skip;
  if (skip_to_x) skip = last ? dy : empty({M, std::min(c.K(), c.N())}, x);
  const Optional dresidual = skip_to_x && !last ? skip : grads.of[kResidual];

  const bool before = !r.prologue.empty();
  const bool prologue_residual = before && c.in_prologue(Stage::add) && wants(kResidual);
  const bool want_operand = wants(kX) || prologue_residual ||
                            (before && (wants(kNormWeight) || wants(kNormBias) || wants(kGate)));
  const bool want_dz = want_operand || wants(kWeight);

  // dy -> back through the epilogue -> dz -> @ weight -> back through the prologue -> dx: in one pass
  // where the product is ours, but for a batch norm's sums, which need all rows.
  BackwardPass<A> pass, rest;
  pass.pass.product = rest.pass.product = dtype_of(c.weight);
  pass.pass.dy = rows_of(dy);
  std::optional<Side<A>> after, prologue;
  std::vector<A> of_norm;  // the sums that the norm's gradient needs
  const auto set_norm_sums = [&](cpu::Walk<A>& walk, const cpu::Walk<A>& tail) {
    const int64_t C = tail.program.width;
    of_norm.assign(tail.dbeta, tail.dbeta + C);
    of_norm.insert(of_norm.end(), tail.dgamma, tail.dgamma + C);
    walk.dh_sum = of_norm.data();
    walk.dhc_sum = of_norm.data() + C;
  };

  const bool changes = !r.epilogue.empty() || type_of(dy) != product;
  Tensor dz = dy;
  Optional dh;
  if (changes || wants(kBias)) {
    after.emplace(layer, false, rows_of(saved.z ? *saved.z : dy));
    load_statistics(*after);
    const auto before_norm = [&](Stage stage) {
      const auto& stages = r.epilogue;
      return std::find(stages.begin(), stages.begin() + after->norm(), stage) !=
             stages.begin() + after->norm();
    };
    const bool batch = after->batch_norm;
    const bool all = want_dz || wants(kBias) || (dresidual && before_norm(Stage::add)) ||
                     (wants(kGate) && before_norm(Stage::gate));  // what lies before the norm
    if (batch ? all : want_dz && changes && (wants(kWeight) || !own))
      dz = over_z ? *saved.z : empty({M, c.N()}, product);
    const bool stored = dz.get() != dy.get();
    pass.after = grads.walk(*after, false, 0, batch ? after->norm() + 1 : r.epilogue.size());
    if (dresidual && adds_after) pass.after->dresidual = rows_of(*dresidual);
    if (batch) {  // dh lies where dz will, if that rounds no more
      BackwardPass<A> tail;
      tail.pass = pass.pass;
      tail.after = grads.walk_to_batch_norm(*after, false);
      tail.after->dresidual = pass.after->dresidual;
      if (all) {
        dh = product == kExact<A> && !over_z ? dz : empty({M, c.N()}, kExact<A>);
        pass.pass.dy = tail.pass.dz = rows_of(*dh);
      }
      tail.run(M);
      grads.take(tail.after, false);
      set_norm_sums(*pass.after, *tail.after);
      if (!all) pass.after.reset();
    }
    if (stored) pass.pass.dz = rows_of(dz);
  }

  if (before && want_dz) {
    prologue.emplace(layer, true, layer.x);
    load_statistics(*prologue);
  }
  if (!want_operand) {
    if (pass.after) pass.run(M);
  } else {
    const bool batch = prologue && prologue->batch_norm, at_once = own && !batch;
    std::optional<PackedMatrix<A>> weight;
    if (own) {
      weight.emplace(rows_of(adjacent_columns(c.weight)), c.N(), false);
      pass.pass.weight = weight->packed;
    }
    Optional doperand;
    if (!at_once) {
      if (own) {
        doperand = empty({M, c.K()}, product);
        pass.pass.dx = rows_of(*doperand);
      }
      if (own || pass.after) pass.run(M);
      if (!own) doperand = multiply(dz, c.weight);
      rest.pass.dy = rows_of(*doperand);
    }
    BackwardPass<A>& end = at_once ? pass : rest;
    if (prologue) {
      // dh lies where doperand did, as after `linear`; an `add` would have to send back twice.
      const bool keeps_dh = batch && product == kExact<A> && !c.in_prologue(Stage::add);
      const size_t stages = keeps_dh ? prologue->norm() + 1 : r.prologue.size();
      end.before = grads.walk(*prologue, true, 0, stages);
      if (prologue_residual) end.before->dresidual = rows_of(*grads.of[kResidual]);
      if (batch) {
        BackwardPass<A> tail;
        tail.pass = rest.pass;
        tail.before = grads.walk_to_batch_norm(*prologue, true);
        if (keeps_dh && r.prologue.size() > stages) tail.pass.dx = rest.pass.dy;
        tail.run(M);
        grads.take(tail.before, true);
        set_norm_sums(*end.before, *tail.before);
      }
    }
    if (skip) {
      end.pass.skip = rows_of(*skip);
      end.pass.skip.features = c.K();
      end.pass.skip_scale = last ? r.residual_scale : 1.0;
    }
    if (wants(kX)) {
      // What is read row by row may be written over.
      const Optional read = doperand ? doperand : over_z ? dh : Optional();
      const bool fits = read && type_of(x) == type_of(*read) && read->size(1) == c.K();
      grads.of[kX] = fits ? *read : empty({M, c.K()}, x);
      end.pass.dx = rows_of(*grads.of[kX]);
    }
    if (at_once || prologue || skip || c.casts()) end.run(M);
    grads.take(end.before, true);
  }
  grads.take(pass.after, false);
  dh.reset();
  skip.reset();

  if (wants(kWeight)) {
    const Tensor operand = prologue        ? make_operand(layer, prologue)
                           : saved.operand ? *saved.operand
                                           : x;
    if (own) {
      grads.of[kWeight] = empty({c.N(), c.K()}, product);
      weight_gradient<A>(rows_of(dz), rows_of(operand), M, rows_of(*grads.of[kWeight]));
    } else {
      grads.of[kWeight] = multiply(transposed(dz), operand);
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
    STD_TORCH_CHECK(saved.stats->is_cpu() && saved.stats->is_contiguous() &&
                        saved.stats->numel() == 2 * c.width(Stage::norm) &&
                        type_of(*saved.stats) == (wide ? ScalarType::Double : ScalarType::Float),
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
