"""The structs of ``cpp/structs.h``, field by field."""

from __future__ import annotations

from ctypes import Structure, c_double, c_float, c_int32, c_int64, c_void_p, sizeof
from enum import IntEnum
from typing import ClassVar

LANES = 16
"""Numbers that are worked on at once, at most."""

QUERIES = 4
"""Tokens whose attention is worked out together."""

PORTION = 64
"""Tokens that all layers together take at once, at most, of however many."""


class Kind(IntEnum):
    """Type of numbers in memory."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    INT4 = 3


class Norm(IntEnum):
    """Kind of a norm."""

    RMS = 0
    LAYER = 1
    RMS_FROM_ONE = 2
    """Its weight is added to one."""


class Rotary(IntEnum):
    """Which numbers of a head turn together: those half a width apart, or neighbours."""

    NONE = 0
    HALVES = 1
    PAIRS = 2


class Activation(IntEnum):
    """Activation of an MLP."""

    SILU = 0
    GELU = 1
    GELU_TANH = 2
    RELU = 3


class Residual(IntEnum):
    """Whether the MLP follows attention or stands beside it, and if so behind the same norm."""

    SEQUENTIAL = 0
    PARALLEL_ONE_NORM = 1
    PARALLEL_TWO_NORMS = 2


class Matrix(Structure):
    """A linear map; output r lies in row (r // group) * group_stride + r % group of the weight, or in that column."""

    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("scale", c_void_p),
        ("stride", c_int64),
        ("outputs", c_int32),
        ("inputs", c_int32),
        ("group", c_int32),
        ("group_stride", c_int32),
        ("transposed", c_int32),
        ("kind", c_int32),
    ]


class NormWeights(Structure):
    """A norm over a state or a head; without a weight there is none."""

    _fields_: ClassVar = [("weight", c_void_p), ("bias", c_void_p), ("eps", c_float), ("kind", c_int32)]


class Layer(Structure):
    """One decoder layer."""

    _fields_: ClassVar = [
        ("input_norm", NormWeights),
        ("mlp_norm", NormWeights),
        ("query_norm", NormWeights),
        ("key_norm", NormWeights),
        ("attended_norm", NormWeights),
        ("changed_norm", NormWeights),
        ("query", Matrix),
        ("key", Matrix),
        ("value", Matrix),
        ("output", Matrix),
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("kind", c_int32),
        ("width", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary", c_int32),
        ("rotary_width", c_int32),
        ("activation", c_int32),
        ("residual", c_int32),
        ("scale", c_float),
        ("cap", c_float),
    ]


class Seconds(Structure):
    """Seconds that parts of a stack take."""

    _fields_: ClassVar = [("attention", c_double), ("decisions", c_double)]


class Tokens(Structure):
    """The tokens of one call: where they lie among the states given, and where their keys and values belong."""

    _fields_: ClassVar = [
        ("states", c_void_p),
        ("result", c_void_p),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("mask", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("place", c_void_p),
        ("row", c_void_p),
        ("column", c_void_p),
        ("kept", c_void_p),
        ("kept_count", c_void_p),
        ("seconds", c_void_p),
        ("scratch", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("mask_stride", c_int64),
        ("kept_stride", c_int64),
        ("start", c_int64),
        ("count", c_int32),
        ("used", c_int32),
        ("threads", c_int32),
    ]


class Storage(Structure):
    """Where one layer's keys and values are, its mask, and what it takes to drop tokens."""

    _fields_: ClassVar = [
        ("keys", c_void_p),
        ("values", c_void_p),
        ("mask", c_void_p),
        ("interactions", c_void_p),
        ("died", c_void_p),
        ("row_stride", c_int64),
        ("head_stride", c_int64),
        ("interaction_stride", c_int64),
        ("died_stride", c_int64),
        ("start", c_int64),
        ("used", c_int32),
    ]


class Gate(Structure):
    """What decides which layers each new token runs."""

    _fields_: ClassVar = [
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("mean", c_void_p),
        ("spread", c_void_p),
        ("shares", c_void_p),
        ("scores", c_void_p),
        ("run_share", c_void_p),
        ("skip_share", c_void_p),
        ("wanted", c_void_p),
        ("always", c_void_p),
        ("row_stride", c_int64),
        ("seen", c_int64),
        ("window", c_int64),
        ("prior", c_float),
        ("limit", c_float),
    ]


class Interaction(Structure):
    """What decides which slots a new token of each row keeps."""

    _fields_: ClassVar = [
        ("query", c_void_p),
        ("key", c_void_p),
        ("bias", c_void_p),
        ("held", c_void_p),
        ("now", c_int64),
        ("scale", c_float),
        ("rank", c_int32),
    ]


class Layers(Structure):
    """All layers, and who runs which."""

    _fields_: ClassVar = [
        ("layers", c_void_p),
        ("storage", c_void_p),
        ("threads", c_void_p),
        ("down", c_void_p),
        ("up", c_void_p),
        ("gate", c_void_p),
        ("interaction", c_void_p),
        ("states", c_void_p),
        ("inputs", c_void_p),
        ("count", c_int32),
    ]


MIRRORED = (Matrix, NormWeights, Layer, Tokens, Storage, Gate, Interaction, Layers)
LAYOUT = (*(sizeof(struct) for struct in MIRRORED), QUERIES, PORTION)
"""What the library's ``anee_layout`` answers if its structs are these."""
