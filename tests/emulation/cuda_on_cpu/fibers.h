// Threads, warps and blocks: what the scheduler (machine.cpp) and threads.cpp share.
#pragma once

#include <memory>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "races.h"
#include "switch.h"
#include "visits.h"

namespace fusedres::emulator {

constexpr size_t kStack = 64 << 10;

struct Copy {
  void* to;
  const void* from;
  int bytes, size, group;
  bool late;  // lands when it is waited for, not at once
};

struct Block;

struct Fiber {
  Guarded stack{kStack};
  Stack sp = nullptr;
  Block* block = nullptr;
  int thread = 0;
  bool finished = false, straggles = false;
  const char* waits = nullptr;
  std::vector<Copy> copies;
  int group = 0;
};

struct Warp {
  const char* name = nullptr;
  int arrived = 0;
  const void* in[kWarp];
  void* out[kWarp];
};

struct Block {
  Guarded memory{settings.shared_limit + 128};
  char* shared = nullptr;
  size_t shared_bytes = 0;
  unsigned index = 0;
  int arrived = 0, finished = 0;
  bool any = false, result = false;  // of sync_block
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Warp> warps;
  Races races;
};

extern Fiber* current;  // the thread that runs; nullptr between launches
extern Visits visits;

uint32_t draw(uint32_t below);
void wait_for(const char* what);  // until somebody wakes the thread
void wake(Fiber* fiber);
void wake(const Block& block, int first, int count);
void leave();  // to the scheduler

}  // namespace fusedres::emulator
