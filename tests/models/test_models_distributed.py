"""Two processes over gloo: converted and compiled models under DDP and FSDP2 give one process's
gradients on the whole batch.
"""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import fusedres
from blocks import K
from fusedres.models.compiled import backend
from test_convert_sums import Block, calls

M, WORLD = 6, 2

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="spawns two processes over gloo"),
]


def net():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Linear(K, K), Block())


def batch():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(M, 5, K, generator=generator) for _ in range(2))


def expected():
    """y and the gradients of the mean over the whole batch."""
    model, (x, c) = net(), batch()
    y = model(x)
    (y * c).sum((1, 2)).mean().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def assert_same(ours, plain):
    assert (ours - plain).abs().max() <= 4e-6 * plain.abs().max()


def check(rank, wrap, whole):
    model = wrap(net())
    x, c = (t.chunk(WORLD)[rank] for t in batch())
    y = model(x)
    (y * c).sum((1, 2)).mean().backward()
    plain_y, plain_grads = expected()
    assert_same(y.detach(), plain_y.chunk(WORLD)[rank])
    for p, grad in zip(model.parameters(), plain_grads, strict=True):
        assert_same(whole(p.grad), grad)
    return model


def converted(model):
    x, _ = batch()
    report = fusedres.convert(model, x[:3], when="always")
    assert len(report.residual_adds.fused) == 2
    return model


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def ddp_compiled(model):
    torch._dynamo.reset()
    return torch.compile(ddp(model), backend=backend, options={"when": "always"})


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    try:
        model = check(rank, lambda m: ddp(converted(m)), lambda g: g)
        assert calls(model.module, next(batch())[:3]) == 2
        model = check(rank, lambda m: fsdp(converted(m)), lambda g: g.full_tensor())
        assert calls(model, next(batch())[:3]) == 2
        model = check(rank, ddp_compiled, lambda g: g)
        report = fusedres.report(model)
        assert len(report.fused) == 2, report
        assert copy.deepcopy(converted(net()))[0].fc1.weight.shape == (12, K)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DDP, FSDP2, DDP compiled: one pair of processes, whose start takes long."""
    mp.spawn(worker, (str(tmp_path / "rendezvous"),), WORLD)
