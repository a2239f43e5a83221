"""The cache against its reference twin, and its promises about memory, dtypes, rollback and transformers."""

import copy
import gc
import itertools
import pickle
import weakref

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference_cache import ReferenceCache
from torch.nn.functional import scaled_dot_product_attention

import anee
from anee_core.cache import AdaptiveCache
from anee_core.cache.layer_store import LayerStore
from anee_core.cache.masks import MaskMaker, additive, visible
from anee_core.cache.slots import Slots
from anee_core.cache.token_logs import UNKNOWN, FeedbackLog
from anee_core.cache.writer import CacheWriter
from anee_core.errors import CacheError

LAYERS, HEADS, WIDTH = 3, 2, 4
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors as small as these are only slower with more threads, a lot where cores are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def some(*shape, seed=0, dtype=torch.float32):
    """Return random numbers that depend on nothing but the arguments."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def attend(cache, layer, query, position, window=None, held=None, rows=None):
    """Return attention [R, H, T, Dh] of queries at positions [R, T] over a layer's slots, through the cache's mask."""
    slots = cache.slots[layer]
    rows = torch.arange(cache.batch) if rows is None else rows
    everywhere = position.new_zeros(cache.batch, position.shape[1])
    everywhere[rows] = position
    mask = additive(visible(slots, everywhere, window)[rows], query.dtype)
    return scaled_dot_product_attention(query, *(held or cache.keys_values(layer)), attn_mask=mask)


# Against the twin.


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


CacheMachine.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestCacheAgainstItsTwin = CacheMachine.TestCase


# One promise at a time.


def open_block(cache, count, batch=2, real=None, dtype=torch.float32, seed=0):
    """Begin a forward over ``count`` tokens and write every layer; return each layer's keys and values."""
    cache.begin(torch.arange(cache.seen, cache.seen + count).expand(batch, -1), real)
    written = []
    for layer in range(len(cache.layers)):
        seeds = (100 * seed + 2 * layer, 100 * seed + 2 * layer + 1)
        keys, values = (some(batch, HEADS, count, WIDTH, seed=s, dtype=dtype) for s in seeds)
        cache.write(layer, keys, values)
        written.append((keys, values))
    return written


def feed(cache, count, **options):
    """Run a whole forward over ``count`` tokens."""
    written = open_block(cache, count, **options)
    cache.commit()
    return written


def evict_but_last(cache, count):
    """Drop all but the last ``count`` slots of every layer."""
    for layer, slots in enumerate(cache.slots):
        cache.evict(layer, (torch.arange(slots.used) >= slots.used - count).expand(cache.batch, 1, -1))


def snapshot(cache):
    """Return the logical length, and for each layer and row the positions, keys and values of the tokens held."""
    rows = []
    for layer, row in itertools.product(range(len(cache.slots)), range(cache.batch)):
        valid = cache.slots[layer].valid()[row]
        keys, values = cache.keys_values(layer)
        rows.append((cache.slots[layer].positions()[row, valid], keys[row][:, valid], values[row][:, valid]))
    return cache.get_seq_length(), [tuple(t.clone() for t in row) for row in rows]


def assert_same(before, after):
    assert before[0] == after[0]
    assert len(before[1]) == len(after[1])
    for old, new in zip(before[1], after[1], strict=True):
        assert all(torch.equal(left, right) for left, right in zip(old, new, strict=True))


def storage_bytes(batch, capacity, itemsize=4):
    return LAYERS * 2 * batch * HEADS * capacity * WIDTH * itemsize


def test_storage_grows_by_doubling_and_is_written_in_place_in_between():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 7)
    capacities, places = [], set()
    for step in range(300):
        feed(cache, 1, seed=step)
        store = cache.layers[1]
        capacities.append(store.keys.shape[2])
        places.add((store.keys.shape[2], store.keys.data_ptr(), store.values.data_ptr()))
    assert sorted(set(capacities)) == [64, 128, 256, 512]
    assert len(places) == 4


