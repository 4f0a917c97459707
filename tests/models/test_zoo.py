"""Public models at small sizes: equal in every output, gradient and buffer, and how many of their
residual adds are fused, each way.
"""

import warnings

import pytest
import torch

from bench.gallery import WAYS, measure
from bench.zoo import ZOO

# Residual adds that no way fuses, and those that only convert leaves: (found, compile, convert).
EXCEPTIONS = {
    "timm MLP-Mixer": (4, 2, 2),  # token mixing multiplies transposed rows
    "timm ResMLP": (4, 2, 2),
    "timm swin_tiny": (6, 3, 3),  # windows are put back between product and add
    "timm swinv2_cr_tiny": (6, 3, 3),
    "timm convnext_atto": (4, 0, 0),  # back to channels first
    "transformers AlbertModel": (4, 4, 2),  # one layer that is called twice
    "transformers OPTModel": (4, 4, 4),  # convert cannot tell that the embeddings' sum is none
    "transformers T5EncoderModel": (4, 4, 3),  # makes the bias of positions within
    "torch TransformerEncoder": (4, 2, 2),  # nn.MultiheadAttention transposes
    "torch TransformerEncoder, norm first": (4, 2, 2),
    "torch TransformerDecoder": (6, 2, 2),
    "nflows ResidualNet, context": (2, 0, 0),  # a gated linear unit is last
    "sbi spline flow": (4, 0, 0),  # of such nets
    "sbi VectorFieldAdaMLP": (2, 0, 0),  # its gates are made of the condition
    "PyG SchNet": (2, 2, 0),  # asks for the largest number of a batch
    "PyG GPSConv": (4, 4, 0),  # makes the mask of its attention within
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ZOO)
def test_model(name, way):
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row = measure(name, way)
        except ImportError as error:
            pytest.skip(f"{name} needs {error.name}")
    fused = sum(not add.convolutional for add in row.report.fused)
    found, compiled, converted = EXCEPTIONS.get(name, (row.report.found,) * 3)
    assert row.error <= 1
    assert fused == (compiled if way == "compile" else converted)
    assert way == "convert" or row.report.found == found > 0
