"""`make mutate`: breaks the kernels on purpose, one bug at a time, and counts the catches.

No GPU; the goal is 90 %. A bug is caught if a test fails; a break that does not compile, crashes or
hangs is an error of this table, not a catch. The broken kernels live in temporary copies of the
tree, compiled once, for this CPU.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

import torch
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tests/mutations.json"
GOAL, LIMIT = 0.9, 300  # seconds a command may take
FLAGS = "-O1 -g0 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math"
FLAGS += " -march=native -fopenmp-simd -DTORCH_EXTENSION_NAME=_C"
OPTIONS = ["-xqp", "no:cacheprovider", "-W", "ignore::RuntimeWarning", "-m", "not gpu"]

# Which tests see which kind of bug: the files tests/*/test_*.py and what pytest's -k picks of them.
# fmt: off
SUITES = {
    "step": ("accuracy", "trains_a_step and (note or preact) and (relu or gelu or silu)"),
    "ways": ("accuracy", "ways_to_call and (fp32 or bf16)"),
    "half": ("accuracy determinism", "(ways and (bf16 or fp16)) or of_nan_inf"),
    "acts": ("native determinism accuracy", "(step and note and layer) or of_nan_inf or within"),
    "norms": ("accuracy", "(test_eps or mean_1e3) and fp32"),
    "batch": ("accuracy", "(trains_a_step and batch and gelu) or (batch_norm_in and fp32)"),
    "donation": ("donation", "test"),
    "running": ("modules", "running_statistics"),
    "masks": ("accuracy reference", "masks or philox or drop"),
    "gate": ("accuracy", "scalar_gate and fp32"),
    "layouts": ("shapes", "leading or strided or unwritten"),
    "random": ("properties", "any_call"),
    "needs": ("ops autograd", "gradients_in or only_gradients"),
    # one case is beyond its bound without a mutant, by the sums of the narrowest vectors
    "train": ("training autograd", "(train or double) and not (silu and batch and note)"),
    "mixed": ("training", "mixed_precision and (note or prenorm or resnet) and gelu"),
    "kept": ("autograd", "without_x or no_more_than_eager or overflows"),
    "surgery": ("surgery_by_hand", ""),
    "tools": ("graph_tools", "flops or exported"),
    "locale": ("errors", "decimal_comma"),
    "products": ("cpu_kernels", "(products and not instruction) or batch_norm or any_number"),
    "wide": ("cpu_kernels", "too_large_for_blocks"),
    "few rows": ("cpu_kernels", "few_rows"),
    "fits": ("errors", "running_statistics"),
    "chain": (
        "network",
        "scaled or each_gradient or (batch_norm_is and False-training) "
        "or (link_of_its_own and layer-False)",
    ),
    "stack": (
        "stack",
        "gates or masks or autocast or turns or one_by_one or loads or double or recompute_keeps "
        "or (numbers and rms)",
    ),
    "settings": ("settings", ""),
    "glu": ("glu", "unit or views"),
    "triton glu": ("triton_glu", "shapes"),
    "gated": ("compiled", "gated"),
    "chains": ("chains", ""),
    "matched": ("compiled", "(found_and_equal and first) or counts"),
    "read": ("convert_sums", "read or keeps"),
    "triton": ("triton", "as_eager or shortcuts or rows_past or everything_on or (scales and 1.0)"),
    "triton drops": ("triton", "masks or everything_on"),
    "triton acts": ("triton", "activation or scales or cdf"),
    "triton layouts": ("triton", "layouts or nothing_outside or shortcuts"),
    "triton whole": ("triton", "dz_and_dx"),
    "triton apart": ("triton", "of_their_own or true_fp32"),
    "triton sums": ("triton", "rows_past or many_programs or dweight_meet or same_call"),
    "triton widths": ("triton", "odd_width or alignment_is or every_alignment"),
    "plan": ("plan", "narrower or powers_of_two or without_wgmma or many_columns or shared_memory "
             "or test_backward"),
    "triton host": ("triton_host", "later_launch or once or tape"),
    "triton mixed": ("triton_mixed", "inference or overflows or looks_at"),
    "triton chain": ("triton_chain", "numbers or other_settings or past_the_end or nobody or own"),
    "triton loop": ("triton_loop", "bits_of or autocast or accurate or frozen or recompute"),
    "cuda": ("cuda_emulated", "test_shapes or residuals or parts or several_tiles or large_mean"),
    "cuda layouts": ("cuda_emulated", "strides or nan_and_inf or no_races"),
    "cuda drops": ("cuda_emulated", "orders_and_norms and drop"),
    "hopper": ("cuda_emulated_sm90", "recipes or test_shapes or large_mean or outlier"),
}


class Mutant(NamedTuple):
    file: str
    suite: str
    why: str
    old: str  # stands in the file exactly once
    new: str


# file: rows of suite, why, old, new
TABLE = {
"csrc/tensors.h": [
    ("layouts", "the stride of a vector is ignored", "kOwn && v.stride == 1)", "kOwn)"),
    ("wide", "the first part's bias for all", "wide(part(*bias, 0))",
     "wide(torch::stable::narrow(*bias, 0, 0, std::min(most, N - first)))"),
    ("wide", "the last columns are left out", "first < N; first += most",
     "first + most < N; first += most"),
],
"csrc/call.h": [
    ("step", "two bits of `needs` swapped", "kNormWeight, kNormBias, kGate,",
     "kNormBias, kNormWeight, kGate,"),
    ("mixed", "y in weight's dtype", "return recipe.y_dtype ?", "return false ?"),
],
"csrc/recipe.cpp": [
    ("locale", "numbers by the process's locale", "in.imbue(std::locale::classic());",
     "in.imbue(std::locale(\"\"));"),
],
"csrc/params.h": [
    ("ways", "kept elements are not scaled up", "p < 1 ? 1 / (1 - p) : 0", "1"),
],
"csrc/chain/forward.h": [
    ("chain", "a chain keeps no variance of a batch",
     "std::copy(side.var.begin(), side.var.end(), statistics + side.mean.size());", ""),
],
"csrc/chain/backward.h": [
    ("chain", "no residual_scale in a chain's backward", "reader.receive(skip, r.residual_scale)",
     "reader.receive(skip, 1)"),
    ("chain", "an add in the middle of a link sends nothing back",
     "send_to(memory);\n    reader", "reader"),
    ("chain", "an add after a batch norm sends back what came to the norm", "Rows skip = dy;",
     "Rows skip = walk.pass.dy;"),
    ("chain", "a shortcut's input has no gradient but the shortcut's",
     "if (!first) links[wiring.reader[from]].receive(to, 1);", ""),
],
"fusedres/links.py": [
    ("chain", "a batch norm's statistics are those of the first one", "        at += 2 * C\n", ""),
],
"csrc/chain/links.h": [
    ("stack", "every block has the first one's gate", "i == gate_ ? l / block : l",
     "i == gate_ ? 0 : l"),
    ("stack", "the stream is kept where only its cast is read",
     "prologue.empty() || !links[l].casts", "prologue.empty() || true"),
    ("stack", "every link draws the first one's mask", "data_ptr())[seeded_]", "data_ptr())[0]"),
],
"csrc/chain/wiring.h": [
    ("stack", "a later block adds the first one's input", "adds[l] < 0 ? -1 : adds[l] + block",
     "adds[l]"),
    ("stack", "a value's memory is taken while a later link needs it",
     "std::max(lives[v].end, l)", "v < l ? lives[v].end : l"),
    ("stack", "a gradient's memory is taken while a source needs it",
     "std::min(v - 1, target(v - 1))", "(v - 1)"),
],
"csrc/chain/results.h": [
    ("stack", "a gradient of one link for all", "chain_.entry(i, l))", "0 * l)"),
],
"fusedres/chain.py": [
    ("stack", "recompute keeps z", "keep = 2 if recompute else 1", "keep = 1"),
    ("stack", "double backward adds a link's own input",
     "values[-1 - back] if back != input_back", "values[-1] if back != input_back"),
],
"fusedres/stack.py": [
    ("stack", "a batch norm's batches are not counted", "tracked = count if tracks else None",
     "tracked = None"),
    ("stack", "one by one, all layers add their own input",
     "source = y if layer % B == 0 else source", "source = y"),
    ("stack", "gates are looked for in every layer", "range(B - 1, L, B) if kind.name",
     "range(0, L, B) if kind.name"),
],
"fusedres/spec.py": [
    ("settings", "numbers of numpy are none", "isinstance(value, Real) and value == value",
     "isinstance(value, (int, float)) and value == value"),
],
"fusedres/donation.py": [
    ("donation", "z is written over though a mode sees it", " or _modes()", ""),
    ("donation", "z is written over though somebody holds it", "references + 2", "references + 3"),
],
"csrc/running.cpp": [
    ("running", "the biased variance is kept", "static_cast<double>(rows - 1) : 1",
     "static_cast<double>(rows) : 1"),
    ("running", "an average that forgets this batch", "*count + 1.0", "*count + 0.0"),
],
"csrc/cpu/glu.h": [
    ("glu", "da does not know b", "    multiply_rows(d, b, n);\n", ""),
    ("glu", "db takes the derivative of what it multiplies", "activate_grad(g.act, d, a, n)",
     "activate_grad(g.act, d, t, n)"),
],
"csrc/glu.cpp": [
    ("glu", "db begins where da does", "first.features * dz.element_size()",
     "0 * dz.element_size()"),
    ("glu", "db takes da's place", "g.db = db_first ? first : second;",
     "g.db = db_first ? second : first;"),
],
"fusedres/kernels/glu.py": [
    ("triton glu", "da does not know b", "dh * b * ACT_GRAD(a)", "dh * ACT_GRAD(a)"),
    ("triton glu", "db takes the derivative", "dh * ACT(a), inside", "dh * ACT_GRAD(a), inside"),
    ("triton glu", "rows of a are as far apart as b's", "H, stride_a, 1)", "H, H, 1)"),
],
"fusedres/models/gated.py": [
    ("gated", "the other half is activated", "(first[0],), first[1]", "(first[0],), not first[1]"),
],
"fusedres/models/chains.py": [
    ("chains", "a run goes on past what others read",
     "if not block.nodes.issuperset(last.users) or", "if"),
    ("chains", "what is written in between is forgotten", "if disturbed else", "if False else"),
    ("chains", "links know their first dtypes for ever", "or known.facts != facts", ""),
],
"fusedres/models/block.py": [
    ("matched", "no matmul begins with an activation where the first one does",
     "_divide(tail, steps, True) or _divide(tail, steps, False)", "_divide(tail, steps, True)"),
],
"fusedres/models/report.py": [
    ("matched", "modules of one path are one", "adds[first, add.where", "adds[0, add.where"),
],
"fusedres/models/trace.py": [
    ("read", "a forward that keeps values is taken", "if changed:\n            raise",
     "if False:\n            raise"),
    ("read", "what stood for a buffer stays", "                now.update(before)",
     "                pass"),
    ("read", "a tensor is none while it is read", "issubclass(Tensor, kinds)", "False"),
],
"csrc/cpu/choose.cpp": [
    ("few rows", "few rows are not the library's", "M < kFewRows && !mul", "M < 0 && !mul"),
],
"fusedres/checks.py": [
    ("fits", "one row has a variance", "x.dim() > 1 and math.prod(x.shape[:-1]) != 1", "True"),
    ("fits", "running statistics of another width", "mean.shape != shape or var.shape != shape or",
     ""),
],
"fusedres/models/rewrite.py": [
    ("chains", "a block adds its last layer's input", "len(layers) - 1 if layer", "0 if layer"),
],
"csrc/cpu/storage.h": [
    ("half", "bf16 is cut off, not rounded", "(u + 0x7FFF + ((u >> 16) & 1)) >> 16", "u >> 16"),
    ("half", "fp16 has no subnormals", "m < 0x38800000u ? subnormal : normal", "normal"),
],
"csrc/cpu/stages.h": [
    ("kept", "an overflowing variance is hidden", " + (var - var)}", "}"),
    ("ways", "reads a skip's features past its end", "features = std::min(rows.features, n)",
     "features = n"),
    ("norms", "rms norm without eps", "dot(t, t, n) * per_n + eps", "dot(t, t, n) * per_n"),
    ("norms", "layer norm with eps outside the root",
     "1 / std::sqrt(var + eps) +", "1 / (std::sqrt(var) + eps) +"),
    ("norms", "layer norm by E[t^2] - E[t]^2", "mean = sum(t, n) * per_n;", "mean = 0;"),
    ("norms", "layer norm forgets what rounding left of the mean", "shift = rest * per_n",
     "shift = 0"),
    ("norms", "rms norm's rstd in bf16", "return {0, 1 / std::sqrt(dot(t, t, n) * per_n + eps)}",
     "return {0, A(to_float(to_bfloat16(float(1 / std::sqrt(dot(t, t, n) * per_n + eps)))))}"),
    ("step", "layer norm's gradient without mean(d)", "(d[i] - mean_d - c[i]", "(d[i] - c[i]"),
    ("step", "the norm's gradient with mean(d c) but not c", "- c[i] * mean_dc", "- mean_dc"),
    ("masks", "every row drops the same elements",
     "drop_elements(t, n, p.seed, static_cast<uint64_t>(m) * n,", "drop_elements(t, n, p.seed, 0,"),
    ("masks", "drop-path drops rows, not samples", "drop_sample(t, n, p.seed, m / p.sample_rows",
     "drop_sample(t, n, p.seed, m"),
],
"csrc/cpu/backward.h": [
    ("batch", "batch norm's gradient divides by M - 1", "static_cast<A>(p.M);\n    for",
     "static_cast<A>(p.M - 1);\n    for"),
    ("batch", "the same where stages stand before it", "static_cast<A>(p.M);\n#pragma",
     "static_cast<A>(p.M - 1);\n#pragma"),
    ("batch", "the bias is no part of what batch norm saw", "p.bias ? p.mean[i] - p.bias[i] :",
     "p.bias ? p.mean[i] :"),
    ("donation", "dy is loaded over a z that is still needed",
     "\n                        !(b.after && b.dz.data == b.after->program.input.data);", "true;"),
    ("step", "no gamma in backward", "if (p.gamma) scale_shift<A>(d, p.gamma, nullptr, d, n);", ""),
    ("gate", "no gate in backward", "d[i] *= p.gate[0]", "d[i] *= 1"),
    ("ways", "backward drops other elements",
     "drop_elements(d, n, p.seed, static_cast<uint64_t>(m) * n",
     "drop_elements(d, n, p.seed, (m + 1) * n"),
    ("ways", "no residual_scale in backward", "scale = static_cast<A>(r.residual_scale)",
     "scale = 1"),
    ("ways", "a scaled skip of x goes back unscaled", "static_cast<A>(b.skip_scale)", "A(1)"),
    ("random", "the last block of rows is not added", "  after.flush();\n", ""),
    ("random", "no shortcut to x before the product",
     "add(d + i * stride, dx_add(i), width_);", ";"),
    ("products", "dweight of the last 128 rows only", "K, c, stride, m > first);",
     "K, c, stride, false);"),
    ("products", "a part of dweight is left out", "int64_t part = 1; part < count",
     "int64_t part = 2; part < count"),
],
"csrc/cpu/product.h": [
    ("products", "sums beyond 48 write over those before", "add || k > 0);", "add);"),
    ("products", "rows are interleaved with themselves", "(i + kLanes) / 2 + i % 2 * kLanes",
     "i / 2 + i % 2 * kLanes"),
    ("products", "an odd end of the inner dimension is not packed", "for (; k < count; ++k)",
     "for (; k + 1 < count; ++k)"),
    ("products", "an odd end of dz's columns is not packed", "n + j < end; ++j",
     "n + j + 1 < end; ++j"),
    ("products", "the next tile of rows of this one", "m / kTileRows * a.tile", "0 * a.tile"),
],
"csrc/cpu/kernels.h": [
    ("products", "variances are merged without their means' distance",
     "other_squares + d * d * (seen * more / all)", "other_squares"),
],
"csrc/cpu/rows.h": [
    ("layouts", "a row's width for its stride", "m * rows.stride;", "m * rows.features;"),
],
"csrc/cpu/forward.h": [
    ("mixed", "the product's own bias is left out",
     "if (f.early_bias) add(row, f.early_bias, N);", ""),
],
"csrc/cuda/rows.h": [
    ("cuda", "layer norm's gradient without mean(d)", "(v - means.g - u * means.gc)",
     "(v - u * means.gc)"),
    ("cuda", "moments are merged as if a part were the whole",
     "delta * delta * (count * share)", "delta * delta * count"),
    ("cuda", "layer norm forgets what rounding left of the mean",
     "row.rest = total / count;", "row.rest = 0.0f;"),
],
"csrc/cuda/product_sm80.h": [
    ("cuda layouts", "copies of 16 bytes from multiples of 8", "bits % 16 == 0  ? 16",
     "bits % 8 == 0  ? 16"),
    ("cuda layouts", "a row past the last is copied", "row + r < s.rows ?", "row + r <= s.rows ?"),
    ("cuda layouts", "nobody waits for what others have copied",
     "cp_async_wait<kDepth - 2>();\n    sync_threads();", "cp_async_wait<kDepth - 2>();"),
],
"csrc/cuda/plan.h": [
    ("cuda layouts", "room for two of three moments", "3 * tiles * layer.M",
     "2 * tiles * layer.M"),
],
"csrc/cuda/stages.h": [
    ("cuda drops", "rows drop the same elements, one column on",
     "static_cast<uint64_t>(at.m) * at.width + at.n", "static_cast<uint64_t>(at.m) + at.n"),
    ("cuda", "no residual_scale in backward", "return layer.residual_scale * v;", "return v;"),
],
"csrc/cuda/forward_sm80.cu": [
    ("cuda layouts", "a tile is loaded over the one that is being finished",
     "      sync_threads();  // z has been read\n", ""),
],
"csrc/cuda/backward_sm80.cu": [
    ("cuda", "every program sends the skip to every column",
     "at.n / size.n % call.groups == group", "true"),
],
"csrc/cuda/sums.h": [
    ("cuda", "the last part of the rows is not added", "add_up(call.cut.sum_parts,",
     "add_up(call.cut.sum_parts - 1,"),
],
"csrc/cuda/roles_sm90.h": [
    ("hopper", "the mean is taken off unscaled", "-found.mean * found.rstd", "-found.mean"),
    ("hopper", "the tail of K is surveyed as if it were whole",
     "whole = left >= kBlockK / kStrip;", "whole = true;"),
],
"csrc/side.h": [
    ("ways", "chunks end a row early", "return begin(chunk + 1); }",
     "return begin(chunk + 1) - 1; }"),
    ("products", "chunks' sums are not added",
     "chunk < chunks; ++chunk)\n      for (int64_t i",
     "chunk < 1; ++chunk)\n      for (int64_t i"),
],
"csrc/ops.cpp": [
    ("mixed", "dx of a cast x in the product's dtype",
     ": empty({M, c.K()}, x);",
     ": empty({M, c.K()}, c.weight);"),
    ("mixed", "dresidual in x's dtype", "{M, c.residual->size(1)}, *c.residual)",
     "{M, c.residual->size(1)}, x)"),
    ("ways", "saves y for z", "out.push_back(*z);", "out.push_back(out[0]);"),
    ("batch", "backward gets rstd for the variance", "side.var.begin(), side.var.end()",
     "side.rstd.begin(), side.rstd.end()"),
    ("random", "every sum passes for the last stage",
     "= adds_after && r.epilogue.back() == Stage::add;", "= adds_after;"),
],
"csrc/gradients.h": [
    ("gate", "a scalar gate's gradient of one column",
     "total += walk->dgate[n]", "total = walk->dgate[0]"),
],
"csrc/epilogue.h": [
    ("half", "max for where: relu hides NaN", "return h < 0 ? A(0) : h;",
     "return h > 0 ? h : A(0);"),
    ("acts", "exp is not clamped", "x = x < -88.0f ? -88.0f : x;", ""),
    ("acts", "one digit of the normal distribution", "3.233437176e-01f", "3.233537176e-01f"),
    ("masks", "one digit of Philox", "0x9E3779B9u", "0x9E3779B1u"),
],
"fusedres/kernels/stages.py": [
    ("triton widths", "sizes are rounded down", "sizes[i] // ALIGN * ALIGN",
     "sizes[i] // 16 * 16"),
    ("triton", "no mask over columns", "(column < columns)[None, :]", "(column >= 0)[None, :]"),
    ("triton layouts", "the width for the stride", "row[:, None] * stride_row",
     "row[:, None] * columns"),
    ("triton", "eps outside the root", "tl.sqrt_rn(variance + eps)",
     "(tl.sqrt_rn(variance) + eps)"),
    ("triton drops", "masks do not differ between rows", "m[:, None] * C + n[None, :]",
     "m[:, None] * 0 + n[None, :]"),
    ("triton drops", "samples and elements share a stream", "m // p.sample_rows, 1)",
     "m // p.sample_rows, 0)"),
    ("triton", "the gate has no gradient of its own", "dgate = d * values[i]", "dgate = d"),
    ("triton", "the skip's gradient is not scaled", "dshortcut = p.residual_scale * d",
     "dshortcut = d"),
    ("triton mixed", "0 for a variance that overflows", "rstd += variance - variance", "rstd += 0"),
],
"fusedres/kernels/moments.py": [
    ("triton", "dead columns count in the variance", "t = tl.where(live, t - tl.expand_dims(mean",
     "t = tl.where(live | True, t - tl.expand_dims(mean"),
    ("triton", "merged means are not weighted", "share = other_count / (count + other_count)",
     "share = 0.5"),
    ("triton", "merging forgets the distance of the means",
     "m2 += other_m2 + delta * (delta * (count * share))", "m2 += other_m2"),
    ("triton sums", "the last block counts in full", "return own * BLOCK - missing",
     "return own * BLOCK"),
    ("triton sums", "the arrival counter is not reset",
     "    if last:\n        tl.store(counter_ptr, 0)",
     "    if last:\n        tl.store(counter_ptr, count)"),
    ("triton sums", "the last but one to arrive adds up",
     'last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 1',
     'last = tl.atomic_add(counter_ptr, 1, sem="acq_rel") == count - 2'),
    ("triton sums", "only the first group of programs counts",
     "add_rows(part, 0, GROUP, groups, n", "add_rows(part, 0, GROUP, 1, n"),
],
"fusedres/kernels/product.py": [
    ("triton", "the algebraic form forgets the mean", "mean[:, None] * sum_g[None, :]",
     "0 * sum_g[None, :]"),
    ("triton mixed", "nobody stores what was multiplied", "tl.where(tile_n == 0, M, 0)",
     "tl.where(tile_n < 0, M, 0)"),
    ("triton", "the norm's bias is left out", "return z + shift[None, :] + load",
     "return z + load"),
],
"fusedres/kernels/forward.py": [
    ("triton", "biased by one: variance over M - 1", "tl.store(stats_ptr + N + n, m2 / M, n < N)\n"
     "        rstd", "tl.store(stats_ptr + N + n, m2 / (M - 1), n < N)\n        rstd"),
    ("triton mixed", "z lies in y before its rounding", "z.to(weight_ptr.dtype.element_ty)",
     "z.to(tl.float32)"),
    ("triton", "a wide row's statistics of z before its rounding",
     "t = run_stages(z.to(tl.float32), p", "t = run_stages(z.to(tl.float32) * 1.001, p"),
],
"fusedres/kernels/prologue.py": [
    ("triton apart", "a pass does not see what stands before its norm",
     "stride_xk, BEFORE, ACT, CENTRED", "stride_xk, (), ACT, CENTRED"),
    ("triton apart", "a pass forgets the mean in backward",
     "tl.load(stats_ptr + m, m < M, 0.0)[:, None]", "tl.zeros((BLOCK_M, 1), tl.float32)"),
],
"fusedres/kernels/epilogue.py": [
    ("triton acts", "max for where: relu hides NaN", "tl.where(h < 0, 0.0, h)",
     "tl.where(h > 0, h, 0.0)"),
],
"fusedres/kernels/backward.py": [
    ("triton sums", "rows past M count in sums",
     "tl.where(inside, dh * c, 0.0), tl.where(inside, dh, 0.0),\n    )\n    return",
     "tl.where(inside, dh * c, 0.0), dh,\n    )\n    return"),
    ("triton whole", "the skip of dx is not scaled", "dx += skip * other", "dx += other"),
    ("triton whole", "wide rows' sums start anew with each block",
     "partial_ptr, block == walker, walker, walkers, n, C)\n        turned",
     "partial_ptr, True, walker, walkers, n, C)\n        turned"),
    ("triton", "rms norm takes a mean too", 'if NORM == "layer":', 'if NORM == "rms":'),
    ("triton", "batch norm forgets the mean of dh", "(dh - mean_dh - c * mean_dhc)",
     "(dh - c * mean_dhc)"),
    ("triton layouts", "z passes for contiguous",
     "        z = load_tile(z_ptr, m, n, M, C, stride_zm, stride_zn).to(tl.float32)\n"
     '    if NORM == "layer"',
     "        z = load_tile(z_ptr, m, n, M, C, C, 1).to(tl.float32)\n"
     '    if NORM == "layer"'),
],
"fusedres/kernels/chain.py": [
    ("triton chain", "every link adds its own input", "(link + 1) % B == 0, stream, source",
     "(link + 1) % B >= 0, stream, source"),
    ("triton chain", "an add within a block adds", "tl.where(adds, total, t)", "total"),
    ("triton chain", "every link of a block has its gate", "tl.where(adds, gate * t, t)",
     "gate * t"),
    ("triton chain", "a norm before linear is its own link's, late",
     "own = after if NORM_BEFORE else link", "own = link"),
    ("triton chain", "the walk back forgets the mean of g", "if CENTRED:\n                d -= ",
     "if CENTRED:\n                d -= 0.5 * "),
    ("triton chain", "rows past M count in a chain's sums", "tl.sum(tl.where(rows, t, 0.0), 0)",
     "tl.sum(t, 0)"),
    ("triton chain", "the block's input gets nothing back",
     "tl.where(link % B == 0, d + skip, d)", "d"),
],
"fusedres/backends/chain.py": [
    ("triton chain", "the weight's gradient is of x, not of what was multiplied",
     "inputs if operand is None else operand", "inputs"),
],
"fusedres/backends/loop.py": [
    ("triton loop", "a block's input gets nothing back from its add",
     "d[value].add_(found[name]) if value in d", "found[name] if value in d"),
    ("triton loop", "a product's inputs begin a plane late", "several = _planes(multiplied,",
     "several = _planes(self.kept.of(kind, a + 1),"),
    ("triton loop", "what a norm after add looks at is not kept",
     "reads[link - lines[link % block].back] = True", "reads[link] = True"),
],
"fusedres/kernels/by_tanh.py": [
    ("triton acts", "silu by tanh(h)", "return h * (0.5 + 0.5 * tanh(0.5 * h))",
     "return h * (0.5 + 0.5 * tanh(h))"),
],
"fusedres/kernels/products.py": [
    ("triton sums", "the last part of the rows is lost", "range(0, count)",
     "range(0, count - 1)"),
    ("triton host", "another number of splits compiles anew", '["M", "splits"]', '["M"]'),
    ("triton sums", "groups of parts share a counter", "last_to_arrive(counters + groups, groups)",
     "last_to_arrive(counters, groups)"),
    ("triton mixed", "the skip of dx alone is not scaled", "dt += skip * other", "dt += other"),
],
"fusedres/backends/triton.py": [
    ("triton widths", "N is not asked for its alignment", "math.gcd(16, N, *(", "math.gcd(16, *("),
    ("triton", "the skip is added twice", "beta=int(late)", "beta=2 * int(late)"),
],
"fusedres/backends/launch.py": [
    ("triton host", "pointers are not asked for their alignment", "t.data_ptr() & 15)", "0)"),
    ("triton host", "calls are kept for ever", "_calls.clear()", "pass"),
    ("triton host", "profilers miss a launch", "is not kernel or hooked()", "is not kernel"),
],
"fusedres/backends/tape.py": [
    ("triton host", "one tensor in two places is taken for one", "t if t is None else t.detach()",
     "t"),
    ("triton host", "tensors of the first call are kept", "None if _has_tensor(value) else value",
     "value"),
],
"fusedres/backends/vendor.py": [
    ("triton widths", "odd rows go to Triton", "bool(N % 2 or K % 2)", "False"),
],
"fusedres/backends/plan.py": [
    ("plan", "rows with masks are whole, too", "BACKWARD_PLAIN_ROW if plain else BACKWARD_ROW",
     "BACKWARD_PLAIN_ROW"),
    ("plan", "one stage is enough", "tile.num_stages > 2 or", "tile.num_stages > 1 or"),
    ("plan", "any product has its stages apart", "> 0.5e6", "> 0"),
    ("plan", "128 programs do not fill 132", "FULL = 0.9 ", "FULL = 1.0 "),
    ("plan", "Ada reads no tiles of Ampere", '("sm_8", "sm_12")', '("sm_8x",)'),
    ("plan", "single elements by as few warps", "16 if width == 2 else 64", "64"),
],
"fusedres/functional.py": [
    ("mixed", "autocast is not asked for", "compiling or _any_autocast()", "compiling"),
    ("running", "batches are not counted", "tracked.add_(1)", "tracked.add_(0)"),
    ("running", "running variance is biased", "rows / max(rows - 1, 1)", "1.0"),
    ("train", "every call draws the same masks", "seed=draw_seed(x.device)",
     "seed=torch.ones(1, dtype=torch.int64)"),
],
"fusedres/dtypes.py": [
    ("mixed", "add does not promote", "t = torch.promote_types(t, x if residual is None else",
     "torch.promote_types(t, x if residual is None else"),
    ("mixed", "autocast ends at the product", "            t = product\n", "            pass\n"),
],
"fusedres/layers.py": [
    ("surgery", "hooks before forward are not asked for",
     'or own["_forward_pre_hooks"]\n        or own["_backward_hooks"]\n'
     '        or own["_backward_pre_hooks"]\n    ):',
     'or own["_backward_hooks"]\n        or own["_backward_pre_hooks"]\n    ):'),
    ("surgery", "a forward of the instance's own is passed", 'or "forward" in own', ""),
    ("surgery", "global hooks are not asked for", "        _global_forward_hooks\n        or",
     "       "),
],
"fusedres/graphs.py": [
    ("tools", "no FLOPs for dweight", "(bool(needs & asked) + bool(needs & 2))",
     "bool(needs & asked)"),
],
"fusedres/autograd.py": [
    ("kept", "x is not kept though weight learns",
     "usual = residual is None and weight.requires_grad",
     "usual = residual is None and not weight.requires_grad"),
    ("kept", "a gradient of z is lost", "found[i] = more if found[i] is None else found[i] + more",
     "found[i] = more if found[i] is None else found[i]"),
    ("kept", "the residual is kept", "if residual is not None and not reads_residual:\n",
     "if residual is None and not reads_residual:\n"),
    ("needs", "needs in the reverse order", "need << i for", "need << (6 - i) for"),
    ("train", "second derivatives are cut off", "create_graph = torch.is_grad_enabled()",
     "create_graph = False"),
],
}
# fmt: on
MUTANTS = [Mutant(file, *row) for file, rows in TABLE.items() for row in rows]


def make_tree(path: Path) -> None:
    """Copies the package and its tests. `path` gets no extension yet."""
    junk = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "fusedres", "tests"):
        shutil.copytree(ROOT / name, path / name, ignore=junk)
    shutil.copy(ROOT / "pyproject.toml", path)


class Tree:
    """What make_tree made: runs commands, builds the extension, tests."""

    def __init__(self, path: Path):
        self.path, self.log = path, path / "log"
        self.sources = sorted({*path.glob("csrc/*.cpp"), *path.glob("csrc/cpu/*.cpp")})
        self.sources.remove(path / "csrc/cuda_ops.cpp")  # its kernels are tested by emulation

    def run(self, command: list[str], **environment: str) -> int:
        """The exit code, or -1 after LIMIT seconds."""
        with self.log.open("w") as log:
            try:
                return subprocess.run(
                    command,
                    cwd=self.path,
                    env=os.environ | environment,
                    stdout=log,
                    stderr=log,
                    check=False,
                    timeout=LIMIT,
                ).returncode
            except subprocess.TimeoutExpired:
                return -1

    def includes(self, source: Path, file: Path) -> bool:
        """Whether `source` is `file` or includes it, directly or not."""
        names = re.findall(r'#include "(.*)"', source.read_text())
        return source == file or any(self.includes(self.path / "csrc" / n, file) for n in names)

    def build(self, changed: Path | None = None) -> bool:
        """Compiles all, or what includes `changed`, apart from the unbroken objects; links."""
        compiler = os.environ.get("CXX", "g++").split()
        places = [*include_paths(), sysconfig.get_path("include")]
        flags = [
            *FLAGS.split(),
            "-DFUSEDRES_BASELINE_ONLY",
            "-Icsrc",
            *(f"-isystem{place}" for place in places),
        ]
        objects = []
        for source in self.sources:
            broken = changed is not None and self.includes(source, changed)
            objects.append(str(source.with_suffix(".broken.o" if broken else ".o")))
            if (broken or not Path(objects[-1]).exists()) and self.run(
                [*compiler, *flags, "-c", str(source), "-o", objects[-1]]
            ):
                return False
        libraries = [f"-L{p}" for p in library_paths()]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python"]
        out = f"fusedres/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        return not self.run([*compiler, "-shared", *objects, *libraries, "-o", out])

    def emulate(self) -> bool:
        """Compiles the CUDA kernels for the tests' emulated GPU."""
        code = "from cuda_on_cpu.structs import kernels; from test_cuda_emulated_sm90 import hopper"
        command = [sys.executable, "-c", f"{code}; kernels(), hopper()"]
        folders = (self.path / folder for folder in (".", "tests", "tests/emulation"))
        return self.run(command, PYTHONPATH=":".join(map(str, folders))) == 0

    def test(self, suite: str) -> int:
        """pytest's exit code."""
        files, names = SUITES[suite]
        command = [sys.executable, "-m", "pytest", *OPTIONS, "-k", names]
        return self.run(
            command + [str(*self.path.glob(f"tests/*/test_{file}.py")) for file in files.split()],
            TRITON_INTERPRET=str(int(files.startswith("triton"))),
            PYTHONPATH=str(self.path),
            PYTHONDONTWRITEBYTECODE="1",
            CUDA_VISIBLE_DEVICES="",
            OMP_NUM_THREADS="1",
            MKL_NUM_THREADS="1",
        )

    def verdict(self, mutant: Mutant) -> str:
        """caught, survived, or what went wrong."""
        file = self.path / mutant.file
        whole = file.read_text()
        emulated = file.parent.name == "cuda"  # its tests compile it
        native = file.suffix != ".py" and not emulated
        file.write_text(whole.replace(mutant.old, mutant.new))
        try:
            if not (self.emulate() if emulated else not native or self.build(file)):
                return "does not compile"
            code = self.test(mutant.suite)
        finally:
            file.write_text(whole)
            if native:
                self.build()
        return {0: "survived", 1: "caught"}.get(code, f"pytest's exit code {code}")


