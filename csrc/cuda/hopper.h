// Hopper's own instructions under short names, from CUTLASS: barriers in shared memory, boxes copied
// by TMA, matrix products by whole warpgroups. With FUSEDRES_EMULATE the same names run on a CPU.
#pragma once

#ifdef FUSEDRES_EMULATE
#include "hopper_on_cpu.h"
#else

#include <cuda.h>
#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>

#include <cute/arch/copy_sm90_tma.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>

#include "cuda/device.h"
#include "cuda/schedule.h"

namespace fusedres::cuda::sm90 {

// ---- barriers

// CUTLASS's barriers tell the compiler nothing of memory: it might move loads and stores past them.
__device__ __forceinline__ void keep_order() { asm volatile("" ::: "memory"); }

// A barrier of schedule.h. What a warp did before it arrived is seen after a wait.
struct Barrier {
  alignas(8) uint64_t state;

  using Mbarrier = cutlass::arch::ClusterTransactionBarrier;
  __device__ __forceinline__ void init(int arrivals) { Mbarrier::init(&state, arrivals); }
  __device__ __forceinline__ void wait(uint32_t parity) {
    Mbarrier::wait(&state, parity);
    keep_order();
  }
  __device__ __forceinline__ void arrive() {
    keep_order();
    sync_warp();
    if (threadIdx.x % 32 == 0) Mbarrier::arrive(&state);
  }
  // By one thread for its warp. The phase lasts until `bytes` have come by TMA as well.
  __device__ __forceinline__ void arrive_and_expect(int bytes) {
    Mbarrier::arrive_and_expect_tx(&state, bytes);
  }
};

// Before a block's first use of what `init` has written, and sync_threads() after it.
__device__ __forceinline__ void fence_init() { cutlass::arch::fence_barrier_init(); }

// Of `warps` warps that call this, and no other.
__device__ __forceinline__ void sync_warps(int warps) {
  asm volatile("bar.sync 1, %0;" ::"r"(32 * warps) : "memory");
}

// Returns when `count` blocks have arrived at counters[0]. One thread of each of them calls it; when
// all have, counters (2) are 0 as at first.
__device__ __forceinline__ void wait_for_blocks(int32_t* counters, int count) {
  int come;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(come) : "l"(counters) : "memory");
  } while (come < count);
  if (arrive(counters + 1) == count - 1) counters[0] = counters[1] = 0;  // nobody looks any more
}

// ---- copies by TMA

using BoxMap = CUtensorMap;

// The box of `map` that starts at (row, column), 0 outside of the matrix. One thread calls it.
__device__ __forceinline__ void load_box(const BoxMap& map, Barrier& barrier, void* to, int row,
                                         int column) {
  constexpr auto kHint = static_cast<uint64_t>(cute::TMA::CacheHintSm90::EVICT_NORMAL);
  cute::SM90_TMA_LOAD_2D::copy(&map, &barrier.state, kHint, to, column, row);
}

// TMA reads and writes by a way of its own. This stands between stores to global memory and boxes
// loaded from there, the other between loads from shared memory and boxes that overwrite it.
__device__ __forceinline__ void fence_stores_before_boxes() {
  asm volatile("fence.proxy.async.global;" ::: "memory");
}
__device__ __forceinline__ void fence_loads_before_boxes() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The driver's, looked up when first asked for: the library must load where there is no driver.
inline auto box_encoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                             12000, cudaEnableDefault, &result);
  const bool ok = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return ok ? reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found) : nullptr;
}

