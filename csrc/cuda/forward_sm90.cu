// The forward of wide layers on Hopper in one launch: programs that stay, roles by warp. See
// schedule.h for when, roles_sm90.h for what.
#define FUSEDRES_APART __forceinline__  // a call would make `finish` spill
#include "cuda/roles_sm90.h"

namespace fusedres::cuda::sm90 {
namespace {

// Registers a thread, of the warpgroups that load and survey, finish, multiply: together no more
// than the four have at the start.
template <int kBlockN>
struct Registers {
  static constexpr bool kWide = kBlockN == 256;
  static constexpr int kLoad = 64, kFinish = kWide ? 128 : 160, kMultiply = kWide ? 160 : 128;
  static_assert(kLoad + kFinish + 2 * kMultiply <= 4 * kStartRegisters);
};

template <class T, int kBlockN>
__global__ __launch_bounds__(kBlockThreads, 1) void residual_forward_sm90_kernel(
    const __grid_constant__ Call call) {
  auto& shared = *static_cast<Shared<T, kBlockN>*>(shared_memory());
  auto& barriers = shared.barriers;
  const Schedule& schedule = call.schedule;
  const int warp = threadIdx.x / 32, block = blockIdx.x, blocks = gridDim.x;
  if (threadIdx.x == 0) {
    barriers.init(call.norm_before);
    fence_init();
  }
  sync_threads();
  if (call.norm_before) prepare<T>(call);

  if (warp < kFirstFinishWarp) {
    set_registers<Registers<kBlockN>::kLoad>();
    if (threadIdx.x == 0) {
      load_tiles(schedule, barriers, block, blocks, [&](TileAt tile, int k, int slot) {
        Barrier& filled = barriers.filled[slot];
        filled.arrive_and_expect(sizeof shared.x[slot] + sizeof shared.weight[slot]);
        load_box(call.x, filled, shared.x[slot], tile.row_block * kBlockM, k * kBlockK);
        load_box(call.weight, filled, shared.weight[slot], tile.column_tile * kBlockN, k * kBlockK);
      });
    } else if (warp >= kFirstSurveyWarp) {
      Survey<T, kBlockN> survey(call, shared);
      survey_tiles(
          schedule, barriers, block, blocks, call.norm_before,
          [&](int k, int slot) { survey.add(k, slot); },
          [&](TileAt tile) { survey.publish(tile); });
    }
  } else if (warp < kFirstMultiplyWarp) {
    set_registers<Registers<kBlockN>::kFinish>();
    const Finish<T, kBlockN> finish(call, shared);
    finish_tiles(schedule, barriers, block, blocks, call.shared_rows,
                 [&](TileAt tile, bool whole) { finish.run(tile, whole); });
  } else {
    set_registers<Registers<kBlockN>::kMultiply>();
    Multiplier<T, kBlockN> sums;
    multiply_tiles(
        schedule, barriers, block, blocks,
        [&](int k, int slot) { sums.start(shared.x[0], shared.weight[0], slot, k == 0); },
        [&] { sums.end(); }, [&] { park(shared, sums); });
  }
}

template <class T, int kBlockN>
const char* launch_tiles(Call& call, const Tile& tile, void* stream) {
  static_assert(sizeof(Shared<T, kBlockN>) == shared_bytes(kBlockN));
  const Layer& layer = call.layer;
  Matrix weight = layer.weight;
  if (call.norm_before && layer.norm_weight.data) weight = {call.out.partial, layer.K};
  const char* error = map_boxes(call.x, layer.x, layer.dtype, layer.M, layer.K, kBlockM);
  if (!error) error = map_boxes(call.weight, weight, layer.dtype, layer.N, layer.K, kBlockN);
  if (error) return error;
  const auto kernel = residual_forward_sm90_kernel<T, kBlockN>;
  return call.norm_before || call.shared_rows
             ? launch_together(kernel, tile.programs, kBlockThreads, tile.shared_bytes, stream,
                               call)
             : launch(kernel, tile.programs, kBlockThreads, tile.shared_bytes, stream, call);
}

}  // namespace
}  // namespace fusedres::cuda::sm90

namespace fusedres::cuda {

const char* residual_forward_sm90(const Layer& layer, const ForwardOut& out, const Tile& tile,
                                  void* stream) {
  if (const char* reason = sm90::why_not(layer)) return reason;
  sm90::Call call = {};
  call.layer = layer;
  call.out = out;
  call.schedule = sm90::make_schedule(layer, tile.block_n);
  call.epilogue = side_of(layer, false);
  call.add_at = position(layer.epilogue, Stage::add);
  call.norm_before = sm90::norm_before(layer);
  call.shared_rows = sm90::blocks_share_rows(layer, tile.block_n);
  if (call.shared_rows && call.schedule.column_tiles > tile.programs)
    return "more tiles in a row block than programs, which wait for each other";
  call.kept = call.shared_rows && !out.z.data ? out.y : out.z;
  const bool wide = tile.block_n == 256, half = layer.dtype == DType::float16;
  if (!wide && tile.block_n != 128) return "Hopper's tiles have 128 or 256 columns";
  if (half)
    return wide ? sm90::launch_tiles<float16, 256>(call, tile, stream)
                : sm90::launch_tiles<float16, 128>(call, tile, stream);
  return wide ? sm90::launch_tiles<bfloat16, 256>(call, tile, stream)
              : sm90::launch_tiles<bfloat16, 128>(call, tile, stream);
}

}  // namespace fusedres::cuda
