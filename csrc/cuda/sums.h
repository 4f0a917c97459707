// Sums over rows of what backward's first launch has stored:
//
//   dbias = sum_m dz        dnorm_weight = sum_m dh * c        dnorm_bias = sum_m dh
//   dgate = sum_m (the gradient of the gate's result) * (what it acted on)
//
// A program has kSumTile columns in one part of the rows; the last to arrive adds the parts, always
// in the same order.
#pragma once

#include "cuda/product_sm80.h"
#include "cuda/rows.h"

namespace fusedres::cuda {

template <class T>
struct SumsCall {
  Layer layer;
  SumsOut out;
  SumsCut cut;
  Side sides[2];  // after and before `linear`
  Wanted wanted[2];
  int stop[2];  // the first stage that sums are wanted of
  Rows<T> dz, dweight;
  MixedRows<T> input[2], gradient[2];
  Matrix x;           // as dweight's product copies it, but where
  bool casts;         // stages before `linear` make of it another dtype
  int64_t sums_from;  // in `partial`: dweight's parts come first
};

template <class T>
__device__ __forceinline__ T* shared_as() {
  return static_cast<T*>(static_cast<void*>(shared_memory()));
}

__device__ __forceinline__ void store_element(void* out, DType dtype, int64_t i, float v) {
  with_type(dtype, [&](auto* type) {
    using E = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    static_cast<E*>(out)[i] = from_float<E>(v);
  });
}

// Of `part`, which begins at row part * most.
__device__ __forceinline__ int rows_of_part(int64_t M, int part, int most) {
  const int64_t left = M - int64_t{part} * most;
  return left < 0 ? 0 : left < most ? static_cast<int>(left) : most;
}

// get(0) + ... + get(count - 1), eight at a time by a tree: one chain would lose more.
template <class Get>
__device__ __forceinline__ float add_up(int count, Get get) {
  float total = 0.0f;
  for (int i = 0; i < count; i += kStrip) {
    Strip eight;
#pragma unroll
    for (int e = 0; e < kStrip; ++e) eight.v[e] = i + e < count ? get(i + e) : 0.0f;
    total += sum(eight);
  }
  return total;
}

template <class T>
struct ColumnSums {
  static constexpr int kLanes = kSumTile / kStrip;  // that share a row
  static constexpr int kRows = kThreads / kLanes;   // at a time
  static_assert(kThreads == kSums * kSumTile);

  const SumsCall<T>& call;
  const Layer& layer;
  int which;        // 0: after `linear`, 1: before
  int block, part;  // of columns, of the rows

  __device__ __forceinline__ ColumnSums(const SumsCall<T>& c, int s, int program)
      : call(c),
        layer(c.layer),
        which(s),
        block(program % c.cut.blocks[s]),
        part(program / c.cut.blocks[s]) {}

  __device__ __forceinline__ const Side& side() const { return call.sides[which]; }
  __device__ __forceinline__ void* wanted(int i) const { return call.wanted[which].out[i]; }

  // ---- a thread's rows. Its sums stand in shared memory (kSums, kStrip, kThreads): registers are
  // for the way back. Volatile, for else the compiler keeps them in registers all the same.

  __device__ __forceinline__ static void add(int i, const Strip& t) {
    volatile float* sum = shared_as<float>() + i * kStrip * kThreads + threadIdx.x;
#pragma unroll
    for (int e = 0; e < kStrip; ++e) sum[e * kThreads] = sum[e * kThreads] + t.v[e];
  }

  // Row at.m, walked back as by the first launch, as far as need be.
  __device__ __forceinline__ void add_gradients(const Place& at) const {
    const Side& s = side();
    const RowStats row = load_stats(s.over_rows ? call.out.from.stats : nullptr, layer, at);
    const Strip t = s.replay > 0 ? load(call.input[which], at) : Strip{};
    const Tape tape = replay<T>(layer, s, at, t, row);
    Strip d = load(call.gradient[which], at), unused;
    for (int i = s.stages.count - 1; i >= call.stop[which]; --i) {
      const Stage stage = s.stages.stage[i];
      if (stage == Stage::gate) add(3, d * tape.gate);
      if (stage == Stage::norm) {
        add(1, d * tape.c);
        add(2, d);
      }
      if (i == call.stop[which]) break;
      if (stage == Stage::norm)
        d = norm_back(layer, at, d, tape.c, row, load_means(at));
      else
        d = stage_back(layer, stage, at, d, tape, unused);
    }
  }

