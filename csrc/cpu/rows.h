// Vectors, rows of any storage type, and a thread's scratch cut into pieces.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/storage.h"

namespace fusedres::cpu::FUSEDRES_ISA {

constexpr int64_t kTileRows = FUSEDRES_TILE_ROWS, kTileVectors = FUSEDRES_TILE_VECTORS;

template <class T>
struct Vector {
  static constexpr int64_t kLanes = FUSEDRES_VECTOR_BYTES / sizeof(T);
  static constexpr int64_t kPanel = kTileVectors * kLanes;
  typedef T Aligned __attribute__((vector_size(FUSEDRES_VECTOR_BYTES), may_alias));
  typedef T Anywhere
      __attribute__((vector_size(FUSEDRES_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <class T>
using Index = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;

// The constant vector {f(0), f(1), ...} that __builtin_shuffle takes beside vectors of T.
template <class T, class F, int... kLane>
FUSEDRES_INLINE auto lanes(F f, std::integer_sequence<int, kLane...>) {
  return typename Vector<Index<T>>::Aligned{static_cast<Index<T>>(f(kLane))...};
}
template <class T, class F>
FUSEDRES_INLINE auto lanes(F f) {
  return lanes<T>(f, std::make_integer_sequence<int, Vector<T>::kLanes>{});
}

// The lanes' sum, by halves: in order it would be as many additions that wait for each other.
template <class T, int kHalf = Vector<T>::kLanes / 2>
FUSEDRES_INLINE T total(typename Vector<T>::Aligned v) {
  if constexpr (kHalf == 0) {
    return v[0];
  } else {
    const auto other = lanes<T>([](int i) { return i ^ kHalf; });
    return total<T, kHalf / 2>(v + __builtin_shuffle(v, other));
  }
}

// Calls f(pointer to row m's first element), of its storage type; a double program's is double.
template <class A, class F>
inline void with_row(const Rows& rows, int64_t m, F&& f) {
  const int64_t offset = m * rows.stride;
  if constexpr (std::is_same_v<A, double>)
    f(static_cast<double*>(rows.data) + offset);
  else if (rows.dtype == DType::float32)
    f(static_cast<float*>(rows.data) + offset);
  else if (rows.dtype == DType::bfloat16)
    f(static_cast<bfloat16*>(rows.data) + offset);
  else
    f(static_cast<float16*>(rows.data) + offset);
}

// Those from row m on.
template <class A>
inline Rows rows_from(const Rows& rows, int64_t m) {
  Rows rest = rows;
  with_row<A>(rows, m, [&](auto* first) { rest.data = first; });
  return rest;
}

// Whether `T` is what is stored.
template <class T>
inline bool is_exact(DType dtype) {
  return std::is_same_v<T, double>  ? dtype == DType::float64
         : std::is_same_v<T, float> ? dtype == DType::float32
                                    : false;
}

// Whether rows of `n` elements may be worked on where they are stored: vectors do not reach over
// their ends.
template <class A>
inline bool can_hold(const Rows& rows, int64_t n) {
  return rows.data && is_exact<A>(rows.dtype) && n % Vector<A>::kLanes == 0;
}

// A block's rows: in scratch, or where they are stored in the end.
template <class A>
struct Block {
  A* scratch;
  int64_t stride;
  const Rows* stored = nullptr;

  Block(A* scratch, int64_t stride) : scratch(scratch), stride(stride) {}
  Block(const Rows& rows) : scratch(nullptr), stride(rows.stride), stored(&rows) {}
  A* at(int64_t first) const {
    return stored ? static_cast<A*>(stored->data) + first * stride : scratch;
  }
};

// Pieces of the scratch. There is one arena at a time in a thread.
class Arena {
 public:
  explicit Arena(int64_t bytes) : next_(static_cast<char*>(scratch(bytes + kPieces * kAlign))) {}
  template <class T>
  T* take(int64_t count) {
    T* const piece = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + kAlign - 1) / kAlign * kAlign;
    return piece;
  }

 private:
  static constexpr int64_t kAlign = 64, kPieces = 32;  // at most
  char* next_;
};

}  // namespace fusedres::cpu::FUSEDRES_ISA
