"""Settings from defaults, files and flags, and the messages that refuse them."""
import re
import sys
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

import pytest

import stack
from common import configs
from common.configs import CONFIGS, known, read_config, read_toml
from common.files import UserError
from common.scripts import dispatch
from common.settings import hint, load, setting
from corpus.raw_tasks import constraint
from data_prep import HubDataConfig, TaskDataConfig, TextDataConfig
from model.config import ModelConfig
from pipeline.growth_study import GrowthStudyConfig
from pipeline.growth_timing import GrowthPlanConfig
from pretrain import PretrainConfig
from stack import GrowConfig
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
    more: tuple[int, ...] = setting((), "a list that may be empty")


@dataclass(frozen=True)
class Checked:
    out: str = setting(None, "a required text", required=True)
    share: float = setting(0.5, "bounds included", at_least=0, at_most=1)
    beta: float = setting(0.9, "upper bound excluded", at_least=0, below=1)
    tau: float = setting(1.0, "lower bound excluded", above=0, at_most=1)
    rate: float | None = setting(None, "one bound", above=0)
    scale: float = setting(1.0, "no bounds")
    factors: tuple[int, ...] = setting((2,), "bounds of each number", at_least=2)
    task: str | None = setting(None, "a file in configs/task", names="task")
    operators: tuple[str, ...] = setting(("stack",), "a list of names", names=("stack", "middle"))


def test_flags_override_files_and_later_files_override_earlier_ones(tmp_path):
    (tmp_path / "1.toml").write_text("steps = 10\nrate = 2\nkind = 'b'\n")
    (tmp_path / "2.toml").write_text("steps = 20\n")
    files = ["--config", str(tmp_path / "1.toml"), "--config", str(tmp_path / "2.toml")]
    assert load(Example, []) == Example()
    assert load(Example, files) == Example(steps=20, rate=2.0, kind="b")
    flags = [*files, "--steps", "30", "--flag", "--name=x", "--limit", "none"]
    assert load(Example, flags) == Example(30, 2.0, "b", True, "x", None)
    assert load(Example, ["--flag", "false"]) == Example()


def test_lists(tmp_path):
    (tmp_path / "1.toml").write_text("steps_at = [1, 2_000]\nnames = ['a', 'b']\n")
    assert load(Example, ["--config", str(tmp_path / "1.toml")]) == Example(steps_at=(1, 2000), names=("a", "b"))
    assert load(Example, ["--steps_at", "3, 4", "--names", "c"]) == Example(steps_at=(3, 4), names=("c",))
    assert load(Example, ["--steps_at", "none"]) == Example()
    assert load(Example, ["--more", "3"]).more == (3,)
    assert load(Example, ["--more", "none"]).more == ()
    for value in ("3,,4", "3;4", "[3]", ""):
        with pytest.raises(UserError, match="steps_at is .*, expected whole numbers separated by commas"):
            load(Example, ["--steps_at", value])
    for value in ("3", "[1.5]", "[[1]]"):
        (tmp_path / "1.toml").write_text(f"steps_at = {value}\n")
        with pytest.raises(UserError, match="steps_at is .*, expected whole numbers separated by commas"):
            load(Example, ["--config", str(tmp_path / "1.toml")])


def test_all_problems_in_one_message(tmp_path):
    (tmp_path / "1.toml").write_text("stps = 10\nrate = 'fast'\nflag = 1\n")
    with pytest.raises(UserError) as error:
        load(Example, ["--config", str(tmp_path / "1.toml"), "--steps", "1.5", "--kind", "c", "--wrong", "1"])
    for message in ("unknown setting 'stps'", "did you mean 'steps'?", "rate is 'fast', expected a number",
                    "flag is 1, expected true or false", "steps is '1.5', expected a whole number",
                    "kind is 'c', expected one of a, b", "unknown flag '--wrong'"):
        assert message in str(error.value), message


def test_values_are_checked_beside_unknown_names():
    """The value that is replaced by its default is not called missing or out of range."""
    with pytest.raises(UserError) as error:
        load(Checked, ["--taks", "simp", "--beta", "2", "--share", "much"])
    assert str(error.value) == (
        "unknown flag '--taks' (did you mean '--task'?); share is 'much', expected a number (in the flags); "
        "beta is 2.0, expected a number at least 0 and below 1")


def test_names_of_other_tools_are_understood():
    names = ["--learning_rate", "--out", "--zero", "--phase"]
    assert hint("--lr", names) == " (did you mean '--learning_rate'?)"
    assert hint("output_dir", ["out", "optimizer"]) == " (did you mean 'out'?)"
    assert hint("--epochs", names) == ""  # not --phase, and this script has no num_train_epochs


