"""The second table of docs/models.md: what fusing does to the time of some models at real widths.

Eager against convert, and torch.compile's "eager" backend, which has the same guards, against ours;
best times of all in turn.
"""

from __future__ import annotations

import copy
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fusedres
from fusedres.models.compiled import backend

ROUNDS = 12
WHEN = ("faster", "always")


def _vit() -> tuple[nn.Module, Any]:
    import timm

    return timm.create_model("vit_tiny_patch16_224", depth=4), torch.randn(2, 3, 224, 224)


def _bert() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.BertConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024
    )
    return transformers.BertModel(config), torch.randint(0, 1000, (4, 64))


def _llama() -> tuple[nn.Module, Any]:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=688,
        vocab_size=1000, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaModel(config), torch.randint(0, 1000, (4, 64))


def _tabular() -> tuple[nn.Module, Any]:
    import rtdl_revisiting_models as rtdl

    net = rtdl.ResNet(
        d_in=32, d_out=1, n_blocks=4, d_block=192, d_hidden=None, d_hidden_multiplier=2.0,
        dropout1=0.0, dropout2=0.0,
    )  # fmt: skip
    return net, torch.randn(256, 32)


MODELS = {
    "ViT-Ti, 4 blocks, 2 x 197 tokens": _vit,
    "BERT, width 256, 4 x 64 tokens": _bert,
    "Llama, width 256, 4 x 64 tokens": _llama,
    "RTDL ResNet, width 192, 256 rows": _tabular,
}


def _run(call: Callable[[Any], Any], x: Any, trains: bool) -> None:
    y = call(x)
    y = y if isinstance(y, Tensor) else y[0]
    if trains:
        y.sum().backward()


def _best(calls: dict[str, Callable[[Any], Any]], x: Any, trains: bool) -> dict[str, float]:
    best = dict.fromkeys(calls, float("inf"))
    with torch.set_grad_enabled(trains):
        for turn in range(ROUNDS + 2):
            for name, call in calls.items():
                begin = time.perf_counter()
                _run(call, x, trains)
                if turn > 1:
                    best[name] = min(best[name], time.perf_counter() - begin)
    return best


def _contenders(model: nn.Module, x: Any, trains: bool) -> tuple[dict[str, Any], str]:
    """The calls by name, and how many residual adds convert fuses by default."""
    torch._dynamo.reset()
    fused = ""
    calls: dict[str, Any] = {"eager": copy.deepcopy(model)}
    calls["compiled"] = torch.compile(copy.deepcopy(model), backend="eager")
    for when in WHEN:
        calls[f"compile {when}"] = torch.compile(
            copy.deepcopy(model), backend=backend, options={"when": when}
        )
        converted = copy.deepcopy(model)
        with torch.set_grad_enabled(trains):
            adds = fusedres.convert(converted, x, when=when).residual_adds
        fused = f"{len(adds.fused)} of {adds.found}" if when == WHEN[0] else fused
        calls[f"convert {when}"] = converted
    return calls, fused


def times() -> str:
    """The table: how many times faster than without fusing."""
    columns = [f"{way}, {when}" for way in ("compile", "convert") for when in WHEN]
    head = f"| model | what | fused, faster | eager, ms | {' | '.join(columns)} |"
    lines = [head, "|---|---" + "|--:" * 6 + "|"]
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model, x = make()
        for what, trains in (("forward", False), ("step", True)):
            model.train(trains)
            calls, fused = _contenders(model, x, trains)
            best = _best(calls, x, trains)
            cells = [fused, f"{1e3 * best['eager']:.1f}"]
            for way, base in (("compile", "compiled"), ("convert", "eager")):
                cells += [f"{best[base] / best[f'{way} {when}']:.2f}" for when in WHEN]
            lines.append(f"| {name} | {what} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    threads = torch.get_num_threads()
    note = f"torch {torch.__version__}, {platform.processor() or platform.machine()}, "
    return "\n".join([*lines, "", f"{note}{threads} thread{'s' * (threads > 1)}."])
