// The product of a tile, C [kM, kN] = A [kM, R] B [R, kN] with R as long as it is, summed up in
// fp32: mma for 16-bit types, FFMA for fp32. Both operands come through shared memory, kBlockK of
// the reduction at a time.
#pragma once

#include "cuda/strip.h"

namespace fusedres::cuda {

constexpr int kWarps = kThreads / 32;

template <class T>
constexpr int kPack = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
template <class T>
constexpr int kBlockK = kLine / static_cast<int>(sizeof(T));

// Of a tile in shared memory: each row is followed by 16 bytes that nobody uses.
template <class T, int kColumns>
constexpr int kStride = kColumns + kPack<T>;

// ---- copies

// A matrix as copies need it: the bytes that one may take at a time.
template <class T>
struct Source {
  const T* data;
  int64_t stride, rows;
  int columns, bytes;
};

template <class T>
__device__ __forceinline__ Source<T> source(const Matrix& m, int64_t rows, int64_t columns) {
  const uint64_t bits =
      reinterpret_cast<uintptr_t>(m.data) | static_cast<uint64_t>(m.stride) * sizeof(T);
  return {static_cast<const T*>(m.data), m.stride, rows, static_cast<int>(columns),
          bits % 16 == 0  ? 16
          : bits % 4 == 0 ? 4
                          : static_cast<int>(sizeof(T))};
}

// f(to, from, count) for each 16 bytes of the tile at (row, column), `count` elements of which exist.
template <class T, class F>
__device__ __forceinline__ void for_each_pack(const Source<T>& s, int64_t row, int column, int rows,
                                              int columns, F f) {
  const int packs = columns / kPack<T>;
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * packs; i += kThreads) {
    const int r = i / packs, c = i % packs * kPack<T>;
    int count = row + r < s.rows ? s.columns - column - c : 0;
    count = count < 0 ? 0 : count > kPack<T> ? kPack<T> : count;
    const T* from = count > 0 ? s.data + (row + r) * s.stride + column + c : s.data;
    f(r * (columns + kPack<T>)+c, from, count);
  }
}

// copy_tile where no 16 bytes of the matrix may be taken at a time.
template <class T>
__device__ FUSEDRES_APART void copy_bits(T* tile, Source<T> s, int64_t row, int column, int rows,
                                         int columns) {
  constexpr int kSize = sizeof(T);
  for_each_pack(s, row, column, rows, columns, [&](int at, const T* from, int count) {
    if (s.bytes == 4) {
#pragma unroll
      for (int i = 0; i < 16; i += 4) {
        const int left = count * kSize - i;
        cp_async_4(tile + at + i / kSize, left > 0 ? from + i / kSize : from,
                   std::clamp(left, 0, 4));
      }
    } else {
      Pack<T> pack;
#pragma unroll
      for (int i = 0; i < kPack<T>; ++i) pack.v[i] = i < count ? from[i] : from_float<T>(0.0f);
      *reinterpret_cast<Pack<T>*>(tile + at) = pack;
    }
  });
}

// tile [rows, columns] = that of the matrix at (row, column); 0 outside the matrix.
template <class T>
__device__ __forceinline__ void copy_tile(T* tile, const Source<T>& s, int64_t row, int column,
                                          int rows, int columns) {
  if (s.bytes < 16) return copy_bits(tile, s, row, column, rows, columns);
  for_each_pack(s, row, column, rows, columns, [&](int at, const T* from, int count) {
    cp_async_16(tile + at, from, count * static_cast<int>(sizeof(T)));
  });
}

// ---- the loop

// Has the copies of the first steps begin. copy(i) copies what step i needs.
template <class Copy>
__device__ __forceinline__ void begin_copies(int steps, Copy copy) {
#pragma unroll 1
  for (int i = 0; i < kDepth - 1; ++i) {
    if (i < steps) copy(i);
    cp_async_commit();
  }
}