@pytest.mark.parametrize(("flags", "message"), [
    (["--out", ""], "--out is missing"), (["--out", "none"], "--out is missing"),
    (["--share", "1.1"], "share is 1.1, expected a number from 0 to 1"),
    (["--beta", "1"], "beta is 1.0, expected a number at least 0 and below 1"),
    (["--tau", "0"], "tau is 0.0, expected a number above 0 and at most 1"),
    (["--rate", "0"], "rate is 0.0, expected a number above 0"),
    (["--rate", "inf"], "rate is inf, expected a finite number"),
    (["--scale", "nan"], "scale is nan, expected a finite number"),
    (["--scale=-inf"], "scale is -inf, expected a finite number"),
    (["--factors", "2,1,0,1"], "factors is 1, expected at least 2; factors is 0, expected at least 2"),
    (["--task", "smp"], "unknown task 'smp', expected one of empd, exp, hgen, inqqg, simp"),
    (["--operators", "stack,x"], "unknown operators 'x', expected one of stack, middle"),
    (["--share", "-1", "--beta", "nan"], "share is -1.0, expected a number from 0 to 1; beta is nan, expected a "
                                         "finite number")])
def test_values_out_of_range_and_unknown_names(flags, message):
    with pytest.raises(UserError) as error:
        load(Checked, ["--out", "x", *flags])
    assert str(error.value) == message


def test_a_size_table_may_name_a_file_whose_settings_override_it(tmp_path, monkeypatch):
    @dataclass(frozen=True)
    class Sized:
        size: str | None = setting(None, "size", names="size", overlay=True)
        method: str | None = setting(None, "method", names="method", overlay=True)
        rate: float = setting(0.5, "rate")
        phase: ClassVar = "finetune"

    for folder, text in (("size", "[finetune]\nmethod = 'm'\nrate = 1\n"), ("method", "rate = 5\n")):
        (tmp_path / "configs" / folder).mkdir(parents=True)
        (tmp_path / "configs" / folder / "m.toml").write_text(text)
    monkeypatch.setattr(configs, "CONFIGS", tmp_path / "configs")
    assert load(Sized, ["--size", "m"]) == Sized("m", "m", 5.0)
    assert load(Sized, ["--size", "m", "--rate", "2"]) == Sized("m", "m", 2.0)
    with pytest.raises(UserError, match="unknown flag '--bogus'; unknown size 'x', expected one of m"):
        load(Sized, ["--size", "x", "--bogus"])

    @dataclass(frozen=True)
    class Named:
        size: str | None = setting(None, "size", names="size")
        phase: str = setting("finetune", "phase")

    assert load(Named, ["--size", "m"]) == Named("m")  # without overlay the table is not read


def test_a_flag_that_a_file_replaces_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Replaced:
        epochs: int = setting(3, "passes", replaced_by=("steps",))
        steps: int | None = setting(None, "steps")

    file = tmp_path / "steps.toml"
    file.write_text("steps = 7\nepochs = 2\n")
    assert load(Replaced, ["--config", str(file)]) == Replaced(2, 7)
    assert load(Replaced, ["--epochs", "5", "--steps", "7"]) == Replaced(5, 7)
    assert load(Replaced, ["--config", str(file), "--epochs", "5", "--steps", "none"]) == Replaced(5, None)
    with pytest.raises(UserError) as error:
        load(Replaced, ["--config", str(file), "--epochs", "5"])
    assert str(error.value) == \
        f"epochs would change nothing, since steps is 7 ({file}): leave it out, or give --steps none"


def test_a_flag_that_another_setting_makes_useless_is_refused(tmp_path):
    @dataclass(frozen=True)
    class Scheduled:
        schedule: str = setting("constant", "schedule")
        floor: float = setting(0.0, "lowest rate", used_if=("schedule", ("cosine", "linear")))

    file = tmp_path / "floor.toml"
    file.write_text("floor = 0.1\n")
    assert load(Scheduled, ["--config", str(file)]) == Scheduled("constant", 0.1)
    assert load(Scheduled, ["--floor", "0.2", "--schedule", "linear"]) == Scheduled("linear", 0.2)
    for given, origin in (([], "default"), (["--schedule", "constant"], "the flags")):
        with pytest.raises(UserError) as error:
            load(Scheduled, ["--floor", "0.2", *given])
        assert str(error.value) == f"floor would change nothing, since schedule is constant ({origin}): leave it out"


def test_bounds_are_accepted():
    flags = ["--out", "x", "--share", "1", "--beta", "0", "--tau", "1", "--rate", "none", "--factors", "2,3",
             "--task", "simp", "--operators", "middle,stack"]
    assert load(Checked, flags) == Checked("x", 1.0, 0.0, 1.0, None, 1.0, (2, 3), "simp", ("middle", "stack"))


