// A whole layer in one launch: z = prologue(x) @ weight.T + bias ; y = epilogue(z).
//
// A program owns `size.m` rows, and of their tiles of `size.n` columns one, or each `groups`-th.
// Stages before `linear` transform its rows of x in shared memory, the product streams the weight
// past them, and its result goes through shared memory once more, to be finished row by row. Where a
// norm after `linear` sees rows that several programs share, each stores its part of z and of the
// rows' moments, and the last to arrive finishes them.
#include "cuda/dispatch.h"
#include "cuda/product_sm80.h"
#include "cuda/rows.h"

namespace fusedres::cuda {
namespace {

struct ForwardCall {
  Layer layer;
  ForwardOut out;
  Side prologue, epilogue;
  BlockSize size;  // of a tile
  int tiles;       // of columns
  int groups;      // programs that share them
  int steps;       // along K
  bool walks;      // rows of x are made for the product,
  bool casts;      // of another dtype
};

template <class T, int kAtOnce>
struct Forward {
  static constexpr int kLineStride = kStride<T, kBlockK<T>>;

  const ForwardCall& call;
  const Layer& layer;
  BlockSize size;
  int64_t block;  // of rows
  int group;      // the program's among those of the block
  int64_t m0;
  int tile, n0;   // of columns
  T *x, *weight;  // in shared memory: x by blocks of kBlockK columns
  float* z;       // [size.m, size.n + kTilePad], in the weight's place once the product is done

  __device__ __forceinline__ explicit Forward(const ForwardCall& c)
      : call(c),
        layer(c.layer),
        size(c.size),
        block(blockIdx.x / c.groups),
        group(blockIdx.x % c.groups),
        m0(block * size.m),
        tile(group),
        n0(tile * size.n),
        x(static_cast<T*>(static_cast<void*>(shared_memory()))),
        weight(x + (c.walks ? c.steps : kDepth) * panel()),
        z(static_cast<float*>(static_cast<void*>(weight))) {}

  __device__ __forceinline__ Place place(int row, int n, int width) const {
    return {m0 + row, n, width, m0 + row < layer.M};
  }

  __device__ __forceinline__ int panel() const { return size.m * kLineStride; }  // a block of x

  // ---- the product

  __device__ __forceinline__ bool streamed() const { return !call.walks; }
  __device__ __forceinline__ bool to_transform() const { return !streamed() && tile == group; }

  __device__ __forceinline__ void copy_x(int step, int slot, int rows) const {
    const Source<T> from = source<T>(layer.x, layer.M, layer.K);
    copy_tile(x + slot * rows * kLineStride, from, m0, step * kBlockK<T>, rows, kBlockK<T>);
  }

  __device__ __forceinline__ void copy(int step, BlockSize tile_size) const {
    if (streamed()) copy_x(step, step % kDepth, tile_size.m);
    const Source<T> from = source<T>(layer.weight, layer.N, layer.K);
    copy_tile(weight + step % kDepth * tile_size.n * kLineStride, from, n0, step * kBlockK<T>,
              tile_size.n, kBlockK<T>);
  }

  // x = prologue(x), in place; from memory where x has another dtype. Columns past K are 0.
  __device__ __forceinline__ void transform_x() const {
    const Side& side = call.prologue;
    const Stages& stages = side.stages;
    const MixedRows<T> from = rows_of<T>(layer.x, layer.x_dtype);
    const Rows<T> operand = rows_of<T>(call.out.operand);
    const Team team = team_of(side.width);
    for (int r = team.row; r < size.m; r += team.rows) {
      Place at = place(r, 0, side.width);
      const auto strip = [&](int k) {
        return x + k / kBlockK<T> * panel() + r * kLineStride + k % kBlockK<T>;
      };
      RowStats row = {0.0f, 0.0f};
      const auto through = [&](int k, int last) {
        at.n = k;
        const Strip t = call.casts ? load(from, at) : load_packed(strip(k));
        return run_stages<T>(layer, stages, 0, last, at, t, row);
      };
      if (side.over_rows) {
        const auto before = [&](int k) { return through(k, side.norm_at); };
        row = stats_of(layer, moments(team, side.width, layer.norm == Norm::layer, before),
                       side.width);
        if (group == 0) store_stats(call.out.stats, layer, team, at, row);
      }
      for (int k = team.lane * kStrip; k < call.steps * kBlockK<T>; k += team.size * kStrip) {
        const Strip out = through(k, stages.count);
        store_packed(strip(k), inside(at, out));
        if (group == 0 && operand.data) store(operand, at, out);
      }
    }
  }

  // ---- what follows it