def test_a_token_that_fits_allocates_no_storage_and_concatenates_nothing(monkeypatch):
    cache = AdaptiveCache(LAYERS, capacity=100)
    feed(cache, 10)

    def refuse(*args, **kwargs):
        raise AssertionError("there is room for this token")

    monkeypatch.setattr(torch, "cat", refuse)
    monkeypatch.setattr(LayerStore, "_allocate", refuse)
    for step in range(90):
        feed(cache, 1, seed=step)
    monkeypatch.undo()
    assert cache.nbytes() == storage_bytes(2, 100)


def test_layers_that_hold_the_same_tokens_share_their_bookkeeping():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4)
    assert len({id(slots) for slots in cache.slots}) == 1
    cache.evict(1, torch.ones(2, 1, 4, dtype=torch.bool))
    assert cache.slots[0] is cache.slots[2]
    assert cache.slots[0] is not cache.slots[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_and_bits_survive_growth_compaction_and_reordering(dtype):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 50, dtype=dtype)
    written = feed(cache, 30, dtype=dtype, seed=1)
    open_block(cache, 1, dtype=dtype, seed=2)
    evict_but_last(cache, 6)
    cache.commit()
    cache.reorder(torch.tensor([1, 0, 1]))
    for layer in range(LAYERS):
        for held, given in zip(cache.keys_values(layer), written[layer], strict=True):
            assert held.dtype == dtype
            assert torch.equal(held[:, :, :5], given[[1, 0, 1], :, -5:])
    assert cache.nbytes() == storage_bytes(3, cache.slots[0].capacity, itemsize=dtype.itemsize)


def test_eviction_frees_memory_at_commit():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 200)
    open_block(cache, 1)
    full = cache.nbytes()
    assert full == storage_bytes(2, 400)
    evict_but_last(cache, 18)
    assert cache.nbytes() == full
    cache.commit()
    # 18 tokens at a load factor of 0.9, and 16 to spare.
    assert [store.keys.shape[2] for store in cache.layers] == [36] * LAYERS
    assert [slots.capacity for slots in cache.slots] == [36] * LAYERS
    assert cache.nbytes() == storage_bytes(2, 36)


def test_layers_shrink_each_to_their_own_size():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 100)
    cache.evict(0, (torch.arange(100) >= 91).expand(2, 1, -1))
    cache.evict(1, torch.stack((torch.arange(100) >= 55, torch.arange(100) >= 99))[:, None])
    cache.commit()
    assert [store.keys.shape[2] for store in cache.layers] == [26, 66, 100]
    assert cache.kept().tolist() == [[9, 9], [45, 1], [100, 100]]


def test_dropping_few_tokens_moves_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 100)
    place = cache.layers[0].keys.data_ptr()
    cache.evict(0, (torch.arange(100) >= 9).expand(2, 1, -1))
    cache.commit()
    assert cache.layers[0].keys.data_ptr() == place
    assert cache.kept()[0].tolist() == [91, 91]


def test_memory_stays_bounded_under_a_steady_window():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 64)
    sizes = []
    for step in range(150):
        open_block(cache, 1, seed=step)
        evict_but_last(cache, 20)
        cache.commit()
        sizes.append(cache.nbytes())
    assert set(sizes) == {storage_bytes(2, 38)}
    assert cache.get_seq_length() == 214


def test_dropped_tokens_come_back_on_rollback_while_recording():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 40)
    cache.activate_past_recording()
    before = snapshot(cache)
    for step in range(5):
        open_block(cache, 2, seed=step + 1)
        evict_but_last(cache, 3)
        cache.commit()
    assert cache.kept().tolist() == [[3, 3]] * LAYERS
    cache.rollback(10)
    assert_same(before, snapshot(cache))


def test_rollback_below_freed_tokens_is_refused_and_changes_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 10)
    evict_but_last(cache, 4)
    cache.commit()
    feed(cache, 3, seed=1)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="freed; call activate_past_recording"):
        cache.rollback(4)
    assert_same(before, snapshot(cache))
    cache.rollback(3)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("padded", [False, True])
