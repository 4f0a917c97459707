// The ops fusedres::chain_forward and fusedres::chain_backward: layers one after the other on a CPU.
//
//   x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L
//
// Rows know nothing of each other, so a chunk of them walks through all links in one parallel region
// while it lies in the cache; where the packed weights of all links do not fit one, a region a link.
// Backward walks back in the same way; in one region it keeps each link's dz, and all weight
// gradients are computed side by side. No link has batch statistics.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "chain/results.h"

namespace fusedres {
namespace {

constexpr int64_t kCache = int64_t{1} << 23;  // bytes of packed weights that chunks share

// The weights of all links, packed side by side.
template <class A>
class PackedWeights {
 public:
  PackedWeights(const Chain& chain, bool transposed) {
    for (const Layer& c : chain.links) {
      packed_.push_back({nullptr, transposed ? c.K : c.N, transposed ? c.N : c.K, c.product});
      offsets_.push_back(bytes_);
      bytes_ += (cpu::kernels<A>().packed_bytes(packed_.back()) + 63) / 64 * 64;
    }
    if (!fit()) return;
    memory_.emplace(empty({bytes_ + 64}, ScalarType::Byte));
    const cpu::Kernels<A>& kernels = cpu::kernels<A>();
    in_shares(chain.size(), bytes_ / chain.size() / sizeof(A), [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const int64_t panels = (packed_[l].width + kernels.panel - 1) / kernels.panel;
        kernels.pack(chain.links[l].weight, transposed, (*this)[l], 0, panels);
      }
    });
  }

  bool fit() const { return bytes_ <= kCache; }
  cpu::Packed operator[](int64_t l) const {
    cpu::Packed b = packed_[l];
    b.data = static_cast<char*>(memory_->data_ptr()) + offsets_[l];
    return b;
  }

 private:
  std::vector<cpu::Packed> packed_;
  std::vector<int64_t> offsets_;
  int64_t bytes_ = 0;
  Optional memory_;
};

// ---- forward

// One link's pass and what it points to.
template <class A>
struct LinkForward {
  std::optional<Side<A>> before, after;
  std::vector<A> bias;
  cpu::Forward<A> pass;

  // Where operand, z and y are stored, if they have memory. Without y: no further than z.
  LinkForward(const Layer& c, const Rows& operand, const Rows& z, const Rows& y) {
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
  }
};

// y and what `keep` says of links 1, 2, ...'s inputs, or of what they are cast to, and of all z.
template <class A>
std::vector<Tensor> chain_forward(Chain& chain, Keep keep) {
  const int64_t M = chain.M, L = chain.size();
  const bool keeps = keep != Keep::nothing;
  std::vector<Tensor> out{empty({M, chain.links[L - 1].N}, scalar_type(chain.value(L)))};
  const Turns turns = chain.input_turns(keeps);
  Store inputs(M, chain.inputs()), casts(M, chain.casts()), z(M, chain.z());
  Store passing(M, chain.any(turns.count));  // inputs that are not kept
  passing.allocate();
  if (keeps) inputs.allocate();
  if (keeps) casts.allocate();
  if (keep == Keep::all) z.allocate();
  for (int64_t l = 1; l < L; ++l) {
    Rows& x = chain.links[l].x;
    x = turns.of[l] < 0 ? inputs[l] : passing.first(turns.of[l], chain.links[l].K, x.dtype);
  }
  chain.connect();
  std::deque<LinkForward<A>> links;
  for (int64_t l = 0; l < L; ++l) {
    const Layer& c = chain.links[l];
    links.emplace_back(c, keeps && c.casts && l > 0 ? casts[l] : Rows(),
                       keep == Keep::all && c.recipe.saves_z() ? z[l] : Rows(),
                       l + 1 < L ? chain.links[l + 1].x : rows_of(out[0]));
  }

  const PackedWeights<A> weights(chain, true);
  if (weights.fit()) {
    for (int64_t l = 0; l < L; ++l) links[l].pass.weight = weights[l];
    for_each_chunk(chunks_of<A>(M, chain.widest, links[0].pass.weight),
                   [&](int64_t, int64_t begin, int64_t end) {
                     for (const LinkForward<A>& link : links)
                       cpu::kernels<A>().forward(link.pass, begin, end, nullptr);
                   });
  } else {
    for (int64_t l = 0; l < L; ++l) {
      const PackedMatrix<A> weight(chain.links[l].weight, chain.links[l].N, true);
      links[l].pass.weight = weight.packed;
      run(links[l].pass, M);
    }
  }
  if (keeps) inputs.append_to(out);
  if (keeps) casts.append_to(out);
  if (keep == Keep::all) z.append_to(out);
  return out;
}

void chain_forward_op(StableIValue* stack) {
  const Tensor x = to<Tensor>(stack[0]);
  const std::vector<Tensor> operands = to<std::vector<Tensor>>(stack[1]);
  const std::string text = take_text(to<StringHandle>(stack[2]));
  const int64_t depth = to<int64_t>(stack[3]);
  const Masks masks{to<Optional>(stack[4]), to<int64_t>(stack[5])};
  const Keep keep = keep_of(to<int64_t>(stack[6]));
  Chain chain(x, operands, text, depth, masks);
  stack[0] = from(x.scalar_type() == ScalarType::Double ? chain_forward<double>(chain, keep)
                                                        : chain_forward<float>(chain, keep));
}

// ---- backward

template <class A>
struct LinkBackward {
  std::optional<Side<A>> before, after;
  Gradients<A> grads;
  BackwardPass<A> walk;

