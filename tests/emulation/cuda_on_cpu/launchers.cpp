// The launchers and the planner of csrc/cuda for ctypes.
#include <cstddef>

#include "cuda/plan.h"

using namespace fusedres::cuda;

// What a launch is planned for. Sizes that are not 0 are taken in place of the planner's.
struct Device {
  int multiprocessors, shared_limit, block_m, block_n, groups, parts, sum_parts;

  // One program for each tile of `columns`, or as few as asked for where they `walk`.
  int64_t groups_of(int64_t columns, bool walk) const {
    const int64_t tiles = ceil_div(columns, block_n);
    return walk && groups ? std::min<int64_t>(groups, tiles) : tiles;
  }
};

extern "C" {

// sizeof each struct and where its last field stands, so that structs.py can check its mirror.
void layouts(size_t* out) {
  const size_t values[] = {
      sizeof(Stages),      offsetof(Stages, count),
      sizeof(Vector),      offsetof(Vector, dtype),
      sizeof(Matrix),      offsetof(Matrix, stride),
      sizeof(Layer),       offsetof(Layer, drop_path_scale),
      sizeof(Tile),        offsetof(Tile, counters),
      sizeof(ForwardOut),  offsetof(ForwardOut, arrived),
      sizeof(BackwardOut), offsetof(BackwardOut, arrived),
      sizeof(SumsOut),     offsetof(SumsOut, arrived),
  };
  for (size_t value : values) *out++ = value;
}

const char* refusal(const Layer& layer, int shared_limit, bool gradients) {
  return why_not(layer, shared_limit, gradients);
}
bool wants_row_means(const Layer& layer) { return needs_row_means(layer); }

// The planner's tile, or one of a size asked for.
void plan_of_forward(const Layer& layer, const ForwardOut&, const Device& device, Tile* tile) {
  *tile = device.block_m ? cut_forward(layer, {device.block_m, device.block_n},
                                       device.groups_of(layer.N, walks_x(layer)))
                         : plan_forward(layer, device.multiprocessors, device.shared_limit);
}
void plan_of_backward(const Layer& layer, const BackwardOut& out, const Device& device,
                      Tile* tile) {
  *tile = device.block_m ? cut_backward(layer, out, {device.block_m, device.block_n},
                                        device.groups_of(layer.K, walks_z(layer)))
                         : plan_backward(layer, out, device.multiprocessors, device.shared_limit);
}
void plan_of_sums(const Layer& layer, const SumsOut& out, const Device& device, Tile* tile) {
  *tile = device.parts ? cut_sums(layer, out, device.parts, device.sum_parts)
                       : plan_sums(layer, out, device.multiprocessors);
}

const char* forward(const Layer& layer, const ForwardOut& out, const Tile& tile) {
  return residual_forward_sm80(layer, out, tile, nullptr);
}
const char* backward(const Layer& layer, const BackwardOut& out, const Tile& tile) {
  return residual_backward_sm80(layer, out, tile, nullptr);
}
const char* sums(const Layer& layer, const SumsOut& out, const Tile& tile) {
  return residual_sums_sm80(layer, out, tile, nullptr);
}

}  // extern "C"
