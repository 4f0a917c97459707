// What each stage does to a strip of a row, forward and backward. Stages are data: a switch for each
// stage and strip, not a kernel for each order.
//
//   layer: c = (t - mean) * rstd        rms: c = t * rstd, mean = 0
//   batch: c[n] = (t[n] - mean[n]) * rstd[n]        norm: h = norm_weight * c + norm_bias
#pragma once

#include "cuda/strip.h"

namespace fusedres::cuda {

struct RowStats {
  float mean, rstd;
};

__device__ __forceinline__ float rstd_of(float variance, float eps) {
  return 1.0f / sqrtf(variance + eps);
}

// Of a row. Where a layer norm's variance overflows, the row is NaN, as torch has it, not 0.
__device__ __forceinline__ float rstd_of_row(const Layer& layer, float variance) {
  const float rstd = rstd_of(variance, layer.eps);
  return layer.norm == Norm::layer ? rstd + (variance - variance) : rstd;
}

// rstd of each column, for a norm over columns.
__device__ FUSEDRES_APART Strip column_rstd(const Layer& layer, Place at) {
  return map_in_rounds(load(layer.running_var, at, 1.0f),
                       [&](float variance) { return rstd_of(variance, layer.eps); });
}

__device__ __forceinline__ Strip normalise(const Layer& layer, const Place& at, const Strip& t,
                                           RowStats row) {
  if (layer.norm != Norm::batch) return map(t, [=](float v) { return (v - row.mean) * row.rstd; });
  const Strip mean = load(layer.running_mean, at, 0.0f);
  return map(t, mean, [](float v, float m) { return v - m; }) * column_rstd(layer, at);
}

__device__ __forceinline__ Strip scale_shift(const Layer& layer, const Place& at, const Strip& c) {
  return plus(load(layer.norm_weight, at, 1.0f) * c, load(layer.norm_bias, at, 0.0f));
}

// sin (shift 0) or cos (1) of any |x| >= kSinLimit: x = M 2^e, so that of the bits of 2 / pi only
// 96 count, those whose product with M is neither a multiple of 4 nor small (Payne and Hanek).
__device__ __forceinline__ float sin_of_large(float x, int shift) {
  static constexpr uint32_t kTwoOverPi[] = {0,          0xA2F9836E, 0x4E441529, 0xFC2757D1,
                                            0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB};
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const int exponent = static_cast<int>(bits >> 23 & 0xFF);
  if (exponent == 0xFF) return x - x;  // NaN
  const uint32_t mantissa = (bits & 0x7FFFFF) | 0x800000;
  const int first = exponent - 150 - 2 + 32, word = first / 32, skip = first % 32;
  const auto window = [&](int i) {
    const uint64_t two =
        static_cast<uint64_t>(kTwoOverPi[word + i]) << 32 | kTwoOverPi[word + i + 1];
    return static_cast<uint32_t>(two << skip >> 32);
  };
  const uint64_t low = static_cast<uint64_t>(mantissa) * window(2);
  const uint64_t middle = static_cast<uint64_t>(mantissa) * window(1) + (low >> 32);
  const uint64_t high = mantissa * window(0) + static_cast<uint32_t>(middle >> 32);
  const uint32_t top = static_cast<uint32_t>(high);  // its first two bits: the quadrant
  const uint64_t fraction = static_cast<uint64_t>(top) << 34 |
                            static_cast<uint64_t>(static_cast<uint32_t>(middle)) << 2 |
                            static_cast<uint32_t>(low) >> 30;
  const int quadrant = static_cast<int>(top >> 30) + static_cast<int>(fraction >> 63);
  const double r = static_cast<double>(static_cast<int64_t>(fraction)) *
                   (1.5707963267948966 / 18446744073709551616.0);
  const float sign = x < 0 && shift == 0 ? -1.0f : 1.0f;
  return sign * sin_of_quadrant(static_cast<float>(r), quadrant + shift);
}

__device__ FUSEDRES_APART float sin_of(float x, int shift) {
  return fabsf(x) < kSinLimit ? sin_quadrant(x, shift) : sin_of_large(x, shift);
}

__device__ __forceinline__ Strip activate(Act act, Strip t) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if constexpr (std::is_same_v<F, Sin>)
      t = map_in_rounds(t, [](float v) { return sin_of(v, 0); });
    else
      t = map_in_rounds(t, [](float v) { return F::value(v); });
  });
  return t;
}