  // dy -> dz, dx, for those that have memory.
  LinkBackward(const Layer& c, int64_t needs, const Rows& z, const Rows& dy, const Rows& dz,
               const Rows& dx)
      : grads{c, needs} {
    const Recipe& r = c.recipe;
    cpu::Backward<A>& pass = walk.pass;
    pass.product = c.product;
    pass.dy = dy;
    pass.dz = dz;
    pass.dx = dx;
    if (!r.epilogue.empty() || grads.wants(kBias)) {
      after.emplace(c, false, z);
      walk.after = grads.walk(*after, false, 0, r.epilogue.size());
    }
    if (!r.prologue.empty()) {
      before.emplace(c, true, c.x);
      walk.before = grads.walk(*before, true, 0, r.prologue.size());
    }
  }

  bool multiplies() const { return walk.pass.dx.data || walk.before; }

  // What this link's `add` sends back to `source`, the link whose input it takes: by `memory` where
  // stages follow the `add`.
  void send_back_to(LinkBackward& source, const Rows& memory) {
    const Recipe& r = grads.c.recipe;
    if (!r.has(Stage::add) || grads.c.in_prologue(Stage::add) || !source.walk.pass.dx.data) return;
    const bool last = r.epilogue.back() == Stage::add;
    if (!last) walk.after->dresidual = memory;
    source.walk.pass.skip = last ? walk.pass.dy : memory;
    source.walk.pass.skip.features = memory.features;
    source.walk.pass.skip_scale = last ? r.residual_scale : 1.0;
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
template <class A>
void weight_gradients(const Chain& chain, const std::deque<LinkBackward<A>>& links, const Store& dz,
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
      weight_gradient<A>(dz[l], x, chain.M, results.weight(l));
      memory.pop_back();
      continue;
    }
    cpu::WeightGradient<A>& g = together.emplace_back();
    g.dz = dz[l];
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

// The gradients of x and of all operands, those that `wanted` has a '1' for. `saved`: what forward
// kept; without z it is computed again, straight before it is needed.
template <class A>
std::vector<Tensor> chain_backward(Chain& chain, const Tensor& dy, const std::vector<Tensor>& saved,
                                   const std::string& wanted) {
  const int64_t M = chain.M, L = chain.size(), W = chain.widest;
  Store inputs(M, chain.inputs()), casts(M, chain.casts()), kept_z(M, chain.z());
  const bool again = saved.size() == inputs.pieces() + casts.pieces() && kept_z.pieces() > 0;
  size_t next = casts.adopt(saved, inputs.adopt(saved, 0));
  if (!again) next = kept_z.adopt(saved, next);
  STD_TORCH_CHECK(next == saved.size(), "fusedres: a chain's backward got ", saved.size(),
                  " saved tensors, expected ", next);
  std::vector<DType> values;  // dtypes
  for (int64_t l = 0; l <= L; ++l) values.push_back(chain.value(l));
  const std::vector<Width> any = chain.any(1);
  for (int64_t l = 1; l < L; ++l)
    if (inputs[l].features) chain.links[l].x = inputs[l];
  chain.connect();
  for (int64_t l = 1; l < L; ++l) {  // what the product took, in place of what it was cast from
    Layer& c = chain.links[l];
    if (!c.casts) continue;
    if (!c.residual.data) c.residual = c.x;
    c.x = casts[l];
  }

  Optional dx;
  if (wanted.at(0) == '1') dx = empty({M, chain.links[0].K}, scalar_type(values[0]));
  // In one region every link's dz is kept for the weight gradients; else these follow at once.
  const PackedWeights<A> weights(chain, false);
  const bool fit = weights.fit();
  Store all_dz(M, fit ? chain.outputs() : std::vector<Width>{{W, chain.product()}});
  const Turns gradient_turns = chain.gradient_turns(), skip_turns = chain.skip_turns();
  Store gradients(M, std::vector<Width>(gradient_turns.count, any[0]));  // of the links' inputs
  Store skips(M, std::vector<Width>(skip_turns.count, any[0]));          // what an `add` sends back
  Store z_again(M, {{again ? W : 0, chain.product()}});
  for (Store* store : {&all_dz, &gradients, &skips, &z_again}) store->allocate();
  const auto dz = [&](int64_t l) {
    return fit ? all_dz[l] : all_dz.first(0, chain.links[l].N, chain.product());
  };
  const auto gradient = [&](int64_t l) {  // of what goes into link l
    if (l == L) return rows_of(dy);
    if (l > 0) return gradients.first(gradient_turns.of[L - 1 - l], chain.links[l].K, values[l]);
    return dx ? rows_of(*dx) : Rows();
  };

  const GradientsOf results(chain, wanted);
  std::deque<LinkBackward<A>> links;
  std::deque<std::optional<LinkForward<A>>> replays(L);
  std::optional<PackedWeights<A>> forward_weights;
  if (again && fit) forward_weights.emplace(chain, true);
  for (int64_t l = 0; l < L; ++l) {
    const Layer& c = chain.links[l];
    const int64_t needs = results.needs(l) | (l > 0 || dx ? 1 << kX : 0);
    Rows z = dz(l);  // whose values nobody reads
    if (c.recipe.saves_z()) {
      z = again ? z_again.first(0, c.N, c.product) : kept_z[l];
      if (again) {
        replays[l].emplace(c, Rows(), z, Rows());
        if (fit) replays[l]->pass.weight = (*forward_weights)[l];
      }
    }
    links.emplace_back(c, needs, z, gradient(l + 1), dz(l), gradient(l));
    results.place(l, links[l].grads.into);
    const int64_t source = chain.source(l);
    links[l].send_back_to(links[source], skips.first(skip_turns.of[L - 1 - l],
                                                     chain.links[source].K, values[source]));
  }

  if (fit) {
    for (int64_t l = 0; l < L; ++l)
      if (links[l].multiplies()) links[l].walk.pass.weight = weights[l];
    const Chunks chunks = chunks_of<A>(M, W, weights[L - 1]);
    for (LinkBackward<A>& link : links) link.walk.prepare(chunks.count);
    for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t l = L - 1; l >= 0; --l) {
        if (replays[l]) cpu::kernels<A>().forward(replays[l]->pass, begin, end, nullptr);
        links[l].walk.run_chunk(chunk, begin, end);
      }
    });
    for (LinkBackward<A>& link : links) link.walk.finish(chunks.count);
    weight_gradients<A>(chain, links, all_dz, results);
  } else {
    for (int64_t l = L - 1; l >= 0; --l) {
      const Layer& c = chain.links[l];
      if (replays[l]) {
        const PackedMatrix<A> weight(c.weight, c.N, true);
        replays[l]->pass.weight = weight.packed;
        run(replays[l]->pass, M);
      }
      std::optional<PackedMatrix<A>> weight;
      if (links[l].multiplies())
        links[l].walk.pass.weight = weight.emplace(c.weight, c.N, false).packed;
      links[l].walk.run(M);
      Optional memory;
      if (links[l].grads.wants(kWeight))
        weight_gradient<A>(dz(l), right_side(links[l], memory), M, results.weight(l));
    }
  }

