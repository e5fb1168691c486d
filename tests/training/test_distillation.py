"""Replay and divergence terms equal plain PyTorch under every ZeRO stage, and refuse what they cannot use."""
import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from common.files import UserError
from common.provenance import read_lineage
from corpus.shards import WINDOW_TOKENS, ShardDataset
from corpus.tasks import SFTDataset, read_task
from model.hub import load_model
from model.loss import FusedLinearLoss
from model.tokenizer import Tokenizer
from tests.conftest import error_line, losses, read_metrics, run_script
from training.batches import count_tokens, replay_in_epochs, replay_with_replacement, sample_indices
from training.distillation import Distillation, generate_texts, start_digest
from training.run import TASK_SEEDS
from training.train_config import TrainConfig

FLAGS = ["--max_train_samples", "60", "--max_steps", "4", "--max_grad_norm", "0"]
KL = ["--input_kl", "0.7", "--self_replay_kl", "0.4", "--self_replay_share", "0.3", "--self_replay_texts", "6"]


@pytest.fixture(scope="module")
def shards(checkpoint, tmp_path_factory):
    """Token shards made with the checkpoint's tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    text = "{0} is the number of a sentence, and this is sentence {0}. " * 30
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text.format(n)}) + "\n" for n in range(300)))
    run_script("data_prep.py", "text", "--source", folder / "text.jsonl", "--tokenizer", checkpoint,
               "--output_path", folder / "shards")
    return folder / "shards"


@pytest.fixture(scope="module")
def finished(train, shards, tmp_path_factory):
    """A run with replayed text and both divergences, in one process without ZeRO."""
    out = tmp_path_factory.mktemp("runs") / "m1-simp"
    train(out, *KL, "--replay_share", "0.2", "--replay_text", shards)
    return out


@pytest.mark.parametrize("rows", [5, 600])  # one chunk and several
def test_the_loss_of_a_teacher_equals_the_divergence(rows):
    generator = torch.Generator().manual_seed(0)
    hidden, teacher_hidden = torch.randn(rows, 8, generator=generator), torch.randn(rows, 6, generator=generator)
    weight, teacher = torch.randn(20, 8, generator=generator), torch.randn(20, 6, generator=generator)
    gradients = []
    for fused in (True, False):
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        log_q = (teacher_hidden @ teacher.T).log_softmax(-1)
        loss = FusedLinearLoss.apply(states, head, teacher_hidden, teacher, True) if fused else F.kl_div(
            (states @ head.T).log_softmax(-1), log_q, reduction="sum", log_target=True)
        (0.3 * loss).backward()
        gradients.append((loss.detach(), states.grad, head.grad))
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_steps_equal_a_plain_loop_over_transformers(finished, checkpoint, simp_file, shards):
    """One sample at a time: the likelihood of the task and of replayed windows, and the divergences from a copy."""
    models = [AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32) for _ in range(2)]
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    task = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    windows = ShardDataset(shards, "train", WINDOW_TOKENS)
    texts = [(np.array(ids), 1) for ids in json.loads((finished / "self-replay.json").read_text())["texts"]]
    logged = read_metrics(finished)[0]
    for step in range(4):
        samples = [task[index] for index in sample_indices(42, len(task), 8 * step, 8 * step + 8)]
        replayed = [windows[index] for index in replay_with_replacement(42, len(windows), step, 0.2, 8)]
        generated = [texts[index] for index in replay_in_epochs(42, 6, step, 0.3, 8)]
        nll = mean_over_targets(models, samples + replayed,
                                lambda log_p, log_q, ids: -log_p.gather(1, ids[:, None])[:, 0])
        kls = [mean_over_targets(models, group, lambda log_p, log_q, ids: (log_q.exp() * (log_q - log_p)).sum(-1))
               for group in (samples, generated)]
        (nll + 0.7 * kls[0] + 0.4 * kls[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert logged[step]["loss"] == pytest.approx(nll.item(), rel=1e-5)
        assert logged[step]["input_kl"] == pytest.approx(kls[0].item(), rel=1e-3, abs=1e-6)
        assert logged[step]["self_replay_kl"] == pytest.approx(kls[1].item(), rel=1e-3, abs=1e-6)
    assert logged[0]["input_kl"] == pytest.approx(0, abs=1e-6)
    assert logged[3]["self_replay_kl"] > 1e-3


def mean_over_targets(models, samples, value_of):
    """The mean over all targets of a function of (log p, log q, targets), q of the second model."""
    values = []
    for tokens, first in samples:
        ids = torch.tensor(tokens)[None]
        log_p = models[0](ids).logits[0, first - 1:-1].log_softmax(-1)
        with torch.no_grad():
            log_q = models[1](ids).logits[0, first - 1:-1].log_softmax(-1)
        values.append(value_of(log_p, log_q, ids[0, first:]))
    return torch.cat(values).mean()


@pytest.mark.parametrize(("zero", "processes"), [("1", 1), ("2", 2), ("3", 2)])
def test_losses_do_not_depend_on_processes_and_zero_stage(train, finished, shards, tmp_path, zero, processes):
    out = tmp_path / "run"
    train(out, *KL, "--replay_share", "0.2", "--replay_text", shards, "--zero", zero, launcher=processes)
    assert losses(out) == pytest.approx(losses(finished), rel=1e-5)
    assert [line["self_replay_kl"] for line in read_metrics(out)[0]] == pytest.approx(
        [line["self_replay_kl"] for line in read_metrics(finished)[0]], rel=1e-3, abs=1e-6)
    assert (out / "self-replay.json").read_bytes() == (finished / "self-replay.json").read_bytes()


def test_text_is_replayed_at_a_share_below_one_sample():
    counts = [len(replay_in_epochs(42, 50, step, 0.01, 32)) for step in range(100)]
    assert sum(counts) == 32
    assert set(counts) == {0, 1}
    seen = [index for step in range(100) for index in replay_in_epochs(42, 50, step, 0.5, 1)]
    assert len(set(seen)) == 50  # no text is repeated before all were used
    of_long = [len(replay_with_replacement(42, 10**15, step, 0.01, 32)) for step in range(100)]
    assert of_long == counts
    assert replay_with_replacement(42, 10**15, 3, 0.5, 8) != replay_with_replacement(43, 10**15, 3, 0.5, 8)
    assert {index for step in range(1000) for index in replay_with_replacement(42, 50, step, 0.5, 1)} == set(range(50))


def test_generated_texts_are_samples_of_the_model(checkpoint):
    """They begin with <bos>, and what follows has the frequencies of the model's first prediction."""
    model, tokenizer = load_model(checkpoint), Tokenizer(checkpoint)
    texts = generate_texts(model, checkpoint, range(400), 42, 128)
    assert texts[17] == generate_texts(model, checkpoint, [17], 42, 128)[0]
    assert {text[0] for text in texts} == {tokenizer.bos_id}
    assert all(len(text) == 129 or text[-1] == tokenizer.eos_id for text in texts)
    with torch.no_grad():
        p = model(torch.tensor([[tokenizer.bos_id]]))[0, 0].softmax(-1)
    counts = torch.bincount(torch.tensor([text[1] for text in texts]), minlength=len(p))
    likely = p.topk(20).indices
    expected = 400 * p[likely]
    assert ((counts[likely] - expected) ** 2 / expected).sum() < 45  # χ² with 20 degrees of freedom: p = 0.001


