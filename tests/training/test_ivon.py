"""IVON against posteriors that are known in closed form, against the package of its authors, and by hand."""
import pytest
import torch

from model.posterior import draw, standard_normal
from training import ivon as variational
from training.ivon import IVON
from training.zero_shards import Fragment

COPIES = 400  # of a problem, each with noise of its own: what is compared is their mean


def fragment(flat, name="w"):
    return Fragment(name, flat, flat, 0, 0, flat.numel(), flat.numel())


def run(optimizer, weights, gradient, steps, average):
    """Steps from a seed; returns the mean of means and of precisions over the last `average` steps and the copies."""
    mine, means, precisions = [fragment(weights)], 0, 0
    for step in range(steps):
        optimizer.perturb(mine, (1, step))
        weights.grad = gradient(weights.detach().clone())
        optimizer.step()
        if step >= steps - average:
            means = means + weights.detach().mean(0) / average
            precisions = precisions + optimizer.precision(weights, slice(None)).view(weights.shape).mean(0) / average
    return means, precisions


def posterior(hessian, target, prior_mean, prior_precision):
    """Mean and precisions of the best Gaussian of independent weights for a loss ½ (w - target)ᵀ H (w - target)."""
    mean = torch.linalg.solve(hessian + torch.diag(prior_precision),
                              hessian @ target + prior_precision * prior_mean)
    return mean, hessian.diagonal() + prior_precision


def test_the_posterior_of_a_quadratic_of_two_weights():
    """λ times a quadratic whose weights depend on one another, and a prior with a mean and precisions of its own."""
    samples, hessian = 50.0, torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    target, prior_mean, prior_precision = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([20.0, 5.0])
    weights = torch.nn.Parameter(torch.zeros(COPIES, 2))
    optimizer = IVON([weights], 100.0, samples, 1.0, (0.9, 0.99), 1e3)  # α is 0.1
    optimizer.begin([fragment(weights)], {weights: (prior_mean.repeat(COPIES, 1), prior_precision.repeat(COPIES, 1))})
    mean, precision = run(optimizer, weights, lambda w: (w - target) @ hessian, 1500, 500)
    expected_mean, expected_precision = posterior(samples * hessian, target, prior_mean, prior_precision)
    assert mean.tolist() == pytest.approx(expected_mean.tolist(), rel=0.02)
    assert precision.tolist() == pytest.approx(expected_precision.tolist(), rel=0.02)


