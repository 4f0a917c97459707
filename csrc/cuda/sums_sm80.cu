// Second launch of backward: dweight = dz.T @ prologue(x), and the sums over rows
//
//   dbias = sum_m dz        dnorm_weight = sum_m dh * c        dnorm_bias = sum_m dh
//   dgate = sum_m (the gradient of the gate's result) * (what it acted on)
//
// from what the first launch has stored. A program has a tile of dweight or a block of columns of
// the sums, in one part of the rows; the last to arrive adds the parts, always in the same order.
#include "cuda/dispatch.h"
#include "cuda/product_sm80.h"
#include "cuda/rows.h"

namespace fusedres::cuda {
namespace {

template <class T>
struct SumsCall {
  Layer layer;
  SumsOut out;
  SumsCut cut;
  Rows<T> dz, dweight, input[2], gradient[2];
  Side sides[2];  // after and before `linear`
  Wanted wanted[2];
  int gate_at[2];
  int64_t sums_from;  // in `partial`: dweight's parts come first
};

template <class T>
__device__ __forceinline__ T* shared_as() {
  return static_cast<T*>(static_cast<void*>(shared_memory()));
}

__device__ __forceinline__ void store_element(void* out, DType dtype, int64_t i, float v) {
  with_type(dtype, [&](auto* type) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    if constexpr (std::is_same_v<E, double>)
      static_cast<E*>(out)[i] = v;
    else
      static_cast<E*>(out)[i] = from_float<E>(v);
  });
}

__device__ __forceinline__ int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// ---- dweight

template <class T>
struct WeightTile {
  using Tile = Product<T, kSumTile, kSumTile, false, false>;
  static constexpr int kRow = kStride<T, kSumTile>, kOperand = kBlockK<T> * kRow;

  const SumsCall<T>& call;
  const Layer& layer;
  int64_t tile, part, begin, end;
  int n0, k0;
  T *dz, *x;    // in shared memory, by blocks of rows
  float* sums;  // [kSumTile, kTileStride], in their place once the product is done

  __device__ __forceinline__ WeightTile(const SumsCall<T>& c, int64_t program)
      : call(c),
        layer(c.layer),
        tile(program % c.cut.tiles),
        part(program / c.cut.tiles),
        begin(part * c.cut.rows),
        end(least(begin + c.cut.rows, layer.M)),
        n0(static_cast<int>(tile / c.cut.tiles_k * kSumTile)),
        k0(static_cast<int>(tile % c.cut.tiles_k * kSumTile)),
        dz(shared_as<T>()),
        x(dz + kDepth * kOperand),
        sums(shared_as<float>()) {}

  // The rows of x from m in shared memory become those of prologue(x).
  __device__ __forceinline__ void transform(T* block, int64_t m) const {
    constexpr int kStrips = kSumTile / kStrip;
    const Side& side = call.sides[1];
    for (int i = threadIdx.x; i < kBlockK<T> * kStrips; i += kThreads) {
      const int r = i / kStrips, c = i % kStrips * kStrip;
      const Place at = {m + r, k0 + c, side.width, m + r < end};
      if (!at.live) continue;  // 0 as it is
      T* strip = block + r * kRow + c;
      const RowStats row = load_stats(side.over_rows ? call.out.from.stats : nullptr, layer, at);
      store_packed(strip, run_stages<T>(layer, side.stages, 0, side.stages.count, at,
                                        load_packed(strip), row));
    }
    sync_threads();
  }

  __device__ __forceinline__ void multiply() const {
    const Source<T> left = source<T>({call.dz.data, call.dz.stride}, end, layer.N);
    const Source<T> right = source<T>(layer.x, end, layer.K);
    const auto copy = [&](int step) {
      const int slot = step % kDepth * kOperand;
      const int64_t m = begin + int64_t{step} * kBlockK<T>;
      copy_tile<T, kBlockK<T>, kSumTile>(dz + slot, left, m, n0);
      copy_tile<T, kBlockK<T>, kSumTile>(x + slot, right, m, k0);
    };
    const int steps =
        begin < end ? static_cast<int>((end - begin + kBlockK<T> - 1) / kBlockK<T>) : 0;
    Tile product;
    begin_copies(steps, copy);
    run_steps(steps, copy, [&](int step) {
      const int slot = step % kDepth * kOperand;
      if (call.sides[1].stages.count > 0)
        transform(x + slot, begin + int64_t{step} * kBlockK<T>);
      product.step(dz + slot, x + slot);
    });
    product.store(sums);
    sync_threads();
  }

  // Calls f(place, strip in shared memory) for each strip of the tile.
  template <class F>
  __device__ __forceinline__ void for_each_strip(F f) const {
    const Team team = team_of(kSumTile);
    for (int r = team.row; r < kSumTile; r += team.rows) {
      const Place at = {n0 + r, k0 + team.lane * kStrip, static_cast<int>(layer.K),
                        n0 + r < layer.N};
      f(at, sums + r * Tile::kTileStride + team.lane * kStrip);
    }
  }