// Runs step(i) for each step, while the copies of the next ones are under way. After it the shared
// memory of operands is free.
template <class Copy, class Step>
__device__ __forceinline__ void run_steps(int steps, Copy copy, Step step) {
  for (int i = 0; i < steps; ++i) {
    cp_async_wait<kDepth - 2>();
    sync_threads();
    if (i + kDepth - 1 < steps) copy(i + kDepth - 1);
    cp_async_commit();
    step(i);
  }
  cp_async_wait<0>();
  sync_threads();
}

// ---- the product

// How operands lie in shared memory, each row followed by 16 bytes. row_a: A [kM, kBlockK], else its
// transpose [kBlockK, kM]. row_b: B's transpose [kN, kBlockK], else B [kBlockK, kN].
template <class T, int kM, int kN, bool kRowA, bool kRowB>
struct Product {
  static constexpr int kWarpsM = kM == 16 ? 1 : 2, kWarpsN = kWarps / kWarpsM;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kA = kStride < T, kRowA ? kBlockK<T> : kM > ;
  static constexpr int kB = kStride < T, kRowB ? kBlockK<T> : kN > ;
  static constexpr int kTileStride = kN + kTilePad;
  static_assert(kWarpM % 16 == 0 && kWarpN % 8 == 0);

  float sums[kWarpM / 16][kWarpN / 8][4] = {};

  __device__ __forceinline__ static int lane() { return threadIdx.x % 32; }
  __device__ __forceinline__ static int row() { return threadIdx.x / 32 / kWarpsN * kWarpM; }
  __device__ __forceinline__ static int column() { return threadIdx.x / 32 % kWarpsN * kWarpN; }

  // The 16 rows from m, 16 columns from k, of A.
  __device__ __forceinline__ static void load_a(uint32_t (&r)[4], const T* a, int m, int k) {
    const int l = lane();
    if constexpr (kRowA)
      ldmatrix_x4(r, a + (m + l % 16) * kA + k + l / 16 * 8);
    else
      ldmatrix_x4_trans(r, a + (k + l % 8 + l / 16 * 8) * kA + m + l / 8 % 2 * 8);
  }

  // The 32 rows from k, 8 columns from n, of B.
  __device__ __forceinline__ static void load_b(uint32_t (&r)[4], const T* b, int k, int n) {
    const int l = lane();
    if constexpr (kRowB)
      ldmatrix_x4(r, b + (n + l % 8) * kB + k + l / 8 * 8);
    else
      ldmatrix_x4_trans(r, b + (k + l) * kB + n);
  }

  __device__ __forceinline__ void step(const T* a, const T* b) {
#pragma unroll
    for (int k = 0; k < kBlockK<T>; k += 32) {
      uint32_t as[kWarpM / 16][2][4];
#pragma unroll
      for (int i = 0; i < kWarpM / 16; ++i) {
        load_a(as[i][0], a, row() + i * 16, k);
        load_a(as[i][1], a, row() + i * 16, k + 16);
      }
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
        uint32_t bs[4];
        load_b(bs, b, k, column() + j * 8);
#pragma unroll
        for (int i = 0; i < kWarpM / 16; ++i) {
          mma_16x8x16<T>(sums[i][j], as[i][0], {bs[0], bs[1]});
          mma_16x8x16<T>(sums[i][j], as[i][1], {bs[2], bs[3]});
        }
      }
    }
  }

  // tile [kM, kTileStride], in fp32
  __device__ __forceinline__ void store(float* tile) const {
    const int m = row() + lane() / 4, n = column() + lane() % 4 * 2;
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i)
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* at = tile + (m + i * 16 + half * 8) * kTileStride + n + j * 8;
          *reinterpret_cast<Pair*>(at) = {sums[i][j][2 * half], sums[i][j][2 * half + 1]};
        }
  }

  struct alignas(8) Pair {
    float x, y;
  };
};

