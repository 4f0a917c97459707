// Eight adjacent elements of a row, in fp32 in registers, and their ways from and to memory.
#pragma once

#include "cuda/device.h"
#include "cuda/plan.h"
#include "epilogue.h"

// Of functions that would take a kernel's registers where they are hardly ever, or not always,
// called. Calls take registers too, so a kernel may define it as __forceinline__.
#ifndef FUSEDRES_APART
#define FUSEDRES_APART inline __noinline__
#endif

namespace fusedres::cuda {

constexpr int kStrip = 8;

struct Strip {
  float v[kStrip];
};

// Columns n to n + 7 of row m, of `width` columns. What is read beyond them, or where the row is
// not live (past the last), is 0; what is written there is not.
struct Place {
  int64_t m;
  int n, width;
  bool live;
};

template <class F>
__device__ __forceinline__ Strip map(const Strip& a, const Strip& b, F f) {
  Strip out;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) out.v[i] = f(a.v[i], b.v[i]);
  return out;
}

template <class F>
__device__ __forceinline__ Strip map(const Strip& t, F f) {
  return map(t, t, [&](float v, float) { return f(v); });
}

// The same in two rounds of four elements, for a long f: half the code.
template <class F>
__device__ __forceinline__ Strip map_in_rounds(Strip a, Strip b, F f) {
#pragma unroll 1
  for (int round = 0; round < 2; ++round)
#pragma unroll
    for (int i = 0; i < kStrip / 2; ++i) {
      const float out = f(a.v[i], b.v[i]);
      a.v[i] = a.v[i + kStrip / 2];
      b.v[i] = b.v[i + kStrip / 2];
      a.v[i + kStrip / 2] = out;
    }
  return a;
}

template <class F>
__device__ __forceinline__ Strip map_in_rounds(const Strip& t, F f) {
  return map_in_rounds(t, t, [&](float v, float) { return f(v); });
}

__device__ __forceinline__ Strip operator*(const Strip& a, const Strip& b) {
  return map(a, b, [](float x, float y) { return x * y; });
}

__device__ __forceinline__ Strip plus(const Strip& a, const Strip& b) {
  return map(a, b, [](float x, float y) { return x + y; });
}

__device__ __forceinline__ Strip filled(float value) {
  return map(Strip{}, [=](float) { return value; });
}

// 0 from column `width` on.
__device__ __forceinline__ Strip inside(const Place& at, Strip t) {
#pragma unroll
  for (int i = 0; i < kStrip; ++i) t.v[i] = at.n + i < at.width ? t.v[i] : 0.0f;
  return t;
}

// ---- memory

template <class T>
struct alignas(16) Pack {
  static constexpr int kCount = 16 / sizeof(T);
  T v[kCount];
};

FUSEDRES_HD bool is_aligned(const void* p, int64_t bytes = 0) {
  return ((reinterpret_cast<uintptr_t>(p) | static_cast<uintptr_t>(bytes)) & 15) == 0;
}

template <class T>
struct Rows {
  T* data;
  int64_t stride;
  bool wide;  // every eighth element lies at a multiple of 16 bytes
};

template <class T>
FUSEDRES_HD Rows<T> rows_of(const Matrix& m) {
  return {static_cast<T*>(m.data), m.stride, is_aligned(m.data, m.stride * sizeof(T))};
}

// Rows of T or, `single`, of float: x, residual, y and their gradients beside a 16-bit product.
template <class T>
struct MixedRows : Rows<T> {
  bool single;
  __device__ __forceinline__ Rows<float> singles() const {
    return {reinterpret_cast<float*>(this->data), this->stride, this->wide};
  }
};

template <class T>
FUSEDRES_HD MixedRows<T> rows_of(const Matrix& m, DType dtype) {
  return {rows_of<T>(m), dtype == DType::float32};  // what is aligned for T is so for float
}

