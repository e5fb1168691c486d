"""Pretraining recipes as jobs, gradual growth, and the growth study."""
import json
import re
import shutil
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pretrain
from analysis.loss_curves import flops_to_loss, mean_curve
from common import configs
from common.configs import CONFIGS, read_config
from common.files import UserError
from common.settings import load
from model.config import size_config
from model.growth import OPERATORS
from pipeline import growth_report, growth_study, pretraining
from pipeline.growth_report import conclusion, read_curve, study_table, summarize_runs
from pipeline.growth_study import GrowthStudyConfig, study_jobs
from pipeline.pretraining import record_recipe
from pretrain import PretrainConfig, pretraining_jobs
from tests.conftest import error_line, losses, run_script


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A small text with the vocabulary of the size tiny, as token shards."""
    folder = tmp_path_factory.mktemp("text")
    lines = (json.dumps({"text": f"{n} is a number; {n + 1} comes after {n}, and {n * n} is its square."})
             for n in range(3000))
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    run_script("data_prep.py", "text", "--source", folder / "text.jsonl", "--vocab_size", "400", "--output_path",
               folder / "shards")
    return folder / "shards"


def flags_of(job):
    """{flag: value} of a job's command."""
    words = job.argv
    return {name.removeprefix("--"): value for name, value in zip(words, words[1:]) if name.startswith("--")}


def test_recipes_by_hand():
    def jobs(**given):
        cfg = PretrainConfig(size="tiny", data="d", out="o", **given)
        return [(job.out.name, flags_of(job)) for job in pretraining_jobs(cfg)]

    (name, llm), = jobs(model="llm", args="--seed 3")
    assert (name, llm["phase"], llm["seed"]) == ("m0", "llm", "3")
    base, grown, last = jobs(at_tokens=(9000,), args="--seed 3")
    assert (base[0], base[1]["num_hidden_layers"], base[1]["max_tokens"]) == ("base", "2", "9000")
    assert base[1]["seed"] == "42"
    assert (grown[0], grown[1]["init"], grown[1]["target_layers"]) == ("grown-8", "o/base", "8")
    assert (last[0], last[1]["init"], last[1]["phase"], last[1]["seed"]) == ("m0", "o/grown-8", "stack", "3")
    gradual = jobs(factors=(2, 2), at_tokens=(9000, 15000), model="interleave")
    assert [name for name, _ in gradual] == ["base", "grown-4", "trained-4", "grown-8", "m0"]
    assert [flags.get("operator") for _, flags in gradual] == [None, "interleave", None, "interleave", None]
    assert (gradual[0][1]["num_hidden_layers"], gradual[2][1]["max_tokens"]) == ("2", "6000")
    assert [flags.get("init") for _, flags in gradual] == [None, "o/base", "o/grown-4", "o/trained-4", "o/grown-8"]


@pytest.mark.parametrize(("flags", "said"), [
    (["--model", "base", "--at_tokens", "5"], "at_tokens would change nothing, since model is base"),
    (["--model", "llm", "--factors", "2"], "factors would change nothing, since model is llm"),
    (["--factors", "2,2"], "2 factors and 1 at_tokens, expected one of each per growth"),
    (["--factors", "2,2", "--at_tokens", "9,9"], "at_tokens is 9, 9, expected increasing numbers"),
    (["--factors", "2,2", "--at_tokens", "0,9"], "at_tokens is 0, expected a number from 1 to 1000000000"),
    (["--factors", "1"], "factors is 1, expected at least 2"),
    (["--factors", "3"], "8 layers are not a multiple of the growth factors 3"),
    (["--factors", "2,2", "--at_tokens", "9000,9900000"], "the jobs before m0 cost"),
    (["--size", "7b", "--factors", "2,2", "--at_tokens", "9,99", "--model", "middle"], "cannot make 32"),
    (["--model", "solar"], "a base of 2 layers cannot be grown by the factor 4: solar joins two copies of at most 2 "),
    (["--model", "partial"], "unknown model 'partial', expected one of llm, base, stack, interleave, middle, solar"),
    (["--args", "'x"], "is not a command line: No closing quotation"),
    (["--args", "--learning_rat 1"], "args: unknown flag '--learning_rat'"),
    (["--args", "--learning_rate nan"], "args: learning_rate is nan, expected a finite number"),
    (["--args", "--max_tokens 9"], "args: max_tokens and max_flops each set the length of training"),
    (["--args", "--phase llm --out=x"], "args: out, phase cannot be given here"),
    (["--args", "--seed 7"], "args: seed cannot be given here"),
    (["--factors", "9" * 30], "expected a whole number below 2**63"),
    (["--at_tokens", "1" + "0" * 400], "expected a whole number below 2**63"),
    (["--at_tokens", "9223372036854775807"], "expected a number from 1 to 1000000000000000000"),
    ([], "d does not exist: make token shards"),
    (["--size", "410m", "--at_tokens", "9"], "the size 410m has no table [growth]")])
