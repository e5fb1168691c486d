"""Settings: defaults, files, flags; and all problems at once."""
import re
from dataclasses import dataclass, fields
from typing import Literal

import pytest

from common.files import UserError
from common.settings import CONFIGS, known, load, read_config, read_toml, setting
from data_prep import HubDataConfig, TaskDataConfig, TextDataConfig
from pipeline.growth_study import GrowthStudyConfig
from pretrain import PretrainConfig
from stack import GrowConfig, GrowthPlanConfig
from tests.conftest import ROOT, error_line, run_script
from training.train_config import TrainConfig


@dataclass(frozen=True)
class Example:
    steps: int = setting(3, "steps")
    rate: float = setting(0.5, "rate")
    kind: Literal["a", "b"] = setting("a", "kind")
    flag: bool = setting(False, "flag")
    name: str | None = setting(None, "name")
    limit: int | None = setting(7, "limit")
    steps_at: tuple[int, ...] | None = setting(None, "a list")
    names: tuple[str, ...] = setting(("x",), "a list of words")


def test_flags_win_over_files_and_later_files_over_earlier(tmp_path):
    (tmp_path / "1.toml").write_text("steps = 10\nrate = 2\nkind = 'b'\n")
    (tmp_path / "2.toml").write_text("steps = 20\n")
    files = ["--config", str(tmp_path / "1.toml"), "--config", str(tmp_path / "2.toml")]
    assert load(Example, [], "") == Example()
    assert load(Example, files, "") == Example(steps=20, rate=2.0, kind="b")
    flags = [*files, "--steps", "30", "--flag", "--name=x", "--limit", "none"]
    assert load(Example, flags, "") == Example(30, 2.0, "b", True, "x", None)
    assert load(Example, ["--flag", "false"], "") == Example()


def test_lists(tmp_path):
    (tmp_path / "1.toml").write_text("steps_at = [1, 2_000]\nnames = ['a', 'b']\n")
    assert load(Example, ["--config", str(tmp_path / "1.toml")], "") == Example(steps_at=(1, 2000), names=("a", "b"))
    assert load(Example, ["--steps_at", "3, 4", "--names", "c"], "") == Example(steps_at=(3, 4), names=("c",))
    assert load(Example, ["--steps_at", "none"], "") == Example()
    for value in ("3,,4", "3;4", "[3]", ""):
        with pytest.raises(UserError, match="steps_at is .*, expected whole numbers separated by commas"):
            load(Example, ["--steps_at", value], "")
    for value in ("3", "[1.5]", "[[1]]"):
        (tmp_path / "1.toml").write_text(f"steps_at = {value}\n")
        with pytest.raises(UserError, match="steps_at is .*, expected whole numbers separated by commas"):
            load(Example, ["--config", str(tmp_path / "1.toml")], "")


def test_all_problems_in_one_message(tmp_path):
    (tmp_path / "1.toml").write_text("stps = 10\nrate = 'fast'\nflag = 1\n")
    with pytest.raises(UserError) as error:
        load(Example, ["--config", str(tmp_path / "1.toml"), "--steps", "1.5", "--kind", "c", "--wrong", "1"], "")
    for said in ("unknown setting 'stps'", "did you mean 'steps'?", "rate is 'fast', expected a number",
                 "flag is 1, expected true or false", "steps is '1.5', expected a whole number",
                 "kind is 'c', expected one of a, b", "unknown flag '--wrong'"):
        assert said in str(error.value), said


def test_a_file_that_is_not_toml(tmp_path):
    (tmp_path / "1.toml").write_text("steps = \n")
    with pytest.raises(UserError, match=r"1\.toml is not TOML"):
        load(Example, ["--config", str(tmp_path / "1.toml")], "")
    with pytest.raises(UserError, match="does not exist"):
        load(Example, ["--config", str(tmp_path / "2.toml")], "")


