// Row by row: replay the forward as far as a stage needs what it saw, then walk back.
//
//   act:  d *= act'(t)       gate: dgate += d t ; d *= gate
//   add:  dresidual = s d    dropout, drop-path: d *= mask
//   norm: dgamma += d c ; dbeta += d ; g = gamma d ; d = rstd (g - mean(g) - c mean(g c))
#include <array>
#include <vector>

#include "cpu/rows.h"
#include "cpu/stages.h"

namespace fusedres::cpu {
namespace {

template <class A>
inline void accumulate(A* sums, const A* d, int64_t n) {
  if (sums)
    for (int64_t i = 0; i < n; ++i) sums[i] += d[i];
}

template <class A>
inline void accumulate_product(A* sums, const A* d, const A* t, int64_t n) {
  if (sums)
    for (int64_t i = 0; i < n; ++i) sums[i] += d[i] * t[i];
}

template <class A>
inline void norm_grad(const Backward<A>& b, const Tape<A>& tape, A* d) {
  const Program<A>& p = b.program;
  const int64_t n = p.width;
  accumulate_product(b.dgamma, d, tape.c, n);
  accumulate(b.dbeta, d, n);
  if (p.recipe->batch_stats) {  // the sums over all rows are known by now
    const A weight = A(1) / static_cast<A>(p.M);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      d[i] = p.rstd[i] * (d[i] - weight * (b.dh_sum[i] + tape.c[i] * b.dhc_sum[i]));
  }
  if (p.gamma) scale_shift<A>(d, p.gamma, nullptr, d, n);
  if (p.recipe->norm != Norm::batch)
    normalize_grad(d, tape.c, tape.rstd, n, p.recipe->norm == Norm::layer);
  else if (!p.recipe->batch_stats)
    scale_shift<A>(d, p.rstd, nullptr, d, n);
}

// d becomes the gradient of what `stage` acted on. `dx_add` collects what `add` sends to the
// program's own input.
template <class A>
inline void backward_stage(const Backward<A>& b, Stage stage, int64_t m, const Tape<A>& tape, A* d,
                           A* dx_add) {
  const Program<A>& p = b.program;
  const Recipe& r = *p.recipe;
  const int64_t n = p.width;
  switch (stage) {
    case Stage::norm:
      return norm_grad(b, tape, d);
    case Stage::act:
      return activate_grad(r.act, d, tape.act, n);
    case Stage::gate:
      accumulate_product(b.dgate, d, tape.gate, n);
      if (r.scalar_gate)
        for (int64_t i = 0; i < n; ++i) d[i] *= p.gate[0];
      else
        scale_shift<A>(d, p.gate, nullptr, d, n);
      return;
    case Stage::dropout:
      return drop_elements(d, n, p.seed, static_cast<uint64_t>(m) * n, r.dropout);
    case Stage::droppath:
      return drop_sample(d, n, p.seed, m / p.sample_rows, r.drop_path);
    case Stage::add: {
      const A scale = static_cast<A>(r.residual_scale);
      if (p.residual_is_input)
        for (int64_t i = 0; i < n; ++i) dx_add[i] = scale * d[i];
      if (b.dresidual.data) {
        for (int64_t i = 0; i < n; ++i) dx_add[i] = scale * d[i];
        store_row(dx_add, b.dresidual, m, std::min(b.dresidual.features, n));
      }
      return;
    }
    case Stage::linear:
      return;
  }
}

// How many stages must be replayed: up to the last one whose backward needs what it saw.
inline size_t replayed(const std::vector<Stage>& stages) {
  size_t count = stages.size();
  while (count > 0 && !needs_input(stages[count - 1])) --count;
  return count;
}

// Rows of a program's width: the forward's values (a tape keeps up to three of them), d, and what
// `add` sends back.
template <class A>
struct Buffers {
  std::vector<A> memory;
  int64_t width;
  A *d, *dx_add;
  Tape<A> tape;
  explicit Buffers(int64_t n) : memory(6 * n), width(n), d(memory.data()), dx_add(d + n) {}
  A* value(int i) { return dx_add + (i + 1) * width; }
};

// Fills the tape. The last stage's own result is not needed, only what it saw.
template <class A>
inline void replay_row(const Program<A>& p, int64_t m, size_t count, Buffers<A>& buffers) {
  if (count == 0) return;
  int used = 0;
  A* t = buffers.value(used);
  load_input(p, m, t);
  for (size_t i = 0; i + 1 < count; ++i) {
    A* out =
        forward_stage<A, true>(p, (*p.stages)[i], m, t, buffers.value(used + 1), &buffers.tape);
    used += out != t;
    t = out;
  }
  const Stage last = (*p.stages)[count - 1];
  if (last == Stage::act)
    buffers.tape.act = t;
  else if (last == Stage::gate)
    buffers.tape.gate = t;
  else
    forward_stage<A, true>(p, last, m, t, buffers.value(used + 1), &buffers.tape);
}

// Leaves in d the gradient of the value that stages[first] acted on.
template <class A>
inline void backward_row(const Backward<A>& b, int64_t m, size_t replay, size_t first,
                         Buffers<A>& buffers) {
  const std::vector<Stage>& stages = *b.program.stages;
  replay_row(b.program, m, replay, buffers);
  load_row(b.dy, m, buffers.d, b.program.width);
  for (size_t i = stages.size(); i > first; --i)
    backward_stage(b, stages[i - 1], m, buffers.tape, buffers.d, buffers.dx_add);
}

// Column sums by blocks of 16 rows, so that their rounding errors grow with the number of blocks.
constexpr int64_t kBlockRows = 16;

template <class A>
struct BlockSums {
  A* total[4];            // where the caller wants them; null: not wanted
  std::vector<A> memory;  // one block's
  A* block[4];
  int64_t width, rows = 0;

