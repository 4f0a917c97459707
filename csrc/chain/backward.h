// Backward: the steps of each link from the last one on, then the weight gradients.
#pragma once

#include "chain/forward.h"
#include "chain/results.h"

namespace fusedres {

// One link's passes, from dy to dz and dx. Those of `tail` go back to a norm by batch statistics, one
// after or before `linear`, for the sums over all rows that its gradient needs; `rest` goes on from
// one before `linear`.
template <class A>
struct LinkBackward {
  std::optional<Side<A>> before, after;
  Gradients<A> grads;
  BackwardPass<A> walk;
  std::unique_ptr<BackwardPass<A>> tail_after, tail_before, rest;
  std::vector<A> of_norm;
  const Rows dy;

  // For those that have memory; dh and doperand are for the tails.
  LinkBackward(const Layer& c, int64_t needs, const Rows& z, const Rows& dy, const Rows& dz,
               const Rows& dx, const Rows& dh, const Rows& doperand, const A* statistics)
      : grads{c, needs}, dy(dy) {
    const Recipe& r = c.recipe;
    cpu::Backward<A>& pass = walk.pass;
    pass.product = c.product;
    pass.dy = dy;
    pass.dz = dz;
    pass.dx = dx;
    if (!r.epilogue.empty() || grads.wants(kBias)) {
      after.emplace(c, false, z);
      const bool batch = load(*after, statistics);
      walk.after = grads.walk(*after, false, 0, batch ? after->norm() + 1 : r.epilogue.size());
      if (batch) {
        tail_after = part({.product = c.product, .dy = dy, .dz = dh});
        tail_after->after = grads.walk_to_batch_norm(*after, false);
        pass.dy = dh;
      }
    }
    if (r.prologue.empty()) return;
    before.emplace(c, true, c.x);
    const bool batch = load(*before, statistics);
    const cpu::Walk<A> back = grads.walk(*before, true, 0, r.prologue.size());
    if (!batch) {
      walk.before = back;
      return;
    }
    tail_before = part({.product = c.product, .dy = doperand});
    tail_before->before = grads.walk_to_batch_norm(*before, true);
    rest = part({.product = c.product, .dy = doperand, .dx = dx});
    rest->before = back;
    pass.dx = doperand;
  }

  bool multiplies() const { return walk.pass.dx.data || walk.before; }
  cpu::Backward<A>& last() { return rest ? rest->pass : walk.pass; }  // whose dx is the link's

  // What other links send to its input, times `scale`.
  void receive(const Rows& skip, double scale) {
    if (!last().dx.data) return;
    last().skip = skip;
    last().skip_scale = scale;
  }
  // What its `add` sends back goes to `memory`,
  void send_to(const Rows& memory) {
    walk.after->dresidual = memory;
    if (tail_after) tail_after->after->dresidual = memory;
  }
  // or to the first reader of what it adds: by `memory` where stages follow the `add`.
  void send_to(LinkBackward& reader, const Rows& memory) {
    const Recipe& r = grads.c.recipe;
    if (!reader.last().dx.data) return;
    if (r.epilogue.back() == Stage::add) {
      Rows skip = dy;
      skip.features = memory.features;
      return reader.receive(skip, r.residual_scale);
    }
    send_to(memory);
    reader.receive(memory, 1);
  }

  // `after_all`, if it is there: once dz is.
  void append_to(std::vector<Step>& steps, const PackedWeights<A>& weights, int64_t l,
                 const Chunks& chunks, const std::function<void()>& after_all) {
    const auto through = [&](BackwardPass<A>& pass) {
      pass.prepare(chunks.count);
      return Step{[&pass](int64_t chunk, int64_t begin, int64_t end) {
        pass.run_chunk(chunk, begin, end);
      }};
    };
    const auto up_to_norm = [&](BackwardPass<A>& tail, std::optional<cpu::Walk<A>>& from,
                                std::optional<cpu::Walk<A>>& then) {
      Step step = through(tail);
      step.after = [this, &tail, &from, &then, count = chunks.count] {
        tail.finish(count);
        const int64_t C = from->program.width;
        of_norm.assign(from->dbeta, from->dbeta + C);
        of_norm.insert(of_norm.end(), from->dgamma, from->dgamma + C);
        then->dh_sum = of_norm.data();
        then->dhc_sum = of_norm.data() + C;
      };
      return step;
    };
    if (tail_after) steps.push_back(up_to_norm(*tail_after, tail_after->after, walk.after));
    if (weights.fit() && multiplies()) walk.pass.weight = weights[l];
    Step& main = steps.emplace_back(through(walk));
    main.after = after_all;
    if (!weights.fit() && multiplies()) pack_alone<A>(main, walk.pass, grads.c, false);
    if (!rest) return;
    steps.push_back(up_to_norm(*tail_before, tail_before->before, rest->before));
    steps.push_back(through(*rest));
  }

