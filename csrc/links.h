// What the chain's ops get and keep: its links, their values in few pieces of memory, their gradients.
#pragma once

#include <deque>
#include <sstream>

#include "gradients.h"

namespace fusedres {

// A part of `memory` of up to two dimensions; `step` between a matrix's columns.
inline Tensor part(const Tensor& memory, int64_t offset, std::vector<int64_t> sizes,
                   std::vector<int64_t> strides) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch__reinterpret_tensor(memory.get(), static_cast<int64_t>(sizes.size()), sizes.data(),
                                     strides.data(), offset, &handle));
  return Tensor(handle);
}

// t[i].
inline Tensor slice(const Tensor& t, int64_t i) {
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 1; d < t.dim(); ++d) {
    sizes.push_back(t.size(d));
    strides.push_back(t.stride(d));
  }
  return part(t, i * t.stride(0), sizes, strides);
}

// What forward keeps for backward.
enum class Keep { nothing, all, inputs };

inline Keep keep_of(int64_t keep) {
  STD_TORCH_CHECK(keep >= 0 && keep <= 2, "fusedres: keep must be 0, 1 or 2, got ", keep);
  return static_cast<Keep>(keep);
}

// ---- links

// The links of a call. `text` has a line for each: which of bias, norm_weight, norm_bias and gate
// there are, as a number of four bits, a space, the recipe.
//
// `depth` not 0: operands are stacked. There are `depth` links, in blocks of as many as there are
// lines; operands are those of the last line, (depth, ...) each but the gate, which has one entry a
// block. A block's `add` takes the block's input.
struct Chain {
  std::deque<Call> links;
  const std::vector<Tensor>& operands;
  int64_t M, widest = 1, block = 1;
  bool stacked;
  std::vector<std::vector<int64_t>> operand_of;  // for each link, which operand is its Input

  Chain(const Tensor& x, const std::vector<Tensor>& operands, const std::string& text,
        int64_t depth)
      : operands(operands), M(x.dim() ? x.size(0) : 0), stacked(depth != 0) {
    struct Line {
      int there;
      const Recipe& recipe;
    };
    std::vector<Line> lines;
    std::istringstream stream(text);
    std::string line;
    while (std::getline(stream, line)) {
      const size_t space = line.find(' ');
      STD_TORCH_CHECK(space != line.npos && space > 0 && space < 3, "fusedres: no link '", line,
                      "'");
      const Recipe& r = recipe(line.substr(space + 1));
      STD_TORCH_CHECK(!r.batch_stats && !r.has(Stage::dropout) && !r.has(Stage::droppath),
                      "fusedres: a chain has neither batch statistics nor dropout");
      lines.push_back({std::stoi(line), r});
    }
    STD_TORCH_CHECK(!lines.empty(), "fusedres: a chain without links");
    const int64_t count = static_cast<int64_t>(lines.size());
    STD_TORCH_CHECK(depth >= 0 && depth % count == 0, "fusedres: depth is ", depth,
                    ", expected 0 or a multiple of ", count);
    if (stacked) {
      block = count;
      gate_ = which(lines.back().there, lines.back().there, 0)[kGate];
      check_stacked(lines.back().there, depth);
    }
    size_t next = 0;
    Tensor input = x;
    for (int64_t l = 0; l < (stacked ? depth : count); ++l) {
      const Line& own = lines[l % count];
      const size_t first = stacked ? 0 : next;
      operand_of.push_back(which(stacked ? lines.back().there : own.there, own.there, first));
      // Until it has memory: one element, of every row and column.
      if (l > 0) input = part(x, 0, {M, links.back().N()}, {0, 0});
      if (stacked) {
        std::vector<Tensor> slices;
        for (const int64_t i : operand_of[l])
          if (i >= 0) slices.push_back(slice(operands[i], entry(i, l)));
        size_t unused = 0;
        links.emplace_back(input, slices, unused, own.there, own.recipe);
      } else {
        links.emplace_back(input, operands, next, own.there, own.recipe);
      }
      const Call& c = links.back();
      STD_TORCH_CHECK(!c.casts() && c.y_dtype() == c.product_dtype() &&
                          c.x.scalar_type() == c.weight.scalar_type(),
                      "fusedres: a chain has one dtype");
      STD_TORCH_CHECK(c.N() > 0 && c.K() > 0 && (block == 1 || !c.in_prologue(Stage::add)),
                      "fusedres: a link without features, or one that adds before linear");
      widest = std::max({widest, c.N(), c.K()});
    }
    STD_TORCH_CHECK(stacked || next == operands.size(), "fusedres: a chain of ", links.size(),
                    " links got ", operands.size(), " operands, expected ", next);
    place(0, adjacent_columns(x));
  }

  int64_t size() const { return static_cast<int64_t>(links.size()); }
  int64_t source(int64_t l) const { return l / block * block; }  // whose input its `add` takes

  // Operand i's entry for link l: a gate is the block's.
  int64_t entry(int64_t i, int64_t l) const { return i == gate_ ? l / block : l; }

  void place(int64_t l, const Tensor& input) {
    links[l].x = input;
    for (int64_t user = l; user < size() && source(user) == l; ++user)
      if (user > l && links[user].recipe.has(Stage::add)) links[user].residual = input;
  }

  // ---- how wide what is kept is, for each link

