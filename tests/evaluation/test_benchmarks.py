"""Benchmarks compared with lm-eval's Hugging Face backend, on random weights and local items."""
import importlib
import json
import math
import shutil
from types import SimpleNamespace

import datasets
import lm_eval
import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks._index import TaskIndex
from safetensors.torch import save_file
from tokenizers import Tokenizer as Fast
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from analysis.results import choices_of
from common.configs import known
from common.files import UserError
from evaluation import benchmarks
from evaluation.benchmarks import (
    SuiteRun,
    add_option_losses,
    evaluate_suite,
    option_results,
    own_results,
    run_suite,
)
from evaluation.harness import HarnessModel, check_room, generation_settings
from evaluation.lm_eval_tasks import (
    check_tasks,
    load_suite,
    local_task,
    metric_problems,
    quiet,
    read_suite,
    task_manager,
    with_parts,
)
from evaluation.parallel import ParallelModel
from evaluation.result_files import ResultsFile, write_results
from evaluation.suites import Benchmark, open_suite
from evaluation.summary import benchmark_scores, suite_table
from model.checkpoint import write_checkpoint
from model.generation import GenerationConfig
from model.hub import load_model
from model.noise import standard_normal
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, random_model, sample_texts

CONTEXT = 96  # tokens


@pytest.fixture(scope="module", params=[False, True], ids=["without bos", "with bos"])
def models(request, tokenizer_dir, tmp_path_factory, dist):
    """HarnessModel and lm-eval's HFLM of one checkpoint, with a tokenizer that adds <s> and with one that does not."""
    folder = tmp_path_factory.mktemp("models")
    model = random_model(max_position_embeddings=CONTEXT)
    with torch.no_grad():
        model.lm_head.weight[2] += 0.5 * model.lm_head.weight[7]  # makes some texts end early
    write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
    if request.param:
        fast = Fast.from_file(str(folder / "tokenizer.json"))
        fast.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        fast.save(str(folder / "tokenizer.json"))
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch_size=5,
                  tokenizer=AutoTokenizer.from_pretrained(folder))
    return HarnessModel(ParallelModel(dist, load_model(folder), Tokenizer(folder))), theirs


@pytest.fixture(scope="module")
def model(checkpoint, dist):
    return ParallelModel(dist, load_model(checkpoint), Tokenizer(checkpoint))


def run(suite, model, **options):
    """Loads and runs a suite: (results, answers, benchmarks without datasets)."""
    with quiet():
        loaded, missing = load_suite(suite, 2048)
    return *run_suite(loaded, model, **options), missing


def instances(kind, arguments):
    return [Instance(kind, {}, arguments=one, idx=0) for one in arguments]


def test_log_likelihoods_equal_the_backend(models):
    texts = sample_texts()
    long = " ".join(texts[:6])  # some hundred tokens
    pairs = [("", " a word"), ("", "<s> a word"), ("A context", " goes on"), ("<s>A context", " with a start"),
             ("Spaces at the end  ", "move"),
             (long, " is cut"), ("cut down to nothing", " " + long[:150])]
    pairs += [(texts[i], f" {word}") for i in range(6, 12) for word in ("yes", "no", "perhaps not")]
    found, expected = (model.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True) for model in models)
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    blank, = models[0].loglikelihood(instances("loglikelihood", [(" ", "a word")]))  # the backend fails an assertion
    assert blank == (pytest.approx(found[0][0], abs=1e-4), found[0][1])


def test_rolling_log_likelihoods_equal_the_backend(models):
    texts = [(text,) for text in ("short", sample_texts()[0], " ".join(sample_texts()[:9]))]
    found, expected = (model.loglikelihood_rolling(instances("loglikelihood_rolling", texts), disable_tqdm=True)
                       for model in models)
    assert found == pytest.approx(expected, abs=1e-2)


def test_generated_texts_equal_the_backend(models):
    plain = {"until": [], "max_gen_toks": 12, "do_sample": False}
    prompts = [*sample_texts()[:6], "short", " ".join(sample_texts()[:9])]
    whole = models[1].generate_until(instances("generate_until", [(prompt, plain) for prompt in prompts]))
    stop = whole[3][4:7]  # the text ends before it
    options = [plain, plain | {"until": [stop, "§"]}, {"until": "§", "max_gen_toks": 7, "temperature": 0.0}]
    requests = instances("generate_until", [(prompt, option) for option in options for prompt in prompts])
    found, expected = (model.generate_until(requests, disable_tqdm=True) for model in models)
    assert found == expected
    assert found[8 + 3] == whole[3][:whole[3].index(stop)] != whole[3]


