// The ops fusedres::chain_forward and fusedres::chain_backward: layers one after the other on a CPU.
//
//   x_0 = x,  x_l+1 = layer_l(x_l),  y = x_L
//
// Rows know nothing of each other, so a chunk of them walks through all links in one parallel region
// while it lies in the cache; where the packed weights of all links do not fit one, a region a link.
// So with batch statistics, which need all rows. Backward walks back in the same way; in one region
// it keeps each link's dz, and all weight gradients are computed side by side.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "chain/backward.h"

namespace fusedres {
namespace {

void chain_forward_op(StableIValue* stack) {
  const Tensor x = to<Tensor>(stack[0]);
  const std::vector<Tensor> operands = to<std::vector<Tensor>>(stack[1]);
  const std::string text = take_text(to<StringHandle>(stack[2]));
  const int64_t depth = to<int64_t>(stack[3]);
  const Masks masks{to<Optional>(stack[4]), to<int64_t>(stack[5])};
  const Keep keep = keep_of(to<int64_t>(stack[6]));
  Chain chain(x, operands, text, depth, masks);
  stack[0] = from(type_of(x) == ScalarType::Double ? chain_forward<double>(chain, keep)
                                                   : chain_forward<float>(chain, keep));
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
  const bool over_z = to<bool>(stack[9]);
  STD_TORCH_CHECK(wanted.size() == operands.size() + 1,
                  "fusedres: a chain's backward needs a character for x and each operand, got ",
                  wanted.size());
  Chain chain(x, operands, text, depth, masks);
  check_matrix("dy", dy, chain.M, chain.links.back().N, x);
  STD_TORCH_CHECK(dtype_of(dy) == chain.dtype(chain.size()),
                  "fusedres: dy has another dtype than y");
  stack[0] = from(type_of(x) == ScalarType::Double
                      ? chain_backward<double>(chain, dy, saved, wanted, over_z)
                      : chain_backward<float>(chain, dy, saved, wanted, over_z));
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def(
      "chain_forward(Tensor x, Tensor[] operands, str links, int depth, Tensor? seeds, "
      "SymInt sample_rows, int keep) -> Tensor[]");
  m.def(
      "chain_backward(Tensor dy, Tensor[] saved, Tensor x, Tensor[] operands, str links, "
      "int depth, Tensor? seeds, SymInt sample_rows, str wanted, bool over_z) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("chain_forward", &fusedres::told<fusedres::chain_forward_op>);
  m.impl("chain_backward", &fusedres::told<fusedres::chain_backward_op>);
}
