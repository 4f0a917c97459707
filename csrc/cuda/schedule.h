// Who does what, and when, in the Hopper kernel: its tiles, the roles of a block's warps and what
// they wait for, the memory it needs. Compiles for the host, where tests walk through it.
//
//   load      one warp     fills the ring of slots with tiles of x and weight
//   survey    two warps    what the rows and columns of a tile are to be scaled and shifted by
//   multiply  eight warps  z = x @ weight.T, slot by slot; parks the tile of z in shared memory
//   finish    four warps   makes y of the parked tile while the next one is multiplied
//
// Roles wait for each other by the barriers below, each for roles of its own block. Blocks wait for
// each other in two cases, where all are resident, which a cooperative launch sees to. Each posts
// before it waits.
// - A norm over rows follows `linear` and rows are wider than a tile (`blocks_share_rows`). `finish`
//   stores its tile of z and the moments of its rows; one tile later, when the others should have
//   done so too, it merges the moments in the order of the tiles and makes y of its own tile. A
//   block that has posted its tile number s waits for tiles that stand in one row block with its
//   tile number s - 1. As a row block has no more tiles than there are blocks, none of these comes
//   later than their blocks' number s, and to post that a block need only have waited for earlier
//   ones: nobody waits forever.
// - A norm stands before `linear`: all meet once, at the start.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan.h"
#include "epilogue.h"

namespace fusedres::cuda::sm90 {

constexpr int kBlockM = 128, kBlockK = 64;
constexpr int kSlots = 3;
constexpr int kLoadWarps = 1, kSurveyWarps = 2, kMultiplyWarps = 8, kFinishWarps = 4;

struct TileAt {
  int row_block, column_tile;
};

// Tiles of z, columns fastest: those of a row block are in flight together, so that its rows of x
// come from DRAM once. Block b of `blocks` takes tiles b, b + blocks, ...
struct Schedule {
  int tiles, column_tiles, k_steps;

  FUSEDRES_HD TileAt at(int tile) const { return {tile / column_tiles, tile % column_tiles}; }
};

inline Schedule make_schedule(const Layer& layer, int block_n) {
  const int64_t column_tiles = ceil_div(layer.N, block_n);
  return {static_cast<int>(ceil_div(layer.M, kBlockM) * column_tiles),
          static_cast<int>(column_tiles), static_cast<int>(ceil_div(layer.K, kBlockK))};
}

// ---- the roles

// `B` is a barrier: `wait(parity)` returns once its phase of that parity is over, and the phase
// before the first, of parity 1, is. A phase is over when `arrive`, one call a warp, has been called
// as often as `init` was told.
template <class B>
struct Barriers {
  B filled[kSlots], emptied[kSlots];  // slots of the ring
  B surveyed, applied;                // scales and shifts
  B parked, unparked;                 // the tile of z

  FUSEDRES_HD void init(bool survey_rows) {
    for (int i = 0; i < kSlots; ++i) {
      filled[i].init(kLoadWarps);
      emptied[i].init(kMultiplyWarps + (survey_rows ? kSurveyWarps : 0));
    }
    surveyed.init(kSurveyWarps);
    applied.init(kMultiplyWarps);
    parked.init(kMultiplyWarps);
    unparked.init(kFinishWarps);
  }
};

struct Ring {
  int slot = 0;
  uint32_t parity = 0;