@pytest.mark.parametrize("models", [False], indirect=True)
def test_a_stop_string_may_be_a_special_token(models, monkeypatch):
    """The backend decodes one request at a time: in a batch it goes on until all rows have ended."""
    ours, theirs = models
    monkeypatch.setattr(theirs, "batch_size_per_gpu", 1)
    prompts = sample_texts()[:8]
    usual = ours.parallel_model.generate(ours.encode(prompts[:1]), GenerationConfig(max_new_tokens=6))[0][5]
    heads = [model.lm_head.weight.data for model in (ours.parallel_model.model, theirs.model)]
    before, texts = [head.clone() for head in heads], {}
    for head in heads:
        head[0] = 1.1 * head[usual]  # <unk> is generated, as <|im_end|> is after fine-tuning on chats
    for until in ((), ("§", "<unk>")):
        settings = {"until": list(until), "max_gen_toks": 12, "do_sample": False}
        requests = instances("generate_until", [(prompt, settings) for prompt in prompts])
        texts[until], expected = (model.generate_until(requests, disable_tqdm=True) for model in models)
        assert texts[until] == expected
    assert texts[()] != texts["§", "<unk>"]
    for head, weight in zip(heads, before):
        head.copy_(weight)


def test_continuation_longer_than_the_context_is_rejected(models):
    with pytest.raises(UserError, match="longer than the model's context of 96: 'word word"):
        models[0].loglikelihood(instances("loglikelihood", [("a", " word" * 300)]))
    with pytest.raises(UserError, match="96 new tokens leave no room"):
        models[0].generate_until(instances("generate_until", [("a", {"until": ["."], "max_gen_toks": 96})]))


def test_sampled_texts_do_not_depend_on_other_tasks(models):
    settings = {"until": [], "max_gen_toks": 8, "do_sample": True}

    def generate(**tasks):
        found = instances("generate_until", [(prompt, settings) for prompts in tasks.values() for prompt in prompts])
        for request, task in zip(found, [task for task, prompts in tasks.items() for _ in prompts]):
            request.task_name = task
        return models[0].generate_until(found)

    assert generate(a=["zero"], b=["one", "two"])[1:] == generate(b=["one", "two"])


def test_generation_settings():
    config, stops = generation_settings({"until": "x", "max_gen_toks": 9, "do_sample": False, "temperature": 0.0,
                                          "top_p": 0.9, "top_k": 3})
    assert (config, stops) == (GenerationConfig(9), ["x"])
    assert generation_settings({"do_sample": True, "top_p": 0.5})[0] == GenerationConfig(
        256, do_sample=True, top_p=0.5, top_k=50)
    for wrong, said in (({"repetition_penalty": 2.0}, "unknown setting 'repetition_penalty' in lm-eval's generation"),
                        ({"do_sample": True, "temperature": 0.0}, "temperature is 0.0, expected at least 0.001"),
                        ({"num_beams": [2]}, r"num_beams is \[2\], expected a whole number"),
                        ({"early_stopping": 3}, "early_stopping is 3, expected true, false or never"),
                        ({"length_penalty": 1e308, "num_beams": 2}, r"length_penalty is 1e\+308")):
        with pytest.raises(UserError, match=said):
            generation_settings({"max_gen_toks": 9} | wrong)


# --------------------------------------------------------------------------------------------------------- suites

SUITE = """
[[benchmark]]
name = "questions"
category = "RC"
num_fewshot = 2
file = "questions.jsonl"
by = "kind"
doc_to_text = "{{text}}\\nAnswer:"
doc_to_choice = "choices"
doc_to_target = "label"

[[benchmark]]
name = "continuation"
category = "Rs"
metric = "acc_mutual_info"
file = "questions.jsonl"
doc_to_text = "text"
doc_to_choice = "choices"
doc_to_target = "label"

[[benchmark]]
name = "pairs"
category = "Bias"
metric = "pct_stereotype"
file = "pairs.jsonl"
pairs = true
"""


def write_lines(path, items):
    path.write_text("\n".join(map(json.dumps, items)) + "\n")


