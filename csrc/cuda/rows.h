// Whole rows, by a team of lanes of one warp: statistics, and the way back through a norm.
#pragma once

#include "cuda/stages.h"

namespace fusedres::cuda {

// ---- teams: lanes that share a row, a strip each, then the next strips

struct Team {
  int lane, size;  // size: a power of 2, 4 to 32, so that a warp holds at most 8 rows
  int row, rows;   // the team's among the program's teams
};

__device__ __forceinline__ Team team_of(int width) {
  int size = 4;
  while (size < 32 && size * kStrip < width) size *= 2;
  const int thread = threadIdx.x;
  return {thread % size, size, thread / size, kThreads / size};
}

__device__ __forceinline__ float sum(const Team& team, float v) {
  for (int lanes = team.size / 2; lanes > 0; lanes /= 2) v += shuffle_xor(v, lanes);
  return v;
}

__device__ __forceinline__ float sum(const Strip& t) {
  return ((t.v[0] + t.v[1]) + (t.v[2] + t.v[3])) + ((t.v[4] + t.v[5]) + (t.v[6] + t.v[7]));
}

// ---- statistics

// Of a row or a part of it: mean + rest is the mean, rest what rounding took from it (which matters
// where |mean| >> sigma); m2 the sum of squared deviations. Without centring the mean is 0.
struct Moments {
  float mean, rest, m2;
};

// Of the first `width` elements that get(n), the strip at column n, gives.
template <class Get>
__device__ __forceinline__ Moments moments(const Team& team, int width, bool centred, Get get) {
  const float count = static_cast<float>(width);
  Moments row = {0.0f, 0.0f, 0.0f};
  for (int pass = centred ? 0 : 1; pass < 2; ++pass) {
    float total = 0.0f, squares = 0.0f;
    for (int n = team.lane * kStrip; n < width; n += team.size * kStrip) {
      const Strip d =
          inside({0, n, width, true}, map(get(n), [&](float v) { return v - row.mean; }));
      total += sum(d);
      squares += sum(d * d);
    }
    total = sum(team, total);
    if (pass == 0) {
      row.mean = total / count;
    } else if (centred) {
      row.rest = total / count;
    }
    if (pass == 1) row.m2 = sum(team, squares) - count * row.rest * row.rest;
  }
  return row;
}

// Of two parts of `count` (maybe 0) and `other_count` elements. The mean stays the first part's, so
// that the difference of two means, which lie close together, keeps its digits. Source of the
// formula: Chan, Golub, LeVeque (1979).
__device__ __forceinline__ Moments merge(const Moments& a, float count, const Moments& b,
                                         float other_count) {
  if (count == 0.0f) return b;
  const float share = other_count / (count + other_count);
  const float delta = (b.mean - a.mean) + (b.rest - a.rest);
  return {a.mean, a.rest + delta * share, a.m2 + b.m2 + delta * delta * (count * share)};
}

__device__ __forceinline__ RowStats stats_of(const Layer& layer, const Moments& row, int width) {
  return {row.mean + row.rest, rstd_of_row(layer, row.m2 / static_cast<float>(width))};
}

// stats (2, M)
__device__ __forceinline__ void store_stats(float* stats, const Layer& layer, const Team& team,
                                            const Place& at, RowStats row) {
  if (!stats || team.lane != 0 || !at.live) return;
  stats[at.m] = row.mean;
  stats[layer.M + at.m] = row.rstd;
}

__device__ __forceinline__ RowStats load_stats(const float* stats, const Layer& layer,
                                               const Place& at) {
  if (!stats || !at.live) return {0.0f, 0.0f};
  return {stats[at.m], stats[layer.M + at.m]};
}

// ---- back through the stages of one side

// Means over a row of g = norm_weight * dh and of g * c.
struct RowMeans {
  float g, gc;
};

// d, the gradient of the norm's result, becomes that of what it acts on.
__device__ __forceinline__ Strip norm_back(const Layer& layer, const Place& at, const Strip& d,
                                           const Strip& c, RowStats row, RowMeans means) {
  const Strip g = load(layer.norm_weight, at, 1.0f) * d;
  if (layer.norm == Norm::batch) return column_rstd(layer, at) * g;
  return map(g, c, [&](float v, float u) { return row.rstd * (v - means.g - u * means.gc); });
}

// Walks a row back: emit(place, d, to_residual) gets each strip's gradients of the side's input and
// of its residual. input(at) and gradient(at) give the strips of the side's input and of the
// gradient of its result. The first of two passes sums up for a norm over rows.
template <class T, class Input, class Gradient, class Emit>
__device__ __forceinline__ RowMeans walk_row_back(const Layer& layer, const Side& side,
                                                  const Team& team, Place at, RowStats row,
                                                  Input input, Gradient gradient, Emit emit) {
  RowMeans means = {0.0f, 0.0f};
  const int norm = side.norm_at, count = side.stages.count;
  for (int pass = side.over_rows ? 0 : 1; pass < 2; ++pass) {
    float sum_g = 0.0f, sum_gc = 0.0f;
    for (at.n = team.lane * kStrip; at.n < side.width; at.n += team.size * kStrip) {
      const Strip t = side.replay > 0 ? input(at) : Strip{};
      const Tape tape = replay<T>(layer, side, at, t, row);
      Strip d = gradient(at), to_residual = {};
      const auto back = [&](int last, int first) {
        for (int i = last - 1; i >= first; --i)
          d = stage_back(layer, side.stages.stage[i], at, d, tape, to_residual);
      };
      back(count, norm < count ? norm + 1 : 0);
      if (pass == 0) {
        const Strip g = inside(at, load(layer.norm_weight, at, 1.0f) * d);
        sum_g += sum(g);
        sum_gc += sum(inside(at, g * tape.c));
        continue;
      }
      if (norm < count) {
        d = norm_back(layer, at, d, tape.c, row, means);
        back(norm, 0);
      }
      emit(at, d, to_residual);
    }
    if (pass == 0) {
      means.gc = sum(team, sum_gc) / static_cast<float>(side.width);
      sum_g = sum(team, sum_g);
      if (layer.norm == Norm::layer) means.g = sum_g / static_cast<float>(side.width);
    }
  }
  return means;
}

}  // namespace fusedres::cuda
