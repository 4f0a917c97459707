"""Who runs against whom. Contenders of one job share its parameters and inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedres import FusedResidual, backends

from .cases import (
    BACKWARD_GRAPH,
    DTYPES,
    GRAPH,
    GRAPHS,
    HOST,
    RECORD,
    STEPS,
    Call,
    Job,
    Task,
    product_dtype,
)
from .goals import asked

Layer = Callable[..., Tensor]
Makers = dict[str, Callable[[], Call]]  # name -> what makes its call; making it may fail

FUSED_BACKENDS = ("cpu", "triton", "cuda")
RIVALS = ("eager", "compile", "compile-max", "functional")  # what fused must not lose to

ABOUT = {
    "fused": "fusedres, with the backend that `auto` takes",
    "eager": "torch's layers one after another, written by hand",
    "functional": "torch.nn.functional without module calls: eager's shortest host path",
    "compile": "torch.compile(eager, dynamic=False, fullgraph=True)",
    "compile-max": "the same with mode='max-autotune' (in a CUDA graph of ours, without its own)",
    "matmul": "the bare products by torch.mm: x @ weight.T; in a backward pass also dy @ weight "
    "and dy.T @ x",
    "cpu, triton, cuda": "fusedres with that backend, where `auto` takes another",
    "training": "fusedres's forward with all that backward needs saved, beside inference",
    "copy": "x copied: the traffic of a layer of no arithmetic",
    "gelu_tanh": "fusedres with the tanh form of GELU; where a goal asks for it",
    "linear": "F.linear alone, bias included; where a goal asks for it",
}


def makers(job: Job, task: Task, compiled: tuple[str, ...]) -> Makers:
    """The contenders of a row, fused last; of torch.compile's the `compiled` ones."""
    mode = task.mode

    def run(make: Callable[[], Layer]) -> Callable[[], Call]:
        return lambda: job.call(make(), mode)

    job.set_mode(mode)
    found: Makers = {"eager": run(lambda: job.eager)}
    if task.case.group == HOST:
        found["functional"] = run(lambda: _functional(job))
    found |= {name: run(partial(_compiled, job, name, mode)) for name in compiled}
    if task.case.group != HOST:
        found["matmul"] = lambda: _products(job, mode)
    found |= {name: run(partial(with_backend, job.fused, name)) for name in others(job)}
    if mode == GRAPH:
        found["training"] = lambda: job.call(job.fused, RECORD)
        found["copy"] = lambda: _copy(job)
    if "gelu_tanh" in asked(task):
        found["gelu_tanh"] = run(lambda: job.layer("gelu_tanh"))
    if "linear" in asked(task):
        found["linear"] = run(lambda: lambda x, *_: job.first.linear(x))
    return found | {"fused": run(lambda: job.fused)}


def others(job: Job) -> list[str]:
    """Fused backends that can run the job beside the one that `auto` takes, in the job's mode."""
    N, K = job.first.linear.weight.shape
    layer = job.spec, job.where["dtype"], job.device, N, K
    taken = job.backend.removesuffix("+triton")  # "cuda+triton" is "cuda", for wide rows
    able = [name for name in FUSED_BACKENDS if backends.why_not(name, *layer) is None]
    return [name for name in able if name != taken]


def with_backend(layer: Any, name: str) -> Any:
    """The same layer, parameters included, on a named backend."""
    twin = copy.deepcopy(layer, {id(p): p for p in layer.parameters()})
    for module in twin.modules():
        if isinstance(module, FusedResidual):
            module.backend = name
    return twin


def _functional(job: Job) -> Layer:
    """Order note with ReLU, as TINY has it."""
    linear, norm, features = job.first.linear, job.norm, (job.case.features,)
    weight, bias, gamma, beta = linear.weight, linear.bias, norm.weight, norm.bias
    return lambda x: F.relu(F.layer_norm(F.linear(x, weight, bias), features, gamma, beta)) + x


def _compiled(job: Job, name: str, mode: str) -> Layer:
    best = "max-autotune" + "-no-cudagraphs" * (mode in GRAPHS)
    settings = {"mode": best} if name == "compile-max" else {}
    return torch.compile(job.eager, dynamic=False, fullgraph=True, **settings)


def _products(job: Job, mode: str) -> Call:
    """With two matmuls, random h (M, hidden) stands for what is between them, and for dh."""
    dtype = DTYPES[product_dtype(job.dtype)]
    weights = [linear.weight.detach().to(dtype) for linear in job.linears]
    h = [torch.randn(job.case.rows, weight.shape[0], **job.where) for weight in weights[:-1]]
    chains = [[operands.inputs[0].detach(), *h, operands.dy] for operands in job.sets]
    chains = [[t.to(dtype) for t in chain] for chain in chains]
    turns = cycle([list(zip(chain, weights, chain[1:], strict=False)) for chain in chains])
    forward, backward = mode != BACKWARD_GRAPH, mode in (*STEPS, BACKWARD_GRAPH)

    def run() -> None:
        for a, weight, da in next(turns):
            if forward:
                torch.mm(a, weight.t())
            if backward:
                torch.mm(da, weight)
                torch.mm(da.t(), a)

    return run


def _copy(job: Job) -> Call:
    turns = cycle([operands.inputs[0].detach() for operands in job.sets])
    copied = torch.empty_like(job.inputs[0])
    return lambda: copied.copy_(next(turns))
