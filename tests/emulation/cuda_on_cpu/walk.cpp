// Walks through csrc/cuda/schedule.h: the roles of all blocks, one thread for each of their warps, in
// random order. Nothing is computed; what would go wrong on a GPU stops the walk.
//
// The test includes this several times, after texts of schedule.h with mistakes, whose namespace it
// gives other names.
#include <vector>

#ifndef FUSEDRES_WALK
#define FUSEDRES_WALK walk_schedule
#include "cuda/schedule.h"
#endif
#include "machine.h"

namespace fusedres::cuda::sm90 {

constexpr int kWarps = kLoadWarps + kSurveyWarps + kMultiplyWarps + kFinishWarps;

template <class Come>
void wait_until(const Come& come) {
  for (int tries = 0; !come(); ++tries) {
    if (tries == 100000) emulator::fail("deadlock");
    emulator::maybe_yield();
  }
}

struct Barrier {
  int expected = 0, come = 0;
  uint32_t phase = 0;

  void init(int arrivals) { expected = arrivals; }
  void wait(uint32_t parity) {
    wait_until([&] { return (phase & 1) != parity; });
    emulator::maybe_yield();
  }
  void arrive() {
    if (++come == expected) come = 0, ++phase;
    emulator::maybe_yield();
  }
};

struct Content {
  int tile = -1, k = -1;
  bool operator==(const Content&) const = default;
};

struct Block {
  Barriers<Barrier> barriers;
  Content slots[kSlots];
  int reading[kSlots] = {};  // warps that have begun to read a slot and have not ended
  int surveyed = -1, surveys = 0, applied = 0;
  int parked = -1, parks = 0, takes = 0;
};

struct Walk {
  Schedule schedule;
  int blocks;
  bool rows_before, shared_rows;
  std::vector<Block> state;
  std::vector<int> taken, completed;  // by tile
  std::vector<int> arrived, seen;     // by row block
};

Walk* walk;

void check(bool ok, const char* what, int tile) {
  if (!ok) emulator::fail("%s, tile %d", what, tile);
}

void run_load(Block& block, int b) {
  load_tiles(walk->schedule, block.barriers, b, walk->blocks, [&](TileAt at, int k, int slot) {
    const int tile = at.row_block * walk->schedule.column_tiles + at.column_tile;
    check(block.reading[slot] == 0, "a slot is filled while it is read", tile);
    block.slots[slot] = {};
    emulator::maybe_yield();
    block.slots[slot] = {tile, k};
    block.barriers.filled[slot].arrive();
  });
}

void run_survey(Block& block, int b) {
  int tile = b;
  survey_tiles(
      walk->schedule, block.barriers, b, walk->blocks, walk->rows_before,
      [&](int k, int slot) {
        ++block.reading[slot];
        emulator::maybe_yield();
        check(block.slots[slot] == Content{tile, k}, "survey reads another slot", tile);
        --block.reading[slot];
      },
      [&](TileAt) {
        const int previous = tile - walk->blocks;
        check(previous < 0 || block.surveyed == tile || block.applied == kMultiplyWarps,
              "a survey is overwritten before it is applied", tile);
        if (block.surveyed != tile) block.surveyed = tile, block.surveys = block.applied = 0;
        ++block.surveys;
        tile += walk->blocks;
      });
}

void run_multiply(Block& block, int b) {
  int tile = b, pending = -1;
  Content wanted;
  const auto end = [&] {  // of the product under way: until now it has read its slot
    emulator::maybe_yield();
    if (pending < 0) return;
    check(block.slots[pending] == wanted, "a slot changes under a multiplication", tile);
    --block.reading[pending];
    pending = -1;
  };
  multiply_tiles(
      walk->schedule, block.barriers, b, walk->blocks,
      [&](int k, int slot) {
        end();
        wanted = {tile, k};
        check(block.slots[slot] == wanted, "multiply starts with another slot", tile);
        ++block.reading[slot];
        pending = slot;
      },
      end,
      [&] {
        check(block.surveyed == tile && block.surveys == kSurveyWarps, "no survey yet", tile);
        check(block.parked == tile || block.parked < 0 || block.takes == kFinishWarps,
              "a tile is parked on one that is not taken", tile);
        if (block.parked != tile) block.parked = tile, block.parks = block.takes = 0;
        emulator::maybe_yield();
        ++block.parks;
        ++block.applied;
        tile += walk->blocks;
      });
}

void run_finish(Block& block, int b) {
  const int columns = walk->schedule.column_tiles;
  finish_tiles(
      walk->schedule, block.barriers, b, walk->blocks, walk->shared_rows,
      [&](TileAt at, bool whole) {
        const int tile = at.row_block * columns + at.column_tile, all = columns * kFinishWarps;
        if (!whole) {
          emulator::maybe_yield();
          check(block.parked == tile && block.parks == kMultiplyWarps, "takes another tile", tile);
          ++block.takes;
          ++walk->taken[tile];
          emulator::arrive(&walk->arrived[at.row_block]);
          return;
        }
        wait_until([&] { return walk->arrived[at.row_block] >= all; });
        if (emulator::arrive(&walk->seen[at.row_block]) == all - 1)
          walk->arrived[at.row_block] = walk->seen[at.row_block] = 0;
        ++walk->completed[tile];
      });
}

void run_thread(void*) {
  const int b = emulator::place.block.x;
  int warp = emulator::place.thread.x;
  Block& block = walk->state[b];
  if (warp < kLoadWarps) return run_load(block, b);
  if ((warp -= kLoadWarps) < kSurveyWarps) return run_survey(block, b);
  if ((warp -= kSurveyWarps) < kMultiplyWarps) return run_multiply(block, b);
  run_finish(block, b);
}

const char* outcome(const Walk& w) {
  for (int count : w.taken)
    if (count != kFinishWarps) return "a tile is not finished exactly once";
  for (int count : w.completed)
    if (count != w.shared_rows * kFinishWarps) return "a tile is not completed exactly once";
  for (int count : w.seen)
    if (count != 0) return "a counter is not 0 in the end";
  for (const Block& block : w.state)
    for (int slot = 0; slot < kSlots; ++slot)
      if (block.reading[slot] != 0) return "a slot is still being read";
  return nullptr;
}

// nullptr, or what goes wrong.
extern "C" const char* FUSEDRES_WALK(int64_t M, int64_t N, int64_t K, int block_n, int blocks,
                                     int resident, bool rows_before, bool shared_rows,
                                     uint64_t seed) {
  Layer layer = {};
  layer.M = M, layer.N = N, layer.K = K;
  Walk w = {};
  w.schedule = make_schedule(layer, block_n);
  w.blocks = std::min(blocks, w.schedule.tiles);
  w.rows_before = rows_before, w.shared_rows = shared_rows;
  w.state.resize(w.blocks);
  for (Block& block : w.state) block.barriers.init(rows_before);
  w.taken.resize(w.schedule.tiles);
  w.completed.resize(w.schedule.tiles);
  w.arrived.resize(ceil_div(M, kBlockM));
  w.seen.resize(w.arrived.size());
  walk = &w;
  emulator::settings = {seed, resident, 1024};
  const char* error = emulator::run(w.blocks, kWarps, 0, run_thread, nullptr);
  return error ? error : outcome(w);
}

}  // namespace fusedres::cuda::sm90
