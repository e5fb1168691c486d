"""evaluate.py on a checkpoint with random weights, with one process and with two."""
import dataclasses
import importlib.machinery
import json
import shutil
import sys
import types
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate
from analysis.results import add_results
from analysis.stages import Stage
from common.configs import known, read_config
from common.files import UserError, digest, read_json, read_json_lines
from common.settings import load
from common.writing import sole_use
from corpus.prompts import open_template
from evaluate import main, open_test_sets, prepare_evaluation
from evaluation import benchmarks
from evaluation.evaluate_config import EvaluateConfig
from evaluation.metrics import sari, sari_hf
from evaluation.parallel import ParallelModel
from evaluation.result_files import is_same_run, sample_files
from evaluation.test_sets import TaskTestSet, evaluate_test_set, task_decoding
from model.hub import load_model
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, error_line, random_model, run_script, sample_texts

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


def test_items_without_the_source_that_sari_needs_are_refused(checkpoint, simp_file, tmp_path, refusal):
    splits = json.loads(simp_file.read_text())
    splits["test"][1]["src_info"]["nomal_sentence"] = splits["test"][1]["src_info"].pop("normal_sentence")
    (tmp_path / "simp.json").write_text(json.dumps(splits))
    line = refusal((EvaluateConfig, main), "--checkpoint", checkpoint, "--data", tmp_path, "--tasks", "simp", "--out",
                   tmp_path / "eval")
    assert " has no text as 'normal_sentence' in src_info, which SARI needs" in line
    assert f"simp.json: the test item {splits['test'][1]['input']!r:.60} has" in line
    assert "nomal_sentence" in line


def test_one_evaluation_at_a_time_writes_into_a_folder(words, tmp_path):
    with sole_use(tmp_path / "eval"):
        line = error_line(run_script(*words, "--out", tmp_path / "eval", launcher=[sys.executable], check=False))
    assert f"another process is using {tmp_path}/eval: wait until it ends, or stop it" in line
    assert not (tmp_path / "eval").exists()
    (tmp_path / "file").touch()
    line = error_line(run_script(*words, "--out", tmp_path / "file", check=False))
    assert f"cannot write {tmp_path}/file: it is a file, expected a folder" in line


def results(folder):
    path, = folder.glob("results_*.json")
    return read_json(path)


def test_a_missing_benchmark_is_tried_again_alone(checkpoint, suite_file, tmp_path):
    """Also if its file is made later, or what is shown of a benchmark changes. Another prompt is measured again."""
    late = SUITE.replace("continuation", "late").replace('"items.jsonl"', '"late.jsonl"\nmake_file = "write it"')
    shutil.copy(suite_file.parent / "items.jsonl", tmp_path)
    suite, out = tmp_path / "suite.toml", tmp_path / "out"
    command = ["evaluate.py", "--checkpoint", checkpoint, "--suite", suite, "--limit", "6", "--dtype", "fp32", "--out",
               out]
    suite.write_text(SUITE + late)
    line = error_line(run_script(*command, check=False))
    assert "the others were run: late (" in line
    assert "late.jsonl does not exist: write it" in line
    assert read_json(out / "missing.json")["missing"].keys() == {"late"}
    first, = out.glob("results_*.json")
    content = first.read_bytes()
    (tmp_path / "late.jsonl").write_bytes((tmp_path / "items.jsonl").read_bytes())
    suite.write_text(SUITE.replace('category = "Rs"', 'category = "DK"') + late)
    printed = run_script(*command).stdout
    assert f"{first} already exists, with the same model, data and settings" in printed
    assert [line.split()[:2] for line in printed.splitlines() if line.split()[1:2] in (["continuation"], ["late"])] == [
        ["DK", "continuation"], ["Rs", "late"]]
    assert first.read_bytes() == content
    assert not (out / "missing.json").exists()
    other, = set(out.glob("results_*.json")) - {first}
    assert read_json(other)["results"].keys() == {"late"}
    suite.write_text(SUITE + 'target_delimiter = ": "\n' + late)
    printed = run_script(*command).stdout
    assert f"{other} already exists" in printed
    assert f"{first} already exists" not in printed
    last, = set(out.glob("results_*.json")) - {first, other}
    suite.write_text(SUITE)
    assert f"{last} is newer and has other settings: reports use its results" in run_script(*command).stdout
    assert "newer" not in printed


