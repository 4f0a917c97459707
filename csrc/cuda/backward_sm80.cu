// First launch of backward: dz from dy, back through the stages after `linear`; dt = dz @ weight,
// the gradient of prologue(x); dx from dt, back through the stages before `linear`.
//
// A program owns `size.m` rows, and of their tiles of `size.n` columns of dt one, or each
// `groups`-th. It walks its rows of dz back into shared memory (every program of a row block does,
// one stores them), then multiplies. With stages before `linear`, the last program of a row block to
// arrive walks the rows of dt back.
#include "cuda/dispatch.h"
#include "cuda/product_sm80.h"
#include "cuda/rows.h"

namespace fusedres::cuda {
namespace {

template <class T>
struct BackwardCall {
  Layer layer;
  BackwardOut out;
  Rows<T> z, dz, dt;
  MixedRows<T> dy, x, dx, dresidual;
  Side prologue, epilogue;
  BlockSize size;                // of a tile
  int tiles;                     // of columns of dt; 1 where only dz and dresidual are asked for
  int groups;                    // programs that share them
  int steps;                     // along N
  bool walks;                    // rows of dz are made for the product, which
  bool product;                  // makes dt or dx, where asked for
  bool skip;                     // `add` after `linear` sends a part of dx
  bool adds_before, adds_after;  // `add` stands there
  bool walk_x;                   // something is asked for of the stages before `linear`
};

template <class T, int kAtOnce>
struct Backward {
  static constexpr int kLineStride = kStride<T, kBlockK<T>>;

  const BackwardCall<T>& call;
  const Layer& layer;
  const BackwardOut& out;
  BlockSize size;
  int64_t block;  // of rows
  int group;      // the program's among those of the block
  int64_t m0;
  int tile;        // of columns
  T *dz, *weight;  // in shared memory: dz by blocks of kBlockK columns
  float* dt;       // [size.m, size.n + kTilePad], in the weight's place once the product is done

  __device__ __forceinline__ explicit Backward(const BackwardCall<T>& c)
      : call(c),
        layer(c.layer),
        out(c.out),
        size(c.size),
        block(blockIdx.x / c.groups),
        group(blockIdx.x % c.groups),
        m0(block * size.m),
        tile(group),
        dz(static_cast<T*>(static_cast<void*>(shared_memory()))),
        weight(dz + (streamed() ? kDepth : c.steps) * panel()),
        dt(static_cast<float*>(static_cast<void*>(weight))) {}

  // dz is dy.
  __device__ __forceinline__ bool streamed() const { return !call.walks; }

  __device__ __forceinline__ int k0() const { return tile * size.n; }
  __device__ __forceinline__ int panel() const { return size.m * kLineStride; }  // a block of dz

  __device__ __forceinline__ Place place(int row, int n, int width) const {
    return {m0 + row, n, width, m0 + row < layer.M};
  }

  __device__ __forceinline__ static Place columns(Place at, int64_t width) {
    at.width = static_cast<int>(width);
    return at;
  }

  // ---- dz

  __device__ __forceinline__ void walk_z() const {
    const Side& side = call.epilogue;
    const bool first = group == 0;
    const bool wanted = first && out.dresidual.data && call.adds_after;
    const Team team = team_of(side.width);
    for (int r = team.row; r < size.m; r += team.rows) {
      const Place start = place(r, 0, side.width);
      const auto strip = [&](int n) {
        return dz + n / kBlockK<T> * panel() + r * kLineStride + n % kBlockK<T>;
      };
      const auto emit = [&](const Place& at, const Strip& d, const Strip& to_residual) {
        store_packed(strip(at.n), inside(at, d));
        if (first && out.dz.data) store(call.dz, at, d);
        if (wanted) store(call.dresidual, columns(at, layer.R), to_residual);
        if (call.skip && at.n / size.n % call.groups == group)
          store(call.dx, columns(at, layer.K), to_residual);
      };
      const RowStats row = load_stats(side.over_rows ? out.stats : nullptr, layer, start);
      const RowMeans means = walk_row_back<T>(
          layer, side, team, start, row, [&](const Place& at) { return load(call.z, at); },
          [&](const Place& at) { return load(call.dy, at); }, emit);
      if (first && side.over_rows) store_means(team, start, means);
      const int end = (side.width + kStrip - 1) / kStrip * kStrip;
      for (int n = end + team.lane * kStrip; n < call.steps * kBlockK<T>; n += team.size * kStrip)
        store_packed(strip(n), Strip{});
    }
  }

  // row_means (2, M)
  __device__ __forceinline__ void store_means(const Team& team, const Place& at,
                                              RowMeans means) const {
    if (!out.row_means || team.lane != 0 || !at.live) return;
    out.row_means[at.m] = means.g;
    out.row_means[layer.M + at.m] = means.gc;
  }

  // ---- dt

