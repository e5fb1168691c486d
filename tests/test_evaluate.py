"""evaluate.py on a checkpoint with random weights, with one process and with two."""
import json
import shutil

import numpy as np
import pytest
import sacrebleu
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.results import Stage, add_results
from common.files import UserError, digest, read_json, read_json_lines
from common.settings import known, read_config
from corpus.tasks import encode_prompts
from evaluate import EvaluateConfig, main, prepare_evaluation
from evaluation.metrics import sari
from evaluation.result_files import is_same_run, sample_files
from evaluation.test_sets import task_decoding
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, TORCHRUN, run_script, sample_texts

SUITE = """
[[benchmark]]
name = "continuation"
category = "Rs"
file = "items.jsonl"
doc_to_text = "text"
doc_to_choice = "choices"
doc_to_target = "label"
"""


@pytest.fixture(scope="module")
def suite_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    texts = sample_texts()
    items = [{"text": text[:40], "choices": [text[40:60], texts[n + 1][:20]], "label": 0}
             for n, text in enumerate(texts[:15])]
    (folder / "items.jsonl").write_text("\n".join(map(json.dumps, items)))
    (folder / "suite.toml").write_text(SUITE)
    return folder / "suite.toml"


@pytest.fixture(scope="module")
def words(checkpoint, simp_file, suite_file):
    return ["evaluate.py", "--checkpoint", checkpoint, "--data", simp_file.parent, "--tasks", "simp", "--suite",
            suite_file, "--limit", "6", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def done(words, tmp_path_factory):
    """(folder of the results, printed output)."""
    out = tmp_path_factory.mktemp("eval")
    return out, run_script(*words, "--out", out).stdout


def results(folder):
    path, = folder.glob("results_*.json")
    return read_json(path)


def test_predictions_and_metrics(done, checkpoint, simp_file):
    out, _ = done
    lines, items = read_json_lines(out / "predictions-simp.jsonl"), read_json(simp_file)["test"][:6]
    assert [{key: line[key] for key in item} for line, item in zip(lines, items)] == items
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for line in lines[:2]:
        ids = torch.tensor(encode_prompts(Tokenizer(checkpoint), [line["input"]], 1024))
        new = model.generate(ids, num_beams=3, length_penalty=0.8, max_new_tokens=184, do_sample=False, pad_token_id=0)
        assert line["prediction"] == tokenizer.decode(new[0, ids.shape[1]:], skip_special_tokens=True).strip()
    metrics = read_json(out / "metrics-simp.json")
    texts = [line["prediction"] for line in lines]
    assert metrics["samples"] == 6
    assert metrics["metrics"]["bleu"]["mean"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [[item["output"] for item in items]]).score)
    scores = [sari(item["src_info"]["normal_sentence"], text, [item["output"]]) for item, text in zip(items, texts)]
    assert metrics["metrics"]["sari"]["mean"] == pytest.approx(sum(scores) / 6)
    assert [line["scores"]["sari"] for line in lines] == pytest.approx(scores, abs=1e-4)
    assert metrics["run"]["decoding"]["num_beams"] == 3


def test_items_of_benchmarks_are_saved(done):
    """The report reads the items of each result from lm-eval's sample files."""
    out, _ = done
    file, = out.glob("results_*.json")
    items = read_json_lines(out / file.name.replace("results", "samples_continuation").replace(".json", ".jsonl"))
    assert [item["doc_id"] for item in items] == list(range(len(items)))
    assert np.mean([item["acc"] for item in items]) == results(out)["results"]["continuation"]["acc,none"]
    stage = Stage("llm", 42, 0, "m0")
    add_results(stage, file)
    found = stage.benchmarks["continuation"]
    assert found.error == pytest.approx(results(out)["results"]["continuation"]["acc_stderr,none"])
    (name, _, count), part = *found.parts, *found.parts.values()
    assert (name, count) == ("continuation", len(part)) == ("continuation", len(items))


def test_the_table(done):
    out, text = done
    lines = text.splitlines()
    simp = read_json(out / "metrics-simp.json")["metrics"]
    row, = [line for line in lines if line.startswith("simp ")]
    assert f"{simp['sari']['mean']:.1f} [" in row
    row, = [line for line in lines if line.startswith("Rs ")]
    assert f"{100 * results(out)['results']['continuation']['acc,none']:.1f}" in row.split()
    tokens = results(out)["tokens"]
    assert f"tokens computed: {tokens['computed']:,} of {tokens['asked']:,}" in text


def test_existing_results_are_kept(done, words, checkpoint, suite_file):
    out, text = done
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = run_script(*words, "--out", out).stdout
    lines = again.splitlines()
    assert sum("already exists, with the same model, data and settings" in line for line in lines) == 2
    assert lines[3:] == text.splitlines()[1:]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run = read_json(out / "metrics-simp.json")["run"]
    assert is_same_run(run, run | {"checkpoint": "moved", "commit": "later"})
    assert not is_same_run(run, run | {"limit": 7})
    assert run["tokenizer_digest"] == digest(checkpoint.glob("tokenizer*.json"))
    assert results(out)["run"]["suite"][0]["file"] == digest([suite_file.parent / "items.jsonl"])
    assert not is_same_run(run, run | {"decoding": run["decoding"] | {"num_beams": 4}})