def test_a_rollback_that_needs_no_freed_token_works_after_compaction(padded):
    cache = AdaptiveCache(LAYERS)
    # Behind the newest real token of every row, slots may hold none.
    real = torch.tensor([[True, padded, False], [True, True, False]]) if padded else None
    feed(cache, 40)
    cache.activate_past_recording()
    evict_but_last(cache, 4)
    feed(cache, 2, seed=1)
    feed(cache, 3, seed=2, real=real)
    cache.keeps_dropped = False
    feed(cache, 1, seed=3)
    assert cache.slots[0].capacity < 40
    cache.rollback(4)
    assert snapshot(cache)[1][0][0].tolist() == [36, 37, 38, 39, 40, 41]
    assert cache.kept().tolist() == [[6, 6]] * LAYERS
    written = feed(cache, 2, seed=4)
    positions, keys, _ = snapshot(cache)[1][0]
    assert positions.tolist() == [36, 37, 38, 39, 40, 41, 42, 43]
    assert torch.equal(keys[:, -2:], written[0][0][0])


def test_an_aborted_drop_does_not_limit_later_rollbacks():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 6)
    before = snapshot(cache)
    open_block(cache, 1, seed=1)
    evict_but_last(cache, 1)
    cache.abort()
    feed(cache, 1, seed=2)
    cache.rollback(1)
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize("count", [-1, 6])
def test_rollback_of_an_impossible_number_is_refused(count):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    with pytest.raises(CacheError, match=f"cannot roll back {count} tokens: 5 were seen"):
        cache.rollback(count)


def test_crop_takes_a_number_to_remove_or_a_length_to_keep():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before = snapshot(cache)
    feed(cache, 3, seed=1)
    assert cache.is_croppable
    cache.crop(0)
    assert cache.get_seq_length() == 8
    cache.crop(-3)
    assert_same(before, snapshot(cache))
    feed(cache, 3, seed=1)
    cache.crop(5)  # as older versions of transformers say it
    assert_same(before, snapshot(cache))
    cache.crop(9)
    assert_same(before, snapshot(cache))


def test_lengths_told_to_transformers_are_logical():
    cache = AdaptiveCache(LAYERS)
    assert cache.get_seq_length() == 0
    assert cache.get_mask_sizes(4, 0) == (4, 0)
    feed(cache, 30)
    evict_but_last(cache, 5)
    cache.commit()
    assert [cache.get_seq_length(layer) for layer in range(LAYERS)] == [30] * LAYERS
    assert [store.get_seq_length() for store in cache.layers] == [30] * LAYERS
    assert cache.get_query_offset(1) == 30
    assert cache.get_mask_sizes(2, 1) == (7, 25)
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.next_positions().tolist() == [[30], [30]]


def test_next_positions_are_zero_in_a_cache_that_was_emptied():
    cache = AdaptiveCache(LAYERS)
    open_block(cache, 3, real=torch.tensor([[False, True, True], [True, True, True]]))
    cache.abort()
    assert cache.next_positions().tolist() == [[0], [0]]
    feed(cache, 3, real=torch.tensor([[False, True, True], [True, True, True]]))
    assert cache.next_positions().tolist() == [[3], [3]]
    cache.rollback(3)
    assert cache.next_positions().tolist() == [[0], [0]]


def test_another_batch_size_is_refused_and_changes_nothing():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4)
    before = snapshot(cache)
    with pytest.raises(CacheError, match="holds 2 rows and got 3: start a new cache, or reorder"):
        cache.begin(torch.zeros(3, 1, dtype=torch.long), None)
    assert_same(before, snapshot(cache))
    feed(cache, 1)
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("reached", [0, 1, LAYERS])
@pytest.mark.parametrize("recording", [False, True])
def test_a_failed_forward_leaves_no_trace(reached, recording):
    cache, undisturbed = AdaptiveCache(LAYERS), AdaptiveCache(LAYERS)
    real = torch.tensor([[False] * 3 + [True] * 17, [True] * 20])
    for each in (cache, undisturbed):
        each.keeps_dropped = recording
        feed(each, 20, real=real)
        open_block(each, 1, seed=1)
        evict_but_last(each, 8)
        each.commit()
    # Far more tokens than there is room for, and drops in the layers that were reached.
    cache.begin(torch.arange(21, 321).expand(2, -1), torch.rand(2, 300) < 0.5)
    for layer in range(reached):
        cache.write(layer, *(some(2, HEADS, 300, WIDTH, seed=9) for _ in range(2)))
        cache.evict(layer, torch.rand(2, 1, cache.slots[layer].used) < 0.5)
    cache.abort()
    assert_same(snapshot(undisturbed), snapshot(cache))
    for each in (cache, undisturbed):
        feed(each, 2, seed=3)
    assert_same(snapshot(undisturbed), snapshot(cache))
    query = some(2, HEADS, 2, WIDTH)
    position = torch.tensor([[21, 22], [21, 22]])
    for layer in range(LAYERS):
        wanted = attend(undisturbed, layer, query, position, 9)
        torch.testing.assert_close(attend(cache, layer, query, position, 9), wanted, **CLOSE)


