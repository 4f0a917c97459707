// Races in global memory: two accesses of which one writes, by two blocks, and nothing that orders
// them, which only arrivals at a counter do: who arrives has seen what those before had written.
// What other blocks have written must moreover be read past L1. Of a build for races, see races.h.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "races.h"

namespace fusedres::emulator {

class Visits {
 public:
  void start(size_t blocks) {
    if (!watch_races) return;
    time_.assign(blocks, 1);
    known_.assign(blocks, Clock(blocks, 0));
    counters_.clear();
    words_.clear();
  }

  void arrive(int block, const void* counter) {
    if (!watch_races) return;
    Clock& clock = counters_[counter];
    clock.resize(time_.size(), 0);
    clock[block] = time_[block]++;
    for (size_t i = 0; i < clock.size(); ++i)
      clock[i] = known_[block][i] = std::max(clock[i], known_[block][i]);
  }

  void access(int block, const void* p, size_t bytes, bool write, bool past_l1) {
    const auto first = reinterpret_cast<uintptr_t>(p);
    for (uintptr_t word = first / 2; word < (first + bytes + 1) / 2; ++word)
      one(words_[word], block, write, past_l1);
  }

 private:
  using Clock = std::vector<int>;  // of each block, the last time that is known
  struct Access {
    int block = -1, time = 0;
  };
  struct Word {  // of 2 bytes
    Access written, read;
    bool several_read = false;
  };

  bool ordered(const Access& past, int block) const {
    return past.block < 0 || past.block == block || known_[block][past.block] >= past.time;
  }

  void one(Word& word, int block, bool write, bool past_l1) {
    if (!ordered(word.written, block))
      fail("race in global memory: block %d %s what block %d wrote", block,
           write ? "overwrites" : "reads", word.written.block);
    if (!write && !past_l1 && word.written.block >= 0 && word.written.block != block)
      fail("block %d reads through L1 what block %d wrote", block, word.written.block);
    if (write && (word.several_read || !ordered(word.read, block)))
      fail("race in global memory: block %d overwrites what block %d reads", block,
           word.read.block);
    const Access now = {block, time_[block]};
    if (write) {
      word = {now, {}, false};
      return;
    }
    word.several_read |= word.read.block >= 0 && word.read.block != block;
    word.read = now;
  }

  Clock time_;
  std::vector<Clock> known_;
  std::unordered_map<const void*, Clock> counters_;
  std::unordered_map<uintptr_t, Word> words_;
};

}  // namespace fusedres::emulator
