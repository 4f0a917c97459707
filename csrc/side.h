// What ops.cpp and chain.cpp make passes of: a layer as plain pointers, one side of its `linear` with
// parameters as accumulate values, rows cut into chunks, packed weights. The number of chunks depends
// on the shape only, and the chunks' column sums are added in order, so results do not depend on the
// number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "cpu/kernels.h"

namespace fusedres {

// ---- a layer

// What is computed with: a Call's operands, or a link's of a chain.
struct Layer {
  const Recipe& recipe;
  int64_t M, N, K;
  DType product, y;  // dtypes
  bool casts;        // x for the product, by itself
  Rows x, weight;
  Rows residual;  // without data: x
  Vector bias, norm_weight, norm_bias, gate, running_mean, running_var;
  uint64_t seed = 0;
  int64_t sample_rows = 1;

  explicit Layer(const Call& c)
      : recipe(c.recipe),
        M(c.M()),
        N(c.N()),
        K(c.K()),
        product(dtype_of(c.weight)),
        y(c.recipe.y_dtype.value_or(product)),
        casts(c.casts()),
        x(rows_of(c.x)),
        weight(rows_of(c.weight)),
        bias(vector_of(c.bias)),
        norm_weight(vector_of(c.norm_weight)),
        norm_bias(vector_of(c.norm_bias)),
        gate(vector_of(c.gate)),
        running_mean(vector_of(c.running_mean)),
        running_var(vector_of(c.running_var)),
        sample_rows(c.sample_rows) {
    if (c.residual) residual = rows_of(*c.residual);
    if (c.seed) seed = static_cast<uint64_t>(*static_cast<const int64_t*>(c.seed->data_ptr()));
  }

  bool in_prologue(Stage stage) const {
    const std::vector<Stage>& stages = recipe.prologue;
    return std::find(stages.begin(), stages.end(), stage) != stages.end();
  }
};

// ---- rows in chunks

// Chunks are whole tiles of the product but for the last rows, and differ by a tile at most.
struct Chunks {
  int64_t rows, count, tile;

  // For a pass over rows of `width` elements, with a product of `inner` by `width` or without.
  Chunks(int64_t M, int64_t width, int64_t inner, int64_t tile_rows = 1)
      : rows(M), tile(tile_rows) {
    constexpr int64_t kMost = 64, kLeast = 32;
    constexpr int64_t kElements = 8192;  // in a chunk, so that small calls stay on one thread
    constexpr int64_t kProducts = 16;    // multiply-adds that cost as much as an element
    const int64_t cost = std::max<int64_t>(1, width * (1 + inner / kProducts));
    const int64_t least = std::max(inner ? kLeast : 1, kElements / cost);
    count = 1;
    while (count < kMost && count * 2 * least <= M) count *= 2;
    if (M == 0) count = 0;
  }
  int64_t begin(int64_t chunk) const {
    const int64_t tiles = (rows + tile - 1) / tile;
    return std::min(rows, chunk * tiles / count * tile);
  }
  int64_t end(int64_t chunk) const { return begin(chunk + 1); }
};

// f(i) for i in [0, count), on all threads.
template <class F>
void in_parallel(int64_t count, const F& f) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) f(i);
  };
  if (count <= 1) return run(0, count);
  torch::stable::parallel_for(0, count, 1, run);
}

// f(begin, end) for parts of [0, count), each element of which is about `cost` multiply-adds or copied
// elements: few of them are worth no other thread.
template <class F>
void in_shares(int64_t count, int64_t cost, const F& f) {
  constexpr int64_t kAtOnce = 1 << 15;
  const int64_t share = std::max<int64_t>(1, kAtOnce / std::max<int64_t>(1, cost));
  in_parallel((count + share - 1) / share,
              [&](int64_t i) { f(i * share, std::min(count, (i + 1) * share)); });
}

template <class F>
void for_each_chunk(const Chunks& chunks, const F& f) {
  in_parallel(chunks.count, [&](int64_t i) { f(i, chunks.begin(i), chunks.end(i)); });
}

// Those of a pass with the product `b` or, where it has no data, without.
template <class A>
Chunks chunks_of(int64_t M, int64_t width, const cpu::Packed& b) {
  if (!b.data) return Chunks(M, width, 0);
  return Chunks(M, width, b.inner, cpu::kernels<A>().tile_rows(b.dtype));
}

// ---- packed matrices