def test_predictions_and_metrics(done, checkpoint, simp_file):
    out, _ = done
    lines, items = read_json_lines(out / "predictions-simp.jsonl"), read_json(simp_file)["test"][:6]
    assert [{key: line[key] for key in item} for line, item in zip(lines, items)] == items
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for line in lines[:2]:
        ids = torch.tensor(open_template("alpaca", Tokenizer(checkpoint)).encode_prompts([line["input"]], 1024))
        new = model.generate(ids, num_beams=3, length_penalty=0.8, max_new_tokens=184, do_sample=False, pad_token_id=0)
        assert line["prediction"] == tokenizer.decode(new[0, ids.shape[1]:], skip_special_tokens=True).strip()
    metrics = read_json(out / "metrics-simp.json")
    texts = [line["prediction"] for line in lines]
    assert metrics["samples"] == 6
    assert metrics["prompts"] == {"simplification_1": 6}
    assert metrics["metrics"]["bleu"]["mean"] == pytest.approx(
        sacrebleu.corpus_bleu(texts, [[item["output"] for item in items]]).score)
    sources = [item["src_info"]["normal_sentence"] for item in items]
    references = [[item["output"]] for item in items]
    scores = [sari_hf(*found) for found in zip(sources, texts, references)]
    assert metrics["metrics"]["sari_hf"]["mean"] == pytest.approx(sum(scores) / 6)
    assert [line["scores"]["sari_hf"] for line in lines] == pytest.approx(scores, abs=1e-4)
    assert metrics["metrics"]["sari"] == pytest.approx(sari(sources, texts, references)[0])
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
    losses, row = [line for line in lines if line.startswith("simp ")]
    assert f"{read_json(out / 'losses-task-simp.json')['loss']:.4f}" in losses.split()
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
    assert sum("already exists, with the same model, data and settings" in line for line in lines) == 3
    assert lines[4:] == text.splitlines()[1:]
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    run = read_json(out / "metrics-simp.json")["run"]
    assert is_same_run(run, run | {"checkpoint": "moved", "commit": "later"})
    assert not is_same_run(run, run | {"limit": 7})
    assert run["tokenizer_digest"] == digest(checkpoint.glob("tokenizer*.json"))
    assert results(out)["run"]["suite"][0]["file"] == digest([suite_file.parent / "items.jsonl"])
    assert not is_same_run(run, run | {"decoding": run["decoding"] | {"num_beams": 4}})
    losses = read_json(out / "losses-task-simp.json")["run"]
    assert run["template"] is losses["template"] is None  # as in results from before there was another one


def test_results_of_fewer_items_replace_none(done, checkpoint, suite_file, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "eval")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    run_script("evaluate.py", "--checkpoint", checkpoint, "--suite", suite_file, "--limit", "3", "--dtype", "fp32",
               "--out", out)
    files = sorted(out.glob("results_*.json"))
    assert [read_json(path)["run"]["limit"] for path in files] == [6, 3]
    assert sorted(out.glob("samples_*")) == [path for file in files for path in sample_files(file).values()]
    assert {name: (out / name).read_bytes() for name in before} == before


@pytest.fixture
def refused(checkpoint, simp_file, refusal, monkeypatch):
    """A function that returns the error of an evaluation, which must come before the model is loaded."""
    monkeypatch.setattr(evaluate, "load_model", lambda *_: pytest.fail("the model was loaded"))
    flags = {"checkpoint": checkpoint, "data": simp_file.parent, "tasks": "simp", "limit": 6, "dtype": "fp32"}

    def call(**given):
        return refusal((EvaluateConfig, main), *(f"--{name}={value}" for name, value in (flags | given).items()
                                                 if value is not None))
    return call


def test_results_that_would_be_lost(done, checkpoint, refused, tmp_path):
    out = shutil.copytree(done[0], tmp_path / "eval")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "metrics-simp.json has results of 6 items, which would be replaced by those of 2: remove this file, or" in \
        refused(out=out, limit=2)
    other = damaged(checkpoint, tmp_path / "other", with_other_weights)
    assert "metrics-simp.json has results of other weights: remove this file, or choose another --out" in \
        refused(out=out, checkpoint=other)
    (out / "metrics-simp.json").unlink()
    assert ".json has results of other weights" in refused(out=out, checkpoint=other)
    assert before.items() >= {path.name: path.read_bytes() for path in out.iterdir()}.items()


DAMAGED = {"cut": "{", "list": "[]", "no results": "{}", "nested": "[" * 100_000, "bytes": b"\xff",
           "results": '{"results": {"continuation": 3}, "run": {}}', "infinite": '{"results": {"a": {"acc": 1e999}}}'}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=list(DAMAGED))
