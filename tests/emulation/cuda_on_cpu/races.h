// Races in shared memory: two accesses of which one writes, by two threads, and no barrier between
// them. Also reads of what was never written. Only a build with gcc's -fsanitize=thread sees every
// access; its calls end in `on_access`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace fusedres::emulator {

void fail(const char* format, ...);
extern bool watch_races;

class Races {
 public:
  void start(const char* shared, size_t bytes, int threads) {
    if (!watch_races) return;
    begin_ = shared;
    end_ = shared + bytes;
    block_time_ = 1;
    warp_time_.assign(threads / 32 + 1, 1);
    words_.assign(bytes / 2 + 1, Word{});
  }

  // Only a barrier orders memory: a shuffle does not.
  void sync_block() { ++block_time_; }
  void sync_warp(int warp) {
    if (watch_races) ++warp_time_[warp];
  }

  void access(int thread, const void* p, size_t bytes, bool write) {
    const char* first = static_cast<const char*>(p);
    if (!watch_races || first < begin_ || first >= end_) return;
    for (size_t i = (first - begin_) / 2; i < (first - begin_ + bytes + 1) / 2; ++i)
      one(words_[i], i * 2, thread, write);
  }

 private:
  struct Access {
    int thread = -1;
    uint32_t block_time = 0, warp_time = 0;
    bool several_lanes = false, several_warps = false;
  };
  struct Word {  // of 2 bytes, the smallest element
    Access written, read;
  };

  bool ordered(const Access& past, int thread) const {
    if (past.thread < 0 || past.block_time < block_time_) return true;
    if (past.several_warps || past.thread / 32 != thread / 32) return false;
    if (past.warp_time < warp_time_[thread / 32]) return true;
    return past.thread == thread && !past.several_lanes;
  }

  void one(Word& word, size_t offset, int thread, bool write) {
    if (!ordered(word.written, thread))
      fail("race in shared memory at byte %zu: thread %d %s what thread %d wrote", offset, thread,
           write ? "overwrites" : "reads", word.written.thread);
    if (!write && word.written.thread < 0)
      fail("shared memory at byte %zu is read and was never written", offset);
    if (write && !ordered(word.read, thread))
      fail("race in shared memory at byte %zu: thread %d overwrites what thread %d reads", offset,
           thread, word.read.thread);
    const uint32_t warp_time = warp_time_[thread / 32];
    Access now = {thread, block_time_, warp_time};
    if (write) {
      word.written = now;
      word.read = {};
      return;
    }
    const Access& past = word.read;
    if (past.thread >= 0 && past.block_time == block_time_) {
      now.several_warps = past.several_warps || past.thread / 32 != thread / 32;
      now.several_lanes =
          past.warp_time == warp_time && (past.several_lanes || past.thread != thread);
    }
    word.read = now;
  }

  const char *begin_ = nullptr, *end_ = nullptr;
  uint32_t block_time_ = 1;
  std::vector<uint32_t> warp_time_;
  std::vector<Word> words_;
};

}  // namespace fusedres::emulator
