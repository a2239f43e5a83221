"""Plan which tokens run which layer: observe, ask the controller, have the ledger admit them, read the outcome once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from anee_core.accounting.budget import Budget
from anee_core.accounting.token_state import TokenState
from anee_core.engine.block import ALL, NONE, Block, Selection
from anee_core.engine.ledger import Ledger
from anee_core.engine.past import Past
from anee_core.engine.returned import check_actions, check_signals
from anee_core.interfaces.controller import DecisionContext
from anee_core.interfaces.profiler import Observation
from anee_core.policy.policy import Policy
from anee_core.steps.calls import GateCall, KnownScores


class Plan:
    """The decisions of one forward, taken as far ahead as the controller allows.

    Args:
        policy: what decides.
        budget: what a token may spend.
        block: the tokens.
        past: what is known of those before.
        all_run: whether every layer runs, and nobody is asked.
    """

    def __init__(self, policy: Policy, budget: Budget, block: Block, past: Past, all_run: bool) -> None:
        self._policy, self._budget, self._block, self._past = policy, budget, block, past
        self._num_layers = budget.costs.num_layers
        self._all_run = all_run
        self._ledger = None if all_run else Ledger(budget, block.position_ids)
        self._selections = [ALL] * self._num_layers if all_run else []
        self._states: list[Tensor] = []
        """The `TokenState` [N, B, T] that was decided on, for some layers and then for some more."""
        self._decided_below = False
        """Whether the step's gate decided, and not the controller."""

    @property
    def spent(self) -> Tensor | None:
        """Share of a dense token's layer FLOPs that each token has spent, [B, T]; None where all layers run unasked."""
        if self._ledger is not None and self._decided_below:
            self._ledger.charge(self.ran())
        return None if self._ledger is None else self._ledger.spent

    def select(self, layer_idx: int, hidden_states: Tensor, previous: Tensor) -> Selection:
        """Return who runs a layer, given its input and the input of the layer before, both [B, T, D]."""
        if layer_idx == len(self._selections):
            if layer_idx == sum(map(len, self._states)):
                self._decide(layer_idx, hidden_states, previous)
            self._selections.extend(_select(self._states[-1], hidden_states.device))
        return self._selections[layer_idx]

    def decide_all(self, hidden_states: Tensor) -> Tensor | None:
        """Return each token's `TokenState` at each layer, [L, B, T] uint8 on the host, if that is known beforehand.

        It is if the controller decides on all layers in front of the first one, whose input is [B, T, D]. None
        otherwise.
        """
        if self._all_run:
            shape = self._num_layers, *self._block.position_ids.shape
            return torch.full(shape, TokenState.RUNS, dtype=torch.uint8)
        if not self._states:
            self._decide(0, hidden_states, hidden_states)
        return self._states[0] if len(self._states[0]) == self._num_layers else None

    def gate(self) -> GateCall | None:
        """Return the gate that decides, if it is a linear one."""
        controller, position_ids, past = self._policy.controller, self._block.position_ids, self._past
        if controller.linear is None or past.scores is None or self._ledger is None or self._states:
            return None
        scores = past.scores.entries(past.seen + position_ids.shape[1])
        known = KnownScores(controller.shares(position_ids), scores, past.seen)
        return self._ledger.gate(controller.linear, known)

    def undecided(self) -> Tensor:
        """Return RUNS for all tokens but padding, [L, B, T] uint8 on the host, for a gate to decide on."""
        real, shape = self._block.real, self._block.position_ids.shape
        states = torch.full((self._num_layers, *shape), TokenState.RUNS, dtype=torch.uint8)
        return states if real is None else (states * real.cpu()).contiguous()

    def record(self, states: Tensor) -> None:
        """Take over the `TokenState` [L, B, T] that a step's gate has decided on."""
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
            feedback=self._past.feedback,
        )
        shape = (block.position_ids.shape[0], block.position_ids.shape[1])
        signals = policy.profiler.observe(observation, policy.controller.signals)
        check_signals(signals, policy.profiler, policy.controller, shape)
        context = DecisionContext(
            layer_idx, self._num_layers, block.position_ids, block.input_ids, block.phase, self._budget.limit
        )
        context = self._compared(signals, context)
        actions = policy.controller.decide(signals, context)
        check_actions(actions, policy.controller, shape, self._num_layers - layer_idx)
        run = ledger.admit(actions, layer_idx)
        states = run.to(torch.uint8) + TokenState.SKIPPED
        if block.real is not None:
            states = states * block.real
        # The one host read for these layers.
        self._states.append(states.cpu().contiguous())

    def _compared(self, signals: Tensor, context: DecisionContext) -> DecisionContext:
        """Return the context with how the tokens compare to earlier ones, for a controller that compares."""
        controller, past = self._policy.controller, self._past
        if past.scores is None:
            return context
        score = controller.score(signals, context)
        window, real = controller.compares, self._block.real
        tie = controller.tie(context.layer_idx)
        lower, among = past.scores.compare(past.seen, context.layer_idx, score, real, window, tie)
        return replace(context, score=score, lower=lower, compared=among)


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
