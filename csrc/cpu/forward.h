// Rows [begin, end) forward: each block is read once, goes through every stage and the product in
// the cache, and is written once.
#pragma once

#include <algorithm>

#include "cpu/product.h"
#include "cpu/stages.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// Rows of a block such that both sides of the product stay in L2 beside a panel.
template <class Unit>
inline int64_t block_rows(int64_t inner, int64_t width) {
  constexpr int64_t kElements = 1 << 16, kMost = 96;
  const int64_t rows = std::min(kMost, kElements / std::max<int64_t>(1, inner + width));
  const int64_t tile = tile_rows<Unit>();
  return std::max(tile, rows / tile * tile);
}

template <class A>
inline int64_t rows_in_L1(int64_t width) {
  constexpr int64_t kBytes = 1 << 14;
  return std::max<int64_t>(4, kBytes / sizeof(A) / std::max<int64_t>(1, width));
}

inline size_t stages_before_norm(const std::vector<Stage>& stages) {
  return std::find(stages.begin(), stages.end(), Stage::norm) - stages.begin();
}

// Columns [i, i + kStrip T's) of t: the mean m down the rows, the sums of t - m and of (t - m)^2.
template <class T, int kStrip, class A>
FUSEDRES_INLINE void strip_statistics(const A* t, int64_t stride, int64_t rows, A* mean, A* rest,
                                      A* square) {
  constexpr int kLanes = sizeof(T) / sizeof(A);
  T m[kStrip] = {}, d_sum[kStrip] = {}, d_square[kStrip] = {};
  for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) m[j] += at<T>(t, row * stride + j * kLanes);
#pragma GCC unroll 4
  for (int j = 0; j < kStrip; ++j) m[j] /= static_cast<A>(rows);
  for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) {
      const T d = at<T>(t, row * stride + j * kLanes) - m[j];
      d_sum[j] += d;
      d_square[j] += d * d;
    }
#pragma GCC unroll 4
  for (int j = 0; j < kStrip; ++j) {
    at<T>(mean, j * kLanes) = m[j];
    at<T>(rest, j * kLanes) = d_sum[j];
    at<T>(square, j * kLanes) = d_square[j];
  }
}

// Merges the rows t (rows, n) into the mean and squares of `seen` rows: two passes about the block's
// own mean, whose rounding shows as the mean of what is left. Both begin as 0.
template <class A>
inline void merge_statistics(const A* t, int64_t stride, int64_t rows, int64_t n, int64_t seen,
                             double* mean, double* squares, A* sums) {
  A *const rest = sums + n, *const square = rest + n;
  over_strips<A>(n, [&](int64_t i, auto v, auto strip) {
    strip_statistics<decltype(v), strip>(t + i, stride, rows, sums + i, rest + i, square + i);
  });
  const double here = static_cast<double>(rows);
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const double shift = rest[i] / here;
    merge_moments(mean[i], squares[i], static_cast<double>(seen), sums[i] + shift,
                  square[i] - rest[i] * shift, here);
  }
}

// Rows m, m + 1, ... through the first stages of p: stage by stage, as many rows at a time as L1
// holds. So what a row waits for, its sums and roots, other rows' work fills.
template <class A>
inline void run_stages(const Program<A>* p, size_t stages, int64_t m, int64_t rows, A* t,
                       int64_t stride) {
  const int64_t at_once = rows_in_L1<A>(stride);
  for (int64_t begin = 0; begin < rows; begin += at_once)
    for (size_t stage = 0; stage < stages; ++stage)
      for (int64_t i = begin; i < std::min(rows, begin + at_once); ++i)
        forward_stage<A, false>(*p, (*p->stages)[stage], m + i, t + i * stride, t + i * stride,
                                nullptr);
}

template <class Unit>
inline void to_units(const Sum<Unit>* t, int64_t n, Unit* out) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    auto* const bits = reinterpret_cast<uint16_t*>(out);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) bits[i] = to_bfloat16(t[i]).bits;
    if (n % 2) bits[n] = 0;
  }
}

