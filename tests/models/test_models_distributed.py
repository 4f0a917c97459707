"""Two processes over gloo: converted and compiled models under DDP, FSDP2, SyncBatchNorm and tensor
parallelism give one process's gradients on the whole batch.
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


class Tabular(nn.Module):
    """One that sums over the batch."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.BatchNorm1d(K), nn.Linear(K, 12), nn.Linear(12, K)

    def forward(self, x):
        return x + self.fc2(torch.relu(self.fc1(self.norm(x.flatten(0, 1))))).view_as(x)


def batch_net():
    torch.manual_seed(0)
    return nn.Sequential(Tabular(), nn.Linear(K, K), Tabular())


def batch():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(M, 5, K, generator=generator) for _ in range(2))


def expected(make):
    """y, gradients of the mean over the whole batch, and buffers."""
    model, (x, c) = make(), batch()
    y = model(x)
    (y * c).sum((1, 2)).mean().backward()
    return y.detach(), [p.grad for p in model.parameters()], list(model.buffers())


def assert_same(ours, plain):
    assert (ours - plain).abs().max() <= 4e-6 * plain.abs().max()


def check(rank, wrap, whole=lambda g: g, make=net, shared=True):
    """`shared`: each process has its share of the batch, and the mean's gradient of all."""
    model = wrap(make())
    x, c = (t.chunk(WORLD)[rank] if shared else t for t in batch())
    y = model(x)
    (y * c).sum((1, 2)).mean().backward()
    plain_y, plain_grads, buffers = expected(make)
    assert_same(y.detach(), plain_y.chunk(WORLD)[rank] if shared else plain_y)
    for p, grad in zip(model.parameters(), plain_grads, strict=True):
        assert_same(whole(p.grad), grad)
    for ours, plain in zip(model.buffers(), buffers, strict=True):
        assert_same(ours, plain)
    return model


def converted(model, fused=2):
    x, _ = batch()
    report = fusedres.convert(model, x[:3], when="always")
    assert len(report.residual_adds.fused) == fused, report
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


def fsdp_whole(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def fsdp_each_child(model):
    """The linears inside blocks, too: their weights are whole only while they are called."""
    from torch.distributed.fsdp import fully_shard

    for module in reversed(list(model.modules())):
        if next(module.parameters(), None) is not None:
            fully_shard(module)
    return model


def tensor_parallel(model):
    """Hidden features cut in two, by hooks of the linears, whose weights are DTensors."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0.fc1": ColwiseParallel(), "0.fc2": RowwiseParallel()}
    plan |= {"2.fc1": ColwiseParallel(), "2.fc2": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


def full(g):
    return g.full_tensor() if hasattr(g, "full_tensor") else g


def fused_mlp():
    torch.manual_seed(0)
    return nn.Sequential(fusedres.FusedResidualMLP(K, 12), nn.Linear(K, K))


def tensor_parallel_mlp(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    plan = {"0.fc1.linear": ColwiseParallel(), "0.fc2.linear": RowwiseParallel()}
    return parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)


def check_sync(order):
    """Statistics of both processes, for which torch has nothing on a CPU: the same error as before,
    though the model was converted while there was one process.
    """
    x = next(batch())
    model, plain = order(batch_net()), batch_net().eval()
    assert_same(model.eval()(x), plain(x))
    with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on"):
        model.train()(x)


sync = nn.SyncBatchNorm.convert_sync_batchnorm


def worker(rank, path):
    torch.set_num_threads(1)
    alone = converted(sync(batch_net()))
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=WORLD)
    x = next(batch())[:3]
    try:
        model = check(rank, lambda m: ddp(converted(m)))
        assert calls(model.module, x) == 2
        # fused where convert comes first, and where it sees parameters as they are between calls
        for shard, fused, late in ((fsdp, 2, 0), (fsdp_whole, 2, 2), (fsdp_each_child, 0, 0)):
            model = check(rank, lambda m, shard=shard: shard(converted(m)), full)
            assert calls(model, x) == fused
            fusedres.revert(model)
            assert calls(model, x) == 0
            assert_same(model(x).detach(), net()(x).detach())
            check(rank, lambda m, shard=shard, late=late: converted(shard(m), late), full)
        for order in (lambda m: sync(converted(m)), lambda _: alone):
            check_sync(order)
        check(rank, lambda m: tensor_parallel(converted(m)), full, shared=False)
        check(rank, lambda m: converted(tensor_parallel(m), 0), full, shared=False)
        check(rank, tensor_parallel_mlp, full, fused_mlp, shared=False)
        model = check(rank, ddp_compiled)
        report = fusedres.report(model)
        assert len(report.fused) == 2, report
        assert copy.deepcopy(converted(net()))[0].fc1.weight.shape == (12, K)
    finally:
        dist.destroy_process_group()


def test_two_processes(tmp_path):
    """All in one pair of processes, whose start takes long."""
    mp.spawn(worker, (str(tmp_path / "rendezvous"),), WORLD)
