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
    int64_t begin, end;  // steps; begins go up
  };
  std::vector<int64_t> of;
  int64_t count = 0;

  explicit Turns(const std::vector<Life>& lives) {
    std::vector<int64_t> free_from;
    for (const Life& life : lives) {
      int64_t slot = 0;
      while (slot < count && free_from[slot] >= life.begin) ++slot;
      if (slot == count) {
        free_from.push_back(0);
        ++count;
      }
      free_from[slot] = life.end;
      of.push_back(slot);
    }
  }
};

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

  void allocate(DType dtype) {
    for (const int64_t columns : pieces_) keep(empty({M_ * columns}, scalar_type(dtype)), dtype);
  }

  // Takes them from `given`; returns where they end.
  size_t adopt(const std::vector<Tensor>& given, size_t first, DType dtype) {
    for (const int64_t columns : pieces_) {
      STD_TORCH_CHECK(first < given.size() && given[first].numel() == M_ * columns &&
                          given[first].is_contiguous() && given[first].is_cpu() &&
                          given[first].scalar_type() == scalar_type(dtype),
                      "fusedres: saved tensor ", first, " does not fit, expected ", M_ * columns,
                      " elements");
      keep(given[first++], dtype);
    }
    return first;
  }

  Rows operator[](int64_t i) const { return first(i, at_[i].columns); }

  // Matrix i's first columns.
  Rows first(int64_t i, int64_t columns) const {
    const Place& at = at_[i];
    return {data_[at.piece] + at.offset * item_, at.columns, columns, dtype_};
  }

  void append_to(std::vector<Tensor>& list) const {
    list.insert(list.end(), memory_.begin(), memory_.end());
  }

 private:
  struct Place {
    int64_t piece, offset, columns;
  };

  void keep(const Tensor& piece, DType dtype) {
    dtype_ = dtype;
    item_ = piece.element_size();
    memory_.push_back(piece);
    data_.push_back(static_cast<char*>(piece.data_ptr()));
  }

  int64_t M_, item_ = 0;
  DType dtype_ = DType::float32;
  std::vector<int64_t> pieces_;  // columns
  std::vector<Place> at_;
  std::vector<Tensor> memory_;
  std::vector<char*> data_;
};

}  // namespace fusedres
