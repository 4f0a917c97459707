// A chain's values, matrices of M rows, in few pieces of memory: a torch tensor for each link would cost
// as much as a narrow link's work.
#pragma once

#include "side.h"

namespace fusedres {

// What forward keeps for backward.
enum class Keep { nothing, all, inputs };

inline Keep keep_of(int64_t keep) {
  STD_TORCH_CHECK(keep >= 0 && keep <= 2, "fusedres: keep must be 0, 1 or 2, got ", keep);
  return static_cast<Keep>(keep);
}

// Which of few pieces of memory each of many values has: one that no value needs any longer.
struct Turns {
  struct Life {
    int64_t begin, end;  // steps; one that ends before it begins needs none
  };
  std::vector<int64_t> of;  // -1: none
  int64_t count = 0;

  explicit Turns(const std::vector<Life>& lives) : of(lives.size(), -1) {
    std::vector<size_t> order;
    for (size_t i = 0; i < lives.size(); ++i)
      if (lives[i].begin <= lives[i].end) order.push_back(i);
    const auto earlier = [&](size_t a, size_t b) { return lives[a].begin < lives[b].begin; };
    if (!std::is_sorted(order.begin(), order.end(), earlier))
      std::stable_sort(order.begin(), order.end(), earlier);
    std::vector<int64_t> last;  // step that needs each piece
    for (const size_t i : order) {
      int64_t slot = 0;
      while (slot < count && last[slot] >= lives[i].begin) ++slot;
      if (slot == count) {
        last.push_back(0);
        ++count;
      }
      last[slot] = lives[i].end;
      of[i] = slot;
    }
  }
};

template <class A>
constexpr DType exact() {
  return std::is_same_v<A, double> ? DType::float64 : DType::float32;
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2;
}

// A matrix's columns, 0 if there is none, and what they are.
struct Width {
  int64_t columns;
  DType dtype;
};

// Matrices of M rows one after the other, in pieces of memory, each of one dtype. fusedres/chain.py
// knows the rule.
class Store {
 public:
  Store(int64_t M, const std::vector<Width>& widths) : M_(M) {
    // So that a piece is of a size that the system does not take back at once; and no function of M,
    // which may be a symbol where torch traces.
    constexpr int64_t kColumns = 1024;
    at_.reserve(widths.size());
    for (const Width& w : widths) {
      size_t& open = open_[static_cast<size_t>(w.dtype)];
      if (w.columns > 0 && (!open || pieces_[open - 1].columns + w.columns > kColumns)) {
        pieces_.push_back({0, w.dtype});
        open = pieces_.size();
      }
      at_.push_back({open ? open - 1 : 0, open ? M * pieces_[open - 1].columns : 0, w});
      if (w.columns > 0) pieces_[open - 1].columns += w.columns;
    }
  }

  size_t pieces() const { return pieces_.size(); }

  void allocate() {
    for (const Width& piece : pieces_) keep(empty({M_ * piece.columns}, scalar_type(piece.dtype)));
  }

  // Takes them from `given`; returns where they end.
  size_t adopt(const std::vector<Tensor>& given, size_t first) {
    for (const Width& piece : pieces_) {
      const int64_t elements = M_ * piece.columns;
      STD_TORCH_CHECK(first < given.size() && given[first].numel() == elements &&
                          given[first].is_contiguous() && given[first].is_cpu() &&
                          type_of(given[first]) == scalar_type(piece.dtype),
                      "fusedres: saved tensor ", first, " does not fit, expected ", elements,
                      " elements");
      keep(given[first++]);
    }
    return first;
  }

  Rows operator[](int64_t i) const { return first(i, at_[i].width.columns, at_[i].width.dtype); }

  // Matrix i's memory for another one, no wider: its rows begin where matrix i's do, so that rows of
  // several that take turns never overlap.
  Rows first(int64_t i, int64_t columns, DType dtype) const {
    const Place& at = at_[i];
    if (at.width.columns == 0) return {};
    const int64_t item = bytes_of(at.width.dtype);
    return {data_[at.piece] + at.offset * item, at.width.columns * item / bytes_of(dtype), columns,
            dtype};
  }

  void append_to(std::vector<Tensor>& list) const {
    list.insert(list.end(), memory_.begin(), memory_.end());
  }

 private:
  struct Place {
    size_t piece;
    int64_t offset;
    Width width;
  };

  void keep(const Tensor& piece) {
    memory_.push_back(piece);
    data_.push_back(static_cast<char*>(piece.data_ptr()));
  }

  int64_t M_;
  std::vector<Width> pieces_;
  size_t open_[4] = {};  // for each dtype, the piece that is being filled, from 1 on
  std::vector<Place> at_;
  std::vector<Tensor> memory_;
  std::vector<char*> data_;
};

}  // namespace fusedres
