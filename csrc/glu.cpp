// The ops fusedres::glu_forward and fusedres::glu_backward on CPU tensors: gated linear units.
//
//   h = act(a) * b,   da = dh * b * act'(a),   db = dh * act(a),   all (M, H)
//
// In one pass over rows, each by itself, so that results do not depend on the number of threads.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "gradients.h"

namespace fusedres {
namespace {

void run(const cpu::Glu& g, int64_t M) {
  constexpr int64_t kCost = 8;  // of an element, in multiply-adds
  in_shares(M, kCost * g.a.features, [&](int64_t begin, int64_t end) {
    if (g.a.dtype == DType::float64)
      cpu::kernels<double>().glu(g, begin, end);
    else
      cpu::kernels<float>().glu(g, begin, end);
  });
}

cpu::Glu start(const Tensor& a, const Tensor& b, StableIValue activation) {
  cpu::Glu g;
  g.act = recipe("linear-act activation=" + take_text(to<StringHandle>(activation))).act;
  STD_TORCH_CHECK(a.is_cpu() && a.dim() == 2, "fusedres: a has shape ", shape_text(a),
                  ", expected (M, H) on the CPU");
  check_matrix("b", b, a.size(0), a.size(1), Common(a));
  g.a = rows_of(a);
  g.b = rows_of(b);
  return g;
}

void glu_forward(StableIValue* stack) {
  const Tensor a = adjacent_columns(to<Tensor>(stack[0]));
  const Tensor b = adjacent_columns(to<Tensor>(stack[1]));
  cpu::Glu g = start(a, b, stack[2]);
  const Tensor h = empty({a.size(0), a.size(1)}, a);
  g.h = rows_of(h);
  run(g, a.size(0));
  stack[0] = from(h);
}

// dz (M, 2 H) = [da, db], or [db, da].
void glu_backward(StableIValue* stack) {
  const Tensor dh = adjacent_columns(to<Tensor>(stack[0]));
  const Tensor a = adjacent_columns(to<Tensor>(stack[1]));
  const Tensor b = adjacent_columns(to<Tensor>(stack[2]));
  cpu::Glu g = start(a, b, stack[3]);
  const bool db_first = to<bool>(stack[4]);
  check_matrix("dh", dh, a.size(0), a.size(1), Common(a));
  const Tensor dz = empty({a.size(0), 2 * a.size(1)}, a);
  g.dh = rows_of(dh);
  Rows first = rows_of(dz);
  first.features = a.size(1);
  Rows second = first;
  second.data = static_cast<char*>(second.data) + first.features * dz.element_size();
  g.da = db_first ? second : first;
  g.db = db_first ? first : second;
  if (dh.numel()) run(g, a.size(0));
  stack[0] = from(dz);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def("glu_forward(Tensor a, Tensor b, str activation) -> Tensor");
  m.def("glu_backward(Tensor dh, Tensor a, Tensor b, str activation, bool db_first) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("glu_forward", &fusedres::told<fusedres::glu_forward>);
  m.impl("glu_backward", &fusedres::told<fusedres::glu_backward>);
}
