// A product on a block of rows: c (+)= a @ b, b in panels of a tile's columns.
//
//   tile: kTileRows x (up to kTileVectors vectors) of sums in registers; one step of the inner sum
//         loads a row of the panel and broadcasts an element of each row of `a`
//   unit: what one step takes from a row of `a`: a float, a double, or a pair of bf16
//   AMX:  tiles of 16 x 16 sums, and of 16 pairs of 16 rows; what they leave over is done as before
//
// Sums go along the inner dimension in an order of their own, so that a row's result depends on
// that row alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "cpu/rows.h"

namespace fusedres::cpu::FUSEDRES_ISA {

struct Pair {  // two bf16, adjacent along the inner dimension
  uint32_t bits;
};

template <class Unit>
using Sum = std::conditional_t<std::is_same_v<Unit, Pair>, float, Unit>;

constexpr int64_t kAmx = 16;  // rows, columns and pairs of a tile of AMX

// Units that are summed up from 0 before they are added to c: rounding errors grow with a sum. No
// library that torch multiplies by was seen to sum up fewer.
constexpr int64_t kInner = 96;

template <class Unit>
inline int64_t units(int64_t inner) {
  return std::is_same_v<Unit, Pair> ? (inner + 1) / 2 : inner;
}

// ---- the tile

template <class Unit, int kRows, int kColumns>
FUSEDRES_TILE void tile(const Unit* a, int64_t row, int64_t step, const Unit* b, int64_t inner,
                        Sum<Unit>* c, int64_t stride, bool add) {
  using V = Vector<Sum<Unit>>;
  using Aligned = typename V::Aligned;
  using Anywhere = typename V::Anywhere;
  Aligned sums[kRows][kColumns];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) sums[i][j] = Aligned{};
  for (int64_t k = 0; k < inner; ++k) {
    Aligned panel[kColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) panel[j] = *(const Aligned*)(b + j * V::kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
#ifdef FUSEDRES_PAIRS
      if constexpr (std::is_same_v<Unit, Pair>) {
        const auto both = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[i * row].bits));
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j)
          sums[i][j] = _mm512_dpbf16_ps(sums[i][j], both, (__m512bh)panel[j]);
        continue;
      } else
#endif
      {
        const Aligned one = a[i * row] - Aligned{};
#pragma GCC unroll 16
        for (int j = 0; j < kColumns; ++j) sums[i][j] += one * panel[j];
      }
    }
    a += step;
    b += kColumns * V::kLanes;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < kColumns; ++j) {
      auto* const to = (Anywhere*)(c + i * stride + j * V::kLanes);
      *to = add ? *to + sums[i][j] : sums[i][j];
    }
}

template <class Unit>
using TileFunction = void (*)(const Unit*, int64_t, int64_t, const Unit*, int64_t, Sum<Unit>*,
                              int64_t, bool);

template <class Unit, int kRows, int... kColumns>
constexpr TileFunction<Unit> tile_of(int vectors, std::integer_sequence<int, kColumns...>) {
  TileFunction<Unit> found = nullptr;
  ((vectors == kColumns + 1 ? void(found = tile<Unit, kRows, kColumns + 1>) : void()), ...);
  return found;
}

template <class Unit, int... kRows>
constexpr TileFunction<Unit> tile_of(int rows, int vectors, std::integer_sequence<int, kRows...>) {
  TileFunction<Unit> found = nullptr;
  ((rows == kRows + 1 ? void(found = tile_of<Unit, kRows + 1>(
                                 vectors, std::make_integer_sequence<int, kTileVectors>{}))
                      : void()),
   ...);
  return found;
}

template <class Unit>
struct Tiles {
  TileFunction<Unit> of[kTileRows][kTileVectors];
  constexpr Tiles() : of() {
    for (int r = 0; r < kTileRows; ++r)
      for (int v = 0; v < kTileVectors; ++v)
        of[r][v] = tile_of<Unit>(r + 1, v + 1, std::make_integer_sequence<int, kTileRows>{});
  }
};

#ifdef FUSEDRES_PAIRS
// ---- the same by AMX