  // Once all rows are done.
  void take(const Chunks& chunks) {
    for (auto* tail : {&tail_after, &tail_before})
      if (*tail) grads.take((*tail)->after, false), grads.take((*tail)->before, true);
    for (BackwardPass<A>* pass : {&walk, rest.get()}) {
      if (!pass) continue;
      pass->finish(chunks.count);
      grads.take(pass->after, false);
      grads.take(pass->before, true);
    }
  }

 private:
  static std::unique_ptr<BackwardPass<A>> part(const cpu::Backward<A>& pass) {
    auto made = std::make_unique<BackwardPass<A>>();
    made->pass = pass;
    return made;
  }

  // Whether the side's norm goes by batch statistics, which it then knows.
  static bool load(Side<A>& side, const A* statistics) {
    if (side.batch_norm) {
      const int64_t C = side.program.width;
      side.set_statistics({statistics, statistics + C}, {statistics + C, statistics + 2 * C});
    }
    return side.batch_norm;
  }
};

// What the weight's gradient is of: dz.T @ this.
template <class A>
Rows right_side(const LinkBackward<A>& link, Optional& memory) {
  const Layer& c = link.grads.c;
  if (!link.before && c.x.dtype == c.product) return c.x;
  return rows_of(memory.emplace(make_operand(c, link.before)));
}

// All links' dz.T @ x: side by side where there are enough of them and few rows, else one by one.
template <class A, class Dz>
void weight_gradients(const Chain& chain, const std::deque<LinkBackward<A>>& links, const Dz& dz,
                      const GradientsOf& results) {
  constexpr int64_t kFewRows = 1024, kManyLinks = 8, kLargest = 1 << 18;
  const cpu::Kernels<A>& kernels = cpu::kernels<A>();
  std::deque<Optional> memory;
  std::vector<cpu::WeightGradient<A>> together;
  for (int64_t l = 0; l < chain.size(); ++l) {
    const Layer& c = chain.links[l];
    if (!links[l].grads.wants(kWeight)) continue;
    const Rows x = right_side(links[l], memory.emplace_back());
    if (c.N * c.K > kLargest || chain.M >= kFewRows || chain.size() < kManyLinks) {
      weight_gradient<A>(dz(l), x, chain.M, results.weight(l));
      memory.pop_back();
      continue;
    }
    cpu::WeightGradient<A>& g = together.emplace_back();
    g.dz = dz(l);
    g.x = x;
    g.product = c.product;
    g.dweight = results.weight(l);
  }
  const int64_t cost = chain.M * chain.links[0].N * chain.links[0].K / 16;
  in_shares(static_cast<int64_t>(together.size()), cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.weight_gradient(together[i], 0, chain.M, 0, together[i].dz.features);
  });
}

// What forward kept, in the links' Rows.
struct Kept {
  Store values, casts, z;
  bool again;  // z was not kept
  const Tensor* statistics = nullptr;

  Kept(Chain& chain, const std::vector<Tensor>& saved, DType exact)
      : values(chain.M, chain.values()), casts(chain.M, chain.casts()), z(chain.M, chain.z()) {
    const size_t has_statistics = chain.statistics() ? 1 : 0;
    again = saved.size() == values.pieces() + casts.pieces() + has_statistics && z.pieces() > 0;
    size_t next = casts.adopt(saved, values.adopt(saved, 0));
    if (!again) next = z.adopt(saved, next);
    if (has_statistics && next < saved.size()) statistics = &saved[next++];
    STD_TORCH_CHECK(next == saved.size(), "fusedres: a chain's backward got ", saved.size(),
                    " saved tensors, expected ", next);
    STD_TORCH_CHECK(
        !has_statistics || (statistics && statistics->is_cpu() && statistics->is_contiguous() &&
                            statistics->numel() == chain.statistics() &&
                            type_of(*statistics) == scalar_type(exact)),
        "fusedres: the saved batch statistics do not fit, expected ", chain.statistics(),
        " elements");
    std::vector<Rows> rows;
    for (int64_t v = 0; v < chain.size(); ++v) rows.push_back(values[v]);
    chain.connect(rows);
    for (int64_t l = 1; l < chain.size(); ++l) {  // what the product took, for what was cast
      Layer& c = chain.links[l];
      if (!c.casts) continue;
      if (!chain.wiring.adds_another(l)) c.residual = c.x;
      c.x = casts[l];
    }
  }
};

