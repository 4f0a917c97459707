// The op fusedres::update_running_: batch norm's running statistics after a batch, in one call instead
// of torch's eight.
//
//   running = (1 - momentum) * running + momentum * batch
//
// rounded as torch's mul and add round: after each where running is of the batch's dtype, else once.
// Without momentum it is 1 / (batches so far). The variance that counts is M / (M - 1) times the
// batch's.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include <cmath>

#include "gradients.h"

namespace fusedres {
namespace {

template <class A>
void update(const A* batch, int64_t n, double scale, std::optional<double> momentum, double batches,
            const Vector& running) {
  const A average = static_cast<A>(1 / batches);
  with_storage(running, [&](auto* to) {
    for (int64_t i = 0; i < n; ++i) {
      auto& element = to[i * running.stride];
      const A kept = static_cast<A>(cpu::to_float(element));
      cpu::from_float(momentum
                          ? std::fma(static_cast<A>(scale * *momentum), batch[i],
                                     static_cast<A>(1 - *momentum) * kept)
                          : kept * (1 - average) + batch[i] * (static_cast<A>(scale) * average),
                      element);
    }
  });
}

void update_running(StableIValue* stack) {
  const Optional running[] = {to<Optional>(stack[0]), to<Optional>(stack[1])};
  const Optional tracked = to<Optional>(stack[2]);
  const Tensor batch = to<Tensor>(stack[3]);
  const int64_t rows = to<int64_t>(stack[4]);
  const std::optional<double> momentum = to<std::optional<double>>(stack[5]);
  STD_TORCH_CHECK(batch.is_cpu() && batch.dim() == 2 && batch.size(0) == 2 && batch.is_contiguous(),
                  "fusedres: batch statistics have shape ", shape_text(batch), ", expected (2, C)");
  STD_TORCH_CHECK(!tracked || (tracked->is_cpu() && tracked->numel() == 1 &&
                               type_of(*tracked) == ScalarType::Long),
                  "fusedres: num_batches_tracked must be one int64 on the CPU");
  STD_TORCH_CHECK(momentum || tracked, "fusedres: without momentum, num_batches_tracked is needed");
  const int64_t n = batch.size(1);
  int64_t* const count = tracked ? static_cast<int64_t*>(tracked->data_ptr()) : nullptr;
  for (int i = 0; i < 2; ++i)
    check_vector(i ? "running_var" : "running_mean", running[i], n, batch);
  for (int i = 0; i < 2 && rows > 1; ++i) {
    if (!running[i]) continue;
    const double scale = i ? static_cast<double>(rows) / static_cast<double>(rows - 1) : 1;
    const auto with = [&](auto* data) {
      update(data + i * n, n, scale, momentum, count ? *count + 1.0 : 1.0, vector_of(running[i]));
    };
    if (type_of(batch) == ScalarType::Double)
      with(static_cast<const double*>(batch.data_ptr()));
    else
      with(static_cast<const float*>(batch.data_ptr()));
  }
  if (count) ++*count;
}

}  // namespace
}  // namespace fusedres

STABLE_TORCH_LIBRARY_FRAGMENT(fusedres, m) {
  m.def(
      "update_running_(Tensor(a!)? running_mean, Tensor(b!)? running_var, "
      "Tensor(c!)? num_batches_tracked, Tensor batch, int rows, float? momentum) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(fusedres, CPU, m) {
  m.impl("update_running_", &fusedres::told<fusedres::update_running>);
}
