// The ops fusedres::chain_forward and fusedres::chain_backward: layers one after the other on a CPU.
//
//   x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L
//
// Rows know nothing of each other, so a chunk of them walks through all links in one parallel region
// while it lies in the cache; where the packed weights of all links do not fit one, a region a link.
// Backward walks back in the same way and keeps each link's dz; then all weight gradients are
// computed side by side. No link has batch statistics, dropout or a residual other than its input.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <deque>
#include <sstream>

#include "gradients.h"

namespace fusedres {
namespace {

constexpr int64_t kCache = int64_t{1} << 23;  // bytes of packed weights that chunks share

// A part of `memory` as a matrix, its rows `stride` apart and its columns `step`.
Tensor part(const Tensor& memory, int64_t offset, int64_t rows, int64_t columns, int64_t stride,
            int64_t step = 1) {
  const int64_t sizes[2] = {rows, columns}, strides[2] = {stride, step};
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(memory.get(), 2, sizes, strides, offset, &handle));
  return Tensor(handle);
}

// The links of a call. `text` has a line for each: which of bias, norm_weight, norm_bias and gate
// there are, as a number of four bits, a space, the recipe.
struct Chain {
  std::deque<Call> links;
  int64_t M, widest = 1;

  Chain(const Tensor& x, const std::vector<Tensor>& operands, const std::string& text)
      : M(x.dim() ? x.size(0) : 0) {
    std::istringstream lines(text);
    std::string line;
    size_t next = 0;
    Tensor input = x;
    while (std::getline(lines, line)) {
      const size_t space = line.find(' ');
      STD_TORCH_CHECK(space != line.npos && next < operands.size(), "fusedres: no link '", line,
                      "'");
      const Recipe& r = recipe(line.substr(space + 1));
      STD_TORCH_CHECK(!r.batch_stats && !r.has(Stage::dropout) && !r.has(Stage::droppath),
                      "fusedres: a chain has neither batch statistics nor dropout");
      const Tensor& weight = operands[next];
      // Until it has memory: one element, of every row and column.
      if (!links.empty()) input = part(x, 0, M, links.back().N(), 0, 0);
      const Call& c = links.emplace_back(input, operands, next, std::stoi(line), r);
      STD_TORCH_CHECK(!c.casts() && c.y_dtype() == c.product_dtype() &&
                          c.x.scalar_type() == weight.scalar_type(),
                      "fusedres: a chain has one dtype");
      widest = std::max({widest, c.N(), c.K()});
    }
    STD_TORCH_CHECK(!links.empty() && next == operands.size(), "fusedres: a chain of ",
                    links.size(), " links got ", operands.size(), " operands, expected ", next);
    links.front().x = adjacent_columns(links.front().x);
  }

