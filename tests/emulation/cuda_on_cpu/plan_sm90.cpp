// The planner of the Hopper family for ctypes.
#include "cuda/schedule.h"

using namespace fusedres;
using namespace fusedres::cuda;

// The cut for rows of fp16: block_n, programs, shared memory, floats, counters. nullptr, or why not.
extern "C" const char* plan_sm90(int64_t M, int64_t N, int64_t K, bool norm_first, int norm,
                                 int multiprocessors, int64_t* out) {
  Layer layer = {};
  layer.dtype = layer.x_dtype = layer.residual_dtype = layer.y_dtype = DType::float16;
  layer.M = M, layer.N = N, layer.K = K;
  layer.x.stride = layer.weight.stride = K;
  layer.norm = static_cast<Norm>(norm);
  (norm_first ? layer.prologue : layer.epilogue) = {{Stage::norm}, norm ? 1 : 0};
  const Tile tile = sm90::plan_forward(layer, multiprocessors);
  out[0] = tile.block_n, out[1] = tile.programs, out[2] = tile.shared_bytes;
  out[3] = tile.partial_floats, out[4] = tile.counters;
  return sm90::why_not(layer);
}
