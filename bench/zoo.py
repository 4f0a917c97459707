"""Public models at small sizes, with random weights: what docs/models.md and the tests are made of.

Each entry makes a model and its arguments; ImportError where its package is not installed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read where transformers and timm are imported
Made = tuple[nn.Module, tuple[Any, ...]]
WIDTH, HIDDEN, HEADS, DEPTH, WORDS = 32, 64, 4, 2, 50
ZOO: dict[str, Callable[[], Made]] = {}


def _image(size: int = 32) -> Tensor:
    return torch.randn(2, 3, size, size)


def _words() -> Tensor:
    return torch.randint(0, WORDS, (2, 6))


def _rows(features: int) -> Tensor:
    return torch.randn(16, features)


def _timm(name: str, size: int = 32, **settings: Any) -> Callable[[], Made]:
    def make() -> Made:
        import timm

        return timm.create_model(name, num_classes=10, **settings), (_image(size),)

    return make


def _transformers(
    model: str, config: str, inputs: Callable[[], Any] = _words, **settings: Any
) -> Callable[[], Made]:
    def make() -> Made:
        import transformers

        transformers.logging.set_verbosity_error()
        made = getattr(transformers, config)(**settings)
        return getattr(transformers, model)(made), (inputs(),)

    return make


def _mixer(**layers: str) -> Callable[[], Made]:
    """timm's MlpMixer with other layers: names of its module or of timm.layers."""

    def make() -> Made:
        from timm import layers as common
        from timm.models import mlp_mixer

        found = {k: getattr(mlp_mixer, v, None) or getattr(common, v) for k, v in layers.items()}
        net = mlp_mixer.MlpMixer(
            num_classes=10, img_size=32, patch_size=16, num_blocks=DEPTH, embed_dim=64,
            mlp_ratio=(0.5, 4.0) if not layers else 4, **found,
        )  # fmt: skip
        return net, (_image(),)

    return make


_TEXT: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "vocab_size": WORDS,
}
_CAUSAL = {**_TEXT, "use_cache": False, "pad_token_id": 0}
_VISION = {**{k: v for k, v in _TEXT.items() if k != "vocab_size"}, "image_size": 32}
_SMALL = {"img_size": 32, "depth": DEPTH}

for _name, _settings in {
    "vit_tiny_patch16_224": {**_SMALL, "init_values": 0.1},
    "deit3_small_patch16_224": {**_SMALL},
    "cait_xxs24_224": {**_SMALL},
    "beit_base_patch16_224": {**_SMALL, "embed_dim": 64, "num_heads": 4},
    "eva02_tiny_patch14_224": {**_SMALL, "patch_size": 8},
}.items():
    ZOO[f"timm {_name}"] = _timm(_name, **_settings)
ZOO["timm MLP-Mixer"] = _mixer()
ZOO["timm ResMLP"] = _mixer(block_layer="ResBlock", norm_layer="Affine")
ZOO["timm gMLP"] = _mixer(block_layer="SpatialGatingBlock", mlp_layer="GatedMlp")
_STAGES: dict[str, Any] = {"depths": (1, 2), "embed_dim": 32, "num_heads": (2, 4)}
ZOO["timm swin_tiny"] = _timm("swin_tiny_patch4_window7_224", 56, img_size=56, **_STAGES)
ZOO["timm swinv2_cr_tiny"] = _timm(
    "swinv2_cr_tiny_224", 64, img_size=64, window_size=(2, 2), **_STAGES
)
ZOO["timm convnext_atto"] = _timm("convnext_atto", conv_mlp=False, depths=(1, 1, 1, 1))

for _name, _config, _settings in (
    ("BertModel", "BertConfig", _TEXT),
    ("RobertaModel", "RobertaConfig", _TEXT),
    ("ElectraModel", "ElectraConfig", {**_TEXT, "embedding_size": WIDTH}),
    ("AlbertModel", "AlbertConfig", {**_TEXT, "embedding_size": WIDTH}),
    ("LlamaModel", "LlamaConfig", _CAUSAL),
    ("MistralModel", "MistralConfig", {**_CAUSAL, "num_key_value_heads": HEADS}),
    ("Qwen2Model", "Qwen2Config", {**_CAUSAL, "num_key_value_heads": HEADS}),
    ("GemmaModel", "GemmaConfig", {**_CAUSAL, "num_key_value_heads": HEADS, "head_dim": 8}),
    ("GPTNeoXModel", "GPTNeoXConfig", {**_CAUSAL}),
):
    ZOO[f"transformers {_name}"] = _transformers(_name, _config, **_settings)  # type: ignore[arg-type]