@pytest.mark.parametrize("size", known("size"))
def test_every_shipped_size_parses(size):
    tables = read_config("size", size)
    assert "model" in tables or "hub" in tables
    phases = ["base", "stack", "llm"] if "model" in tables else []
    for phase in phases:
        flags = ["--config", str(CONFIGS / "train/pretrain.toml"), "--data", "d", "--out", "o"]
        settings = load(TrainConfig, [*flags, "--size", size, "--phase", phase], "")
        assert settings.max_tokens == tables[phase].get("max_tokens")
        assert settings.max_flops == tables[phase].get("max_flops")
        assert settings.weight_decay == 0.1  # of pretrain.toml
    flags = ["--config", str(CONFIGS / "train/finetune.toml"), "--data", "d", "--out", "o", "--init", "i"]
    settings = load(TrainConfig, [*flags, "--task", "simp", "--size", size], "")
    assert settings.global_batch_size == tables["finetune"]["global_batch_size"]
    assert settings.weight_decay == 0.01  # of finetune.toml
    if "model" in tables:
        pretraining = load(PretrainConfig, ["--data", "d", "--out", "o", "--size", size], "")
        assert list(pretraining.at_tokens) == tables["growth"]["at_tokens"]
        name = "max_tokens" if "hub" in tables else "max_flops"
        assert tables["stack"][name] == tables["llm"][name] > 0  # as published; and at equal cost where it is ours
    if "study" in tables:
        assert load(GrowthStudyConfig, ["--data", "d", "--out", "o", "--size", size], "").max_flops > 0


def test_sizes_are_what_they_say():
    from model.config import ModelConfig
    assert ModelConfig(**read_config("size", "tiny")["model"]).num_parameters <= 5_000_000
    assert round(ModelConfig(**read_config("size", "small")["model"]).num_parameters / 1e6, 1) == 13.9


@pytest.mark.parametrize("task", known("task"))
def test_every_shipped_task_names_fields_that_its_prompts_use(task):
    spec = read_config("task", task)
    assert (ROOT / "data/sample" / spec["folder"]).is_dir()
    named = {*spec["hub"]["columns"], *([spec["hub"]["labels"]["field"]] if "labels" in spec["hub"] else [])}
    if "dialogue" in spec["hub"]:
        named |= {"input_text", "output_text"}
    assert spec["target"] in named
    for wording in (wording for wordings in spec["prompts"].values() for wording in wordings):
        assert set(re.findall(r"\[(\w+)\]", wording)) <= named


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(UserError, match="unknown task 'smp', expected one of empd, exp, hgen, inqqg, simp"):
        load(TrainConfig, ["--task", "smp", "--data", "d", "--out", "o", "--init", "i"], "")
    with pytest.raises(UserError, match="unknown size 'huge', expected one of 3b, 410m, 7b, small, tiny"):
        load(TrainConfig, ["--size", "huge", "--phase", "base", "--data", "d", "--out", "o"], "")
    with pytest.raises(UserError, match="size 410m has no table \\[llm\\]"):
        load(TrainConfig, ["--size", "410m", "--phase", "llm", "--data", "d", "--out", "o"], "")


def test_contradictions_are_found_before_anything_runs():
    flags = ["--max_steps", "5", "--max_tokens", "5", "--max_flops", "5", "--learning_rate", "0", "--task", "simp",
             "--zero", "0", "--dtype", "bf16", "--warmup_steps", "-1", "--seed", "-1", "--adam_beta1", "1",
             "--weight_decay", "nan"]
    with pytest.raises(UserError) as error:
        load(TrainConfig, flags, "")
    for said in ("--data is missing", "--out is missing", "neither --init nor --size", "max_steps and max_tokens and",
                 "learning_rate is 0.0", "warmup_steps is -1", "seed is -1", "adam_beta1 is 1.0",
                 "weight_decay is nan", "ZeRO 0 keeps no fp32 master weights"):
        assert said in str(error.value), said


@pytest.mark.parametrize("cls", [TrainConfig, GrowConfig, GrowthPlanConfig, PretrainConfig, GrowthStudyConfig,
                                 TaskDataConfig, TextDataConfig, HubDataConfig])
def test_help_lists_every_setting(cls, capsys):
    with pytest.raises(SystemExit):
        load(cls, ["--help"], "what it does")
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in fields(cls))


@pytest.mark.parametrize("words", [["train.py"], ["stack.py"], ["stack.py", "plan"], ["pretrain.py"],
                                   ["-m", "pipeline.growth_study"], ["data_prep.py", "task"]])
def test_every_script_has_help(words):
    assert "python " in run_script(*words, "--help").stdout


def test_a_script_says_what_is_wrong_in_one_line():
    assert "unknown flag '--nonsense'" in error_line(run_script("train.py", "--nonsense", "1", check=False))
    assert "expected one argument" in error_line(run_script("train.py", "--task", check=False))


def test_a_config_file_with_an_unknown_key_is_refused(tmp_path):
    (tmp_path / "c.toml").write_text("learning_rat = 1\n")
    assert "did you mean 'learning_rate'" in error_line(
        run_script("train.py", "--config", tmp_path / "c.toml", check=False))
    assert read_toml(tmp_path / "c.toml") == {"learning_rat": 1}
