// From a dtype and a tile known at run time to the kernel made for them.
#pragma once

#include <type_traits>
#include <utility>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace fusedres::cuda {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// f(T{}, Constant<m>{}, Constant<n>{}) for the one of kTiles that `tile` has; it returns an error or
// nullptr.
template <class T, class F>
const char* with_tile(const Tile& tile, F f) {
  const char* error = "no kernel has this tile: see kTiles";
  [&]<size_t... kI>(std::index_sequence<kI...>) {
    (void)((kTiles[kI].m == tile.block_m && kTiles[kI].n == tile.block_n &&
            (error = f(T{}, Constant<kTiles[kI].m>{}, Constant<kTiles[kI].n>{}), true)) ||
           ...);
  }(std::make_index_sequence<std::size(kTiles)>{});
  return error;
}

// f(T{}) for the element type of `dtype`.
template <class F>
const char* with_element(DType dtype, F f) {
  switch (dtype) {
    case DType::float32:
      return f(float{});
    case DType::bfloat16:
      return f(bfloat16{});
    case DType::float16:
      return f(float16{});
    case DType::float64:
      break;
  }
  return "float64 has no kernel in this family";
}

}  // namespace fusedres::cuda