  BlockSums(std::array<A*, 4> wanted, int64_t n) : memory(4 * n), width(n) {
    for (int i = 0; i < 4; ++i) {
      total[i] = wanted[i];
      block[i] = wanted[i] ? memory.data() + i * n : nullptr;
    }
  }
  void flush() {
    for (int i = 0; i < 4; ++i) accumulate(total[i], block[i], width);
    std::fill(memory.begin(), memory.end(), A(0));
    rows = 0;
  }
  void row_done() {
    if (++rows == kBlockRows) flush();
  }
};

// Walks each row back to stages[first]. first = 0: the whole way, to dinput and the sums that
// `given` asks for. Else stages[first - 1] is the norm, and only its gradient's sums are wanted.
template <class A>
FUSEDRES_SIMD_CLONES void run(const Backward<A>& given, size_t first, BlockSums<A>& sums,
                              int64_t begin, int64_t end, Buffers<A>& buffers) {
  Backward<A> b = given;
  const Program<A>& p = b.program;
  const size_t replay = replayed(*p.stages);
  A* d = buffers.d;
  b.dgamma = b.dbeta = b.dgate = b.dbias = nullptr;
  if (first == 0)
    b.dgamma = sums.block[0], b.dbeta = sums.block[1], b.dgate = sums.block[2],
    b.dbias = sums.block[3];
  for (int64_t m = begin; m < end; ++m) {
    backward_row(b, m, replay, first, buffers);
    if (first > 0) {
      accumulate_product(sums.block[0], d, buffers.tape.c, p.width);
      accumulate(sums.block[1], d, p.width);
    }
    accumulate(b.dbias, d, p.width);
    sums.row_done();
    if (first > 0 || !b.dinput.data) continue;
    if (p.residual_is_input) accumulate(d, buffers.dx_add, p.width);
    if (b.skip.data) add_scaled(b.skip, m, static_cast<A>(b.skip_scale), d, p.width);
    store_row(d, b.dinput, m, p.width);
  }
  sums.flush();
}

}  // namespace

template <class A>
void backward_rows(const Backward<A>& b, int64_t begin, int64_t end) {
  Buffers<A> buffers(b.program.width);
  BlockSums<A> sums({b.dgamma, b.dbeta, b.dgate, b.dbias}, b.program.width);
  run(b, 0, sums, begin, end, buffers);
}

template <class A>
void norm_gradient_sums(const Backward<A>& b, A* dh_sum, A* dhc_sum, int64_t begin, int64_t end) {
  const std::vector<Stage>& stages = *b.program.stages;
  const size_t norm = std::find(stages.begin(), stages.end(), Stage::norm) - stages.begin();
  Buffers<A> buffers(b.program.width);
  BlockSums<A> sums({dhc_sum, dh_sum, nullptr, nullptr}, b.program.width);
  run(b, norm + 1, sums, begin, end, buffers);
}

template void backward_rows<float>(const Backward<float>&, int64_t, int64_t);
template void backward_rows<double>(const Backward<double>&, int64_t, int64_t);
template void norm_gradient_sums<float>(const Backward<float>&, float*, float*, int64_t, int64_t);
template void norm_gradient_sums<double>(const Backward<double>&, double*, double*, int64_t,
                                         int64_t);

}  // namespace fusedres::cpu