@pytest.mark.parametrize("name", ["results_2025.json", "metrics-simp.json"])
def test_damaged_earlier_results(name, content, refused, suite_file, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    line = refused(out=tmp_path, suite=suite_file)
    assert line.startswith(f"error: {tmp_path / name}")
    assert line.endswith(": remove this file, or choose another --out")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_damaged_results_of_the_same_run(done, refused, suite_file, tmp_path):
    """The values that the printed table needs are checked as well."""
    out = shutil.copytree(done[0], tmp_path / "eval")
    path, = out.glob("results_*.json")
    path.write_text(json.dumps(read_json(path) | {"tokens": {"computed": "many"}}))
    assert f"{path} is damaged or not a results file" in refused(out=out, suite=suite_file)
    path = out / "metrics-simp.json"
    text = path.read_text()
    path.write_text(json.dumps(read_json(path) | {"metrics": {"bleu": {"mean": 1.0}}}))
    assert f"{path} is damaged or not a metrics file" in refused(out=out)
    path.write_text(text)
    (out / "predictions-simp.jsonl").write_text('{"input"')
    assert "predictions-simp.jsonl, line 1 is not JSON" in refused(out=out)


def test_a_checkpoint_from_the_hub_needs_a_folder_for_its_results(refused):
    assert "runs/tiny/llm/m9 is neither a checkpoint directory nor a Hub id" in refused(checkpoint="runs/tiny/llm/m9")
    line = refused(checkpoint="owner/name")
    assert "--out is missing: owner/name is not a directory here, and results next to a downloaded checkpoint" in line


@pytest.mark.parametrize("out", ["/proc/x", "file", "file/x", "x" * 300])
def test_a_folder_that_cannot_be_written(out, refused, tmp_path):
    (tmp_path / "file").touch()
    assert f"error: cannot write {tmp_path / out}" in refused(out=tmp_path / out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("key", "value"), [("references", None), ("references", "text"), ("references", [3]),
                                            ("references", []), ("src_info", "text"),
                                            ("src_info", {"normal_sentence": 3})])
def test_invalid_test_items(key, value, refused, simp_file, tmp_path):
    splits = read_json(simp_file)
    splits["test"][5][key] = value
    (tmp_path / "simp.json").write_text(json.dumps(splits))
    line = refused(data=tmp_path, out=tmp_path / "x")
    assert f"{tmp_path / 'simp.json'}: test[5] is not an item whose {key!r}" in line


def test_bertscore_is_tried_before_the_model_is_loaded(refused, monkeypatch, tmp_path):
    flags = {"bertscore_model": tmp_path, "bertscore_layer": 3, "out": tmp_path / "out"}
    monkeypatch.setitem(sys.modules, "bert_score", None)
    line = refused(**flags)
    assert "is not the directory of an encoder: it holds no config.json" in line
    assert "bertscore_model needs a package that is not installed: pip install bert-score" in line
    assert "bertscore_model is for the generated texts of tasks" in refused(**flags | {"tasks": None})
    (tmp_path / "config.json").write_text("{}")
    package = types.ModuleType("bert_score")
    package.__spec__ = importlib.machinery.ModuleSpec("bert_score", None)
    monkeypatch.setitem(sys.modules, "bert_score", package)  # without its function
    assert f"BERTScore cannot be computed with layer 3 of the encoder in {tmp_path}: " in refused(**flags)


def test_the_tasks_of_lm_eval_are_loaded_before_the_model(refused, suite_file, monkeypatch, tmp_path):
    def load_suite(*_):
        raise UserError("piqa cannot be run")

    monkeypatch.setattr(benchmarks, "load_suite", load_suite)
    assert "piqa cannot be run" in refused(suite=suite_file, out=tmp_path / "out")


def test_two_processes_give_the_same_results(done, words, tmp_path):
    out, _ = done
    run_script(*words, "--out", tmp_path, launcher=2)
    assert (tmp_path / "predictions-simp.jsonl").read_bytes() == (out / "predictions-simp.jsonl").read_bytes()
    one, two = results(out)["results"]["continuation"], results(tmp_path)["results"]["continuation"]
    assert two["acc,none"] == one["acc,none"]
    assert two["nll,none"] == pytest.approx(one["nll,none"], abs=1e-4)
    assert results(tmp_path)["tokens"]["asked"] == results(out)["tokens"]["asked"]


def test_posterior_samples_do_not_depend_on_the_number_of_processes(checkpoint, suite_file, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "m1")
    save_file({f"{kind}/{name}@0": values for name, parameter in random_model().named_parameters() for kind, values in (
        ("mean", parameter.detach().view(-1)), ("precision", torch.full((parameter.numel(),), 1e3)))},
        folder / "posterior-00001-of-00001.safetensors")
    for ranks in (1, 2):
        run_script("evaluate.py", "--checkpoint", folder, "--suite", suite_file, "--posterior_samples", "2", "--limit",
                   "4", "--dtype", "fp32", "--out", tmp_path / f"{ranks}", launcher=ranks)
    one, two = (results(tmp_path / name) for name in ("1", "2"))
    assert one["results"]["continuation"]["nll,sampled"] != one["results"]["continuation"]["nll,none"]
    for name in ("nll,sampled", "nll,none"):
        assert two["results"]["continuation"][name] == pytest.approx(one["results"]["continuation"][name], abs=1e-4)
    assert one["run"]["posterior_samples"] == 2
    assert one["run"]["posterior_digest"] == digest([folder / "posterior-00001-of-00001.safetensors"])
    cfg = EvaluateConfig(checkpoint=str(folder), suite=str(suite_file), posterior_samples=2, seed=7)
    assert prepare_evaluation(cfg).suite.posterior_samples == [(folder, ("weights", 7, number)) for number in (0, 1)]


def test_benchmarks_in_the_chat_template(checkpoint, suite_file, dist, tmp_path):
    """transformers scores the prompts as the template writes them."""
    folder = shutil.copytree(checkpoint, tmp_path / "m1")
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}[{{ message.role }}] {{ message.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}")
    cfg = EvaluateConfig(checkpoint=str(folder), suite=str(suite_file), template="chat", limit=4, dtype="fp32")
    evaluate.evaluate(prepare_evaluation(cfg), ParallelModel(dist, load_model(folder), Tokenizer(folder)))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer, (file,) = AutoTokenizer.from_pretrained(checkpoint), folder.glob("eval/samples_*")
    for found, item in zip(read_json_lines(file), read_json_lines(suite_file.parent / "items.jsonl")):
        for (score, _), choice in zip(found["filtered_resps"], item["choices"], strict=True):
            prompt = f"[user] {item['text']}[assistant]"
            start = len(tokenizer.encode(prompt))
            ids = torch.tensor(tokenizer.encode(f"{prompt} {choice}"))
            with torch.no_grad():
                log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)
            assert score == pytest.approx(float(log_p.gather(1, ids[1:, None])[start - 1:].sum()), abs=1e-3)


