// All that device code uses of CUDA. With FUSEDRES_EMULATE the same names run on a CPU, where tests
// check the kernels' numbers without a GPU.
//
// The language: __global__, __device__, __forceinline__, __noinline__, __launch_bounds__,
//   __grid_constant__, threadIdx.x, blockIdx.x, `#pragma unroll`.
// Of a block:   void* shared_memory()   dynamic shared memory, 1024-byte aligned
//               sync_threads(), bool sync_threads_or(bool)   barrier; true where any thread says so
// Of a warp:    sync_warp(), float shuffle_xor(float, int lanes)   all 32 lanes take part
// Copies to shared memory that run on: cp_async_16(to, from, bytes), cp_async_4(to, from, bytes)
//               copy `bytes` (0 to 16, 0 to 4) bytes, zeros follow them; cp_async_commit() closes
//               a group; cp_async_wait<n>() waits for all but the last n groups of this thread
// Tensor cores: ldmatrix_x4(r, row), ldmatrix_x4_trans(r, row)   uint32_t r[4]
//               mma_16x8x16<T>(d, a, b)   float d[4] += uint32_t a[4] * b[2], T bfloat16, float16
// Between blocks: V load_past_l1(const V*)   V of 2, 4 or 16 bytes, what other blocks have stored
//               int arrive(int32_t*)   adds 1, acquire and release, gives what was there before
// Numbers:      bfloat16, float16; float to_float(T); T from_float<T>(float), to nearest even
// From the host: const char* launch(kernel, programs, threads, shared_bytes, stream, arguments...)
//               nullptr or what is wrong
#pragma once

#ifdef FUSEDRES_EMULATE
#include "cuda_on_cpu.h"
#else
#include "cuda/ptx.h"
#endif
