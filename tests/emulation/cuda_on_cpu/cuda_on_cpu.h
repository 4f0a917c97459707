// The names of csrc/cuda/device.h on the CPU, by what PTX documents of them. One thread at a time
// runs, see machine.h.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cpu/storage.h"
#include "machine.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define threadIdx (::fusedres::emulator::place.thread)
#define blockIdx (::fusedres::emulator::place.block)
#define blockDim (::fusedres::emulator::place.threads)
#define gridDim (::fusedres::emulator::place.blocks)

#define FUSEDRES_VECTORS(type, name)                               \
  struct alignas(2 * sizeof(type)) name##2 { type x, y; };         \
  struct alignas(4 * sizeof(type)) name##4 { type x, y, z, w; };   \
  inline name##2 make_##name##2(type x, type y) { return {x, y}; } \
  inline name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
FUSEDRES_VECTORS(float, float)
FUSEDRES_VECTORS(int, int)
FUSEDRES_VECTORS(unsigned, uint)
#undef FUSEDRES_VECTORS

namespace fusedres::cuda {

using cpu::bfloat16;
using cpu::float16;
using cpu::to_float;

template <class T>
T from_float(float v) {
  T out;
  cpu::from_float(v, out);
  return out;
}

// ---- barriers and warps

inline void* shared_memory() { return emulator::shared_memory(); }

inline void sync_threads() { emulator::sync_block(false); }
inline bool sync_threads_or(bool any) { return emulator::sync_block(any); }
inline void sync_warp() { emulator::meet("sync_warp", nullptr, nullptr, nullptr); }

namespace detail {

template <class V>
struct Exchange {
  V value;
  int lane;
};

// Every lane's value goes to the lanes that name it.
template <class V>
V exchange(const char* name, V value, int source) {
  const Exchange<V> in = {value, source};
  V out;
  emulator::meet(name, &in, &out, [](const void* const* ins, void* const* outs) {
    for (int i = 0; i < emulator::kWarp; ++i) {
      const int from = static_cast<const Exchange<V>*>(ins[i])->lane;
      std::memcpy(outs[i], &static_cast<const Exchange<V>*>(ins[from & 31])->value, sizeof(V));
    }
  });
  return out;
}

}  // namespace detail

inline float shuffle_xor(float value, int lanes) {
  return detail::exchange("shuffle_xor", value, emulator::lane() ^ lanes);
}
inline float shuffle(float value, int lane) { return detail::exchange("shuffle", value, lane); }

// ---- global memory that other blocks write

template <class V>
__attribute__((no_sanitize("thread"))) V load_past_l1(const V* p) {
  emulator::maybe_yield();
  emulator::on_access(p, sizeof(V), false, true);
  return *p;
}

using emulator::arrive;

// ---- asynchronous copies; bytes beyond `bytes` are 0

inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  emulator::copy_async(shared, global, bytes, 16);
}
inline void cp_async_4(void* shared, const void* global, int bytes = 4) {
  emulator::copy_async(shared, global, bytes, 4);
}
inline void cp_async_commit() { emulator::commit_copies(); }
template <int kPending>
void cp_async_wait() {
  emulator::wait_for_copies(kPending);
}

// ---- matrices of 8 rows of 16 bytes, and the product of three of them

namespace detail {

// Lane i of matrix j's eight names its row i. Lane l gets elements 2 (l % 4) and one more of row
// l / 4, or, transposed, of column l / 4.
template <int kCount, bool kTranspose>
void load_matrices(uint32_t (&r)[kCount], const void* row) {
  emulator::check_shared("ldmatrix", row, 16, 16);
  emulator::on_access(row, 16, false);
  emulator::meet(kTranspose ? "ldmatrix.trans" : "ldmatrix", row, r,
                 [](const void* const* rows, void* const* outs) {
                   for (int lane = 0; lane < 32; ++lane)
                     for (int j = 0; j < kCount; ++j) {
                       uint16_t pair[2];
                       for (int e = 0; e < 2; ++e) {
                         const int along = lane % 4 * 2 + e, across = lane / 4;
                         const int i = kTranspose ? along : across, k = kTranspose ? across : along;
                         pair[e] = static_cast<const uint16_t*>(rows[j * 8 + i])[k];
                       }
                       std::memcpy(static_cast<uint32_t*>(outs[lane]) + j, pair, 4);
                     }
                 });
}

struct Fragments {
  const uint32_t *a, *b;
};

}  // namespace detail

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  detail::load_matrices<4, false>(r, row);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  detail::load_matrices<4, true>(r, row);
}

// mma.sync.m16n8k16: c += a b. Lane l, g = l / 4, t = l % 4: a's registers hold columns 2t, 2t + 1
// of rows g and g + 8, then columns 2t + 8, 2t + 9 of them; b's rows 2t, 2t + 1, then 2t + 8,
// 2t + 9 of column g; c's columns 2t, 2t + 1 of rows g, then g + 8.
template <class T>
void mma_16x8x16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const detail::Fragments in = {a, b};
  emulator::meet(std::is_same_v<T, float16> ? "mma.f16" : "mma.bf16", &in, c,
                 [](const void* const* ins, void* const* outs) {
                   float a[16][16], b[16][8], c[16][8];
                   const auto put = [](uint32_t pair, float* first, float* second) {
                     T v[2];
                     std::memcpy(v, &pair, 4);
                     *first = to_float(v[0]);
                     *second = to_float(v[1]);
                   };
                   for (int l = 0; l < 32; ++l) {
                     const auto* in = static_cast<const detail::Fragments*>(ins[l]);
                     const auto* acc = static_cast<const float*>(outs[l]);
                     const int g = l / 4, t = l % 4 * 2;
                     for (int i = 0; i < 4; ++i) {
                       float* at = &a[g + i % 2 * 8][t + i / 2 * 8];
                       put(in->a[i], at, at + 1);
                     }
                     for (int i = 0; i < 2; ++i)
                       put(in->b[i], &b[t + i * 8][g], &b[t + i * 8 + 1][g]);
                     for (int i = 0; i < 4; ++i) c[g + i / 2 * 8][t + i % 2] = acc[i];
                   }
                   for (int m = 0; m < 16; ++m)
                     for (int k = 0; k < 16; ++k)
                       for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
                   for (int l = 0; l < 32; ++l)
                     for (int i = 0; i < 4; ++i)
                       static_cast<float*>(outs[l])[i] = c[l / 4 + i / 2 * 8][l % 4 * 2 + i % 2];
                 });
}

// ---- launches

// nullptr or what is wrong. Parameters go to the kernel by value.
template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t programs, int threads, int shared_bytes,
                   void*, const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...));
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call = {kernel, {arguments...}};
  return emulator::run(
      programs, threads, shared_bytes,
      [](void* context) {
        const Call& c = *static_cast<Call*>(context);
        std::apply(c.kernel, c.arguments);
      },
      &call);
}

}  // namespace fusedres::cuda
