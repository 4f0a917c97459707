// The instructions behind the names in device.h. Source: the PTX ISA.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

namespace fusedres::cuda {

// ---- numbers

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(double v) { return static_cast<float>(v); }
__device__ __forceinline__ float to_float(bfloat16 v) {
  return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
__device__ __forceinline__ float to_float(float16 v) {
  return __half2float(__ushort_as_half(v.bits));
}

template <class T>
__device__ __forceinline__ T from_float(float v) {
  if constexpr (std::is_same_v<T, bfloat16>)
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
  else if constexpr (std::is_same_v<T, float16>)
    return {__half_as_ushort(__float2half_rn(v))};
  else
    return v;
}

// ---- of a block and a warp

__device__ __forceinline__ void* shared_memory() {
  extern __shared__ __align__(1024) unsigned char memory[];  // as boxes of TMA need it
  return memory;
}

__device__ __forceinline__ void sync_threads() { __syncthreads(); }
__device__ __forceinline__ bool sync_threads_or(bool any) { return __syncthreads_or(any); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
__device__ __forceinline__ float shuffle_xor(float v, int lanes) {
  return __shfl_xor_sync(0xFFFFFFFFu, v, lanes);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// ---- copies to shared memory

__device__ __forceinline__ void cp_async_16(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_4(void* to, const void* from, int bytes) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- tensor cores

__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bfloat16>)
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- between blocks

// L1 may hold an older copy of what another block has stored; L2 does not.
template <class V>
__device__ __forceinline__ V load_past_l1(const V* p) {
  if constexpr (sizeof(V) == 16) {
    const uint4 bits = __ldcg(reinterpret_cast<const uint4*>(p));
    return __builtin_bit_cast(V, bits);
  } else if constexpr (sizeof(V) == 4) {
    const uint32_t bits = __ldcg(reinterpret_cast<const uint32_t*>(p));
    return __builtin_bit_cast(V, bits);
  } else {
    static_assert(sizeof(V) == 2);
    const uint16_t bits = __ldcg(reinterpret_cast<const unsigned short*>(p));
    return __builtin_bit_cast(V, bits);
  }
}

__device__ __forceinline__ int arrive(int32_t* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// ---- from the host

// Lets a kernel have more shared memory than it gets unasked. Asked once for each device, as the
// question takes as long as a third of a launch.
inline cudaError_t allow_shared(const void* kernel, int bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, int> allowed;
  constexpr int kUnasked = 48 * 1024;
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess || bytes <= kUnasked) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  int& most = allowed[{device, kernel}];
  if (bytes <= most) return cudaSuccess;
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (set == cudaSuccess) most = bytes;
  return set;
}

template <class... Parameters, class... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t programs, int threads, int shared_bytes,
                   void* stream, const Arguments&... arguments) {
  static_assert((std::is_same_v<Parameters, Arguments> && ...));
  if (programs > INT32_MAX) return "more than 2^31 - 1 programs";
  const void* entry = reinterpret_cast<const void*>(kernel);
  cudaError_t error = allow_shared(entry, shared_bytes);
  if (error != cudaSuccess) return cudaGetErrorString(error);
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&arguments))...};
  error = cudaLaunchKernel(entry, dim3(static_cast<unsigned>(programs)), dim3(threads), pointers,
                           shared_bytes, static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fusedres::cuda
