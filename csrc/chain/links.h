// What the chain's ops get: links as plain pointers, checked as layers are.
#pragma once

#include <deque>

#include "chain/wiring.h"

namespace fusedres {

// The first element of a tensor's entry i, along its first dimension.
inline void* entry_of(const Tensor& t, int64_t i) {
  return static_cast<char*>(t.data_ptr()) + i * t.stride(0) * t.element_size();
}

// What masks are made of: the seeds of those links that drop at random, in their order.
struct Masks {
  const Optional seeds;  // (count,) int64
  const int64_t sample_rows;
};

// The links of a call: a line of `text` each.
//
// `depth` not 0: operands are stacked. There are `depth` links, in blocks of as many as there are
// lines; operands are those of the last line, (depth, ...) each but the gate, which has one entry a
// block.
struct Chain {
  std::deque<Layer> links;
  std::vector<std::vector<int64_t>> operand_of;  // for each link, which operand is its Input; or -1
  const std::vector<Tensor>& operands;
  const Masks masks;
  const int64_t M;
  const bool stacked;
  int64_t widest = 1, block = 1;
  Wiring wiring;

  Chain(const Tensor& x, const std::vector<Tensor>& operands, const std::string& text,
        int64_t depth, const Masks& masks)
      : operands(operands), masks(masks), M(x.dim() ? x.size(0) : 0), stacked(depth != 0) {
    const std::vector<Line> lines = Line::of(text);
    const int64_t count = static_cast<int64_t>(lines.size());
    STD_TORCH_CHECK(depth >= 0 && depth % count == 0, "fusedres: depth is ", depth,
                    ", expected 0 or a multiple of ", count);
    kept_.push_back(adjacent_columns(x));
    if (masks.seeds) any_seed_ = first_of(*masks.seeds);
    if (stacked) {
      block = count;
      stack(lines, depth);
    } else {
      size_t next = 0;
      for (const Line& line : lines) {
        operand_of.push_back(which(line.there, line.there, next));
        std::vector<Tensor> own;
        for (const int64_t i : operand_of.back())
          if (i >= 0 && i < static_cast<int64_t>(operands.size())) own.push_back(operands[i]);
        next += own.size();
        append(line, own);
      }
      STD_TORCH_CHECK(next == operands.size(), "fusedres: a chain of ", count, " links got ",
                      operands.size(), " operands, expected ", next);
    }
    const int64_t seeds = masks.seeds ? masks.seeds->numel() : 0;
    STD_TORCH_CHECK(seeds == seeded_, "fusedres: ", seeds, " seeds for ", seeded_,
                    " links that drop at random");
    statistics_at_.push_back(0);
    for (int64_t l = 0; l < size(); ++l) {
      const Layer& link = links[l];
      const int64_t C = batch(l, true) ? link.K : batch(l, false) ? link.N : 0;
      statistics_at_.push_back(statistics() + 2 * C);
    }
    wiring.close();
    kept.assign(size(), false);
    for (int64_t l = 0; l < size(); ++l) {
      if (!links[l].recipe.prologue.empty() || !links[l].casts) kept[wiring.from[l]] = true;
      if (links[l].recipe.saves_residual()) kept[wiring.adds[l]] = true;
    }
  }

  int64_t size() const { return static_cast<int64_t>(links.size()); }
  DType product() const { return links.front().product; }

  // Which of operand i's entries is link l's, in a stack: a gate is the block's.
  int64_t entry(int64_t i, int64_t l) const { return i == gate_ ? l / block : l; }

  // Of value v.
  DType dtype(int64_t v) const { return v ? links[v - 1].y : dtype_of(kept_.front()); }
  int64_t width(int64_t v) const { return v ? links[v - 1].N : links[0].K; }

  // Where each value lies, for the links that take it; x is the call's own.
  void connect(std::vector<Rows> rows) {
    rows[0] = rows_of(kept_.front());
    for (int64_t l = 0; l < size(); ++l) {
      links[l].x = rows[wiring.from[l]];
      if (wiring.adds_another(l)) links[l].residual = rows[wiring.adds[l]];
    }
  }

  // ---- batch statistics: mean and biased variance of each link that goes by them