@pytest.mark.parametrize("fails_at", range(2 * LAYERS))
def test_running_out_of_memory_while_growing_leaves_no_trace(fails_at, monkeypatch):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before = snapshot(cache)
    allocate, calls = LayerStore._allocate, itertools.count()

    def scarce(self, like, capacity):
        if next(calls) == fails_at:
            raise torch.OutOfMemoryError
        return allocate(self, like, capacity)

    monkeypatch.setattr(LayerStore, "_allocate", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        open_block(cache, 2)
    assert_same(before, snapshot(cache))
    feed(cache, 1, seed=1)
    assert cache.kept().tolist() == [[6, 6]] * LAYERS
    cache.rollback(1)
    assert_same(before, snapshot(cache))


@pytest.mark.parametrize("alike", [True, False])
def test_running_out_of_memory_while_compacting_leaves_an_empty_cache(alike, monkeypatch):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 60)
    open_block(cache, 1)
    keep = torch.zeros(cache.batch, 1, 61, dtype=torch.bool)
    for layer_idx in [None] if alike else range(LAYERS):
        cache.evict(layer_idx, keep)
    assert cache.alike == alike
    allocate, calls = LayerStore._allocate, itertools.count()

    def scarce(self, like, capacity):
        if next(calls) == 3:  # keys and values of one layer have moved
            raise torch.OutOfMemoryError
        return allocate(self, like, capacity)

    monkeypatch.setattr(LayerStore, "_allocate", scarce)
    with pytest.raises(torch.OutOfMemoryError):
        cache.commit()
    assert cache.seen == 0
    assert cache.nbytes() == 0
    monkeypatch.undo()
    feed(cache, 3)
    assert cache.kept().tolist() == [[3] * cache.batch] * LAYERS


@pytest.mark.parametrize("policy", ["dense", "window:sinks=1,recent=3"])
def test_a_model_goes_on_as_if_a_failed_forward_had_not_been(tiny_llama, policy):
    model = anee.load(tiny_llama, policy)
    prompt, more = torch.arange(2, 14).reshape(2, 6), torch.tensor([[20, 21], [22, 23]])
    wanted_cache, cache = model.new_cache(), model.new_cache()
    with torch.no_grad():
        for each in (wanted_cache, cache):
            model(prompt, past_key_values=each)
        wanted = model(more, past_key_values=wanted_cache).logits

        def fail(*args):
            raise KeyboardInterrupt

        hook = tiny_llama.model.layers[2].register_forward_pre_hook(fail)
        before = snapshot(cache)
        with pytest.raises(KeyboardInterrupt):
            model(more, past_key_values=cache)
        hook.remove()
        assert_same(before, snapshot(cache))
        assert torch.equal(model(more, past_key_values=cache).logits, wanted)


