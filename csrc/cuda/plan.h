// How a layer is cut into programs of the sm_80 kernels: sizes of tiles, shared memory, workspace.
// On the host, from shapes alone; the kernels take their constants from here.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cuda/layer.h"

namespace fusedres::cuda {

constexpr int kThreads = 256;  // of a program
constexpr int kDepth = 3;      // tiles of an operand in shared memory, in use or on their way
// Rows of operands in shared memory are 128 bytes, or as long as a tile is wide, and 16 bytes more,
// so that eight rows read together lie in different banks.
constexpr int kLine = 128, kPad = 16;
constexpr int kTilePad = 8;   // the same for the fp32 tile of results, in floats
constexpr int kSumTile = 64;  // of dweight, both ways; and the columns of a program of sums
constexpr int kSums = 4;      // over rows, for bias, norm_weight, norm_bias, gate
constexpr int kWidest = 1 << 20;

struct BlockSize {
  int m, n;
};
constexpr BlockSize kTiles[] = {{64, 128}, {32, 128}, {32, 64}, {16, 128}, {16, 64}};

// Programs on a multiprocessor that registers must suffice for: 128 a thread are too few where it
// has 32 sums.
constexpr int at_once(int block_m) { return block_m == 64 ? 1 : 2; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int element_bytes(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
constexpr int block_k(DType dtype) { return kLine / element_bytes(dtype); }

// ---- what a layer has

// Where `stage` stands; their count if nowhere.
inline int position(const Stages& stages, Stage stage) {
  return static_cast<int>(std::find(stages.stage, stages.stage + stages.count, stage) -
                          stages.stage);
}
inline bool has(const Stages& stages, Stage stage) {
  return position(stages, stage) < stages.count;
}

// Whether forward makes the rows of x that the product sees, and backward those of dz. Else they are
// copied as they are.
inline bool walks_x(const Layer& layer) {
  return layer.prologue.count > 0 || layer.x_dtype != layer.dtype;
}
inline bool walks_z(const Layer& layer) {
  return layer.epilogue.count > 0 || layer.y_dtype != layer.dtype;
}
// Whether x is cast for the product, and nothing else is done to it.
inline bool casts_x(const Layer& layer) { return walks_x(layer) && layer.prologue.count == 0; }

// The stages on one side of `linear` and what walking them forward and back needs to know.
struct Side {
  Stages stages;
  int width;       // features: K before linear, N after
  int norm_at;     // where the norm stands; count: nowhere
  bool over_rows;  // it takes its statistics over rows
  int replay;      // backward needs what the first `replay` stages act on
};

inline Side side_of(const Layer& layer, bool prologue) {
  const Stages& stages = prologue ? layer.prologue : layer.epilogue;
  Side side = {stages, static_cast<int>(prologue ? layer.K : layer.N),
               position(stages, Stage::norm), false, stages.count};
  side.over_rows = side.norm_at < stages.count && layer.norm != Norm::batch;
  while (side.replay > 0 && !needs_input(stages.stage[side.replay - 1])) --side.replay;
  return side;
}

// A gate before a norm over rows: its gradient's sum needs the means that the norm's backward took.
inline bool needs_row_means(const Side& side) {
  return side.over_rows && position(side.stages, Stage::gate) < side.norm_at;
}
inline bool needs_row_means(const Layer& layer) {
  return needs_row_means(side_of(layer, true)) || needs_row_means(side_of(layer, false));
}

// ---- shared memory

// Operands of a product, A in lines along the reduction. A is whole where a program makes it itself.
// Results lie in B's place.
inline int64_t product_bytes(DType dtype, int block_m, bool whole, int64_t reduction, int b_bytes) {
  const int64_t blocks = whole ? ceil_div(reduction, block_k(dtype)) : kDepth;
  return blocks * block_m * (kLine + kPad) + int64_t{kDepth} * b_bytes;
}

inline int64_t forward_bytes(const Layer& layer, BlockSize size) {
  return product_bytes(layer.dtype, size.m, walks_x(layer), layer.K, size.n * (kLine + kPad));
}
inline int64_t backward_bytes(const Layer& layer, BlockSize size) {
  const int b_bytes = block_k(layer.dtype) * (size.n * element_bytes(layer.dtype) + kPad);
  return product_bytes(layer.dtype, size.m, walks_z(layer), layer.N, b_bytes);
}
inline int64_t sums_bytes(const Layer& layer) {
  const int rows = block_k(layer.dtype);
  const int64_t operands = 2 * kDepth * rows * (kSumTile * element_bytes(layer.dtype) + kPad);
  return std::max<int64_t>(operands, kSums * 8 * kThreads * sizeof(float));  // see sums.h
}

// Why family sm_80 cannot run the layer on a device whose blocks may have `shared_limit` bytes of
// shared memory; nullptr: it can.
inline const char* why_not(const Layer& layer, int shared_limit, bool gradients) {
  const BlockSize least = kTiles[std::size(kTiles) - 1];
  if (layer.dtype == DType::float64) return "float64: tensor cores have no such form here";
  for (const DType dtype : {layer.x_dtype, layer.residual_dtype, layer.y_dtype})
    if (dtype != layer.dtype && dtype != DType::float32)
      return "x, residual and y must have the product's dtype or float32";
  if (layer.N > kWidest || layer.K > kWidest) return "more than 2^20 features";
  if (layer.M > INT32_MAX) return "more than 2^31 - 1 rows";
  if (forward_bytes(layer, least) > shared_limit)
    return "rows of x do not fit in shared memory, where they are made for the product";
  if (gradients && backward_bytes(layer, least) > shared_limit)
    return "rows of z do not fit in shared memory, where backward makes their gradients";
  return nullptr;
}

// ---- cuts

// A program's rows, times `groups` programs that take their tiles in turn.
inline Tile cut_rows(const Layer& layer, BlockSize size, int64_t groups, int64_t bytes) {
  Tile tile = {};
  tile.block_m = size.m;
  tile.block_n = size.n;
  tile.groups = static_cast<int>(groups);
  tile.programs = ceil_div(layer.M, size.m) * groups;
  tile.shared_bytes = static_cast<int>(bytes);
  return tile;
}

inline Tile cut_forward(const Layer& layer, BlockSize size, int64_t groups) {
  Tile tile = cut_rows(layer, size, groups, forward_bytes(layer, size));
  const int64_t tiles = ceil_div(layer.N, size.n);
  if (side_of(layer, false).over_rows && tiles > 1) {  // see finish_rows in forward_sm80.cu
    tile.partial_floats = 3 * tiles * layer.M;
    tile.counters = ceil_div(layer.M, size.m);
  }
  return tile;
}

// Without dx and dt there is no product, and nothing to share.
inline Tile cut_backward(const Layer& layer, const BackwardOut& out, BlockSize size,
                         int64_t groups) {
  if (!out.dx.data && !out.dt.data) groups = 1;
  Tile tile = cut_rows(layer, size, groups, backward_bytes(layer, size));
  if (layer.prologue.count > 0) tile.counters = ceil_div(layer.M, size.m);
  return tile;
}

// The largest tile that fits and fills the device, else the smallest that fits; not wider than need
// be, and not narrower than `least_n` where one fits.
template <class Bytes>
BlockSize choose(int64_t M, int64_t columns, int64_t least_n, int multiprocessors, int shared_limit,
                 Bytes bytes) {
  BlockSize best = kTiles[std::size(kTiles) - 1];
  for (const BlockSize size : kTiles) {
    const bool wide = size.n > 64 && columns <= 64;
    if (wide || size.n < least_n || bytes(size) > shared_limit) continue;
    best = size;
    if (ceil_div(M, size.m) * ceil_div(columns, size.n) >= multiprocessors) break;
  }
  return best;
}

// How many programs share a row block's tiles. Where each of them first walks the rows through
// stages, fewer do so less often; it ends when the last wave of programs does. Time is counted in
// tiles of the product; what a walk takes is an estimate.
inline int64_t share(const Layer& layer, int64_t columns, BlockSize size, bool walks, int64_t bytes,
                     int multiprocessors, int shared_limit) {
  constexpr int64_t kWalk = 2;
  const int64_t blocks = ceil_div(layer.M, size.m), tiles = ceil_div(columns, size.n);
  const int64_t fitting = std::max<int64_t>(shared_limit / bytes, 1);
  const int64_t slots = multiprocessors * std::min<int64_t>(fitting, at_once(size.m));
  int64_t best = tiles, least = INT64_MAX;
  for (int64_t each = 1; walks && each < 2 * tiles; each *= 2) {
    const int64_t groups = ceil_div(tiles, each), waves = ceil_div(blocks * groups, slots);
    const int64_t time = waves * (kWalk + ceil_div(tiles, groups));
    if (time <= least) least = time, best = groups;
  }
  return best;
}

// Rows that one tile holds need no second visit; where programs transform rows of x, wide tiles make
// that rarer.
inline Tile plan_forward(const Layer& layer, int multiprocessors, int shared_limit) {
  const auto bytes = [&](BlockSize size) { return forward_bytes(layer, size); };
  int64_t least_n = 0;
  const bool walks = walks_x(layer);
  if (walks) least_n = std::min<int64_t>(layer.N, 128);
  if (side_of(layer, false).over_rows && layer.N <= 128) least_n = layer.N;
  const BlockSize size = choose(layer.M, layer.N, least_n, multiprocessors, shared_limit, bytes);
  return cut_forward(
      layer, size, share(layer, layer.N, size, walks, bytes(size), multiprocessors, shared_limit));
}

inline Tile plan_backward(const Layer& layer, const BackwardOut& out, int multiprocessors,
                          int shared_limit) {
  const auto bytes = [&](BlockSize size) { return backward_bytes(layer, size); };
  const bool walks = walks_z(layer);
  const int64_t least_n = walks ? std::min<int64_t>(layer.K, 128) : 0;
  const BlockSize size = choose(layer.M, layer.K, least_n, multiprocessors, shared_limit, bytes);
  return cut_backward(
      layer, out, size,
      share(layer, layer.K, size, walks, bytes(size), multiprocessors, shared_limit));
}

// ---- residual_sums: tiles of dweight, each in `parts` of the rows, then blocks of columns of the
// sums after and before `linear`, each in `sum_parts` of the rows

// What is summed up over the rows on one side, by kSums; null: not asked for, or not of this side.
struct Wanted {
  void* out[kSums];
  bool any() const {
    return std::any_of(out, out + kSums, [](const void* p) { return p != nullptr; });
  }
  int stop(const Stages& stages) const {  // the first stage that any of them is about
    const int norm = out[1] || out[2] ? position(stages, Stage::norm) : stages.count;
    return std::min(norm, out[3] ? position(stages, Stage::gate) : stages.count);
  }
};
inline Wanted wanted_sums(const Layer& layer, const SumsOut& out, bool prologue) {
  const Stages& stages = prologue ? layer.prologue : layer.epilogue;
  const bool norm = has(stages, Stage::norm), gate = has(stages, Stage::gate);
  return {{prologue ? nullptr : out.dbias, norm ? out.dnorm_weight : nullptr,
           norm ? out.dnorm_bias : nullptr, gate ? out.dgate : nullptr}};
}

struct SumsCut {
  int tiles_k, tiles;  // of dweight; 0 where it is not asked for
  int blocks[2];       // of columns, after and before linear; 0: no sums there
  int parts, sum_parts;
  int rows, sum_rows;  // in a part
  int64_t programs() const {
    return int64_t{tiles} * parts + int64_t{blocks[0] + blocks[1]} * sum_parts;
  }
};

inline SumsCut cut_of(const Layer& layer, const SumsOut& out, const Tile& tile) {
  const auto count = [](int64_t a, int64_t b) { return static_cast<int>(ceil_div(a, b)); };
  SumsCut cut = {};
  cut.tiles_k = count(layer.K, kSumTile);
  cut.tiles = out.dweight.data ? count(layer.N, kSumTile) * cut.tiles_k : 0;
  for (int side = 0; side < 2; ++side)
    if (wanted_sums(layer, out, side == 1).any())
      cut.blocks[side] = count(side == 1 ? layer.K : layer.N, kSumTile);
  cut.parts = tile.parts;
  cut.sum_parts = tile.sum_parts;
  cut.rows = count(layer.M, tile.parts);
  cut.sum_rows = count(layer.M, tile.sum_parts);
  return cut;
}

inline Tile cut_sums(const Layer& layer, const SumsOut& out, int parts, int sum_parts) {
  Tile tile = {};
  tile.block_m = tile.block_n = kSumTile;
  tile.parts = parts;
  tile.sum_parts = sum_parts;
  const SumsCut cut = cut_of(layer, out, tile);
  tile.programs = cut.programs();
  tile.shared_bytes = static_cast<int>(sums_bytes(layer));
  const int64_t dweight = parts > 1 && cut.tiles > 0 ? layer.N * layer.K * parts : 0;
  const int64_t columns = int64_t{cut.blocks[0] + cut.blocks[1]} * kSumTile;
  tile.partial_floats = dweight + columns * kSums * sum_parts;
  tile.counters = cut.tiles + cut.blocks[0] + cut.blocks[1] + 1;
  return tile;
}

// As many parts as fill the device twice; none of less than 256 rows.
inline Tile plan_sums(const Layer& layer, const SumsOut& out, int multiprocessors) {
  const SumsCut whole = cut_of(layer, out, cut_sums(layer, out, 1, 1));
  const auto parts = [&](int64_t programs) {
    const int64_t filling = ceil_div(2 * multiprocessors, std::max<int64_t>(programs, 1));
    return static_cast<int>(std::clamp<int64_t>(std::min(filling, layer.M / 256), 1, 64));
  };
  return cut_sums(layer, out, parts(whole.tiles), parts(whole.blocks[0] + whole.blocks[1]));
}

}  // namespace fusedres::cuda
