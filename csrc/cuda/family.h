// Which family of kernels runs a layer's forward on a GPU. On the host.
#pragma once

#include "cuda/plan.h"
#include "cuda/schedule.h"
#include "epilogue.h"

namespace fusedres::cuda {

struct Device {
  int multiprocessors;
  int shared_limit;  // bytes of shared memory that a block may have
  int major, minor;  // compute capability
};

constexpr int kWideColumns = 256;  // from here on a Hopper tile is no wider than the rows

inline bool built_for_hopper() {
#ifdef FUSEDRES_SM90
  return true;
#else
  return false;
#endif
}

// Hopper's family stays on all multiprocessors with tiles of 128 rows: that takes wide rows, and
// enough of them; but none of more tiles than can be in work at once, as these may wait for each
// other (schedule.h).
inline bool on_hopper(const Layer& layer, const Device& device) {
  return built_for_hopper() && device.major == 9 && layer.N >= kWideColumns &&
         ceil_div(layer.N, 256) <= device.multiprocessors &&
         ceil_div(layer.M, sm90::kBlockM) * ceil_div(layer.N, 256) >= device.multiprocessors &&
         sm90::why_not(layer) == nullptr;
}

// The layer of a recipe and sizes, without a tensor.
inline Layer layer_of(const Recipe& r, DType dtype, int64_t M, int64_t N, int64_t K) {
  Layer layer = {};
  layer.dtype = dtype;
  layer.x_dtype = r.x_dtype.value_or(dtype);
  layer.residual_dtype = r.residual_dtype.value_or(layer.x_dtype);
  layer.y_dtype = r.y_dtype.value_or(dtype);
  layer.M = M;
  layer.N = N;
  layer.K = K;
  layer.sample_rows = 1;
  for (const bool prologue : {true, false}) {
    Stages& to = prologue ? layer.prologue : layer.epilogue;
    for (const Stage stage : prologue ? r.prologue : r.epilogue) to.stage[to.count++] = stage;
  }
  layer.norm = r.norm;
  layer.act = r.act;
  layer.scalar_gate = r.scalar_gate;
  layer.eps = static_cast<float>(r.eps);
  layer.residual_scale = static_cast<float>(r.residual_scale);
  layer.dropout = drop_threshold(r.dropout);
  layer.drop_path = drop_threshold(r.drop_path);
  layer.dropout_scale = static_cast<float>(keep_scale(r.dropout));
  layer.drop_path_scale = static_cast<float>(keep_scale(r.drop_path));
  return layer;
}

}  // namespace fusedres::cuda
