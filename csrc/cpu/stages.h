// One row at a time, in the accumulate type, in L1: what each stage does to it, forward and backward.
//
//   layer: c = (t - mean) * rstd        rms: c = t * rstd        batch: c[n] = (t[n] - mean[n]) * rstd[n]
//   norm:  h = gamma * c + beta
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cpu/storage.h"
#include "epilogue.h"
#include "params.h"

// The row loops are compiled once for each of these and chosen when the library is loaded, so that one binary runs on
// every x86-64 CPU. Elsewhere the compiler's own target is what there is.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FUSEDRES_SIMD_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4"), flatten))
#else
#define FUSEDRES_SIMD_CLONES
#endif

namespace fusedres::cpu {

// ---- rows ---------------------------------------------------------------------------------------------------

template <class T, class A>
inline void load_row(const T* in, A* t, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, A>) t[i] = in[i];
    else t[i] = to_float(in[i]);
  }
}

template <class T, class A>
inline void store_row(const A* t, T* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if constexpr (std::is_same_v<T, A>) out[i] = t[i];
    else if constexpr (std::is_same_v<T, bfloat16>) out[i] = to_bfloat16(t[i]);
    else out[i] = to_float16(t[i]);
  }
}

template <class T>
inline T* row(const Rows& rows, int64_t m) {
  return static_cast<T*>(rows.data) + m * rows.stride;
}

// t += scale * r, where r has `features` <= n elements of the storage type.
template <class T, class A>
inline void add_scaled(const T* r, A scale, A* t, int64_t features) {
  for (int64_t i = 0; i < features; ++i) {
    if constexpr (std::is_same_v<T, A>) t[i] += scale * r[i];
    else t[i] += scale * to_float(r[i]);
  }
}

// ---- row statistics ----------------------------------------------------------------------------------------

template <class A>
inline A sum(const A* t, int64_t n) {
  A s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += t[i];
  return s;
}

template <class A>
inline A dot(const A* a, const A* b, int64_t n) {
  A s = 0;
#pragma omp simd reduction(+ : s)
  for (int64_t i = 0; i < n; ++i) s += a[i] * b[i];
  return s;
}

// t becomes c; returns rstd. Two passes: the second about the mean.
template <class A>
inline A normalize(A* t, int64_t n, bool center, A eps) {
  if (center) {
    const A mean = sum(t, n) / n;
    for (int64_t i = 0; i < n; ++i) t[i] -= mean;
  }
  const A rstd = 1 / std::sqrt(dot(t, t, n) / n + eps);
  for (int64_t i = 0; i < n; ++i) t[i] *= rstd;
  return rstd;
}

template <class A>
inline void normalize_columns(A* t, const A* mean, const A* rstd, int64_t n) {
  for (int64_t i = 0; i < n; ++i) t[i] = (t[i] - mean[i]) * rstd[i];
}

template <class A>
inline void scale_shift(A* t, const A* gamma, const A* beta, int64_t n) {
  if (gamma && beta)
    for (int64_t i = 0; i < n; ++i) t[i] = gamma[i] * t[i] + beta[i];
  else if (gamma)
    for (int64_t i = 0; i < n; ++i) t[i] *= gamma[i];
  else if (beta)
    for (int64_t i = 0; i < n; ++i) t[i] += beta[i];
}

// d, the gradient of c, becomes the gradient of t: rstd * (d - mean(d) - c * mean(d * c)); rms has no mean(d).
template <class A>
inline void normalize_grad(A* d, const A* c, A rstd, int64_t n, bool center) {
  const A mean_d = center ? sum(d, n) / n : A(0), mean_dc = dot(d, c, n) / n;
  for (int64_t i = 0; i < n; ++i) d[i] = rstd * (d[i] - mean_d - c[i] * mean_dc);
}

// ---- activation, dropout, drop-path ------------------------------------------------------------------------

// Calls f(Activation{}) for the activation of `act`.
template <class F>
inline void with_activation(Act act, F&& f) {
  switch (act) {
    case Act::none: return;
    case Act::relu: return f(Relu{});
    case Act::leaky_relu: return f(LeakyRelu{});
    case Act::relu2: return f(Relu2{});
    case Act::relu6: return f(Relu6{});
    case Act::elu: return f(Elu{});
    case Act::selu: return f(Selu{});
    case Act::gelu: return f(Gelu{});
    case Act::gelu_tanh: return f(GeluTanh{});
    case Act::silu: return f(Silu{});
    case Act::mish: return f(Mish{});
    case Act::softplus: return f(Softplus{});
    case Act::hardswish: return f(Hardswish{});
    case Act::hardsigmoid: return f(Hardsigmoid{});
    case Act::sigmoid: return f(Sigmoid{});
    case Act::tanh: return f(Tanh{});
    case Act::sin: return f(Sin{});
    case Act::softsign: return f(Softsign{});
  }
}

