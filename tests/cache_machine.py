"""Anything that can be done to a cache in any order, done to its reference twin too."""

import itertools

import pytest
import torch
from filled_cache import CLOSE, HEADS, LAYERS, WIDTH, attend, some
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_cache import ReferenceCache

from anee_core.cache import AdaptiveCache
from anee_core.cache.writer import CacheWriter
from anee_core.errors import CacheError


class CacheMachine(RuleBasedStateMachine):
    """Does the same to a cache and to its twin, in any order, and compares all that can be seen after each step."""

    @initialize(batch=st.integers(1, 3), capacity=st.sampled_from([None, 1, 20]))
    def start(self, batch, capacity):
        self.cache, self.twin = AdaptiveCache(LAYERS, capacity), ReferenceCache(LAYERS)
        self.rows = batch
        self.draws = 0
        self.unwritten = False

    def some(self, *shape):
        self.draws += 1
        return some(*shape, seed=self.draws)

    def flips(self, *shape, chance):
        self.draws += 1
        return torch.rand(*shape, generator=torch.Generator().manual_seed(self.draws)) < chance

    @rule(
        count=st.sampled_from([1, 2, 3, 5, 12, 40]),
        padding=st.sampled_from(["none", "none", "left", "right", "anywhere", "whole rows"]),
        gap=st.sampled_from([0, 0, 3]),
        style=st.sampled_from(["whole", "skip first", "run first"]),
        drop=st.sampled_from([None, 0.0, 0.3, 0.9, 1.0]),
        outcome=st.sampled_from(["commit", "commit", "commit", "commit", "abort", "leave open", "fail"]),
    )
    def forward(self, count, padding, gap, style, drop, outcome):
        self.twin.abort()
        real = self.draw_padding(padding, count)
        steps = torch.ones(self.rows, count, dtype=torch.bool) if real is None else real
        position_ids = (self.free_positions() + gap + steps.cumsum(1) - 1).clamp(min=0)
        self.cache.begin(position_ids, real)
        self.twin.begin(position_ids.tolist(), None if real is None else real.tolist())
        # A failure half-way: the last layer never got its keys.
        for layer in range(LAYERS - 1 if outcome == "fail" else LAYERS):
            if style == "whole":
                self.write_whole(layer, position_ids)
            else:
                self.write_some(layer, position_ids, steps, style)
            # Each layer drops of its own accord.
            if drop is not None and self.flips(1, chance=0.8):
                self.drop(layer, drop)
        self.unwritten = outcome == "fail"
        if outcome in ("commit", "abort"):
            getattr(self.cache, outcome)()
            getattr(self.twin, outcome)()

    def draw_padding(self, padding, count):
        if padding == "none":
            return None
        if padding == "anywhere":
            return self.flips(self.rows, count, chance=0.6)
        if padding == "whole rows":
            return self.flips(self.rows, 1, chance=0.5).expand(-1, count)
        length = torch.where(self.flips(self.rows, 1, chance=0.5), count, (count + 1) // 2)
        column = torch.arange(count)
        return column >= count - length if padding == "left" else column < length

    def free_positions(self):
        """Return for each row a position after those of all its tokens, dropped ones included, [B, 1]."""
        rows = [[t.position for layer in self.twin.layers if layer for t in layer[row]] for row in range(self.rows)]
        return torch.tensor([[max(row, default=-1) + 1] for row in rows])

    def write_whole(self, layer, position_ids):
        keys, values = self.some(2, self.rows, HEADS, position_ids.shape[1], WIDTH)
        everyone = torch.arange(self.rows)[:, None]
        self.write_twin(layer, keys, values, everyone, torch.arange(position_ids.shape[1]).expand(self.rows, -1))
        held = CacheWriter(self.cache, layer).update(keys, values, layer)
        self.compare_attention(layer, position_ids, everyone[:, 0], held)

    def write_some(self, layer, position_ids, real, style):
        """Write a block as the engine does: skipped tokens one by one, the others as rows whose last token repeats."""
        run = real & self.flips(*real.shape, chance=0.5)
        skipped = (real & ~run).nonzero()[self.some(int((real & ~run).sum())).argsort()]
        rows = run.any(1).nonzero()
        columns = [list(itertools.compress(range(real.shape[1]), row)) for row in run.tolist() if any(row)]
        most = max(map(len, columns), default=0)
        columns = torch.tensor([row + row[-1:] * (most - len(row)) for row in columns]).reshape(len(rows), most)

        def skip():
            pairs = skipped[None, :, 0], skipped[None, :, 1]
            keys, values = self.some(2, 1, HEADS, len(skipped), WIDTH)
            self.write_twin(layer, keys, values, *pairs)
            self.cache.write(layer, keys, values, *pairs)

        if style == "skip first":
            skip()
        if most:
            keys, values = self.some(2, len(rows), HEADS, real.shape[1], WIDTH)
            at = columns[:, None, :, None].expand(-1, HEADS, -1, WIDTH)
            keys, values = keys.gather(2, at), values.gather(2, at)
            self.write_twin(layer, keys, values, rows.expand_as(columns), columns)
            held = CacheWriter(self.cache, layer, rows, columns).update(keys, values, layer)
            if style == "skip first":
                self.compare_attention(layer, position_ids[rows, columns], rows[:, 0], held)
        if style == "run first":
            skip()

    def write_twin(self, layer, keys, values, rows, columns):
        for i, j in itertools.product(range(columns.shape[0]), range(columns.shape[1])):
            row = int(rows.expand_as(columns)[i, j])
            self.twin.write(layer, row, int(columns[i, j]), keys[i, :, j], values[i, :, j])

    def drop(self, layer, chance):
        """Drop tokens at random; what is said of slots without a token must not matter."""
        slots, tokens = self.cache.slots[layer], max(self.twin.pending, 1)
        dropped = self.flips(self.rows, slots.used, chance=chance)
        # After which token of the block each is still held: the first in its own time, some after all of them.
        first = slots.born[:, : slots.used] - (self.twin.seen + self.twin.pending - tokens)
        outlives = (self.some(self.rows, slots.used).abs() * tokens).long().clamp(max=tokens - 1)
        outlives = torch.where(dropped, torch.maximum(outlives, first.clamp(max=tokens - 1)), tokens)
        alive = torch.arange(tokens)[None, :, None] < outlives[:, None]
        for row, valid in enumerate(slots.valid()):
            for t in range(tokens):
                gone = valid & (outlives[row] == t)
                self.twin.evict(layer, row, set(slots.positions()[row, gone].tolist()), tokens - 1 - t)
        self.cache.evict(layer, alive)

    def compare_attention(self, layer, position_ids, rows, held=None):
        """Compare what queries at positions [R, T] of some rows get from a layer."""
        query = self.some(len(rows), HEADS, position_ids.shape[1], WIDTH)
        window = (None, 4, 30)[self.draws % 3]
        output = attend(self.cache, layer, query, position_ids, window, held, rows)
        assert torch.isfinite(output).all()
        # The first and the last query are enough, and the twin is slow.
        for (i, row), j in itertools.product(enumerate(rows.tolist()), {0, position_ids.shape[1] - 1}):
            wanted = self.twin.attend(layer, row, query[i, :, j], int(position_ids[i, j]), window)
            assert wanted is None or torch.allclose(output[i, :, j], wanted, **CLOSE)

    @precondition(lambda self: self.cache.slots and not self.unwritten)
    @rule(layer=st.integers(0, LAYERS - 1), chance=st.sampled_from([0.3, 1.0]))
    def drop_outside_a_forward(self, layer, chance):
        self.drop(layer, chance)

    @rule(steps=st.integers(1, 6), drop=st.sampled_from([None, 0.1, 0.5]))
    def decode(self, steps, drop):
        for _ in range(steps):
            self.forward(1, "none", 0, "whole", drop, "commit")

    @rule(
        drop=st.sampled_from([0.5, 0.9]),
        padding=st.sampled_from(["none", "right", "anywhere"]),
        steps=st.integers(1, 4),
        free=st.booleans(),
        data=st.data(),
    )
    def speculate(self, drop, padding, steps, free, data):
        """Record a drop, go on, perhaps free what was dropped, and take back part of what came last."""
        self.record(True)
        self.forward(2, padding, 0, "whole", drop, "commit")
        for _ in range(steps):
            self.forward(1, padding, 0, "whole", None, "commit")
        if free:
            self.record(False)
            self.end("commit")
        self.reorder(data)
        self.rollback(data)

    @rule(end=st.sampled_from(["commit", "abort"]))
    def end(self, end):
        end = "abort" if self.unwritten else end
        getattr(self.cache, end)()
        getattr(self.twin, end)()
        self.unwritten = False

    @rule(data=st.data())
    def rollback(self, data):
        count = data.draw(st.one_of(st.integers(0, 4), st.sampled_from([-1, self.twin.seen, self.twin.seen + 1])))
        self.unwritten = False
        self.twin.abort()
        if self.twin.may_refuse(count):
            try:
                self.cache.rollback(count)
            except CacheError:
                return
            self.twin.rollback(count)
            return
        try:
            self.twin.rollback(count)
        except CacheError:
            with pytest.raises(CacheError, match="cannot roll back"):
                self.cache.rollback(count)
        else:
            self.cache.rollback(count)

    @precondition(lambda self: self.cache.slots)
    @rule(data=st.data())
    def reorder(self, data):
        rows = data.draw(st.lists(st.integers(0, self.rows - 1), min_size=1, max_size=4))
        self.cache.reorder(torch.tensor(rows))
        self.twin.reorder(rows)
        self.rows = len(rows)

    @rule(on=st.booleans())
    def record(self, on):
        self.cache.keeps_dropped = self.twin.keeps_dropped = on

    @invariant()
    def holds_the_same_tokens(self):
        cache, twin = self.cache, self.twin
        assert cache.get_seq_length() == twin.seen
        if not cache.slots:
            return
        assert cache.batch == twin.batch == self.rows
        assert cache.kept().tolist() == [[len(twin.held(i, row)) for row in range(self.rows)] for i in range(LAYERS)]
        last = [max([t.position for t in twin.held(0, row)], default=-1) for row in range(self.rows)]
        assert cache.next_positions()[:, 0].tolist() == [position + 1 for position in last]
        for layer, row in itertools.product(range(LAYERS), range(self.rows)):
            slots, tokens = cache.slots[layer], twin.held(layer, row)
            valid = slots.valid()[row]
            assert valid.all() or not slots.full
            assert slots.positions()[row, valid].tolist() == [t.position for t in tokens]
            # A forward that is open or failed may not have written all its tokens.
            written = [i for i, t in enumerate(tokens) if t.key is not None]
            if written:
                keys, values = (states[row][:, valid][:, written] for states in cache.keys_values(layer))
                assert torch.equal(keys, torch.stack([tokens[i].key for i in written], dim=1))
                assert torch.equal(values, torch.stack([tokens[i].value for i in written], dim=1))

    @invariant()
    def attends_the_same(self):
        if self.unwritten:
            return
        for layer, slots in enumerate(self.cache.slots):
            if self.cache.layers[layer].keys is not None and slots.used:
                self.compare_attention(layer, slots.positions()[:, -1:] + layer, torch.arange(self.rows))

    @invariant()
    def counts_its_real_storage(self):
        stored = [t for store in self.cache.layers for t in (store.keys, store.values) if t is not None]
        assert self.cache.nbytes() == sum(t.numel() * t.element_size() for t in stored)
        assert all(torch.isfinite(t).all() for t in stored)