// fp32: a lane has every fourth row and every eighth column of its warp's part.
template <int kM, int kN, bool kRowA, bool kRowB>
struct Product<float, kM, kN, kRowA, kRowB> {
  static constexpr int kWarpsM = kM == 16 ? 1 : 2, kWarpsN = kWarps / kWarpsM;
  static constexpr int kRows = kM / kWarpsM / 4, kColumns = kN / kWarpsN / 8;
  static constexpr int kA = kStride < float, kRowA ? kBlockK<float> : kM > ;
  static constexpr int kB = kStride < float, kRowB ? kBlockK<float> : kN > ;
  static constexpr int kTileStride = kN + kTilePad;

  float sums[kRows][kColumns] = {};

  __device__ __forceinline__ static int row() {
    return threadIdx.x / 32 / kWarpsN * kRows * 4 + threadIdx.x % 32 / 8;
  }
  __device__ __forceinline__ static int column() {
    return threadIdx.x / 32 % kWarpsN * kColumns * 8 + threadIdx.x % 8;
  }

  // Four elements along the reduction, from k, of line `at`.
  template <bool kRow>
  __device__ __forceinline__ static Pack<float> load(const float* p, int stride, int at, int k) {
    if constexpr (kRow) {
      return *reinterpret_cast<const Pack<float>*>(p + at * stride + k);
    } else {
      return {{p[k * stride + at], p[(k + 1) * stride + at], p[(k + 2) * stride + at],
               p[(k + 3) * stride + at]}};
    }
  }

  // Sums of a block first: in fp32 its own rounding errors are smaller than those of one long chain.
  __device__ __forceinline__ void step(const float* a, const float* b) {
    float block[kRows][kColumns] = {};
#pragma unroll 2
    for (int k = 0; k < kBlockK<float>; k += 4) {
      Pack<float> as[kRows], bs[kColumns];
#pragma unroll
      for (int i = 0; i < kRows; ++i) as[i] = load<kRowA>(a, kA, row() + i * 4, k);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) bs[j] = load<kRowB>(b, kB, column() + j * 8, k);
#pragma unroll
      for (int e = 0; e < 4; ++e)
#pragma unroll
        for (int i = 0; i < kRows; ++i)
#pragma unroll
          for (int j = 0; j < kColumns; ++j) block[i][j] += as[i].v[e] * bs[j].v[e];
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] += block[i][j];
  }

  __device__ __forceinline__ void store(float* tile) const {
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int j = 0; j < kColumns; ++j)
        tile[(row() + i * 4) * kTileStride + column() + j * 8] = sums[i][j];
  }
};

// sums [kM, kN + kTilePad] = A B by `steps` blocks of shared memory; of A all lie there, or, where
// they are `streamed` too, as many as of B. copy(i) copies what step i needs.
template <int kM, int kN, bool kRowB, class T, class Copy>
__device__ __forceinline__ void multiply(int steps, const T* a, bool streamed, const T* b,
                                         float* sums, Copy copy) {
  using Tile = Product<T, kM, kN, true, kRowB>;
  constexpr int kBlockA = kM * Tile::kA, kBlockB = (kRowB ? kN : kBlockK<T>)*Tile::kB;
  static_assert(kM * Tile::kTileStride * sizeof(float) <= kDepth * kBlockB * sizeof(T));
  Tile product;
  run_steps(steps, copy, [&](int step) {
    product.step(a + (streamed ? step % kDepth : step) * kBlockA, b + step % kDepth * kBlockB);
  });
  product.store(sums);
  sync_threads();
}

// ---- between programs

// True in all threads of the last of `count` programs to come. It sees what all have stored, past
// L1, and sets the counter back to 0.
__device__ __forceinline__ bool last_to_arrive(int32_t* counter, int count) {
  sync_threads();  // the stores of all threads come before what thread 0 does
  bool last = false;
  if (threadIdx.x == 0) {
    last = arrive(counter) == count - 1;
    if (last) *counter = 0;
  }
  return sync_threads_or(last);
}

}  // namespace fusedres::cuda
