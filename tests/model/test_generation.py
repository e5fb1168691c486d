"""Decoding compared with transformers' generate and logits warpers."""
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from common.files import UserError
from model import generation as module
from model.generation import BatchOptions, GenerationConfig, filter_logits, generate, rows_to_keep
from model.hub import load_model
from tests.conftest import random_model

LENGTHS = (1, 5, 23, 40, 8, 31, 23)


@pytest.fixture(scope="module")
def models(checkpoint):
    return load_model(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture(scope="module")
def prompts():
    """Prompts of mixed length. Two share a prefix, and two are equal."""
    generator = torch.Generator().manual_seed(5)
    ids = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in LENGTHS]
    ids[5][:20] = ids[3][:20]
    ids[6] = list(ids[2])
    return ids


def theirs(model, prompt, eos, **options):
    """The new ids of one prompt by transformers, without the eos."""
    new = model.generate(torch.tensor([prompt]), eos_token_id=eos, pad_token_id=0, do_sample=False, **options)
    ids = new[0, len(prompt):].tolist()
    return ids[:ids.index(eos)] if eos in ids else ids


@pytest.mark.parametrize("max_tokens", [32768, 150])
def test_greedy_equals_transformers_on_prompts_of_mixed_length(models, prompts, max_tokens):
    ours, other = models
    options = BatchOptions(max_tokens=max_tokens)
    expected = [theirs(other, prompt, None, max_new_tokens=24) for prompt in prompts]
    assert generate(ours, prompts, GenerationConfig(24), options=options) == expected
    end = expected[2][6]  # treat this token as eos
    cut = [ids[:ids.index(end)] if end in ids else ids for ids in expected]
    assert len(cut[2]) <= 6
    assert generate(ours, prompts, GenerationConfig(24), {end}, options=options) == cut


def test_the_row_of_a_prompt_that_ends_at_once_is_reused(models, prompts):
    ours, other = models
    end = theirs(other, prompts[0], None, max_new_tokens=1)[0]
    expected = [theirs(other, prompt, end, max_new_tokens=12) for prompt in prompts]
    assert expected[0] == [] != expected[-1]
    assert generate(ours, prompts, GenerationConfig(12), {end}) == expected