  int64_t size() const { return static_cast<int64_t>(links.size()); }
};

// Gives links 1, 2, ... the inputs that lie in `values` one after the other. Returns where they end.
int64_t place_inputs(Chain& chain, const Tensor& values) {
  int64_t offset = 0;
  for (int64_t l = 1; l < chain.size(); ++l) {
    const int64_t K = chain.links[l].K();
    chain.links[l].x = part(values, offset, chain.M, K, K);
    offset += chain.M * K;
  }
  return offset;
}

// The weights of all links, packed side by side.
template <class A>
class PackedWeights {
 public:
  PackedWeights(const Chain& chain, bool transposed) {
    for (const Call& c : chain.links) {
      const int64_t N = c.N(), K = c.K();
      packed_.push_back({nullptr, transposed ? K : N, transposed ? N : K, dtype_of(c.weight)});
      columns_.push_back(adjacent_columns(c.weight));
      offsets_.push_back(bytes_);
      bytes_ += (cpu::kernels<A>().packed_bytes(packed_.back()) + 63) / 64 * 64;
    }
    if (!fit()) return;
    memory_.emplace(empty({bytes_ + 64}, ScalarType::Byte));
    const cpu::Kernels<A>& kernels = cpu::kernels<A>();
    in_parallel(chain.size(), [&](int64_t l) {
      const int64_t panels = (packed_[l].width + kernels.panel - 1) / kernels.panel;
      kernels.pack(rows_of(columns_[l]), transposed, (*this)[l], 0, panels);
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
  std::vector<Tensor> columns_;
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

  LinkForward(const Call& c, const Optional& z, const Tensor& y) {
    const bool early = c.bias && bias_in_product(dtype_of(c.weight));
    pass.product = dtype_of(c.weight);
    pass.x = rows_of(c.x);
    pass.y = rows_of(y);
    if (z) pass.z = rows_of(*z);
    if (early) pass.early_bias = (bias = values<A>(*c.bias)).data();
    if (!c.recipe.prologue.empty()) pass.before = &before.emplace(c, true, c.x).program;
    if (!c.recipe.epilogue.empty() || (c.bias && !early))
      pass.after = &after.emplace(c, false, z ? *z : y).program;
  }
};

// y and, if `save`, the inputs of links 1, 2, ... and the z of all links, each in one piece.
template <class A>
std::vector<Tensor> chain_forward(Chain& chain, bool save) {
  const int64_t M = chain.M, L = chain.size();
  const ScalarType dtype = chain.links[0].product_dtype();
  int64_t of_inputs = 0, of_z = 0;
  for (const Call& c : chain.links) {
    of_inputs += M * c.N();
    if (c.recipe.saves_z()) of_z += M * c.N();
  }
  of_inputs -= M * chain.links[L - 1].N();
  // Without backward two pieces take turns; their rows are as long as the longest.
  const Tensor inputs = empty({save ? of_inputs : 2 * M * chain.widest}, dtype);
  const Tensor all_z = empty({save ? of_z : 0}, dtype);
  if (save)
    place_inputs(chain, inputs);
  else
    for (int64_t l = 1; l < L; ++l)
      chain.links[l].x =
          part(inputs, l % 2 * M * chain.widest, M, chain.links[l].K(), chain.widest);

  const Tensor y = empty({M, chain.links[L - 1].N()}, dtype);
  std::deque<LinkForward<A>> links;
  int64_t offset = 0;
  for (int64_t l = 0; l < L; ++l) {
    const Call& c = chain.links[l];
    Optional z;
    if (save && c.recipe.saves_z()) {
      z = part(all_z, offset, M, c.N(), c.N());
      offset += M * c.N();
    }
    links.emplace_back(c, z, l + 1 < L ? chain.links[l + 1].x : y);
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
      const PackedMatrix<A> weight(chain.links[l].weight, true);
      links[l].pass.weight = weight.packed;
      run(links[l].pass, M);
    }
  }
  if (!save) return {y};
  return {y, inputs, all_z};
}

void chain_forward_op(StableIValue* stack) {
  const Tensor x = to<Tensor>(stack[0]);
  const std::vector<Tensor> operands = to<std::vector<Tensor>>(stack[1]);
  const std::string text = take_text(to<StringHandle>(stack[2]));
  const bool save = to<bool>(stack[3]);
  Chain chain(x, operands, text);
  stack[0] = from(x.scalar_type() == ScalarType::Double ? chain_forward<double>(chain, save)
                                                        : chain_forward<float>(chain, save));
}

// ---- backward

template <class A>
struct LinkBackward {
  std::optional<Side<A>> before, after;
  Gradients<A> grads;
  BackwardPass<A> walk;

  // dy -> dz, dx; `skip`: memory for what an `add` in the middle sends back. dx null: not wanted.
  LinkBackward(const Call& c, int64_t needs, const Tensor& z, const Rows& dy, const Rows& dz,
               const Rows& skip, const Rows& dx)
      : grads{c, needs, {}} {
    const Recipe& r = c.recipe;
    cpu::Backward<A>& pass = walk.pass;
    pass.product = dtype_of(c.weight);
    pass.dy = dy;
    pass.dz = dz;
    pass.dx = dx;
    const bool adds = r.has(Stage::add) && !c.in_prologue(Stage::add) && dx.data;
    const bool last = adds && r.epilogue.back() == Stage::add;
    if (!r.epilogue.empty() || grads.wants(kBias)) {
      after.emplace(c, false, z);
      walk.after = grads.walk(*after, false, 0, r.epilogue.size());
      if (adds && !last) walk.after->dresidual = skip;
    }
    if (!r.prologue.empty()) {
      before.emplace(c, true, c.x);
      walk.before = grads.walk(*before, true, 0, r.prologue.size());
    }
    if (adds) {
      pass.skip = last ? dy : skip;
      pass.skip.features = std::min(c.N(), c.K());
      pass.skip_scale = last ? r.residual_scale : 1.0;
    }
  }

  bool multiplies() const { return walk.pass.dx.data || walk.before; }
};

// All links' dz.T @ x: side by side where there are enough of them and few rows, else one by one.
template <class A>
void weight_gradients(const Chain& chain, std::deque<LinkBackward<A>>& links,
                      const std::vector<Tensor>& dz) {
  constexpr int64_t kFewRows = 1024, kManyLinks = 8, kLargest = 1 << 18;
  const cpu::Kernels<A>& kernels = cpu::kernels<A>();
  std::vector<Tensor> operands;
  std::vector<cpu::WeightGradient<A>> together;
  for (int64_t l = 0; l < chain.size(); ++l) {
    const Call& c = chain.links[l];
    LinkBackward<A>& link = links[l];
    if (!link.grads.wants(kWeight)) continue;
    operands.push_back(link.before ? make_operand(c, *link.before) : c.x);
    const bool small = c.N() * c.K() <= kLargest;
    if (!small || chain.M >= kFewRows || chain.size() < kManyLinks) {
      link.grads.of[kWeight] = weight_gradient<A>(dz[l], operands.back());
      continue;
    }
    link.grads.of[kWeight] = empty({c.N(), c.K()}, c.weight);
    cpu::WeightGradient<A>& g = together.emplace_back();
    g.dz = rows_of(dz[l]);
    g.x = rows_of(operands.back());
    g.product = dtype_of(c.weight);
    g.dweight = rows_of(*link.grads.of[kWeight]);
  }
  in_parallel(static_cast<int64_t>(together.size()), [&](int64_t i) {
    kernels.weight_gradient(together[i], 0, chain.M, 0, together[i].dz.features);
  });
}

// The gradients of x and of all operands, those that `wanted` has a '1' for.
template <class A>
std::vector<Tensor> chain_backward(Chain& chain, const Tensor& dy, const Tensor& inputs,
                                   const Tensor& all_z, const std::string& wanted) {
  const int64_t M = chain.M, L = chain.size(), W = chain.widest;
  const ScalarType dtype = chain.links[0].product_dtype();
  STD_TORCH_CHECK(place_inputs(chain, inputs) <= inputs.numel(), "fusedres: inputs are too small");
  Optional dx;
  if (wanted.at(0) == '1') dx = empty({M, chain.links[0].K()}, chain.links[0].x);
  const Tensor memory = empty({3 * M * W}, dtype);  // two gradients that take turns, and a skip
  int64_t of_dz = 0;
  for (const Call& c : chain.links) of_dz += M * c.N();
  const Tensor all_dz = empty({of_dz}, dtype);

  std::deque<LinkBackward<A>> links;
  std::vector<Tensor> dz;
  size_t next = 1;
  int64_t z_offset = 0, dz_offset = 0;
  for (int64_t l = 0; l < L; ++l) {
    const Call& c = chain.links[l];
    int64_t needs = l > 0 || dx ? 1 << kX : 0;
    const bool there[] = {true, c.bias.has_value(), c.norm_weight.has_value(),
                          c.norm_bias.has_value(), c.gate.has_value()};
    for (int i = 0; i < 5; ++i)
      if (there[i] && wanted.at(next++) == '1') needs |= int64_t{1} << (kWeight + i);
    dz.push_back(part(all_dz, dz_offset, M, c.N(), c.N()));
    dz_offset += M * c.N();
    Tensor z = dz.back();  // whose values nobody reads
    if (c.recipe.saves_z()) {
      STD_TORCH_CHECK(z_offset + M * c.N() <= all_z.numel(), "fusedres: z is too small");
      z = part(all_z, z_offset, M, c.N(), c.N());
      z_offset += M * c.N();
    }
    const auto piece = [&](int64_t i, int64_t columns) {
      return rows_of(part(memory, i * M * W, M, columns, W));
    };
    const Rows none;
    links.emplace_back(c, needs, z, l + 1 < L ? piece((l + 1) % 2, c.N()) : rows_of(dy),
                       rows_of(dz.back()), piece(2, std::min(c.N(), c.K())),
                       l > 0 ? piece(l % 2, c.K())
                       : dx  ? rows_of(*dx)
                             : none);
  }

  const PackedWeights<A> weights(chain, false);
  if (weights.fit()) {
    for (int64_t l = 0; l < L; ++l)
      if (links[l].multiplies()) links[l].walk.pass.weight = weights[l];
    const Chunks chunks = chunks_of<A>(M, W, weights[L - 1]);
    for (LinkBackward<A>& link : links) link.walk.prepare(chunks.count);
    for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      for (int64_t l = L - 1; l >= 0; --l) links[l].walk.run_chunk(chunk, begin, end);
    });
    for (LinkBackward<A>& link : links) link.walk.finish(chunks.count);
  } else {
    for (int64_t l = L - 1; l >= 0; --l) {
      std::optional<PackedMatrix<A>> weight;
      if (links[l].multiplies())
        links[l].walk.pass.weight = weight.emplace(chain.links[l].weight, false).packed;
      links[l].walk.run(M);
    }
  }
  weight_gradients<A>(chain, links, dz);