  // Whether link l does, before or after its `linear`.
  bool batch(int64_t l, bool prologue) const {
    const Recipe& r = links[l].recipe;
    return r.batch_stats && r.has(Stage::norm) && links[l].in_prologue(Stage::norm) == prologue;
  }
  // How many elements all have; where link l's begin.
  int64_t statistics() const { return statistics_at_.back(); }
  int64_t statistics(int64_t l) const { return statistics_at_[l]; }

  // ---- what is kept, for each value or link

  std::vector<bool> kept;              // which values backward looks at
  std::vector<Width> values() const {  // x is the call's own
    std::vector<Width> widths{{0, dtype(0)}};
    widths.reserve(size());
    for (int64_t v = 1; v < size(); ++v) widths.push_back({kept[v] ? width(v) : 0, dtype(v)});
    return widths;
  }
  // What the product takes for a link's input, where it is only cast; the first one's is made again.
  std::vector<Width> casts() const {
    std::vector<Width> widths;
    widths.reserve(size());
    for (const Layer& link : links) widths.push_back({link.casts ? link.K : 0, product()});
    widths[0].columns = 0;
    return widths;
  }
  std::vector<Width> z() const {
    std::vector<Width> widths;
    widths.reserve(size());
    for (const Layer& link : links)
      widths.push_back({link.recipe.saves_z() ? link.N : 0, product()});
    return widths;
  }
  std::vector<Width> outputs() const {
    std::vector<Width> widths;
    widths.reserve(size());
    for (const Layer& link : links) widths.push_back({link.N, product()});
    return widths;
  }

  // So many matrices that any of the chain's fits in.
  std::vector<Width> any(int64_t count) const {
    DType widest_dtype = product();
    for (int64_t v = 0; v <= size(); ++v)
      if (bytes_of(dtype(v)) > bytes_of(widest_dtype)) widest_dtype = dtype(v);
    return std::vector<Width>(count, {widest, widest_dtype});
  }

 private:
  // For each Input the operand that it is, of those from `first` on.
  static std::vector<int64_t> which(int all, int there, size_t first) {
    std::vector<int64_t> of(kSlots, -1);
    of[kWeight] = static_cast<int64_t>(first++);
    for (int i = 0; i < kCount; ++i) {
      if (there >> i & 1) of[kKinds[i]] = static_cast<int64_t>(first);
      first += all >> i & 1;
    }
    return of;
  }

  // A link with operands of its own, checked as a layer's are.
  void append(const Line& line, const std::vector<Tensor>& own) {
    const int64_t l = size();
    wiring.append(line);
    const int64_t from = wiring.from[l];
    const Tensor input = from ? stand_in(from) : kept_.front();
    Optional residual;
    if (wiring.adds_another(l)) {
      residual = stand_in(wiring.adds[l]);
      STD_TORCH_CHECK(residual->size(1) == own.at(0).size(0), "fusedres: link ", l,
                      " adds a value of ", residual->size(1), " features, expected ",
                      own.at(0).size(0));
    }
    STD_TORCH_CHECK(!line.recipe.batch_stats || M > 1,
                    "fusedres: batch statistics of one row have no variance");
    const Call c(input, own, line.there, residual, any_seed_, masks.sample_rows, line.recipe);
    STD_TORCH_CHECK(links.empty() || dtype_of(c.weight) == product(),
                    "fusedres: a chain's weights have one dtype");
    STD_TORCH_CHECK(c.N() > 0 && c.K() > 0, "fusedres: a link without features");
    kept_.push_back(adjacent_columns(c.weight));
    widest = std::max({widest, c.N(), c.K()});
    links.emplace_back(c).weight = rows_of(kept_.back());
    seed(links.back());
  }

  // With the next seed, if it drops at random.
  void seed(Layer& link) {
    if (!link.recipe.has(Stage::dropout) && !link.recipe.has(Stage::droppath)) return;
    if (masks.seeds && seeded_ < masks.seeds->numel())
      link.seed = static_cast<const uint64_t*>(masks.seeds->data_ptr())[seeded_];
    ++seeded_;
  }

