// Forward: the steps of each link, and what is kept.
#pragma once

#include "chain/steps.h"

namespace fusedres {

// One link's passes and what they point to.
template <class A>
struct LinkForward {
  const Layer& c;
  std::optional<Side<A>> before, after;
  std::vector<A> bias;
  cpu::Forward<A> pass;
  // Where a norm goes by this batch's statistics: before `linear` a pass over x finds them, after it
  // the main pass does, and the last one goes on from its z.
  std::unique_ptr<cpu::Forward<A>> survey, rest;
  std::optional<Moments<A>> moments;

  // Where operand, z and y are stored, if they have memory. Without y: no further than z.
  LinkForward(const Layer& c, const Rows& operand, const Rows& z, const Rows& y) : c(c) {
    const bool early = c.bias.data && bias_in_product(c.product);
    pass.product = c.product;
    pass.x = c.x;
    pass.operand = operand;
    pass.z = z;
    pass.y = y;
    if (early) pass.early_bias = values(c.bias, c.N, bias);
    if (!c.recipe.prologue.empty()) pass.before = &before.emplace(c, true, c.x).program;
    if (y.data && (!c.recipe.epilogue.empty() || (c.bias.data && !early)))
      pass.after = &after.emplace(c, false, z.data ? z : y).program;
    const auto part = [](const cpu::Forward<A>& pass) {
      return std::make_unique<cpu::Forward<A>>(pass);
    };
    if (before && before->batch_norm)
      survey = part({.before = pass.before, .product = c.product, .x = c.x});
    if (after && after->batch_norm) {
      rest = part({.after = pass.after, .product = c.product, .x = z, .y = y});
      pass.y = {};
    }
  }

  // `statistics`: where those that are found go, mean and biased variance.
  void append_to(std::vector<Step>& steps, const PackedWeights<A>& weights, int64_t l,
                 const Chunks& chunks, A* statistics) {
    const auto through = [](cpu::Forward<A>& pass) {
      return [&pass](int64_t, int64_t begin, int64_t end) {
        cpu::kernels<A>().forward(pass, begin, end, nullptr);
      };
    };
    const auto finding = [&](cpu::Forward<A>& pass, Side<A>& side) {
      moments.emplace(chunks, side.program.width);
      return Step{[this, &pass](int64_t chunk, int64_t begin, int64_t end) {
                    cpu::kernels<A>().forward(pass, begin, end, moments->of(chunk));
                  },
                  {},
                  [this, &side, statistics] {
                    moments->finish(side);
                    std::copy(side.mean.begin(), side.mean.end(), statistics);
                    std::copy(side.var.begin(), side.var.end(), statistics + side.mean.size());
                  }};
    };
    if (survey && statistics) steps.push_back(finding(*survey, *before));
    Step& main = steps.emplace_back(rest ? finding(pass, *after) : Step{through(pass)});
    if (weights.fit())
      pass.weight = weights[l];
    else
      pack_alone<A>(main, pass, c, true);
    if (rest) steps.push_back({through(*rest)});
  }
};

// y and what `keep` says of values 1, 2, ..., or of what they are cast to, and of all z; then
// the batch statistics, if there are any.
template <class A>
std::vector<Tensor> chain_forward(Chain& chain, Keep keep) {
  const int64_t M = chain.M, L = chain.size();
  const bool keeps = keep != Keep::nothing;
  std::vector<Tensor> out{empty({M, chain.links[L - 1].N}, scalar_type(chain.dtype(L)))};
  const Turns turns =
      chain.wiring.value_turns(keeps ? chain.kept : std::vector<bool>(chain.kept.size()));
  const bool keeps_z = keep == Keep::all;
  Store values(M, keeps ? chain.values() : std::vector<Width>()),
      casts(M, keeps ? chain.casts() : std::vector<Width>()),
      z(M, keeps_z ? chain.z() : std::vector<Width>());
  Store passing(M, chain.any(turns.count));  // values that are not kept
  Store passing_z(M, {{chain.statistics() ? chain.widest : 0, chain.product()}});
  passing.allocate();
  values.allocate();
  casts.allocate();
  z.allocate();
  if (!keeps_z) passing_z.allocate();
  std::vector<Rows> rows{Rows()};  // of values
  for (int64_t v = 1; v < L; ++v) {
    const int64_t turn = turns.of[v];
    rows.push_back(turn < 0 ? values[v] : passing.first(turn, chain.width(v), chain.dtype(v)));
  }
  rows.push_back(rows_of(out[0]));
  chain.connect(rows);

  const PackedWeights<A> weights(chain, true, false);
  const Chunks chunks = chunks_of<A>(chain);
  Optional statistics;
  if (chain.statistics()) statistics = empty({chain.statistics()}, scalar_type(exact<A>()));
  std::deque<LinkForward<A>> links;
  std::vector<Step> steps;
  steps.reserve(2 * L);
  for (int64_t l = 0; l < L; ++l) {
    const Layer& c = chain.links[l];
    Rows at;
    if (keeps_z && c.recipe.saves_z()) at = z[l];
    if (!keeps_z && chain.batch(l, false)) at = passing_z.first(0, c.N, c.product);
    links.emplace_back(c, keeps && c.casts && l > 0 ? casts[l] : Rows(), at, rows[l + 1]);
    A* const found = statistics ? static_cast<A*>(statistics->data_ptr()) : nullptr;
    links.back().append_to(steps, weights, l, chunks, found + (found ? chain.statistics(l) : 0));
  }
  run(steps, chunks);
  for (const Store* store : {&values, &casts, &z}) store->append_to(out);
  if (statistics) out.push_back(*statistics);
  return out;
}

}  // namespace fusedres
