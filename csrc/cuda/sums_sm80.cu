// Second launch of backward: dweight and the sums over rows, by programs of two kinds.
#include "cuda/dispatch.h"
#include "cuda/dweight_sm80.h"
#include "cuda/sums.h"

namespace fusedres::cuda {
namespace {

template <class T>
__global__ __launch_bounds__(kThreads, 2) void residual_sums_sm80_kernel(
    const __grid_constant__ SumsCall<T> call) {
  const SumsCut& cut = call.cut;
  const int program = blockIdx.x, after = program - cut.tiles * cut.parts;
  const int before = after - cut.blocks[0] * cut.sum_parts;
  if (after < 0)
    WeightTile<T>(call, program).run();
  else
    ColumnSums<T>(call, before < 0 ? 0 : 1, before < 0 ? after : before).run();
}

}  // namespace

const char* residual_sums_sm80(const Layer& layer, const SumsOut& out, const Tile& tile,
                               void* stream) {
  const BackwardOut& from = out.from;
  return with_element(layer.dtype, [&](auto type) {
    using T = decltype(type);
    SumsCall<T> call = {};
    call.layer = layer;
    call.out = out;
    call.cut = cut_of(layer, out, tile);
    call.dz = rows_of<T>(walks_z(layer) ? from.dz : from.dy);
    call.dweight = rows_of<T>(out.dweight);
    call.x = casts_x(layer) ? out.operand : layer.x;
    call.casts = layer.prologue.count > 0 && layer.x_dtype != layer.dtype;
    call.input[0] = rows_of<T>(from.z, layer.dtype);
    call.input[1] = rows_of<T>(layer.x, layer.x_dtype);
    call.gradient[0] = rows_of<T>(from.dy, layer.y_dtype);
    call.gradient[1] = rows_of<T>(from.dt, layer.dtype);
    for (int side = 0; side < 2; ++side) {
      call.sides[side] = side_of(layer, side == 1);
      call.wanted[side] = wanted_sums(layer, out, side == 1);
      call.stop[side] = call.wanted[side].stop(call.sides[side].stages);
    }
    if (call.cut.parts > 1 && call.cut.tiles > 0) call.sums_from = layer.N * layer.K * tile.parts;
    return launch(residual_sums_sm80_kernel<T>, tile.programs, kThreads, tile.shared_bytes, stream,
                  call);
  });
}

}  // namespace fusedres::cuda