@pytest.mark.parametrize("options", [
    {"num_beams": 5, "no_repeat_ngram_size": 3}, {"num_beams": 4, "length_penalty": 0.9, "no_repeat_ngram_size": 2},
    {"num_beams": 3, "length_penalty": 0.8}, {"num_beams": 3, "length_penalty": 2.0, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never"}, {"num_beams": 3, "early_stopping": True},
    {"num_beams": 2, "length_penalty": -1.0}, {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"},
    {"num_beams": 1, "no_repeat_ngram_size": 1}, {"num_beams": 1, "no_repeat_ngram_size": 2}])
def test_searches_equal_transformers(models, prompts, options):
    ours, other = models
    plain = [theirs(other, prompt, None, max_new_tokens=20, **options) for prompt in prompts]
    assert generate(ours, prompts, GenerationConfig(20, **options)) == plain
    end = plain[0][3]
    expected = [theirs(other, prompt, end, max_new_tokens=20, **options) for prompt in prompts]
    assert min(map(len, expected)) < 20  # some end early and leave the batch
    assert generate(ours, prompts, GenerationConfig(20, **options), {end}) == expected


def test_beams_continue_where_the_best_candidates_all_end(models, prompts):
    ours, other = models
    options = {"num_beams": 3, "length_penalty": 3.0, "early_stopping": "never"}
    prompt, first = prompts[3], generate(ours, [prompts[3]], GenerationConfig(1))[0]
    likely = ours(torch.tensor([prompt + first]))[0, -1].topk(12).indices.tolist()
    ends = sorted(set(likely) - set(first))
    ids = other.generate(torch.tensor([prompt]), eos_token_id=ends, pad_token_id=0, max_new_tokens=12, do_sample=False,
                         **options)[0, len(prompt):].tolist()
    expected = ids[:-1] if ids[-1] in ends else ids
    assert len(expected) > 4
    assert generate(ours, [prompt], GenerationConfig(12, **options), ends) == [expected]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"),
                         [(0.8, 50, 0.9), (1.0, 0, 0.5), (2.0, 7, 1.0), (0.3, 0, 0.01)])
def test_filtered_probabilities_equal_transformers(temperature, top_k, top_p):
    logits = 3 * torch.randn(6, 200, generator=torch.Generator().manual_seed(0))
    if top_p == 1:
        logits[0, :20] = logits[0].max()  # ties with the k-th are kept; ties at top_p are not defined
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    torch.testing.assert_close(filter_logits(logits, temperature, top_k, top_p).softmax(-1), expected.softmax(-1))


def test_samples_follow_the_filtered_probabilities(models):
    ours, _ = models
    decoding = GenerationConfig(1, do_sample=True, temperature=3.0, top_k=8)
    with torch.no_grad():
        p = filter_logits(ours(torch.tensor([[5, 6, 7]]))[0, -1], 3.0, 8, 1.0).softmax(-1)
    sampled = torch.tensor(generate(ours, [[5, 6, 7]] * 3000, decoding)).flatten()
    shares = torch.bincount(sampled, minlength=512) / 3000
    assert (shares[p == 0] == 0).all()
    assert ((shares - p).abs() < 4 * (p * (1 - p) / 3000).sqrt() + 1e-9).all()  # four standard errors


def test_a_sample_depends_only_on_its_id_and_the_seed(models, prompts):
    ours, _ = models
    decoding = GenerationConfig(12, do_sample=True, temperature=2.0, seed=7)
    together = generate(ours, prompts, decoding)
    assert together[2] != together[6]  # the same prompt with another sample id
    alone = [generate(ours, [prompt], decoding, options=BatchOptions([i]))[0] for i, prompt in enumerate(prompts)]
    assert alone == together
    assert generate(ours, prompts[::-1], decoding, options=BatchOptions(range(6, -1, -1))) == together[::-1]
    assert generate(ours, prompts, GenerationConfig(12, do_sample=True, temperature=2.0, seed=8)) != together


def test_stop_criterion(models, prompts):
    ours, _ = models
    for options in ({}, {"num_beams": 3}):
        whole = generate(ours, prompts, GenerationConfig(16, **options))
        end = whole[3][5:7]
        found = generate(ours, prompts, GenerationConfig(16, **options), stop=lambda ids, end=end: ids[-2:] == end)
        assert found[3][-2:] == end
        assert len(found[3]) <= 7


def test_out_of_memory_halves_the_batch(models, prompts, monkeypatch, capsys):
    ours, _ = models
    expected = generate(ours, prompts, GenerationConfig(8))
    real = module.generate_batch

    def limited(model, prompts, *rest):
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")  # as a GPU would
        return real(model, prompts, *rest)

    monkeypatch.setattr(module, "generate_batch", limited)
    assert generate(ours, prompts, GenerationConfig(8)) == expected
    assert "out of memory with 7 prompts at once: trying again with 3" in capsys.readouterr().err
    monkeypatch.setattr(module, "generate_batch", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(UserError, match="there is not enough memory for one of the prompts: full"):
        generate(ours, prompts, GenerationConfig(8))


def test_padding_is_not_counted_as_a_repetition():
    search = module.Sampling([[5], [6, 7]], GenerationConfig(2, no_repeat_ngram_size=1), (), None, "cpu", (0, 1))
    blocked = search.block_repeats(torch.zeros(2, 1, 9), 0).isinf()[:, 0]
    assert blocked.nonzero().tolist() == [[0, 5], [1, 6], [1, 7]]


def test_done_rows_are_filled_from_the_end():
    assert rows_to_keep([False, True, False, True, False]) == [0, 4, 2]
    assert rows_to_keep([True, False]) == [1]
    assert rows_to_keep([False, False, True]) == [0, 1]


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
def test_weights_are_packed_while_decoding():
    model, packed = random_model(), []
    model.lm_head.register_forward_hook(lambda head, *_: packed.append(head.packed is not None))
    generate(model, [[5, 6]], GenerationConfig(3))
    assert packed == [True] * 3
    assert model.lm_head.packed is None


def test_invalid_settings():
    assert GenerationConfig().problems() == []
    assert len(GenerationConfig(0, 0, no_repeat_ngram_size=-1, temperature=0.0, top_p=0.0, top_k=-1).problems()) == 6
    problems = GenerationConfig(do_sample=True, num_beams=2).problems()
    assert problems == ["do_sample and num_beams above 1 exclude each other"]
    for wrong in ({"length_penalty": 1e308}, {"length_penalty": -3.0}, {"temperature": 1e-300}, {"num_beams": 10 ** 9},
                  {"early_stopping": 3}, {"early_stopping": "sometimes"}):
        assert len(GenerationConfig(**wrong).problems()) == 1, wrong
    assert len(GenerationConfig(temperature=0.5, length_penalty=2.0).problems()) == 2
    for unused, other in (({"temperature": 0.5, "top_p": 0.9}, "do_sample"),
                          ({"length_penalty": 2.0}, "num_beams above 1")):
        assert GenerationConfig(**unused).problems() == [f"{' and '.join(unused)} would change nothing without {other}"]


def test_what_cannot_be_generated_is_refused(models):
    for config, prompts, said in ((GenerationConfig(do_sample=True, temperature=0.0), [[1]], "temperature is 0.0"),
                                  (GenerationConfig(), [[1], []], "prompt 1 has no token"),
                                  (GenerationConfig(48), [[1] * 2001], "2001 tokens and 48 new ones")):
        with pytest.raises(UserError, match=said):
            generate(models[0], prompts, config)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3},
                                     {"num_beams": 2, "length_penalty": -1.0, "early_stopping": "never"}])
def test_several_end_tokens(models, prompts, options):
    ours, other = models
    plain = generate(ours, prompts, GenerationConfig(20, **options))
    ends = {ids[place] for ids, place in zip(plain, (3, 5, 7, 2, 4))}
    for prompt, ids in zip(prompts, generate(ours, prompts, GenerationConfig(20, **options), ends)):
        new = other.generate(torch.tensor([prompt]), eos_token_id=sorted(ends), pad_token_id=0, do_sample=False,
                             max_new_tokens=20, **options)[0, len(prompt):].tolist()
        assert ids == new[:next((place for place, token in enumerate(new) if token in ends), 20)]


def test_each_step_of_sampling_draws_its_own_number():
    """Of 512 equally likely tokens, eight draws repeat one in few texts; one number for all repeats it in each."""
    model = random_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    texts = generate(model, [[5]] * 50, GenerationConfig(8, do_sample=True))
    assert np.mean([len(set(ids)) for ids in texts]) > 7


def test_seed_and_number_of_a_sample_are_not_added():
    one, two = (generate(random_model(), [[5, 6]], GenerationConfig(12, do_sample=True, temperature=3.0, seed=seed),
                         options=BatchOptions([sample])) for seed, sample in ((7, 1), (8, 0)))
    assert one != two
