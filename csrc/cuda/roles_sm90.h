// What the roles of the Hopper kernel do with rows, columns and tiles; schedule.h says when.
//
//   z = norm?(x) @ weight.T + bias, rounded to the layer's dtype ; y = epilogue(z)
//
// A norm before `linear` is taken out of the product, so that TMA can feed it x as it is:
//   z = rstd * (x @ g.T - mean * sum_k g) + weight @ norm_bias + bias ; g = norm_weight * weight
// g and the two vectors are made by all blocks together before the first product, of g as rounded;
// mean and rstd are those of the tiles of x on their way to the product. Every tile of z is
//   z = scale[m] * sums[m, n] + (shift[m] * column_sum[n] + column_shift[n])
#pragma once

#include "cuda/hopper.h"
#include "cuda/rows.h"
#include "cuda/schedule.h"

namespace fusedres::cuda::sm90 {

constexpr int kFirstSurveyWarp = 2, kFirstFinishWarp = 4, kFirstMultiplyWarp = 8;

struct Call {
  Layer layer;
  ForwardOut out;
  Schedule schedule;
  Side epilogue;
  int add_at;  // where `add` stands in the epilogue; its count: nowhere
  bool norm_before;
  bool shared_rows;  // rows with a norm after `linear` are wider than a tile
  Matrix kept;       // z. Where it is shared and nobody needs it, y's memory until y is made of it
  BoxMap x, weight;  // weight: g, where there is a norm_weight before `linear`
};

template <class T, int kBlockN>
struct Shared {
  alignas(1024) T x[kSlots][kBlockM * kBlockK];
  alignas(1024) T weight[kSlots][kBlockN * kBlockK];
  alignas(1024) T z[kBlockM * kBlockN];
  float column_sum[kBlockN], column_shift[kBlockN];
  float scale[kBlockM], shift[kBlockM];
  RowStats rows[kBlockM];  // of the tile that `finish` completes
  Barriers<Barrier> barriers;
};

// Rows of tiles in shared memory are made of chunks of 8 elements, exchanged by row so that a column
// of chunks lies in all banks: as TMA does it with boxes 8 chunks wide.
__device__ __forceinline__ int swizzled(int row, int chunk) { return kStrip * (chunk ^ (row & 7)); }

// ---- before the first product, where a norm stands before `linear`

// In `partial`: g (N, K), and of each of its rows the sum and what is added to z.
template <class T>
struct Weights {
  Rows<T> scaled;
  float *sum, *shift;

  __device__ __forceinline__ explicit Weights(const Call& call)
      : scaled{reinterpret_cast<T*>(call.out.partial), call.layer.K, true} {
    const bool made = call.layer.norm_weight.data != nullptr;
    sum = call.out.partial + (made ? (call.layer.N * call.layer.K + 7) / 8 * 4 : 0);
    shift = sum + call.layer.N;
  }
};

template <class T>
__device__ __forceinline__ void prepare(const Call& call) {
  const Layer& layer = call.layer;
  const Weights<T> to(call);
  const Rows<T> from = rows_of<T>(layer.weight);
  const int lane = threadIdx.x % 32, warps = kBlockThreads / 32;
  const Team team = {lane, 32, 0, 0};
  Place at = {0, 0, static_cast<int>(layer.K), true};
  for (at.m = blockIdx.x * warps + threadIdx.x / 32; at.m < layer.N; at.m += gridDim.x * warps) {
    float total = 0.0f, shift = 0.0f;
    for (at.n = kStrip * lane; at.n < at.width; at.n += 32 * kStrip) {
      const Strip weight = load(from, at);
      Strip g = weight;
      if (layer.norm_weight.data) {
        g = as_stored<T>(weight * load(layer.norm_weight, at, 1.0f));
        store(to.scaled, at, g);
      }
      total += sum(g);
      if (layer.norm_bias.data) shift += sum(weight * load(layer.norm_bias, at, 0.0f));
    }
    total = sum(team, total);
    shift = sum(team, shift);
    if (lane != 0) continue;
    const Place n = {0, static_cast<int>(at.m), static_cast<int>(layer.N), true};
    to.sum[at.m] = total;
    to.shift[at.m] = shift + load(layer.bias, n, 0.0f).v[0];
  }
  fence_stores_before_boxes();
  sync_threads();
  if (threadIdx.x == 0) {
    arrive(call.out.arrived);
    wait_for_blocks(call.out.arrived, gridDim.x);
  }
  sync_threads();
  fence_stores_before_boxes();
}

// ---- survey: scales and shifts of the tile in work

template <class T, int kBlockN>
struct Survey {
  static constexpr int kThreads = 32 * kSurveyWarps, kRows = kBlockM / kThreads;

