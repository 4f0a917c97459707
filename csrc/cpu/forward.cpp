// y = stages(input), row by row: each row is read once, stays in L1 while every stage acts on it,
// and is written once.
#include <vector>

#include "cpu/rows.h"
#include "cpu/stages.h"

namespace fusedres::cpu {
namespace {

// What becomes of a row when its stages are done: stored, or added up about `shift` in double.
template <class A>
struct Sink {
  const Rows* y = nullptr;
  const A* shift = nullptr;
  double *sums = nullptr, *squares = nullptr;
};

template <class A>
FUSEDRES_SIMD_CLONES void run(const Program<A>& p, size_t stages, const Sink<A>& sink,
                              int64_t begin, int64_t end, A* t) {
  for (int64_t m = begin; m < end; ++m) {
    load_input(p, m, t);
    for (size_t i = 0; i < stages; ++i)
      forward_stage<A, false>(p, (*p.stages)[i], m, t, t, nullptr);
    if (sink.y) {
      store_row(t, *sink.y, m, p.width);
      continue;
    }
#pragma omp simd
    for (int64_t i = 0; i < p.width; ++i) {
      const double d = static_cast<double>(t[i]) - static_cast<double>(sink.shift[i]);
      sink.sums[i] += d;
      sink.squares[i] += d * d;
    }
  }
}

}  // namespace

template <class A>
void forward_rows(const Program<A>& p, const Rows& y, int64_t begin, int64_t end) {
  std::vector<A> t(p.width);
  Sink<A> sink;
  sink.y = &y;
  run(p, p.stages->size(), sink, begin, end, t.data());
}

template <class A>
void column_statistics(const Program<A>& p, const A* shift, double* sums, double* squares,
                       int64_t begin, int64_t end) {
  std::vector<A> t(p.width);
  const size_t norm =
      std::find(p.stages->begin(), p.stages->end(), Stage::norm) - p.stages->begin();
  run(p, norm, Sink<A>{nullptr, shift, sums, squares}, begin, end, t.data());
}

template void forward_rows<float>(const Program<float>&, const Rows&, int64_t, int64_t);
template void forward_rows<double>(const Program<double>&, const Rows&, int64_t, int64_t);
template void column_statistics<float>(const Program<float>&, const float*, double*, double*,
                                       int64_t, int64_t);
template void column_statistics<double>(const Program<double>&, const double*, double*, double*,
                                        int64_t, int64_t);

}  // namespace fusedres::cpu