def test_invalid_recipes(refusal, tmp_path, flags, said):
    words = ["--size", "tiny", "--data", "d", "--out", tmp_path / "o", *flags]
    assert said in refusal((PretrainConfig, pretrain.main), *words)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("forked_jobs")
def test_gradual_growth(text, tmp_path, refusal, capsys):
    """Grows twice. Each run continues in the text where the one before it stopped, and finished runs are kept."""
    words = ["--size", "tiny", "--data", text, "--out", tmp_path, "--factors", "2,2",
             "--at_tokens", "4096,8192", "--args", "--max_flops none --max_tokens 2048"]
    cfg = load(PretrainConfig, map(str, words))
    pretrain.main(cfg)
    depths = {name: json.loads((tmp_path / name / "config.json").read_text())["num_hidden_layers"]
              for name in ("base", "grown-4", "trained-4", "grown-8", "m0")}
    assert depths == {"base": 2, "grown-4": 4, "trained-4": 4, "grown-8": 8, "m0": 8}
    results = [json.loads((tmp_path / name / "run.json").read_text())["result"] for name in ("base", "trained-4", "m0")]
    assert [(run["first_sample"], run["last_sample"]) for run in results] == [(0, 16), (16, 32), (32, 40)]
    sizes = [4096 * 96 + 96 + layers * 98496 for layers in (2, 4, 8)]  # parameters, as in tests/test_train.py
    assert results[-1]["flops"] == 6 * (4096 * sizes[0] + 4096 * sizes[1] + 2048 * sizes[2])
    said = capsys.readouterr().out
    assert "[5/5]" in said
    assert "left in all" in said
    (tmp_path / "base").rename(tmp_path / "gone")  # the runs after it exist
    pretrain.main(cfg)
    said = capsys.readouterr().out
    assert "m0 is finished already, nothing to do" in said
    assert "[1/1]" in said
    line = refusal((PretrainConfig, pretrain.main), *words[:-2], "--model", "interleave")
    assert "holds stages made with other settings: " in line
    assert "is 'stack' there and 'interleave' here" in line
    line = refusal((PretrainConfig, pretrain.main), *words[:4], "--out", tmp_path / "x", "--launcher",
                   "no-such-launcher")
    assert "no-such-launcher cannot be started" in line


