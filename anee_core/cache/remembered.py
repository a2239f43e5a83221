"""What token policies remember of slots: replaced at the end of a forward, and brought back by a rollback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from anee_core.cache.layer_store import LayerStore, misfit, rows_of


class Remembered:
    """What is remembered in all layers' stores, what is to replace it, and what it was before earlier forwards."""

    def __init__(self, layers: Sequence[LayerStore]) -> None:
        self._layers = layers
        self._staged: dict[int, dict[str, Tensor]] = {}
        self._snapshots: dict[int, list[dict[str, Tensor]]] = {}

    @property
    def staged(self) -> bool:
        """Whether the forward under way replaces anything."""
        return bool(self._staged)

    @torch.inference_mode(False)
    def append(self, layer_idx: int, start: int, state: Mapping[str, Tensor]) -> None:
        """Store what a policy wants to know later of new tokens, [B, T, ...] by name; slots begin at ``start``."""
        for name, rows in state.items():
            known = self.storage(layer_idx, name, rows.shape[2:], rows)
            known.narrow(1, start, rows.shape[1]).copy_(rows.detach())

    @torch.inference_mode(False)
    def storage(self, layer_idx: int, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """Return where a layer remembers something, [B, capacity, *shape] in the dtype of ``like``.

        Raises:
            CacheError: tokens before had something of another shape or dtype under that name.
        """
        store = self._layers[layer_idx]
        if name not in store.state:
            store.state[name] = like.new_zeros(store.slots.batch, store.slots.capacity, *shape)
        known = store.state[name]
        if known.shape[2:] != tuple(shape) or known.dtype != like.dtype:
            raise misfit(f"'{name}'", shape, like.dtype)
        return known

    def view(self, layer_idx: int) -> dict[str, Tensor]:
        """Return what is remembered of one layer's used slots, [B, S, ...] by name."""
        store = self._layers[layer_idx]
        return {name: known.narrow(1, 0, store.slots.used) for name, known in store.state.items()}

    def stage(self, layer_idx: int, state: Mapping[str, Tensor]) -> None:
        """Keep what is to be remembered of a layer's slots, [B, S, ...] by name, from the end of the forward on."""
        self._staged[layer_idx] = {name: known.detach() for name, known in state.items()}

    def commit(self, seen: int, keep: bool) -> bool:
        """Put what was staged in its place; ``keep`` says whether what was there after ``seen`` tokens can be restored.

        Return whether something that was remembered before is gone for good.
        """
        if keep and self._staged:
            self._snapshots[seen] = [dict(layer.state) for layer in self._layers]
            for layer_idx in self._staged:
                store = self._layers[layer_idx]
                store.state = {name: known.clone() for name, known in store.state.items()}
        for layer_idx, state in self._staged.items():
            for name, known in state.items():
                self._layers[layer_idx].state[name].narrow(1, 0, known.shape[1]).copy_(known)
        lost = not keep and bool(self._staged or self._snapshots)
        if lost:
            self._snapshots = {}
        self._staged = {}
        return lost

    def abort(self) -> None:
        """Forget what was staged."""
        self._staged = {}

    def knows(self, to: int) -> bool:
        """Whether what was remembered after ``to`` tokens can be brought back, or has not changed since."""
        return to in self._snapshots or all(seen <= to for seen in self._snapshots)

    def restore(self, to: int) -> None:
        """Bring back what was remembered when ``to`` tokens had been seen."""
        for layer, state in zip(self._layers, self._snapshots.get(to, ()), strict=False):
            layer.state = state
            layer.grow()  # its slots may have grown since
        self._snapshots = {seen: states for seen, states in self._snapshots.items() if seen < to}

    def forget_earlier(self) -> None:
        """Keep nothing of what was remembered before."""
        self._snapshots = {}

    def reorder(self, rows: Tensor) -> None:
        """Make row i of what was remembered before a copy of row ``rows[i]``."""
        for states in self._snapshots.values():
            states[:] = [rows_of(state, rows) for state in states]

    def clear(self) -> None:
        """Forget everything."""
        self._staged, self._snapshots = {}, {}