ZOO["transformers DistilBertModel"] = _transformers(
    "DistilBertModel", "DistilBertConfig",
    dim=WIDTH, hidden_dim=HIDDEN, n_layers=DEPTH, n_heads=HEADS, vocab_size=WORDS,
)  # fmt: skip
ZOO["transformers GPT2Model"] = _transformers(
    "GPT2Model", "GPT2Config",
    n_embd=WIDTH, n_layer=DEPTH, n_head=HEADS, vocab_size=WORDS, use_cache=False,
)  # fmt: skip
ZOO["transformers OPTModel"] = _transformers(
    "OPTModel", "OPTConfig", ffn_dim=HIDDEN, word_embed_proj_dim=WIDTH, **_CAUSAL
)
ZOO["transformers T5EncoderModel"] = _transformers(
    "T5EncoderModel", "T5Config",
    d_model=WIDTH, d_ff=HIDDEN, d_kv=8, num_layers=DEPTH, num_heads=HEADS, vocab_size=WORDS,
)  # fmt: skip
ZOO["transformers ViTModel"] = _transformers(
    "ViTModel", "ViTConfig", _image, patch_size=8, **_VISION
)
ZOO["transformers CLIPVisionModel"] = _transformers(
    "CLIPVisionModel", "CLIPVisionConfig", _image, patch_size=8, **_VISION
)
ZOO["transformers Wav2Vec2ConformerModel"] = _transformers(
    "Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", lambda: torch.randn(2, 400),
    conv_depthwise_kernel_size=3, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
    conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 3), layerdrop=0.0,
    mask_time_prob=0.0, **_TEXT,
)  # fmt: skip


def _entry(name: str) -> Callable[[Callable[[], Made]], Callable[[], Made]]:
    def add(make: Callable[[], Made]) -> Callable[[], Made]:
        ZOO[name] = make
        return make

    return add


@_entry("rtdl ResNet")
def _resnet() -> Made:
    import rtdl_revisiting_models as rtdl

    net = rtdl.ResNet(
        d_in=10, d_out=1, n_blocks=DEPTH, d_block=WIDTH, d_hidden=None,
        d_hidden_multiplier=2.0, dropout1=0.1, dropout2=0.1,
    )  # fmt: skip
    return net, (_rows(10),)


@_entry("rtdl FTTransformer")
def _ft_transformer() -> Made:
    import rtdl_revisiting_models as rtdl

    net = rtdl.FTTransformer(
        n_cont_features=5, cat_cardinalities=[], d_out=1, n_blocks=DEPTH, d_block=WIDTH,
        attention_n_heads=HEADS, attention_dropout=0.1, ffn_d_hidden=None,
        ffn_d_hidden_multiplier=2.0, ffn_dropout=0.1, residual_dropout=0.0,
    )  # fmt: skip
    return net, (_rows(5), None)


@_entry("torch TransformerEncoder")
def _encoder() -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True)
    return nn.TransformerEncoder(layer, DEPTH), (torch.randn(2, 5, WIDTH),)


@_entry("torch TransformerEncoder, norm first")
def _encoder_norm_first() -> Made:
    layer = nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, batch_first=True, norm_first=True)
    net = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
    return net, (torch.randn(2, 5, WIDTH),)


@_entry("torch TransformerDecoder")
def _decoder() -> Made:
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, HIDDEN, activation="gelu")
    memory = torch.randn(7, 2, WIDTH)
    return nn.TransformerDecoder(layer, DEPTH), (torch.randn(5, 2, WIDTH), memory)


class _Prepared(nn.Module):
    """A net of arguments that are made from tensors first, as tables and graphs are."""

    def __init__(self, net: nn.Module, prepare: Callable[..., tuple[Any, ...]]) -> None:
        super().__init__()
        self.net, self.prepare = net, prepare

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.net(*self.prepare(*tensors))


@_entry("torch_frame ResNet")
def _frame_resnet() -> Made:
    from torch_frame import TensorFrame, stype
    from torch_frame.data.stats import StatType
    from torch_frame.nn import ResNet

    names = {stype.numerical: ["a", "b", "c"]}
    statistics = {n: {StatType.MEAN: 0.0, StatType.STD: 1.0} for n in names[stype.numerical]}
    net = ResNet(WIDTH, 8, DEPTH, statistics, names)
    return _Prepared(net, lambda x: (TensorFrame({stype.numerical: x}, names),)), (_rows(3),)


def _nflows(context: int | None = None, **settings: Any) -> Callable[[], Made]:
    """A residual net as the couplings of nflows use it, of a context where that has features."""

    def make() -> Made:
        from nflows.nn.nets import ResidualNet

        net = ResidualNet(4, 6, WIDTH, context_features=context, num_blocks=DEPTH, **settings)
        return net, (_rows(4), *([_rows(context)] if context else []))

    return make


def _made(context: int | None = None) -> Callable[[], Made]:
    """A masked net with residual blocks, of a context where that has features."""

    def make() -> Made:
        from nflows.transforms.made import MADE

        net = MADE(4, WIDTH, context_features=context, num_blocks=DEPTH, output_multiplier=2)
        return net, (_rows(4), *([_rows(context)] if context else []))

    return make