def on_trees(trees, function, jobs):
    """function(tree, job) for every job, as many at once as there are trees; results in order."""
    free = SimpleQueue()
    for tree in trees:
        free.put(tree)

    def one(job):
        tree = free.get()
        try:
            return function(tree, job)
        finally:
            free.put(tree)

    with ThreadPoolExecutor(len(trees)) as pool:
        return list(pool.map(one, jobs))


def judge(chosen: list[Mutant], jobs: int, temporary: Path) -> list[str]:
    """The verdict on each mutant; exits where the unbroken tree fails."""
    make_tree(temporary / "0")
    first = Tree(temporary / "0")
    if not first.build():
        sys.exit(f"the unbroken tree does not compile:\n{first.log.read_text()[-3000:]}")
    for i in range(1, jobs):
        shutil.copytree(first.path, temporary / str(i))
    trees = [Tree(temporary / str(i)) for i in range(jobs)]

    def unbroken(tree, suite):
        return "" if tree.test(suite) == 0 else f"{suite}:\n{tree.log.read_text()[-1500:]}"

    suites = sorted({m.suite for m in chosen})
    print(f"{len(suites)} suites on the unbroken tree", flush=True)
    if failures := "".join(on_trees(trees, unbroken, suites)):
        sys.exit(f"these fail without a mutant: {failures}")
    done = []

    def one(tree, m):
        begin = time.monotonic()
        done.append(tree.verdict(m))
        head = f"{len(done):3}/{len(chosen)} {time.monotonic() - begin:4.0f} s {done[-1]:9}"
        print(f"{head} {m.file}: {m.why}", flush=True)
        return done[-1]

    return on_trees(trees, one, chosen)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of file: description")
    parser.add_argument("--list", action="store_true", help="list the mutants and stop")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default 2)")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if options.only in f"{m.file}: {m.why}"]
    stale = [m for m in chosen if (ROOT / m.file).read_text().count(m.old) != 1]
    for m in chosen if options.list else stale:
        print(f"{'STALE ' * (m in stale)}{m.file}: {m.why}")
    if stale or not chosen:
        sys.exit(f"{len(stale)} mutants are stale: their text no longer stands exactly once")
    if options.list:
        return

    head = ["git", "rev-parse", "--short", "HEAD"]  # asked now: it may move while this runs
    run = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False)
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        verdicts = judge(chosen, options.jobs, Path(temporary))
    caught = verdicts.count("caught")
    survivors = [m for m, v in zip(chosen, verdicts, strict=True) if v == "survived"]
    for m in survivors:
        print(f"not caught: {m.file}: {m.why}: {m.old!r} -> {m.new!r}")
    invalid = len(chosen) - caught - len(survivors)
    minutes = (time.monotonic() - start) / 60
    print(f"caught {caught} of {len(chosen)} in {minutes:.0f} minutes, {invalid} invalid")
    if not options.only:
        result = {
            "score": round(caught / len(chosen), 3),
            "mutants": len(chosen),
            "survivors": [f"{m.file}: {m.why}" for m in survivors],
            "commit": run.stdout.strip(),
            "torch": torch.__version__,
            "date": date.today().isoformat(),
        }
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(invalid > 0 or caught < GOAL * len(chosen))


if __name__ == "__main__":
    main()