template <class A, class Unit>
void forward(const Forward<A>& f, int64_t begin, int64_t end, double* statistics) {
  const bool multiplies = f.weight.data != nullptr;
  const Program<A>* const last = f.after ? f.after : f.before;  // the side that statistics are of
  const int64_t K = f.x.features, N = multiplies ? f.weight.width : K;
  const int64_t inner = units<Unit>(K), wide = round_up(N, Vector<A>::kLanes);
  const int64_t rows = block_rows<Unit>(K, wide), width = last ? last->width : 0;
  const int64_t step = round_up(std::max<int64_t>(1, K), Vector<A>::kLanes);
  const bool apart = !std::is_same_v<Unit, A>;  // units are made of what a row of floats holds
  Arena arena((rows * step + rows * inner + rows * wide + 3 * width) * sizeof(A));
  A* const t = arena.take<A>(rows * step);
  Unit* const left = arena.take<Unit>(rows * inner);
  A* const product = multiplies ? arena.take<A>(rows * wide) : t;
  A* const sums = arena.take<A>(3 * width);
  const auto stages_of = [&](const Program<A>* p) {
    if (!p) return size_t{0};
    return statistics && p == last ? stages_before_norm(*p->stages) : p->stages->size();
  };
  const size_t before_stages = stages_of(f.before), after_stages = stages_of(f.after);

  // z becomes y where y is stored, if it can; with no y and no stages, z is made where it is stored
  // and the mean gets the bias.
  const bool z_stays = !f.y.data && after_stages == 0;
  const Rows& stored = z_stays ? f.z : f.y;
  const bool there = multiplies && can_hold<A>(stored, N) && f.product == stored.dtype;
  const A* const bias = f.after ? f.after->bias : nullptr;
  const Block<A> block = there ? Block<A>(stored) : Block<A>(product, multiplies ? wide : step);
  const int64_t z_step = block.stride;
  const bool plain = multiplies && !f.before && !f.operand.data && f.x.dtype == f.product;
  const bool in_place =
      plain && !apart && f.product != DType::bfloat16 && f.product != DType::float16;
  const bool pairs_as_they_are = plain && apart;

  for (int64_t first = begin; first < end; first += rows) {
    const int64_t count = std::min(rows, end - first);
    A* const z = block.at(first);
    // x -> stages before -> operand
    if (pairs_as_they_are) {
      for (int64_t i = 0; i < count; ++i) load_units(f.x, first + i, K, left + i * inner);
    } else if (!in_place) {
      for (int64_t i = 0; i < count; ++i) load_row(f.x, first + i, t + i * step, K);
      run_stages(f.before, before_stages, first, count, t, step);
      for (int64_t i = 0; i < count; ++i) {
        A* const row = t + i * step;
        if (f.operand.data) store_row(row, f.operand, first + i, K);
        if (apart && multiplies)
          to_units(row, K, left + i * inner);
        else if (multiplies && (f.x.dtype != f.product || f.before))
          round_row(row, f.product, K);
      }
    }
    // @ weight.T
    if (multiplies) {
      const Unit* a = left;
      int64_t stride = inner;
      if constexpr (std::is_same_v<Unit, A>) {
        a = in_place ? static_cast<const A*>(f.x.data) + first * f.x.stride : t;
        stride = in_place ? f.x.stride : step;
      }
      multiply(row_major(a, stride), count, static_cast<const Unit*>(f.weight.data), inner, N, z,
               z_step, false);
    }
    // z -> stages after -> y
    for (int64_t i = 0; i < count; ++i) {
      A* const row = z + i * z_step;
      if (f.early_bias) add(row, f.early_bias, N);
      if (multiplies) round_row(row, f.product, N);
      if (f.z.data && !(there && z_stays)) store_row(row, f.z, first + i, N);
      if (bias && !(there && z_stays)) add(row, bias, N);
    }
    run_stages(f.after, after_stages, first, count, z, z_step);
    for (int64_t i = 0; i < count && f.y.data && !there; ++i)
      store_row(z + i * z_step, f.y, first + i, N);
    if (statistics)
      merge_statistics(z, z_step, count, width, first - begin, statistics, statistics + width,
                       sums);
  }
  if (statistics && bias && there && z_stays)
    for (int64_t n = 0; n < width; ++n) statistics[n] += bias[n];
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