// Boxes of `box_rows` rows by kBlockK columns of a (rows, columns) matrix of 16-bit elements.
inline const char* map_boxes(BoxMap& map, const Matrix& matrix, DType dtype, int64_t rows,
                             int64_t columns, int box_rows) {
  static const auto encode = box_encoder();
  if (!encode) return "the driver has no cuTensorMapEncodeTiled";
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t row_bytes[] = {static_cast<cuuint64_t>(2 * matrix.stride)};
  const cuuint32_t box[] = {kBlockK, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const auto type =
      dtype == DType::float16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult result =
      encode(&map, type, 2, matrix.data, sizes, row_bytes, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? nullptr : "cuTensorMapEncodeTiled refuses x or weight";
}

// ---- registers

constexpr int kBlockThreads = 512, kStartRegisters = 65536 / kBlockThreads;

// From now on this warpgroup has `kCount` registers a thread.
template <int kCount>
__device__ __forceinline__ void set_registers() {
  if constexpr (kCount < kStartRegisters) cutlass::arch::warpgroup_reg_dealloc<kCount>();
  if constexpr (kCount > kStartRegisters) cutlass::arch::warpgroup_reg_alloc<kCount>();
}

// v, of which the compiler knows nothing: it would work out ahead, and hold in registers, what
// depends on it.
__device__ __forceinline__ int opaque(int v) {
  asm volatile("" : "+r"(v));
  return v;
}

// ---- products

namespace GMMA = cute::SM90::GMMA;

// Four 8 x 8 matrices of 16-bit elements: lane 8 i + r has the address of row r of matrix i.
__device__ __forceinline__ void stmatrix_x4(void* row, const uint32_t (&r)[4]) {
  asm volatile(
      "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
      "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
      : "memory");
}

// sums (kBlockM, kBlockN) = x @ weight.T in fp32, by two warpgroups, 64 rows each. Value
// 4 j + 2 h + c of a thread is that of row 16 warp + lane / 4 + 8 h, column 8 j + 2 (lane % 4) + c.
template <class T, int kBlockN>
class Multiplier {
 public:
  // Adds the product of the tiles in `slot`, or starts with it. Returns when the one before has
  // ended.
  __device__ __forceinline__ void start(const T* x, const T* weight, int slot, bool first) {
    const int warpgroup = __shfl_sync(0xFFFFFFFFu, threadIdx.x / 128 % 2, 0);
    const uint32_t a = at(x, slot * kBlockM + 64 * warpgroup), b = at(weight, slot * kBlockN);
    fence_sums();
    cute::warpgroup_arrive();
    auto scale = first ? GMMA::ScaleOut::Zero : GMMA::ScaleOut::One;
#pragma unroll
    for (int k = 0; k < 2 * kBlockK; k += kStepBytes) {
#pragma unroll
      for (int n = 0; n < kBlockN / kColumns; ++n)
        [&]<size_t... kI>(std::index_sequence<kI...>) {
          Instruction::fma(operand(a + k / 16), operand(b + (n * kColumns * kRowBytes + k) / 16),
                           sums_[n * kValues + kI]..., scale);
        }(std::make_index_sequence<kValues>{});
      scale = GMMA::ScaleOut::One;
    }
    cute::warpgroup_commit_batch();
    cute::warpgroup_wait<1>();
    fence_sums();
  }

  __device__ __forceinline__ void end() {
    cute::warpgroup_wait<0>();
    fence_sums();
  }

  __device__ __forceinline__ float value(int i) const { return sums_[i]; }

 private:
  // Not 256 columns at once: ptxas holds one instruction to the registers a block starts with.
  static constexpr int kColumns = 128, kValues = 64 * kColumns / 128, kStepBytes = 32;
  static constexpr int kRowBytes = 2 * kBlockK;
  using Instruction =
      std::conditional_t<std::is_same_v<T, bfloat16>,
                         GMMA::MMA_64x128x16_F32BF16BF16_SS<GMMA::Major::K, GMMA::Major::K>,
                         GMMA::MMA_64x128x16_F32F16F16_SS<GMMA::Major::K, GMMA::Major::K> >;

  // Lower half of the PTX ISA's "matrix descriptor": where a row of tiles lies, in 16 bytes.
  __device__ __forceinline__ static uint32_t at(const T* tiles, int row) {
    return 1 << 16 | (shared_address(tiles) + row * kRowBytes) / 16 % (1 << 14);
  }

  // And its upper half: rows of 128 bytes, exchanged as TMA does it, in eights.
  __device__ __forceinline__ static uint64_t operand(uint32_t at) {
    return uint64_t{1 << 30 | 8 * kRowBytes / 16} << 32 | at;
  }

  __device__ __forceinline__ void fence_sums() {
#pragma unroll
    for (float& sum : sums_) cute::warpgroup_fence_operand(sum);
  }

  float sums_[kBlockN / kColumns * kValues];
};

// ---- launches

// As `launch`, and all programs are resident at once, or it is an error.
template <class... Parameters, class... Arguments>
const char* launch_together(void (*kernel)(Parameters...), int64_t programs, int threads,
                            int shared_bytes, void* stream, const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...));
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(entry, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  error = cudaLaunchCooperativeKernel(entry, dim3(static_cast<unsigned>(programs)), dim3(threads),
                                      pointers, shared_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fusedres::cuda::sm90

#endif
