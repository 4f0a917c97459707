// Rows [begin, end) backward: each row's forward is replayed as far as a stage needs what it saw, then
// walked back; the rows of a block go through the product in between.
//
//   act:  d *= act'(t)       gate: dgate += d t ; d *= gate
//   add:  dresidual = s d    dropout, drop-path: d *= mask
//   norm: dgamma += d c ; dbeta += d ; g = gamma d ; d = rstd (g - mean(g) - c mean(g c))
#pragma once

#include <algorithm>

#include "cpu/forward.h"

namespace fusedres::cpu::FUSEDRES_ISA {

template <class A>
inline void accumulate(A* sums, const A* d, int64_t n) {
  if (sums) add(sums, d, n);
}

// sums += d, or d * t, down the rows of d, `stride` apart, and of t.
template <class A>
inline void add_rows(A* sums, const A* d, int64_t stride, const A* t, int64_t t_stride,
                     int64_t rows, int64_t n) {
  if (!sums) return;
  over_strips<A>(n, [&](int64_t i, auto v, auto strip) {
    using T = decltype(v);
    constexpr int kStrip = strip, kLanes = sizeof(T) / sizeof(A);
    T s[kStrip];
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) s[j] = at<T>(sums, i + j * kLanes);
    for (int64_t row = 0; row < rows; ++row)
#pragma GCC unroll 4
      for (int j = 0; j < kStrip; ++j) {
        const int64_t where = i + j * kLanes;
        const T& of_d = at<T>(d, row * stride + where);
        s[j] += t ? of_d * at<T>(t, row * t_stride + where) : of_d;
      }
#pragma GCC unroll 4
    for (int j = 0; j < kStrip; ++j) at<T>(sums, i + j * kLanes) = s[j];
  });
}

