"""Two processes over gloo: DDP and FSDP2 give one process's gradients on the whole batch."""

import copy
import sys
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from fusedres import FusedResidual, Residual, ops
from fusedres.backends import native

K, M, WORLD = 8, 6, 2

pytestmark = [
    pytest.mark.skipif(not dist.is_available(), reason="torch was built without torch.distributed"),
    pytest.mark.skipif(sys.platform != "linux", reason="spawns two processes over gloo"),
]


def net(kind):
    torch.manual_seed(0)
    return nn.Sequential(kind(K, 2 * K, activation="gelu"), kind(2 * K, order="preact", norm="rms"))


def expected():
    """y and the gradients of the mean over the whole batch, in plain torch."""
    model = net(Residual)
    x, c = batch()
    y = model(x)
    (y * c).sum(1).mean().backward()
    return y.detach(), [p.grad for p in model.parameters()]


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(M, K, generator=generator), torch.randn(M, 2 * K, generator=generator)


def assert_same(ours, plain):
    assert (ours - plain).abs().max() <= 2e-6 * plain.abs().max()


def check(rank, wrap, whole):
    """One process's share of the batch through the wrapped model, by three fused launches."""
    model = wrap(net(FusedResidual))
    x, c = (t.chunk(WORLD)[rank] for t in batch())
    launches, op = [], ops.FORWARD["cpu"]
    with mock.patch.dict(ops.FORWARD, {"cpu": lambda *args: launches.append(args) or op(*args)}):
        y = model(x)
    assert len(launches) == 3 or wrap is ddp_compiled  # where they are in the graph
    (y * c).sum(1).mean().backward()
    plain_y, plain_grads = expected()
    assert_same(y.detach(), plain_y.chunk(WORLD)[rank])
    parameters = list(model.parameters())
    assert len(parameters) == len(plain_grads)
    for p, grad in zip(parameters, plain_grads, strict=True):
        assert_same(whole(p.grad), grad)


def ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def ddp_compiled(model):
    torch._dynamo.reset()
    return torch.compile(nn.parallel.DistributedDataParallel(model), backend="aot_eager")


def fsdp(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def tensor_parallel():
    """DTensor weights: the layer runs as ordinary torch ops, for which DTensor has rules."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor

    torch.manual_seed(3)  # the same layer in each process
    mesh = init_device_mesh("cpu", (WORLD,))
    layer = FusedResidual(K)
    plain = copy.deepcopy(layer)
    layer = distribute_module(layer, mesh)
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(2))
    y = layer(distribute_tensor(x, mesh, [Replicate()]))
    assert_same(y.full_tensor().detach(), plain(x).detach())


def worker(rank, path):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    try:
        check(rank, ddp, lambda g: g)
        check(rank, ddp_compiled, lambda g: g)
        check(rank, fsdp, lambda g: g.full_tensor())
        tensor_parallel()
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """DDP, DDP compiled, FSDP2, DTensor weights: one pair of processes, whose start takes long."""
    if native.missing:
        pytest.skip(native.missing)
    mp.spawn(worker, (str(tmp_path / "rendezvous"),), WORLD)