def test_two_processes_print_one_error_line(checkpoint, tmp_path, suite_file):
    """Rank 0 finds a continuation longer than the context while the others wait for their shares."""
    (tmp_path / "items.jsonl").write_text(json.dumps({"text": "a", "choices": ["b", "c" * 9000], "label": 0}))
    result = run_script("evaluate.py", "--checkpoint", checkpoint, "--suite", suite_file, "--suite_files", tmp_path,
                        "--out", tmp_path / "out", launcher=2, check=False)
    lines = [line for line in result.stderr.splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert "longer than the model's context of 2,048: 'ccc" in lines[0]
    assert "Traceback" not in result.stderr  # of the other rank
    assert not (tmp_path / "out").exists()


def test_a_signal_ends_an_evaluation_with_the_status_of_a_job_that_continues(checkpoint, tmp_path):
    code = (f"import os, signal, sys, time; sys.path[0] = {str(ROOT)!r}; import evaluate\n"
            "os.environ.pop('RANK', None)  # of this process\n"
            "def prepare(cfg): os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)\n"
            "evaluate.prepare_evaluation = prepare\n"
            "evaluate.main(evaluate.EvaluateConfig(checkpoint=sys.argv[1], out=sys.argv[2]))")
    result = run_script("-c", code, checkpoint, tmp_path / "out", check=False)
    assert (result.returncode, "ended by SIGTERM" in result.stderr) == (75, True)


def test_nodes_with_different_files_are_refused(checkpoint, tmp_path):
    """Two processes with one device each, as on two nodes with a disk of their own."""
    for rank in "01":
        shutil.copytree(checkpoint, tmp_path / rank / "m1")
        shutil.copytree(checkpoint, tmp_path / rank / "m0")
        (tmp_path / rank / "m1/posterior-00001-of-00001.safetensors").write_bytes(b"posterior")
        (tmp_path / rank / "text.jsonl").write_text('{"text": "a short text"}')
    code = (f"import os, sys; sys.path[0] = {str(ROOT)!r}; sys.argv[0] = 'evaluate.py'\n"
            f"os.chdir({str(tmp_path)!r} + '/' + os.environ['RANK'])\n"
            "os.environ.update(LOCAL_RANK='0', LOCAL_WORLD_SIZE='1')\n"
            "import runpy; runpy.run_module('evaluate', run_name='__main__')")
    weights = tmp_path / "1/m0/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    result = run_script("-c", code, "--checkpoint", "m1", "--reference", "m0", "--text", "text.jsonl", "--out",
                        tmp_path / "out", launcher=2, check=False)
    line, = (line for line in result.stderr.splitlines() if line.startswith("error"))
    assert "not the same on all nodes: the weights of m0 (digest " in line
    assert "on rank 1): copy the files there again, or use a shared folder" in line
    assert not (tmp_path / "out").exists()

    cfg = EvaluateConfig(checkpoint=str(tmp_path / "0/m1"), reference=str(tmp_path / "0/m0"), posterior_samples=1)
    digests = evaluate.file_digests(cfg)
    for name, file in (("weights", "m1/model.safetensors"), ("weights", "m0/model.safetensors"),
                       ("tokenizer files", "m1/tokenizer_config.json"),
                       ("posterior files", "m1/posterior-00001-of-00001.safetensors")):
        path = tmp_path / "0" / file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + b"\1")
        changed = evaluate.file_digests(cfg)
        assert {key for key in digests if changed[key] != digests[key]} == {f"the {name} of {path.parent}"}
        path.write_bytes(content)


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
    assert "1865 + max_new_tokens 184 of simp is more than" in refused(max_source_length=1865, max_target_length=2)
    endless = damaged(checkpoint, tmp_path / "endless", without_eos)
    assert "names no end-of-text token" in refused(checkpoint=str(endless))
    assert "no posterior to sample weights from: it was not fine-tuned with IVON" in refused(posterior_samples=2)


