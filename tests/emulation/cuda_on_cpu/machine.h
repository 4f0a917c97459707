// A CUDA device on the CPU: every thread is a fiber, which runs until it meets a barrier or a
// collective of its warp. Which thread goes on is drawn at random from a seed; so is the order of
// the blocks, of which several are under way at a time. What a GPU leaves undefined is made to show:
// shared memory starts as NaN, asynchronous copies land late or early, accesses outside of shared
// memory or of a guarded buffer stop the launch, and so do deadlocks and warps that disagree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fusedres::emulator {

constexpr int kWarp = 32;

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Place {  // of the thread that runs; launches have one dimension
  Index thread, block, threads, blocks;
};
extern Place place;

struct Settings {
  uint64_t seed = 0;
  int resident = 3;  // blocks under way at a time
  size_t shared_limit = 227 << 10;
};
extern Settings settings;

// Runs body(context) in every thread; nullptr, or what went wrong.
const char* run(int64_t blocks, int threads, size_t shared_bytes, void (*body)(void*),
                void* context);

[[noreturn]] __attribute__((format(printf, 1, 2))) void fail(const char* format, ...);

char* shared_memory();
void check_shared(const char* what, const void* p, size_t bytes, size_t alignment);
void maybe_yield();         // lets others run, or not
bool sync_block(bool any);  // whether any thread said so

// All lanes of a warp meet in an operation of this name; the last to arrive runs compute(in, out)
// with every lane's in and out. Without `compute` it is a barrier.
using Compute = void (*)(const void* const* in, void* const* out);
void meet(const char* name, const void* in, void* out, Compute compute);
int lane();

void copy_async(void* shared, const void* global, int bytes, int size);
void commit_copies();
void wait_for_copies(int pending);

int32_t arrive(int32_t* counter);  // adds 1; what was there before

// Of a build for races: see races.h and visits.h.
void on_access(const void* p, size_t bytes, bool write, bool past_l1 = false);

// Memory whose first or last byte lies at a page that must not be touched; starts as NaN.
void* guarded_memory(size_t bytes, bool flush_to_end);
void free_guarded(void* p);
bool nothing_written_beside();  // the buffers, on their pages

}  // namespace fusedres::emulator