@pytest.fixture
def suite_file(tmp_path):
    """The TOML file of a suite, with the suite's local files in the same folder."""
    texts = sample_texts()
    write_lines(tmp_path / "questions.jsonl", [
        {"text": text[:60], "choices": [texts[n + 1][:n % 7 + 4], texts[n + 2][:9], "a" * (n % 5 + 1)], "label": n % 3,
         "kind": "even-ones" if n % 2 == 0 else "odd"} for n, text in enumerate(texts[:40])])
    write_lines(tmp_path / "pairs.jsonl", [{"sent_more": a[:50], "sent_less": b[:50]}
                                           for a, b in zip(texts[:20], texts[20:40])])
    (tmp_path / "suite.toml").write_text(SUITE)
    return tmp_path / "suite.toml"


def test_loaded_tasks_are_not_searched_again(model, suite_file, monkeypatch):
    """lm-eval reads all its task files, for seconds, unless it is told not to."""
    folders, build = [], TaskIndex.build
    monkeypatch.setattr(TaskIndex, "build", staticmethod(lambda paths: folders.extend(paths) or build(paths)))
    run(read_suite(str(suite_file)), model)
    assert not folders


def test_results_equal_the_backend(models, suite_file, tmp_path):
    suite = read_suite(str(suite_file))
    assert [b.name for b in suite] == ["questions", "questions_even_ones", "questions_odd", "continuation", "pairs"]
    found, answers, missing = run(suite, models[0].parallel_model)
    with quiet():
        expected = lm_eval.simple_evaluate(models[1], tasks=[local_task(b) for b in suite],
                                           task_manager=task_manager())
    assert not missing
    for name, values in expected["results"].items():
        for key, value in values.items():
            assert found["results"][name][key] == (value if isinstance(value, str) else pytest.approx(value)), key
    assert found["n-shot"] == {"questions": 2, "questions_even_ones": 2, "questions_odd": 2, "continuation": 0,
                               "pairs": 0}
    whole, even, odd = (score.items for score in benchmark_scores(suite, found)[:3])
    assert (whole, even, odd) == (38, 19, 19)  # the first two are few-shot examples
    samples = expected["samples"]["questions"]
    p = [np.exp([score for score, _ in sample["filtered_resps"]]) for sample in samples]
    p = [row / row.sum() for row in p]
    labels = [sample["doc"]["label"] for sample in samples]
    result = found["results"]["questions"]
    assert result["nll,none"] == pytest.approx(-np.mean([np.log(row[k]) for row, k in zip(p, labels)]), abs=1e-3)
    assert result["brier,none"] == pytest.approx(np.mean([((row - np.eye(3)[k]) ** 2).sum()
                                                          for row, k in zip(p, labels)]), abs=1e-3)
    assert 0 < result["ece,none"] < 1
    for item, row, (score, _) in zip(answers["questions"], p, (sample["filtered_resps"][sample["doc"]["label"]]
                                                               for sample in samples)):
        label, choices = item["doc"]["label"], item["doc"]["choices"]
        assert item["nll"] == pytest.approx(-np.log(row[label]), abs=1e-3)
        assert item["bits_per_byte"] == pytest.approx(-score / np.log(2) / len(choices[label].encode()), rel=1e-4)
    for name in ("nll", "bits_per_byte"):
        assert result[f"{name},none"] == pytest.approx(np.mean([item[name] for item in answers["questions"]]))
    assert "bits_per_byte" not in answers["pairs"][0]
    assert "ece,none" in found["results"]["continuation"]
    assert "ece,none" not in found["results"]["pairs"]
    file = ResultsFile(tmp_path, found, json.loads(json.dumps(answers, default=str)))
    for benchmark in suite[:4]:  # three choices each
        assert choices_of(file, benchmark.name, benchmark.metric).chance == pytest.approx(1 / 3)
    assert choices_of(file, "pairs", "pct_stereotype") is None


def test_a_part_does_not_count_in_the_mean_of_its_category():
    """The mean of 40% and 60% is 50%."""
    suite = [Benchmark("questions", "Rs"), Benchmark("pairs", "Rs"), Benchmark("pairs_odd", "Rs", part_of="pairs")]
    table = suite_table(suite, {"results": {name: {"acc,none": value} for name, value in (
        ("questions", 0.4), ("pairs", 0.6), ("pairs_odd", 0.9))}, "tokens": {"computed": 0},
        "n-samples": {benchmark.name: {"effective": 10} for benchmark in suite}})
    assert [line.split() for line in table.splitlines() if " mean " in line] == [["Rs", "mean", "50.0"]]


