"""What distillation minimises, against formulas in float64."""

from __future__ import annotations

import pytest
import torch

from featherweight.distillation.losses import distillation_loss, top_k


def divergence_formula(kind: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """The definitions, on probabilities."""
    if kind == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if kind == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    m = (p + q) / 2
    return ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)) / 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("shape", [(24, 50), (600, 3000)])
def test_a_divergence_and_its_gradient_are_the_formula(kind: str, temperature: float, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    s = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    t = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    labels = torch.randint(shape[1], shape[:1], generator=generator)
    labels[::3] = -100
    loss = distillation_loss(s, t, labels, temperature, 0.7, kind)
    found = torch.autograd.grad(2 * loss, s)[0]
    d = divergence_formula(kind, (t / temperature).softmax(-1), (s / temperature).softmax(-1))
    expected = 0.7 * temperature**2 * d[labels >= 0].mean() + 0.3 * torch.nn.functional.cross_entropy(s, labels)
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, torch.autograd.grad(2 * expected, s)[0], rtol=1e-8, atol=1e-12)
    assert not found[::3].any()


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_divergence_of_the_likeliest_tokens_is_a_lower_bound_and_exact_for_all(kind: str, k: int) -> None:
    generator = torch.Generator().manual_seed(1)
    s = (2 * torch.randn(12, 40, generator=generator, dtype=torch.float64)).requires_grad_()
    t = 2 * torch.randn(12, 40, generator=generator, dtype=torch.float64)
    labels = torch.zeros(12, dtype=torch.long)
    kept = top_k(t, 2.0, k)
    assert kept.log_p.exp().sum(-1).allclose(torch.ones(12, dtype=torch.float64))
    loss = distillation_loss(s, kept, labels, 2.0, 1.0, kind)
    whole = distillation_loss(s, t, labels, 2.0, 1.0, kind)
    gradient = torch.autograd.grad(loss, s)[0]
    q = (s / 2).softmax(-1)
    buckets = q.gather(1, kept.ids)
    if k < 40:
        assert loss < whole
        buckets = torch.cat([buckets, 1 - buckets.sum(-1, keepdim=True)], 1)
    else:
        torch.testing.assert_close(loss, whole)
    expected = 4 * divergence_formula(kind, kept.log_p.exp(), buckets).mean()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, s)[0], rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jensen_shannon"])
def test_a_certain_teacher_leaves_the_gradient_finite(kind: str) -> None:
    t = torch.full((3, 100), -200.0)
    t[:, 7] = 200.0
    s = torch.randn(3, 100, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for teacher in (t, top_k(t, 1.0, 8)):
        loss = distillation_loss(s, teacher, torch.zeros(3, dtype=torch.long), 1.0, 1.0, kind)
        assert torch.isfinite(torch.autograd.grad(loss, s)[0]).all()
        assert torch.isfinite(loss)