def test_show_settings(tmp_path, capsys, monkeypatch):
    file = tmp_path / "c.toml"
    file.write_text("seed = 7\nnum_train_epochs = 2\nlearning_rate = 0.1\n")
    flags = ["--config", str(file), "--size", "tiny", "--phase", "finetune", "--task", "simp", "--method", "vcl",
             "--init", "i", "--data", "d", "--out", "o", "--global_batch_size", "4", "--show_settings"]
    with pytest.raises(SystemExit) as exit:
        load(TrainConfig, flags)
    assert exit.value.code == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert [name for name, *_ in lines] == [field.name for field in fields(TrainConfig)]
    shown = {name: (value, origin) for name, value, origin in lines}
    expected = {"adam_beta1": ("0.9", "default"), "max_steps": ("None", "default"), "seed": ("7", str(file)),
                "num_train_epochs": ("10.0", "configs/size/tiny.toml [finetune]"),
                "learning_rate": ("0.001", "configs/size/tiny.toml [finetune]"),
                "optimizer": ("ivon", "configs/method/vcl.toml"), "max_grad_norm": ("1.0", "configs/method/vcl.toml"),
                "global_batch_size": ("4", "the flags")}
    assert expected.items() <= shown.items()
    with pytest.raises(UserError, match="seed is -1, expected at least 0"):
        load(TrainConfig, [*flags, "--seed", "-1"])
    monkeypatch.setattr(sys, "argv", ["script.py", "--steps_at", "1,2", "--show_settings"])
    with pytest.raises(SystemExit):
        dispatch((Example, pytest.fail), "")  # the script does not run
    assert re.search(r"^steps_at +1,2 +the flags$", capsys.readouterr().out, re.MULTILINE)


def test_a_file_that_is_not_toml(tmp_path):
    (tmp_path / "1.toml").write_text("steps = \n")
    with pytest.raises(UserError, match=r"1\.toml is not TOML"):
        load(Example, ["--config", str(tmp_path / "1.toml")])
    with pytest.raises(UserError, match="does not exist"):
        load(Example, ["--config", str(tmp_path / "2.toml")])


@pytest.mark.parametrize("size", known("size"))
def test_shipped_sizes_parse(size):
    tables = read_config("size", size)
    assert "model" in tables or "hub" in tables
    flags = ["--data", "d", "--out", "o", "--size", size]
    for phase in ("base", "stack", "llm") if "model" in tables else ():
        cfg = load(TrainConfig, [*flags, "--config", str(CONFIGS / "train/pretrain.toml"), "--phase", phase])
        assert cfg.max_flops == tables[phase].get("max_flops")
        assert cfg.weight_decay == 0.1  # of pretrain.toml
    cfg = load(TrainConfig, [*flags, "--config", str(CONFIGS / "train/finetune.toml"), "--init", "i", "--task", "simp"])
    assert cfg.global_batch_size == tables["finetune"]["global_batch_size"]
    assert cfg.weight_decay == 0.01  # of finetune.toml
    if "model" in tables:
        assert list(load(PretrainConfig, flags).at_tokens) == tables["growth"]["at_tokens"]
        assert tables["stack"]["max_flops"] == tables["llm"]["max_flops"] > 0
    if {"model", "hub"} <= tables.keys():
        assert tables["llm"]["max_flops"] == pytest.approx(ModelConfig(**tables["model"]).flops(300e9), rel=1e-5)
    if "study" in tables:
        assert load(GrowthStudyConfig, flags).max_flops > 0


def test_the_phases_of_pretraining_begin_with_what_they_share(tmp_path, monkeypatch):
    (tmp_path / "configs/size").mkdir(parents=True)
    (tmp_path / "configs/size/x.toml").write_text(
        "[pretraining]\nseq_length = 64\nzero = 2\n[base]\nzero = 1\n[llm]\n[finetune]\nexamples = 3\n")
    monkeypatch.setattr(configs, "CONFIGS", tmp_path / "configs")
    assert read_config("size", "x") == {"base": {"seq_length": 64, "zero": 1}, "llm": {"seq_length": 64, "zero": 2},
                                        "finetune": {"examples": 3}}


def test_parameters_of_the_small_sizes():
    assert ModelConfig(**read_config("size", "tiny")["model"]).num_parameters <= 5_000_000
    assert round(ModelConfig(**read_config("size", "small")["model"]).num_parameters / 1e6, 1) == 13.9


