// The ops fusedres::glu_forward and fusedres::glu_backward on CPU tensors: gated linear units.
//
//   h = act(a) * b,   da = dy * b * act'(a),   db = dy * act(a),   z = [a, b] (M, 2 H)
//
// In one pass over rows, each by itself, so that results do not depend on the number of threads.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "gradients.h"

namespace fusedres {
namespace {

Rows half_of(const Tensor& z, bool second) {
  Rows rows = rows_of(z);
  rows.features = z.size(1) / 2;
  const int64_t bytes = rows.dtype == DType::float64 ? 8 : rows.dtype == DType::float32 ? 4 : 2;
  if (second) rows.data = static_cast<char*>(rows.data) + rows.features * bytes;
  return rows;
}

void run(const cpu::Glu& g, int64_t M) {
  constexpr int64_t kCost = 8;  // of an element, in multiply-adds
  in_shares(M, kCost * g.a.features, [&](int64_t begin, int64_t end) {
    if (g.a.dtype == DType::float64)
      cpu::kernels<double>().glu(g, begin, end);
    else
      cpu::kernels<float>().glu(g, begin, end);
  });
}

cpu::Glu start(const Tensor& z, StableIValue activation) {
  cpu::Glu g;
  g.act = recipe("linear-act activation=" + take_text(to<StringHandle>(activation))).act;
  STD_TORCH_CHECK(z.is_cpu() && z.dim() == 2 && z.size(1) % 2 == 0, "fusedres: z has shape ",
                  shape_text(z), ", expected (M, 2 H) on the CPU");
  g.a = half_of(z, false);
  g.b = half_of(z, true);
  return g;
}

void glu_forward(StableIValue* stack) {
  const Tensor z = adjacent_columns(to<Tensor>(stack[0]));
  cpu::Glu g = start(z, stack[1]);
  const Tensor h = empty({z.size(0), g.a.features}, z);
  g.h = rows_of(h);
  run(g, z.size(0));
  stack[0] = from(h);
}

void glu_backward(StableIValue* stack) {
  const Tensor dy = adjacent_columns(to<Tensor>(stack[0]));
  const Tensor z = adjacent_columns(to<Tensor>(stack[1]));
  cpu::Glu g = start(z, stack[2]);
  check_matrix("dy", dy, z.size(0), g.a.features, Common(z));
  const Tensor dz = empty({z.size(0), z.size(1)}, z);
  g.dy = rows_of(dy);
  g.da = half_of(dz, false);
  g.db = half_of(dz, true);
  if (dy.numel()) run(g, z.size(0));
  stack[0] = from(dz);
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def("glu_forward(Tensor z, str activation) -> Tensor");
  m.def("glu_backward(Tensor dy, Tensor z, str activation) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("glu_forward", &fusedres::told<fusedres::glu_forward>);
  m.impl("glu_backward", &fusedres::told<fusedres::glu_backward>);
}