inline bool beyond_sin_limit(const float* t, int64_t n) {
  bool beyond = false;
  for (int64_t i = 0; i < n; ++i) beyond |= !(std::fabs(t[i]) < kSinLimit);
  return beyond;
}
inline bool beyond_sin_limit(const double*, int64_t) { return false; }

template <class A>
inline void activate(Act act, A* t, int64_t n) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if (std::is_same_v<F, Sin> && beyond_sin_limit(t, n)) {
      for (int64_t i = 0; i < n; ++i) t[i] = std::sin(t[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) t[i] = F::value(t[i]);
    }
  });
}

template <class A>
inline void activate_grad(Act act, A* d, const A* h, int64_t n) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if (std::is_same_v<F, Sin> && beyond_sin_limit(h, n)) {
      for (int64_t i = 0; i < n; ++i) d[i] *= std::cos(h[i]);
    } else {
      for (int64_t i = 0; i < n; ++i) d[i] *= F::grad(h[i]);
    }
  });
}

inline uint64_t drop_threshold(double p) { return static_cast<uint64_t>(p * 0x1p32); }
inline double keep_scale(double p) { return p < 1 ? 1 / (1 - p) : 0; }

// Zeroes element i where philox(seed, first + i) < p * 2^32 and scales the others. Not 0 * t: what is dropped is 0 even
// if it was NaN.
template <class A>
inline void drop_elements(A* t, int64_t n, uint64_t seed, uint64_t first, double p) {
  const uint64_t threshold = drop_threshold(p);
  const A scale = static_cast<A>(keep_scale(p));
  for (int64_t i = 0; i < n; ++i) t[i] = philox(seed, first + i, Stream::element) >= threshold ? t[i] * scale : A(0);
}

template <class A>
inline void drop_sample(A* t, int64_t n, uint64_t seed, uint64_t sample, double p) {
  const bool kept = philox(seed, sample, Stream::sample) >= drop_threshold(p);
  const A scale = static_cast<A>(keep_scale(p));
  for (int64_t i = 0; i < n; ++i) t[i] = kept ? t[i] * scale : A(0);
}

// ---- one stage on one row -----------------------------------------------------------------------------------

// What a row's backward needs of its forward: the value that `act` and `gate` saw, the norm's c and rstd.
template <class A>
struct Tape {
  A *act = nullptr, *gate = nullptr, *c = nullptr;
  A rstd = 0;
};

template <class T, class A, bool kTape>
inline void forward_stage(const Program<A>& p, Stage stage, int64_t m, A* t, Tape<A>* tape) {
  const Recipe& r = *p.recipe;
  const int64_t n = p.width;
  switch (stage) {
    case Stage::norm:
      if (r.norm == Norm::batch) {
        normalize_columns(t, p.mean, p.rstd, n);
      } else {
        const A rstd = normalize(t, n, r.norm == Norm::layer, static_cast<A>(r.eps));
        if constexpr (kTape) tape->rstd = rstd;
      }
      if constexpr (kTape) std::memcpy(tape->c, t, n * sizeof(A));
      return scale_shift(t, p.gamma, p.beta, n);
    case Stage::act:
      if constexpr (kTape) std::memcpy(tape->act, t, n * sizeof(A));
      return activate(r.act, t, n);
    case Stage::gate:
      if constexpr (kTape) std::memcpy(tape->gate, t, n * sizeof(A));
      for (int64_t i = 0; i < n; ++i) t[i] *= p.gate[r.scalar_gate ? 0 : i];
      return;
    case Stage::dropout:
      return drop_elements(t, n, p.seed, static_cast<uint64_t>(m) * n, r.dropout);
    case Stage::droppath:
      return drop_sample(t, n, p.seed, m / p.sample_rows, r.drop_path);
    case Stage::add: {
      const Rows& source = p.residual_is_input ? p.input : p.residual;
      return add_scaled(row<T>(source, m), static_cast<A>(r.residual_scale), t, std::min(source.features, n));
    }
    case Stage::linear:
      return;
  }
}

// Calls f(T, A) with the storage and accumulate types of `dtype`.
template <class A, class F>
inline void with_storage(DType dtype, F&& f) {
  if constexpr (std::is_same_v<A, double>) {
    f(double{});
  } else if (dtype == DType::float32) {
    f(float{});
  } else if (dtype == DType::bfloat16) {
    f(bfloat16{});
  } else {
    f(float16{});
  }
}

}  // namespace fusedres::cpu