def test_newer_results_replace_older_ones(done, checkpoint, suite_file, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "eval")
    (out / "results_mine.json").write_text('{"results": {"continuation": {"acc": 1.0}}}')  # written by another program
    run_script("evaluate.py", "--checkpoint", checkpoint, "--suite", suite_file, "--limit", "3", "--dtype", "fp32",
               "--out", out)
    ours = [path for path in out.glob("results_*.json") if path.name != "results_mine.json"]
    assert [read_json(path)["run"]["limit"] for path in ours] == [3]
    assert (out / "results_mine.json").exists()
    assert list(out.glob("samples_*")) == list(sample_files(ours[0]).values()) != []


def test_two_processes_give_the_same_results(done, words, tmp_path):
    out, _ = done
    run_script(*words, "--out", tmp_path, launcher=[*TORCHRUN])
    assert (tmp_path / "predictions-simp.jsonl").read_bytes() == (out / "predictions-simp.jsonl").read_bytes()
    one, two = results(out)["results"]["continuation"], results(tmp_path)["results"]["continuation"]
    assert two["acc,none"] == one["acc,none"]
    assert two["nll,none"] == pytest.approx(one["nll,none"], abs=1e-4)
    assert results(tmp_path)["tokens"]["asked"] == results(out)["tokens"]["asked"]


def test_two_processes_print_one_error_line(checkpoint, tmp_path, suite_file):
    """Rank 0 finds a continuation longer than the context while the others wait for their shares."""
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "a", "choices": ["b", "c" * 9000], "label": 0}))
    result = run_script("evaluate.py", "--checkpoint", checkpoint, "--suite", suite_file, "--suite_files", tmp_path,
                        "--out", tmp_path / "out", launcher=TORCHRUN, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "longer than the model's context of 2,048: 'ccc" in lines[0]
    assert "[rank1]" not in result.stderr  # no traceback of the other rank
    assert not (tmp_path / "out").exists()


def damaged(checkpoint, folder, damage):
    shutil.copytree(checkpoint, folder)
    damage(folder)
    return folder


def test_invalid_input(checkpoint, simp_file, tmp_path):
    def refused(**given):
        with pytest.raises(UserError) as error:
            prepare_evaluation(EvaluateConfig(**{"checkpoint": str(checkpoint), "data": str(simp_file.parent),
                                        "tasks": ("simp",)} | given))
        return str(error.value)

    bare = damaged(checkpoint, tmp_path / "bare", lambda folder: (folder / "model.safetensors").unlink())
    assert f"{bare} holds no weights" in refused(checkpoint=str(bare))
    assert "unknown suite 'smple', expected one of local, paper, sample" in refused(suite="smple")
    assert "empd.json does not exist: make it with" in refused(tasks=("empd",))
    (tmp_path / "simp.json").write_text(json.dumps(read_json(simp_file) | {"test": []}))
    assert "test set of" in refused(data=str(tmp_path))
    assert "is empty" in refused(data=str(tmp_path))
    assert "2000 + max_new_tokens 184 of simp is more than" in refused(max_source_length=2000)
    endless = damaged(checkpoint, tmp_path / "endless", without_eos)
    assert "names no end-of-text token" in refused(checkpoint=str(endless))
    assert "no posterior to sample weights from: it was not fine-tuned with IVON" in refused(posterior_samples=2)


def without_eos(folder):
    for name, key in (("config.json", "eos_token_id"), ("tokenizer_config.json", "eos_token")):
        values = read_json(folder / name)
        values.pop(key)
        (folder / name).write_text(json.dumps(values))
    (folder / "generation_config.json").unlink(missing_ok=True)


def test_contradictions(refusal):
    line = refusal((EvaluateConfig, main), "--tasks", "smp", "--limit", "0", "--bertscore_model", "x")
    for said in ("--checkpoint is missing", "unknown task 'smp'", "--tasks needs --data", "limit is 0",
                 "bertscore_model and bertscore_layer must be given together"):
        assert said in line
    assert "there is nothing to evaluate" in refusal((EvaluateConfig, main), "--checkpoint", "x")


def test_decoding_and_source_field_of_every_task():
    published = {"simp": (3, 0.8, 184), "inqqg": (4, 0.9, 64)}
    for task in known("task"):
        decoding, spec = task_decoding(task, 7), read_config("task", task)
        assert decoding.seed == 7
        assert all(spec["source"] in info for info in sample_infos(spec["folder"]))
        if task in published:
            assert (decoding.num_beams, decoding.length_penalty, decoding.max_new_tokens) == published[task]
    empd = task_decoding("empd", 7)
    assert (empd.do_sample, empd.temperature, empd.top_p, empd.top_k) == (True, 0.8, 0.9, 50)
    assert (empd.no_repeat_ngram_size, task_decoding("inqqg", 7).no_repeat_ngram_size) == (3, 2)


def sample_infos(folder):
    return [info for path in (ROOT / "data/sample" / folder).glob("*.json") for info in read_json(path)["src_info"]]