  __device__ __forceinline__ void run() const {
    multiply();
    const Rows<T>& dweight = call.dweight;
    if (call.cut.parts == 1)
      return for_each_strip(
          [&](const Place& at, const float* strip) { store(dweight, at, load_packed(strip)); });
    const int64_t plane = layer.N * layer.K;
    const auto rows_of_part = [&](int64_t i) {
      return rows_of<float>(Matrix{call.out.partial + i * plane, layer.K});
    };
    for_each_strip([&](const Place& at, const float* strip) {
      store(rows_of_part(part), at, load_packed(strip));
    });
    if (!last_to_arrive(call.out.arrived + tile, call.cut.parts)) return;
    for_each_strip([&](const Place& at, const float*) {
      Strip total = {};
      for (int i = 0; i < call.cut.parts; ++i)
        total = plus(total, load<float, true>(rows_of_part(i), at));
      store(dweight, at, total);
    });
  }
};

// ---- sums over rows

template <class T>
struct ColumnSums {
  static constexpr int kLanes = kSumTile / kStrip;  // that share a row
  static constexpr int kRows = kThreads / kLanes;   // at a time

  const SumsCall<T>& call;
  const Layer& layer;
  int which;        // side
  int block, part;  // of columns, of the rows
  Place at;        // of this thread's strip
  int64_t end;     // of its rows: it has every kRows-th from `begin` on

  __device__ __forceinline__ ColumnSums(const SumsCall<T>& c, int64_t program)
      : call(c), layer(c.layer), which(0) {
    const int64_t after = c.cut.blocks[0] * c.cut.sum_parts;
    if (program >= after) {
      which = 1;
      program -= after;
    }
    block = static_cast<int>(program % c.cut.blocks[which]);
    part = static_cast<int>(program / c.cut.blocks[which]);
    const int lane = threadIdx.x % kLanes;
    at = {0, block * kSumTile + lane * kStrip, side().width, true};
    end = least((part + int64_t{1}) * c.cut.sum_rows, layer.M);
  }

  __device__ __forceinline__ const Side& side() const { return call.sides[which]; }
  __device__ __forceinline__ void* wanted(int i) const { return call.wanted[which].out[i]; }

  // ---- this thread's rows

  __device__ __forceinline__ int64_t begin() const {
    return part * call.cut.sum_rows + threadIdx.x / kLanes;
  }

  __device__ __forceinline__ void add_dz() {
    Strip total = {};
    for (at.m = begin(); at.m < end; at.m += kRows) total = plus(total, load(call.dz, at));
    share(0, total);
  }

  // Row at.m, walked back as by the first launch, as far as need be: adds dh * c to `first` and dh to
  // `second`, or, for the gate, what sums up to dgate to `first`.
  template <bool kGate>
  __device__ __forceinline__ void add_row(Strip& first, Strip& second) const {
    const Side& s = side();
    const int norm = s.norm_at, count = s.stages.count, gate = call.gate_at[which];
    const bool before_norm = kGate && gate < norm && norm < count;
    const RowStats row = load_stats(s.over_rows ? call.out.from.stats : nullptr, layer, at);
    const Strip t = s.replay > 0 ? load(call.input[which], at) : Strip{};
    const Tape tape = replay<T>(layer, s, at, t, row);
    const int stop = norm < count && (!kGate || before_norm) ? norm + 1 : kGate ? gate + 1 : 0;
    Strip d = load(call.gradient[which], at), unused;
    d = walk_back(layer, s.stages, count, stop, at, d, tape, unused);
    if (before_norm) {
      RowMeans means = {0.0f, 0.0f};
      if (s.over_rows)
        means = {call.out.from.row_means[at.m], call.out.from.row_means[layer.M + at.m]};
      d = norm_back(layer, at, d, tape.c, row, means);
      d = walk_back(layer, s.stages, norm, gate + 1, at, d, tape, unused);
    }
    first = plus(first, d * (kGate ? tape.gate : tape.c));
    if (!kGate) second = plus(second, d);
  }

  template <bool kGate>
  __device__ __forceinline__ void add_gradients() {
    Strip first = {}, second = {};
    for (at.m = begin(); at.m < end; at.m += kRows) add_row<kGate>(first, second);
    share(kGate ? 3 : 1, first);
    if (!kGate) share(2, second);
  }

  // ---- this program's

  // partial of this side (sum_parts, kSums, columns)
  __device__ __forceinline__ float* cell(int64_t of_part, int i, int64_t column) const {
    const int64_t columns = call.cut.blocks[which] * kSumTile;
    const int64_t before = which == 0 ? 0 : call.cut.blocks[0] * kSumTile * kSums;
    return call.out.partial + call.sums_from + before * call.cut.sum_parts +
           (of_part * kSums + i) * columns + column;
  }