  // Only a gate before a norm over rows asks for them.
  __device__ __forceinline__ RowMeans load_means(const Place& at) const {
    if (!side().over_rows) return {0.0f, 0.0f};
    return {call.out.from.row_means[at.m], call.out.from.row_means[layer.M + at.m]};
  }

  __device__ __forceinline__ void add_rows() const {
    for (int i = 0; i < kSums * kStrip; ++i) shared_as<float>()[i * kThreads + threadIdx.x] = 0.0f;
    const int n = block * kSumTile + static_cast<int>(threadIdx.x) % kLanes * kStrip;
    const int rows = rows_of_part(layer.M, part, call.cut.sum_rows);
    for (int r = threadIdx.x / kLanes; r < rows; r += kRows) {
      const Place at = {int64_t{part} * call.cut.sum_rows + r, n, side().width, true};
      if (wanted(0)) add(0, load(call.dz, at));
      if (wanted(1) || wanted(2) || wanted(3)) add_gradients(at);
    }
  }

  // ---- a program's, and all parts': from here on a thread has one sum of one column

  __device__ __forceinline__ static int sum() { return threadIdx.x / kSumTile; }
  __device__ __forceinline__ int column() const {
    return block * kSumTile + threadIdx.x % kSumTile;
  }

  // partial of this side (sum_parts, kSums, columns)
  __device__ __forceinline__ float* cell(int of_part, int i, int at) const {
    const int64_t columns = int64_t{call.cut.blocks[which]} * kSumTile;
    const int64_t before = which == 0 ? 0 : int64_t{call.cut.blocks[0]} * kSumTile * kSums;
    return call.out.partial + call.sums_from + before * call.cut.sum_parts +
           (int64_t{of_part} * kSums + i) * columns + at;
  }

  __device__ __forceinline__ void store_part() const {
    sync_threads();
    const int at = column() % kSumTile;
    const float* first =
        shared_as<float>() + (sum() * kStrip + at % kStrip) * kThreads + at / kStrip;
    *cell(part, sum(), column()) = add_up(kRows, [&](int r) { return first[r * kLanes]; });
  }

  __device__ __forceinline__ DType dtype(int i) const {
    return i == 0   ? layer.bias.dtype
           : i == 1 ? layer.norm_weight.dtype
           : i == 2 ? layer.norm_bias.dtype
                    : layer.gate.dtype;
  }

  __device__ __forceinline__ void add_parts() const {
    const int i = sum();
    if (!wanted(i) || column() >= side().width) return;
    const float total =
        add_up(call.cut.sum_parts, [&](int p) { return load_past_l1(cell(p, i, column())); });
    if (i == 3 && layer.scalar_gate)
      *cell(0, i, column()) = total;
    else
      store_element(wanted(i), dtype(i), column(), total);
  }

  // A gate that is one number: the sum over columns too.
  __device__ __forceinline__ void add_columns() const {
    const Team warp = {static_cast<int>(threadIdx.x % 32), 32, 0, 0};
    float total = 0.0f;
    for (int n = threadIdx.x; n < side().width; n += kThreads) total += load_past_l1(cell(0, 3, n));
    total = fusedres::cuda::sum(warp, total);
    if (warp.lane == 0) shared_as<float>()[threadIdx.x / 32] = total;
    sync_threads();
    if (threadIdx.x != 0) return;
    total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared_as<float>()[w];
    store_element(wanted(3), layer.gate.dtype, 0, total);
  }

  __device__ __forceinline__ void run() const {
    const SumsCut& cut = call.cut;
    int32_t* arrived = call.out.arrived + cut.tiles;
    add_rows();
    store_part();
    if (!last_to_arrive(arrived + (which == 0 ? 0 : cut.blocks[0]) + block, cut.sum_parts)) return;
    add_parts();
    if (!layer.scalar_gate || !wanted(3)) return;
    if (last_to_arrive(arrived + cut.blocks[0] + cut.blocks[1], cut.blocks[which])) add_columns();
  }
};

}  // namespace fusedres::cuda