// A matrix of `rows` rows, or its transpose, as the right side of a product.
template <class A>
struct PackedMatrix {
  cpu::Packed packed;
  PackedMatrix(const Rows& matrix, int64_t rows, bool transposed) {
    const cpu::Kernels<A>& kernels = cpu::kernels<A>();
    const int64_t N = rows, K = matrix.features;
    packed = {nullptr, transposed ? K : N, transposed ? N : K, matrix.dtype};
    memory_.emplace(empty({kernels.packed_bytes(packed)}, ScalarType::Byte));
    packed.data = memory_->data_ptr();
    const int64_t panels = (packed.width + kernels.panel - 1) / kernels.panel;
    in_shares(panels, packed.inner * kernels.panel, [&](int64_t begin, int64_t end) {
      kernels.pack(matrix, transposed, packed, begin, end);
    });
  }

 private:
  Optional memory_;
};

// ---- one side of `linear`

template <class A>
struct Side {
  cpu::Program<A> program;
  std::vector<A> bias, gamma, beta, gate, mean, rstd, var;
  bool batch_norm;  // this side normalises by this batch's statistics

  Side(const Layer& c, bool prologue, const Rows& input) {
    const Recipe& r = c.recipe;
    const int64_t C = prologue ? c.K : c.N;
    program.stages = prologue ? &r.prologue : &r.epilogue;
    program.recipe = &r;
    program.M = c.M;
    program.width = C;
    program.input = input;
    program.sample_rows = c.sample_rows;
    program.seed = c.seed;
    const auto here = [&](Stage stage) { return r.has(stage) && c.in_prologue(stage) == prologue; };
    if (!prologue && !bias_in_product(c.product)) program.bias = values(c.bias, C, bias);
    if (here(Stage::norm)) {
      program.gamma = values(c.norm_weight, C, gamma);
      program.beta = values(c.norm_bias, C, beta);
      if (r.norm == Norm::batch && !r.batch_stats) {
        program.mean = values(c.running_mean, C, mean);
        var = values<A>(c.running_var, C);
        set_rstd();
      }
    }
    if (here(Stage::gate)) program.gate = values(c.gate, r.scalar_gate ? 1 : C, gate);
    if (here(Stage::add)) {
      program.residual_is_input = prologue && !c.residual.data;
      if (!program.residual_is_input) program.residual = c.residual.data ? c.residual : c.x;
    }
    batch_norm = here(Stage::norm) && r.norm == Norm::batch && r.batch_stats;
  }
  Side(const Side&) = delete;

  size_t norm() const {
    return std::find(program.stages->begin(), program.stages->end(), Stage::norm) -
           program.stages->begin();
  }

  void set_statistics(std::vector<A> batch_mean, std::vector<A> batch_var) {
    mean = std::move(batch_mean);
    var = std::move(batch_var);
    program.mean = mean.data();
    set_rstd();
  }

 private:
  void set_rstd() {
    rstd.resize(var.size());
    for (size_t n = 0; n < var.size(); ++n)
      rstd[n] = 1 / std::sqrt(var[n] + static_cast<A>(program.recipe->eps));
    program.rstd = rstd.data();
  }
};

// ---- passes

template <class A>
void run(const cpu::Forward<A>& pass, int64_t M) {
  const int64_t width = pass.weight.data ? pass.weight.width : pass.x.features;
  for_each_chunk(chunks_of<A>(M, width, pass.weight), [&](int64_t, int64_t begin, int64_t end) {
    cpu::kernels<A>().forward(pass, begin, end, nullptr);
  });
}

// Mean and biased variance down the rows, from those of chunks.
template <class A>
class Moments {
 public:
  Moments(const Chunks& chunks, int64_t width)
      : chunks_(chunks), C_(width), found_(2 * width * std::max<int64_t>(1, chunks.count)) {}

  double* of(int64_t chunk) { return &found_[2 * C_ * chunk]; }

  // Once all are there, which `side` then knows.
  void finish(Side<A>& side) {
    for (int64_t chunk = 1; chunk < chunks_.count; ++chunk) {
      const double seen = chunks_.begin(chunk), more = chunks_.end(chunk) - seen;
      for (int64_t n = 0; n < C_; ++n) {
        const double* const next = of(chunk) + n;
        cpu::merge_moments(found_[n], found_[C_ + n], seen, next[0], next[C_], more);
      }
    }
    std::vector<A> mean(C_), var(C_);
    for (int64_t n = 0; n < C_; ++n) {
      mean[n] = static_cast<A>(found_[n]);
      var[n] = static_cast<A>(found_[C_ + n] / std::max<double>(1, chunks_.rows));
    }
    side.set_statistics(std::move(mean), std::move(var));
  }

 private:
  const Chunks chunks_;
  const int64_t C_;
  std::vector<double> found_;
};

// The same up to the norm of `side`.
template <class A>
void run(const cpu::Forward<A>& pass, int64_t M, Side<A>& side) {
  const int64_t C = side.program.width;
  const Chunks chunks = chunks_of<A>(M, C, pass.weight);
  Moments<A> moments(chunks, C);
  for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    cpu::kernels<A>().forward(pass, begin, end, moments.of(chunk));
  });
  moments.finish(side);
}

