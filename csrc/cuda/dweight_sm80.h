// dweight = dz.T @ prologue(x). A program has a tile of it in one part of the rows; the last to
// arrive adds the parts, always in the same order.
#pragma once

#include "cuda/sums.h"

namespace fusedres::cuda {

template <class T>
struct WeightTile {
  using Tile = Product<T, kSumTile, kSumTile, false, false>;
  static constexpr int kRow = kStride<T, kSumTile>, kOperand = kBlockK<T> * kRow;

  const SumsCall<T>& call;
  const Layer& layer;
  int tile, part;
  int64_t begin, end;  // of the rows
  int n0, k0;
  T *dz, *x;    // in shared memory, by blocks of rows
  float* sums;  // [kSumTile, kTileStride], in their place once the product is done

  __device__ __forceinline__ WeightTile(const SumsCall<T>& c, int program)
      : call(c),
        layer(c.layer),
        tile(program % c.cut.tiles),
        part(program / c.cut.tiles),
        begin(int64_t{part} * c.cut.rows),
        end(begin + rows_of_part(layer.M, part, c.cut.rows)),
        n0(tile / c.cut.tiles_k * kSumTile),
        k0(tile % c.cut.tiles_k * kSumTile),
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
      T* strip = block + r * kRow + c;
      Strip t = {};
      if (at.live) {
        const RowStats row = load_stats(side.over_rows ? call.out.from.stats : nullptr, layer, at);
        t = call.casts ? load(call.input[1], at) : load_packed(strip);
        t = run_stages<T>(layer, side.stages, 0, side.stages.count, at, t, row);
      }
      store_packed(strip, t);
    }
    sync_threads();
  }

  __device__ __forceinline__ void multiply() const {
    const Source<T> left = source<T>({call.dz.data, call.dz.stride}, end, layer.N);
    const Source<T> right = source<T>(call.x, end, layer.K);
    const auto copy = [&](int step) {
      const int slot = step % kDepth * kOperand;
      const int64_t m = begin + int64_t{step} * kBlockK<T>;
      copy_tile(dz + slot, left, m, n0, kBlockK<T>, kSumTile);
      if (!call.casts) copy_tile(x + slot, right, m, k0, kBlockK<T>, kSumTile);
    };
    const int steps = (static_cast<int>(end - begin) + kBlockK<T> - 1) / kBlockK<T>;
    Tile product;
    begin_copies(steps, copy);
    run_steps(steps, copy, [&](int step) {
      const int slot = step % kDepth * kOperand;
      if (call.sides[1].stages.count > 0) transform(x + slot, begin + int64_t{step} * kBlockK<T>);
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
    if (call.cut.parts == 1)
      return for_each_strip([&](const Place& at, const float* strip) {
        store(call.dweight, at, load_packed(strip));
      });
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
      store(call.dweight, at, total);
    });
  }
};

}  // namespace fusedres::cuda