template <class A>
inline void norm_grad(const Walk<A>& w, const Tape<A>& tape, A* d) {
  const Program<A>& p = w.program;
  const int64_t n = p.width;
  if (p.recipe->batch_stats) {  // the sums over all rows are known by now
    const A weight = A(1) / static_cast<A>(p.M);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
      d[i] = p.rstd[i] * (d[i] - weight * (w.dh_sum[i] + tape.c[i] * w.dhc_sum[i]));
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
inline void backward_stage(const Walk<A>& w, Stage stage, int64_t m, const Tape<A>& tape, A* d,
                           A* dx_add) {
  const Program<A>& p = w.program;
  const Recipe& r = *p.recipe;
  const int64_t n = p.width;
  switch (stage) {
    case Stage::norm:
      return norm_grad(w, tape, d);
    case Stage::act:
      return activate_grad(r.act, d, tape.act, n);
    case Stage::gate:
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
      if (p.residual_is_input || w.dresidual.data)
        for (int64_t i = 0; i < n; ++i) dx_add[i] = scale * d[i];
      if (w.dresidual.data) store_row(dx_add, w.dresidual, m, std::min(w.dresidual.features, n));
      return;
    }
    case Stage::linear:
      return;
  }
}

// One side of a pass: what a row's walk needs, and its column sums by blocks of 16 rows, so that
// their rounding errors grow with the number of blocks.
template <class A>
class Side {
 public:
  // Of its width, in scratch: the sums, a batch norm's coefficients, and for each row what `add`
  // sends back and five values.
  static constexpr int64_t kMostRows = 16, kSums = 4, kCoefficients = 4, kOfRow = 6;
  static int64_t elements(int64_t width) {
    return (kSums + kCoefficients + at_once(width) * kOfRow) * width;
  }

  Side(const Walk<A>* given, Arena& arena) {
    if (!given) return;
    walk_ = *given;
    width_ = walk_.program.width;
    at_once_ = at_once(width_);
    memory_ = arena.take<A>(elements(width_));
    int i = 0;
    for (A** sum : {&walk_.dgamma, &walk_.dbeta, &walk_.dgate, &walk_.dbias}) {
      totals_[i] = *sum;
      if (*sum) *sum = memory_ + i * width_;
      ++i;
    }
    std::fill_n(memory_, kSums * width_, A(0));
    replayed_ = replayed(*walk_.program.stages, walk_.last);
    takes_norm_ = walk_.first > 0;
    if (takes_norm_) replayed_ = std::max(replayed_, walk_.first);
    if (walk_.dh_sum && walk_.last == 1) set_coefficients();
  }

  // Rows d, of m, m + 1, ..., become gradients of what stages[first] acted on: stage by stage, as in
  // forward.
  void rows(int64_t m, int64_t count, A* d, int64_t stride) {
    for (int64_t i = 0; i < count; i += at_once_)
      few_rows(m + i, std::min(at_once_, count - i), d + i * stride, stride);
  }

  void flush() {
    if (!memory_) return;
    for (int i = 0; i < kSums; ++i) accumulate(totals_[i], memory_ + i * width_, width_);
    std::fill_n(memory_, kSums * width_, A(0));
    rows_ = 0;
  }

 private:
  void few_rows(int64_t m, int64_t count, A* d, int64_t stride) {
    const Program<A>& p = walk_.program;
    const std::vector<Stage>& stages = *p.stages;
    if (scale_) return batch_norm_rows(m, count, d, stride);
    replay(m, count);
    for (size_t stage = walk_.last; stage > walk_.first; --stage) {
      sum_up(stages[stage - 1], count, d, stride);
      for (int64_t i = 0; i < count; ++i)
        backward_stage(walk_, stages[stage - 1], m + i, tapes_[i], d + i * stride, dx_add(i));
    }
    if (takes_norm_) sum_up(Stage::norm, count, d, stride);
    sum_up(Stage::linear, count, d, stride);
    if (p.residual_is_input && walk_.first == 0)
      for (int64_t i = 0; i < count; ++i) add(d + i * stride, dx_add(i), width_);
    if ((rows_ += count) >= kMostRows) flush();
  }

  // What the parameters of `stage` get from d, the gradient of its result.
  void sum_up(Stage stage, int64_t count, const A* d, int64_t stride) {
    const auto sum = [&](A* sums, const A* t) {
      add_rows(sums, d, stride, t, kOfRow * width_, count, width_);
    };
    if (stage == Stage::norm) sum(walk_.dgamma, tapes_[0].c), sum(walk_.dbeta, nullptr);
    if (stage == Stage::gate) sum(walk_.dgate, tapes_[0].gate);
    if (stage == Stage::linear) sum(walk_.dbias, nullptr);
  }

  // A batch norm alone, whose sums are known: no value of a row needs another.
  //
  //   dz = gamma rstd (dh - mean(dh) - c mean(dh c)) = scale dh - offset - slope (z - center)
  void set_coefficients() {
    const Program<A>& p = walk_.program;
    scale_ = memory_ + kSums * width_;
    A *const offset = scale_ + width_, *const slope = offset + width_,
             *const center = slope + width_;
    const A weight = A(1) / static_cast<A>(p.M);
    for (int64_t i = 0; i < width_; ++i) {
      scale_[i] = p.gamma ? p.gamma[i] * p.rstd[i] : p.rstd[i];
      offset[i] = scale_[i] * weight * walk_.dh_sum[i];
      slope[i] = scale_[i] * weight * walk_.dhc_sum[i] * p.rstd[i];
      center[i] = p.bias ? p.mean[i] - p.bias[i] : p.mean[i];
    }
  }
  void batch_norm_rows(int64_t m, int64_t count, A* d, int64_t stride) {
    const A *const scale = scale_, *const offset = scale + width_, *const slope = offset + width_,
                   *const center = slope + width_;
    for (int64_t row = 0; row < count; ++row)
      with_row<A>(walk_.program.input, m + row, [&, n = width_, t = d + row * stride](auto* z) {
#pragma omp simd
        for (int64_t i = 0; i < n; ++i)
          t[i] = scale[i] * t[i] - offset[i] - slope[i] * (to_float(z[i]) - center[i]);
      });
    sum_up(Stage::linear, count, d, stride);
    if ((rows_ += count) >= kMostRows) flush();
  }

  // How many stages must be replayed: up to the last one whose backward needs what it saw.
  static size_t replayed(const std::vector<Stage>& stages, size_t count) {
    while (count > 0 && !needs_input(stages[count - 1])) --count;
    return count;
  }

  static int64_t at_once(int64_t width) {
    int64_t rows = kMostRows;
    while (rows > 1 && rows > rows_in_L1<A>(kOfRow * width)) rows /= 2;
    return rows;
  }

  A* dx_add(int64_t row) { return memory_ + (kSums + kCoefficients + row * kOfRow) * width_; }
  A* value(int64_t row, int i) { return dx_add(row) + (1 + i) * width_; }  // of the forward

  // Fills the tapes, which keep up to three values of a row. The last stage's own result is not
  // needed, only what it saw.
  void replay(int64_t m, int64_t count) {
    if (replayed_ == 0) return;
    const Program<A>& p = walk_.program;
    int used[kMostRows] = {};
    A* t[kMostRows];
    for (int64_t i = 0; i < count; ++i) {
      t[i] = value(i, 0);
      load_row(p.input, m + i, t[i], width_);
      if (p.bias) add(t[i], p.bias, width_);
    }
    for (size_t stage = 0; stage + 1 < replayed_; ++stage)
      for (int64_t i = 0; i < count; ++i) {
        A* const next = value(i, used[i] + 1);
        A* const out = forward_stage<A, true>(p, (*p.stages)[stage], m + i, t[i], next, &tapes_[i]);
        used[i] += out != t[i];
        t[i] = out;
      }
    const Stage last = (*p.stages)[replayed_ - 1];
    for (int64_t i = 0; i < count; ++i) {
      if (last == Stage::act)
        tapes_[i].act = t[i];
      else if (last == Stage::gate)
        tapes_[i].gate = t[i];
      else
        tapes_[i].rstd = norm_forward<A, true>(p, t[i], nullptr), tapes_[i].c = t[i];
    }
  }

  Walk<A> walk_;
  A* totals_[kSums] = {};  // where the caller wants the sums: dgamma, dbeta, dgate, dbias
  int64_t width_ = 0, rows_ = 0, at_once_ = 1;
  A *memory_ = nullptr, *scale_ = nullptr;
  size_t replayed_ = 0;
  bool takes_norm_ = false;
  Tape<A> tapes_[kMostRows];
};

template <class A, class Unit>
void backward(const Backward<A>& b, int64_t begin, int64_t end) {
  const bool multiplies = b.weight.data != nullptr;
  const int64_t N = b.dy.features, K = multiplies ? b.weight.width : N;
  const int64_t inner = units<Unit>(N), wide = round_up(K, Vector<A>::kLanes);
  const int64_t step = round_up(std::max<int64_t>(1, N), Vector<A>::kLanes);
  const int64_t rows = block_rows<Unit>(N, wide);
  Arena arena(
      (rows * step + rows * inner + rows * wide + Side<A>::elements(N) + Side<A>::elements(K)) *
      sizeof(A));
  Side<A> after(b.after, arena), before(b.before, arena);
  A* const scratch = arena.take<A>(rows * step);
  Unit* const left = arena.take<Unit>(rows * inner);
  A* const of_product = multiplies ? arena.take<A>(rows * wide) : scratch;
  // dz and dx are made where they are stored, if they can be and nothing is read there.
  const bool dx_there = multiplies && can_hold<A>(b.dx, K) && b.dx.data != b.dy.data;
  const bool dz_there = multiplies && can_hold<A>(b.dz, N) && b.product == b.dz.dtype &&
                        b.dz.data != b.dy.data &&
                        !(b.after && b.dz.data == b.after->program.input.data);
  const Block<A> dz_block = dz_there ? Block<A>(b.dz) : Block<A>(scratch, step);
  const Block<A> dx_block = dx_there     ? Block<A>(b.dx)
                            : multiplies ? Block<A>(of_product, wide)
                                         : Block<A>(scratch, step);
  const int64_t t_step = dz_block.stride, d_step = dx_block.stride;

  for (int64_t first = begin; first < end; first += rows) {
    const int64_t count = std::min(rows, end - first);
    A *const t = dz_block.at(first), *const product = dx_block.at(first);
    // dy -> back through the stages after -> dz
    for (int64_t i = 0; i < count; ++i) load_row(b.dy, first + i, t + i * t_step, N);
    if (b.after) after.rows(first, count, t, t_step);
    for (int64_t i = 0; i < count; ++i) {
      A* const d = t + i * t_step;
      if (b.dz.data && !dz_there) store_row(d, b.dz, first + i, N);
      if (!multiplies) continue;
      if (std::is_same_v<Unit, A>)
        round_row(d, b.product, N);
      else
        to_units(d, N, left + i * inner);
    }
    // @ weight
    if (multiplies) {
      const Unit* a = left;
      int64_t stride = inner;
      if constexpr (std::is_same_v<Unit, A>) a = t, stride = t_step;
      multiply(row_major(a, stride), count, static_cast<const Unit*>(b.weight.data), inner, K,
               product, d_step, false);
    }
    // back through the stages before -> + skip -> dx
    if (b.before) before.rows(first, count, product, d_step);
    for (int64_t i = 0; i < count && b.dx.data; ++i) {
      A* const d = product + i * d_step;
      if (b.skip.data) add_scaled(b.skip, first + i, static_cast<A>(b.skip_scale), d, K);
      if (!dx_there) store_row(d, b.dx, first + i, K);
    }
  }
  after.flush();
  before.flush();
}

// dz.T @ x by blocks of rows that stay in the cache: c += (tiles of dz's columns) @ (panels of x).
template <class A, class Unit>
void weight_gradient(const WeightGradient<A>& g, int64_t first, int64_t last, int64_t begin,
                     int64_t end) {
  const int64_t K = g.x.features;
  // Whole sums of the product, so that it is the same whether x is packed at once or block by block.
  const int64_t sums = (std::is_same_v<Unit, Pair> ? 2 : 1) * kInner;
  const int64_t block = g.right.data ? round_up(last - first, 2 * kAmx)
                        : K > 256    ? sums
                                     : 2 * kInner;
  const int64_t wide = round_up(K, Vector<A>::kLanes), width = end - begin;
  const int64_t left_rows = round_up(width + kTileRows, kAmx);  // in tiles of either size
  Arena arena((block * ((g.right.data ? 0 : wide) + left_rows) + width * wide) * sizeof(A));
  Unit* const packed = g.right.data ? nullptr : arena.take<Unit>(block * wide);
  Unit* const left = arena.take<Unit>(block * left_rows);
  A* const c = g.dweight.data ? arena.take<A>(width * wide) : g.part + begin * g.part_stride;
  const int64_t stride = g.dweight.data ? wide : g.part_stride;
  for (int64_t m = first; m < last || m == first; m += block) {
    const int64_t rows = std::min(block, last - m);
    if (packed)
      pack_rows(g.x, m, rows, K, packed, 0, (K + Vector<A>::kPanel - 1) / Vector<A>::kPanel);
    const Unit* const right = packed ? packed : static_cast<const Unit*>(g.right.data);
    const Left<Unit> a = pack_left(g.dz, m, rows, begin, end, left);
    multiply(a, width, right, units<Unit>(rows), K, c, stride, m > first);
  }
  if (g.dweight.data)
    for (int64_t n = begin; n < end; ++n) store_row(c + (n - begin) * stride, g.dweight, n, K);
}

template <class A>
void add_parts(const WeightGradient<A>& g, int64_t count, int64_t begin, int64_t end) {
  const int64_t K = g.dweight.features, N = g.dz.features;
  A* const t = Arena(K * sizeof(A)).template take<A>(K);
  for (int64_t n = begin; n < end; ++n) {
    std::copy_n(g.part + n * g.part_stride, K, t);
    for (int64_t part = 1; part < count; ++part) add(t, g.part + (part * N + n) * g.part_stride, K);
    store_row(t, g.dweight, n, K);
  }
}

}  // namespace fusedres::cpu::FUSEDRES_ISA