  for (LinkBackward<A>& link : links) {
    link.grads.take(link.walk.after, false);
    link.grads.take(link.walk.before, true);
  }
  return results.list(dx);
}

void chain_backward_op(StableIValue* stack) {
  const Tensor dy = adjacent_columns(to<Tensor>(stack[0]));
  const std::vector<Tensor> saved = to<std::vector<Tensor>>(stack[1]);
  const Tensor x = to<Tensor>(stack[2]);
  const std::vector<Tensor> operands = to<std::vector<Tensor>>(stack[3]);
  const std::string text = take_text(to<StringHandle>(stack[4]));
  const int64_t depth = to<int64_t>(stack[5]);
  const Masks masks{to<Optional>(stack[6]), to<int64_t>(stack[7])};
  const std::string wanted = take_text(to<StringHandle>(stack[8]));
  STD_TORCH_CHECK(wanted.size() == operands.size() + 1,
                  "fusedres: a chain's backward needs a character for x and each operand, got ",
                  wanted.size());
  Chain chain(x, operands, text, depth, masks);
  check_matrix("dy", dy, chain.M, chain.links.back().N, x);
  STD_TORCH_CHECK(dtype_of(dy) == chain.value(chain.size()),
                  "fusedres: dy has another dtype than y");
  stack[0] =
      from(x.scalar_type() == ScalarType::Double ? chain_backward<double>(chain, dy, saved, wanted)
                                                 : chain_backward<float>(chain, dy, saved, wanted));
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def(
      "chain_forward(Tensor x, Tensor[] operands, str links, int depth, Tensor? seeds, "
      "SymInt sample_rows, int keep) -> Tensor[]");
  m.def(
      "chain_backward(Tensor dy, Tensor[] saved, Tensor x, Tensor[] operands, str links, "
      "int depth, Tensor? seeds, SymInt sample_rows, str wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("chain_forward", &fusedres::told<fusedres::chain_forward_op>);
  m.impl("chain_backward", &fusedres::told<fusedres::chain_backward_op>);
}