def test_chat_templates_equal_the_backend(suite_file, tokenizer_dir, tmp_path, dist):
    model = random_model(max_position_embeddings=CONTEXT)
    write_checkpoint(tmp_path, model.config, model.named_parameters(), tokenizer_dir)
    (tmp_path / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no') }}"
        "{% endif %}{{ message.role }}: {{ message.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}")
    suite = read_suite(str(suite_file))
    theirs = HFLM(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), batch_size=5,
                  tokenizer=AutoTokenizer.from_pretrained(tmp_path))
    ours = ParallelModel(dist, load_model(tmp_path), Tokenizer(tmp_path))
    found, answers, _ = run(suite, ours, chat=True)
    plain, *_ = run(suite, ours)
    with quiet():
        expected = lm_eval.simple_evaluate(theirs, tasks=[local_task(b) for b in suite], task_manager=task_manager(),
                                           apply_chat_template=True)
    assert "user: " in str(answers["questions"][0]["arguments"])
    described = [{"role": "system", "content": "Answer."}, {"role": "user", "content": "Who?"}]
    for one in (True, False):  # without the system message, which this template rejects
        assert HarnessModel(ours).apply_chat_template(described, one) == theirs.apply_chat_template(described, one)
    with pytest.raises(UserError, match="the chat template fails: no"):
        HarnessModel(ours).apply_chat_template(described[:1])
    assert found["results"]["questions"]["nll,none"] != plain["results"]["questions"]["nll,none"]
    for name, samples in expected["samples"].items():
        for own, other in zip(answers[name], samples, strict=True):
            assert [score for score, _ in own["filtered_resps"]] == \
                pytest.approx([score for score, _ in other["filtered_resps"]], abs=1e-3)


class AnsweredTask(SimpleNamespace):
    """A task of lm-eval as far as its answers need it."""
    OUTPUT_TYPE, multiple_input, config = "multiple_choice", 0, SimpleNamespace(process_results=None)

    def doc_to_text(self, doc):
        return doc["text"]

    def doc_to_choice(self, doc):
        return doc["choices"]

    def doc_to_target(self, doc):
        return doc["target"]


def test_losses_of_the_right_option_by_hand():
    """p = (1/4, 1/8) becomes (2/3, 1/3); 2 and 3 bits. "é" has two bytes."""
    def answered(**doc):
        return {"doc": {"text": "a", "choices": ["abcd", "é"]} | doc,
                "filtered_resps": [(math.log(1 / 4), False), (math.log(1 / 8), False)]}

    def losses(*items, **kind):
        tasks, answers = [AnsweredTask(task_name="a", **kind)], {"a": list(items)}
        add_option_losses(tasks, answers)
        return option_results(tasks, answers, [])

    items = [answered(target=0), answered(target=1), answered(target="é"), answered(target=-1)]
    results = losses(*items)
    assert [item.get("nll") for item in items] == [pytest.approx(math.log(3 / 2)), *[pytest.approx(math.log(3))] * 2,
                                                   None]
    assert [item.get("bits_per_byte") for item in items] == [pytest.approx(2 / 4), *[pytest.approx(3 / 2)] * 2, None]
    assert results["bits_per_byte,none"] == pytest.approx((0.5 + 1.5 + 1.5) / 3)
    assert results["nll,none"] == pytest.approx(np.mean([item["nll"] for item in items[:3]]))
    item = answered(text=1, target=" goes on")  # the options are contexts of one text, as in winogrande
    assert losses(item, multiple_input=2)["bits_per_byte,none"] == pytest.approx(3 / 8)
    item = answered(choices=["abcd", ""], target=1)
    assert "bits_per_byte,none" not in losses(item)
    assert item["nll"] == pytest.approx(math.log(3))