  // The rows of the tile: as far as the program can take them alone.
  __device__ __forceinline__ void finish_tile(bool shared_rows) const {
    const Side& side = call.epilogue;
    const Stages& stages = side.stages;
    const MixedRows<T> y = rows_of<T>(call.out.y, layer.y_dtype), kept = stored_z(shared_rows);
    const Team team = team_of(size.n);
    const int norm = side.over_rows ? side.norm_at : stages.count;
    const int n = team.lane * kStrip, width = side.width - n0 < size.n ? side.width - n0 : size.n;
    for (int r = team.row; r < size.m; r += team.rows) {
      const Place at = place(r, n0 + n, side.width);
      float* strip = z + r * (size.n + kTilePad) + n;
      // A norm and its backward must see the same values.
      Strip t = as_stored<T>(plus(load_packed(strip), load(layer.bias, at, 0.0f)));
      if (kept.data) store(kept, at, t);
      t = run_stages<T>(layer, stages, 0, norm, at, t, {});
      RowStats row = {0.0f, 0.0f};
      if (side.over_rows) {
        const Moments part =
            moments(team, width, layer.norm == Norm::layer, [&](int) { return t; });
        if (shared_rows) {
          store_part(team, at, part);
          continue;
        }
        row = stats_of(layer, part, side.width);
        store_stats(call.out.stats, layer, team, at, row);
      }
      store(y, at, run_stages<T>(layer, stages, norm, stages.count, at, t, row));
    }
  }

  // Where rows are shared and nobody needs z, y's memory holds it until they are finished.
  __device__ __forceinline__ MixedRows<T> stored_z(bool shared_rows) const {
    return shared_rows && !call.out.z.data ? rows_of<T>(call.out.y, layer.y_dtype)
                                           : rows_of<T>(call.out.z, layer.dtype);
  }

  // partial (3, tiles, M)
  __device__ __forceinline__ void store_part(const Team& team, const Place& at,
                                             const Moments& part) const {
    if (team.lane != 0 || !at.live) return;
    float* cell = call.out.partial + tile * layer.M + at.m;
    const int64_t plane = call.tiles * layer.M;
    cell[0] = part.mean;
    cell[plane] = part.rest;
    cell[2 * plane] = part.m2;
  }

  __device__ __forceinline__ RowStats load_merged(const Place& at) const {
    const int64_t plane = call.tiles * layer.M;
    Moments row = {0.0f, 0.0f, 0.0f};
    if (!at.live) return {0.0f, 0.0f};
    for (int i = 0; i < call.tiles; ++i) {
      const float* cell = call.out.partial + i * layer.M + at.m;
      const Moments part = {load_past_l1(cell), load_past_l1(cell + plane),
                            load_past_l1(cell + 2 * plane)};
      const int left = at.width - i * size.n;
      row = merge(row, static_cast<float>(i * size.n), part,
                  static_cast<float>(left < size.n ? left : size.n));
    }
    return stats_of(layer, row, at.width);
  }

  __device__ __forceinline__ void finish_rows() const {
    const Side& side = call.epilogue;
    const MixedRows<T> y = rows_of<T>(call.out.y, layer.y_dtype), kept = stored_z(true);
    const Team team = team_of(side.width);
    for (int r = team.row; r < size.m; r += team.rows) {
      Place at = place(r, team.lane * kStrip, side.width);
      const RowStats row = load_merged(at);
      store_stats(call.out.stats, layer, team, at, row);
      for (; at.n < side.width; at.n += team.size * kStrip) {
        const Strip t = load<T, true>(kept, at);
        store(y, at, run_stages<T>(layer, side.stages, 0, side.stages.count, at, t, row));
      }
    }
  }

  __device__ __forceinline__ void run() {
    const bool shared_rows = call.epilogue.over_rows && call.tiles > 1;
    for (;;) {
      if (to_transform() && !call.casts) {
        for (int step = 0; step < call.steps; ++step) copy_x(step, step, size.m);
        cp_async_commit();
      }
      begin_copies(call.steps, [&](int step) { copy(step, size); });
      if (to_transform()) {
        cp_async_wait<kDepth - 1>();
        sync_threads();
        transform_x();
      }
      with_size<kAtOnce>(size, [&](auto m, auto n) {
        multiply<m.value, n.value, true>(call.steps, x, streamed(), weight, z,
                                         [&](int step) { copy(step, {m.value, n.value}); });
      });
      finish_tile(shared_rows);
      if (shared_rows && last_to_arrive(call.out.arrived + block, call.tiles)) finish_rows();
      tile += call.groups;
      if (tile >= call.tiles) break;
      n0 = tile * size.n;
      sync_threads();  // z has been read
    }
  }
};

template <class T, int kAtOnce>
__global__ __launch_bounds__(kThreads, kAtOnce) void residual_forward_sm80_kernel(
    const __grid_constant__ ForwardCall call) {
  Forward<T, kAtOnce>(call).run();
}

}  // namespace

const char* residual_forward_sm80(const Layer& layer, const ForwardOut& out, const Tile& tile,
                                  void* stream) {
  const ForwardCall call = {layer,
                            out,
                            side_of(layer, true),
                            side_of(layer, false),
                            {tile.block_m, tile.block_n},
                            static_cast<int>(ceil_div(layer.N, tile.block_n)),
                            tile.groups,
                            static_cast<int>(ceil_div(layer.K, block_k(layer.dtype))),
                            walks_x(layer),
                            layer.x_dtype != layer.dtype};
  return with_element(layer.dtype, [&](auto type) {
    return with_kernel(tile, [&](auto programs) {
      return launch(residual_forward_sm80_kernel<decltype(type), programs.value>, tile.programs,
                    kThreads, tile.shared_bytes, stream, call);
    });
  });
}

}  // namespace fusedres::cuda
