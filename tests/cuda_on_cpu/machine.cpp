#include "machine.h"

#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <vector>

#include "races.h"
#include "switch.h"
#include "visits.h"

namespace fusedres::emulator {

Place place;
Settings settings;

namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kPoison = 0xFF;  // NaN in every floating type

// ---- memory between two stretches that must not be touched

struct Guarded {
  static constexpr size_t kGuard = 1 << 20;
  char* base = nullptr;
  size_t asked = 0, inside = 0;

  explicit Guarded(size_t bytes) : asked(bytes) {
    const size_t page = sysconf(_SC_PAGESIZE);
    inside = (std::max<size_t>(bytes, 1) + page - 1) / page * page;
    base = static_cast<char*>(mmap(nullptr, inside + 2 * kGuard, PROT_NONE,
                                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    mprotect(begin(), inside, PROT_READ | PROT_WRITE);
  }
  ~Guarded() { munmap(base, inside + 2 * kGuard); }
  Guarded(const Guarded&) = delete;

  char* begin() const { return base + kGuard; }
  char* end() const { return begin() + inside; }
  bool holds(const void* p) const { return p >= base && p < end() + kGuard; }
};

std::map<void*, std::unique_ptr<Guarded>> buffers;

// ---- threads, warps, blocks

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

std::vector<std::unique_ptr<Block>> blocks;  // kept from launch to launch
Visits visits;
std::vector<Fiber*> runnable, stragglers;  // these hardly before no other can go on
Fiber* current = nullptr;
bool computing = false;  // what a warp meets for: on the stacks of its lanes
Stack scheduler = nullptr;
sigjmp_buf failure;
char message[512];
uint64_t state = 0;
bool straggle = false;  // some blocks of this launch have stragglers
void (*body)(void*);
void* context;

uint32_t draw(uint32_t below) {  // xorshift64*
  state ^= state >> 12, state ^= state << 25, state ^= state >> 27;
  return static_cast<uint32_t>(((state * 0x2545F4914F6CDD1Dull >> 32) * below) >> 32);
}

void leave() { switch_stack(&current->sp, scheduler); }

void wait_for(const char* what) {
  current->waits = what;
  leave();
}

void wake(Fiber* fiber) {
  fiber->waits = nullptr;
  (fiber->straggles ? stragglers : runnable).push_back(fiber);
}

void wake(const Block& block, int first, int count) {
  for (int i = 0; i < count; ++i) wake(block.fibers[first + i].get());
}

void land(const Copy& copy) {
  std::memcpy(copy.to, copy.from, copy.bytes);
  std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, copy.size - copy.bytes);
}

void enter() {
  body(context);
  wait_for_copies(0);
  current->finished = true;
  ++current->block->finished;
  leave();
}

void start_block(Block& block, unsigned index, int count, size_t shared_bytes) {
  block.index = index;
  block.arrived = block.finished = 0;
  block.any = false;
  block.shared_bytes = shared_bytes;
  block.shared = block.memory.end() - (shared_bytes + 127) / 128 * 128;
  std::memset(block.shared, kPoison, block.memory.end() - block.shared);
  block.races.start(block.shared, shared_bytes, count);
  block.warps.assign((count + kWarp - 1) / kWarp, Warp{});
  while (static_cast<int>(block.fibers.size()) < count)
    block.fibers.push_back(std::make_unique<Fiber>());
  const bool some_straggle = straggle && draw(3) == 0;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = *block.fibers[i];
    fiber.block = &block;
    fiber.thread = i;
    fiber.finished = false;
    fiber.straggles = some_straggle && draw(8) == 0;
    fiber.copies.clear();
    fiber.group = 0;
    fiber.sp = new_stack(fiber.sp, fiber.stack.begin(), fiber.stack.end(), enter);
  }
  wake(block, 0, count);
}

void check_end_of_shared(const Block& block) {
  for (const char* p = block.shared + block.shared_bytes; p < block.memory.end(); ++p)
    if (static_cast<unsigned char>(*p) != kPoison)
      fail("a write %td bytes behind the end of shared memory",
           p - block.shared - block.shared_bytes);
}

Fiber* take(std::vector<Fiber*>& from) {
  const size_t chosen = draw(static_cast<uint32_t>(from.size()));
  Fiber* fiber = from[chosen];
  from[chosen] = from.back();
  from.pop_back();
  return fiber;
}

void step() {
  const bool late = runnable.empty() || (!stragglers.empty() && draw(1024) == 0);
  current = take(late ? stragglers : runnable);
  place.block.x = current->block->index;
  place.thread.x = current->thread;
  switch_stack(&scheduler, current->sp);
}

void run_all(size_t count, int threads, size_t shared_bytes) {
  visits.start(count);
  static std::vector<unsigned> order;  // not freed by a failure's jump
  order.resize(count);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = count; i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<uint32_t>(i))]);
  const size_t slots = std::min<size_t>(count, std::max(1, settings.resident));
  while (blocks.size() < slots) blocks.push_back(std::make_unique<Block>());
  size_t next = 0, done = 0;
  const auto refill = [&](Block& block) {
    start_block(block, order[next++], threads, shared_bytes);
  };
  for (size_t i = 0; i < slots; ++i) refill(*blocks[i]);
  while (done < count) {
    if (runnable.empty() && stragglers.empty()) {
      current = nullptr;
      for (size_t i = 0; i < slots && !current; ++i)
        for (int t = 0; t < threads && !current; ++t)
          if (blocks[i]->fibers[t]->waits) current = blocks[i]->fibers[t].get();
      fail("deadlock: this thread waits in %s for others that have ended or wait elsewhere",
           current->waits);
    }
    step();
    Block& block = *current->block;
    if (current->finished && block.finished == threads) {
      check_end_of_shared(block);
      ++done;
      if (next < count) refill(block);
    }
  }
}

