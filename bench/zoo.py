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