  const Call& call;
  Shared<T, kBlockN>& shared;
  int thread;
  float middle[kRows];                 // the mean of the row's first elements
  float total[kRows], squares[kRows];  // of x less `middle`

  __device__ __forceinline__ Survey(const Call& c, Shared<T, kBlockN>& s)
      : call(c), shared(s), thread(threadIdx.x - 32 * kFirstSurveyWarp) {}

  __device__ __forceinline__ void add(int k_step, int slot) {
    const int left = (static_cast<int>(call.layer.K) - k_step * kBlockK) / kStrip;
    const bool whole = left >= kBlockK / kStrip;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread + i * kThreads;
      const T* x = &shared.x[slot][row * kBlockK];
      const auto chunk = [&](int at) { return load_packed(x + swizzled(row, at)); };
      if (k_step == 0) {
        const int chunks = whole ? kBlockK / kStrip : left;
        middle[i] = total[i] = squares[i] = 0.0f;
        if (call.layer.norm == Norm::layer) {
#pragma unroll 1
          for (int at = 0; at < chunks; ++at) middle[i] += sum(chunk(at));
          middle[i] /= static_cast<float>(chunks * kStrip);
        }
      }
      const auto add_chunk = [&](int at) {
        const Strip d = map(chunk(at), [&](float v) { return v - middle[i]; });
        total[i] += sum(d);
        squares[i] += sum(d * d);
      };
      if (whole) {
#pragma unroll 2
        for (int at = 0; at < kBlockK / kStrip; ++at) add_chunk(at);
      } else {
#pragma unroll 1
        for (int at = 0; at < left; ++at) add_chunk(at);
      }
    }
    fence_loads_before_boxes();
  }

  // With d = middle - mean, squares = m2 + K d^2: what the difference loses is little as long as d is
  // no more than a few sigma. Of 64 elements, not of one, so that an outlier among them does no harm.
  __device__ __forceinline__ RowStats stats(int i) const {
    const float count = static_cast<float>(call.layer.K);
    if (call.layer.norm == Norm::rms) return {0.0f, rstd_of_row(call.layer, squares[i] / count)};
    const float mean = total[i] / count, m2 = squares[i] - total[i] * mean;
    return {middle[i] + mean, rstd_of_row(call.layer, (m2 < 0 ? 0.0f : m2) / count)};
  }

  __device__ __forceinline__ void publish(TileAt tile) {
    const Layer& layer = call.layer;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int row = thread + i * kThreads;
      const RowStats found = call.norm_before ? stats(i) : RowStats{0.0f, 1.0f};
      shared.scale[row] = found.rstd;
      shared.shift[row] = -found.mean * found.rstd;
      const int64_t m = int64_t{tile.row_block} * kBlockM + row;
      if (!call.norm_before || !call.out.stats || tile.column_tile > 0 || m >= layer.M) continue;
      call.out.stats[m] = found.mean;
      call.out.stats[layer.M + m] = found.rstd;
    }
    const Weights<T> weights(call);
    for (int i = thread * kStrip; i < kBlockN; i += kThreads * kStrip) {
      const Place at = {0, tile.column_tile * kBlockN + i, static_cast<int>(layer.N), true};
      const auto made = [&](const float* v) {
        return load<float, true>(v + at.n, at.width - at.n, is_aligned(v + at.n));
      };
      store_packed(&shared.column_sum[i], call.norm_before ? made(weights.sum) : filled(0.0f));
      store_packed(&shared.column_shift[i],
                   call.norm_before ? made(weights.shift) : load(layer.bias, at, 0.0f));
    }
  }
};

// ---- multiply: the tile of z, rounded, to shared memory