  std::vector<Tensor> out;
  if (dx) out.push_back(*dx);
  for (LinkBackward<A>& link : links) {
    link.grads.take(link.walk.after, false);
    link.grads.take(link.walk.before, true);
    for (int i = kWeight; i <= kGate; ++i)
      if (link.grads.of[i]) out.push_back(*link.grads.of[i]);
  }
  return out;
}

void chain_backward_op(StableIValue* stack) {
  const Tensor dy = adjacent_columns(to<Tensor>(stack[0]));
  const std::vector<Tensor> saved = to<std::vector<Tensor>>(stack[1]);
  const Tensor x = to<Tensor>(stack[2]);
  const std::vector<Tensor> operands = to<std::vector<Tensor>>(stack[3]);
  const std::string text = take_text(to<StringHandle>(stack[4]));
  const std::string wanted = take_text(to<StringHandle>(stack[5]));
  STD_TORCH_CHECK(saved.size() == 2 && wanted.size() == operands.size() + 1,
                  "fusedres: a chain's backward needs two saved tensors and a character for x and "
                  "each operand, got ",
                  saved.size(), " and ", wanted.size());
  Chain chain(x, operands, text);
  check_matrix("dy", dy, chain.M, chain.links.back().N(), x);
  for (const Tensor& t : {dy, saved[0], saved[1]})
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), "fusedres: a chain has one dtype");
  stack[0] = from(x.scalar_type() == ScalarType::Double
                      ? chain_backward<double>(chain, dy, saved[0], saved[1], wanted)
                      : chain_backward<float>(chain, dy, saved[0], saved[1], wanted));
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def("chain_forward(Tensor x, Tensor[] operands, str links, bool save) -> Tensor[]");
  m.def(
      "chain_backward(Tensor dy, Tensor[] saved, Tensor x, Tensor[] operands, str links, "
      "str wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("chain_forward", &fusedres::told<fusedres::chain_forward_op>);
  m.impl("chain_backward", &fusedres::told<fusedres::chain_backward_op>);
}
