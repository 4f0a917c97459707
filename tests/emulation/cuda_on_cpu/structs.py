"""csrc/cuda/layer.h as ctypes, and the sm_80 kernels as a library."""

import ctypes
from ctypes import Structure, c_bool, c_float, c_int, c_int64, c_uint64, c_void_p
from functools import cache

import torch

from cuda_on_cpu import HERE, ROOT, load
from fusedres.spec import STAGES

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_STAGES = 6
KERNELS = ("forward_sm80.cu", "backward_sm80.cu", "sums_sm80.cu")


class Stages(Structure):
    _fields_ = [("stage", c_int * MOST_STAGES), ("count", c_int)]


class Vector(Structure):
    _fields_ = [("data", c_void_p), ("dtype", c_int)]


class Matrix(Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Layer(Structure):
    _fields_ = [
        ("dtype", c_int),
        ("x_dtype", c_int),
        ("residual_dtype", c_int),
        ("y_dtype", c_int),
        ("M", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("R", c_int64),
        ("x", Matrix),
        ("weight", Matrix),
        ("residual", Matrix),
        ("bias", Vector),
        ("norm_weight", Vector),
        ("norm_bias", Vector),
        ("running_mean", Vector),
        ("running_var", Vector),
        ("gate", Vector),
        ("seed", c_void_p),
        ("sample_rows", c_int64),
        ("prologue", Stages),
        ("epilogue", Stages),
        ("norm", c_int),
        ("act", c_int),
        ("scalar_gate", c_bool),
        ("residual_is_x", c_bool),
        ("eps", c_float),
        ("residual_scale", c_float),
        ("dropout", c_uint64),
        ("drop_path", c_uint64),
        ("dropout_scale", c_float),
        ("drop_path_scale", c_float),
    ]


class Tile(Structure):
    _fields_ = [
        ("block_m", c_int),
        ("block_n", c_int),
        ("groups", c_int),
        ("parts", c_int),
        ("sum_parts", c_int),
        ("programs", c_int64),
        ("shared_bytes", c_int),
        ("partial_floats", c_int64),
        ("counters", c_int64),
    ]


class ForwardOut(Structure):
    _fields_ = [
        ("z", Matrix),
        ("y", Matrix),
        ("operand", Matrix),
        ("stats", c_void_p),
        ("partial", c_void_p),
        ("arrived", c_void_p),
    ]


class BackwardOut(Structure):
    _fields_ = [
        ("dy", Matrix),
        ("z", Matrix),
        ("stats", c_void_p),
        ("dz", Matrix),
        ("dt", Matrix),
        ("dx", Matrix),
        ("dresidual", Matrix),
        ("row_means", c_void_p),
        ("partial", c_void_p),
        ("arrived", c_void_p),
    ]


class SumsOut(Structure):
    _fields_ = [
        ("from_", BackwardOut),
        ("operand", Matrix),
        ("dweight", Matrix),
        ("dbias", c_void_p),
        ("dnorm_weight", c_void_p),
        ("dnorm_bias", c_void_p),
        ("dgate", c_void_p),
        ("partial", c_void_p),
        ("arrived", c_void_p),
    ]


class Device(Structure):
    """Of launchers.cpp."""

    _fields_ = [
        ("processors", c_int),
        ("shared_limit", c_int),
        ("block_m", c_int),
        ("block_n", c_int),
        ("groups", c_int),
        ("parts", c_int),
        ("sum_parts", c_int),
    ]


STRUCTS = (Stages, Vector, Matrix, Layer, Tile, ForwardOut, BackwardOut, SumsOut)


@cache
def kernels(watched: bool = False, root=ROOT) -> ctypes.CDLL:
    """The sm_80 kernels as a library."""
    sources = [HERE / "launchers.cpp", *(root / "csrc" / "cuda" / name for name in KERNELS)]
    return prepared(load("kernels", *sources, watched=watched, root=root))


def prepared(library: ctypes.CDLL) -> ctypes.CDLL:
    found = (ctypes.c_size_t * (2 * len(STRUCTS)))()
    library.layouts(found)
    for struct, size, last in zip(STRUCTS, found[::2], found[1::2], strict=True):
        ours = ctypes.sizeof(struct), getattr(struct, struct._fields_[-1][0]).offset
        assert ours == (size, last), f"{struct.__name__}: {ours} here, {(size, last)} in layer.h"
    for name in ("refusal", "forward", "backward", "sums"):
        getattr(library, name).restype = ctypes.c_char_p
    library.wants_row_means.restype = c_bool
    return library


# ---- values


def address(t):
    return None if t is None else t.data_ptr()


def matrix(t):
    return Matrix(None, 0) if t is None else Matrix(t.data_ptr(), t.stride(0))


def stages(names) -> Stages:
    numbers = [STAGES.index(name) for name in names]
    return Stages((c_int * MOST_STAGES)(*numbers), len(numbers))


def index(name, names) -> int:
    return 0 if name is None else 1 + names.index(name)


def keep_scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0