def test_probabilities_over_posterior_samples(checkpoint, suite_file, model, tmp_path):
    """Accuracy and calibration of the averaged probabilities; transformers scores each sample of the weights."""
    theirs = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    mean = {name: parameter.detach().clone() for name, parameter in theirs.named_parameters()}
    precision = {name: torch.full((tensor.numel(),), 400.0) for name, tensor in mean.items()}
    save_file({key: value for name, tensor in mean.items() for key, value in
               ((f"mean/{name}@0", tensor.view(-1)), (f"precision/{name}@0", precision[name]))},
              tmp_path / "posterior-00001-of-00001.safetensors")
    suite = [benchmark for benchmark in read_suite(str(suite_file)) if benchmark.name in ("continuation", "pairs")]
    keys = [("weights", 42, number) for number in range(2)]
    sampled = ParallelModel(model.dist, load_model(checkpoint), model.tokenizer)
    found, samples, _ = run(suite, sampled, posterior_samples=[(tmp_path, key) for key in keys])
    plain = found["results"]["continuation"]
    assert plain["ece,none"] == run(suite, model)[0]["results"]["continuation"]["ece,none"]
    labels, probabilities = [sample["doc"]["label"] for sample in samples["continuation"]], 0
    for key in keys:
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                noise = torch.cat([part for *_, part in standard_normal(key, name, parameter.numel(), 0,
                                                                        parameter.numel(), "cpu")])
                parameter.copy_(mean[name] + noise.view_as(parameter) / 20)
        backend = HFLM(theirs, tokenizer=AutoTokenizer.from_pretrained(checkpoint), batch_size=5)
        with quiet():
            answers = lm_eval.simple_evaluate(backend, tasks=[local_task(suite[0])],
                                              task_manager=task_manager())["samples"]["continuation"]
        p = np.exp([[score for score, _ in sample["filtered_resps"][:3]] for sample in answers])
        probabilities = probabilities + p / p.sum(1, keepdims=True) / 2
    right = [row[label] for row, label in zip(probabilities, labels)]
    assert plain["nll,sampled"] == pytest.approx(-np.mean(np.log(right)), rel=1e-3)
    assert plain["acc,sampled"] == np.mean(probabilities.argmax(1) == labels)
    assert plain["nll,sampled"] != pytest.approx(plain["nll,none"], rel=1e-2)
    assert "acc,sampled" not in found["results"]["pairs"]
    once, twice = (ParallelModel(model.dist, sampled.model, model.tokenizer) for _ in range(2))
    run(suite[1:], once)
    run(suite[1:], twice, posterior_samples=[(tmp_path, keys[0])])
    assert once.counts == twice.counts  # the pairs are not scored for nothing
    score, = [score for score in benchmark_scores(suite, found) if score.benchmark.name == "continuation"]
    assert score.sampled["nll"] == plain["nll,sampled"]


def test_common_prefixes_are_computed_once_over_all_tasks(model, suite_file):
    suite = read_suite(str(suite_file))
    model = ParallelModel(model.dist, model.model, model.tokenizer)  # with its own counts
    run(suite[:1], model)
    once = dict(model.counts)
    run(suite[:3], model)  # also its two parts as separate tasks
    assert model.counts["computed"] == 2 * once["computed"]
    assert model.counts["asked"] == 3 * once["asked"]


def test_group_and_missing_dataset(model, monkeypatch, tmp_path):
    def load_dataset(path, name=None, **_):  # replaces the Hub
        if path != "cais/mmlu":
            raise ConnectionError(f"Couldn't reach {path!r}\nand more")
        rows = [{"question": f"{name}: {n} + {n}?", "choices": ["1", "2", "3", "4"], "answer": n % 4, "subject": name}
                for n in range(8)]
        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("test", "dev")})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    suite = [Benchmark("mmlu_other", "DK", num_fewshot=1), Benchmark("piqa", "Rs"), Benchmark("boolq", "Rs")]
    results, _, missing = run(suite, model, limit=2)
    assert missing == {"piqa": "Couldn't reach 'baber/piqa'", "boolq": "Couldn't reach 'aps/super_glue'"}
    score, = benchmark_scores(suite, results)
    subjects = results["group_subtasks"]["mmlu_other"]
    assert len(subjects) == 13
    assert score.items == 26
    assert score.value == pytest.approx(np.mean([results["results"][name]["acc,none"] for name in subjects]))
    assert {results["n-shot"][name] for name in subjects} == {1}
    nll = [results["results"][name]["nll,none"] for name in subjects]
    assert score.calibration["nll"] == pytest.approx(np.mean(nll))
    assert datasets.config.HF_HUB_OFFLINE  # no more retries after the first
    write_results(tmp_path, run(suite, model, limit=1)[0], {})  # all numbers are finite for one item of each
    suite = [Benchmark("mmlu", "DK")]
    score, = benchmark_scores(suite, run(suite, model, limit=1)[0])  # a group of groups
    assert score.items == 57
    for more, said in ((Benchmark("mmlu_stem", "DK"), "mmlu_anatomy is in both mmlu and mmlu_stem: leave one out"),
                       (Benchmark("mmlu_stem", "DK", "r@1"), "mmlu_anatomy has no metric 'r@1', expected one of acc"),
                       (Benchmark("mmlu_stem", "DK", num_fewshot=9), "mmlu_anatomy cannot be run: ")):
        with pytest.raises(UserError, match=said):
            load_suite([*suite, more], 2048)