@pytest.mark.parametrize("trained", ["keys", "values", "both"])
@pytest.mark.parametrize("end", ["commit", "abort"])
def test_no_graph_outlives_its_forward(trained, end):
    cache = AdaptiveCache(1)
    feed(cache, 3)
    leaf = some(2, HEADS, 1, WIDTH).requires_grad_()
    keys = leaf.detach() if trained == "values" else leaf * 2
    values = leaf.detach() if trained == "keys" else leaf.exp()
    graph = weakref.ref(values if trained != "keys" else keys)
    cache.begin(torch.full((2, 1), 3), None)
    held = CacheWriter(cache, 0).update(keys, values, 0)
    scaled_dot_product_attention(some(2, HEADS, 1, WIDTH), *held).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0
    getattr(cache, end)()
    assert not cache.layers[0].keys.requires_grad
    assert not cache.layers[0].values.requires_grad
    del keys, values, held
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("change", ["nothing", "growth", "a drop", "compaction", "a reordering"])
def test_a_cache_filled_in_inference_mode_goes_on_outside(change, trained):
    cache = AdaptiveCache(LAYERS, capacity=45 if change == "growth" else 100)
    with torch.inference_mode():
        feed(cache, 40)
        cache.keeps_dropped = change == "a drop"
        if change in ("a drop", "compaction"):
            cache.evict(1, torch.arange(40).expand(2, 1, -1) > 25)
        cache.commit()
        if change == "a reordering":
            cache.reorder(torch.tensor([1, 0]))
        feed(cache, 10, seed=1)
    cache.rollback(1)
    cache.evict(1, torch.arange(cache.slots[1].used).expand(2, 1, -1) > 5)
    cache.begin(torch.full((2, 1), 49), None)
    for layer in range(LAYERS):
        cache.write(layer, *(some(2, HEADS, 1, WIDTH).requires_grad_(trained) for _ in range(2)))
    cache.commit()
    assert cache.get_seq_length() == 50


def test_compaction_does_not_touch_tensors_handed_out_before():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 60)
    cache.begin(torch.full((2, 1), 60), None)
    handed_out = []
    for layer in range(LAYERS):
        rows = (torch.tensor([[1], [0]]), torch.tensor([[0], [0]])) if layer == 1 else (None, None)
        new = [some(2, HEADS, 1, WIDTH, seed=50 + i) for i in (0, 1)]
        handed_out += CacheWriter(cache, layer, *rows).update(*new, layer)
    for layer in range(LAYERS):
        handed_out += cache.keys_values(layer)
    copies = [t.clone() for t in handed_out]
    evict_but_last(cache, 5)
    cache.commit()
    feed(cache, 30, seed=2)
    assert all(torch.equal(old, copy) for old, copy in zip(handed_out, copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_slots_that_were_never_written_give_no_nan(dtype):
    cache = AdaptiveCache(1)
    # Freed memory full of NaN is what an allocation that is not cleared would pick up.
    for shape in [(2, HEADS, 6, WIDTH)] * 8 + [(2, HEADS, 64, WIDTH)] * 8:
        torch.full(shape, torch.nan, dtype=dtype)
    real = torch.tensor([[False] * 4 + [True] * 2, [True] * 6])
    cache.begin(torch.tensor([[0, 0, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5]]), real)
    skipped = (torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]]), torch.tensor([[4, 5, 0, 1, 2, 3, 4, 5]]))
    cache.write(0, *(some(1, HEADS, 8, WIDTH, seed=i, dtype=dtype) for i in (0, 1)), *skipped)
    query = some(2, HEADS, 1, WIDTH, dtype=dtype)
    for count in (1, 70):
        # The second query sees nothing at all.
        for position in (torch.tensor([[5], [5]]), torch.tensor([[-1], [-1]])):
            assert torch.isfinite(attend(cache, 0, query, position)).all()
        cache.commit()
        cache.begin(torch.arange(6, 6 + count).expand(2, -1), None)
        assert all(torch.isfinite(states).all() for states in cache.keys_values(0))


def test_rows_can_be_repeated_selected_and_followed():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 4, real=torch.tensor([[False, True, True, True], [True, True, True, True]]))
    cache.feedback = FeedbackLog(2, torch.device("cpu"), 4, 0.5)
    cache.feedback.record(4, torch.tensor([[0.25], [0.75]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), None)
    spent = [2.25, 2.75]
    rows = snapshot(cache)[1]

    def assert_rows(order):
        length, after = snapshot(cache)
        assert_same((4, [rows[2 * layer + row] for layer in range(LAYERS) for row in order]), (length, after))
        assert cache.feedback.entry(5)[:, 0, 2].tolist() == [spent[row] for row in order]

    cache.batch_repeat_interleave(2)
    assert_rows([0, 0, 1, 1])
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert_rows([1, 0])
    cache.reorder_cache(torch.tensor([1, 1]))
    assert_rows([0, 0])


def test_copies_of_a_row_go_their_own_way():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 3, batch=1)
    cache.batch_repeat_interleave(2)
    cache.evict(0, torch.tensor([[[True, True, True]], [[False, False, True]]]))
    written = feed(cache, 1, batch=2, seed=1)
    assert cache.kept().tolist() == [[4, 2], [4, 4], [4, 4]]
    _, keys, _ = snapshot(cache)[1][1]
    assert torch.equal(keys[:, -1:], written[0][0][1])