template <class T, int kBlockN>
__device__ __forceinline__ void park(Shared<T, kBlockN>& shared,
                                     const Multiplier<T, kBlockN>& sums) {
  const int warp = threadIdx.x / 32 - kFirstMultiplyWarp, lane = threadIdx.x % 32;
  const int row = 16 * warp + lane / 4, to_row = 16 * warp + lane % 16;
  // Every second chunk j of the row is at to ^ 8 j.
  const int to = opaque(to_row * kBlockN + swizzled(to_row, lane / 16));
  const float scale[] = {shared.scale[row], shared.scale[row + 8]};
  const float shift[] = {shared.shift[row], shared.shift[row + 8]};
#pragma unroll
  for (int j = 0; j < kBlockN / 8; j += 2) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int h = i % 2, n = 8 * (j + i / 2) + 2 * (lane % 4);
      T z[2];
#pragma unroll
      for (int c = 0; c < 2; ++c)
        z[c] = from_float<T>(scale[h] * sums.value(4 * (j + i / 2) + 2 * h + c) +
                             (shift[h] * shared.column_sum[n + c] + shared.column_shift[n + c]));
      packed[i] = z[0].bits | static_cast<uint32_t>(z[1].bits) << 16;
    }
    stmatrix_x4(&shared.z[to ^ (kStrip * j)], packed);
  }
}

// ---- finish

// use(row, load(row)) for the rows of a tile from `row` on; each load one step ahead, so that its
// way is hidden.
template <class Load, class Use>
__device__ __forceinline__ void walk_ahead(int row, int step, Load load, Use use) {
  auto ahead = load(row);
#pragma unroll 1
  for (; row < kBlockM; row += step) {
    const auto loaded = ahead;
    ahead = load(row + step);
    use(row, loaded);
  }
}

// A strip as it lies in memory.
template <class T, bool kPastL1>
__device__ __forceinline__ Pack<T> load_pack(const Rows<T>& rows, const Place& at) {
  static_assert(Pack<T>::kCount == kStrip);
  const int count = at.live ? at.width - at.n : 0;
  const T* p = rows.data + at.m * rows.stride + at.n;
  if (rows.wide && count >= kStrip) {
    const auto* pack = reinterpret_cast<const Pack<T>*>(p);
    return kPastL1 ? load_past_l1(pack) : *pack;
  }
  Pack<T> out = {};
#pragma unroll
  for (int i = 0; i < kStrip; ++i)
    if (i < count) out.v[i] = kPastL1 ? load_past_l1(p + i) : p[i];
  return out;
}

template <class T, int kBlockN>
struct Finish {
  static constexpr int kThreads = 32 * kFinishWarps, kLanes = kBlockN / kStrip;
  static_assert(kThreads == kBlockM);

  const Call& call;
  const Layer& layer;
  const Side& side;
  Shared<T, kBlockN>& shared;
  int thread;

  __device__ __forceinline__ Finish(const Call& c, Shared<T, kBlockN>& s)
      : call(c),
        layer(c.layer),
        side(c.epilogue),
        shared(s),
        thread(threadIdx.x - 32 * kFirstFinishWarp) {}

  __device__ __forceinline__ Place place(int row_block, int row, int n, int width) const {
    const int64_t m = int64_t{row_block} * kBlockM + row;
    return {m, n, width, row < kBlockM && m < layer.M};
  }

  // The residual's strip at `at`; nothing where stages up to `last` do not add it.
  __device__ __forceinline__ Pack<T> load_residual(Place at, int last) const {
    at.width = static_cast<int>(layer.R);
    at.live = at.live && call.add_at < last;
    return load_pack<T, false>(rows_of<T>(layer.residual), at);
  }

  // y of the parked tile, or, where others share its rows, what they need of it; then, `whole`, y of
  // a tile that shares its rows, once all have stored their part of them.
  __device__ __forceinline__ void run(TileAt tile, bool whole) const {
    int32_t* arrived = call.out.arrived + 2 * tile.row_block;
    if (whole) {
      if (thread == 0) wait_for_blocks(arrived, call.schedule.column_tiles);
      sync_warps(kFinishWarps);
      merge_rows(tile);
    }
    make_y(tile, whole);
    if (whole || !call.shared_rows) return;
    sync_warps(kFinishWarps);  // the stores of all threads come before what one thread does
    if (thread == 0) arrive(arrived);
  }

