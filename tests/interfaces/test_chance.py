"""Random numbers that follow from where they are used."""

import pytest
import torch

from anee_core.interfaces import uniform


def drawn(layer, position, token, salt):
    """The same, for one number, in Python's own integers."""
    state = (0x2545F491 + 0x9E3779B * salt) % 2**31
    for value in (layer, position, token):
        state = (state ^ (value * 0x1B873593 + 0x165667B1)) % 2**31
        state = state * 0x45D9F3B % 2**31
        state ^= state >> 15
        state = state * 0x2C1B3C6D % 2**31
        state ^= state >> 13
    return state / 2**31


@pytest.mark.parametrize("salt", [0, 1, 12345])
def test_numbers_follow_from_layer_position_and_token(salt):
    layers, positions, tokens = torch.arange(3)[:, None, None], torch.tensor([[0, 5], [99999, 1]]), torch.tensor(7)
    found = uniform(layers, positions, tokens, salt)
    assert found.shape == (3, 2, 2)
    assert found.dtype == torch.float64
    wanted = [[[drawn(i, p, 7, salt) for p in row] for row in positions.tolist()] for i in range(3)]
    assert found.tolist() == wanted


def test_numbers_are_spread_evenly():
    found = uniform(torch.arange(30)[:, None, None], torch.arange(300)[None], torch.arange(300)[None] * 7, 0)
    assert torch.histc(found.float(), 10, 0, 1) == pytest.approx(900, rel=0.15)
    assert found.max() < 1
