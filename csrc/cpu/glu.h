// Rows [begin, end) of a gated linear unit, forward or backward: each is read and written once.
#pragma once

#include "cpu/stages.h"

namespace fusedres::cpu::FUSEDRES_ISA {

template <class A>
inline void multiply_rows(A* t, const A* by, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t[i] *= by[i];
}

template <class A>
inline void glu(const Glu& g, int64_t begin, int64_t end) {
  const int64_t n = g.a.features;
  Arena arena(4 * n * sizeof(A));
  A *const a = arena.take<A>(n), *const b = arena.take<A>(n), *const t = arena.take<A>(n),
           *const d = arena.take<A>(n);
  for (int64_t m = begin; m < end; ++m) {
    load_row(g.a, m, a, n);
    load_row(g.b, m, b, n);
    activate(g.act, a, t, n);
    if (!g.dh.data) {
      multiply_rows(t, b, n);
      store_row(t, g.h, m, n);
      continue;
    }
    load_row(g.dh, m, d, n);
    multiply_rows(t, d, n);
    store_row(t, g.db, m, n);
    multiply_rows(d, b, n);
    activate_grad(g.act, d, a, n);
    store_row(d, g.da, m, n);
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
