"""The sparse sigmoid against its definition, an independent package and finite differences."""

import math

import pytest
import torch
from entmax import entmax_bisect

from anee_core.errors import InputError
from anee_core.training.sparse_sigmoid import log_survival, slope, sparse_sigmoid

Z = torch.arange(-2000, 2001, dtype=torch.float64) * 1.5e-3


def reference(z, alpha):
    """Return the first entry of alpha-entmax([z, 0]), from the package entmax."""
    return entmax_bisect(torch.stack((z, torch.zeros_like(z)), -1), alpha=alpha, dim=-1, n_iter=80)[..., 0]


@pytest.mark.parametrize("alpha", [1.01, 1.1, 1.3, 1.5, 1.7, 2, 2.5, 4])
def test_equals_the_package_entmax(alpha):
    torch.testing.assert_close(sparse_sigmoid(Z, alpha).double(), reference(Z, alpha), atol=3e-6, rtol=0)


@pytest.mark.parametrize("alpha", [1.002, 1.5, 1.9, 2, 3, 4.9, 5.1, 8, 16, 40])
def test_solves_its_equation_and_saturates_where_it_should(alpha):
    a = alpha - 1
    p = sparse_sigmoid(Z, alpha).double()
    left = (p.pow(a) - (1 - p).pow(a))[Z <= 0]  # fp32 holds a small p to more digits than one close to 1
    torch.testing.assert_close(left, (a * Z[Z <= 0]).clamp(-1, 1), atol=2e-6, rtol=0)
    z = Z.float()
    assert (p[z * a >= 1] == 1).all()
    assert (p[z * a <= -1] == 0).all()
    torch.testing.assert_close(p + p.flip(0), torch.ones_like(p), atol=2e-5, rtol=0)


def test_limits():
    torch.testing.assert_close(sparse_sigmoid(Z, 1.0), Z.float().sigmoid())
    torch.testing.assert_close(sparse_sigmoid(Z, 1 + 1e-8), Z.float().sigmoid())
    torch.testing.assert_close(sparse_sigmoid(Z, 1.0011), Z.float().sigmoid(), atol=1e-3, rtol=0)
    assert torch.equal(sparse_sigmoid(Z, math.inf), (Z.float() > 0).float())
    with pytest.raises(InputError, match="at least 1"):
        sparse_sigmoid(Z, 0.5)


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2, 3])
def test_slope_is_the_derivative(alpha):
    z = Z[(Z.abs() < 0.98 / max(alpha - 1, 0.33)) & (Z.abs() > 1e-3)]
    step = 1e-6
    known = sparse_sigmoid if alpha == 1 else reference
    rise = (known(z + step, alpha).double() - known(z - step, alpha).double()) / (2 * step)
    if alpha > 1:
        torch.testing.assert_close(slope(reference(z, alpha), alpha), rise, atol=1e-4, rtol=1e-3)
    assert (slope(torch.tensor([0.0, 1.0]), max(alpha, 1.2)) == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.2, 1.5, 2, 3])
def test_gradient_of_survival_equals_finite_differences(alpha):
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 6, 8, generator=generator) * 0.4 / max(alpha - 1, 0.3)).requires_grad_()
    weights = torch.randn(2, 6, 8, generator=generator)
    (log_survival(logits, alpha).exp() * weights).sum().backward()

    def survival(z):
        p = z.sigmoid() if alpha == 1 else reference(z, alpha)
        droppable = torch.ones(6, 8, dtype=torch.bool).tril(1)  # two slots were there before the six queries
        return (torch.where(droppable, p, 1.0).cumprod(-2) * weights).sum((-3, -2, -1))

    z, step = logits.detach().double(), 1e-5
    nudges = step * torch.eye(z.numel(), dtype=torch.float64).view(-1, *z.shape)  # one number at a time
    wanted = (survival(z + nudges) - survival(z - nudges)) / (2 * step)
    torch.testing.assert_close(logits.grad.flatten().double(), wanted, atol=3e-5, rtol=1e-3)


def test_survival_is_a_product_that_starts_after_the_token_itself():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(1))
    found = log_survival(logits, 1.5).exp()
    p = sparse_sigmoid(logits, 1.5)
    for i in range(5):
        for j in range(5):
            wanted = math.prod(float(p[m, j]) for m in range(j + 1, i + 1))
            assert found[i, j] == pytest.approx(wanted, abs=1e-6)


def test_what_is_gone_is_gone_without_infinities():
    logits = torch.full((1, 400, 400), -9.0, requires_grad=True)
    survival = log_survival(logits, 2.0)
    assert survival.isfinite().all()
    assert (survival.exp().tril(-1) == 0).all()
    survival.sum().backward()
    assert (logits.grad == 0).all()


def test_memory_saved_for_the_backward_pass_is_one_tensor():
    saved = []
    logits = torch.randn(1, 64, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        log_survival(logits, 1.7)
    assert sum(saved) == 64 * 64
