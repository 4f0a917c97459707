// What ops.cpp and chain.cpp share: an op's errors, the prologue's values, one call's gradients.
#pragma once

#include <algorithm>
#include <new>

#include "side.h"

namespace fusedres {

// An op, whose scratch may find no memory either.
template <void (*op)(StableIValue*)>
void told(StableIValue* stack, uint64_t, uint64_t) {
  try {
    op(stack);
  } catch (const std::bad_alloc& error) {
    STD_TORCH_CHECK(false, kNoMemory, error.what());
  }
}

// What the product takes: the prologue's values for `side`, whose statistics are known or, in forward,
// found; without it x, cast.
template <class A>
Tensor make_operand(const Layer& c, const std::optional<Side<A>>& side) {
  Tensor operand = empty({c.M, c.K}, scalar_type(c.product));
  cpu::Forward<A> pass;
  if (side) pass.before = &side->program;
  pass.product = c.product;
  pass.x = c.x;
  pass.operand = rows_of(operand);
  run(pass, c.M);
  return operand;
}

// One layer's gradients, side by side: of its parameter vectors at `into` where that has memory.
template <class A>
struct Gradients {
  const Layer& c;
  const int64_t needs;
  Optional of[kInputs] = {};
  Vector into[kInputs] = {};

  bool wants(Input input) const { return (needs >> input & 1) != 0; }
  bool wants(Input input, Stage stage, bool prologue) const {
    return wants(input) && c.recipe.has(stage) && c.in_prologue(stage) == prologue;
  }

  // Stages [first, last) of `side`, with the sums that are wanted of them.
  cpu::Walk<A> walk(const Side<A>& side, bool prologue, size_t first, size_t last) const {
    const std::vector<Stage>& stages = *side.program.stages;
    const auto holds = [&](Stage stage) {
      const auto begin = stages.begin();
      return std::find(begin + first, begin + last, stage) != begin + last;
    };
    cpu::Walk<A> walk;
    walk.program = side.program;
    walk.first = first;
    walk.last = last;
    A* const wanted = &BackwardPass<A>::wanted;
    if (!side.batch_norm && wants(kNormWeight, Stage::norm, prologue)) walk.dgamma = wanted;
    if (!side.batch_norm && wants(kNormBias, Stage::norm, prologue)) walk.dbeta = wanted;
    if (wants(kGate, Stage::gate, prologue) && holds(Stage::gate)) walk.dgate = wanted;
    if (!prologue && first == 0 && wants(kBias)) walk.dbias = wanted;
    return walk;
  }

  // From stages after a batch norm to the end: the sums over all rows that its gradient needs.
  cpu::Walk<A> walk_to_batch_norm(const Side<A>& side, bool prologue) const {
    cpu::Walk<A> tail = walk(side, prologue, side.norm() + 1, side.program.stages->size());
    tail.dgamma = tail.dbeta = &BackwardPass<A>::wanted;
    return tail;
  }

  // Takes over the sums of a walk that has been run; null: there is none.
  void take(const std::optional<cpu::Walk<A>>& walk, bool prologue) {
    if (!walk) return;
    const int64_t C = walk->program.width;
    const auto put = [&](Input input, Stage stage, const A* sums) {
      if (sums && wants(input, stage, prologue)) store(input, sums, C);
    };
    put(kNormWeight, Stage::norm, walk->dgamma);
    put(kNormBias, Stage::norm, walk->dbeta);
    if (walk->dgate && c.recipe.scalar_gate) {
      A total = 0;
      for (int64_t n = 0; n < C; ++n) total += walk->dgate[n];
      store(kGate, &total, 1);
    } else {
      put(kGate, Stage::gate, walk->dgate);
    }
    if (walk->dbias) store(kBias, walk->dbias, C);
  }

 private:
  void store(Input input, const A* sums, int64_t n) {
    Vector to = into[input];
    if (!to.data) {
      of[input] = empty({n}, scalar_type(dtype(input)));
      to = vector_of(of[input]);
    }
    store_vector(sums, n, to);
  }
  DType dtype(Input input) const {
    if (input == kBias) return c.product;
    return (input == kNormWeight ? c.norm_weight : input == kNormBias ? c.norm_bias : c.gate).dtype;
  }
};

}  // namespace fusedres
