"""Small residual blocks as people write them, and what the matcher is to make of each."""

import math

import torch
import torch.nn.functional as F
from torch import nn

K, H = 8, 12


def _make(forward, **parts):
    """A module with these submodules and parameters, and this forward."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            for name, part in parts.items():
                setattr(self, name, part())

    Block.forward = forward
    return Block()


def linear(n=K, k=K, **settings):
    return lambda: nn.Linear(k, n, **settings)


class LlamaNorm(nn.Module):
    def __init__(self, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(K) + 0.5), eps

    def forward(self, x):
        dtype = x.dtype
        x = x.to(torch.float32)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x.to(dtype)


def tanh_gelu(x):
    return (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    )


def drop_path(x, p, training):
    if not training:
        return x
    mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(1 - p)
    mask.div_(1 - p)
    return x * mask


MLP = {"fc1": linear(H), "fc2": linear(K, H), "norm": lambda: nn.LayerNorm(K)}

PARALLEL = {"a": linear(), **MLP}


def _into_the_branch(s, x):
    y = s.fc2(F.relu(s.fc1(x), inplace=True))
    y += x
    return y


def _into_the_skip(s, x):
    y = x * 1.0
    y += s.drop(s.fc1(x))
    return y


_DOWN = {"down": linear(K, H, bias=False)}


def _swiglu(s, x):
    h = s.norm(x)
    return x + s.down(F.silu(s.gate(h)) * s.up(h))


def _geglu(s, x):
    a, b = s.fc(s.norm(x)).chunk(2, dim=-1)
    return x + 0.5 * s.down(b * tanh_gelu(a))


def _reglu(s, x):
    z = s.fc(x)
    return s.norm(x + s.down(z[..., :H] * torch.relu(z[..., H:])))


def _one_norm(s, x):
    h = s.norm(x)
    y = s.a(h)
    y += 0.5 * s.fc2(F.gelu(s.fc1(h)))
    y += 0.25 * x
    return s.after(y)


# name -> (module, recipes that the report is to name of its last add, on a CPU)
BLOCKS = {
    "prenorm": (
        lambda: _make(lambda s, x: x + s.fc2(F.gelu(s.fc1(s.norm(x)))), **MLP),
        ["norm-linear-act norm=layer activation=gelu", "linear-add"],
    ),
    "layer scale": (
        lambda: _make(
            lambda s, x: x + s.gamma * s.fc2(F.gelu(s.fc1(s.norm(x)))),
            gamma=lambda: nn.Parameter(torch.rand(K)), **MLP,
        ),
        ["norm-linear-act norm=layer activation=gelu", "linear-gate-add gate=channel"],
    ),
    "attention tail": (
        lambda: _make(
            lambda s, x: x + s.drop(s.proj(torch.softmax(x, 1).transpose(0, 1).reshape(x.shape))),
            proj=linear(), drop=lambda: nn.Dropout(0.0),
        ),
        ["linear-add"],
    ),
    "gated tail": (
        lambda: _make(
            lambda s, x: x + s.down(F.silu(s.gate(s.norm(x))) * s.up(s.norm(x))),
            gate=linear(H), up=linear(H), down=linear(K, H, bias=False), norm=LlamaNorm,
        ),
        ["linear-add"],
    ),
    "gated, two weights": (
        lambda: _make(_swiglu, gate=linear(H), up=linear(H), **_DOWN, norm=LlamaNorm),
        [
            "norm-linear norm=rms eps=1e-06", "norm-linear norm=rms eps=1e-06", "silu(a) * b",
            "linear-add",
        ],
    ),
    "gated, packed": (
        lambda: _make(_geglu, fc=linear(2 * H), **_DOWN, norm=lambda: nn.LayerNorm(K)),
        ["norm-linear norm=layer", "gelu_tanh(a) * b", "linear-gate-add gate=scalar"],
    ),
    "gated, second half": (
        lambda: _make(_reglu, fc=linear(2 * H), **_DOWN, norm=lambda: nn.LayerNorm(K)),
        ["linear", "relu(a) * b", "linear-add-norm norm=layer"],
    ),
    "gated, F.glu": (
        lambda: _make(
            lambda s, x: x + s.down(F.dropout(F.glu(s.fc(x)), 0.0)), fc=linear(2 * H), **_DOWN
        ),
        ["linear", "sigmoid(a) * b", "linear-add"],
    ),
    "postnorm": (
        lambda: _make(lambda s, x: s.norm(x + s.fc2(F.relu(s.fc1(x)))), **MLP),
        ["linear-act activation=relu", "linear-add-norm norm=layer"],
    ),
    "bert output": (
        lambda: _make(
            lambda s, x: s.norm(s.fc1(torch.tanh(x)) + x),
            fc1=linear(), norm=lambda: nn.LayerNorm(K),
        ),
        ["act-linear-add-norm norm=layer activation=tanh"],
    ),
    "no norm": (
        lambda: _make(lambda s, x: x + s.fc2(F.silu(s.fc1(x))), fc1=linear(H), fc2=linear(K, H)),
        ["linear-act activation=silu", "linear-add"],
    ),
    "no norm, wide": (
        lambda: _make(
            lambda s, x: x + s.fc2(F.silu(s.fc1(x))), fc1=linear(9000), fc2=linear(K, 9000)
        ),
        ["act-linear-add activation=silu"],
    ),
    "branch norm": (
        lambda: _make(lambda s, x: x + s.norm(s.fc2(F.silu(s.fc1(x)))), **MLP),
        ["linear-act activation=silu", "linear-norm-add norm=layer"],
    ),
    "half a branch": (
        lambda: _make(lambda s, x: x + 0.5 * s.fc2(tanh_gelu(s.fc1(s.norm(x)))), **MLP),
        ["norm-linear-act norm=layer activation=gelu_tanh", "linear-gate-add gate=scalar"],
    ),
    "scaled skip": (
        lambda: _make(lambda s, x: x * 0.25 + s.fc1(x), fc1=linear()),
        ["linear-add residual_scale=0.25"],
    ),
    "in place": (
        lambda: _make(lambda s, x: (x * 1.0).add_(s.fc2(F.gelu(s.fc1(s.norm(x))))), **MLP),
        ["norm-linear-act norm=layer activation=gelu", "linear-add"],
    ),
    "in place into the branch": (
        lambda: _make(_into_the_branch, fc1=linear(H), fc2=linear(K, H)),
        ["linear-act activation=relu", "linear-add"],
    ),
    "in place into the skip": (
        lambda: _make(_into_the_skip, fc1=linear(), drop=lambda: nn.Dropout(0.0, inplace=True)),
        ["linear-add"],
    ),
    "layer scale in place": (
        lambda: _make(
            lambda s, x: x + s.fc1(x).mul_(s.gamma), fc1=linear(),
            gamma=lambda: nn.Parameter(torch.rand(1, 1, K)),
        ),
        ["linear-gate-add gate=channel"],
    ),
    "one learned factor": (
        lambda: _make(
            lambda s, x: torch.add(x, s.fc1(x) * s.alpha), fc1=linear(),
            alpha=lambda: nn.Parameter(torch.rand(())),
        ),
        ["linear-gate-add gate=scalar"],
    ),
    "half a sequential": (
        lambda: _make(
            lambda s, x: s.norm(x + s.ff(x) / 2), norm=lambda: nn.LayerNorm(K),
            ff=lambda: nn.Sequential(
                nn.LayerNorm(K), nn.Linear(K, H), nn.SiLU(), nn.Dropout(0.0), nn.Linear(H, K)
            ),
        ),
        [
            "norm-linear-act norm=layer activation=silu",
            "linear-gate-add-norm norm=layer gate=scalar",
        ],
    ),
    "parallel": (
        lambda: _make(lambda s, x: x + s.a(x) + s.fc2(F.gelu(s.fc1(s.norm(x)))), **PARALLEL),
        ["norm-linear-act norm=layer activation=gelu", "linear-add"],
    ),
    "a sum of branches": (
        lambda: _make(lambda s, x: x + (s.a(x) + s.fc2(F.gelu(s.fc1(s.norm(x))))), **PARALLEL),
        ["linear-add", "norm-linear-act norm=layer activation=gelu", "linear-add"],
    ),
    "a sum of branches of one norm": (
        lambda: _make(_one_norm, **PARALLEL, after=lambda: nn.LayerNorm(K)),
        [
            "linear-add residual_scale=0.25",
            "act-linear-gate-add-norm norm=layer activation=gelu gate=scalar",
        ],
    ),
    "three matmuls": (
        lambda: _make(
            lambda s, x: x + s.fc3(F.relu(s.n2(s.fc2(F.relu(s.n1(s.fc1(x))))))),
            fc1=linear(H), fc2=linear(H, H), fc3=linear(K, H),
            n1=lambda: nn.LayerNorm(H), n2=lambda: nn.LayerNorm(H),
        ),
        ["linear-norm-act norm=layer activation=relu"] * 2 + ["linear-add"],
    ),
    "three matmuls, no norm between": (
        lambda: _make(
            lambda s, x: x + s.fc3(F.relu(s.fc2(F.relu(s.fc1(s.norm(x)))))),
            fc1=linear(H), fc2=linear(H, H), fc3=linear(K, H), norm=lambda: nn.LayerNorm(K),
        ),
        [
            "norm-linear-act norm=layer activation=relu", "linear-act activation=relu",
            "linear-add",
        ],
    ),
    "activations first": (
        lambda: _make(
            lambda s, x: x + s.fc2(F.relu(s.fc1(F.relu(x)))), fc1=linear(H), fc2=linear(K, H)
        ),
        ["act-linear activation=relu", "act-linear-add activation=relu"],
    ),
    "norms and activations first": (
        lambda: _make(
            lambda s, x: x + s.fc2(F.relu(s.n2(s.fc1(F.relu(s.n1(x)))))),
            fc1=linear(H), fc2=linear(K, H),
            n1=lambda: nn.LayerNorm(K), n2=lambda: nn.LayerNorm(H),
        ),
        [
            "norm-act-linear norm=layer activation=relu",
            "norm-act-linear-add norm=layer activation=relu",
        ],
    ),
    "linear shortcut": (
        lambda: _make(
            lambda s, x: s.short(x) + s.fc2(F.relu(s.fc1(s.norm(x)))), short=linear(), **MLP
        ),
        ["norm-linear-act norm=layer activation=relu", "linear-add"],
    ),
    "spelled out": (
        lambda: _make(
            lambda s, x: x + s.fc1(s.norm(x)), fc1=linear(), norm=LlamaNorm
        ),
        ["norm-linear-add norm=rms eps=1e-06"],
    ),
    "conv1d of GPT-2": (
        lambda: _make(
            lambda s, x: x + torch.addmm(s.b, x.view(-1, K), s.w).view(x.shape),
            w=lambda: nn.Parameter(torch.randn(K, K) / 3), b=lambda: nn.Parameter(torch.randn(K)),
        ),
        ["linear-add"],
    ),
    "two branches": (
        lambda: _make(lambda s, x: x + s.fc1(x) + s.fc3(x), fc1=linear(), fc3=linear()),
        ["linear-add"],
    ),
    "skip from a norm": (
        lambda: _make(
            lambda s, x: (h := s.norm(x)) + s.fc1(h), fc1=linear(), norm=lambda: nn.LayerNorm(K)
        ),
        ["linear-add"],
    ),
    "sequential": (
        lambda: _make(
            lambda s, x: x + s.net(x),
            net=lambda: nn.Sequential(
                nn.RMSNorm(K, 1e-3), nn.Linear(K, H), nn.Mish(), nn.Linear(H, K)
            ),
        ),
        ["norm-linear-act norm=rms activation=mish eps=0.001", "linear-add"],
    ),
}  # fmt: skip


TWICE = ("two branches", "parallel")  # both of their adds are found and fused


def _keep(s, x):
    h = s.fc1(x)
    return x + F.relu(h), h


def _write(s, x):
    y = x * 1.0
    z = s.fc1(y)
    y.mul_(2)
    return y + z, z


def _overwritten(s, x):
    y, h = x * 1.0, F.relu(x)
    z = s.fc1(h)
    h.zero_()
    return y + z


def _sum_seen(s, x):
    y = s.a(x.cos()) + s.fc1(x.sin()).cos()
    return x + y, y


def _relu_seen(s, x):
    h = s.fc1(x)
    return x + s.fc2(F.relu(h, inplace=True)), h  # h, after the ReLU


def _seen_again(s, x):
    y = x * 1.0
    z = y.view(-1)
    y += s.fc1(x)
    return y + z.view_as(y)


def _spread(s, x):
    h = s.fc1(x)
    scale = torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return x + h * scale, scale


def _autocast(s, x):
    with torch.autocast("cpu", torch.bfloat16):
        y = s.fc1(x)
    return x + torch.relu(y)


# name -> (module, a word of the reason)
LEFT = {
    "read elsewhere": (lambda: _make(_keep, fc1=linear()), "read elsewhere"),
    "overwritten in between": (lambda: _make(_overwritten, fc1=linear()), "writes into"),
    "what it added to is seen": (lambda: _make(_seen_again, fc1=linear()), "in place"),
    "what its ReLU wrote into is seen": (
        lambda: _make(_relu_seen, fc1=linear(H), fc2=linear(K, H)), "read"
    ),
    "a factor in the add": (
        lambda: _make(lambda s, x: torch.add(x, s.fc1(x), alpha=0.5), fc1=linear()),
        "it adds 0.5 times its second operand",
    ),
    "a sum with what is no branch": (
        lambda: _make(lambda s, x: x + (s.a(x) + x.cos()), a=linear()), "its branch ends in a sum"
    ),
    "a sum that is seen": (
        lambda: _make(_sum_seen, a=linear(), fc1=linear()), "its branch ends in a sum"
    ),
    "the caller's memory": (lambda: _make(lambda s, x: x.add_(s.fc1(x)), fc1=linear()), "in place"),
    "autocast ends within": (lambda: _make(_autocast, fc1=linear()), "switched"),
    "a gate that varies": (
        lambda: _make(lambda s, x: x + s.fc1(x) * x.mean(-1, keepdim=True), fc1=linear()),
        "a product of two activations",
    ),
    "a gated linear unit last": (
        lambda: _make(lambda s, x: x + F.glu(s.fc1(x)), fc1=linear(2 * K)),
        "a gated linear unit, with no product after it",
    ),
    "another activation": (
        lambda: _make(lambda s, x: x + F.leaky_relu(s.fc1(x), 0.3), fc1=linear()),
        "leaky_relu",
    ),
    "two activations": (
        lambda: _make(lambda s, x: x + torch.tanh(F.relu(s.fc1(x))), fc1=linear()),
        "two stages 'act'",
    ),
    "a norm's inside is read": (
        lambda: _make(_spread, fc1=linear()),
        "read elsewhere",
    ),
    "a norm that is none": (
        lambda: _make(
            lambda s, x: x + (h := s.fc1(x)) / (h.std(-1, keepdim=True) + 1e-5), fc1=linear()
        ),
        "its branch ends in",
    ),
}  # fmt: skip

# Sums that are no residual adds.
NOT_RESIDUAL = {
    "positions": lambda: _make(
        lambda s, x: s.fc1(x + s.p), p=lambda: nn.Parameter(torch.randn(6, K)), fc1=linear()
    ),
    "rotary": lambda: _make(lambda s, x: x.cos() * x + x.sin() * x.flip(-1)),
    "gates of an LSTM": lambda: _make(
        lambda s, x: torch.sigmoid(x) * torch.tanh(x) + torch.sigmoid(x) * x
    ),
    "a bias": lambda: _make(lambda s, x: x.matmul(s.w) + s.b, w=lambda: nn.Parameter(torch.eye(K)),
                            b=lambda: nn.Parameter(torch.randn(K))),
}  # fmt: skip
