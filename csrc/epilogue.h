// The element maths, once for CPU and CUDA: exp and its kin, activations and derivatives, Philox.
//
// Every function is branch-free apart from selections, so that a loop over it becomes SIMD code,
// and keeps NaN. For double it calls libm. `A` accumulates: float, or double for float64 tensors.
#pragma once

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "params.h"

#ifdef __CUDACC__
#define FUSEDRES_HD __host__ __device__ __forceinline__
#else
#define FUSEDRES_HD FUSEDRES_INLINE
#endif

namespace fusedres {

// ---- exp, expm1, log1p, tanh, normal distribution

// exp(x) = scale * (1 + q), q = expm1(r), |r| <= ln(2)/2; 0 below 2^-126.5, infinite above 2^127.5.
struct ExpParts {
  float scale, q;
};

FUSEDRES_HD ExpParts exp_parts(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds; integer in the low bits
  x = x < -88.0f ? -88.0f : x;
  x = x > 89.0f ? 89.0f : x;
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  // ln(2) in two parts, the first exact times n.
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.98412698e-4f;  // Taylor: r + r^2/2! + ... + r^7/7!
  p = p * r + 1.38888889e-3f;
  p = p * r + 8.33333333e-3f;
  p = p * r + 4.16666667e-2f;
  p = p * r + 1.66666667e-1f;
  p = p * r + 0.5f;
  const int exponent = __builtin_bit_cast(int, shifted) - __builtin_bit_cast(int, kRound);
  return {__builtin_bit_cast(float, (exponent + 127) << 23), p * (r * r) + r};
}

FUSEDRES_HD float exp_(float x) {
  const ExpParts e = exp_parts(x);
  return e.scale * (1.0f + e.q);
}

// Accurate near 0, where exp(x) - 1 cancels. For x <= 88.
FUSEDRES_HD float expm1_(float x) {
  const ExpParts e = exp_parts(x);
  return e.scale * e.q + (e.scale - 1.0f);
}

// log(1 + u) for u in [0, 1]: 2 atanh(s) by its series, s = u / (2 + u) <= 1/3.
FUSEDRES_HD float log1p_(float u) {
  const float s = u / (2.0f + u), t = s * s;
  float p = 2.0f / 15;
  p = p * t + 2.0f / 13;
  p = p * t + 2.0f / 11;
  p = p * t + 2.0f / 9;
  p = p * t + 2.0f / 7;
  p = p * t + 2.0f / 5;
  p = p * t + 2.0f / 3;
  return (p * t) * s + 2.0f * s;
}

// |x| < 0.625: x + x^3 P(x^2), a minimax fit to 4e-9. Else 1 - 2 / (exp(2|x|) + 1), with x's sign.
FUSEDRES_HD float tanh_(float x) {
  const float a = std::fabs(x), s = x * x;
  float p = -5.717044631e-03f;
  p = p * s + 2.065058690e-02f;
  p = p * s - 5.374349796e-02f;
  p = p * s + 1.333149129e-01f;
  p = p * s - 3.333328393e-01f;
  const float near = x + x * s * p, far = 1.0f - 2.0f / (exp_(2.0f * a) + 1.0f);
  return a < 0.625f ? near : x < 0.0f ? -far : far;
}

// Standard normal distribution: cdf(h) = (1 + erf(h / sqrt 2)) / 2 and its density.
template <class A>
struct Normal {
  A cdf, pdf;
};

// cdf(-a) = exp(-a^2/2) P(t), t = 1/(1 + 0.33 a): a minimax fit whose error in cdf is 3e-9 before
// rounding. The form is that of Abramowitz and Stegun 7.1.26, with two more terms. Near 0, where
// its rounding would show, the Taylor series.
FUSEDRES_HD Normal<float> normal(float h) {
  const float a = std::fabs(h);
  const float density = exp_(-0.5f * h * h);
  const float t = 1.0f / (1.0f + 0.33f * a);
  float p = 4.465385282e-02f;
  p = p * t - 2.164419509e-01f;
  p = p * t + 3.233437176e-01f;
  p = p * t - 8.144334641e-02f;
  p = p * t + 1.767729513e-01f;
  p = p * t + 1.206037700e-01f;
  p = p * t + 1.325198992e-01f;
  p = p * t - 8.890840686e-06f;
  const float tail = density * p, far = h < 0.0f ? tail : 1.0f - tail, s = h * h;
  float near = 1.154348727e-4f;
  near = near * s - 1.187328215e-3f;
  near = near * s + 9.973557010e-3f;
  near = near * s - 6.649038006e-2f;
  near = near * s + 3.989422804e-1f;
  return {a < 0.5f ? 0.5f + h * near : far, density * 0.398942280f};
}

// sin and cos for |x| < kSinLimit: r = x - q pi/2 in double, then the quadrant's Taylor series.
constexpr float kSinLimit = 1e6f;

FUSEDRES_HD float sin_of_quadrant(float r, int quadrant) {
  const float s = r * r;
  float sine = 2.75573192e-6f;
  sine = sine * s - 1.98412698e-4f;
  sine = sine * s + 8.33333333e-3f;
  sine = sine * s - 1.66666667e-1f;
  sine = sine * s * r + r;
  float cosine = -2.75573192e-7f;
  cosine = cosine * s + 2.48015873e-5f;
  cosine = cosine * s - 1.38888889e-3f;
  cosine = cosine * s + 4.16666667e-2f;
  cosine = cosine * s - 0.5f;
  cosine = cosine * s + 1.0f;
  const float value = quadrant & 1 ? cosine : sine;
  return quadrant & 2 ? -value : value;
}

FUSEDRES_HD float sin_quadrant(float x, int shift) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 0.63661977236758134 + kRound;
  const double n = shifted - kRound;
  const float r = static_cast<float>((x - n * 1.5707963267341256) - n * 6.0771005065061922e-11);
  return sin_of_quadrant(r, static_cast<int>(n) + shift);
}