  // Sum i of a warp's rows, to shared memory [kWarps, kSums, kSumTile].
  __device__ __forceinline__ void share(int i, Strip t) const {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int lanes = kLanes; lanes < 32; lanes *= 2)
      t = map(t, [=](float v) { return v + shuffle_xor(v, lanes); });
    float* to = shared_as<float>() + (warp * kSums + i) * kSumTile + lane * kStrip;
    if (lane < kLanes) store_packed(to, t);
  }

  // A thread has one sum of one column, from here on.
  __device__ __forceinline__ void store_part() const {
    sync_threads();
    const int i = threadIdx.x / kSumTile, column = threadIdx.x % kSumTile;
    if (!wanted(i)) return;
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w)
      total += shared_as<float>()[(w * kSums + i) * kSumTile + column];
    *cell(part, i, block * kSumTile + column) = total;
  }

  // ---- all parts'

  __device__ __forceinline__ DType dtype(int i) const {
    return i == 0   ? layer.bias.dtype
           : i == 1 ? layer.norm_weight.dtype
           : i == 2 ? layer.norm_bias.dtype
                    : layer.gate.dtype;
  }

  __device__ __forceinline__ void add_parts() const {
    const int i = threadIdx.x / kSumTile;
    const int column = block * kSumTile + threadIdx.x % kSumTile;
    if (!wanted(i) || column >= side().width) return;
    float total = 0.0f;
    for (int p = 0; p < call.cut.sum_parts; ++p) total += load_past_l1(cell(p, i, column));
    if (i == 3 && layer.scalar_gate)
      *cell(0, i, column) = total;
    else
      store_element(wanted(i), dtype(i), column, total);
  }

  // A gate that is one number: the sum over columns too.
  __device__ __forceinline__ void add_columns() const {
    float* shared = shared_as<float>();
    const Team warp = {static_cast<int>(threadIdx.x % 32), 32, 0, 0};
    float total = 0.0f;
    for (int64_t column = threadIdx.x; column < side().width; column += kThreads)
      total += load_past_l1(cell(0, 3, column));
    total = sum(warp, total);
    if (warp.lane == 0) shared[threadIdx.x / 32] = total;
    sync_threads();
    if (threadIdx.x != 0) return;
    total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared[w];
    store_element(wanted(3), layer.gate.dtype, 0, total);
  }

  __device__ __forceinline__ void run() {
    int32_t* arrived = call.out.arrived + call.cut.tiles;
    if (wanted(0)) add_dz();
    if (wanted(1) || wanted(2)) add_gradients<false>();
    if (wanted(3)) add_gradients<true>();
    store_part();
    if (!last_to_arrive(arrived + (which == 0 ? 0 : call.cut.blocks[0]) + block,
                        call.cut.sum_parts))
      return;
    add_parts();
    if (!layer.scalar_gate || !wanted(3)) return;
    const int blocks = static_cast<int>(call.cut.blocks[which]);
    if (last_to_arrive(arrived + call.cut.blocks[0] + call.cut.blocks[1], blocks))
      add_columns();
  }
};

template <class T>
__global__ __launch_bounds__(kThreads, 2) void residual_sums_sm80_kernel(
    const __grid_constant__ SumsCall<T> call) {
  const int64_t program = blockIdx.x, of_weight = call.cut.tiles * call.cut.parts;
  if (program < of_weight)
    WeightTile<T>(call, program).run();
  else
    ColumnSums<T>(call, program - of_weight).run();
}

}  // namespace

const char* residual_sums_sm80(const Layer& layer, const SumsOut& out, const Tile& tile,
                               void* stream) {
  const BackwardOut& from = out.from;
  return with_element(layer.dtype, [&](auto type) {
    using T = decltype(type);
    SumsCall<T> call = {layer, out, cut_of(layer, out, tile)};
    call.dz = rows_of<T>(layer.epilogue.count > 0 ? from.dz : from.dy);
    call.dweight = rows_of<T>(out.dweight);
    for (int side = 0; side < 2; ++side) {
      call.input[side] = rows_of<T>(side == 0 ? from.z : layer.x);
      call.gradient[side] = rows_of<T>(side == 0 ? from.dy : from.dt);
      call.sides[side] = side_of(layer, side == 1);
      call.wanted[side] = wanted_sums(layer, out, side == 1);
      call.gate_at[side] = position(call.sides[side].stages, Stage::gate);
    }
    if (call.cut.parts > 1 && call.cut.tiles > 0)
      call.sums_from = layer.N * layer.K * call.cut.parts;
    return launch(residual_sums_sm80_kernel<T>, tile.programs, kThreads, tile.shared_bytes, stream,
                  call);
  });
}

}  // namespace fusedres::cuda