struct AmxRegisters {
  FUSEDRES_TILE AmxRegisters() {
    alignas(64) static constexpr struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  FUSEDRES_TILE ~AmxRegisters() { _tile_release(); }
};

// c (16 kRows, 16 kColumns) (+)= a @ b; b's rows, of 16 pairs each, are `step` pairs apart.
template <int kRows, int kColumns>
FUSEDRES_TILE void amx_tile(const Pair* a, int64_t row, const Pair* b, int64_t step, int64_t inner,
                            float* c, int64_t stride, bool add) {
  asm volatile("" ::: "memory");  // gcc does not know that tile loads read memory
  float* const c2 = c + kAmx * stride;
  const int64_t c_bytes = stride * 4, a_bytes = row * 4, b_bytes = step * 4;
  if (add) {
    _tile_loadd(0, c, c_bytes);
    if (kColumns > 1) _tile_loadd(1, c + kAmx, c_bytes);
    if (kRows > 1) _tile_loadd(2, c2, c_bytes);
    if (kRows > 1 && kColumns > 1) _tile_loadd(3, c2 + kAmx, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < inner; k += kAmx, b += kAmx * step) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if (kColumns > 1) {
      _tile_loadd(7, b + kAmx, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kRows > 1) {
      _tile_loadd(5, a + kAmx * row + k, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kColumns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kColumns > 1) _tile_stored(1, c + kAmx, c_bytes);
  if (kRows > 1) _tile_stored(2, c2, c_bytes);
  if (kRows > 1 && kColumns > 1) _tile_stored(3, c2 + kAmx, c_bytes);
}

// The first `rows` rows of c (+)= the first `amx_inner` steps of a @ b, both whole tiles.
inline void amx_multiply(const Pair* a, int64_t row, int64_t rows, const Pair* b, int64_t inner,
                         int64_t amx_inner, int64_t width, float* c, int64_t stride, bool add) {
  constexpr int64_t kPanel = Vector<float>::kPanel;
  const AmxRegisters registers;
  for (int64_t n = 0; n < width; n += kPanel) {
    const int64_t step = std::min(kPanel, round_up(width - n, kAmx));
    for (int64_t j = 0; j < step; j += 2 * kAmx)
      for (int64_t m = 0; m < rows; m += 2 * kAmx) {
        const bool two_rows = rows - m > kAmx, two_columns = step - j > kAmx;
        const auto function = two_rows      ? two_columns ? amx_tile<2, 2> : amx_tile<2, 1>
                              : two_columns ? amx_tile<1, 2>
                                            : amx_tile<1, 1>;
        function(a + m * row, row, b + n * inner + j, step, amx_inner, c + m * stride + n + j,
                 stride, add);
      }
  }
}
#endif

// Where the units of `a` are: (i, k) at data + i / kTileRows * tile + i % kTileRows * row + k * step.
template <class Unit>
struct Left {
  const Unit* data;
  int64_t row, step, tile;
};

template <class Unit>
inline Left<Unit> row_major(const Unit* data, int64_t stride) {
  return {data, stride, 1, kTileRows * stride};
}

template <class Unit>
inline bool in_amx() {
  return std::is_same_v<Unit, Pair> && multiplies_tiles();
}

// Rows that a tile takes.
template <class Unit>
inline int64_t tile_rows() {
  return in_amx<Unit>() ? kAmx : kTileRows;
}

// c (rows, width), its rows `stride` apart and as long as whole vectors, (+)= a @ b.
template <class Unit>
inline void multiply(const Left<Unit>& a, int64_t rows, const Unit* b, int64_t inner, int64_t width,
                     Sum<Unit>* c, int64_t stride, bool add) {
  using V = Vector<Sum<Unit>>;
  static constexpr Tiles<Unit> tiles;
  int64_t amx_rows = 0, amx_inner = 0;  // that AMX multiplies
#ifdef FUSEDRES_PAIRS
  if constexpr (std::is_same_v<Unit, Pair>)
    if (in_amx<Unit>() && rows >= kAmx && inner >= kAmx) {
      amx_rows = rows / kAmx * kAmx;
      amx_inner = inner / kAmx * kAmx;
      amx_multiply(a.data, a.row, amx_rows, b, inner, amx_inner, width, c, stride, add);
    }
#endif
  for (int64_t n = 0; n < width; n += V::kPanel) {
    const int64_t vectors = std::min(kTileVectors, (width - n + V::kLanes - 1) / V::kLanes);
    // A piece of the panel stays in L1 for all rows.
    const auto rest = [&](int64_t begin, int64_t end, int64_t from) {
      for (int64_t k = from; k < inner || k == 0; k += kInner)
        for (int64_t m = begin; m < end; m += kTileRows) {
          const auto function = tiles.of[std::min(kTileRows, end - m) - 1][vectors - 1];
          const Unit* const left = a.data + (a.step == 1 ? m * a.row : m / kTileRows * a.tile);
          function(left + k * a.step, a.row, a.step, b + n * inner + k * vectors * V::kLanes,
                   std::min(kInner, inner - k), c + m * stride + n, stride, add || k > 0);
        }
    };
    if (amx_inner < inner) rest(0, amx_rows, amx_inner);
    rest(amx_rows, rows, 0);
  }
}

// ---- packing

// Elements [0, n) of row m as units; an odd last bf16 has 0 beside it.
template <class Unit>
inline void load_units(const Rows& rows, int64_t m, int64_t n, Unit* out) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    const auto* in = static_cast<const uint16_t*>(rows.data) + m * rows.stride;
    for (int64_t k = 0; k < n / 2; ++k) out[k].bits = in[2 * k] | uint32_t{in[2 * k + 1]} << 16;
    if (n % 2) out[n / 2].bits = in[n - 1];
  } else {
    with_row<Unit>(rows, m, [&](const auto* in) {
#pragma omp simd
      for (int64_t k = 0; k < n; ++k) out[k] = to_float(in[k]);
    });
  }
}

// Calls f(get), get(n) being unit k of column n of a matrix whose rows go along the inner dimension.
template <class Unit, class F>
inline void with_units_across(const Rows& rows, int64_t k, int64_t inner, F&& f) {
  if constexpr (std::is_same_v<Unit, Pair>) {
    const auto* in = static_cast<const uint16_t*>(rows.data) + 2 * k * rows.stride;
    const auto* next = in + rows.stride;
    if (2 * k + 1 < inner)
      f([=](int64_t n) { return Pair{in[n] | uint32_t{next[n]} << 16}; });
    else
      f([=](int64_t n) { return Pair{in[n]}; });
  } else {
    with_row<Unit>(rows, k,
                   [&](const auto* in) { f([=](int64_t n) { return Unit(to_float(in[n])); }); });
  }
}

// to[k * step + i] = from[i * stride + k] for a square of a vector's lanes, by a network of
// interleavings: log2(lanes) times rows i and i + lanes / 2 become rows 2 i and 2 i + 1.
template <class Unit>
inline void transpose_square(const Unit* from, int64_t stride, Unit* to, int64_t step) {
  using V = Vector<Index<Unit>>;
  constexpr int kLanes = V::kLanes;
  const auto low = lanes<Index<Unit>>([](int i) { return i / 2 + i % 2 * kLanes; });
  const auto high = lanes<Index<Unit>>([](int i) { return (i + kLanes) / 2 + i % 2 * kLanes; });
  typename V::Aligned rows[kLanes], next[kLanes];
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) rows[i] = *(const typename V::Anywhere*)(from + i * stride);
#pragma GCC unroll 4
  for (int done = 1; done < kLanes; done *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kLanes / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) *(typename V::Aligned*)(to + i * step) = rows[i];
}

// Panels [begin, end) of b (inner, width), b[k][n] = matrix[n][k].
template <class Unit>
inline void pack_transposed(const Rows& matrix, int64_t inner, int64_t width, Unit* out,
                            int64_t begin, int64_t end) {
  using V = Vector<Sum<Unit>>;
  constexpr int64_t kLanes = V::kLanes;
  const int64_t count = units<Unit>(inner), stride = round_up(count, kLanes);
  Unit* const staged = Arena(kLanes * stride * sizeof(Unit)).template take<Unit>(kLanes * stride);
  const bool as_it_is = is_exact<Unit>(matrix.dtype);
  for (int64_t n = begin * V::kPanel; n < std::min(width, end * V::kPanel); n += kLanes) {
    const int64_t first = n / V::kPanel * V::kPanel;
    const int64_t step = std::min(V::kPanel, round_up(width - first, kLanes));
    Unit* const panel = out + first * count + (n - first);
    const Unit* from = staged;
    int64_t apart = stride;
    if (as_it_is && n + kLanes <= width) {
      from = static_cast<const Unit*>(matrix.data) + n * matrix.stride;
      apart = matrix.stride;
    } else {
      for (int64_t i = 0; i < kLanes; ++i)
        if (n + i < width)
          load_units(matrix, n + i, inner, staged + i * stride);
        else
          std::fill_n(staged + i * stride, count, Unit{});
    }
    int64_t k = 0;
    for (; k + kLanes <= count; k += kLanes)
      transpose_square(from + k, apart, panel + k * step, step);
    for (; k < count; ++k)
      for (int64_t i = 0; i < kLanes; ++i) panel[k * step + i] = from[i * apart + k];
  }
}

// Panels [begin, end) of b (inner, width), b[k][n] = matrix[row + k][n]. Few rows at a time, so that
// both sides are met line after line.
template <class Unit>
inline void pack_rows(const Rows& matrix, int64_t row, int64_t inner, int64_t width, Unit* out,
                      int64_t begin, int64_t end) {
  using V = Vector<Sum<Unit>>;
  constexpr int64_t kAtOnce = 8;
  const int64_t count = units<Unit>(inner);
  const Rows from = rows_from<Sum<Unit>>(matrix, row);
  const auto pack = [&](int64_t k, int64_t first, int64_t last, auto get) {
    for (int64_t n = first * V::kPanel; n < std::min(width, last * V::kPanel); n += V::kPanel) {
      const int64_t here = std::min(V::kPanel, width - n), step = round_up(here, V::kLanes);
      Unit* const to = out + n * count + k * step;
#pragma omp simd
      for (int64_t j = 0; j < here; ++j) to[j] = get(n + j);
      for (int64_t j = here; j < step; ++j) to[j] = Unit{};
    }
  };
  if (is_exact<Unit>(matrix.dtype)) {
    for (int64_t first = 0; first < count; first += kAtOnce)
      for (int64_t panel = begin; panel < end; ++panel)
        for (int64_t k = first; k < std::min(count, first + kAtOnce); ++k) {
          const Unit* const in = static_cast<const Unit*>(from.data) + k * from.stride;
          pack(k, panel, panel + 1, [in](int64_t n) { return in[n]; });
        }
  } else {
    for (int64_t k = 0; k < count; ++k)
      with_units_across<Unit>(from, k, inner, [&](auto get) { pack(k, begin, end, get); });
  }
}

// The left side of a.T @ b, from columns [begin, end) of `matrix`: in tiles, or row by row for AMX.
template <class Unit>
inline Left<Unit> pack_left(const Rows& matrix, int64_t row, int64_t inner, int64_t begin,
                            int64_t end, Unit* out) {
  const int64_t count = units<Unit>(inner);
  const Rows from = rows_from<Sum<Unit>>(matrix, row);
  if (in_amx<Unit>()) {
    const int64_t stride = round_up(count, kAmx);
    alignas(64) Unit square[kAmx * kAmx];
    for (int64_t k = 0; k < count; k += kAmx)
      for (int64_t n = begin; n < end; n += kAmx) {
        std::fill_n(square, kAmx * kAmx, Unit{});
        for (int64_t i = 0; i < std::min(kAmx, count - k); ++i)
          with_units_across<Unit>(from, k + i, inner, [&](auto get) {
            for (int64_t j = 0; j < std::min(kAmx, end - n); ++j) square[i * kAmx + j] = get(n + j);
          });
        if constexpr (Vector<Index<Unit>>::kLanes == kAmx)
          transpose_square(square, kAmx, out + (n - begin) * stride + k, stride);
      }
    return row_major(const_cast<const Unit*>(out), stride);
  }
  for (int64_t k = 0; k < count; ++k)
    with_units_across<Unit>(from, k, inner, [&](auto get) {
      Unit* to = out + k * kTileRows;
      int64_t n = begin;
      for (; n + kTileRows <= end; n += kTileRows, to += kTileRows * count)
#pragma GCC unroll 8
        for (int64_t j = 0; j < kTileRows; ++j) to[j] = get(n + j);
      for (int64_t j = 0; n + j < end; ++j) to[j] = get(n + j);
    });
  return {out, 1, kTileRows, kTileRows * count};
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