// ---- faults

const char* kind_of(int signal) {
  return signal == SIGILL ? "a misaligned access or an index outside of an array (ubsan trap)"
                          : "an access";
}

void on_fault(int signal, siginfo_t* info, void*) {
  const char* address = static_cast<const char*>(info->si_addr);
  if (signal == SIGSEGV && current) {
    const Block& block = *current->block;
    if (block.memory.holds(address))
      fail("an access %td bytes from the start of shared memory, which has %zu bytes",
           address - block.shared, block.shared_bytes);
    if (current->stack.holds(address)) fail("stack overflow of a thread");
    for (const auto& [start, buffer] : buffers)
      if (buffer->holds(address))
        fail("an access outside of a buffer: %td bytes from its start",
             address - static_cast<const char*>(start));
  }
  fail("%s: signal %d at address %p", kind_of(signal), signal, static_cast<const void*>(address));
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};

struct Handlers {  // while a launch runs
  struct sigaction old[4];
  stack_t old_stack;
  std::vector<char> stack = std::vector<char>(64 << 10);
  Handlers() {
    stack_t own = {};
    own.ss_sp = stack.data();
    own.ss_size = stack.size();
    sigaltstack(&own, &old_stack);
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &action, &old[i]);
  }
  ~Handlers() {
    for (int i = 0; i < 4; ++i) sigaction(kSignals[i], &old[i], nullptr);
    sigaltstack(&old_stack, nullptr);
  }
};

}  // namespace

void fail(const char* format, ...) {
  char text[384];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(message, sizeof message, "block %d, thread %d: %s",
           current ? static_cast<int>(current->block->index) : -1, current ? current->thread : -1,
           text);
  siglongjmp(failure, 1);
}

const char* run(int64_t count, int threads, size_t shared_bytes, void (*new_body)(void*),
                void* new_context) {
  if (threads < 1 || threads > 1024 || count < 1 || count > INT32_MAX)
    return "invalid configuration argument";
  if (shared_bytes > settings.shared_limit) return "too much shared memory";
  body = new_body;
  context = new_context;
  state = (settings.seed + 1) * 0x9E3779B97F4A7C15ull;
  straggle = draw(2) == 1;
  place.threads.x = threads;
  place.blocks.x = static_cast<unsigned>(count);
  runnable.clear();
  stragglers.clear();
  current = nullptr;
  Handlers handlers;
  const bool failed = sigsetjmp(failure, 1) != 0;
  if (!failed) run_all(count, threads, shared_bytes);
  current = nullptr;
  return failed ? message : nullptr;
}

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

void* guarded_memory(size_t bytes, bool flush_to_end) {
  auto buffer = std::make_unique<Guarded>(bytes);
  char* p = flush_to_end ? buffer->end() - bytes : buffer->begin();
  std::memset(buffer->begin(), kPoison, buffer->inside);
  buffers[p] = std::move(buffer);
  return p;
}

void free_guarded(void* p) { buffers.erase(p); }

bool nothing_written_beside() {
  const auto poison = [](char c) { return static_cast<unsigned char>(c) == kPoison; };
  return std::all_of(buffers.begin(), buffers.end(), [&](const auto& entry) {
    const auto& [start, buffer] = entry;
    char* first = static_cast<char*>(start);
    return std::all_of(buffer->begin(), first, poison) &&
           std::all_of(first + buffer->asked, buffer->end(), poison);
  });
}

bool watch_races = false;

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
