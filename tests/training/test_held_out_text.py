"""Fine-tuning measures the loss on the pretraining text before and after."""
import json
import re
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from common.files import digest
from corpus.shards import WINDOW_TOKENS
from tests.conftest import error_line, run_script
from training.data import HELD_OUT_WINDOWS
from training.run_directory import loss_lines

FLAGS = ["--max_steps", "6", "--eval_steps", "4", "--save_minutes", "0"]


@pytest.fixture(scope="module")
def make_shards(checkpoint, tmp_path_factory):
    """A function that makes token shards with the checkpoint's tokenizer."""
    def call(text):
        folder = tmp_path_factory.mktemp("text")
        (folder / "text.jsonl").write_text("".join(json.dumps({"text": text.format(n)}) + "\n"
                                                   for n in range(3000)))
        run_script("data_prep.py", "text", "--source", folder / "text.jsonl", "--tokenizer", checkpoint,
                   "--output_path", folder / "shards")
        return folder / "shards"
    return call


@pytest.fixture(scope="module")
def shards(make_shards):
    """Token shards of numbered sentences, with more held-out text than is evaluated."""
    return make_shards("{0} is the number of a sentence, and this is sentence {0}. " * 30)


@pytest.fixture(scope="module")
def finished(train, shards, tmp_path_factory):
    """(directory, standard output) of a run that was not interrupted."""
    out = tmp_path_factory.mktemp("runs") / "m1-simp"
    return out, train(out, "--held_out_text", shards).stdout


def text_losses(out):
    """{step: loss} of the evaluations on the held-out text in a run's log."""
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["text_loss"] for line in lines if "text_loss" in line}


def loss_lines_of(printed):
    """The lines that a finished run prints on its losses."""
    return [line for line in printed.splitlines() if line.startswith("loss on")]


def printed_losses(printed):
    """The losses in these lines: before, after and their difference, each with four decimals."""
    return [float(number) for line in loss_lines_of(printed) for number in re.findall(r"[-+]?\d+\.\d{4}", line)]


def test_the_losses_equal_those_of_transformers(finished, checkpoint, shards):
    ids = torch.from_numpy(np.load(shards / "val-00000.npy").astype(np.int64))
    assert len(ids) > HELD_OUT_WINDOWS * WINDOW_TOKENS
    rows = torch.stack([ids[start:start + WINDOW_TOKENS + 1]
                        for start in range(0, HELD_OUT_WINDOWS * WINDOW_TOKENS, WINDOW_TOKENS)])
    expected = []
    for path in (checkpoint, finished[0]):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            expected.append(model(rows, labels=rows).loss.item())
    assert list(text_losses(finished[0]).items()) == [(0, pytest.approx(expected[0], rel=1e-5)),
                                                      (6, pytest.approx(expected[1], rel=1e-5))]
    run = json.loads((finished[0] / "run.json").read_text())
    assert [run["result"]["text_loss_before"], run["result"]["text_loss_after"]] == \
        list(text_losses(finished[0]).values())
    assert run["held_out_digest"] == digest([shards / "meta.json"])
    assert loss_lines_of(finished[1])[1].startswith("loss on held-out text  before ")
    assert printed_losses(finished[1])[3:] == pytest.approx([*expected, expected[1] - expected[0]], abs=2.1e-4)


@pytest.mark.parametrize("launcher", [1, 2])
def test_a_resumed_run_prints_the_same(train, finished, shards, tmp_path, launcher):
    train(tmp_path / "m1", "--held_out_text", shards, interrupted=(4, "SIGKILL", "all"))
    printed = train(tmp_path / "m1", "--held_out_text", shards, launcher=launcher).stdout
    assert "resuming after step 3" in printed
    assert len(loss_lines_of(printed)) == 2
    assert printed_losses(printed) == pytest.approx(printed_losses(finished[1]), abs=2.1e-4)
    assert text_losses(tmp_path / "m1") == pytest.approx(text_losses(finished[0]), rel=1e-5)


def test_losses_on_two_texts_are_not_compared(train, make_shards, shards, tmp_path):
    train(tmp_path / "m1", "--held_out_text", shards, interrupted=(4, "SIGKILL", "all"))
    other = make_shards("Another text: {0} times {0}. " * 9)
    train(tmp_path / "m1", "--held_out_text", other, interrupted=(1, "SIGKILL", "all"))  # before the next save
    printed = train(tmp_path / "m1", "--held_out_text", other).stdout
    assert "resuming after step 3" in printed
    assert [line.partition("  ")[0] for line in loss_lines_of(printed)] == ["loss on simp"]
    run = json.loads((tmp_path / "m1/run.json").read_text())  # names the text of the loss that it holds
    assert run["held_out_digest"] == digest([other / "meta.json"])
    assert run["settings"]["held_out_text"] == str(other)


def test_what_is_measured_does_not_identify_a_run(train, finished):
    printed = train(finished[0], "--examples", "1").stdout
    assert "is finished already" in printed
    assert loss_lines_of(printed) == loss_lines_of(finished[1])


def test_a_text_of_another_vocabulary_is_refused(train, shards, tmp_path):
    other = shutil.copytree(shards, tmp_path / "other")
    (other / "tokenizer.json").write_text("{}")
    assert "was made with a tokenizer other than that of" in error_line(
        train(tmp_path / "m1", "--held_out_text", other, check=False))
    damaged = shutil.copytree(shards, tmp_path / "damaged")
    ids = np.load(damaged / "val-00000.npy")
    ids[5] = 600
    np.save(damaged / "val-00000.npy", ids)
    assert "is not the shard that meta.json describes: its SHA-256 differs" in error_line(
        train(tmp_path / "m1", "--held_out_text", damaged, check=False, launcher=2))
    assert not (tmp_path / "m1").exists()


def test_lines_of_losses_by_hand():
    result = {"eval_loss_before": 6.0, "eval_loss_after": 5.0, "text_loss_before": 4.0, "text_loss_after": 4.25}
    assert loss_lines(result, "simp") == [
        "loss on simp           before 6.0000  after 5.0000  -1.0000  ████████████████████  learned",
        "loss on held-out text  before 4.0000  after 4.2500  +0.2500  █████                 forgot"]
    line, = loss_lines({"eval_loss_before": 5.0, "eval_loss_after": 5.5, "text_loss_before": None}, None)
    assert line.startswith("loss on held-out text  before 5.0000  after 5.5000  +0.5000  ")
    assert line.endswith("  worse")
    assert loss_lines({"eval_loss_before": None, "eval_loss_after": None}, "simp") == []
    line, = loss_lines({"eval_loss_before": 5.00001, "eval_loss_after": 5.0}, "x")
    assert line.endswith("+0.0000                        unchanged")
