// The launcher and the planner of the Hopper family for ctypes, under the names of launchers.cpp.
#include "cuda/schedule.h"

using namespace fusedres::cuda;

struct Device {
  int multiprocessors, shared_limit, block_m, block_n, groups, parts, sum_parts;
};

extern "C" {

const char* refusal(const Layer& layer, int, bool) { return sm90::why_not(layer); }
void plan_of_forward(const Layer& layer, const ForwardOut&, const Device& device, Tile* tile) {
  *tile = device.block_n ? sm90::cut_forward(layer, device.block_n, device.multiprocessors)
                         : sm90::plan_forward(layer, device.multiprocessors);
}
const char* forward(const Layer& layer, const ForwardOut& out, const Tile& tile) {
  return residual_forward_sm90(layer, out, tile, nullptr);
}

}  // extern "C"