def test_results_are_removed_only_where_superseded(tmp_path, monkeypatch, model):
    def evaluate(posterior_samples=0, template=None, shots=0, dtype="fp32", **sizes):
        results = {"results": {name: {"acc,none": 0.5} for name in sizes},
                   "n-samples": {name: {"original": 9, "effective": size} for name, size in sizes.items()}}
        answers = {name: [{"doc_id": n, "acc": 0.5} for n in range(size)] for name, size in sizes.items()}
        monkeypatch.setattr(benchmarks, "run_suite", lambda *_: (results, answers))
        run = {"limit": None, "dtype": dtype, "suite": [{"name": name, "num_fewshot": shots} for name in sizes]}
        run |= {"posterior_samples": posterior_samples} if posterior_samples else {}
        run |= {"template": template} if template else {}
        evaluate_suite(SuiteRun([], run, (), [], {}, {}), model, tmp_path)
        return [{name: len(file.samples[name]) for name in file.results} for file in own_results(tmp_path)]

    assert evaluate(a=9, b=9) == [{"a": 9, "b": 9}]
    assert evaluate(a=2) == [{"a": 9, "b": 9}, {"a": 2}]
    assert evaluate(a=3) == [{"a": 9, "b": 9}, {"a": 3}]
    assert evaluate(a=9) == [{"a": 9, "b": 9}, {"a": 9}]
    assert evaluate(a=9, b=8, c=9) == [{"a": 9, "b": 9}, {"a": 9, "b": 8, "c": 9}]
    assert evaluate(0, "chat", a=9, b=9, c=9) == [{"a": 9, "b": 9}, {"a": 9, "b": 8, "c": 9}, {"a": 9, "b": 9, "c": 9}]
    own_results(tmp_path)[-1].path.unlink()
    for other in ({"shots": 5}, {"dtype": "bf16"}):
        assert len(evaluate(**other, a=9, b=9, c=9)) == 3
        own_results(tmp_path)[-1].path.unlink()
    (tmp_path / "results_mine.json").write_text('{"results": {"a": {"acc": 1.0}}}')  # written by another program
    assert evaluate(2, a=9, b=9, c=9) == [{"a": 9, "b": 9, "c": 9}]
    assert evaluate(a=9, b=9, c=9) == [{"a": 9, "b": 9, "c": 9}] * 2  # without posterior samples
    assert evaluate(2, a=9, b=9, c=9) == [{"a": 9, "b": 9, "c": 9}]
    assert {path.name[:9] for path in tmp_path.iterdir()} == {"results_m", "results_2", "samples_a", "samples_b",
                                                              "samples_c"}


class FakeTask:
    """A task with two filters, as gsm8k."""
    task_name = "sums"
    _filters = (SimpleNamespace(name="strict-match"), SimpleNamespace(name="flexible-extract"))

    def aggregation(self):
        return {"exact_match": None, "word_perplexity": None}


@pytest.mark.parametrize(("metric", "said"), [
    ("exact_match,flexible-extract", []),
    ("exact_match", ["sums has the metric exact_match with the filters strict-match, flexible-extract: give "]),
    ("word_perplexity", ["sums: word_perplexity is not a share; reports show shares in percent: choose another"]),
    ("acc", ["sums has no metric 'acc', expected one of exact_match, word_perplexity"])])
def test_metrics_of_a_task(metric, said):
    found = metric_problems(FakeTask(), metric)
    assert [problem[:len(start)] for problem, start in zip(found, said, strict=True)] == said


def test_a_group_without_means_and_a_task_without_its_package(monkeypatch):
    group = lm_eval.api.group.Group("many")
    with pytest.raises(UserError, match="the group many has no mean of 'acc' over its tasks: list its tasks"):
        check_tasks([Benchmark("many", "DK")], {"many": (group, [])}, 2048)

    def load(_):
        raise ModuleNotFoundError("No module named 'langdetect'")

    monkeypatch.setattr("evaluation.lm_eval_tasks.task_manager", lambda: SimpleNamespace(load=load))
    with pytest.raises(UserError, match="ifeval needs a Python package: No module named 'langdetect'. Install it, or"):
        load_suite([Benchmark("ifeval", "DK")], 2048)