  // whole: from z as stored, by this very thread, and the statistics of whole rows, else from the
  // parked tile.
  __device__ __forceinline__ void make_y(TileAt tile, bool whole) const {
    const int lane = thread % kLanes, n = tile.column_tile * kBlockN + lane * kStrip;
    const int last = whole || !call.shared_rows ? side.stages.count : side.norm_at;
    struct Loaded {
      Pack<T> z, skip;
    };
    const auto load = [&](int row) {
      const Place at = place(tile.row_block, row, n, side.width);
      Loaded out = {{}, load_residual(at, last)};
      if (whole) out.z = load_pack<T, true>(rows_of<T>(call.kept), at);
      return out;
    };
    walk_ahead(thread / kLanes, kThreads / kLanes, load, [&](int r, const Loaded& loaded) {
      const Place at = place(tile.row_block, r, n, side.width);
      RowStats row = {0.0f, 0.0f};
      Strip t;
      if (whole) {
        t = load_packed(loaded.z.v);
        row = shared.rows[r];
      } else {
        t = load_packed(&shared.z[r * kBlockN + swizzled(r, lane)]);
        if (call.kept.data) store(rows_of<T>(call.kept), at, t);
      }
#pragma unroll 1
      for (int i = 0; i < side.stages.count; ++i) {
        if (!whole && side.over_rows && i == side.norm_at) {
          const Moments part = moments_of(t, tile, lane);
          if (call.shared_rows) return store_part(tile.column_tile, lane, at, part);
          row = stats_of(layer, part, side.width);
          store_stats(call.out.stats, layer, {lane, kLanes, 0, 0}, at, row);
        }
        t = run_stage(i, at, t, loaded.skip, row);
      }
      store(rows_of<T>(call.out.y), at, t);
    });
  }

  __device__ __forceinline__ Strip run_stage(int i, const Place& at, const Strip& t,
                                             const Pack<T>& skip, RowStats row) const {
    if (i != call.add_at) return cuda::run_stage<T>(layer, side.stages.stage[i], at, t, row);
    return map(t, load_packed(skip.v),
               [&](float v, float r) { return v + layer.residual_scale * r; });
  }

  __device__ __forceinline__ Moments moments_of(const Strip& t, TileAt tile, int lane) const {
    const int width = std::min(side.width - tile.column_tile * kBlockN, kBlockN);
    return moments({lane, kLanes, 0, 0}, width, layer.norm == Norm::layer, [&](int) { return t; });
  }

  // ---- rows shared by tiles: partial (3, column tiles, M)

  __device__ __forceinline__ void store_part(int tile, int lane, const Place& at,
                                             const Moments& part) const {
    if (lane != 0 || !at.live) return;
    float* cell = call.out.partial + tile * layer.M + at.m;
    const int64_t plane = call.schedule.column_tiles * layer.M;
    cell[0] = part.mean;
    cell[plane] = part.rest;
    cell[2 * plane] = part.m2;
  }

  // A row a thread: shared.rows, and stats where they are asked for, once.
  __device__ __forceinline__ void merge_rows(TileAt tile) const {
    const Place at = place(tile.row_block, thread, 0, side.width);
    const int64_t plane = call.schedule.column_tiles * layer.M;
    Moments row = {0.0f, 0.0f, 0.0f};
#pragma unroll 4
    for (int i = 0; at.live && i < call.schedule.column_tiles; ++i) {
      const float* cell = call.out.partial + i * layer.M + at.m;
      const Moments part = {load_past_l1(cell), load_past_l1(cell + plane),
                            load_past_l1(cell + 2 * plane)};
      const int seen = i * kBlockN, width = std::min(side.width - seen, kBlockN);
      row = merge(row, static_cast<float>(seen), part, static_cast<float>(width));
    }
    shared.rows[thread] = stats_of(layer, row, side.width);
    if (tile.column_tile == 0)
      store_stats(call.out.stats, layer, {0, 1, 0, 0}, at, shared.rows[thread]);
    sync_warps(kFinishWarps);
  }
};

}  // namespace fusedres::cuda::sm90
