"""The cache against its reference twin, and its promises about memory, dtypes, rollback and transformers."""

import gc
import weakref

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_cache import ReferenceCache
from tiny import adaptive
from torch.nn.functional import scaled_dot_product_attention

from anee_core import cache as cache_module
from anee_core.cache import AdaptiveCache, CacheWriter
from anee_core.errors import AneeError, CacheError
from anee_core.feedback import UNKNOWN, FeedbackLog
from anee_core.masks import MaskMaker, additive, visible
from anee_core.slots import Slots

LAYERS, HEADS, WIDTH = 3, 2, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def some(*shape, seed=0, dtype=torch.float32):
    """Return random numbers that depend on nothing but the arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def positions_after(cache, batch, count):
    return torch.arange(cache.seen, cache.seen + count).expand(batch, -1)


def open_block(cache, count, batch=2, real=None, dtype=torch.float32, seed=0):
    """Begin a forward over ``count`` tokens and write every layer; return the keys and values of each layer."""
    cache.begin(positions_after(cache, batch, count), real)
    written = []
    for layer in range(len(cache.layers)):
        pair = [some(batch, HEADS, count, WIDTH, seed=1000 * seed + 10 * layer + i, dtype=dtype) for i in (0, 1)]
        cache.write(layer, *pair)
        written.append(pair)
    return written


def feed(cache, count, **options):
    """Run a whole forward over ``count`` tokens."""
    written = open_block(cache, count, **options)
    cache.commit()
    return written


def keep_last(cache, layer, count):
    """Return a mask [B, S] of the last ``count`` slots."""
    used = cache.slots[layer].used
    return (torch.arange(used) >= used - count).expand(cache.batch, -1)


def snapshot(cache):
    """Return all that can be seen of a cache: for each layer and row, the positions, keys and values of its tokens."""
    rows = []
    for layer, slots in enumerate(cache.slots):
        valid = slots.valid()
        keys, values = cache.held(layer)
        for row in range(cache.batch):
            at = valid[row]
            rows.append([t.clone() for t in (slots.positions()[row, at], keys[row][:, at], values[row][:, at])])
    return cache.get_seq_length(), rows


def assert_same(before, after):
    assert before[0] == after[0]
    assert len(before[1]) == len(after[1])
    for old, new in zip(before[1], after[1], strict=True):
        for left, right in zip(old, new, strict=True):
            assert torch.equal(left, right)


def attend(cache, layer, query, position, window=None):
    """Return attention [B, H, T, Dh] of queries at positions [B, T] over a layer's slots, through the cache's mask."""
    mask = additive(visible(cache.slots[layer], position, window), query.dtype)
    return scaled_dot_product_attention(query, *cache.held(layer), attn_mask=mask)


# The twin.


class CacheMachine(RuleBasedStateMachine):
    """Does the same to a cache and to its twin, in any order, and compares all that can be seen after each step."""

    @initialize(batch=st.integers(1, 3), capacity=st.sampled_from([None, 1, 20]))
    def start(self, batch, capacity):
        self.cache, self.twin = AdaptiveCache(LAYERS, capacity), ReferenceCache(LAYERS)
        self.rows = batch
        self.draws = 0
        self.complete = False
        self.unwritten = False

    def some(self, *shape):
        self.draws += 1
        return some(*shape, seed=self.draws)

    def flips(self, *shape, chance):
        return self.some(*shape) < torch.special.ndtri(torch.tensor(chance, dtype=torch.float64)).item()

    def next_position(self, row):
        """Return a position that no token of a row has, dropped ones included."""
        return max([t.position for layer in self.twin.layers for t in (layer[row] if layer else [])], default=-1) + 1

    @rule(
        count=st.one_of(st.integers(1, 5), st.sampled_from([1, 1, 1, 40])),
        padding=st.sampled_from(["none", "none", "left", "right", "any", "whole rows"]),
        gap=st.sampled_from([0, 0, 3]),
        style=st.sampled_from(["whole", "subsets"]),
        drop=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
        outcome=st.sampled_from(["commit", "commit", "commit", "commit", "abort", "fail", "leave open"]),
    )
    def forward(self, count, padding, gap, style, drop, outcome):
        self.twin.abort()
        real = self.draw_padding(padding, count)
        steps = torch.ones(self.rows, count, dtype=torch.long) if real is None else real.long()
        first = torch.tensor([[self.next_position(row) + gap] for row in range(self.rows)])
        position_ids = (first + steps.cumsum(1) - 1).clamp(min=0)
        self.cache.begin(position_ids, real)
        self.twin.begin(position_ids.tolist(), None if real is None else real.tolist())
        # A failure half-way: the later layers never got their keys.
        reached = LAYERS - 1 if outcome == "fail" else LAYERS
        for layer in range(reached):
            (self.write_whole if style == "whole" else self.write_subsets)(layer, position_ids)
            self.drop(layer, drop)
        if outcome == "commit":
            self.cache.commit()
            self.twin.commit()
        elif outcome == "abort":
            self.cache.abort()
            self.twin.abort()
        self.complete, self.unwritten = outcome == "leave open", outcome == "fail"

    def draw_padding(self, padding, count):
        if padding == "none":
            return None
        if padding == "any":
            return self.flips(self.rows, count, chance=0.6)
        if padding == "whole rows":
            return self.flips(self.rows, 1, chance=0.5).expand(-1, count)
        length = torch.where(self.flips(self.rows, 1, chance=0.5), count, max(count // 2, 1))
        column = torch.arange(count)
        return column >= count - length if padding == "left" else column < length

    def write_whole(self, layer, position_ids):
        keys, values = self.some(2, self.rows, HEADS, position_ids.shape[1], WIDTH)
        self.write_twin(layer, keys, values, None, None)
        held = CacheWriter(self.cache, layer).update(keys, values, layer)
        self.check_attention(layer, position_ids, None, held)

    def write_subsets(self, layer, position_ids):
        """Write the block as rectangles of rows x columns that do not meet, the last one read back through."""
        count = position_ids.shape[1]
        split = int(self.some(1).abs() * 10) % (count + 1)
        odd, even = torch.arange(self.rows)[::2], torch.arange(self.rows)[1::2]
        blocks = []
        for rows in (odd, even):
            # Every row has columns of its own, as many as the others: a rotation, cut in two.
            turned = (torch.arange(count)[None] + rows[:, None]) % count
            blocks += [(rows[:, None], turned[:, :split]), (rows[:, None], turned[:, split:])]
        blocks = [b for b in blocks if b[1].numel()]
        order = self.some(len(blocks)).argsort().tolist()
        for i in order:
            rows, columns = blocks[i]
            keys, values = self.some(2, rows.shape[0], HEADS, columns.shape[1], WIDTH)
            self.write_twin(layer, keys, values, rows, columns)
            if i != order[-1]:
                self.cache.write(layer, keys, values, rows, columns)
            else:
                held = CacheWriter(self.cache, layer, rows, columns).update(keys, values, layer)
                self.check_attention(layer, position_ids.gather(1, torch.arange(count).expand_as(position_ids)), rows, held)

    def write_twin(self, layer, keys, values, rows, columns):
        for i in range(keys.shape[0]):
            for j in range(keys.shape[2]):
                row, column = (i, j) if rows is None else (int(rows[i, 0]), int(columns[i, j]))
                self.twin.write(layer, row, column, keys[i, :, j], values[i, :, j])

    def drop(self, layer, chance):
        """Drop tokens at random; what is said of slots without a token must not matter."""
        slots = self.cache.slots[layer]
        if chance == 0.0:
            return
        keep = ~self.flips(self.cache.batch, slots.used, chance=chance) if chance < 1.0 else slots.valid() & False
        dropped = slots.valid() & ~keep
        for row in range(self.cache.batch):
            self.twin.evict(layer, row, set(slots.positions()[row, dropped[row]].tolist()))
        self.cache.evict(layer, keep)

    def check_attention(self, layer, position_ids, rows, held):
        """Compare attention over what a layer was handed, for the block's own queries."""
        chosen = torch.arange(self.rows) if rows is None else rows[:, 0]
        query = self.some(len(chosen), HEADS, position_ids.shape[1], WIDTH)
        for window in (None, 4):
            mask = visible(self.cache.slots[layer], position_ids, window)[chosen]
            output = scaled_dot_product_attention(query, *held, attn_mask=additive(mask, query.dtype))
            for i, row in enumerate(chosen.tolist()):
                # The first and the last query are enough, and the twin is slow.
                for column in {0, position_ids.shape[1] - 1}:
                    wanted = self.twin.attend(layer, row, query[i, :, column], int(position_ids[row, column]), window)
                    if wanted is not None:
                        torch.testing.assert_close(output[i, :, column], wanted, **CLOSE)

    @precondition(lambda self: self.cache.slots and not self.unwritten)
    @rule(layer=st.integers(0, LAYERS - 1), chance=st.sampled_from([0.3, 1.0]))
    def drop_between_forwards(self, layer, chance):
        self.drop(layer, chance)

    @precondition(lambda self: not self.unwritten)
    @rule()
    def commit(self):
        self.cache.commit()
        self.twin.commit()

    @rule()
    def abort(self):
        self.cache.abort()
        self.twin.abort()
        self.unwritten = False

    @rule(data=st.data())
    def rollback(self, data):
        count = data.draw(st.sampled_from([0, 1, 2, 3, self.twin.seen, self.twin.seen + 1, -1]))
        self.unwritten = False
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
        self.cache.recording = self.twin.recording = on

    @rule(batch=st.integers(1, 3))
    def reset(self, batch):
        self.cache.reset()
        self.twin = ReferenceCache(LAYERS)
        self.twin.recording = self.cache.recording
        self.rows, self.unwritten = batch, False

    @invariant()
    def holds_the_same_tokens(self):
        cache, twin = self.cache, self.twin
        assert cache.get_seq_length() == twin.seen
        if not cache.slots:
            assert cache.nbytes() == 0
            return
        assert cache.batch == twin.batch == self.rows
        kept = [[len(twin.held(layer, row)) for row in range(twin.batch)] for layer in range(LAYERS)]
        assert cache.kept().tolist() == kept
        last = [max([t.position for t in twin.held(0, row)], default=-1) for row in range(twin.batch)]
        assert cache.next_positions()[:, 0].tolist() == [p + 1 for p in last]
        for layer, slots in enumerate(cache.slots):
            valid = slots.valid()
            assert not slots.full or bool(valid.all())
            stored = None if cache.layers[layer].keys is None else cache.held(layer)
            for row in range(twin.batch):
                tokens = twin.held(layer, row)
                at = valid[row]
                assert slots.positions()[row, at].tolist() == [t.position for t in tokens]
                # What a forward has not written yet has no key; anything else must have the one it was written with.
                written = [i for i, t in enumerate(tokens) if t.key is not None]
                if not written:
                    continue
                for states, wanted in zip(stored, ("key", "value"), strict=True):
                    states = states[row][:, at][:, written]
                    assert torch.equal(states, torch.stack([getattr(tokens[i], wanted) for i in written], dim=1))

    @invariant()
    def attends_the_same(self):
        if not self.cache.slots or self.unwritten:
            return
        query = some(self.rows, HEADS, 1, WIDTH)
        for layer, window in enumerate((None, 3, 30)):
            if self.cache.layers[layer].keys is None:
                continue
            position = self.cache.slots[layer].positions()[:, -1:] + layer if self.cache.slots[layer].used else None
            if position is None:
                continue
            output = attend(self.cache, layer, query, position, window)
            assert torch.isfinite(output).all()
            for row in range(self.rows):
                wanted = self.twin.attend(layer, row, query[row, :, 0], int(position[row]), window)
                if wanted is not None:
                    torch.testing.assert_close(output[row, :, 0], wanted, **CLOSE)

    @invariant()
    def counts_its_real_storage(self):
        real = 0
        for store, slots in zip(self.cache.layers, self.cache.slots, strict=False):
            for states in (store.keys, store.values):
                if states is not None:
                    assert states.shape[0] == self.cache.batch
                    assert states.shape[2] >= slots.used
                    real += states.numel() * states.element_size()
        assert self.cache.nbytes() == real


CacheMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestCacheAgainstItsTwin = CacheMachine.TestCase