def test_generated_texts_are_within_the_context_and_the_vocabulary(train, checkpoint, tmp_path):
    m0 = tmp_path / "m0"
    shutil.copytree(checkpoint, m0)
    config = json.loads((m0 / "config.json").read_text())
    (m0 / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 120}))
    flags = ["--self_replay_kl", "0.4", "--self_replay_share", "0.5", "--self_replay_texts", "6", "--max_steps", "1",
             "--max_source_length", "100", "--max_target_length", "20"]
    printed = train(tmp_path / "m1", *flags, init=m0).stdout
    long, cut = re.search(r"(\d+) of \d+ prompts reach max_source_length 100, to which longer ones are cut; (\d+) "
                          "targets are cut to max_target_length 20", printed).groups()
    assert int(long) > 0
    assert int(cut) > 0
    content = json.loads((tmp_path / "m1/self-replay.json").read_text())
    assert max(map(len, content["texts"])) == 120
    content["texts"][2][1] = 512
    (tmp_path / "m1/self-replay.json").write_text(json.dumps(content))
    line = error_line(train(tmp_path / "m2", *flags, init=tmp_path / "m1", check=False))
    assert line.endswith("self-replay.json is damaged: remove it to generate the texts again")
    m0.rename(tmp_path / "elsewhere")
    line = error_line(train(tmp_path / "m2", *flags, init=tmp_path / "m1", check=False))
    assert f"the chain of tasks of {tmp_path / 'm1'} started from {m0} (a relative path is relative to the" in line


def test_the_second_task_stays_close_to_the_start_of_the_chain(train, finished, checkpoint, tmp_path):
    """Its divergence is that from m0, and it uses the texts of the first task."""
    out = tmp_path / "m2-simp"
    result = train(out, *KL, init=finished)
    assert "generating" not in result.stdout
    assert (out / "self-replay.json").read_bytes() == (finished / "self-replay.json").read_bytes()
    assert read_metrics(out)[0][0]["input_kl"] > 0.05  # m1 is not m0
    assert read_lineage(out)["start"]["init"] == str(checkpoint)
    assert json.loads((out / "run.json").read_text())["start_digest"] == read_lineage(out)["start"]["digest"]