def with_other_weights(folder):
    save_file(dict(random_model(seed=1).named_parameters()), folder / "model.safetensors")


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
    assert load(EvaluateConfig, ["--checkpoint", "x", "--text", "x", "--local_rank=1"])  # of the deepspeed launcher
    assert "there is nothing to evaluate: give --text, --tasks or --suite" in refusal((EvaluateConfig, main),
                                                                                      "--checkpoint", "x")


def test_decoding_and_source_field_of_every_task(simp_file):
    published = {"simp": (3, 0.8, 184), "inqqg": (4, 0.9, 64)}
    for task in known("task"):
        decoding, spec = task_decoding(task, 7), read_config("task", task)
        assert decoding.seed == 7
        assert all(spec["source"] in info for info in sample_infos(spec["folder"]))
        if task in published:
            assert (decoding.num_beams, decoding.length_penalty, decoding.max_new_tokens) == published[task]
    simp, = open_test_sets(EvaluateConfig(tasks=("simp",), data=str(simp_file.parent), seed=7), "alpaca", 2048)
    assert simp.decoding == task_decoding("simp", 7)
    empd = task_decoding("empd", 7)
    assert (empd.do_sample, empd.temperature, empd.top_p, empd.top_k) == (True, 0.8, 0.9, 50)
    assert (empd.no_repeat_ngram_size, task_decoding("inqqg", 7).no_repeat_ngram_size) == (3, 2)


def sample_infos(folder):
    return [info for path in (ROOT / "data/sample" / folder).glob("*.json") for info in read_json(path)["src_info"]]


def test_the_references_of_an_item_and_the_brackets_of_its_source(tokenizer_dir, tmp_path, capsys):
    """The prediction is the second of two references; the source field has brackets as in the Penn Treebank."""
    tokenizer, text = Tokenizer(tokenizer_dir), "the ( big ) cat sat"
    references = ["a cat sat here", text]
    items = [{"input": "x", "output": "a cat sat", "references": references, "index": 0,
              "src_info": {"normal_sentence": "the -LRB- big -RRB- cat sat down", "prompt_name": "p"}}]
    test_set = TaskTestSet(task="simp", items=items, data_digest="d", decoding=task_decoding("simp", 1),
                           max_source_length=256, source="normal_sentence", sari="EASSE", bertscore_model=None,
                           bertscore_layer=None)
    model = SimpleNamespace(tokenizer=tokenizer, generate=lambda prompts, config: [tokenizer.encode(text)])
    found = evaluate_test_set(test_set, model, tmp_path, {})["metrics"]
    assert "are cut" not in capsys.readouterr().out
    evaluate_test_set(dataclasses.replace(test_set, max_source_length=87), model, tmp_path / "short", {})
    assert "1 of 1 prompts of simp reach max_source_length 87, to which longer ones are cut" in capsys.readouterr().out
    assert found["rougeL"]["mean"] == 100
    expected, _ = sari(["the ( big ) cat sat down"], [text], [references])
    assert found["sari"]["mean"] == pytest.approx(expected["mean"])
