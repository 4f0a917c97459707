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

// Welford: after k rows, mean is their mean and m2 the sum of squared distances from it.
template <class T, class A>
FUSEDRES_SIMD_CLONES void statistics_typed(const Program<A>& p, A* mean, A* m2, int64_t begin, int64_t end, A* t) {
  for (int64_t m = begin; m < end; ++m) {
    load_row(row<const T>(p.input, m), t, p.width);
    for (Stage stage : *p.stages) {
      if (stage == Stage::norm) break;
      forward_stage<T, A, false>(p, stage, m, t, t, nullptr);
    }
    const A weight = A(1) / static_cast<A>(m - begin + 1);
    for (int64_t i = 0; i < p.width; ++i) {
      const A delta = t[i] - mean[i];
      mean[i] += delta * weight;
      m2[i] += delta * (t[i] - mean[i]);
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
void column_statistics(const Program<A>& p, A* mean, A* m2, int64_t begin, int64_t end) {
  std::vector<A> t(p.width);
  with_storage<A>(p.dtype, [&](auto v) { statistics_typed<decltype(v), A>(p, mean, m2, begin, end, t.data()); });
}

template void forward_rows<float>(const Program<float>&, const Rows&, int64_t, int64_t);
template void forward_rows<double>(const Program<double>&, const Rows&, int64_t, int64_t);
template void column_statistics<float>(const Program<float>&, float*, float*, int64_t, int64_t);
template void column_statistics<double>(const Program<double>&, double*, double*, int64_t, int64_t);

}  // namespace fusedres::cpu
