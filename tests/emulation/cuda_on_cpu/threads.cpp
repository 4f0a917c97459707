// What threads call: barriers, collectives, copies; and accesses that a build for races reports.
#include <algorithm>
#include <cstring>

#include "fibers.h"

namespace fusedres::emulator {

bool watch_races = false;

namespace {

bool computing = false;  // what a warp meets for: on the stacks of its lanes

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
}

}  // namespace

char* shared_memory() { return current->block->shared; }

int lane() { return current->thread % kWarp; }

void check_shared(const char* what, const void* p, size_t bytes, size_t alignment) {
  const Block& block = *current->block;
  const char* begin = static_cast<const char*>(p);
  if (begin < block.shared || begin + bytes > block.shared + block.shared_bytes)
    fail("%s: address %td bytes from the start of shared memory, which has %zu", what,
         begin - block.shared, block.shared_bytes);
  if (reinterpret_cast<uintptr_t>(p) % alignment) fail("%s: not %zu-byte aligned", what, alignment);
}

void maybe_yield() {
  if (draw(2)) return;
  wake(current);
  leave();
}

bool sync_block(bool any) {
  Block& block = *current->block;
  const int threads = static_cast<int>(place.threads.x);
  if (block.finished > 0) fail("sync_threads, but %d threads have ended", block.finished);
  block.any |= any;
  if (++block.arrived < threads) {
    wait_for("sync_threads");
    return block.result;
  }
  block.result = block.any;
  block.any = false;
  block.arrived = 0;
  block.races.sync_block();
  wake(block, 0, threads);
  leave();
  return block.result;
}

void meet(const char* name, const void* in, void* out, Compute compute) {
  Block& block = *current->block;
  const int first = current->thread / kWarp * kWarp;
  if (first + kWarp > static_cast<int>(place.threads.x))
    fail("%s in a warp of less than 32 threads", name);
  Warp& warp = block.warps[first / kWarp];
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0)
    fail("%s while other lanes of the warp are in %s", name, warp.name);
  warp.name = name;
  warp.in[lane()] = in;
  warp.out[lane()] = out;
  if (++warp.arrived < kWarp) return wait_for(name);
  warp.arrived = 0;
  computing = true;
  if (compute) compute(warp.in, warp.out);
  computing = false;
  if (!compute) block.races.sync_warp(first / kWarp);
  wake(block, first, kWarp);
  leave();
}

void copy_async(void* shared, const void* global, int bytes, int size) {
  check_shared("cp_async", shared, size, size);
  if (reinterpret_cast<uintptr_t>(global) % size && bytes > 0)
    fail("cp_async: global address not %d-byte aligned", size);
  if (bytes < 0 || bytes > size) fail("cp_async: %d bytes of %d", bytes, size);
  current->block->races.access(current->thread, shared, size, true);
  if (bytes > 0) on_access(global, bytes, false, size == 16);
  const Copy copy = {shared, global, bytes, size, current->group, draw(2) == 1};
  if (copy.late)
    std::memset(shared, kPoison, size);
  else
    land(copy);
  current->copies.push_back(copy);
}

void commit_copies() { ++current->group; }

void wait_for_copies(int pending) {
  std::vector<Copy>& copies = current->copies;
  const auto done = [&](const Copy& copy) { return copy.group < current->group - pending; };
  for (const Copy& copy : copies)
    if (done(copy)) {
      if (copy.late) land(copy);
      current->block->races.access(current->thread, copy.to, copy.size, true);
    }
  copies.erase(std::remove_if(copies.begin(), copies.end(), done), copies.end());
  maybe_yield();
}

void on_access(const void* p, size_t bytes, bool write, bool past_l1) {
  if (!current || !watch_races || computing || current->stack.holds(p)) return;
  Block& block = *current->block;
  if (block.memory.holds(p))
    block.races.access(current->thread, p, bytes, write);
  else
    visits.access(static_cast<int>(block.index), p, bytes, write, past_l1);
}

int32_t arrive(int32_t* counter) {
  maybe_yield();
  visits.arrive(static_cast<int>(current->block->index), counter);
  const int32_t before = (*counter)++;
  maybe_yield();
  return before;
}

}  // namespace fusedres::emulator
