// What each stage does to a row in L1, in the accumulate type, forward and backward.
//
//   layer: c = (t - mean) * rstd                  rms: c = t * rstd
//   batch: c[n] = (t[n] - mean[n]) * rstd[n]      norm: h = gamma * c + beta
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/rows.h"
#include "epilogue.h"

namespace fusedres::cpu::FUSEDRES_ISA {

// ---- rows

template <class A>
inline void load_row(const Rows& rows, int64_t m, A* t, int64_t n) {
  with_row<A>(rows, m, [&](const auto* in) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) t[i] = to_float(in[i]);
  });
}

// t += v
template <class A>
inline void add(A* t, const A* v, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t[i] += v[i];
}

template <class A>
inline void store_row(const A* t, const Rows& rows, int64_t m, int64_t n) {
  with_row<A>(rows, m, [&](auto* out) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) from_float(t[i], out[i]);
  });
}

// t as it would come back from storage of `dtype`.
template <class A>
inline void round_row(A* t, DType dtype, int64_t n) {
  if constexpr (std::is_same_v<A, float>) {
    if (dtype == DType::bfloat16) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) t[i] = to_float(to_bfloat16(t[i]));
    } else if (dtype == DType::float16) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) t[i] = to_float(to_float16(t[i]));
    }
  }
}

// t += scale * r, for the features that r has.
template <class A>
inline void add_scaled(const Rows& rows, int64_t m, A scale, A* t, int64_t n) {
  const int64_t features = std::min(rows.features, n);
  with_row<A>(rows, m, [&](const auto* r) {
#pragma omp simd
    for (int64_t i = 0; i < features; ++i) t[i] += scale * to_float(r[i]);
  });
}

// ---- row statistics

// The sum of term(i) for i in [0, n), a vector or an element at a time: `term` gets where, and of
// what type.
template <class A, class F>
inline A sum_of(int64_t n, const F& term) {
  using V = Vector<A>;
  using Anywhere = typename V::Anywhere;
  constexpr int kAtOnce = 4;  // sums, so that an addition need not wait for the one before
  typename V::Aligned sums[kAtOnce] = {};
  int64_t i = 0;
  for (; i + kAtOnce * V::kLanes <= n; i += kAtOnce * V::kLanes)
#pragma GCC unroll 4
    for (int j = 0; j < kAtOnce; ++j) sums[j] += term(i + j * V::kLanes, Anywhere{});
  for (; i + V::kLanes <= n; i += V::kLanes) sums[0] += term(i, Anywhere{});
  A rest = 0;
  for (; i < n; ++i) rest += term(i, A{});
  return total<A>((sums[0] + sums[1]) + (sums[2] + sums[3])) + rest;
}

template <class T, class A>
inline const T& at(const A* t, int64_t i) {
  return *reinterpret_cast<const T*>(t + i);
}

template <class T, class A>
inline T& at(A* t, int64_t i) {
  return *reinterpret_cast<T*>(t + i);
}

// f(i, T{}, strip) for [0, n) in strips of that many T's, vectors but for the last elements: what
// goes down columns keeps a strip's sums in registers.
template <class A, class F>
inline void over_strips(int64_t n, const F& f) {
  using V = Vector<A>;
  constexpr int kStrip = 4;
  int64_t i = 0;
  for (; i + kStrip * V::kLanes <= n; i += kStrip * V::kLanes)
    f(i, typename V::Anywhere{}, std::integral_constant<int, kStrip>{});
  for (; i + V::kLanes <= n; i += V::kLanes)
    f(i, typename V::Anywhere{}, std::integral_constant<int, 1>{});
  for (; i < n; ++i) f(i, A{}, std::integral_constant<int, 1>{});
}

template <class A>
inline A sum(const A* t, int64_t n) {
  return sum_of<A>(n, [&](int64_t i, auto v) { return at<decltype(v)>(t, i); });
}

template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
  return sum_of<A>(
      n, [&](int64_t i, auto v) { return at<decltype(v)>(a, i) * at<decltype(v)>(b, i); });
}

// c = (t - shift) * rstd
template <class A>
struct RowScale {
  A shift, rstd;
};

// Two passes, the second about the mean, which layer norm subtracts from t. Its own rounding (large
// where the mean is) shows as the mean of what is left, `shift`.
template <class A>
inline RowScale<A> center(A* t, int64_t n, bool subtract_mean, A eps) {
  // Ready before the sums are: a division after them would make the row wait.
  const A per_n = A(1) / static_cast<A>(n);
  if (!subtract_mean) return {0, 1 / std::sqrt(dot(t, t, n) * per_n + eps)};
  const A mean = sum(t, n) * per_n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) t[i] -= mean;
  const A rest = sum(t, n), squares = dot(t, t, n);
  const A shift = rest * per_n, var = squares * per_n - shift * shift;
  // A variance that overflows makes the row NaN, as torch does, not 0.
  return {shift, 1 / std::sqrt(var + eps) + (var - var)};
}

// out = gamma * t + beta; out may be t.
template <class A>
inline void scale_shift(const A* t, const A* gamma, const A* beta, A* out, int64_t n) {
  if (gamma && beta) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = gamma[i] * t[i] + beta[i];
  } else if (gamma) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = gamma[i] * t[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = beta ? t[i] + beta[i] : t[i];
  }
}