  FUSEDRES_HD void next() {
    if (++slot == kSlots) slot = 0, parity ^= 1;
  }
};

// load(tile, k_step, slot) lets `filled` arrive once its copies are there.
template <class B, class Load>
FUSEDRES_HD void load_tiles(const Schedule& s, Barriers<B>& b, int block, int blocks, Load load) {
  Ring ring;
  for (int tile = block; tile < s.tiles; tile += blocks) {
    const TileAt at = s.at(tile);
    for (int k = 0; k < s.k_steps; ++k, ring.next()) {
      b.emptied[ring.slot].wait(ring.parity ^ 1);
      load(at, k, ring.slot);
    }
  }
}

// add(k_step, slot) sees each tile of x, where `rows` are surveyed; publish(tile) tells the result.
template <class B, class Add, class Publish>
FUSEDRES_HD void survey_tiles(const Schedule& s, Barriers<B>& b, int block, int blocks, bool rows,
                              Add add, Publish publish) {
  Ring ring;
  uint32_t parity = 0;
  for (int tile = block; tile < s.tiles; tile += blocks, parity ^= 1) {
    for (int k = 0; rows && k < s.k_steps; ++k, ring.next()) {
      b.filled[ring.slot].wait(ring.parity);
      add(k, ring.slot);
      b.emptied[ring.slot].arrive();
    }
    b.applied.wait(parity ^ 1);
    publish(s.at(tile));
    b.surveyed.arrive();
  }
}

// multiply(k_step, slot) starts a multiplication and returns when the one before has ended, end()
// when all have; park() applies the survey and parks the tile.
template <class B, class Multiply, class End, class Park>
FUSEDRES_HD void multiply_tiles(const Schedule& s, Barriers<B>& b, int block, int blocks,
                                Multiply multiply, End end, Park park) {
  Ring ring;
  uint32_t parity = 0;
  for (int tile = block; tile < s.tiles; tile += blocks, parity ^= 1) {
    int before = 0;
    for (int k = 0; k < s.k_steps; ++k, ring.next()) {
      b.filled[ring.slot].wait(ring.parity);
      multiply(k, ring.slot);
      if (k > 0) b.emptied[before].arrive();
      before = ring.slot;
    }
    end();
    b.emptied[before].arrive();
    b.surveyed.wait(parity);
    b.unparked.wait(parity ^ 1);
    park();
    b.applied.arrive();
    b.parked.arrive();
  }
}

// finish(tile, false) reads the parked tile; finish(tile, true), where blocks share rows, does what
// takes whole rows, one tile later.
template <class B, class Finish>
FUSEDRES_HD void finish_tiles(const Schedule& s, Barriers<B>& b, int block, int blocks,
                              bool shared_rows, Finish finish) {
  uint32_t parity = 0;
  const int end = s.tiles + (shared_rows ? blocks : 0);  // with a turn for the last tile's rows
  for (int tile = block; tile < end; tile += blocks, parity ^= 1)
    for (int whole = 0; whole <= (shared_rows ? 1 : 0); ++whole) {  // one call of a long `finish`
      if (whole ? tile == block : tile >= s.tiles) continue;
      if (!whole) b.parked.wait(parity);
      finish(s.at(tile - whole * blocks), whole);
      if (!whole) b.unparked.arrive();
    }
}

// ---- the plan

// Of a kernel's struct Shared.
constexpr int shared_bytes(int block_n) {
  const int ring = kSlots * (kBlockM + block_n) * kBlockK * 2, parked = kBlockM * block_n * 2;
  const int vectors = 4 * (2 * block_n + 4 * kBlockM), barriers = 8 * (2 * kSlots + 4);
  return ring + parked + (vectors + barriers + 1023) / 1024 * 1024;
}

inline bool norm_before(const Layer& layer) { return has(layer.prologue, Stage::norm); }

// What a norm before `linear` adds to `partial`: norm_weight * weight in the layer's dtype, then two
// vectors of N.
inline int64_t scaled_weight_floats(const Layer& layer) {
  return layer.norm_weight.data ? ceil_div(layer.N * layer.K, 8) * 4 : 0;
}

// Why this family cannot run the layer's forward on a Hopper GPU; nullptr: it can.
inline const char* why_not(const Layer& layer) {
  const auto boxes = [&](const Matrix& matrix) {  // a planner's has no data yet, and no stride
    return !matrix.data || (reinterpret_cast<uintptr_t>(matrix.data) % 16 == 0 &&
                            matrix.stride % 8 == 0 && matrix.stride >= layer.K);
  };
  if (layer.dtype != DType::float16 && layer.dtype != DType::bfloat16)
    return "Hopper's wide tiles are for float16 and bfloat16";
  for (const DType dtype : {layer.x_dtype, layer.residual_dtype, layer.y_dtype})
    if (dtype != layer.dtype) return "Hopper's wide tiles take operands of one dtype";
  const bool norm = layer.prologue.count == 1 && norm_before(layer) && layer.norm != Norm::batch;
  if (layer.prologue.count > 0 && !norm)
    return "of stages before linear, Hopper's wide tiles know a norm over rows alone";
  if (layer.K % 8 != 0 || !boxes(layer.x) || !boxes(layer.weight))
    return "rows of x and weight must start at multiples of 16 bytes and not overlap, for TMA";
  if (layer.N > kWidest || layer.K > kWidest) return "more than 2^20 features";
  if (ceil_div(layer.M, kBlockM) * ceil_div(layer.N, 128) > INT32_MAX / kBlockM)
    return "more than 2^24 tiles";
  return nullptr;
}

// Whether a norm over rows follows `linear`, and rows are wider than a tile.
inline bool blocks_share_rows(const Layer& layer, int block_n) {
  return side_of(layer, false).over_rows && layer.N > block_n;
}

inline Tile cut_forward(const Layer& layer, int block_n, int multiprocessors) {
  const Schedule schedule = make_schedule(layer, block_n);
  Tile tile = {};
  tile.block_m = kBlockM;
  tile.block_n = block_n;
  tile.programs = std::min(schedule.tiles, multiprocessors);
  tile.shared_bytes = shared_bytes(block_n);
  if (norm_before(layer)) {
    tile.partial_floats = scaled_weight_floats(layer) + 2 * layer.N;
    tile.counters = 2;
  } else if (blocks_share_rows(layer, block_n)) {
    tile.partial_floats = 3 * schedule.column_tiles * layer.M;
    tile.counters = 2 * ceil_div(layer.M, kBlockM);
  }
  return tile;
}

// Narrow tiles where wide ones would leave multiprocessors or columns idle.
inline Tile plan_forward(const Layer& layer, int multiprocessors) {
  const int64_t wide = ceil_div(layer.M, kBlockM) * ceil_div(layer.N, 256);
  const bool half_empty = (layer.N - 1) % 256 < 128 && layer.N < 1024;
  const bool narrow = wide < multiprocessors || half_empty;
  return cut_forward(layer, narrow ? 128 : 256, multiprocessors);
}

}  // namespace fusedres::cuda::sm90
