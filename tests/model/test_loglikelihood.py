"""Log-likelihoods with shared prefixes, compared with transformers on each request alone."""
import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import UserError
from evaluation.parallel import partition_by_prefix, restore_order
from model import prefix_packing
from model.checkpoint import write_checkpoint
from model.hub import load_model
from model.loglikelihood import log_likelihoods, truncate_left
from model.prefix_packing import packed_passes, sort_sequences
from tests.conftest import random_model


def requests(seed=0):
    """Few-shot headers, each with questions, each with options. Some are longer than 64 tokens."""
    rng = random.Random(seed)
    words = lambda least, most, kinds: [rng.randrange(3, 3 + kinds) for _ in range(rng.randrange(least, most))]  # noqa: E731
    found = []
    for header in [[]] + [words(1, 50, 400) for _ in range(3)]:
        for _ in range(8):
            question = header + words(1, 25, 3)
            found += [(question, words(1, 9, 3)) for _ in range(3)]
    found += [(words(70, 71, 400), words(1, 9, 3)) for _ in range(3)]
    rng.shuffle(found)
    return found


@pytest.mark.parametrize("shape", [{}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1, "attention_bias": True}])
@pytest.mark.parametrize("max_tokens", [4096, 70, 1])
def test_equals_transformers(shape, max_tokens, tokenizer_dir, tmp_path):
    ours = random_model(max_position_embeddings=64, **shape)
    write_checkpoint(tmp_path, ours.config, ours.named_parameters(), tokenizer_dir)
    theirs, pairs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), requests()
    pairs = pairs[:12] if max_tokens == 1 else pairs
    found, tokens = log_likelihoods(load_model(tmp_path), pairs, max_tokens)
    for (context, continuation), (value, greedy) in zip(pairs, found):
        ids = (context + continuation)[-65:]
        with torch.no_grad():
            log_p = theirs(torch.tensor([ids[:-1]])).logits[0, -len(continuation):].log_softmax(-1)
        assert value == pytest.approx(float(log_p[range(len(continuation)), continuation].sum()), abs=1e-4)
        assert greedy == (log_p.argmax(-1).tolist() == continuation)
    read = [tuple(truncate_left(*pair, 64)) for pair in pairs]
    assert tokens["asked"] == sum(map(len, read))
    nodes = {ids[:end] for ids in read for end in range(1, len(ids) + 1)}  # of the prefix tree
    assert tokens["computed"] == len(nodes)


def test_options_of_one_token_are_one_pass():
    found, tokens = log_likelihoods(random_model(), [([5, 6, 7], [8]), ([5, 6, 7], [9]), ([5, 6, 7], [8, 9])])
    assert tokens == {"computed": 4, "asked": 10}
    assert found[0][0] != found[1][0]


def test_only_the_next_path_is_kept_between_passes():
    sequences, _ = sort_sequences([context + continuation for context, continuation in requests()])
    with torch.no_grad():
        passes = [segments for segments, _ in packed_passes(random_model(), sequences, 50)]
    assert len(passes) > 10
    for segments, following in zip(passes, passes[1:] + [None]):
        path = {segment for segment, _ in following[0].path} if following else set()
        assert {segment for segment in segments if segment.keys} == path & set(segments)


def test_queries_and_keys_are_rounded_up_except_at_the_end_of_a_pass(monkeypatch):
    sequences, _ = sort_sequences([context + continuation for context, continuation in requests()])
    shapes, real = [], prefix_packing.attention

    def recorded(query, key, value, mask):
        shapes[-1].append((query.shape[2], key.shape[2]))
        return real(query, key, value, mask)

    monkeypatch.setattr(prefix_packing, "attention", recorded)
    model = random_model(num_hidden_layers=1)
    model.model.register_forward_pre_hook(lambda *_: shapes.append([]))
    with torch.no_grad():
        assert len([*packed_passes(model, sequences, 600)]) == len(shapes)
    inside = [group for groups in shapes for group in groups[:-2]]
    assert len(inside) > 8
    assert not [group for group in inside if group[0] % 32 or group[1] % 32]


def test_out_of_memory_halves_the_pass(monkeypatch, capsys):
    model, pairs = random_model(), requests()
    expected, _ = log_likelihoods(model, pairs)
    real = prefix_packing.PackedPass.attend

    def limited(self, layer, query, key, value):
        if query.shape[2] > 300:
            raise torch.OutOfMemoryError("CUDA out of memory")  # as a GPU would
        return real(self, layer, query, key, value)

    monkeypatch.setattr(prefix_packing.PackedPass, "attend", limited)
    found, _ = log_likelihoods(model, pairs)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert "tokens at once: trying again with" in capsys.readouterr().err


def test_shares_keep_prefixes_together_and_balance_new_tokens():
    sequences = [[1] * 90 + [option] for option in range(10)] + [[2, option] for option in range(100)]
    shares = partition_by_prefix(sequences, 2)
    assert sorted(shares[0] + shares[1]) == list(range(110))
    assert set(shares[0]) == set(range(10)) | set(shares[0])  # the long prefix is in one share
    new = [len({tuple(sequences[i][:end]) for i in share for end in range(1, len(sequences[i]) + 1)})
           for share in shares]
    assert max(new) < 1.2 * sum(new) / 2
    assert restore_order(shares, [[f"a{i}" for i in share] for share in shares]) == [f"a{i}" for i in range(110)]
    assert partition_by_prefix(sequences, 1) == [list(range(len(sequences)))]
    shares = partition_by_prefix([[1]], 3)
    assert shares == [[0], [], []]
    assert restore_order(shares, [["only"], [], []]) == ["only"]


def test_a_continuation_without_tokens_is_refused():
    with pytest.raises(UserError, match="has 0 target tokens and 1 input tokens: expected 1"):
        log_likelihoods(random_model(), [([5, 6], [])])
