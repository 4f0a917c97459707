// What the ops ask of the CPU kernels. choose.cpp finds those for this CPU's instruction set.
//
// A pass takes rows [begin, end) block by block: a block is read, goes through the stages before
// `linear`, the product and the stages after it while it lies in L2, and is written. Passes know no
// threads, and allocate nothing but their thread's scratch.
#pragma once

#include "params.h"

// Whether there are kernels for AVX2 and AVX-512 beside those for every CPU.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(FUSEDRES_BASELINE_ONLY)
#define FUSEDRES_X86_SETS
#endif

namespace fusedres::cpu {

// Mean, and sum of squared distances from it, of `seen` values and `more` others: Chan et al. (1983).
FUSEDRES_INLINE void merge_moments(double& mean, double& squares, double seen, double other_mean,
                                   double other_squares, double more) {
  const double d = other_mean - mean, all = seen + more;
  mean += d * (more / all);
  squares += other_squares + d * d * (seen * more / all);
}

// The right side of a product, (inner, width), in panels: see cpu/product.h.
struct Packed {
  void* data = nullptr;  // null: there is no product in this pass
  int64_t inner = 0, width = 0;
  DType dtype = DType::float32;  // the product's
};

// The stages on one side of `linear`. `A`: float; double for fp64.
template <class A>
struct Program {
  const std::vector<Stage>* stages = nullptr;
  const Recipe* recipe = nullptr;
  int64_t M = 0, width = 0;
  Rows input;                      // x before linear, x @ weight.T after it
  const A* bias = nullptr;         // (width) or null: added to the input first
  Rows residual;                   // what `add` adds; features beyond its own count as 0
  bool residual_is_input = false;  // `add` adds this program's own input (an `add` before linear)
  const A* gamma = nullptr;        // (width) or null: 1
  const A* beta = nullptr;         // (width) or null: 0
  const A* gate = nullptr;         // (1) or (width)
  const A* mean = nullptr;         // (width), batch norm
  const A* rstd = nullptr;         // (width), batch norm
  uint64_t seed = 0;
  int64_t sample_rows = 1;
};

// x -> stages before -> operand -> @ weight.T -> z -> stages after -> y, or a part of it: sides and
// product that are null are left out, and what has no data is not stored.
template <class A>
struct Forward {
  const Program<A>*before = nullptr, *after = nullptr;
  Packed weight;
  const A* early_bias = nullptr;  // the product's own: see bias_in_product
  DType product = DType::float32;
  Rows x, operand, z, y;
};

// Backward through stages [first, last) of one side. Its sums go down the rows of the pass.
template <class A>
struct Walk {
  Program<A> program;  // input: what the stages are replayed from
  size_t first = 0, last = 0;
  Rows dresidual;  // written where data is not null
  A *dgamma = nullptr, *dbeta = nullptr, *dgate = nullptr, *dbias = nullptr;  // (width) or null
  // Batch statistics. Either the sums over all rows of dh, the gradient of the norm's result, and
  // of dh * c are known, or dbeta and dgamma take them: then stages[first - 1] is the norm.
  const A *dh_sum = nullptr, *dhc_sum = nullptr;
};

// dy -> back through `after` -> dz -> @ weight -> back through `before` -> + skip -> dx, or a part.
template <class A>
struct Backward {
  const Walk<A>*after = nullptr, *before = nullptr;
  Packed weight;
  DType product = DType::float32;
  Rows dy, dz;
  Rows skip;  // (M, skip.features), added to dx times skip_scale
  double skip_scale = 1;
  Rows dx;
};

// Columns [begin, end) of dz.T @ x, over rows [first, last).
template <class A>
struct WeightGradient {
  Rows dz, x;
  DType product = DType::float32;
  Packed right;       // x, where it is packed for all columns together
  Rows dweight;       // (N, K), written where data is not null, else
  A* part = nullptr;  // (N, part_stride)
  int64_t part_stride = 0;
};

// h = act(a) * b, row by row; where dh has data: da = dh * b * act'(a), db = dh * act(a) instead.
struct Glu {
  Act act = Act::none;
  Rows a, b, h;
  Rows dh, da, db;
};

template <class A>
struct Kernels {
  // For `statistics`, (2, width) of double: mean, and sum of squared distances from it, of what
  // reaches the norm; then nothing after it is done.
  void (*forward)(const Forward<A>&, int64_t begin, int64_t end, double* statistics);
  void (*backward)(const Backward<A>&, int64_t begin, int64_t end);
  void (*weight_gradient)(const WeightGradient<A>&, int64_t first, int64_t last, int64_t begin,
                          int64_t end);
  // dweight[n] = the sum of `count` parts' rows n, for n in [begin, end).
  void (*add_parts)(const WeightGradient<A>&, int64_t count, int64_t begin, int64_t end);
  void (*glu)(const Glu&, int64_t begin, int64_t end);
  // b = matrix.T if `transposed`, else matrix, panels [begin, end).
  void (*pack)(const Rows& matrix, bool transposed, const Packed& b, int64_t begin, int64_t end);
  int64_t (*packed_bytes)(const Packed&);
  int64_t (*tile_rows)(DType product);
  int64_t panel;  // columns
  int64_t lanes;  // a part's stride is a multiple of it
};

// Those of this CPU, or of what FUSEDRES_CPU names. std::invalid_argument: no such set here.
template <class A>
const Kernels<A>& kernels();

// Its instruction set: "amx-bf16", "avx512-bf16", "avx512", "avx2" or "baseline".
const char* instruction_set();

// Whether products of bf16 are made of pairs, and those in tiles of AMX.
bool multiplies_pairs();
bool multiplies_tiles();

// This thread's scratch, aligned to 64 bytes, which the next call takes back.
void* scratch(size_t bytes);

// Whether a layer's product, or both of its products backward, are our own kernels', block by block;
// else they are the library's, on the whole matrix. Of 16-bit types in fp32 or not; and which
// library's, in fp32.
bool own_product(int64_t M, int64_t N, int64_t K, DType dtype, bool backward);
bool multiply_in_float32(DType dtype, int64_t M);
bool prefer_onednn(int64_t M, int64_t N, int64_t K);

}  // namespace fusedres::cpu