  std::vector<int64_t> inputs() const {  // the first one's is the call's own
    std::vector<int64_t> columns{0};
    for (int64_t l = 1; l < size(); ++l) columns.push_back(links[l].K());
    return columns;
  }
  std::vector<int64_t> outputs() const {
    std::vector<int64_t> columns;
    for (const Call& c : links) columns.push_back(c.N());
    return columns;
  }
  std::vector<int64_t> z() const {
    std::vector<int64_t> columns;
    for (const Call& c : links) columns.push_back(c.recipe.saves_z() ? c.N() : 0);
    return columns;
  }

  // Values that are soon forgotten take turns: those between blocks, and those inside of one.
  std::vector<int64_t> slots() const { return std::vector<int64_t>(block > 1 ? 4 : 2, widest); }
  int64_t slot(int64_t l) const { return l % block == 0 ? l / block % 2 : 2 + l % 2; }

 private:
  int64_t gate_ = -1;  // which operand a stack's gate is

  // For each Input the operand that it is, -1: there is none.
  static std::vector<int64_t> which(int all, int there, size_t first) {
    std::vector<int64_t> of(kInputs, -1);
    of[kWeight] = static_cast<int64_t>(first++);
    for (int i = 0; i < 4; ++i) {
      if (there >> i & 1) of[kBias + i] = static_cast<int64_t>(first);
      first += all >> i & 1;
    }
    return of;
  }

  void check_stacked(int there, int64_t depth) const {
    const std::vector<int64_t> of = which(there, there, 0);
    size_t expected = 0;
    for (int input = kWeight; input <= kGate; ++input) {
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
};

// ---- values

// Matrices of M rows one after the other, in pieces of memory. fusedres/chain.py knows the rule.
class Store {
 public:
  Store(int64_t M, const std::vector<int64_t>& columns) : M_(M) {
    // So that a piece is of a size that the system does not take back at once; and no function of M,
    // which may be a symbol where torch traces.
    constexpr int64_t kColumns = 1024;
    for (const int64_t c : columns) {
      if (c > 0 && (pieces_.empty() || pieces_.back() + c > kColumns)) pieces_.push_back(0);
      at_.push_back({static_cast<int64_t>(pieces_.size()) - 1, c > 0 ? M * pieces_.back() : 0, c});
      if (c > 0) pieces_.back() += c;
    }
  }

  size_t pieces() const { return pieces_.size(); }

  void allocate(ScalarType dtype) {
    for (const int64_t columns : pieces_) memory_.push_back(empty({M_ * columns}, dtype));
  }

  // Takes them from `given`; returns where they end.
  size_t adopt(const std::vector<Tensor>& given, size_t first, ScalarType dtype) {
    for (const int64_t columns : pieces_) {
      STD_TORCH_CHECK(first < given.size() && given[first].numel() == M_ * columns &&
                          given[first].is_contiguous() && given[first].scalar_type() == dtype &&
                          given[first].is_cpu(),
                      "fusedres: saved tensor ", first, " does not fit, expected ", M_ * columns,
                      " elements");
      memory_.push_back(given[first++]);
    }
    return first;
  }

  Tensor operator[](int64_t i) const { return part(i, at_[i].columns); }

  // Its first columns.
  Tensor part(int64_t i, int64_t columns) const {
    const Place& at = at_[i];
    return fusedres::part(memory_[at.piece], at.offset, {M_, columns}, {at.columns, 1});
  }

  void append_to(std::vector<Tensor>& list) const {
    list.insert(list.end(), memory_.begin(), memory_.end());
  }

 private:
  struct Place {
    int64_t piece, offset, columns;
  };
  int64_t M_;
  std::vector<int64_t> pieces_;  // columns
  std::vector<Place> at_;
  std::vector<Tensor> memory_;
};

// ---- gradients of the operands that are wanted

class GradientsOf {
 public:
  GradientsOf(const Chain& chain, const std::string& wanted) : chain_(chain) {
    for (size_t i = 0; i < chain.operands.size(); ++i) {
      wanted_.push_back(wanted.at(i + 1) == '1');
      found_.emplace_back();
      const Tensor& t = chain.operands[i];
      if (chain.stacked && wanted_[i]) found_[i] = torch::stable::new_empty(t, sizes(t));
    }
  }

  // Those of link l's Inputs, as bits.
  int64_t needs(int64_t l) const {
    int64_t needs = 0;
    for (int input = kWeight; input <= kGate; ++input) {
      const int64_t i = chain_.operand_of[l][input];
      if (i >= 0 && wanted_[i]) needs |= int64_t{1} << input;
    }
    return needs;
  }

  // Where they go, if that is known before.
  void place(int64_t l, Optional* of) const {
    for (int input = kWeight; input <= kGate; ++input) {
      const int64_t i = chain_.operand_of[l][input];
      if (chain_.stacked && i >= 0 && wanted_[i]) of[input] = slice(*found_[i], chain_.entry(i, l));
    }
  }

  void take(int64_t l, const Optional* of) {
    for (int input = kWeight; input <= kGate && !chain_.stacked; ++input) {
      const int64_t i = chain_.operand_of[l][input];
      if (i >= 0 && wanted_[i]) found_[i] = of[input];
    }
  }

  std::vector<Tensor> list(const Optional& dx) const {
    std::vector<Tensor> out;
    if (dx) out.push_back(*dx);
    for (const Optional& t : found_)
      if (t) out.push_back(*t);
    return out;
  }

 private:
  static std::vector<int64_t> sizes(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
    return sizes;
  }

  const Chain& chain_;
  std::vector<bool> wanted_;
  std::vector<Optional> found_;
};

}  // namespace fusedres