// d * act'(h)
__device__ FUSEDRES_APART Strip activate_grad(Act act, Strip d, Strip h) {
  with_activation(act, [&](auto activation) {
    using F = decltype(activation);
    if constexpr (std::is_same_v<F, Sin>)
      d = map_in_rounds(d, h, [](float g, float v) { return g * sin_of(v, 1); });
    else
      d = map_in_rounds(d, h, [](float g, float v) { return g * F::grad(v); });
  });
  return d;
}

__device__ __forceinline__ Strip multiply_gate(const Layer& layer, const Place& at,
                                               const Strip& t) {
  if (!layer.scalar_gate) return load(layer.gate, at, 1.0f) * t;
  const float gate = load(layer.gate, Place{0, 0, 1, true}, 1.0f).v[0];
  return map(t, [=](float v) { return v * gate; });
}

// What is dropped is 0 even if it was NaN.
__device__ FUSEDRES_APART Strip drop_elements(const Layer& layer, Place at, Strip t) {
  const uint64_t seed = static_cast<uint64_t>(*layer.seed);
  uint64_t element = static_cast<uint64_t>(at.m) * at.width + at.n;
  return map_in_rounds(t, [&](float v) {
    const bool kept = philox(seed, element++, Stream::element) >= layer.dropout;
    return kept ? v * layer.dropout_scale : 0.0f;
  });
}

__device__ FUSEDRES_APART Strip drop_sample(const Layer& layer, Place at, Strip t) {
  const uint64_t seed = static_cast<uint64_t>(*layer.seed);
  const bool kept = philox(seed, at.m / layer.sample_rows, Stream::sample) >= layer.drop_path;
  return map(t, [&](float v) { return kept ? v * layer.drop_path_scale : 0.0f; });
}

template <class T>
__device__ __forceinline__ Strip add_residual(const Layer& layer, Place at, const Strip& t) {
  at.width = static_cast<int>(layer.R);
  return map(t, load(rows_of<T>(layer.residual, layer.residual_dtype), at),
             [&](float v, float r) { return v + layer.residual_scale * r; });
}

// What a stage makes of t.
template <class T>
__device__ __forceinline__ Strip run_stage(const Layer& layer, Stage stage, const Place& at,
                                           const Strip& t, RowStats row) {
  switch (stage) {
    case Stage::norm:
      return scale_shift(layer, at, normalise(layer, at, t, row));
    case Stage::act:
      return activate(layer.act, t);
    case Stage::gate:
      return multiply_gate(layer, at, t);
    case Stage::dropout:
      return drop_elements(layer, at, t);
    case Stage::droppath:
      return drop_sample(layer, at, t);
    case Stage::add:
      return add_residual<T>(layer, at, t);
    case Stage::linear:
      break;
  }
  return t;
}

// What stages `first` to `last` - 1 make of t.
template <class T>
__device__ __noinline__ Strip run_stages(const Layer& layer, const Stages& stages, int first,
                                         int last, Place at, Strip t, RowStats row) {
  for (int i = first; i < last; ++i) t = run_stage<T>(layer, stages.stage[i], at, t, row);
  return t;
}

// ---- backward

// What a strip's backward needs of its forward: what `act` and `gate` saw, the norm's c.
struct Tape {
  Strip act, gate, c;
};

// The tape of the first `side.replay` stages, from t, what the first acted on.
template <class T>
__device__ __forceinline__ Tape replay(const Layer& layer, const Side& side, const Place& at,
                                       Strip t, RowStats row) {
  Tape tape = {};
  for (int i = 0; i < side.replay; ++i) {
    const Stage stage = side.stages.stage[i];
    if (stage == Stage::act) tape.act = t;
    if (stage == Stage::gate) tape.gate = t;
    if (stage == Stage::norm) {
      tape.c = normalise(layer, at, t, row);
      t = scale_shift(layer, at, tape.c);
    } else if (i + 1 < side.replay) {
      t = run_stages<T>(layer, side.stages, i, i + 1, at, t, row);
    }
  }
  return tape;
}

// The gradient of what `stage`, not a norm, acts on, from d, that of its result. `add` sets
// `to_residual`, the gradient of the residual.
__device__ __forceinline__ Strip stage_back(const Layer& layer, Stage stage, const Place& at,
                                            const Strip& d, const Tape& tape, Strip& to_residual) {
  switch (stage) {
    case Stage::act:
      return activate_grad(layer.act, d, tape.act);
    case Stage::gate:
      return multiply_gate(layer, at, d);
    case Stage::dropout:
      return drop_elements(layer, at, d);
    case Stage::droppath:
      return drop_sample(layer, at, d);
    case Stage::add:
      to_residual = map(d, [&](float v) { return layer.residual_scale * v; });
      [[fallthrough]];
    default:
      return d;
  }
}

}  // namespace fusedres::cuda
