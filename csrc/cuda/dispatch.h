// From a dtype and a tile known at run time to the code made for them.
#pragma once

#include <type_traits>

#include "cuda/device.h"
#include "cuda/plan.h"

namespace fusedres::cuda {

template <int kValue>
using Constant = std::integral_constant<int, kValue>;

// f(Constant<programs>{}) of the kernel that serves all of kTiles of which as many programs fit on a
// multiprocessor: they differ in the product alone, a small part of its code. nullptr or an error.
template <class F>
const char* with_kernel(const Tile& tile, F f) {
  for (const BlockSize size : kTiles)
    if (size.m == tile.block_m && size.n == tile.block_n)
      return at_once(size.m) == 1 ? f(Constant<1>{}) : f(Constant<2>{});
  return "no kernel has this tile: see kTiles";
}

// f(Constant<m>{}, Constant<n>{}) for the one of the kernel's tiles that has this size.
template <int kAtOnce, int kI = 0, class F>
__device__ __forceinline__ void with_size(BlockSize size, F f) {
  if constexpr (kI < std::size(kTiles)) {
    constexpr BlockSize kSize = kTiles[kI];
    if constexpr (at_once(kSize.m) == kAtOnce)
      if (size.m == kSize.m && size.n == kSize.n)
        return f(Constant<kSize.m>{}, Constant<kSize.n>{});
    with_size<kAtOnce, kI + 1>(size, f);
  }
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
