// Launches: which thread goes on, block after block, and what ends a launch early.
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "fibers.h"

namespace fusedres::emulator {

Place place;
Settings settings;
Fiber* current = nullptr;
Visits visits;

namespace {

std::vector<std::unique_ptr<Block>> blocks;  // kept from launch to launch
std::vector<Fiber*> runnable, stragglers;    // these hardly before no other can go on
Stack scheduler = nullptr;
sigjmp_buf failure;
char message[512];
uint64_t state = 0;
bool straggle = false;  // some blocks of this launch have stragglers
void (*body)(void*);
void* context;

}  // namespace

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

namespace {

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
    const void* start;
    if (buffer_at(address, &start))
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

}  // namespace fusedres::emulator
