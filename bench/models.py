"""`python -m bench models`: public models at real widths, fused both ways against as they were.

`convert` runs beside the model itself, backend "fusedres" of torch.compile beside torch's backend
"eager", which has the same guards. Contenders take turns, as for layers (measure/row.py).
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres.models.compiled import backend
from fusedres.tools.bench import INFERENCE, STEP, compare
from fusedres.tools.timing import interleave

from .measure import results_file
from .report.section import replace_part, source
from .report.tables import Table, short

RESULTS = results_file.RESULTS / "models"
PAGE = results_file.ROOT / "docs/models.md"
MARKERS = "<!-- times -->", "<!-- /times -->"
MODES = {INFERENCE: "under no_grad, in eval()", STEP: "in train(), gradients of every parameter"}
BASES = {"convert": "eager", "compile": "compiled"}
WHEN = ("faster", "always")
ABOUT = {
    "eager": "the model as it is",
    "compiled": 'torch.compile(model, backend="eager")',
    "convert": "fusedres.convert(model, x), with each `when`",
    "compile": 'torch.compile(model, backend="fusedres"), with each `when`',
}
SECONDS, QUICK = 6.0, 0.5  # for the rounds of a row
Row = dict[str, Any]
Made = tuple[nn.Module, Tensor]


def _resnet() -> Made:
    import rtdl_revisiting_models as rtdl

    net = rtdl.ResNet(
        d_in=32, d_out=1, n_blocks=4, d_block=192, d_hidden=None, d_hidden_multiplier=2.0,
        dropout1=0.0, dropout2=0.0,
    )  # fmt: skip
    return net, torch.randn(256, 32)


def _ft_transformer() -> Made:
    import rtdl_revisiting_models as rtdl

    net = rtdl.FTTransformerBackbone(
        d_out=1, n_blocks=3, d_block=192, attention_n_heads=8, attention_dropout=0.0,
        ffn_d_hidden_multiplier=4 / 3, ffn_dropout=0.0, residual_dropout=0.0,
    )  # fmt: skip
    return net, torch.randn(256, 17, 192)


def _vit() -> Made:
    from timm.models.vision_transformer import Block

    return Block(384, 6, qkv_bias=True), torch.randn(8, 197, 384)


def _mixer() -> Made:
    from timm.models.mlp_mixer import MixerBlock

    return MixerBlock(512, 196), torch.randn(4, 196, 512)


def _transformer(model: str, config: str, **settings: Any) -> Made:
    import transformers

    net = getattr(transformers, model)(getattr(transformers, config)(**settings))
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return net, torch.randint(0, 1000, (4, 128))


MODELS: dict[str, Callable[[], Made]] = {
    "RTDL ResNet, 4 blocks, 256 x 192": _resnet,
    "FT-Transformer, 3 blocks, 256 x 17 x 192": _ft_transformer,
    "ViT-S block, 8 x 197 x 384": _vit,
    "Mixer block, 4 x 196 x 512": _mixer,
    "BERT base, 1 layer, 4 x 128": partial(
        _transformer, "BertModel", "BertConfig", num_hidden_layers=1
    ),
    "GPT-2, 1 layer, 4 x 128": partial(
        _transformer, "GPT2Model", "GPT2Config", n_layer=1, use_cache=False
    ),
    "Llama, 1 layer of 512, 4 x 128": partial(
        _transformer,
        "LlamaModel",
        "LlamaConfig",
        num_hidden_layers=1,
        hidden_size=512,
        intermediate_size=1376,
        num_attention_heads=8,
        vocab_size=1000,
        use_cache=False,
    ),
}


def _first(y: Any) -> Tensor:
    return y if isinstance(y, Tensor) else y[0]


def _contenders(model: nn.Module, x: Tensor) -> tuple[dict[str, Any], dict[str, str]]:
    """What is called, by name, and how many residual adds each way fuses."""
    torch.compiler.reset()
    calls: dict[str, Any] = {
        "eager": model,
        "compiled": torch.compile(copy.deepcopy(model), backend="eager"),
    }
    fused = {}
    for when in WHEN:
        name, twin = f"convert, {when}", copy.deepcopy(model)
        adds = fusedres.convert(twin, x, when=when).residual_adds
        calls[name], fused[name] = twin, f"{len(adds.fused)} of {adds.found}"
        name, twin = f"compile, {when}", copy.deepcopy(model)
        calls[name] = torch.compile(twin, backend=backend, options={"when": when})
        calls[name](x)
        adds = fusedres.report(twin)
        fused[name] = f"{len(adds.fused)} of {adds.found}"
    return calls, fused


def _check(calls: dict[str, Any], x: Tensor) -> None:
    """Whether all give eager's values, by the RMS of what differs."""
    with torch.no_grad():
        results = {name: _first(call(x)) for name, call in calls.items()}
    eager = results["eager"]
    for name, y in results.items():
        error = ((y - eager).norm() / eager.norm()).item()
        if not error < 1e-4:
            raise ArithmeticError(f"{name} differs from eager by {error:.1e} of its size")


