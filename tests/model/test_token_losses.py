"""Losses and KL divergence of samples, compared with transformers on each sample alone and with values by hand."""
import math
import random

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import UserError
from model import prefix_packing
from model.checkpoint import write_checkpoint
from model.hub import load_model
from model.loglikelihood import aligned
from model.token_losses import sample_losses
from tests.conftest import random_model


def make_samples(seed=0):
    """Samples with common prefixes, some with the whole of another as a prefix, some equal; (ids, first target)."""
    rng = random.Random(seed)
    heads = [[rng.randrange(3, 400) for _ in range(size)] for size in (1, 9, 40)]
    samples = []
    for head in heads:
        for length in (1, 2, 5, 30):
            ids = head + [rng.randrange(3, 6) for _ in range(length)]
            samples += [(np.array(ids), len(head)), (np.array(ids), 1)]
    rng.shuffle(samples)
    return samples


@pytest.fixture(scope="module")
def pair(tokenizer_dir, tmp_path_factory):
    """Two models of this project with other weights and depths, and the same in transformers."""
    ours, theirs = [], []
    for seed, layers in ((0, 2), (1, 3)):
        folder = tmp_path_factory.mktemp("model")
        model = random_model(seed, num_hidden_layers=layers)
        write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
        ours.append(load_model(folder))
        theirs.append(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))
    return ours, theirs


def expected(theirs, samples):
    """[(nll, KL)] of each sample alone, by transformers in fp32."""
    rows = []
    for ids, first in samples:
        with torch.no_grad():
            log_q, log_p = (model(torch.from_numpy(ids)[None, :-1]).logits[0, first - 1:].double().log_softmax(-1)
                            for model in theirs)
        nll = -log_q[range(len(ids) - first), ids[first:]].sum()
        rows.append((float(nll), float((log_p.exp() * (log_p - log_q)).sum())))
    return np.array(rows).T


@pytest.mark.parametrize("max_tokens", [4096, 17, 1])
def test_equals_transformers(pair, max_tokens):
    (model, reference), theirs = pair
    samples, finished = make_samples(), []
    found = sample_losses(model, samples, reference, max_tokens, finished.append)
    for values, right in zip(found, expected(theirs, samples)):
        assert values == pytest.approx(right, rel=1e-5, abs=1e-5)
    assert found[1].min() > 0.1
    assert sum(finished) == len(samples)
    alone, nothing = sample_losses(model, samples, None, max_tokens)
    assert alone == pytest.approx(found[0], abs=1e-5)
    assert nothing is None


def test_by_hand(monkeypatch):
    """A vocabulary of two, and logits that do not depend on the input: p = softmax(0, ln 3) = (1/4, 3/4)."""
    def constant_model(logits):
        model = random_model(vocab_size=2, bos_token_id=None, eos_token_id=None)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.model.embed_tokens.weight[:, 0] = 1.0  # the hidden state is (√32, 0, 0, …), normalised
            model.model.norm.weight[0] = 1.0
            model.lm_head.weight[:, 0] = torch.tensor(logits) / math.sqrt(32)
        return model

    model, reference = constant_model([0.0, math.log(3)]), constant_model([0.0, 0.0])
    nll, kl = sample_losses(model, [(np.array([0, 1, 0]), 1), (np.array([0, 1, 1, 1]), 2)], reference)
    assert nll == pytest.approx([math.log(4 / 3) + math.log(4), 2 * math.log(4 / 3)], abs=1e-5)
    one = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)  # KL((1/2, 1/2) || (1/4, 3/4))
    assert kl == pytest.approx([2 * one, 2 * one], abs=1e-5)
    other = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    _, kl = sample_losses(reference, [(np.array([0, 1]), 1)], model)
    assert kl == pytest.approx([other], abs=1e-5)


def test_kl_from_itself_is_zero(pair):
    (model, _), _ = pair
    assert sample_losses(model, make_samples(), model)[1].tolist() == [0.0] * 24


@pytest.mark.parametrize("small", [0, 1])
def test_models_meet_position_by_position_when_memory_runs_out(small, pair, monkeypatch, capsys):
    """One of the two models runs out of memory in the middle and continues with smaller passes than the other."""
    models, _ = pair
    right = sample_losses(models[0], make_samples(), models[1], 30)
    passes = []
    real = prefix_packing.PackedPass.__init__

    def limited(self, segments, kept, model):
        tokens = segments[-1].offset + segments[-1].stop - segments[-1].start
        if model is models[small]:
            passes.append(tokens)
            if len(passes) > 2 and tokens > 15:
                raise torch.OutOfMemoryError("CUDA out of memory")  # as a GPU would
        real(self, segments, kept, model)

    monkeypatch.setattr(prefix_packing.PackedPass, "__init__", limited)
    found = sample_losses(models[0], make_samples(), models[1], 30)
    for values, same in zip(found, right):
        assert values == pytest.approx(same, rel=1e-5, abs=1e-5)
    assert passes[:2] == [30, 30]
    assert max(passes[-3:]) <= 15
    assert "out of memory with 30 tokens at once" in capsys.readouterr().err


def test_aligned_blocks():
    rows = torch.arange(10)
    blocks = list(aligned([iter(rows.split(sizes)) for sizes in ([4, 6], [1, 5, 4])]))
    assert [len(block) for block, _ in blocks] == [1, 3, 2, 4]
    for one, two in blocks:
        assert one.tolist() == two.tolist()
    assert torch.cat([one for one, _ in blocks]).tolist() == rows.tolist()


def test_the_logits_of_all_rows_never_exist_at_once(pair, monkeypatch):
    (model, reference), _ = pair
    right = sample_losses(model, make_samples(), reference)
    monkeypatch.setattr("model.loglikelihood.chunk_rows", lambda *_: 3)
    sizes = []
    real = type(model.lm_head).forward

    def forward(self, hidden, targets=None):
        sizes.append(len(hidden))
        return real(self, hidden, targets)

    monkeypatch.setattr(type(model.lm_head), "forward", forward)
    found = sample_losses(model, make_samples(), reference)
    assert max(sizes) == 3
    for values, same in zip(found, right):
        assert values == pytest.approx(same, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("broken", [0, 1])
def test_weights_that_are_not_finite(broken):
    models = [random_model(0), random_model(1)]
    with torch.no_grad():
        models[broken].lm_head.weight[7, 0] = math.inf
    with pytest.raises(UserError, match=("the model's", "the reference's")[broken] + " logits are not finite"):
        sample_losses(models[0], make_samples(), models[1])


def test_no_samples():
    nll, kl = sample_losses(random_model(), [], random_model(1))
    assert (nll.tolist(), kl.tolist()) == ([], [])
