// The table of one instruction set. A file that includes this says before which set it is for:
// FUSEDRES_ISA, FUSEDRES_VECTOR_BYTES, FUSEDRES_TILE_ROWS, FUSEDRES_TILE_VECTORS, FUSEDRES_TILE, and
// FUSEDRES_PAIRS where it multiplies bf16; and tells the compiler. What stands above that is
// compiled for every CPU: cpu/common.h.
#pragma once

#include "cpu/backward.h"
#include "cpu/forward.h"
#include "cpu/glu.h"

namespace fusedres::cpu::FUSEDRES_ISA {

template <class Unit>
inline int64_t bytes_of(const Packed& b) {
  return units<Unit>(b.inner) * round_up(b.width, Vector<Sum<Unit>>::kLanes) * sizeof(Unit);
}

template <class Unit>
inline void pack_units(const Rows& matrix, bool transposed, const Packed& b, int64_t begin,
                       int64_t end) {
  auto* const out = static_cast<Unit*>(b.data);
  if (transposed)
    pack_transposed(matrix, b.inner, b.width, out, begin, end);
  else
    pack_rows(matrix, 0, b.inner, b.width, out, begin, end);
}

// Calls f(Unit{}) for the units of a product in `dtype`.
template <class A, class F>
inline auto with_unit(DType dtype, F&& f) {
#ifdef FUSEDRES_PAIRS
  if constexpr (std::is_same_v<A, float>)
    if (dtype == DType::bfloat16 && multiplies_pairs()) return f(Pair{});
#endif
  return f(A{});
}

template <class A>
constexpr Kernels<A> table() {
  Kernels<A> k = {};
  k.forward = [](const Forward<A>& f, int64_t begin, int64_t end, double* statistics) {
    with_unit<A>(f.product,
                 [&](auto unit) { forward<A, decltype(unit)>(f, begin, end, statistics); });
  };
  k.backward = [](const Backward<A>& b, int64_t begin, int64_t end) {
    with_unit<A>(b.product, [&](auto unit) { backward<A, decltype(unit)>(b, begin, end); });
  };
  k.weight_gradient = [](const WeightGradient<A>& g, int64_t first, int64_t last, int64_t begin,
                         int64_t end) {
    with_unit<A>(g.product, [&](auto unit) {
      weight_gradient<A, decltype(unit)>(g, first, last, begin, end);
    });
  };
  k.add_parts = add_parts<A>;
  k.glu = glu<A>;
  k.pack = [](const Rows& matrix, bool transposed, const Packed& b, int64_t begin, int64_t end) {
    with_unit<A>(b.dtype,
                 [&](auto unit) { pack_units<decltype(unit)>(matrix, transposed, b, begin, end); });
  };
  k.packed_bytes = [](const Packed& b) {
    return with_unit<A>(b.dtype, [&](auto unit) { return bytes_of<decltype(unit)>(b); });
  };
  k.tile_rows = [](DType dtype) {
    return with_unit<A>(dtype, [](auto unit) { return tile_rows<decltype(unit)>(); });
  };
  k.panel = Vector<A>::kPanel;
  k.lanes = Vector<A>::kLanes;
  return k;
}

extern const Kernels<float> of_float = table<float>();
extern const Kernels<double> of_double = table<double>();

}  // namespace fusedres::cpu::FUSEDRES_ISA