def test_reset_frees_the_storage_and_takes_another_batch_size():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 40)
    evict_but_last(cache, 4)
    cache.commit()
    cache.reset()
    assert (cache.get_seq_length(), cache.nbytes(), cache.kept().numel()) == (0, 0, 0)
    feed(cache, 3, batch=5)
    cache.rollback(1)
    assert cache.kept().tolist() == [[2] * 5] * LAYERS


def test_nbytes_of_an_empty_cache_is_zero_and_reordering_it_does_nothing():
    cache = AdaptiveCache(LAYERS, capacity=1000)
    cache.reorder(torch.tensor([0, 0]))
    cache.commit()
    cache.rollback(0)
    assert cache.nbytes() == 0
    feed(cache, 3, batch=4)
    assert cache.nbytes() == storage_bytes(4, 1000)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_gpt2"])
def test_a_plain_transformers_model_is_refused_in_words(family, attention, request):
    model = request.getfixturevalue(family)
    used = model.config._attn_implementation
    model.set_attn_implementation(attention)
    try:
        with pytest.raises(CacheError, match="driven by ANEE's engine: pass it to an AdaptiveModel"):
            model(torch.tensor([[5, 6, 7]]), past_key_values=AdaptiveCache(model.config.num_hidden_layers))
    finally:
        model.set_attn_implementation(used)


# Masks.