  __device__ __forceinline__ void copy(int step, BlockSize tile_size) const {
    const auto [rows, columns] = tile_size;
    const int slot = step % kDepth;
    if (streamed())
      copy_tile(dz + slot * rows * kLineStride, source<T>(out.dy, layer.M, layer.N), m0,
                step * kBlockK<T>, rows, kBlockK<T>);
    copy_tile(weight + slot * kBlockK<T> * (columns + kPack<T>),
              source<T>(layer.weight, layer.N, layer.K), int64_t{step} * kBlockK<T>, k0(),
              kBlockK<T>, columns);
  }

  // The tile is dt, or dx where nothing stands before `linear`; then what `add` sends lies in dx.
  __device__ __forceinline__ void finish_tile() const {
    const bool last = call.prologue.stages.count == 0;
    const Team team = team_of(size.n);
    for (int r = team.row; r < size.m; r += team.rows) {
      const Place at = place(r, k0() + team.lane * kStrip, static_cast<int>(layer.K));
      Strip d = load_packed(dt + r * (size.n + kTilePad) + team.lane * kStrip);
      if (last && call.skip) d = plus(d, load<T, true>(call.dx, at));
      if (last)
        store(call.dx, at, d);
      else
        store(call.dt, at, d);
    }
  }

  // ---- dx, with stages before `linear`

  __device__ __forceinline__ void walk_x() const {
    const Side& side = call.prologue;
    const Team team = team_of(side.width);
    for (int r = team.row; r < size.m; r += team.rows) {
      const Place start = place(r, 0, side.width);
      const auto emit = [&](const Place& at, Strip d, const Strip& to_residual) {
        if (call.adds_before && out.dresidual.data)
          store(call.dresidual, columns(at, layer.R), to_residual);
        if (!out.dx.data) return;
        if (call.adds_before && layer.residual_is_x) d = plus(d, to_residual);
        if (call.skip) d = plus(d, load<T, true>(call.dx, at));
        store(call.dx, at, d);
      };
      const RowStats row = load_stats(side.over_rows ? out.stats : nullptr, layer, start);
      const RowMeans means = walk_row_back<T>(
          layer, side, team, start, row, [&](const Place& at) { return load(call.x, at); },
          [&](const Place& at) { return load<T, true>(call.dt, at); }, emit);
      if (side.over_rows) store_means(team, start, means);
    }
  }

  __device__ __forceinline__ void run() {
    for (;;) {
      if (call.product) begin_copies(call.steps, [&](int step) { copy(step, size); });
      if (tile == group && !streamed()) walk_z();
      if (!call.product) return;
      with_size<kAtOnce>(size, [&](auto m, auto n) {
        multiply<m.value, n.value, false>(call.steps, dz, streamed(), weight, dt,
                                          [&](int step) { copy(step, {m.value, n.value}); });
      });
      finish_tile();
      tile += call.groups;
      if (tile >= call.tiles) break;
      sync_threads();  // dt has been read
    }
    if (call.walk_x && last_to_arrive(out.arrived + block, call.groups)) walk_x();
  }
};

template <class T, int kAtOnce>
__global__ __launch_bounds__(kThreads, kAtOnce) void residual_backward_sm80_kernel(
    const __grid_constant__ BackwardCall<T> call) {
  Backward<T, kAtOnce>(call).run();
}

}  // namespace

const char* residual_backward_sm80(const Layer& layer, const BackwardOut& out, const Tile& tile,
                                   void* stream) {
  const Side prologue = side_of(layer, true), epilogue = side_of(layer, false);
  const bool product = out.dx.data || out.dt.data;
  const bool skip = out.dx.data && layer.residual_is_x && has(epilogue.stages, Stage::add);
  const bool walk_x =
      prologue.stages.count > 0 && (out.dx.data || needs_row_means(prologue) ||
                                    (out.dresidual.data && has(prologue.stages, Stage::add)));
  const auto tiles = static_cast<int>(product ? ceil_div(layer.K, tile.block_n) : 1);
  const auto steps = static_cast<int>(ceil_div(layer.N, block_k(layer.dtype)));
  return with_element(layer.dtype, [&](auto type) {
    using T = decltype(type);
    const BackwardCall<T> call = {layer,
                                  out,
                                  rows_of<T>(out.z),
                                  rows_of<T>(out.dz),
                                  rows_of<T>(out.dt),
                                  rows_of<T>(out.dy, layer.y_dtype),
                                  rows_of<T>(layer.x, layer.x_dtype),
                                  rows_of<T>(out.dx, layer.x_dtype),
                                  rows_of<T>(out.dresidual, layer.residual_dtype),
                                  prologue,
                                  epilogue,
                                  {tile.block_m, tile.block_n},
                                  tiles,
                                  tile.groups,
                                  steps,
                                  walks_z(layer),
                                  product,
                                  skip,
                                  has(prologue.stages, Stage::add),
                                  has(epilogue.stages, Stage::add),
                                  walk_x};
    return with_kernel(tile, [&](auto programs) {
      return launch(residual_backward_sm80_kernel<T, programs.value>, tile.programs, kThreads,
                    tile.shared_bytes, stream, call);
    });
  });
}

}  // namespace fusedres::cuda
