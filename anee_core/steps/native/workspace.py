"""What one thread's forward works with, and where its tokens are."""

from __future__ import annotations

import threading
from ctypes import addressof

import torch
from torch import Tensor

from anee_core.adapter.layer_call import LayerCall
from anee_core.steps.calls import Places
from anee_core.steps.native.head import NativeHead, NativeNorm
from anee_core.steps.native.layers import NativeLayer
from anee_core.steps.native.stack import NativeStack
from anee_core.steps.native.structs import Tokens

Angles = tuple[Tensor, Tensor, int, int]
"""Cosines and sines [B, T, R], and where they lie."""


class Workspace(threading.local):
    """What one thread's forward works with: several threads may run one model, each on a cache of its own."""

    def __init__(self) -> None:
        self.layers: list[NativeLayer] = []
        """Layers of the forward under way; empty if it goes through the model's modules."""
        self.possible = False
        """Whether nothing but the model itself may speak against the library."""
        self.following: list[NativeNorm | NativeHead] | None = None
        """What follows the layers, if it can be computed in the library; None before that was looked at."""
        self.few = True
        """Whether the forward has so few tokens that the library is always sooner done."""
        self.threads = 1
        """Number of threads that the forward may use."""
        self.scratch = torch.empty(0)
        """Memory for what is computed on the way."""
        self.tokens = Tokens()
        """Struct of the tokens of a call."""
        self.address = addressof(self.tokens)
        """Where that struct lies."""
        self.stack: NativeStack | None = None
        """All layers as one struct; None before they were taken at once."""
        self.whole: dict[tuple[int, int], TokenPlaces] = {}
        """Places of all tokens of a block, by rows and tokens in each."""
        self.turned: tuple[LayerCall, Angles | None] | None = None
        """The call whose rotary angles were worked out last, and those."""


class TokenPlaces:
    """Where some tokens of a block are: numbers for each, in memory, and the shape that they came in."""

    def __init__(self, place: Tensor, row: Tensor, column: Tensor, shape: torch.Size) -> None:
        self.place, self.row, self.column, self.count, self.shape = place, row, column, place.numel(), shape
        self.pointers = place.data_ptr(), row.data_ptr(), column.data_ptr()

    @classmethod
    def of(cls, places: Places, length: int) -> TokenPlaces:
        """Return the numbers for tokens at ``places`` of a block of ``length`` tokens in each row."""
        rows, columns = places
        rows = rows.expand_as(columns)
        return cls((rows * length + columns).contiguous(), rows.contiguous(), columns.contiguous(), columns.shape)