def _step(model: Any, x: Tensor, dy: Tensor) -> None:
    _first(model(x)).backward(dy)
    model.zero_grad()


def _row(name: str, model: nn.Module, x: Tensor, mode: str, seconds: float) -> Row:
    model.train(mode == STEP)
    with torch.set_grad_enabled(mode == STEP):
        found, fused = _contenders(model, x)
        if mode == INFERENCE:  # in training, batch norm's buffers go on with each call
            _check(found, x)
        dy = torch.randn_like(_first(model(x)).detach())
        calls = {n: partial(_step, m, x, dy) if mode == STEP else partial(m, x)
                 for n, m in found.items()}  # fmt: skip
        rounds, calm = interleave(calls, torch.device("cpu"), seconds)
    row: Row = {"model": name, "mode": mode, "rounds": len(rounds), "calm": calm, "ways": {}}
    for way, base in BASES.items():
        for when in WHEN:
            ours = f"{way}, {when}"
            pairs = [{"fused": each[ours], base: each[base]} for each in rounds]
            row["ways"][ours] = {"adds": fused[ours], **compare(pairs, calm, (base,))}
    return row


def measure(names: list[str], seconds: float) -> Iterator[Row]:
    """Rows; of a model whose package is not installed one with `why` alone."""
    for name in names:
        torch.manual_seed(0)
        try:
            model, x = MODELS[name]()
        except ImportError as error:
            yield {"model": name, "why": f"{error.name} is not installed"}
            continue
        for mode in MODES:
            yield _row(name, model, x, mode, seconds)


def table(results: Row) -> str:
    """What docs/models.md shows of a results file."""
    ways = [f"{way}, {when}" for when in WHEN for way in BASES]
    head = ["model", "call", "ms", "fused, faster", *(f"x {way}" for way in ways)]
    body = []
    for row in results["rows"]:
        found = row["ways"]
        ms = found["convert, faster"]["times_us"]["eager"]["median"] / 1e3
        cells = [row["model"], row["mode"], f"{'' if row['calm'] else '~'}{short(ms)}"]
        cells.append(" / ".join(found[f"{way}, faster"]["adds"] for way in BASES))
        ratios = [found[way]["ratios"][BASES[way.split(",")[0]]]["median"] for way in ways]
        body.append([*cells, *(f"{ratio:.2f}" for ratio in ratios)])
    note = (
        "`ms` is eager's; fused: residual adds, by convert / compile; `x`: how many times faster "
        "than eager (convert) or torch.compile's backend eager (compile) in the same round; `~` "
        "disturbed by other processes"
    )
    missing = "".join(f"\n\n{row['model']}: {row['why']}." for row in results["not_measured"])
    timed = Table("Public models, fp32", head, body, 2, note).markdown()
    return f"Measured on {source(results)}.\n\n{timed}{missing}"


def page() -> str:
    """docs/models.md with the newest results of each machine."""
    tables = map(table, results_file.newest_of_machines(RESULTS))
    return replace_part(PAGE, MARKERS, "\n\n".join(tables) or "Not measured yet.")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench models", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short, and no file")
    parser.add_argument("--only", default="", metavar="TEXT", help="part of a name; no file")
    parser.add_argument("--threads", type=int, help="1 measures CPU time: for a busy machine")
    told = "measure nothing; write the newest results of each machine into docs/models.md"
    parser.add_argument("--write", action="store_true", help=told)
    args = parser.parse_args(arguments)
    if args.write:
        PAGE.write_text(page(), encoding="utf-8")
        return 0
    if args.threads:
        torch.set_num_threads(args.threads)
    names = [name for name in MODELS if args.only in name]
    if not names:
        parser.error(f"--only {args.only!r} leaves no model; models: {'; '.join(MODELS)}")
    results = results_file.collect(torch.device("cpu"))
    results["protocol"] = {"contenders": ABOUT, "modes": MODES}
    results["rows"], results["not_measured"] = [], []
    for row in measure(names, QUICK if args.quick else SECONDS):
        if "why" in row:
            results["not_measured"].append(row)
            print(f"{row['model']}: {row['why']}", file=sys.stderr)
            continue
        results["rows"].append(row)
        ratios = ", ".join(
            f"{way} {next(iter(each['ratios'].values()))['median']:.2f} ({each['adds']})"
            for way, each in row["ways"].items()
        )
        print(f"{row['model']}, {row['mode']}: x {ratios}", file=sys.stderr, flush=True)
    print(table(results))
    if results["rows"] and not (args.quick or args.only):
        path: Path = results_file.save(results, RESULTS / f"{results_file.name(results)}.json")
        PAGE.write_text(page(), encoding="utf-8")
        print(f"Written: {path}, {PAGE}", file=sys.stderr)
    return 0