// d, the gradient of c, becomes t's: rstd * (d - mean(d) - c * mean(d * c)); rms has no mean(d).
template <class A>
inline void normalize_grad(A* d, const A* c, A rstd, int64_t n, bool center) {
  const A per_n = A(1) / static_cast<A>(n), mean_d = center ? sum(d, n) * per_n : A(0),
          mean_dc = dot(d, c, n) * per_n;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) d[i] = rstd * (d[i] - mean_d - c[i] * mean_dc);
}

// ---- activation, dropout, drop-path

inline bool beyond_sin_limit(const float* t, int64_t n) {
  bool beyond = false;
  for (int64_t i = 0; i < n; ++i) beyond |= !(std::fabs(t[i]) < kSinLimit);
  return beyond;
}
inline bool beyond_sin_limit(const double*, int64_t) { return false; }

// out = act(t); out may be t.
template <class A>
inline void activate(Act act, const A* t, A* out, int64_t n) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if (std::is_same_v<F, Sin> && beyond_sin_limit(t, n)) {
      for (int64_t i = 0; i < n; ++i) out[i] = std::sin(t[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) out[i] = F::value(t[i]);
    }
  });
}

// d *= act'(h)
template <class A>
inline void activate_grad(Act act, A* d, const A* h, int64_t n) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if (std::is_same_v<F, Sin> && beyond_sin_limit(h, n)) {
      for (int64_t i = 0; i < n; ++i) d[i] *= std::cos(h[i]);
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) d[i] *= F::grad(h[i]);
    }
  });
}

// Zeroes element i where philox(seed, first + i) < p * 2^32 and scales the others. Not 0 * t: what
// is dropped is 0 even if it was NaN.
template <class A>
inline void drop_elements(A* t, int64_t n, uint64_t seed, uint64_t first, double p) {
  // Words are made apart from their use: together, gcc makes no SIMD code of them.
  constexpr int64_t kBlock = 256;
  uint32_t words[kBlock];
  const uint32_t threshold =
      static_cast<uint32_t>(std::min<uint64_t>(drop_threshold(p), UINT32_MAX));
  const A scale = static_cast<A>(keep_scale(p));
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t count = std::min(kBlock, n - begin);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) words[i] = philox(seed, first + begin + i, Stream::element);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      t[begin + i] = words[i] >= threshold && p < 1 ? t[begin + i] * scale : A(0);
  }
}

template <class A>
inline void drop_sample(A* t, int64_t n, uint64_t seed, uint64_t sample, double p) {
  const bool kept = philox(seed, sample, Stream::sample) >= drop_threshold(p);
  const A scale = static_cast<A>(keep_scale(p));
  for (int64_t i = 0; i < n; ++i) t[i] = kept ? t[i] * scale : A(0);
}

// ---- one stage on one row

// What a row's backward needs of its forward: what `act` and `gate` saw, the norm's c and rstd.
template <class A>
struct Tape {
  const A *act = nullptr, *gate = nullptr, *c = nullptr;
  A rstd = 0;
};

// out = h = gamma * c + beta, if it is not null; returns rstd. `kKeep`: c stays in t, which is not out.
template <class A, bool kKeep>
inline A norm_forward(const Program<A>& p, A* t, A* out) {
  const Recipe& r = *p.recipe;
  const int64_t n = p.width;
  const auto normalize = [&](const auto& c_of, A rstd) {
    if (p.gamma && p.beta && out) {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) {
        const A c = c_of(i);
        if constexpr (kKeep) t[i] = c;
        out[i] = p.gamma[i] * c + p.beta[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) t[i] = c_of(i);
      if (out) scale_shift(t, p.gamma, p.beta, out, n);
    }
    return rstd;
  };
  if (r.norm == Norm::batch)
    return normalize([&](int64_t i) { return (t[i] - p.mean[i]) * p.rstd[i]; }, A(0));
  const auto [shift, rstd] = center(t, n, r.norm == Norm::layer, static_cast<A>(r.eps));
  return normalize([t, shift = shift, rstd = rstd](int64_t i) { return (t[i] - shift) * rstd; },
                   rstd);
}

// Runs one stage on t and returns where its result lies: t itself, or `next` where the tape keeps
// what the stage saw.
template <class A, bool kTape>
inline A* forward_stage(const Program<A>& p, Stage stage, int64_t m, A* t, A* next, Tape<A>* tape) {
  const Recipe& r = *p.recipe;
  const int64_t n = p.width;
  A* out = kTape && needs_input(stage) ? next : t;
  switch (stage) {
    case Stage::norm: {
      const A rstd = norm_forward<A, kTape>(p, t, out);
      if constexpr (kTape) {
        tape->c = t;
        tape->rstd = rstd;
      }
      return out;
    }
    case Stage::act:
      if constexpr (kTape) tape->act = t;
      activate(r.act, t, out, n);
      return out;
    case Stage::gate:
      if constexpr (kTape) tape->gate = t;
      if (r.scalar_gate) {
        const A gate = p.gate[0];
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) out[i] = t[i] * gate;
      } else {
        scale_shift<A>(t, p.gate, nullptr, out, n);
      }
      return out;
    case Stage::dropout:
      drop_elements(t, n, p.seed, static_cast<uint64_t>(m) * n, r.dropout);
      return t;
    case Stage::droppath:
      drop_sample(t, n, p.seed, m / p.sample_rows, r.drop_path);
      return t;
    case Stage::add: {
      const Rows& source = p.residual_is_input ? p.input : p.residual;
      add_scaled(source, m, static_cast<A>(r.residual_scale), t, n);
      return t;
    }
    case Stage::linear:
      return t;
  }
  return t;
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
