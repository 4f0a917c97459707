// y = stages(input), row by row: each row is read once, stays in L1 while every stage acts on it, and is written once.
#include <vector>

#include "cpu/rows.h"
#include "cpu/stages.h"

namespace fusedres::cpu {
namespace {

template <class T, class A>
FUSEDRES_SIMD_CLONES void forward_typed(const Program<A>& p, const Rows& y, int64_t begin, int64_t end, A* t) {
  for (int64_t m = begin; m < end; ++m) {
    load_row(row<const T>(p.input, m), t, p.width);
    for (Stage stage : *p.stages) forward_stage<T, A, false>(p, stage, m, t, t, nullptr);
    store_row(t, row<T>(y, m), p.width);
  }
}

// t = what reaches the norm in row m
template <class T, class A>
inline void before_norm(const Program<A>& p, int64_t m, A* t) {
  load_row(row<const T>(p.input, m), t, p.width);
  for (Stage stage : *p.stages) {
    if (stage == Stage::norm) break;
    forward_stage<T, A, false>(p, stage, m, t, t, nullptr);
  }
}

// Adds up d and d^2, d = t - shift, in double.
template <class T, class A>
FUSEDRES_SIMD_CLONES void statistics_typed(const Program<A>& p, const A* shift, double* sums, double* squares,
                                           int64_t begin, int64_t end, A* t) {
  for (int64_t m = begin; m < end; ++m) {
    before_norm<T>(p, m, t);
#pragma omp simd
    for (int64_t i = 0; i < p.width; ++i) {
      const double d = static_cast<double>(t[i]) - static_cast<double>(shift[i]);
      sums[i] += d;
      squares[i] += d * d;
    }
  }
}

}  // namespace

template <class A>
void forward_rows(const Program<A>& p, const Rows& y, int64_t begin, int64_t end) {
  std::vector<A> t(p.width);
  with_storage<A>(p.dtype, [&](auto v) { forward_typed<decltype(v), A>(p, y, begin, end, t.data()); });
}

template <class A>
void row_before_norm(const Program<A>& p, int64_t m, A* t) {
  with_storage<A>(p.dtype, [&](auto v) { before_norm<decltype(v)>(p, m, t); });
}

template <class A>
void column_statistics(const Program<A>& p, const A* shift, double* sums, double* squares, int64_t begin, int64_t end) {
  std::vector<A> t(p.width);
  with_storage<A>(p.dtype, [&](auto v) {
    statistics_typed<decltype(v), A>(p, shift, sums, squares, begin, end, t.data());
  });
}

template void forward_rows<float>(const Program<float>&, const Rows&, int64_t, int64_t);
template void forward_rows<double>(const Program<double>&, const Rows&, int64_t, int64_t);
template void row_before_norm<float>(const Program<float>&, int64_t, float*);
template void row_before_norm<double>(const Program<double>&, int64_t, double*);
template void column_statistics<float>(const Program<float>&, const float*, double*, double*, int64_t, int64_t);
template void column_statistics<double>(const Program<double>&, const double*, double*, double*, int64_t, int64_t);

}  // namespace fusedres::cpu