  // For a value without memory: one element for every row and column.
  Tensor stand_in(int64_t v) {
    Optional& element = elements_[static_cast<size_t>(dtype(v))];
    if (!element) element = empty({1}, scalar_type(dtype(v)));
    return matrix_at(*element, 0, M, width(v), 0, 0);
  }
  static Tensor matrix_at(const Tensor& t, int64_t offset, int64_t rows, int64_t columns,
                          int64_t stride, int64_t step) {
    const int64_t sizes[2] = {rows, columns}, strides[2] = {stride, step};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, offset, &handle));
    return Tensor(handle);
  }
  static Tensor first_of(const Tensor& seeds) {
    STD_TORCH_CHECK(seeds.dim() == 1 && seeds.numel() > 0 && seeds.is_contiguous() &&
                        seeds.is_cpu() && type_of(seeds) == ScalarType::Long,
                    "fusedres: a chain's seeds have shape ", shape_text(seeds),
                    ", expected (links that drop at random,) of int64 on the CPU");
    const int64_t sizes[1] = {1}, strides[1] = {1};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(seeds.get(), 1, sizes, strides, 0, &handle));
    return Tensor(handle);
  }
  static Tensor vector_at(const Tensor& t, int64_t offset) {
    const int64_t sizes[1] = {t.size(1)}, strides[1] = {t.stride(1)};
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(t.get(), 1, sizes, strides, offset, &handle));
    return Tensor(handle);
  }

  // The first block's links as any, the others the same with other entries.
  void stack(const std::vector<Line>& lines, int64_t depth) {
    const int all = lines.back().there;
    const std::vector<int64_t> last = which(all, all, 0);
    gate_ = last[kGate];
    check_stacked(last, depth);
    std::vector<Tensor> given = operands;
    if (given[0].stride(2) != 1) given[0] = torch::stable::contiguous(given[0]);
    for (int64_t l = 0; l < depth; ++l) {
      const Line& line = lines[l % block];
      operand_of.push_back(l < block ? which(all, line.there, 0) : operand_of[l - block]);
      if (l < block) {
        std::vector<Tensor> own;
        for (const int64_t i : operand_of[l]) {
          if (i < 0) continue;
          const Tensor& t = given[i];
          const int64_t offset = entry(i, l) * t.stride(0);
          own.push_back(i == 0 ? matrix_at(t, offset, t.size(1), t.size(2), t.stride(1), 1)
                               : vector_at(t, offset));
        }
        append(line, own);
        continue;
      }
      links.push_back(links[l - block]);
      wiring.repeat(block);
      Layer& link = links.back();
      const auto move = [&](void*& data, int64_t i) {
        if (i >= 0) data = entry_of(given[i], entry(i, l));
      };
      Vector* const vectors[] = {&link.bias, &link.norm_weight,  &link.norm_bias,
                                 &link.gate, &link.running_mean, &link.running_var};
      move(link.weight.data, 0);
      for (int i = 0; i < kCount; ++i) move(vectors[i]->data, operand_of[l][kKinds[i]]);
      seed(link);
    }
    STD_TORCH_CHECK(depth == block || dtype(block) == dtype(0),
                    "fusedres: a stack's blocks give another dtype than they get");
    STD_TORCH_CHECK(links.front().N == links.front().K, "fusedres: a stack's weight has shape ",
                    shape_text(operands[0]), ", expected (depth, N, N)");
    kept_.push_back(given[0]);
  }

  void check_stacked(const std::vector<int64_t>& of, int64_t depth) const {
    size_t expected = 0;
    for (int input = kWeight; input < kSlots; ++input) {
      if (of[input] < 0) continue;
      STD_TORCH_CHECK(++expected <= operands.size(), "fusedres: a stack got ", operands.size(),
                      " operands, too few");
      const Tensor& t = operands[of[input]];
      const int64_t entries = input == kGate ? depth / block : depth;
      STD_TORCH_CHECK(t.dim() == (input == kWeight ? 3 : 2) && t.size(0) == entries,
                      "fusedres: a stacked operand has shape ", shape_text(t), ", expected ",
                      entries, " entries");
    }
    STD_TORCH_CHECK(expected == operands.size(), "fusedres: a stack got ", operands.size(),
                    " operands, expected ", expected);
  }

  Optional any_seed_;  // for the checks of layers
  int64_t seeded_ = 0;
  int64_t gate_ = -1;  // which operand a stack's gate is
  std::vector<int64_t> statistics_at_;
  Optional elements_[4];      // of each dtype
  std::vector<Tensor> kept_;  // x first; what pointers point into
};

}  // namespace fusedres
