// The names of csrc/cuda/hopper.h on the CPU. What a GPU does on its own happens here as early or as
// late as it may: a box lands while others run, a product is worked out when the next one starts.
#pragma once

#include <map>

#include "cuda/device.h"
#include "cuda/schedule.h"

namespace fusedres::cuda::sm90 {

inline void wait_until(const char* what, const auto& come) {
  constexpr int kMostTries = 1 << 18;
  for (int tries = 0; !come(); ++tries) {
    if (tries == kMostTries) emulator::fail("deadlock: %s does not come", what);
    emulator::maybe_yield();
  }
}

// ---- barriers

struct Barrier {
  uint8_t expected, come;
  uint16_t phase;
  int32_t bytes;  // that this phase still waits for

  void init(int arrivals) { *this = {static_cast<uint8_t>(arrivals), 0, 0, 0}; }
  void wait(uint32_t parity) {
    wait_until("a phase", [&] { return (phase & 1u) != parity; });
    emulator::maybe_yield();
  }
  void arrive() {
    sync_warp();
    if (emulator::lane() == 0) count(1, 0);
    emulator::maybe_yield();
  }
  void arrive_and_expect(int more) { count(1, more); }
  void count(int arrivals, int more) {
    come += arrivals;
    bytes += more;
    if (come > expected) emulator::fail("a barrier for %d arrivals gets one more", expected);
    if (come < expected || bytes > 0) return;
    come = 0;
    ++phase;
  }
};

inline void fence_init() {}

inline void sync_warps(int warps) {
  struct Meeting {
    int come = 0;
    unsigned round = 0;
  };
  static std::map<unsigned, Meeting> meetings;  // by block
  Meeting& meeting = meetings[blockIdx.x];
  const unsigned round = meeting.round;
  if (++meeting.come == 32 * warps) {
    meeting.come = 0;
    ++meeting.round;
  }
  wait_until("a warp", [&] { return meeting.round != round; });
}

inline void wait_for_blocks(int32_t* counters, int count) {
  wait_until("a block", [&] { return *counters >= count; });
  if (arrive(counters + 1) == count - 1) counters[0] = counters[1] = 0;
}

// ---- boxes

struct BoxMap {
  const uint16_t* data;
  int64_t rows, columns, stride;
  int box_rows;
};

inline const char* map_boxes(BoxMap& map, const Matrix& matrix, DType, int64_t rows,
                             int64_t columns, int box_rows) {
  map = {static_cast<const uint16_t*>(matrix.data), rows, columns, matrix.stride, box_rows};
  return nullptr;
}

inline void load_box(const BoxMap& map, Barrier& barrier, void* to, int row, int column) {
  emulator::check_shared("load_box", to, map.box_rows * kBlockK * 2, 1024);
  emulator::maybe_yield();
  for (int r = 0; r < map.box_rows; ++r)
    for (int k = 0; k < kBlockK; ++k) {
      const bool inside = row + r < map.rows && column + k < map.columns;
      static_cast<uint16_t*>(to)[r * kBlockK + 8 * (k / 8 ^ r % 8) + k % 8] =
          inside ? map.data[(row + r) * map.stride + column + k] : 0;
    }
  emulator::maybe_yield();
  barrier.count(0, -map.box_rows * kBlockK * 2);
}

inline void fence_stores_before_boxes() {}
inline void fence_loads_before_boxes() {}

// ---- registers

constexpr int kBlockThreads = 512, kStartRegisters = 65536 / kBlockThreads;

template <int kCount>
void set_registers() {}
inline int opaque(int v) { return v; }

// ---- products

struct MatrixRow {
  void* row;
  const uint32_t* pairs;
};

inline void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  emulator::check_shared("stmatrix", row, 16, 16);
  const MatrixRow in = {row, r};
  emulator::meet("stmatrix", &in, nullptr, [](const void* const* ins, void* const*) {
    const auto lane = [&](int l) { return static_cast<const MatrixRow*>(ins[l]); };
    for (int l = 0; l < 32; ++l)
      for (int pair = 0; pair < 4; ++pair)
        std::memcpy(static_cast<uint32_t*>(lane(l)->row) + pair,
                    lane(l % 8 * 4 + pair)->pairs + l / 8, 4);
  });
}

template <class T, int kBlockN>
class Multiplier {
 public:
  void start(const T* x, const T* weight, int slot, bool first) {
    end();
    if (first) std::fill(std::begin(sums_), std::end(sums_), 0.0f);
    x_ = x + slot * kBlockM * kBlockK;
    weight_ = weight + slot * kBlockN * kBlockK;
  }

  void end() {
    emulator::maybe_yield();
    if (!x_) return;
    const int thread = threadIdx.x - kBlockThreads / 2, lane = thread % 32;
    float x[2][kBlockK], weight[kBlockK];
    for (int h = 0; h < 2; ++h) load(x_, thread / 32 * 16 + lane / 4 + 8 * h, x[h]);
    for (int i = 0; i < kBlockN / 4; ++i) {
      load(weight_, i / 2 * 8 + lane % 4 * 2 + i % 2, weight);
      for (int h = 0; h < 2; ++h)
        for (int k = 0; k < kBlockK; ++k) sums_[i / 2 * 4 + 2 * h + i % 2] += x[h][k] * weight[k];
    }
    x_ = nullptr;
  }

  float value(int i) const { return sums_[i]; }

 private:
  static void load(const T* tile, int row, float* to) {
    for (int k = 0; k < kBlockK; ++k)
      to[k] = to_float(tile[row * kBlockK + 8 * (k / 8 ^ row % 8) + k % 8]);
  }

  const T *x_ = nullptr, *weight_ = nullptr;  // of a product not worked out yet
  float sums_[kBlockN / 2];
};

// ---- launches

template <class... Arguments>
const char* launch_together(const Arguments&... arguments) {
  return launch(arguments...);
}

}  // namespace fusedres::cuda::sm90