// The gradients of x and of all operands, those that `wanted` has a '1' for. `saved`: what forward
// kept; without z it is computed again, straight before it is needed. `over_z`: nobody will look at
// z again, so dz may lie there.
template <class A>
std::vector<Tensor> chain_backward(Chain& chain, const Tensor& dy, const std::vector<Tensor>& saved,
                                   const std::string& wanted, bool over_z) {
  const int64_t M = chain.M, L = chain.size(), W = chain.widest;
  const Wiring& wiring = chain.wiring;
  const Kept kept(chain, saved, exact<A>());
  const A* const statistics =
      kept.statistics ? static_cast<const A*>(kept.statistics->data_ptr()) : nullptr;

  Optional dx;
  if (wanted.at(0) == '1') dx = empty({M, chain.links[0].K}, scalar_type(chain.dtype(0)));
  // In one region every link's dz is kept for the weight gradients; else these follow at once, as
  // they do where memory is what counts.
  const PackedWeights<A> weights(chain, false, kept.again);
  const bool together = weights.fit();
  const Turns gradient_turns = wiring.gradient_turns(), skip_turns = wiring.skip_turns();
  const int64_t batch = statistics ? W : 0;
  const auto lies_over_z = [&](int64_t l) {
    return over_z && !kept.again && chain.links[l].recipe.saves_z();
  };
  std::vector<Width> widths = together ? chain.outputs() : std::vector<Width>{{0, chain.product()}};
  for (int64_t l = 0; l < L; ++l)
    if (together && lies_over_z(l))
      widths[l].columns = 0;
    else if (!together && !lies_over_z(l))
      widths[0].columns = W;
  Store all_dz(M, widths);
  Store gradients(M, chain.any(gradient_turns.count));  // of values
  Store skips(M, chain.any(skip_turns.count));          // what links send to first readers besides
  Store z_again(M, {{kept.again ? W : 0, chain.product()}});
  Store dh(M, {{batch, exact<A>()}}), doperand(M, {{batch, chain.product()}});
  for (Store* store : {&all_dz, &gradients, &skips, &z_again, &dh, &doperand}) store->allocate();
  const auto dz = [&](int64_t l) {
    if (lies_over_z(l)) return kept.z[l];
    return together ? all_dz[l] : all_dz.first(0, chain.links[l].N, chain.product());
  };
  const auto gradient = [&](int64_t v) {
    if (v == L) return rows_of(dy);
    if (v > 0) return gradients.first(gradient_turns.of[v], chain.width(v), chain.dtype(v));
    return dx ? rows_of(*dx) : Rows();
  };
  const auto skip = [&](int64_t l, int64_t v) {
    return skips.first(skip_turns.of[l], chain.width(v), chain.dtype(v));
  };

  const GradientsOf results(chain, wanted);
  std::deque<LinkBackward<A>> links;
  std::deque<std::optional<LinkForward<A>>> replays(L);
  for (int64_t l = 0; l < L; ++l) {
    const Layer& c = chain.links[l];
    const int64_t from = wiring.from[l], adds = wiring.adds[l];
    const int64_t needs = results.needs(l) | (from > 0 || dx ? 1 << kX : 0);
    const bool first = wiring.reader[from] == l;
    const Rows to = first || !(needs & 1 << kX) ? gradient(from) : skip(l, from);
    Rows z = dz(l);  // whose values nobody reads
    if (c.recipe.saves_z()) z = kept.again ? z_again.first(0, c.N, c.product) : kept.z[l];
    links.emplace_back(c, needs, z, gradient(l + 1), dz(l), to, dh.first(0, c.N, exact<A>()),
                       doperand.first(0, c.K, c.product),
                       statistics + (statistics ? chain.statistics(l) : 0));
    if (kept.again && c.recipe.saves_z()) {
      replays[l].emplace(c, Rows(), z, Rows());
      if (links[l].before && links[l].before->batch_norm)
        replays[l]->pass.before = &links[l].before->program;
    }
    results.place(l, links[l].grads.into);
    if (!first) links[wiring.reader[from]].receive(to, 1);
    if (adds < 0 || c.in_prologue(Stage::add)) continue;
    if (wiring.reader[adds] < 0)
      links[l].send_to(gradient(adds));
    else
      links[l].send_to(links[wiring.reader[adds]], skip(l, adds));
  }

  std::optional<PackedWeights<A>> forward_weights;
  if (kept.again) forward_weights.emplace(chain, true, true);
  const Chunks chunks = chunks_of<A>(chain);
  std::vector<Step> steps;
  steps.reserve(2 * L);
  for (int64_t l = L - 1; l >= 0; --l) {
    LinkBackward<A>& link = links[l];
    if (replays[l]) replays[l]->append_to(steps, *forward_weights, l, chunks, nullptr);
    std::function<void()> after_all;
    if (!together)
      after_all = [&, l] {
        Optional memory;
        if (links[l].grads.wants(kWeight))
          weight_gradient<A>(dz(l), right_side(links[l], memory), M, results.weight(l));
      };
    link.append_to(steps, weights, l, chunks, after_all);
  }
  run(steps, chunks);
  if (together) weight_gradients<A>(chain, links, dz, results);
  for (LinkBackward<A>& link : links) link.take(chunks);
  return results.list(dx);
}

}  // namespace fusedres