template <class T, bool kPastL1 = false>
__device__ __forceinline__ Strip load_packed(const T* p) {
  Strip out;
#pragma unroll
  for (int i = 0; i < kStrip; i += Pack<T>::kCount) {
    const Pack<T>* at = reinterpret_cast<const Pack<T>*>(p + i);
    const Pack<T> pack = kPastL1 ? load_past_l1(at) : *at;
#pragma unroll
    for (int j = 0; j < Pack<T>::kCount; ++j) out.v[i + j] = to_float(pack.v[j]);
  }
  return out;
}

template <class T>
__device__ __forceinline__ void store_packed(T* p, const Strip& t) {
#pragma unroll
  for (int i = 0; i < kStrip; i += Pack<T>::kCount) {
    Pack<T> pack;
#pragma unroll
    for (int j = 0; j < Pack<T>::kCount; ++j) pack.v[j] = from_float<T>(t.v[i + j]);
    *reinterpret_cast<Pack<T>*>(p + i) = pack;
  }
}

template <class T, bool kPastL1 = false>
__device__ __forceinline__ Strip load(const T* p, int count, bool wide) {
  if (wide && count >= kStrip) return load_packed<T, kPastL1>(p);
  Strip out;
#pragma unroll
  for (int i = 0; i < kStrip; ++i) {
    if constexpr (kPastL1) out.v[i] = i < count ? to_float(load_past_l1(p + i)) : 0.0f;
    if constexpr (!kPastL1) out.v[i] = i < count ? to_float(p[i]) : 0.0f;
  }
  return out;
}

template <class T, bool kPastL1 = false>
__device__ __forceinline__ Strip load(const Rows<T>& rows, const Place& at) {
  const int count = at.live ? at.width - at.n : 0;
  return load<T, kPastL1>(rows.data + at.m * rows.stride + at.n, count, rows.wide);
}

template <class T>
__device__ __forceinline__ void store(const Rows<T>& rows, const Place& at, const Strip& t) {
  T* p = rows.data + at.m * rows.stride + at.n;
  const int count = at.live ? at.width - at.n : 0;
  if (rows.wide && count >= kStrip) return store_packed(p, t);
#pragma unroll
  for (int i = 0; i < kStrip; ++i)
    if (i < count) p[i] = from_float<T>(t.v[i]);
}

// Apart, so that those who need them do not make the others' code longer.
template <bool kPastL1>
__device__ FUSEDRES_APART Strip load_single(Rows<float> rows, Place at) {
  return load<float, kPastL1>(rows, at);
}
__device__ FUSEDRES_APART void store_single(Rows<float> rows, Place at, Strip t) {
  store(rows, at, t);
}

template <class T, bool kPastL1 = false>
__device__ __forceinline__ Strip load(const MixedRows<T>& rows, const Place& at) {
  if constexpr (!std::is_same_v<T, float>)
    if (rows.single) return load_single<kPastL1>(rows.singles(), at);
  return load<T, kPastL1>(static_cast<const Rows<T>&>(rows), at);
}

template <class T>
__device__ __forceinline__ void store(const MixedRows<T>& rows, const Place& at, const Strip& t) {
  if constexpr (!std::is_same_v<T, float>)
    if (rows.single) return store_single(rows.singles(), at, t);
  store(static_cast<const Rows<T>&>(rows), at, t);
}

template <class T>
__device__ __forceinline__ Strip as_stored(const Strip& t) {
  return map(t, [](float v) { return to_float(from_float<T>(v)); });
}

// Calls f with a null pointer to the element type of `dtype`.
template <class F>
__device__ __forceinline__ auto with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::bfloat16:
      return f(static_cast<const bfloat16*>(nullptr));
    case DType::float16:
      return f(static_cast<const float16*>(nullptr));
    case DType::float64:
      return f(static_cast<const double*>(nullptr));
    default:
      return f(static_cast<const float*>(nullptr));
  }
}

// Elements n to n + 7 of a vector of `width`, 0 past its end; without a vector: `missing`.
__device__ FUSEDRES_APART Strip load(const Vector& vector, Place at, float missing) {
  if (!vector.data) return filled(missing);
  return with_type(vector.dtype, [&](auto* type) {
    const auto* p = static_cast<decltype(type)>(vector.data) + at.n;
    return load(p, at.width - at.n, is_aligned(p));
  });
}

}  // namespace fusedres::cuda