FUSEDRES_HD float sin_(float x) { return sin_quadrant(x, 0); }
FUSEDRES_HD float cos_(float x) { return sin_quadrant(x, 1); }

FUSEDRES_HD double exp_(double x) { return std::exp(x); }
FUSEDRES_HD double expm1_(double x) { return std::expm1(x); }
FUSEDRES_HD double log1p_(double x) { return std::log1p(x); }
FUSEDRES_HD double tanh_(double x) { return std::tanh(x); }
FUSEDRES_HD double sin_(double x) { return std::sin(x); }
FUSEDRES_HD double cos_(double x) { return std::cos(x); }
FUSEDRES_HD Normal<double> normal(double h) {
  return {0.5 * (1.0 + std::erf(h * 0.70710678118654752)),
          0.39894228040143268 * std::exp(-0.5 * h * h)};
}

template <class A>
FUSEDRES_HD A sigmoid_(A h) {
  return A(1) / (A(1) + exp_(-h));
}

// The sigmoid and its derivative s (1 - s), by exp(-|h|): nothing cancels or overflows.
template <class A>
struct Logistic {
  A value, slope;
};

template <class A>
FUSEDRES_HD Logistic<A> logistic(A h) {
  const A e = exp_(-std::fabs(h)), s = 1 / (1 + e);
  return {h < 0 ? e * s : s, e * s * s};
}

// ---- activations: value and derivative side by side; at a kink the derivative is torch's

struct Relu {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h < 0 ? A(0) : h;
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h <= 0 ? A(0) : A(1);
  }
};

struct LeakyRelu {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h > 0 ? h : h * A(0.01);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h > 0 ? A(1) : A(0.01);
  }
};

struct Relu2 {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return Relu::value(h) * Relu::value(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return 2 * Relu::value(h);
  }
};

struct Relu6 {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h < 0 ? A(0) : h > 6 ? A(6) : h;
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h <= 0 || h >= 6 ? A(0) : A(1);
  }
};

struct Elu {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h > 0 ? h : expm1_(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h > 0 ? A(1) : exp_(h);
  }
};

struct Selu {
  static constexpr double kAlpha = 1.6732632423543772, kScale = 1.0507009873554805;
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h > 0 ? A(kScale) * h : A(kScale * kAlpha) * expm1_(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h > 0 ? A(kScale) : A(kScale * kAlpha) * exp_(h);
  }
};

