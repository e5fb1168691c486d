"""IVON equals posteriors known in closed form, the package of its authors, and a computation by hand."""
import pytest
import torch

from model.noise import standard_normal
from model.posterior import sample_posterior
from training import ivon
from training.ivon import IVON
from training.zero_shards import Fragment

COPIES = 400  # of each problem, with independent noise; the tests compare their means


def fragment(flat, name="w"):
    return Fragment(name, flat, flat, 0, 0, flat.numel(), flat.numel())


def run(optimizer, weights, gradient, steps, average):
    """Takes steps; returns (mean, precision), averaged over the last `average` steps and the copies."""
    fragments, means, precisions = [fragment(weights)], 0, 0
    for step in range(steps):
        optimizer.perturb(fragments, (1, step))
        weights.grad = gradient(weights.detach().clone())
        optimizer.step()
        if step >= steps - average:
            means = means + weights.detach().mean(0) / average
            precisions = precisions + optimizer.precision(weights, slice(None)).view(weights.shape).mean(0) / average
    return means, precisions


def posterior(hessian, target, prior_mean, prior_precision):
    """(mean, precision) of the best Gaussian with independent weights for the loss ½ (w - target)ᵀ H (w - target)."""
    mean = torch.linalg.solve(hessian + torch.diag(prior_precision),
                              hessian @ target + prior_precision * prior_mean)
    return mean, hessian.diagonal() + prior_precision


def test_the_posterior_of_a_quadratic():
    """The two weights are coupled, and the prior has its own mean and precision for each weight."""
    ess, hessian = 50.0, torch.tensor([[2.0, 0.6], [0.6, 0.5]])
    target, prior_mean, prior_precision = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.5]), torch.tensor([20.0, 5.0])
    weights = torch.nn.Parameter(torch.zeros(COPIES, 2))
    optimizer = IVON([weights], 100.0, ess, 1.0, (0.9, 0.99), 1e3)  # α is 0.1
    optimizer.begin([fragment(weights)], {weights: (prior_mean.repeat(COPIES, 1), prior_precision.repeat(COPIES, 1))},
                    "cpu")
    mean, precision = run(optimizer, weights, lambda w: (w - target) @ hessian, 1500, 500)
    expected_mean, expected_precision = posterior(ess * hessian, target, prior_mean, prior_precision)
    assert mean.tolist() == pytest.approx(expected_mean.tolist(), rel=0.02)
    assert precision.tolist() == pytest.approx(expected_precision.tolist(), rel=0.02)


