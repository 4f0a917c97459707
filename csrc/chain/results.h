// Where the gradients of a chain's operands go, those that are wanted.
#pragma once

#include "chain/links.h"
#include "gradients.h"

namespace fusedres {

class GradientsOf {
 public:
  GradientsOf(const Chain& chain, const std::string& wanted) : chain_(chain) {
    for (size_t i = 0; i < chain.operands.size(); ++i) {
      found_.emplace_back();
      if (wanted.at(i + 1) == '1') found_[i] = like(chain.operands[i]);
    }
    for (const std::vector<int64_t>& of : chain.operand_of)
      for (const int running : {kRunningMean, kRunningVar})
        STD_TORCH_CHECK(of[running] < 0 || !found_[of[running]],
                        "fusedres: running statistics have no gradient");
  }

  // Those of link l's Inputs, as bits.
  int64_t needs(int64_t l) const {
    int64_t needs = 0;
    for (int input = kWeight; input <= kGate; ++input)
      if (wants(l, input)) needs |= int64_t{1} << input;
    return needs;
  }

  Rows weight(int64_t l) const {
    const Layer& link = chain_.links[l];
    return {place(l, kWeight), link.K, link.K, link.product};
  }

  void place(int64_t l, Vector* into) const {
    for (int input = kBias; input <= kGate; ++input) {
      if (!wants(l, input)) continue;
      const Tensor& t = *found_[chain_.operand_of[l][input]];
      into[input] = {place(l, input), 1, dtype_of(t)};
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
  bool wants(int64_t l, int input) const {
    const int64_t i = chain_.operand_of[l][input];
    return i >= 0 && found_[i].has_value();
  }

  void* place(int64_t l, int input) const {
    const int64_t i = chain_.operand_of[l][input];
    return chain_.stacked ? entry_of(*found_[i], chain_.entry(i, l)) : found_[i]->data_ptr();
  }

  static Tensor like(const Tensor& t) {
    std::vector<int64_t> sizes;
    for (int64_t d = 0; d < t.dim(); ++d) sizes.push_back(t.size(d));
    return torch::stable::new_empty(t, sizes);
  }

  const Chain& chain_;
  std::vector<Optional> found_;
};

}  // namespace fusedres
