// One side of `linear` in one call: its parameters as accumulate values, its batch statistics, its
// row pass. Rows are cut into chunks whose number depends on the shape only, and the chunks' column
// sums are added in order, so results do not depend on the number of threads.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "call.h"
#include "cpu/rows.h"

namespace fusedres {

// ---- rows in chunks

struct Chunks {
  int64_t rows, count, size;
  Chunks(int64_t M, int64_t width) : rows(M) {
    constexpr int64_t kMost = 64;
    constexpr int64_t kElements = 8192;  // in a chunk, so that small calls stay on one thread
    const int64_t least = std::max<int64_t>(1, kElements / std::max<int64_t>(1, width));
    size = std::max(least, (M + kMost - 1) / kMost);
    count = (M + size - 1) / size;
  }
  int64_t begin(int64_t chunk) const { return chunk * size; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * size); }
};

template <class F>
void for_each_chunk(const Chunks& chunks, const F& f) {
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk)
      f(chunk, chunks.begin(chunk), chunks.end(chunk));
  };
  if (chunks.count <= 1) return run(0, chunks.count);
  torch::stable::parallel_for(0, chunks.count, 1, run);
}

// `count` vectors of sums a chunk, added chunk by chunk in order: sums[j * width + n].
template <class A, class F>
std::vector<A> column_sums(const Chunks& chunks, int64_t count, int64_t width, const F& f) {
  const int64_t stride = count * width;
  std::vector<A> partial(std::max<int64_t>(1, chunks.count) * stride);
  for_each_chunk(chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    f(&partial[chunk * stride], begin, end);
  });
  for (int64_t chunk = 1; chunk < chunks.count; ++chunk)
    for (int64_t i = 0; i < stride; ++i) partial[i] += partial[chunk * stride + i];
  partial.resize(stride);
  return partial;
}

// ---- one side of `linear`

template <class A>
struct Side {
  Program<A> program;
  std::vector<A> bias, gamma, beta, gate, mean, rstd, var;

  Side(const Call& c, bool prologue, const Tensor& input) {
    const Recipe& r = c.recipe;
    program.stages = prologue ? &r.prologue : &r.epilogue;
    program.recipe = &r;
    program.M = c.M();
    program.width = prologue ? c.K() : c.N();
    program.input = rows_of(input);
    program.sample_rows = c.sample_rows;
    const auto here = [&](Stage stage) { return r.has(stage) && c.in_prologue(stage) == prologue; };
    if (!prologue && !bias_in_product(dtype_of(c.weight))) program.bias = load(bias, c.bias);
    if (here(Stage::norm)) {
      program.gamma = load(gamma, c.norm_weight);
      program.beta = load(beta, c.norm_bias);
      if (r.norm == Norm::batch && !r.batch_stats) {
        program.mean = load(mean, c.running_mean);
        load(var, c.running_var);
        set_rstd();
      }
    }
    if (here(Stage::gate)) program.gate = load(gate, c.gate);
    if (here(Stage::add)) {
      program.residual_is_input = prologue && !c.residual;
      if (!program.residual_is_input) program.residual = rows_of(c.residual ? *c.residual : c.x);
    }
    if (c.seed)
      program.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(c.seed->data_ptr()));
    batch_norm = here(Stage::norm) && r.norm == Norm::batch && r.batch_stats;
  }

  bool batch_norm;  // this side normalises by this batch's statistics

  void set_statistics(std::vector<A> batch_mean, std::vector<A> batch_var) {
    mean = std::move(batch_mean);
    var = std::move(batch_var);
    program.mean = mean.data();
    set_rstd();
  }

  // Mean and biased variance down the rows, from sums about the first row in double. That row is
  // one of the values, so (mean - shift)^2 <= M var, and the difference below loses at most a
  // factor M of double's precision.
  void compute_statistics() {
    const int64_t C = program.width;
    std::vector<A> shift(C), batch_mean(C), batch_var(C);
    std::vector<double> row(2 * C);
    cpu::column_statistics(program, shift.data(), row.data(), row.data() + C, 0,
                           std::min<int64_t>(1, program.M));
    std::copy(row.begin(), row.begin() + C, shift.begin());
    const auto sums = column_sums<double>(
        Chunks(program.M, C), 2, C, [&](double* partial, int64_t begin, int64_t end) {
          cpu::column_statistics(program, shift.data(), partial, partial + C, begin, end);
        });
    const double rows = static_cast<double>(std::max<int64_t>(1, program.M));
    for (int64_t n = 0; n < C; ++n) {
      const double d = sums[n] / rows;
      batch_mean[n] = static_cast<A>(shift[n] + d);
      const double variance = sums[C + n] / rows - d * d;
      batch_var[n] = static_cast<A>(variance < 0 ? 0.0 : variance);  // NaN stays NaN
    }
    set_statistics(std::move(batch_mean), std::move(batch_var));
  }

  Tensor forward(ScalarType dtype) {
    if (batch_norm) compute_statistics();
    Tensor out = empty({program.M, program.width}, dtype);
    const Rows rows = rows_of(out);
    for_each_chunk(Chunks(program.M, program.width), [&](int64_t, int64_t begin, int64_t end) {
      cpu::forward_rows(program, rows, begin, end);
    });
    return out;
  }

 private:
  static const A* load(std::vector<A>& into, const Optional& t) {
    if (!t) return nullptr;
    into = values<A>(*t);
    return into.data();
  }

  void set_rstd() {
    rstd.resize(var.size());
    for (size_t n = 0; n < var.size(); ++n)
      rstd[n] = 1 / std::sqrt(var[n] + static_cast<A>(program.recipe->eps));
    program.rstd = rstd.data();
  }
};

}  // namespace fusedres