@pytest.mark.usefixtures("forked_jobs")
def test_a_model_is_trained_on_until_it_is_level(text, tmp_path):
    given = {"size": "tiny", "model": "llm", "data": str(text)}
    pretrain.main(PretrainConfig(**given, out=str(tmp_path / "llm"), args="--max_flops none --max_tokens 4096 "
                                 "--max_eval_samples 4 --learning_rate 4e-3"))
    before = json.loads((tmp_path / "llm/m0/run.json").read_text())["result"]
    goal = before["eval_loss_after"] - 0.01
    (tmp_path / "better").mkdir()
    (tmp_path / "better/run.json").write_text(json.dumps({"result": {"eval_loss_after": goal}}))
    pretrain.main(PretrainConfig(**given, out=str(tmp_path / "llm-level"), init=str(tmp_path / "llm/m0"),
                                 level_with=str(tmp_path / "better"), args="--max_eval_samples 4"))
    run = json.loads((tmp_path / "llm-level/m0/run.json").read_text())
    entries = [json.loads(line) for line in (tmp_path / "llm-level/m0/metrics.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert losses[0] == pytest.approx(before["eval_loss_after"])
    assert [loss <= goal for loss in losses] == [False] * (len(losses) - 1) + [True]
    assert run["result"]["first_sample"] == before["last_sample"]
    assert run["settings"]["learning_rate"] == pytest.approx(4e-4)  # the rate with which m0 ended
    assert max(entry["lr"] for entry in entries if "lr" in entry) <= 4.0001e-4
    assert run["settings"]["max_flops"] == 2 * before["flops"]


def test_a_model_whose_rate_ended_at_zero_is_not_trained_on(text, tmp_path, refusal):
    m0 = tmp_path / "m0"
    m0.mkdir()
    (m0 / "run.json").write_text(json.dumps({
        "settings": {"learning_rate": 1e-3, "lr_scheduler_type": "cosine", "min_lr_ratio": 0.0, "seed": 7},
        "lineage": {"flops": 1e9}, "result": {"eval_loss_after": 4.0}}))
    words = ["--size", "tiny", "--model", "llm", "--data", text, "--out", tmp_path / "level", "--init", m0,
             "--level_with", m0]
    line = refusal((PretrainConfig, pretrain.main), *words)
    assert f"{m0} was trained with the seed 7, whose order of samples is continued: give --seed 7" in line
    line = refusal((PretrainConfig, pretrain.main), *words, "--seed", "7")
    assert f"{m0} was trained with min_lr_ratio 0, so that its learning rate ended at 0" in line


def test_mean_curves_by_hand():
    """Growth in stages has two losses at the FLOPs at which it grows."""
    grown = [(5, 5.0), (10, 4.0), (10, 4.6), (15, 3.8)]
    assert mean_curve([grown]) == grown
    assert mean_curve([grown, [(5, 5.2), (10, 4.2), (10, 4.4), (15, 3.6)]]) == pytest.approx(
        np.array([(5, 5.1), (10, 4.1), (10, 4.5), (15, 3.7)]))
    assert mean_curve([[(0, 6.0), (10, 4.0)], [(0, 5.0), (20, 3.0)]]) == [(0, 5.5), (10, 4.0)]


def test_flops_to_reach_a_loss_by_hand():
    points = [(10, 5.0), (20, 4.0), (30, 4.5), (40, 3.5)]
    assert flops_to_loss(points, 4.25) == 17.5
    assert flops_to_loss(points, 4.0) == 20
    assert flops_to_loss(points, 3.75) == 37.5
    assert flops_to_loss(points, 3.0) is None
    assert flops_to_loss(points, 6.0) == 10


def test_the_table_by_hand():
    one = {"base": [(0, 9.0), (2e14, 5.0)], "stack": [(2e14, 5.5), (3e14, 4.5), (4e14, 3.5)],
           "interleave": [(2e14, 5.2), (4e14, 4.4)], "scratch": [(0, 9.0), (4e14, 4.0)],
           "base-trained-on": [(0, 9.0), (2e14, 4.0), (4e14, 3.2)]}
    two = {"stack": [(2e14, 5.7), (4e14, 3.7)], "scratch": [(0, 9.0), (4e14, 4.7)],
           "base-trained-on": [(0, 9.0), (1e14, 4.7), (4e14, 4.1)]}
    rows = {row["name"]: row for row in summarize_runs({1: one, 2: two})}
    assert rows["stack"]["to_scratch"] == [3.5e14, 3e14]
    assert rows["stack"]["speed_up"] == pytest.approx([4 / 3.5 - 1, 4 / 3 - 1])
    assert rows["stack"]["after_growth"] == [5.5, 5.7]
    assert rows["interleave"]["speed_up"] == [None]
    assert rows["scratch"]["final"] == [4.0, 4.7]
    lines = study_table(list(rows.values())).splitlines()
    assert "| base, before it is grown | 1 | – | 5.000 | – | – | – |" in lines
    assert "| stack | 2 | 5.600 ± 0.141 | 3.600 ± 0.141 | -0.750 ± 0.354 | 0.3250 ± 0.0354 | +24% ± 13% |" in lines
    assert "| interleave | 1 | 5.200 | 4.400 | +0.400 | not reached | not reached |" in lines
    assert "| scratch | 2 | – | 4.350 ± 0.495 | – | 0.4000 ± 0.0000 | – |" in lines
    assert ("| base, trained further | 2 | – | 3.650 ± 0.636 | -0.700 ± 0.141 | 0.1500 ± 0.0707 | +200% ± 141% |"
            in lines)


@pytest.mark.parametrize(("stack", "trained_on", "said"), [  # the final losses of scratch are 4.0, 4.7 and 4.3
    ((3.5, 4.1, 3.7), (4.5, 5.3, 4.8), """\
- scratch − base, trained further: -0.533 [-0.677, -0.390] nats per token, lower for 3 of 3 seeds.
- stack − scratch: -0.567 [-0.710, -0.423] nats per token, lower for 3 of 3 seeds.
- stack − base, trained further: -1.100 [-1.348, -0.852] nats per token, lower for 3 of 3 seeds.
- Depth pays at this budget.
- Growing pays at this budget.
"""),
    ((3.9, 4.6, 4.2), (3.5, 4.1, 3.8), """\
- scratch − base, trained further: +0.533 [+0.390, +0.677] nats per token, lower for 0 of 3 seeds.
- stack − scratch: -0.100 [-0.100, -0.100] nats per token, lower for 3 of 3 seeds.
- stack − base, trained further: +0.433 [+0.290, +0.577] nats per token, lower for 0 of 3 seeds.
- Depth does not pay at this budget.
- Growing does not pay at this budget.
"""),
    ((3.5, 4.1, 3.7), (4.4, 4.9, 4.4), """\
- scratch − base, trained further: -0.233 [-0.613, +0.146] nats per token, lower for 3 of 3 seeds.
- stack − scratch: -0.567 [-0.710, -0.423] nats per token, lower for 3 of 3 seeds.
- stack − base, trained further: -0.800 [-1.048, -0.552] nats per token, lower for 3 of 3 seeds.
- There is no verdict on whether depth pays at this budget: a 95% interval includes 0.
- Growing pays at this budget.
"""),
    ((3.5,), (4.4,), """\
- scratch − base, trained further: -0.400 nats per token, lower for 1 of 1 seeds.
- stack − scratch: -0.500 nats per token, lower for 1 of 1 seeds.
- stack − base, trained further: -0.900 nats per token, lower for 1 of 1 seeds.
- No verdict: it takes at least 3 seeds, found 1. Give more --seeds.
""")])
def test_the_conclusion_by_hand(stack, trained_on, said):
    runs = {seed: {"stack": [(4e14, grown)], "scratch": [(4e14, scratch)], "base-trained-on": [(4e14, base)]}
            for seed, (grown, scratch, base) in enumerate(zip(stack, (4.0, 4.7, 4.3), trained_on))}
    assert conclusion(summarize_runs(runs)) == said


def test_a_verdict_on_growing_takes_seeds_of_stack():
    """Only the first seed trains stack if --repeated names another operator."""
    runs = {seed: {"scratch": [(1.0, 4.0)], "base-trained-on": [(1.0, 5.0)]} for seed in (1, 2, 3)}
    runs[1] = {"stack": [(1.0, 3.0)]} | runs[1]
    assert conclusion(summarize_runs(runs)).splitlines()[1:] == [
        "- stack − scratch: -1.000 nats per token, lower for 1 of 1 seeds.",
        "- stack − base, trained further: -2.000 nats per token, lower for 1 of 1 seeds.",
        "- Depth pays at this budget.",
        "- No verdict on growing: it takes at least 3 seeds of stack, found 1. Name stack in --repeated."]


def test_a_conclusion_without_stack():
    runs = {seed: {"scratch": [(1.0, 4.0)], "base-trained-on": [(1.0, 5.0)]} for seed in (1, 2, 3)}
    assert conclusion(summarize_runs(runs)) == (
        "- scratch − base, trained further: -1.000 [-1.000, -1.000] nats per token, lower for 3 of 3 seeds.\n"
        "- Depth pays at this budget.\n")


def test_each_seed_has_the_controls():
    jobs = study_jobs(GrowthStudyConfig(size="tiny", data="d", out="o", operators=("stack", "interleave"),
                                        base_tokens=8192, max_flops=1e11, seeds=(1, 2)))
    assert [str(job.out) for job in jobs] == [f"o/seed-{seed}/{name}" for seed, names in (
        (1, ["base", "grown-stack", "stack", "grown-interleave", "interleave", "scratch", "base-trained-on"]),
        (2, ["base", "grown-stack", "stack", "scratch", "base-trained-on"])) for name in names]
    for base, trained_on in ((jobs[0], jobs[6]), (jobs[7], jobs[11])):
        expected = flags_of(base) | {"max_tokens": "none", "max_flops": "100000000000.0", "out": str(trained_on.out)}
        assert flags_of(trained_on) == expected
        assert trained_on.flops == 1e11


def test_growth_in_stages_by_hand():
    """Four stages of PROP-1: the shares of the steps are 1, 2, 3 and 4 tenths, and the FLOPs are those of scratch."""
    cfg = GrowthStudyConfig(size="tiny", data="d", out="o", operators=("stack",), base_tokens=8192, max_flops=1e12,
                            staged=("midas", "lidas"), moments=("reset", "copied"), repeated=("lidas-copied",),
                            seeds=(1, 2))
    jobs = {str(job.out.relative_to("o")): job for job in study_jobs(cfg)}
    names = [name for name in jobs if name.startswith("seed-1/lidas-copied/")]
    assert [name.rpartition("/")[2] for name in names] == [
        "stage-1", "grown-4", "stage-2", "grown-6", "stage-3", "grown-8", "stage-4"]
    trained = [jobs[name] for name in names if "stage" in name]
    flags = [flags_of(job) for job in trained]
    steps = [int(found["max_steps"]) for found in flags]
    total = sum(steps)
    assert [round(count / total, 2) for count in steps] == [0.1, 0.2, 0.3, 0.4]
    assert [int(found["schedule_start"]) for found in flags] == [0, steps[0], sum(steps[:2]), sum(steps[:3])]
    assert {found["schedule_steps"] for found in flags} == {str(total)}
    assert sum(job.flops for job in trained) == pytest.approx(1e12, rel=0.02)
    assert "--carry_moments" in trained[0].argv
    grown = flags_of(jobs["seed-1/lidas-copied/grown-6"])
    assert (grown["init"], grown["operator"], grown["target_layers"], grown["moments"]) == (
        "o/seed-1/lidas-copied/stage-2", "lidas", "6", "copied")
    reset = jobs["seed-1/midas-reset/stage-2"]
    assert "--carry_moments" not in reset.argv
    assert flags_of(reset)["init"] == "o/seed-1/midas-reset/grown-4"
    assert {name.split("/")[1] for name in jobs if name.startswith("seed-2/")} == {
        "base", "lidas-copied", "scratch", "base-trained-on"}
    with pytest.raises(UserError, match="3 stages of one block each do not reach 8 layers: choose a divisor of 8"):
        study_jobs(replace(cfg, stages=3))
    assert replace(cfg, repeated=("lidas-zero",)).problems() == [
        "repeated names lidas-zero, expected some of stack, midas-reset, midas-copied, lidas-reset, lidas-copied"]


def test_growth_in_stages_is_added_to_a_study(text, tmp_path):
    """Whose stages and their shares are its own."""
    plain = GrowthStudyConfig(size="tiny", data=str(text), out=str(tmp_path), operators=("stack",), base_tokens=8192,
                              max_flops=1e12)

    def record(cfg):
        jobs = study_jobs(cfg)
        growth_study.record_recipes(cfg, jobs)
        for job in jobs:
            job.out.mkdir(parents=True, exist_ok=True)

    growth_study.record_recipes(cfg := replace(plain, staged=("midas",)), study_jobs(cfg))
    growth_study.record_recipes(cfg := replace(cfg, max_flops=3e12), study_jobs(cfg))  # no run is finished
    record(plain)
    record(replace(plain, stages=2))
    record(replace(plain, staged=("midas",)))
    record(replace(plain, staged=("midas", "lidas")))
    with pytest.raises(UserError, match="midas-reset holds stages made with other settings: stages is 4 there and 2"):
        record(replace(plain, staged=("midas",), stages=2))
    with pytest.raises(UserError, match="holds stages made with other settings: max_flops is "):
        record(replace(plain, max_flops=2e12, seeds=(43,)))  # the runs of all seeds are in one table
    with pytest.raises(UserError, match="holds stages made with other settings: max_flops is "):
        record(replace(plain, max_flops=2e12))


def test_stages_of_a_size_without_a_batch(tmp_path, monkeypatch):
    """The steps are those of train.py's defaults: 32 samples of 1,024 tokens."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    text = (CONFIGS / "size/tiny.toml").read_text()
    (tmp_path / "configs/size/own.toml").write_text(re.sub("(?m)^(seq_length|global_batch_size) = .*$", "", text))
    monkeypatch.setattr(configs, "CONFIGS", tmp_path / "configs")
    cfg = GrowthStudyConfig(size="own", data="d", out="o", factor=2, base_tokens=8192, max_flops=2e13,
                            operators=("stack",), staged=("midas",), stages=2)
    of_stages = [job for job in study_jobs(cfg) if job.out.name.startswith("stage-")]
    for job, depth in zip(of_stages, (4, 8)):
        steps = int(job.argv[job.argv.index("--max_steps") + 1])
        assert job.flops == pytest.approx(steps * size_config("own", depth).flops(32 * 1024))


@pytest.mark.parametrize(("model", "unused", "used"), [
    ("llm", ["base", "stack"], ["llm"]), ("stack", ["llm"], ["base", "stack"]), ("base", ["stack"], ["base", "llm"])])
def test_a_recipe_has_what_its_jobs_use(text, tmp_path, monkeypatch, model, unused, used):
    """Tables that the jobs do not use may change, the others may not. Older files have all tables."""
    words = ["--size", "tiny", "--model", model, "--data", str(text), "--out", str(tmp_path)]
    tables, record = read_config("size", "tiny"), tmp_path / "recipe.json"
    read = mock.Mock(return_value=tables)
    monkeypatch.setattr(pretraining, "read_config", read)
    monkeypatch.setattr(pretrain, "run_jobs", lambda *_: None)
    pretrain.main(load(PretrainConfig, words))
    assert not set(unused) & json.loads(record.read_text()).keys()
    record.write_text(json.dumps(json.loads(record.read_text()) | dict.fromkeys(unused, {})))
    (tmp_path / "m0").mkdir()
    pretrain.main(load(PretrainConfig, words))
    for name in used:
        read.return_value = tables | {name: tables[name] | {"zero": 2}}
        with pytest.raises(UserError, match=f"made with other settings: {name} is "):
            pretrain.main(load(PretrainConfig, words))


def test_operators_that_give_the_same_model():
    cfg = GrowthStudyConfig(size="tiny", data="d", out="o", factor=2, base_tokens=8192, max_flops=1e12)
    study_jobs(replace(cfg, operators=("interleave", "expand")))  # the copies of expand add nothing
    with pytest.raises(UserError, match="solar repeats 4 layers as stack does: remove it from operators"):
        study_jobs(replace(cfg, operators=("stack", "solar")))


def test_every_model_of_the_figure_has_its_style():
    names = [*growth_report.DEPTH_OPERATORS, "scratch", "base", "base-trained-on",
             *(f"{operator}-{policy}" for operator in ("midas", "lidas") for policy in ("copied", "zero"))]
    styles = [tuple(growth_report.style_of(name).values()) for name in names]
    assert len(set(styles)) == len(styles)


def test_the_figure_marks_where_scratch_is_reached(monkeypatch, tmp_path):
    figures = []
    monkeypatch.setattr(growth_report, "save_figure", lambda figure, path: figures.append(figure))
    runs = {1: {"base": [(1e12, 6.0), (2e12, 5.0)], "stack": [(2e12, 5.5), (6e12, 3.5)],
                "scratch": [(1e12, 7.0), (8e12, 4.0)], "base-trained-on": [(1e12, 6.0), (8e12, 4.5)]}}
    growth_report.plot_study(tmp_path / "study", runs, "title")
    marks = [line.get_xydata().tolist() for line in figures[0].axes[0].lines if line.get_marker() == "D"]
    assert marks == [[[pytest.approx(5e12), 4.0]]]  # stack alone reaches it
    growth_report.plot_study(tmp_path / "study", runs | {2: runs[1]}, "title")
    of_base = [line.get_linestyle() for line in figures[1].axes[0].lines if line.get_ydata()[-1] == 5.0]
    assert of_base == ["--"] * 3  # two thin lines and their mean


def test_a_stage_without_a_step():
    cfg = GrowthStudyConfig(size="tiny", data="d", out="o", operators=("stack",), base_tokens=8192, max_flops=1e12,
                            staged=("midas",), alpha=10.0)
    with pytest.raises(UserError, match="stage 1 of midas-reset would have no step: raise max_flops, or lower alpha"):
        study_jobs(cfg)


def test_staged_operators():
    assert [OPERATORS["midas"](depth, depth + 2) for depth in (2, 4, 6)] == [
        [0, 1, 0, 1], [0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 2, 3, 4, 5]]
    assert [OPERATORS["lidas"](depth, depth + 2) for depth in (2, 4, 6)] == [
        [0, 0, 1, 1], [0, 1, 1, 2, 2, 3], [0, 1, 2, 2, 3, 3, 4, 5]]
    with pytest.raises(UserError, match="midas adds one block, whose size must divide the 6 layers of .* make 10"):
        OPERATORS["midas"](6, 10)


def test_moments_are_carried_over_growth(text, tmp_path):
    """A run that continues with the moments equals one that was not cut; growth copies the moments of a layer, or gives
    new layers none."""
    def run(out, *flags):
        run_script("train.py", "--config", "configs/train/pretrain.toml", "--size", "tiny", "--phase", "llm", "--data",
                   text, "--out", tmp_path / out, "--dtype", "fp32", "--max_flops", "none", "--max_eval_samples", "4",
                   "--schedule_steps", "6", "--warmup_steps", "1", *flags)
        return losses(tmp_path / out)

    whole = run("whole", "--num_hidden_layers", "2", "--max_steps", "6")
    first = run("first", "--num_hidden_layers", "2", "--max_steps", "3", "--carry_moments")
    second = run("second", "--init", tmp_path / "first", "--max_steps", "3", "--carry_moments", "--schedule_start", "3",
                 "--zero", "1")
    assert [first[step, "loss"] for step in (1, 2, 3)] + [second[step, "loss"] for step in (1, 2, 3)] == pytest.approx(
        [whole[step, "loss"] for step in range(1, 7)], rel=1e-5)
    run("epochs", "--num_hidden_layers", "2", "--max_steps", "9", "--max_train_samples", "24",
        "--schedule_steps", "9", "--carry_moments")  # over the end of an epoch
    epoch, = (tmp_path / "epochs").glob("checkpoint-*")  # has no moments next to it
    assert "updates" not in json.loads((epoch / "run.json").read_text())["lineage"]
    reset = run("reset", "--init", tmp_path / "first", "--max_steps", "3", "--schedule_start", "3")
    assert reset[3, "loss"] != pytest.approx(whole[6, "loss"], rel=1e-5)
    moments = {}
    for policy in ("copied", "zero"):
        run_script("stack.py", "grow", "--init", tmp_path / "first", "--out", tmp_path / policy, "--operator", "lidas",
                   "--target_layers", "4", "--moments", policy)
        moments[policy] = load_file(tmp_path / policy / "moments-00001-of-00001.safetensors")
        run(f"after-{policy}", "--init", tmp_path / policy, "--max_steps", "1", "--carry_moments", "--schedule_start",
            "3")
        assert json.loads((tmp_path / f"after-{policy}/run.json").read_text())["lineage"]["updates"] == 4
    before = load_file(tmp_path / "first/moments-00001-of-00001.safetensors")
    for layer, source in enumerate([0, 0, 1, 1]):
        for kind in ("exp_avg", "exp_avg_sq"):
            name = f"{kind}/model.layers.{{}}.mlp.up_proj.weight@0".format
            assert torch.equal(moments["copied"][name(layer)], before[name(source)])
            assert torch.equal(moments["zero"][name(layer)], before[name(source)] * (layer % 2 == 0))
    run_script("stack.py", "grow", "--init", tmp_path / "first", "--out", tmp_path / "grown", "--factor", "2")
    assert "updates" not in json.loads((tmp_path / "grown/growth.json").read_text())["lineage"]
    line = error_line(run_script("stack.py", "grow", "--init", tmp_path / "reset", "--out", tmp_path / "x", "--factor",
                                 "2", "--moments", "copied", check=False))
    assert "has no optimizer moments: train it with --carry_moments, or leave out --moments" in line


def test_a_scratch_that_learns_nothing_gives_no_speed_up():
    rows = summarize_runs({1: {"stack": [(0.0, 5.0), (1e14, 4.0)], "scratch": [(0.0, 5.0), (2e14, 6.0)]}})
    assert [row["speed_up"] for row in rows] == [[None], [None]]
    assert [row["to_scratch"] for row in rows] == [[0.0], [0.0]]


@pytest.mark.usefixtures("forked_jobs")
def test_a_study(text, tmp_path, refusal, capsys):
    words = ["--size", "tiny", "--data", text, "--out", tmp_path / "study", "--operators", "stack", "--base_tokens",
             "8192", "--max_flops", "1e11", "--eval_steps", "2", "--max_eval_samples", "8", "--warmup_steps", "1"]
    cfg = load(GrowthStudyConfig, map(str, words))
    growth_study.main(cfg)
    said = capsys.readouterr().out
    study = tmp_path / "study"
    logs = {name: [json.loads(line) for line in (study / "seed-42" / name / "metrics.jsonl").read_text().splitlines()]
            for name in ("base", "stack", "scratch", "base-trained-on")}
    assert logs["stack"][0]["flops"] == logs["base"][-1]["flops"] == 6 * 8192 * (4096 * 96 + 96 + 2 * 98496)
    shallow, deep = (4096 * 96 + 96 + layers * 98496 for layers in (2, 8))
    for name, step in (("stack", 2048 * deep), ("scratch", 2048 * deep), ("base-trained-on", 4096 * shallow)):
        assert 1e11 - 6 * step < logs[name][-1]["flops"] <= 1e11  # equal cost, to a step
    trained_on = json.loads((study / "seed-42/base-trained-on/run.json").read_text())
    assert trained_on["settings"]["num_hidden_layers"] == 2
    assert trained_on["parent_digest"] is None  # with a schedule of its own, and the samples of the base
    assert logs["base-trained-on"][0]["eval_loss"] == logs["base"][0]["eval_loss"]
    assert logs["base-trained-on"][1]["loss"] == logs["base"][1]["loss"]
    final = {name: log[-1]["eval_loss"] for name, log in logs.items()}
    assert f"| scratch | 1 | – | {final['scratch']:.3f} | – |" in said
    trained_on = final["base-trained-on"]
    assert (f"| base, trained further | 1 | – | {trained_on:.3f} | {trained_on - final['scratch']:+.3f} |"
            in said)
    assert (f"\n- scratch − base, trained further: {final['scratch'] - trained_on:+.3f} nats per token, lower for "
            f"{int(final['scratch'] < trained_on)} of 1 seeds.") in said
    assert f"| stack | 1 | {logs['stack'][0]['eval_loss']:.3f} | {final['stack']:.3f} |" in said
    assert (study / "growth-study.md").read_text() in said
    assert (study / "growth-study.png").read_bytes()[:4] == b"\x89PNG"
    for label in ("stack: ", "scratch: ", "base, trained further: ", "training compute, base included (FLOPs, 6ND)"):
        assert f"<!-- {label}" in (study / "growth-study.svg").read_text()
    # a second call trains nothing; an interrupted study continues where it stopped; another study is refused
    growth_study.main(cfg)
    assert "[1/" not in capsys.readouterr().out
    (study / "seed-42/scratch").rename(tmp_path / "scratch")
    growth_study.main(replace(cfg, dry_run=True))
    assert re.search(r"\[1/1\] \S+/seed-42/scratch: 0.1 of the 0.1 TFLOP", capsys.readouterr().out)
    line = refusal((GrowthStudyConfig, growth_study.main), *words, "--max_flops", "2e11")
    assert "holds stages made with other settings: max_flops is 100000000000.0 there and 200000000000.0 here" in line


@pytest.mark.parametrize("content", ["[1]", "5", '"text"', '{"size": ', "\0", "[" * 100_000])
def test_a_damaged_recipe_is_named(tmp_path, content):
    (tmp_path / "recipe.json").write_text(content)
    with pytest.raises(UserError) as error:
        record_recipe(tmp_path / "recipe.json", [tmp_path], size="tiny")
    assert str(error.value).startswith(f"{tmp_path}/recipe.json")
    assert "remove it: the finished stages then count as made with these settings" in str(error.value)
    assert (tmp_path / "recipe.json").read_text() == content


@pytest.mark.parametrize("line", ['{"step": 1, "loss": 2.0}', '{"step": 1, "eval_loss": 2.0}',
                                  '{"step": 1, "eval_loss": null, "flops": 1}', '{"step": 1, "eval_loss": 2.0, "fl'])
def test_a_damaged_log_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read_curve(tmp_path / "metrics.jsonl")
    assert str(error.value).startswith(f"{tmp_path}/metrics.jsonl")


@pytest.mark.parametrize(("flags", "said"), [
    (["--max_flops", "1e308"], "max_flops is 1e+308, expected a number from 1 to 1e+30"),
    (["--base_tokens", "9223372036854775807"], "expected a number from 1 to 1000000000000000000"),
    (["--factor", "9223372036854775806"], "8 layers are not a multiple of the growth factors"),
    (["--operators", "stack,double"], "unknown operators 'double', expected one of stack, interleave, middle, solar"),
    (["--max_flops", "1e9"], "the base alone costs"),
    (["--factor", "3"], "8 layers are not a multiple of the growth factors 3"),
    (["--size", "7b"], "the size 7b has no table [study]"),
    (["--operators", "stack,stack"], "operators is stack, stack, expected each once"),
    (["--operators", "stack,middle"], "middle repeats 2 layers as stack does"),
    (["--seeds", "1,1"], "seeds is 1, 1, expected each once"),
    (["--eval_steps", "0"], "eval_steps is 0, expected at least 1"),
    (["--operators", ""], "unknown operators ''"), (["--seeds", "-1"], "seeds is -1, expected at least 0"),
    ([], "d does not exist: make token shards")])
def test_invalid_studies(refusal, tmp_path, flags, said):
    words = ["--size", "tiny", "--data", "d", "--out", tmp_path / "o", *flags]
    assert said in refusal((GrowthStudyConfig, growth_study.main), *words)
    assert not list(tmp_path.iterdir())