// A backward pass and its walks. A walk's sum that is wanted points anywhere before `run`, and to
// the sum over all rows after it.
template <class A>
struct BackwardPass {
  cpu::Backward<A> pass;
  std::optional<cpu::Walk<A>> after, before;

  static inline A wanted;

  void run(int64_t M) {
    const int64_t width = std::max(pass.dy.features, pass.weight.width);
    const Chunks chunks = chunks_of<A>(M, width, pass.weight);
    prepare(chunks.count);
    for_each_chunk(
        chunks, [&](int64_t chunk, int64_t begin, int64_t end) { run_chunk(chunk, begin, end); });
    finish(chunks.count);
  }

  // The same in steps, for passes that share a region.
  void prepare(int64_t chunks) {
    stride_ = point(after, before, nullptr);
    sums_.resize(stride_ * std::max<int64_t>(1, chunks));
    pass.after = after ? &*after : nullptr;
    pass.before = before ? &*before : nullptr;
  }
  void run_chunk(int64_t chunk, int64_t begin, int64_t end) {
    cpu::Backward<A> mine = pass;
    auto my_after = after, my_before = before;
    point(my_after, my_before, sums_.data() + stride_ * chunk);
    mine.after = after ? &*my_after : nullptr;
    mine.before = before ? &*my_before : nullptr;
    cpu::kernels<A>().backward(mine, begin, end);
  }
  void finish(int64_t chunks) {
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < stride_; ++i) sums_[i] += sums_[chunk * stride_ + i];
    point(after, before, sums_.data());
  }

 private:
  // Lets the wanted sums point into `at`, one after the other; returns how long they are.
  static int64_t point(std::optional<cpu::Walk<A>>& after, std::optional<cpu::Walk<A>>& before,
                       A* at) {
    int64_t used = 0;
    for (auto* walk : {&after, &before}) {
      if (!*walk) continue;
      for (A** sum : {&(*walk)->dgamma, &(*walk)->dbeta, &(*walk)->dgate, &(*walk)->dbias}) {
        if (!*sum) continue;
        if (at) *sum = at + used;
        used += (*walk)->program.width;
      }
    }
    return used;
  }

  std::vector<A> sums_;
  int64_t stride_ = 0;
};

// dweight = dz.T @ x, (N, K). Where there are many rows by parts of them, in powers of two; and by
// strips of dz's columns, on whose number no result depends: many strips share a packed x.
template <class A>
void weight_gradient(const Rows& dz, const Rows& x, int64_t M, const Rows& dweight) {
  constexpr int64_t kParts = 16, kColumns = 48, kRows = 256, kShared = 1024;
  const cpu::Kernels<A>& kernels = cpu::kernels<A>();
  const int64_t N = dz.features, K = x.features, threads = torch::stable::get_num_threads();
  int64_t parts = 1, strips = 1;
  while (parts < kParts && 2 * parts * std::max(kRows, 2 * K) <= M) parts *= 2;
  while (strips * parts < threads && 2 * strips * kColumns <= N) strips *= 2;
  cpu::WeightGradient<A> g;
  g.dz = dz;
  g.x = x;
  g.product = dz.dtype;
  std::optional<PackedMatrix<A>> right;
  if (parts == 1 && strips > 2 && M > 0 && M <= kShared)
    g.right = right.emplace(x, M, false).packed;
  Optional memory;
  if (parts == 1) {
    g.dweight = dweight;
  } else {
    g.part_stride = (K + kernels.lanes - 1) / kernels.lanes * kernels.lanes;
    memory = empty({parts * N * g.part_stride},
                   std::is_same_v<A, double> ? ScalarType::Double : ScalarType::Float);
    g.part = static_cast<A*>(memory->data_ptr());
  }
  const int64_t tile = kernels.tile_rows(g.product), tiles = (N + tile - 1) / tile;
  const int64_t columns = (tiles + strips - 1) / strips * tile, rows = (M / parts + 1) / 2 * 2;
  in_parallel(strips * parts, [&](int64_t task) {
    const int64_t part = task / strips, begin = std::min(N, task % strips * columns);
    cpu::WeightGradient<A> mine = g;
    if (g.part) mine.part += part * N * g.part_stride;
    kernels.weight_gradient(mine, part * rows, part + 1 < parts ? (part + 1) * rows : M, begin,
                            std::min(N, begin + columns));
  });
  if (parts > 1) {
    g.dweight = dweight;
    const Chunks chunks(N, parts * K, 0);
    for_each_chunk(chunks, [&](int64_t, int64_t begin, int64_t end) {
      kernels.add_parts(g, parts, begin, end);
    });
  }
}

}  // namespace fusedres