def test_new_tokens_need_room_in_the_context():
    with pytest.raises(UserError, match="2,048 new tokens leave no room for a prompt in the model's context of 2,048"):
        check_room(GenerationConfig(2048), 2048)
    check_room(GenerationConfig(2047), 2048)


def test_errors_of_lm_eval(monkeypatch, model):
    def simple_evaluate(*_, **__):
        raise OverflowError("math range error")  # of a perplexity

    monkeypatch.setattr(lm_eval, "simple_evaluate", simple_evaluate)
    with pytest.raises(UserError, match="lm-eval cannot compute the results: OverflowError: math range error"):
        run_suite({"a": (None, [])}, model)


def test_parts_by_a_field(tmp_path):
    items = [{"year": year, "text": "a", "choices": ["b", "c"], "label": 0} for year in (1999, 2000, 2001, 2001)]
    write_lines(tmp_path / "items.jsonl", items)
    whole = Benchmark("q", "Rs", num_fewshot=1, file=str(tmp_path / "items.jsonl"), by="year", options={
        "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "label"})
    parts = with_parts(whole)
    assert [part.name for part in parts] == ["q", "q_2000", "q_2001"]  # 1999 is only in the few-shot example
    assert [len(local_task(part).test_docs()) for part in parts] == [3, 1, 2]


def test_the_suites_of_configs_are_valid(tmp_path, monkeypatch):
    assert set(known("eval")) == {"local", "paper", "sample"}
    names = [benchmark.name for benchmark in read_suite("paper")]
    assert len(names) == 22
    assert {"mmlu_stem", "race", "mutual_text", "crows_pairs_english_age"} <= set(names)
    assert open_suite("sample")[2] == ROOT / "data/eval/sample"
    with pytest.raises(UserError, match="mmlu.jsonl does not exist"):
        read_suite("local", tmp_path)


def test_values_that_make_one_name_are_told(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('{"kind": "a b"}\n{"kind": "a-b"}\n')
    with pytest.raises(UserError, match="jsonl: the values 'a b' and 'a-b' of 'kind' both make the name quiz_a_b"):
        with_parts(Benchmark("quiz", "Rs", "acc", file=str(path), by="kind"))


PROBLEMS = {
    'file = "pairs.jsonl"': ('file = "none.jsonl"', r"pairs: \S+none.jsonl does not exist"),
    'name = "pairs"': ('name = "continuation"', "continuation is listed twice"),
    'file = "pairs.jsonl"\npairs = true': ("", "lm-eval 0.4.13 has no task pairs"),
    'doc_to_text = "text"': ("doc_to_txt = 1", "unknown key 'doc_to_txt', expected .*continuation has no doc_to_text"),
    'category = "Bias"': ("", "pairs has no category"),
    SUITE: ("", r"has no \[\[benchmark\]\]"),
    'metric = "acc_mutual_info"': ('metric = "acu"', "continuation has the metric 'acu', expected acc or acc_norm or"),
    'doc_to_choice = "choices"': ('doc_to_choice = "{{"', r"questions.jsonl: questions is not a valid task"),
    'by = "kind"': ('by = "sort"', r"an item has no 'sort', by which questions is divided"),
    "num_fewshot = 2": ("num_fewshot = -1", "questions: num_fewshot is below 0"),
    "pairs = true": ("pairs = 3", "pairs is 3, expected true or false"),
    "[[benchmark]]": ("[benchmark]", "is not TOML|expected a list of"),
    'category = "Rs"': ('category = "Rs"\npart_of = "all"', "continuation is part of all, which is not listed"),
    'name = "questions"': ('folde = "x"\n[[benchmark]]\nname = "questions"', "unknown key 'folde'"),
}


@pytest.mark.parametrize("old", PROBLEMS)
def test_invalid_suite(suite_file, old):
    new, said = PROBLEMS[old]
    suite_file.write_text(suite_file.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=said):
        load_suite(read_suite(str(suite_file)), 2048)


ENTRIES = {
    "output_type": ('output_type = "generate_until"', "continuation: unknown key 'output_type', expected by, "),
    "metric_list": ("metric_list = 3", "unknown key 'metric_list'"),
    "description": ("description = 3", "continuation: description is 3, expected text"),
    "doc_to_text": ("doc_to_text = 1", "continuation: doc_to_text is 1, expected text"),
    "doc_to_choice": ("doc_to_choice = [1, 2]", "continuation is not a valid task"),
    "file": ("file = 3", "the file of a .* is not text"),
    "name": ('name = "a/../../../x"', "'a/../../../x' is not a name of a benchmark: expected at most 200 bytes"),
    "name ": ('name = ".."', "'..' is not a name of a benchmark"),
    "name  ": (f'name = "{"é" * 101}"', "is not a name of a benchmark"),
    "name   ": ('name = "a\\u001bb"', "is not a name of a benchmark"),
    "by": ('by = "choices"', r"an item has no 'choices', by which .* or it is neither text nor a number: \['"),
    "by ": ('by = "text"', "is not a name of a benchmark: expected at most 200 bytes"),
}


@pytest.mark.parametrize("key", ENTRIES)
def test_invalid_entry(suite_file, key):
    """The entry "continuation" with one line replaced."""
    line, said = ENTRIES[key]
    before, rest = SUITE.split('name = "continuation"')
    entry, after = ('name = "continuation"' + rest).split("[[benchmark]]")
    lines = [old for old in entry.splitlines() if old.partition(" ")[0] != key.strip()]
    suite_file.write_text("\n".join([before, *lines, line, "[[benchmark]]" + after]))
    write_lines(suite_file.parent / "questions.jsonl", [
        {"text": "a" * 300, "choices": ["b", "c"], "label": n % 2, "kind": "even"} for n in range(4)])
    with pytest.raises(UserError, match=said):
        load_suite(read_suite(str(suite_file)), 2048)


def test_a_suite_that_is_a_folder(tmp_path):
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(UserError, match="expected one of local, paper, sample or the path of a .toml file"):
        read_suite(str(tmp_path / "folder.toml"))


def test_values_of_parts_do_not_become_paths(suite_file):
    items = [{"text": "a", "choices": ["b", "c"], "label": 0, "kind": "../../x" if n % 2 else ""} for n in range(6)]
    write_lines(suite_file.parent / "questions.jsonl", items)
    assert [benchmark.name for benchmark in read_suite(str(suite_file))][1:3] == ["questions_", "questions__x"]


def test_invalid_local_file(suite_file):
    suite = read_suite(str(suite_file))
    shutil.copy(suite_file.parent / "pairs.jsonl", suite_file.parent / "copy.jsonl")
    write_lines(suite_file.parent / "questions.jsonl", [{"kind": "odd"}, {"kind": "odd"}])
    with pytest.raises(UserError, match=r"questions.jsonl has no items for questions after its 2 few-shot examples"):
        local_task(suite[0])
    good = {"text": "a", "choices": ["b", "c"], "kind": "odd", "label": 0}
    for bad in ({"label": 2}, {"label": -1}, {"label": "A"}, {"label": None}, {"label": 0.0}, {"choices": None},
                {"choices": ["b", 1]}, {"choices": ["b"]}, {"choices": ["b", ""]}, {"text": None}):
        write_lines(suite_file.parent / "questions.jsonl", [good, good, good, good | bad])
        with pytest.raises(UserError, match=r"questions.jsonl: questions is not a valid task: .*"):
            local_task(suite[0])
    write_lines(suite_file.parent / "questions.jsonl", [good, good, good | {"label": "c"}])
    assert len(local_task(suite[0]).test_docs()) == 1
    write_lines(suite_file.parent / "questions.jsonl", [good | {"text": None}, good, good])
    with pytest.raises(UserError, match="a field that its template prints is null or missing in an item"):
        local_task(suite[0])  # a few-shot example
    with pytest.raises(UserError, match='continuation is not a valid task: its context is None, expected text, in {'):
        local_task(suite[3])
    (suite_file.parent / "pairs.jsonl").write_text("{oops\n")
    with pytest.raises(UserError, match=r"pairs.jsonl"):
        local_task(suite[-1])
    with pytest.raises(UserError, match="unknown suite 'smple', expected one of local, paper, sample"):
        read_suite("smple")


def test_tasks_import_the_library_evaluate_and_not_the_script():
    import evaluate as script
    found = []
    for _ in range(2):
        with quiet():
            import evaluate as library
            found.append(library)
            assert importlib.import_module("evaluate.loading").load is library.load
    assert found[0] is found[1]  # loaded again, it would lack the submodules, which are loaded already
    assert library.utils
    import evaluate
    assert evaluate is script
    assert hasattr(script, "prepare_evaluation")