def patchy_slots(batch=3, count=12, seed=0):
    """Return slots with padding, holes and gaps in the positions."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.randint(1, 3, (batch, count), generator=generator).cumsum(1)
    slots = Slots(batch, torch.device("cpu"), count + 5)
    slots.extend(position, torch.rand(batch, count, generator=generator) < 0.7, seen=0)
    slots.evict(torch.rand(batch, 1, count, generator=generator) < 0.7, seen=count)
    return slots


@pytest.mark.parametrize("window", [None, 1, 4, 100])
def test_visibility_is_what_a_double_loop_finds(window):
    slots = patchy_slots()
    query_position = torch.tensor([[0, 3, 7, 30], [5, 5, 6, 7], [12, 11, 10, 1]])
    found = visible(slots, query_position, window)
    assert found.shape == (3, 1, 4, 12)
    for row, query, slot in itertools.product(range(3), range(4), range(12)):
        mine, its = int(query_position[row, query]), int(slots.position[row, slot])
        wanted = bool(slots.valid()[row, slot]) and its <= mine and (window is None or mine - its < window)
        assert bool(found[row, 0, query, slot]) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_additive_mask_hides_exactly_what_is_not_visible(dtype):
    seen = visible(patchy_slots(), torch.tensor([[9], [9], [9]]), None)
    mask = additive(seen, dtype)
    assert mask.dtype == dtype
    assert torch.equal(mask == 0, seen)
    assert torch.isfinite(mask).all()
    assert (mask.float().softmax(-1)[~seen] == 0).all()


@pytest.mark.parametrize("implicit_causal", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_a_mask_is_left_out_only_where_attention_needs_none(implicit_causal, subset):
    left_out = 0
    for first, count, window, padded, dropped in itertools.product(
        (0, 5), (1, 4), (None, 3, 5, 50), (False, True), (False, True)
    ):
        cache = AdaptiveCache(1)
        if first:
            feed(cache, first, real=(torch.arange(first) > 0).expand(2, -1) if padded else None)
        if dropped and first:
            cache.evict(0, (torch.arange(first) != 2).expand(2, 1, -1))
            cache.commit()
        position_ids = torch.arange(first, first + count).expand(2, -1)
        cache.begin(position_ids, None)
        slots = cache.slots[0]
        if MaskMaker(position_ids, torch.float32, implicit_causal).needed(slots, window, subset):
            continue
        left_out += 1
        seen = visible(slots, position_ids, window)
        # Without a mask, every query sees all slots; a causal backend at a first block, those up to its own.
        # The tokens of a subset are not where such a backend takes them to be.
        causal = implicit_causal and not first and not subset
        assert torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))
    assert left_out > 0


def test_one_mask_serves_the_layers_that_hold_the_same_tokens():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    cache.evict(2, (torch.arange(5) > 1).expand(2, 1, -1))
    cache.begin(torch.full((2, 1), 5), None)
    masks = MaskMaker(torch.full((2, 1), 5), torch.float32, implicit_causal=True)
    first = masks.mask(cache.slots[0], None)
    assert masks.mask(cache.slots[1], None) is first
    for slots, window in ((cache.slots[2], None), (cache.slots[0], 3)):
        assert torch.equal(masks.mask(slots, window) == 0, visible(slots, torch.full((2, 1), 5), window))


def test_compaction_changes_no_attention_output():
    cache = AdaptiveCache(LAYERS)
    feed(cache, 90, batch=3, real=torch.arange(90) >= torch.tensor([[0], [7], [40]]))
    open_block(cache, 4, batch=3, seed=1)
    for layer, chance in enumerate((0.2, 0.5, 0.05)):
        cache.evict(layer, torch.rand(3, 1, 94, generator=torch.Generator().manual_seed(layer)) < chance)
    query, position = some(3, HEADS, 2, WIDTH), torch.tensor([[92, 94]] * 3)
    before = [attend(cache, layer, query, position, window) for layer in range(LAYERS) for window in (None, 20)]
    capacities = [slots.capacity for slots in cache.slots]
    cache.commit()
    assert all(slots.capacity < old for slots, old in zip(cache.slots, capacities, strict=True))
    after = [attend(cache, layer, query, position, window) for layer in range(LAYERS) for window in (None, 20)]
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(old, new, **CLOSE)


# Feedback.


def naive_log(start, budget, blocks):
    """Return one row's feedback entries: after ``start`` tokens, blocks of (costs, distribution, real)."""
    entries = {start: [*UNKNOWN, budget * start]}
    index = start
    for costs, distribution, real in blocks:
        carried, spent = entries[index][:2], entries[index][2]
        for cost, is_real in zip(costs, real, strict=True):
            index += 1
            spent += cost if is_real else 0.0
            entries[index] = [*UNKNOWN, spent]
        entries[index][:2] = distribution if any(real) else carried
    return entries


def test_feedback_is_what_a_naive_log_holds():
    generator = torch.Generator().manual_seed(0)
    log = FeedbackLog(3, torch.device("cpu"), 4, 0.5)
    blocks, index = [], 4
    for count in [3, 1, 1, 2, 1, 5] + [1] * 80 + [200]:
        spent, drawn = torch.rand(3, count, generator=generator), torch.rand(3, 2, generator=generator)
        real = torch.rand(3, count, generator=generator) < 0.6 if len(blocks) % 3 else None
        log.record(index, spent, drawn, real)
        index += count
        blocks.append((spent, drawn, torch.ones(3, count, dtype=torch.bool) if real is None else real))
    for row in range(3):
        wanted = naive_log(4, 0.5, [tuple(part[row].tolist() for part in block) for block in blocks])
        for at, entry in wanted.items():
            assert log.entry(at)[row, 0].tolist() == pytest.approx(entry, abs=1e-3)


def test_a_row_of_padding_keeps_what_it_had():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.ones(2, 2), torch.tensor([[0.1, 0.9], [0.2, 0.8]]), None)
    log.record(2, torch.ones(2, 1), torch.tensor([[0.3, 0.7], [0.4, 0.6]]), torch.tensor([[True], [False]]))
    assert log.entry(3)[:, 0].tolist() == [pytest.approx([0.3, 0.7, 3.0]), pytest.approx([0.2, 0.8, 2.0])]


def test_tokens_seen_before_the_log_count_as_having_cost_the_budget():
    log = FeedbackLog(1, torch.device("cpu"), 4, 0.5)
    assert [log.entry(index)[0, 0].tolist() for index in range(5)] == [[*UNKNOWN, 0.5 * index] for index in range(5)]