def test_the_posterior_of_a_regression():
    """Least squares with noise of variance 0.25. The loss is a mean over 40 samples, and λ = 40 makes it a sum."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=generator) @ torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3], [0.0, 0.0, 1.0]])
    y = x @ torch.tensor([1.0, -0.5, 2.0]) + 0.5 * torch.randn(40, generator=generator)
    weights = torch.nn.Parameter(torch.zeros(COPIES, 3))
    optimizer = IVON([weights], 100.0, 40.0, 1.0, (0.9, 0.99), 1e3)
    optimizer.begin([fragment(weights)], {weights: (torch.zeros(COPIES, 3), 4.0)}, "cpu")
    mean, precision = run(optimizer, weights, lambda w: (w @ x.T - y) @ x / 0.25 / 40, 1500, 500)
    hessian = x.T @ x / 0.25
    expected_mean, expected_precision = posterior(hessian, torch.linalg.solve(x.T @ x, x.T @ y), torch.zeros(3),
                                                  torch.full((3,), 4.0))
    assert mean.tolist() == pytest.approx(expected_mean.tolist(), rel=0.02)
    assert precision.tolist() == pytest.approx(expected_precision.tolist(), rel=0.02)


def test_steps_equal_those_of_the_authors_package(monkeypatch):
    """50 steps of a small network with the same noise and the same prior, which is centred on 0."""
    ivon = pytest.importorskip("ivon", reason="ivon-opt is not installed")
    x, y = torch.randn(64, 5, generator=torch.Generator().manual_seed(1)), torch.arange(64.0) % 3

    def network():
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))

    model, reference_model = network(), network()
    optimizer = IVON(model.parameters(), 0.05 * 2.0, 200.0, 0.3, (0.9, 0.98), 2.0)
    fragments = [fragment(parameter, name) for name, parameter in model.named_parameters()]
    optimizer.begin(fragments, {weight: (torch.zeros_like(weight), 200 * 0.01) for weight in model.parameters()}, "cpu")
    reference = ivon.IVON(reference_model.parameters(), lr=0.05, ess=200.0, hess_init=0.3, beta1=0.9, beta2=0.98,
                          weight_decay=0.01, clip_radius=2.0, rescale_lr=False)
    randn = torch.randn
    for step in range(50):
        noise = torch.cat([values for f in fragments for _, _, values in
                           standard_normal((0, step), f.name, f.size, 0, f.size, "cpu")])
        optimizer.perturb(fragments, (0, step))
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y.long()).backward()
        optimizer.step()
        monkeypatch.setattr(torch, "randn", lambda *size, noise=noise, **_: noise)
        with reference.sampled_params(train=True):
            reference.zero_grad()
            torch.nn.functional.cross_entropy(reference_model(x), y.long()).backward()
        monkeypatch.setattr(torch, "randn", randn)
        reference.step()
        for a, b in zip(model.parameters(), reference_model.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    hess = torch.cat([optimizer.state[parameter]["hess"].view(-1) for parameter in model.parameters()])
    torch.testing.assert_close(hess, reference.param_groups[0]["hess"], rtol=1e-4, atol=1e-6)
    assert (model[0].weight - network()[0].weight).abs().max() > 0.05  # the weights have moved


def test_noise_is_a_function_of_key_and_name_alone(monkeypatch):
    monkeypatch.setattr("model.noise.BLOCK", 1000)

    def noise(start, count, key=(42, 7), name="w"):
        return torch.cat([values for _, _, values in standard_normal(key, name, 2500, start, count, "cpu")])

    expected = noise(0, 2500)
    assert expected.mean().abs() < 0.06
    assert expected.std().item() == pytest.approx(1, abs=0.05)
    for start, count in ((0, 10), (990, 20), (1000, 1500), (2499, 1), (5, 2400)):
        assert torch.equal(noise(start, count), expected[start:start + count])
    assert not torch.equal(noise(0, 2500, key=(42, 8)), expected)
    assert not torch.equal(noise(0, 2500, name="v"), expected)
    assert not torch.equal(expected[:1000], expected[1000:2000])


def test_noise_is_drawn_on_the_device_of_the_model(monkeypatch):
    """Offloaded weights get the noise that they would get on the GPU."""
    devices = []

    def drawn(key, name, size, start, count, device):
        devices.append(device)
        return standard_normal(key, name, size, start, count, "cpu")

    monkeypatch.setattr(ivon, "standard_normal", drawn)
    weights = torch.nn.Parameter(torch.zeros(10))
    optimizer = IVON([weights], 0.1, 100.0, 1.0, (0.9, 0.9), 1.0)
    optimizer.begin([fragment(weights)], {weights: (torch.zeros(10), 1.0)}, "cuda")
    optimizer.perturb([fragment(weights)], 0)
    weights.grad = torch.ones(10)
    optimizer.step()
    assert devices == ["cuda"] * 2


def test_samples_have_the_mean_and_precision_of_the_posterior():
    mean, precision = torch.tensor([1.0, 2.0]).repeat(5000), torch.tensor([4.0, 100.0]).repeat(5000)
    samples = sample_posterior(mean, precision, "key", "w").view(-1, 2)
    assert samples.mean(0).tolist() == pytest.approx([1.0, 2.0], abs=0.03)
    assert samples.std(0).tolist() == pytest.approx([0.5, 0.1], rel=0.05)


@pytest.mark.parametrize("noise", [True, False])
def test_the_mean_is_restored_bit_for_bit(noise):
    """A skipped step leaves the means unchanged, and so does a step with learning rate 0."""
    before = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    weights = torch.nn.Parameter(before.clone())
    optimizer, fragments = IVON([weights], 0.0, 100.0, 1.0, (0.9, 0.9), 1.0, noise), [fragment(weights)]
    optimizer.begin(fragments, {weights: (torch.zeros(1000), 1.0)}, "cpu")
    optimizer.perturb(fragments, 0)
    assert torch.equal(weights, before) is not noise
    optimizer.restore(fragments)
    assert torch.equal(weights, before)
    optimizer.perturb(fragments, 1)
    weights.grad = torch.ones(1000)
    optimizer.step()
    assert torch.equal(weights, before)


def test_steps_at_the_mean_are_deterministic():
    """By hand: debiased momentum plus the prior's gradient, over a constant Hessian estimate, clipped to the radius."""
    results = []
    for key in (0, 1):
        weights = torch.nn.Parameter(torch.tensor([1.0, -2.0, 3.0]))
        optimizer = IVON([weights], 0.5, 10.0, 0.4, (0.9, 0.9), 1.0, sample_params=False)
        optimizer.begin([fragment(weights)], {weights: (torch.tensor([1.0, 0.0, 0.0]), 1.0)}, "cpu")
        for step in range(2):
            optimizer.perturb([fragment(weights)], (key, step))
            weights.grad = torch.tensor([0.1, 0.2, 0.5]) * (step + 1)
            optimizer.step()
        assert optimizer.state[weights]["hess"].tolist() == pytest.approx([0.4] * 3)
        results.append(weights.tolist())
    expected = []
    for mean, prior, gradient in ((1.0, 1.0, 0.1), (-2.0, 0.0, 0.2), (3.0, 0.0, 0.5)):
        momentum = 0.0
        for step in (1, 2):
            momentum = 0.9 * momentum + 0.1 * gradient * step
            move = (momentum / (1 - 0.9 ** step) + 0.1 * (mean - prior)) / 0.5
            mean -= 0.5 * max(-1.0, min(1.0, move))  # clips 1.6 of the third weight
        expected.append(mean)
    assert results[0] == results[1] == pytest.approx(expected)
