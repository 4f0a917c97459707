// Rows of any storage type, and a thread's scratch cut into pieces.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/storage.h"

namespace fusedres::cpu::FUSEDRES_ISA {

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
