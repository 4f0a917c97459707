// What a launcher of a CUDA kernel gets: pointers, sizes, strides in elements, enums. No torch, no
// CUDA: plain structs that go to a kernel by value.
//
//   z = prologue(x) @ weight.T + bias ; y = epilogue(z)
//
// A launcher enqueues on `stream` and returns nullptr or what is wrong. It never allocates, prints,
// synchronises or throws.
#pragma once

#include <cstdint>

#include "params.h"

namespace fusedres::cuda {

constexpr int kMostStages = 6;  // on one side of `linear`

// The stages on one side of `linear`, in order.
struct Stages {
  Stage stage[kMostStages];
  int count;
};

// A vector of any floating type; data may be null.
struct Vector {
  const void* data;
  DType dtype;
};

// A matrix whose columns are adjacent; data may be null.
struct Matrix {
  void* data;
  int64_t stride;
};

struct Layer {
  DType dtype;  // of the product and every Matrix: float32, float16 or bfloat16. But for
  DType x_dtype, residual_dtype, y_dtype;  // these and their gradients: `dtype` or float32
  int64_t M, N, K;
  int64_t R;                   // features of the residual; beyond them it counts as 0
  Matrix x, weight, residual;  // (M, K), (N, K), (M, R); residual's is x's where it is x
  Vector bias;                 // (N)
  Vector norm_weight, norm_bias, running_mean, running_var, gate;  // (C), the gate (1) or (C)
  const int64_t* seed;                                             // (1), for dropout and drop-path
  int64_t sample_rows;                                             // rows a sample, for drop-path
  Stages prologue, epilogue;
  Norm norm;  // batch: by running_mean and running_var
  Act act;
  bool scalar_gate;
  bool residual_is_x;  // backward: what `add` sends back is part of dx (R = K), not dresidual
  float eps, residual_scale;
  uint64_t dropout, drop_path;  // p * 2^32: an element is kept if its random word is not below
  float dropout_scale, drop_path_scale;  // 1 / (1 - p)
};

// How a launch is cut, and what it needs of memory. Made by the planner (plan.h), on the host.
struct Tile {
  int block_m, block_n;  // rows and columns of a program's tile
  int groups;            // forward, backward: programs that share a row block's tiles
  int parts, sum_parts;  // residual_sums: of the M rows, for dweight and for the sums
  int64_t programs;
  int shared_bytes;
  int64_t partial_floats;  // of the workspace `partial`
  int64_t counters;        // of `arrived`, which are 0 before and after a launch
};

struct ForwardOut {
  Matrix z;        // (M, N) contiguous; data is null where nobody needs it
  Matrix y;        // (M, N) contiguous
  Matrix operand;  // (M, K) contiguous: x in the product's dtype; null where nobody needs it
  float* stats;    // (2, M): mean and rstd of each row of a norm over rows; or null
  float* partial;
  int32_t* arrived;
};

// First launch of backward: dz, dx and dresidual from dy. What is not asked for is null.
struct BackwardOut {
  Matrix dy;           // (M, N), an input
  Matrix z;            // (M, N), an input, as forward saved it
  const float* stats;  // (2, M), an input, as forward saved it
  Matrix dz;           // (M, N): gradient of z, for the second launch
  Matrix dt;         // (M, K): gradient of prologue(x), for the second launch; only with a prologue
  Matrix dx;         // (M, K)
  Matrix dresidual;  // (M, R), where the residual is not x
  float* row_means;  // (2, M), first launch to second: only where `needs_row_means` (plan.h)
  float* partial;
  int32_t* arrived;
};

// Second launch of backward: dweight and the sums over rows, from dz, dt, dy, z and x. Results in
// the dtypes of the parameters they belong to; what is not asked for is null.
struct SumsOut {
  BackwardOut from;
  Matrix operand;  // (M, K), an input, as forward saved it: where `casts_x`, in place of x
  Matrix dweight;  // (N, K)
  void *dbias, *dnorm_weight, *dnorm_bias, *dgate;
  float* partial;
  int32_t* arrived;
};

const char* residual_forward_sm80(const Layer&, const ForwardOut&, const Tile&, void* stream);
const char* residual_backward_sm80(const Layer&, const BackwardOut&, const Tile&, void* stream);
const char* residual_sums_sm80(const Layer&, const SumsOut&, const Tile&, void* stream);
const char* residual_forward_sm90(const Layer&, const ForwardOut&, const Tile&, void* stream);

}  // namespace fusedres::cuda