ZOO["nflows ResidualNet"] = _nflows()
ZOO["nflows ResidualNet, batch norm"] = _nflows(use_batch_norm=True)
ZOO["nflows ResidualNet, context"] = _nflows(3)
ZOO["nflows MADE"] = _made()
ZOO["nflows MADE, context"] = _made(3)


@_entry("zuko MaskedMLP")
def _masked_mlp() -> Made:
    from zuko.nn import MaskedMLP

    sooner = torch.ones(4, 4, dtype=torch.bool).tril()
    return MaskedMLP(sooner, [WIDTH] * DEPTH, residual=True), (_rows(4),)


class _Loss(nn.Module):
    """A density estimator's loss, which is what its training calls."""

    def __init__(self, estimator: Any) -> None:
        super().__init__()
        self.estimator = estimator

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        loss: Tensor = self.estimator.loss(x, condition)
        return loss


@_entry("sbi ResNetEmbedding1D")
def _sbi_embedding() -> Made:
    from sbi.neural_nets.embedding_nets import ResNetEmbedding1D

    hidden = {"c_hidden": HIDDEN}
    net = ResNetEmbedding1D(
        5, 4, n_blocks=DEPTH, c_internal=WIDTH, c_hidden_final=HIDDEN,
        construct_mapping_kwargs=hidden,
    )  # fmt: skip
    return net, (_rows(5),)


@_entry("sbi spline flow")
def _sbi_flow() -> Made:
    from sbi.neural_nets.net_builders import build_nsf

    x, condition = _rows(4), _rows(3)
    net = build_nsf(x, condition, hidden_features=WIDTH, num_transforms=2, num_blocks=DEPTH)
    return _Loss(net), (x, condition)


@_entry("sbi VectorFieldAdaMLP")
def _sbi_field() -> Made:
    from sbi.neural_nets.net_builders.vector_field_nets import VectorFieldAdaMLP

    net = VectorFieldAdaMLP(
        4, 3, condition_emb_dim=WIDTH, time_emb_dim=16, hidden_features=WIDTH, num_layers=DEPTH
    )
    return net, (_rows(4), _rows(3), torch.rand(16))


NODES, EDGES = 12, 40


def _edges() -> Tensor:
    return torch.randint(0, NODES, (2, EDGES))


class _Stack(nn.Module):
    """Graph layers one after another, all with the same edges."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor, *edges: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *edges)
        return x


def _deep_gcn(block: str) -> Callable[[], Made]:
    def make() -> Made:
        from torch_geometric.nn import DeepGCNLayer, GENConv

        layers = (
            DeepGCNLayer(GENConv(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.ReLU(), block)
            for _ in range(DEPTH)
        )
        return _Stack(*layers), (torch.randn(NODES, WIDTH), _edges())

    return make


ZOO["PyG DeepGCN, res+"] = _deep_gcn("res+")
ZOO["PyG DeepGCN, res"] = _deep_gcn("res")


@_entry("PyG DimeNet++ interactions")
def _dimenet() -> Made:
    """Without what finds neighbours and angles, for which DimeNet++ needs torch_sparse."""
    from torch_geometric.nn.models.dimenet import InteractionPPBlock

    settings = {"num_spherical": 3, "num_radial": 4, "num_before_skip": 1, "num_after_skip": 2}
    blocks = (
        InteractionPPBlock(WIDTH, 16, 8, act=torch.nn.functional.silu, **settings)
        for _ in range(DEPTH)
    )
    triplets = 60
    rows = torch.randn(EDGES, WIDTH), torch.randn(EDGES, 4), torch.randn(triplets, 12)
    return _Stack(*blocks), (*rows, *torch.randint(0, EDGES, (2, triplets)))


class _Given(nn.Module):
    """Edges that are known, with their lengths."""

    def __init__(self, edges: Tensor) -> None:
        super().__init__()
        self.register_buffer("edges", edges)

    def forward(self, places: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        source, target = self.edges
        return self.edges, (places[source] - places[target]).norm(dim=-1)


@_entry("PyG SchNet")
def _schnet() -> Made:
    from torch_geometric.nn import SchNet

    net = SchNet(WIDTH, HIDDEN, DEPTH, num_gaussians=8, interaction_graph=_Given(_edges()))
    return net, (torch.randint(1, 10, (NODES,)), torch.randn(NODES, 3))


@_entry("PyG GPSConv")
def _gps() -> Made:
    from torch_geometric.nn import GINConv, GPSConv

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))

    layers = (GPSConv(WIDTH, GINConv(mlp()), HEADS) for _ in range(DEPTH))
    return _Stack(*layers), (torch.randn(NODES, WIDTH), _edges())
