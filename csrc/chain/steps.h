// What is done to rows, step after step, and with which weights.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "chain/links.h"

namespace fusedres {

// On rows [begin, end), of which there is one `chunk`; `before` and `after` once, on the caller's
// thread. What comes after sees all rows, so there a parallel region ends.
struct Step {
  std::function<void(int64_t chunk, int64_t begin, int64_t end)> rows;
  std::function<void()> before = {}, after = {};
};

inline void run(const std::vector<Step>& steps, const Chunks& chunks) {
  for (size_t first = 0, end = 0; first < steps.size(); first = end) {
    do
      if (steps[end].before) steps[end].before();
    while (!steps[end++].after && end < steps.size());
    for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t stop) {
      for (size_t i = first; i < end; ++i) steps[i].rows(chunk, begin, stop);
    });
    if (steps[end - 1].after) steps[end - 1].after();
  }
}

// Those that all links have in common: a chunk walks through several of them.
template <class A>
Chunks chunks_of(const Chain& chain) {
  return Chunks(chain.M, chain.widest, chain.widest, cpu::kernels<A>().tile_rows(chain.product()));
}

constexpr int64_t kCache = int64_t{1} << 23;  // bytes of packed weights that chunks share

// The weights of all links, packed side by side; or, where they do not fit a cache, nothing.
template <class A>
class PackedWeights {
 public:
  // `one_by_one`: each is packed when it is used, even where all fit.
  PackedWeights(const Chain& chain, bool transposed, bool one_by_one) : fits_(!one_by_one) {
    for (const Layer& c : chain.links) {
      packed_.push_back({nullptr, transposed ? c.K : c.N, transposed ? c.N : c.K, c.product});
      offsets_.push_back(bytes_);
      bytes_ += (cpu::kernels<A>().packed_bytes(packed_.back()) + 63) / 64 * 64;
    }
    fits_ = fits_ && bytes_ <= kCache;
    if (!fits_) return;
    memory_.emplace(empty({bytes_ + 64}, ScalarType::Byte));
    const cpu::Kernels<A>& kernels = cpu::kernels<A>();
    in_shares(chain.size(), bytes_ / chain.size() / sizeof(A), [&](int64_t begin, int64_t end) {
      for (int64_t l = begin; l < end; ++l) {
        const int64_t panels = (packed_[l].width + kernels.panel - 1) / kernels.panel;
        kernels.pack(chain.links[l].weight, transposed, (*this)[l], 0, panels);
      }
    });
  }

  bool fit() const { return fits_; }
  cpu::Packed operator[](int64_t l) const {
    cpu::Packed b = packed_[l];
    b.data = static_cast<char*>(memory_->data_ptr()) + offsets_[l];
    return b;
  }

 private:
  std::vector<cpu::Packed> packed_;
  std::vector<int64_t> offsets_;
  int64_t bytes_ = 0;
  bool fits_;
  Optional memory_;
};

// For a step whose pass multiplies by one weight: to be packed for it alone.
template <class A, class Pass>
void pack_alone(Step& step, Pass& pass, const Layer& c, bool transposed) {
  auto packed = std::make_shared<std::optional<PackedMatrix<A>>>();
  step.before = [&pass, &c, packed, transposed] {
    pass.weight = packed->emplace(c.weight, c.N, transposed).packed;
  };
  step.after = [packed, after = step.after] {
    packed->reset();
    if (after) after();
  };
}

}  // namespace fusedres