@pytest.mark.parametrize("task", known("task"))
def test_prompts_of_shipped_tasks_use_existing_fields(task):
    spec = read_config("task", task)
    assert (ROOT / "data/sample" / spec["folder"]).is_dir()
    existing = {*spec["hub"]["columns"], *([spec["hub"]["labels"]["field"]] if "labels" in spec["hub"] else [])}
    existing |= constraint(next(iter(spec["prompts"])), "a target").keys()
    if "dialogue" in spec["hub"]:
        existing |= {"input_text", "output_text"}
    assert spec["target"] in existing
    for prompt in (prompt for prompts in spec["prompts"].values() for prompt in prompts):
        assert set(re.findall(r"\[(\w+)\]", prompt)) <= existing


def test_unknown_sizes_and_phases():
    with pytest.raises(UserError, match="unknown size 'huge', expected one of 1m, 3b, 410m, 7b, small, study, tiny"):
        load(TrainConfig, ["--size", "huge", "--phase", "base", "--data", "d", "--out", "o"])
    with pytest.raises(UserError, match="size 410m has no table \\[llm\\]"):
        load(TrainConfig, ["--size", "410m", "--phase", "llm", "--data", "d", "--out", "o"])


def test_contradictions_are_found_before_anything_runs():
    flags = ["--max_steps", "5", "--max_tokens", "5", "--max_flops", "5", "--learning_rate", "0", "--task", "simp",
             "--zero", "0", "--dtype", "bf16", "--warmup_steps", "-1", "--seed", "-1", "--adam_beta1", "1",
             "--weight_decay", "nan"]
    with pytest.raises(UserError) as error:
        load(TrainConfig, flags)
    for message in ("--data is missing", "--out is missing", "neither --init nor --size",
                    "max_steps and max_tokens and", "learning_rate is 0.0", "warmup_steps is -1", "seed is -1",
                    "adam_beta1 is 1.0", "weight_decay is nan", "ZeRO 0 keeps no fp32 master weights"):
        assert message in str(error.value), message


@pytest.mark.parametrize(("flags", "message"), [
    ("--task simp --seq_length 5", "seq_length is for pretraining: leave it out"),
    ("--task simp --carry_moments", "carry_moments is for pretraining: leave it out"),
    ("--task simp --max_tokens 9999 --stop_at_eval_loss 3",
     "max_tokens and stop_at_eval_loss are for pretraining: leave them out"),
    ("--template chat", "template is for fine-tuning: give --task, or leave it out"),
    ("--max_source_length 99", "max_source_length is for fine-tuning: give --task"),
    ("--max_target_length 99", "max_target_length is for fine-tuning: give --task"),
    ("--train_on_source", "train_on_source is for fine-tuning: give --task"),
    ("--held_out_text x --examples 1",
     "held_out_text and examples are for fine-tuning: give --task, or leave them out"),
    ("--new_layers 1", "new_layers is for fine-tuning: give --task"),
    ("--wise_ft_alpha 0.5 --rehearsal 0.1", "wise_ft_alpha and rehearsal are for fine-tuning: give --task"),
    ("--train lora", "train lora is for fine-tuning: give --task"),
    ("--optimizer ivon", "optimizer ivon is for fine-tuning: give --task")])
def test_settings_of_the_other_phase_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        load(TrainConfig, ["--init", "x", "--data", "x", "--out", "x", *flags.split()])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("cls", [TrainConfig, GrowConfig, GrowthPlanConfig, PretrainConfig, GrowthStudyConfig,
                                 TaskDataConfig, TextDataConfig, HubDataConfig])
def test_help_lists_every_setting(cls, capsys):
    with pytest.raises(SystemExit):
        load(cls, ["--help"], "what it does")
    text = capsys.readouterr().out
    assert all(f"--{field.name}" in text for field in fields(cls))
    assert not re.search(r"default: (\(\))?\)", text)


@pytest.mark.parametrize("words", [["train.py"], ["stack.py"], ["stack.py", "plan"], ["pretrain.py"],
                                   ["-m", "pipeline.growth_study"], ["data_prep.py", "task"]])
def test_every_script_has_help(words):
    assert "python " in run_script(*words, "--help").stdout


def test_a_script_prints_errors_in_one_line(refusal, tmp_path):
    assert "unknown flag '--nonsense'" in error_line(run_script("train.py", "--nonsense", "1", check=False))
    assert "error: unknown command 'gorw', expected one of grow, plan; `script.py --help`" in refusal(
        stack.COMMANDS, "gorw")
    assert "error: no command given, expected one of grow, plan" in refusal(stack.COMMANDS)
    script = TrainConfig, pytest.fail
    assert "--task has no value: give one behind it; one that begins with - as --task=-…" in refusal(
        script, "--task", "--compile")
    (tmp_path / "c.toml").write_text("learning_rat = 1\n")
    assert "did you mean 'learning_rate'" in refusal(script, "--config", tmp_path / "c.toml")
    assert read_toml(tmp_path / "c.toml") == {"learning_rat": 1}