def test_feedback_grows_seldom():
    log = FeedbackLog(1, torch.device("cpu"), 0, 1.0)
    places = set()
    for index in range(1000):
        log.record(index, torch.ones(1, 1), torch.ones(1, 2), None)
        places.add(log._entries.shape[1])
    assert len(places) <= 6
    assert log.entry(1000)[0, 0, 2] == 1000


def test_feedback_noted_again_after_a_rollback_replaces_the_old():
    log = FeedbackLog(1, torch.device("cpu"), 0, 1.0)
    for cost in (0.5, 0.25):
        log.record(0, torch.full((1, 3), cost), torch.full((1, 2), cost), None)
    assert [log.entry(i)[0, 0, 2].item() for i in range(4)] == [0.0, 0.25, 0.5, 0.75]
    assert log.entry(3)[0, 0, :2].tolist() == [0.25, 0.25]


def test_feedback_follows_rows_and_copies_go_their_own_way():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.tensor([[1.0], [2.0]]), torch.tensor([[0.1, 0.2], [0.3, 0.4]]), None)
    log.reorder(torch.tensor([1, 1, 0]))
    log.record(1, torch.tensor([[1.0], [10.0], [100.0]]), torch.ones(3, 2), None)
    assert log.entry(1)[:, 0, 2].tolist() == [2.0, 2.0, 1.0]
    assert log.entry(2)[:, 0, 2].tolist() == [3.0, 12.0, 101.0]


@pytest.mark.parametrize("change", ["nothing", "growth", "a reordering"])
def test_feedback_of_inference_mode_goes_on_outside(change):
    with torch.inference_mode():
        log = FeedbackLog(2, torch.device("cpu"), 3, 1.0)
        if change == "growth":
            log.record(3, torch.ones(2, 1), torch.ones(2, 2), None)
        elif change == "a reordering":
            log.reorder(torch.tensor([1, 0]))
    log.record(2, torch.ones(2, 1), torch.ones(2, 2), None)
    assert log.entry(3)[:, 0].tolist() == [[1.0, 1.0, 3.0]] * 2


def test_feedback_keeps_no_graph():
    log = FeedbackLog(2, torch.device("cpu"), 0, 1.0)
    log.record(0, torch.ones(2, 1), torch.rand(2, 2, requires_grad=True) * 2, None)
    assert not log.entry(1).requires_grad


def test_the_twin_is_told_apart_by_a_single_missing_token():
    # The comparison above would be worthless if the twin forgave a difference.
    twin = ReferenceCache(1)
    twin.begin([[0, 1, 2]], [[False, True, True]])
    for column in range(3):
        twin.write(0, 0, column, *some(2, HEADS, WIDTH, seed=column))
    twin.commit()
    query = some(HEADS, WIDTH)
    assert [t.position for t in twin.held(0, 0)] == [1, 2]
    both = twin.attend(0, 0, query, 2)
    assert not torch.allclose(both, twin.attend(0, 0, query, 1))
    twin.evict(0, 0, {1})
    torch.testing.assert_close(twin.attend(0, 0, query, 2), twin.held(0, 0)[0].value)
    assert not torch.allclose(both, twin.attend(0, 0, query, 2))
    assert twin.attend(0, 0, query, 1) is None


def test_memory_goes_with_the_last_reference(tiny_llama):
    gc.collect()
    gc.disable()
    try:
        model = anee.load(tiny_llama, "window:sinks=1,recent=3")
        with torch.no_grad():
            cache = model(torch.randint(3, 97, (1, 9))).past_key_values
            model(torch.randint(3, 97, (1, 1)), past_key_values=cache)
        keys = weakref.ref(cache.layers[0].keys)
        del cache
        assert keys() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_a_copy_goes_its_own_way(copied):
    cache = AdaptiveCache(LAYERS)
    feed(cache, 5)
    before, other = snapshot(cache), copied(cache)
    feed(other, 3, seed=1)
    assert_same(before, snapshot(cache))
    assert other.layers[0].get_seq_length() == 8
    assert cache.layers[0].get_seq_length() == 5
    del cache
    feed(other, 90, seed=2)
    assert other.kept().tolist() == [[98, 98]] * LAYERS