def test_a_killed_run_uses_the_same_texts(train, finished, shards, tmp_path):
    flags = [*KL, "--replay_share", "0.2", "--replay_text", shards, "--save_minutes", "0"]
    train(tmp_path / "m1", *flags, interrupted=(3, "SIGKILL", 0))
    patch = "import training.data\ndel training.data.check_shards"  # all of the text is not read again
    result = train(tmp_path / "m1", *flags, patch=patch)
    assert "resuming after step 2" in result.stdout
    assert "generating" not in result.stdout
    assert losses(tmp_path / "m1") == losses(finished)


def test_m0_has_no_gradients(checkpoint):
    run = SimpleNamespace(cfg=TrainConfig(init=str(checkpoint)), lineage={}, dtype=torch.float32,
                          dist=SimpleNamespace(device="cpu"))
    assert not any(parameter.requires_grad for parameter in Distillation(run).model.parameters())


def test_a_start_that_has_changed_or_is_unknown(train, finished, checkpoint, tmp_path):
    start, m1 = tmp_path / "m0", tmp_path / "m1"
    shutil.copytree(checkpoint, start)
    train(m1, "--input_kl", "1", "--max_steps", "1", init=start)
    config = json.loads((start / "config.json").read_text())
    (start / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    flags = ["--input_kl", "1"]
    assert "m0, which the chain of tasks started from, has changed: restore it" in error_line(
        train(tmp_path / "m2", *flags, init=m1, check=False))
    shutil.rmtree(start)
    assert "m0 is neither a checkpoint directory nor a Hub id" in error_line(
        train(tmp_path / "m2", *flags, init=m1, check=False))
    train(tmp_path / "m2", init=m1_without_start(finished, tmp_path))
    lineage = read_lineage(tmp_path / "m2")
    assert len(lineage["tasks"]) == 2
    assert "start" not in lineage  # not that of the second task
    with pytest.raises(UserError, match="does not say which checkpoint its chain of tasks started from"):
        start_digest(TrainConfig(init="m1", input_kl=1.0), lineage, None)
    assert not start_digest(TrainConfig(init="m1"), lineage, None)


def m1_without_start(finished, tmp_path):
    """A stage whose run.json does not say where its chain started."""
    stage = shutil.copytree(finished, tmp_path / "old")
    record = json.loads((stage / "run.json").read_text())
    del record["lineage"]["start"]
    (stage / "run.json").write_text(json.dumps(record))
    return stage


def test_each_task_replays_other_windows(train, finished, checkpoint, simp_file, shards, tmp_path):
    """The first step of the second task replays the first window in the order of its own seed."""
    flags = ["--replay_share", "0.2", "--replay_text", shards, "--max_steps", "1"]
    train(tmp_path / "m2", *flags, init=finished)
    train(tmp_path / "plain", "--max_steps", "1", init=finished)
    windows = ShardDataset(shards, "train", WINDOW_TOKENS)
    model = load_model(finished)
    ids = torch.tensor(windows[replay_with_replacement(42 + TASK_SEEDS, len(windows), 0, 0.2, 8)[0]][0])[None]
    with torch.no_grad():
        nll = -model(ids[:, :-1]).log_softmax(-1).gather(2, ids[:, 1:, None]).sum().item()
    both, alone = (read_metrics(tmp_path / name)[0][0] for name in ("m2", "plain"))
    task = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    targets = count_tokens([task[index] for index in sample_indices(42, len(task), 0, 8)])[1]
    assert both["loss"] == pytest.approx((alone["loss"] * targets + nll) / (targets + WINDOW_TOKENS), rel=1e-5)
    line = error_line(train(tmp_path / "out", "--replay_share", "0.01", "--replay_text", shards, check=False))
    assert "replay_share is 0.01, so that 4 steps of 8 samples replay nothing: raise it" in line


def test_damaged_texts(train, finished, tmp_path):
    stage = shutil.copytree(finished, tmp_path / "m1")
    content = json.loads((stage / "self-replay.json").read_text())
    (stage / "self-replay.json").write_text(json.dumps(content | {"texts": content["texts"][:-1]}))
    assert "self-replay.json is damaged: remove it to generate the texts again" in error_line(
        train(tmp_path / "m2", *KL, init=stage, check=False))


def test_replay_needs_a_text_of_the_same_tokenizer(train, checkpoint, shards, tmp_path):
    line = error_line(train(tmp_path / "out", "--replay_share", "0.1", check=False))
    assert "replay_share needs a text: give --replay_text, a directory of token shards" in line
    line = error_line(train(tmp_path / "out", "--replay_share", "0.1", "--replay_text", shards / "meta.json",
                            check=False))
    assert "meta.json is a file, expected a directory of token shards: make it with data_prep.py text" in line
    other = tmp_path / "shards"
    shutil.copytree(shards, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = dict(zip(tokenizer["model"]["vocab"], reversed(tokenizer["model"]["vocab"].values())))
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    line = error_line(train(tmp_path / "out", "--replay_share", "0.1", "--replay_text", other, check=False))
    assert f"replay_text {other} was made with a tokenizer other than that of" in line
    assert not (tmp_path / "out.partial").exists()