def test_the_posterior_of_a_regression():
    """Least squares with noise of variance 0.25: the loss is a mean over 40 samples, which λ makes a sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    y = x @ torch.tensor([1.0, -0.5, 2.0]) + 0.5 * torch.randn(40, generator=generator)
    weights = torch.nn.Parameter(torch.zeros(COPIES, 3))
    optimizer = IVON([weights], 100.0, 40.0, 1.0, (0.9, 0.99), 1e3)
    optimizer.begin([fragment(weights)], {weights: (torch.zeros(COPIES, 3), 4.0)})
    mean, precision = run(optimizer, weights, lambda w: (w @ x.T - y) @ x / 0.25 / 40, 1500, 500)
    hessian = x.T @ x / 0.25
    expected_mean, expected_precision = posterior(hessian, torch.linalg.solve(x.T @ x, x.T @ y), torch.zeros(3),
                                                  torch.full((3,), 4.0))
    assert mean.tolist() == pytest.approx(expected_mean.tolist(), rel=0.02)
    assert precision.tolist() == pytest.approx(expected_precision.tolist(), rel=0.02)


def test_the_trajectory_of_the_authors_package(monkeypatch):
    """50 steps of a small network with the same noise; their prior is centred on 0 and has the same precision."""
    ivon = pytest.importorskip("ivon", reason="ivon-opt is not installed")
    x, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64.0) % 3

    def network():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    ours, theirs = network(), network()
    optimizer = IVON(ours.parameters(), 0.05 * 2.0, 200.0, 0.3, (0.9, 0.98), 2.0)
    mine = [fragment(parameter, name) for name, parameter in ours.named_parameters()]
    optimizer.begin(mine, {parameter: (torch.zeros_like(parameter), 200 * 0.01) for parameter in ours.parameters()})
    other = ivon.IVON(theirs.parameters(), lr=0.05, ess=200.0, hess_init=0.3, beta1=0.9, beta2=0.98, weight_decay=0.01,
                      clip_radius=2.0, rescale_lr=False)
    randn = torch.randn
    for step in range(50):
        noise = torch.cat([values for one in mine for _, _, values in
                           standard_normal((0, step), one.name, one.size, 0, one.size, "cpu")])
        optimizer.perturb(mine, (0, step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(ours(x), y.long()).backward()
        optimizer.step()
        monkeypatch.setattr(torch, "randn", lambda *size, noise=noise, **_: noise)
        with other.sampled_params(train=True):
            other.zero_grad()
            torch.nn.functional.cross_entropy(theirs(x), y.long()).backward()
        monkeypatch.setattr(torch, "randn", randn)
        other.step()
        for a, b in zip(ours.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    curvature = torch.cat([optimizer.state[parameter]["curvature"].view(-1) for parameter in ours.parameters()])
    torch.testing.assert_close(curvature, other.param_groups[0]["hess"], rtol=1e-4, atol=1e-6)
    assert (ours[0].weight - network()[0].weight).abs().max() > 0.05  # they did move


def test_noise_is_a_function_of_key_and_name_alone(monkeypatch):
    monkeypatch.setattr(variational, "BLOCK", 1000)

    def noise(*place, key=(42, 7), name="w"):
        return torch.cat([values for _, _, values in standard_normal(key, name, 2500, *place, "cpu")])

    whole = noise(0, 2500)
    assert whole.mean().abs() < 0.06
    assert whole.std().item() == pytest.approx(1, abs=0.05)
    for start, count in ((0, 10), (990, 20), (1000, 1500), (2499, 1), (5, 2400)):
        assert torch.equal(noise(start, count), whole[start:start + count])
    assert not torch.equal(noise(0, 2500, key=(42, 8)), whole)
    assert not torch.equal(noise(0, 2500, name="v"), whole)
    assert not torch.equal(whole[:1000], whole[1000:2000])


def test_a_draw_is_one_of_the_posterior():
    mean, precision = torch.tensor([1.0, 2.0]).repeat(5000), torch.tensor([4.0, 100.0]).repeat(5000)
    drawn = draw(mean, precision, "key", "w").view(-1, 2)
    assert drawn.mean(0).tolist() == pytest.approx([1.0, 2.0], abs=0.03)
    assert drawn.std(0).tolist() == pytest.approx([0.5, 0.1], rel=0.05)


@pytest.mark.parametrize("noise", [True, False])
def test_a_draw_is_undone_bit_for_bit(noise):
    """With a rate of 0 a step leaves the means as they were; so does a step that was passed over."""
    before = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(before.clone())
    optimizer, mine = IVON([weights], 0.0, 100.0, 1.0, (0.9, 0.9), 1.0, noise), [fragment(weights)]
    optimizer.begin(mine, {weights: (torch.zeros(1000), 1.0)})
    optimizer.perturb(mine, 0)
    assert torch.equal(weights, before) is not noise
    optimizer.restore(mine)
    assert torch.equal(weights, before)
    optimizer.perturb(mine, 1)
    weights.grad = torch.ones(1000)
    optimizer.step()
    assert torch.equal(weights, before)


def test_without_noise_a_step_is_deterministic():
    """By hand: momentum without bias, the pull of the prior, over a curvature that stays, cut to the radius."""
    found = []
    for key in (0, 1):
        weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = IVON([weights], 0.5, 10.0, 0.4, (0.9, 0.9), 1.0, noise=False)
        optimizer.begin([fragment(weights)], {weights: (torch.tensor([1.0, 0.0, 0.0]), 1.0)})
        for step in range(2):
            optimizer.perturb([fragment(weights)], (key, step))
            weights.grad = torch.tensor([0.1, 0.2, 0.5]) * (step + 1)
            optimizer.step()
        assert optimizer.state[weights]["curvature"].tolist() == pytest.approx([0.4] * 3)
        found.append(weights.tolist())
    expected = []
    for mean, prior, gradient in ((1.0, 1.0, 0.1), (-2.0, 0.0, 0.2), (3.0, 0.0, 0.5)):
        momentum = 0.0
        for step in (1, 2):
            momentum = 0.9 * momentum + 0.1 * gradient * step
            move = (momentum / (1 - 0.9 ** step) + 0.1 * (mean - prior)) / 0.5
            mean -= 0.5 * max(-1.0, min(1.0, move))  # 1.6 of the third weight
        expected.append(mean)
    assert found[0] == found[1] == pytest.approx(expected)
