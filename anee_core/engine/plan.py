"""Which tokens run which layer: asks the controller, settles with the ledger, reads the outcome once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anee_core.accounting.budget import Budget
from anee_core.accounting.token_state import TokenState
from anee_core.cache.token_logs import ScoreLog
from anee_core.engine.block import ALL, NONE, Block, Selection
from anee_core.engine.ledger import Ledger
from anee_core.interfaces.controller import DecisionContext
from anee_core.interfaces.profiler import Observation
from anee_core.policy.policy import Policy
from anee_core.steps.calls import GateCall


class Plan:
    """The decisions of one forward, taken as far ahead as the controller allows.

    ``all_run`` runs every layer without asking. ``scores`` are those of earlier tokens, ``seen`` the index of
    the block's first token among them.
    """

    def __init__(
        self,
        policy: Policy,
        budget: Budget,
        num_layers: int,
        block: Block,
        feedback: Tensor | None,
        all_run: bool,
        scores: ScoreLog | None = None,
        seen: int = 0,
    ) -> None:
        self._scores, self._seen = scores, seen
        self._policy, self._budget, self._num_layers, self._block = policy, budget, num_layers, block
        self._feedback = feedback
        self._ledger = None if all_run else Ledger(budget, block.position_ids)
        self._selections = [ALL] * num_layers if all_run else []
        # What was decided: for some layers, then for some more.
        self._states: list[Tensor] = []
        self._all_run = all_run
        self._decided_below = False
        """Whether the step's gate decided, and not the controller."""

    @property
    def spent(self) -> Tensor | None:
        """Share of a dense token's layer FLOPs that each token has spent, [B, T]; None where all layers run unasked."""
        if self._ledger is not None and self._decided_below:
            self._ledger.charge(self.ran())
        return None if self._ledger is None else self._ledger.spent

    def at(self, layer_idx: int, hidden_states: Tensor, previous: Tensor) -> Selection:
        """Return who runs a layer, given its input and the input of the layer before, both [B, T, D]."""
        if layer_idx == len(self._selections):
            if layer_idx == sum(map(len, self._states)):
                self._decide(layer_idx, hidden_states, previous)
            self._selections.extend(_select(self._states[-1], hidden_states.device))
        return self._selections[layer_idx]

    def ahead(self, hidden_states: Tensor) -> Tensor | None:
        """Return each token's `TokenState` at each layer, [L, B, T] uint8 on the host, if the controller can say that
        in front of the first one, whose input is [B, T, D].
        """
        if self._all_run:
            shape = self._num_layers, *self._block.position_ids.shape
            return torch.full(shape, TokenState.RUNS, dtype=torch.uint8)
        if not self._states:
            self._decide(0, hidden_states, hidden_states)
        return self._states[0] if len(self._states[0]) == self._num_layers else None

    def gate(self) -> GateCall | None:
        """Return the gate that decides, if it is a linear one."""
        controller, position_ids = self._policy.controller, self._block.position_ids
        if controller.linear is None or self._scores is None or self._ledger is None or self._states:
            return None
        shares, room = controller.shares(position_ids), self._scores.room(self._seen + position_ids.shape[1])
        return self._ledger.gate(controller.linear, shares, room, self._seen)

    def undecided(self) -> Tensor:
        """Return the `TokenState` of tokens that are not known yet to skip layers, [L, B, T] uint8 on the host."""
        real, shape = self._block.real, self._block.position_ids.shape
        states = torch.full((self._num_layers, *shape), TokenState.RUNS, dtype=torch.uint8)
        return states if real is None else (states * real.cpu()).contiguous()

    def follow(self, states: Tensor, gate: GateCall | None) -> None:
        """Take over the `TokenState` [L, B, T] that a step has followed, and what its gate has decided."""
        if gate is not None:
            self._states, self._decided_below = [states], True

    def ran(self) -> Tensor:
        """Return which tokens ran each layer, [L, B, T] bool on the host. Padding counts as not run."""
        batch, tokens = self._block.position_ids.shape
        if self._all_run:
            real = self._block.real
            alike = torch.ones(batch, tokens, dtype=torch.bool) if real is None else real.cpu()
            return alike.expand(self._num_layers, -1, -1)
        states = self._states[0] if len(self._states) == 1 else torch.cat(self._states)
        return states == TokenState.RUNS

    def _decide(self, layer_idx: int, hidden_states: Tensor, previous: Tensor) -> None:
        block, policy, ledger = self._block, self._policy, self._ledger
        assert ledger is not None
        observation = Observation(
            hidden_states=hidden_states,
            previous=previous,
            layer_idx=layer_idx,
            num_layers=self._num_layers,
            spent=ledger.spent,
            seen=block.position_ids,
            budget=self._budget.limit or 1.0,
            feedback=self._feedback,
        )
        signals = policy.profiler.observe(observation, policy.controller.signals)
        context = DecisionContext(
            layer_idx, self._num_layers, block.position_ids, block.input_ids, block.phase, self._budget.limit
        )
        if self._scores is not None:
            controller = policy.controller
            score = controller.score(signals, context)
            lower, among = self._scores.compare(self._seen, layer_idx, score, block.real, controller.compares)
            context = replace(context, score=score, lower=lower, compared=among)
        run = ledger.settle(policy.controller.decide(signals, context), layer_idx)
        states = run.to(torch.uint8) + TokenState.SKIPPED
        if block.real is not None:
            states = states * block.real
        # The one host read for these layers.
        self._states.append(states.cpu().contiguous())


def _select(states: Tensor, device: torch.device) -> list[Selection]:
    """Turn states [N, B, T] on the host into one selection per layer."""
    layers = states.flatten(1)
    running = (layers == TokenState.RUNS).any(1).tolist()
    skipping = (layers == TokenState.SKIPPED).any(1).tolist()
    selections = []
    for i, (some_run, some_skip) in enumerate(zip(running, skipping, strict=True)):
        if not some_skip:
            selections.append(ALL)
        elif not some_run:
            selections.append(NONE)
        else:
            selections.append(_split(states[i], device))
    return selections


def _split(states: Tensor, device: torch.device) -> Selection:
    runs = states == TokenState.RUNS
    counts = runs.sum(1)
    rows = counts.nonzero()  # [R, 1]
    most = int(counts.max())
    order = torch.argsort(~runs[rows[:, 0]], dim=1, stable=True)[:, :most]
    last = (counts[rows[:, 0]] - 1)[:, None]
    columns = order.gather(1, torch.minimum(torch.arange(most), last))
    skip_rows, skip_columns = (states == TokenState.SKIPPED).nonzero(as_tuple=True)
    return Selection(
        "some",
        run=(rows.to(device), columns.to(device)),
        skip=(skip_rows[None].to(device), skip_columns[None].to(device)),
    )
