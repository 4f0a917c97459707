// Small kernels with a known result, right and wrong ones, that test the emulation itself.
#include "cuda_on_cpu.h"

namespace {

using namespace fusedres::cuda;

// Sums up 128 numbers with a tree in shared memory. `barriers`: 0 leaves out the last barrier.
void reduce(const float* in, float* out, int barriers) {
  auto* t = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x;
  t[i] = in[blockIdx.x * 128 + i];
  sync_threads();
  for (int half = 64; half > 0; half /= 2) {
    if (i < half) t[i] += t[i + half];
    if (half > 1 || barriers) sync_threads();
  }
  if (i == 127) out[blockIdx.x] = t[0];
}

// c (16, 8) += a (16, 16) @ b, b (16, 8) row by row or, transposed, (8, 16).
template <class T>
void multiply(const T* a, const T* b, float* c, bool b_transposed) {
  auto* shared = reinterpret_cast<T*>(shared_memory());
  const int l = threadIdx.x;
  for (int i = l; i < 256; i += 32) shared[i] = a[i];
  for (int i = l; i < 128; i += 32) shared[256 + i] = b[i];
  sync_warp();
  uint32_t fa[4], fb[4];
  ldmatrix_x4(fa, shared + l % 16 * 16 + l / 16 * 8);
  if (b_transposed)
    ldmatrix_x4(fb, shared + 256 + l % 8 * 16 + l / 8 % 2 * 8);
  else
    ldmatrix_x4_trans(fb, shared + 256 + l % 16 * 8);
  float acc[4];
  for (int i = 0; i < 4; ++i) acc[i] = c[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2];
  mma_16x8x16<T>(acc, fa, {fb[0], fb[1]});
  for (int i = 0; i < 4; ++i) c[(l / 4 + i / 2 * 8) * 8 + l % 4 * 2 + i % 2] = acc[i];
}

// out (128, 4) = in, whose first `count` floats are there, the others 0.
void copy(const float* in, float* out, int count, int waits, int barriers) {
  auto* t = reinterpret_cast<float*>(shared_memory());
  const int i = threadIdx.x, left = count - 4 * i, other = 127 - i;
  cp_async_16(t + 4 * i, in + 4 * i, 4 * (left < 0 ? 0 : left > 4 ? 4 : left));
  cp_async_commit();
  cp_async_commit();
  if (waits == 1) cp_async_wait<1>();
  if (waits == 2) cp_async_wait<2>();
  if (barriers) sync_threads();
  for (int j = 0; j < 4; ++j) out[4 * other + j] = t[4 * other + j];
}

// out[i] = sum over the lanes of warp i of in, by a butterfly; one `lane` shuffles otherwise.
void butterfly(const float* in, float* out, int lane) {
  float v = in[threadIdx.x];
  for (int mask = 16; mask > 0; mask /= 2)
    v += static_cast<int>(threadIdx.x) == lane ? shuffle(v, mask) : shuffle_xor(v, mask);
  if (threadIdx.x % 32 == 0) out[threadIdx.x / 32] = v;
}

// out[0] = sum of in (blocks, 32) by the last block to arrive. `barrier`: before it arrives.
// `wrong`: 1 loads through L1, 2 lets every block sum up, 3 has all write to the same place.
void last_block(const float* in, float* partial, float* out, int32_t* arrived, int barrier,
                int wrong) {
  auto* flag = reinterpret_cast<int*>(shared_memory());
  const int i = threadIdx.x;
  partial[blockIdx.x * 32 + i] = in[blockIdx.x * 32 + i];
  if (barrier) sync_threads();
  if (i == 0) *flag = arrive(arrived) == static_cast<int>(gridDim.x) - 1;
  sync_threads();
  if (wrong == 3) *out = 0;
  if ((!*flag && wrong != 2) || i > 0) return;
  float sum = 0;
  for (unsigned j = 0; j < gridDim.x * 32; ++j)
    sum += wrong == 1 ? partial[j] : load_past_l1(partial + j);
  *out = sum;
  *arrived = 0;
}

// Accesses that must be noticed, by number.
void misbehave(float* out, int which) {
  auto* t = reinterpret_cast<float*>(shared_memory());
  float registers[4] = {};
  const int i = threadIdx.x;
  if (which == 0) out[64] = 1;                                   // behind a buffer
  if (which == 1) t[1000 + i] = 1;                               // far behind shared memory
  if (which == 2) t[60 + i % 2] = 1;                             // just behind it
  if (which == 3 && i == 5) return;                              // others then wait for it
  if (which == 4) *reinterpret_cast<float4*>(t + 1) = float4{};  // misaligned
  if (which == 5) registers[out[1] > 1e30f ? 0 : 4 + i] = 1;     // behind an array
  if (which == 6) out[i] = t[i];                                 // never written
  if (which == 7) cp_async_16(t, out + 1);                       // misaligned
  if (which == 8 && i < 16) sync_warp();                         // half a warp
  sync_threads();
  out[0] = registers[i % 4];
}

}  // namespace

extern "C" {

const char* selftest_reduce(int blocks, const float* in, float* out, int barriers) {
  return launch(reduce, blocks, 128, 512, nullptr, in, out, barriers);
}
const char* selftest_multiply_float16(const float16* a, const float16* b, float* c, bool turned) {
  return launch(multiply<float16>, 1, 32, 768, nullptr, a, b, c, turned);
}
const char* selftest_multiply_bfloat16(const bfloat16* a, const bfloat16* b, float* c,
                                       bool turned) {
  return launch(multiply<bfloat16>, 1, 32, 768, nullptr, a, b, c, turned);
}
const char* selftest_copy(const float* in, float* out, int count, int waits, int barriers) {
  return launch(copy, 1, 128, 2048, nullptr, in, out, count, waits, barriers);
}
const char* selftest_butterfly(const float* in, float* out, int lane) {
  return launch(butterfly, 1, 64, 0, nullptr, in, out, lane);
}
const char* selftest_last_block(int blocks, const float* in, float* partial, float* out,
                                int32_t* arrived, int barrier, int wrong) {
  return launch(last_block, blocks, 32, 4, nullptr, in, partial, out, arrived, barrier, wrong);
}
const char* selftest_misbehave(float* out, int which) {
  return launch(misbehave, 1, 32, 240, nullptr, out, which);
}

}  // extern "C"