struct Gelu {  // h * Phi(h)
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h * normal(h).cdf;
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const Normal<A> n = normal(h);
    return n.cdf + h * n.pdf;
  }
};

struct GeluTanh {  // h (1 + tanh(u)) / 2 = h sigmoid(2u), u = sqrt(2/pi) (h + 0.044715 h^3)
  static constexpr double kTwoBeta = 1.5957691216057308, kCubic = 0.044715;
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h * sigmoid_(A(kTwoBeta) * (h + A(kCubic) * h * h * h));
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const Logistic<A> s = logistic(A(kTwoBeta) * (h + A(kCubic) * h * h * h));
    return s.value + h * s.slope * A(kTwoBeta) * (1 + A(3 * kCubic) * h * h);
  }
};

struct Silu {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h / (1 + exp_(-h));
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const Logistic<A> s = logistic(h);
    return s.value + h * s.slope;
  }
};

// softplus(h) = max(h, 0) + log1p(exp(-|h|)); above 20 it is h, as in torch.
struct Softplus {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    const A soft = (h < 0 ? A(0) : h) + log1p_(exp_(h < 0 ? h : -h));
    return h > 20 ? h : soft;
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h > 20 ? A(1) : sigmoid_(h);
  }
};

// tanh(softplus(h)) = n / (n + 2), n = e (e + 2), e = exp(h).
struct Mish {
  template <class A>
  FUSEDRES_HD static A squash(A h) {
    const A e = exp_(h > 20 ? A(20) : h), n = e * (e + 2);
    return n / (n + 2);
  }
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h * squash(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const A t = squash(h);
    return t + h * sigmoid_(h) * (1 - t * t);
  }
};

struct Hardsigmoid {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    const A t = h + 3;
    return (t < 0 ? A(0) : t > 6 ? A(6) : t) / 6;
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h > -3 && h < 3 ? A(1) / 6 : A(0);
  }
};

struct Hardswish {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h * Hardsigmoid::value(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return h <= -3 ? A(0) : h >= 3 ? A(1) : h / 3 + A(0.5);
  }
};

struct Sigmoid {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return sigmoid_(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return logistic(h).slope;
  }
};

struct Tanh {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return tanh_(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const A t = tanh_(h);
    return 1 - t * t;
  }
};

struct Sin {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return sin_(h);
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    return cos_(h);
  }
};

struct Softsign {
  template <class A>
  FUSEDRES_HD static A value(A h) {
    return h / (1 + std::fabs(h));
  }
  template <class A>
  FUSEDRES_HD static A grad(A h) {
    const A d = 1 + std::fabs(h);
    return 1 / (d * d);
  }
};

// Calls f(Activation{}) for the activation of `act`.
template <class F>
FUSEDRES_HD void with_activation(Act act, F&& f) {
  switch (act) {
    case Act::none:
      return;
    case Act::relu:
      return f(Relu{});
    case Act::leaky_relu:
      return f(LeakyRelu{});
    case Act::relu2:
      return f(Relu2{});
    case Act::relu6:
      return f(Relu6{});
    case Act::elu:
      return f(Elu{});
    case Act::selu:
      return f(Selu{});
    case Act::gelu:
      return f(Gelu{});
    case Act::gelu_tanh:
      return f(GeluTanh{});
    case Act::silu:
      return f(Silu{});
    case Act::mish:
      return f(Mish{});
    case Act::softplus:
      return f(Softplus{});
    case Act::hardswish:
      return f(Hardswish{});
    case Act::hardsigmoid:
      return f(Hardsigmoid{});
    case Act::sigmoid:
      return f(Sigmoid{});
    case Act::tanh:
      return f(Tanh{});
    case Act::sin:
      return f(Sin{});
    case Act::softsign:
      return f(Softsign{});
  }
}

// ---- Philox

enum class Stream : uint32_t { element = 0, sample = 1 };  // dropout, drop-path

// First word of Philox4x32-10 with key = seed, counter = (index low, index high, stream, 0).
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
FUSEDRES_HD uint32_t philox(uint64_t seed, uint64_t index, Stream stream) {
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32);
  uint32_t c2 = static_cast<uint32_t>(stream), c3 = 0;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c0;
}

}  // namespace fusedres
