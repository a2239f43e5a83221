"""The closed-form fit against plain least squares, and that it resumes."""

import pytest
import torch
from tiny import adaptive, build, tokens

import anee
from anee_core.calibration import closed_form
from anee_core.calibration.closed_form import fit, relative_error
from anee_core.calibration.options import FitOptions
from anee_core.calibration.ridge import Moments
from anee_core.errors import CheckpointError, InputError


def pairs(inputs=6, outputs=5, count=400):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, inputs, generator=generator, dtype=torch.float64) + 3
    y = x @ torch.randn(inputs, outputs, generator=generator, dtype=torch.float64) + 2
    return x, y + torch.randn(count, outputs, generator=generator, dtype=torch.float64)


def test_full_rank_is_least_squares():
    x, y = pairs()
    moments = Moments(6, 5)
    for piece in range(0, 400, 64):
        moments.add(x[piece : piece + 64], y[piece : piece + 64])
    down, up, bias = moments.reduced(rank=5, ridge=1e-12)
    with_one = torch.cat((x, torch.ones(400, 1, dtype=torch.float64)), 1)
    best = torch.linalg.lstsq(with_one, y).solution
    torch.testing.assert_close((up @ down).T, best[:-1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(bias, best[-1], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_reduced_rank_loses_least(rank):
    x, y = pairs()
    moments = Moments(6, 5)
    moments.add(x, y)
    down, up, bias = moments.reduced(rank, ridge=1e-12)
    assert down.shape == (rank, 6)
    assert up.shape == (5, rank)
    loss = (x @ down.T @ up.T + bias - y).square().mean()
    # The best there is: the singular value decomposition of the unrestricted predictions.
    centred = y - y.mean(0)
    whole = (x - x.mean(0)) @ torch.linalg.lstsq(x - x.mean(0), centred).solution
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ v[:rank] - centred).square().mean()
    torch.testing.assert_close(loss, best, atol=1e-9, rtol=1e-6)


def test_fitted_shortcuts_bring_skipping_closer_to_dense(tmp_path):
    model = adaptive(build("llama"))
    fitted = fit(model, tokens(24, 32), tmp_path / "fit", FitOptions(rank=16), progress=False)
    fitted.shortcuts.save(tmp_path / "shortcuts")
    ids = tokens(4, 32, seed=9)
    with torch.no_grad():
        dense = model(ids).logits
        apart = {
            name: (adaptive(model.model, f"static:skip=2 3{more}")(ids).logits - dense).square().mean()
            for name, more in (("plain", ""), ("fitted", f"+shortcuts:{tmp_path / 'shortcuts'}"))
        }
    assert apart["fitted"] < 0.8 * apart["plain"]


def test_the_gate_foresees_the_error_of_the_shortcut(tmp_path):
    model = adaptive(build("llama"))
    ids = tokens(40, 24)
    fitted = fit(model, ids, tmp_path / "fit", FitOptions(rank=8, skipped=0.0), progress=False)
    with torch.no_grad():
        states = model(ids[:16], output_hidden_states=True).hidden_states
    alike = []
    for layer_idx in range(5):  # after the last one comes the final norm
        before, after = states[layer_idx][:, 4:], states[layer_idx + 1][:, 4:]
        unit = before / before.square().mean(-1, keepdim=True).sqrt()
        down, up, bias = (getattr(fitted.shortcuts, name)[layer_idx] for name in ("down", "up", "bias"))
        error = relative_error(after - before, unit @ down.T @ up.T + bias).log().flatten()
        foreseen = (unit @ fitted.weight[layer_idx] + fitted.bias[layer_idx]).flatten()
        alike.append(float(torch.corrcoef(torch.stack((error, foreseen)))[0, 1]))
        torch.testing.assert_close(fitted.mean[layer_idx], foreseen.mean(), atol=0.1, rtol=0)
        torch.testing.assert_close(fitted.spread[layer_idx], foreseen.std(), atol=0.1, rtol=0.2)
    assert sum(alike) / 5 > 0.35
    assert min(alike) > 0.1


def test_an_interrupted_fit_goes_on(tmp_path, monkeypatch):
    model = anee.load(build("gpt2"))
    whole = fit(model, tokens(6, 12), tmp_path / "whole", FitOptions(rank=4), progress=False)

    class StopFitError(Exception):
        pass

    original, calls = closed_form.Moments.reduced, []

    def reduced(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise StopFitError
        return original(self, *arguments)

    monkeypatch.setattr(closed_form.Moments, "reduced", reduced)
    with pytest.raises(StopFitError):
        fit(model, tokens(6, 12), tmp_path / "parts", FitOptions(rank=4), progress=False)
    again = fit(model, tokens(6, 12), tmp_path / "parts", FitOptions(rank=4), progress=False)
    assert len(calls) == 4 + 3
    assert all(torch.equal(getattr(whole.shortcuts, n), getattr(again.shortcuts, n)) for n in ("down", "up", "bias"))
    assert all(torch.equal(getattr(whole, n), getattr(again, n)) for n in ("weight", "bias", "mean", "spread"))
    with pytest.raises(CheckpointError, match="another model, text or options"):
        fit(model, tokens(6, 12), tmp_path / "parts", FitOptions(rank=5), progress=False)
    with pytest.raises(CheckpointError, match="another model, text or options"):
        fit(model, tokens(6, 12).flip(1), tmp_path / "parts", FitOptions(rank=4), progress=False)  # of the same sum
    (tmp_path / "parts" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be continued"):
        fit(model, tokens(6, 12), tmp_path / "parts", FitOptions(rank=4), progress=False)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(InputError, match="at least 1"):
        FitOptions(rank=0)
    with pytest.raises(InputError, match="skipped is a number, at least 0 and below 1"):
        FitOptions(skipped=1.0)
    with pytest.raises(InputError, match="more than 4 tokens"):
        fit(anee.load(build("gpt2")), tokens(2, 4), tmp_path, progress=False)
