"""The targets of make: their commands, in order, and how variables arrive."""
import json
import os
import re
import shlex
import signal
import subprocess
import sys

import pytest

from common.configs import known
from common.files import UserError
from pipeline import make_variables, targets
from pipeline.jobs import run_command
from pipeline.make_variables import VARIABLES, Variables
from pipeline.targets import COMMANDS, target_commands
from tests.conftest import ROOT, accept_interrupts, error_line, run_script

SOURCES = "".join((ROOT / f"pipeline/{name}.py").read_text() for name in ("targets", "make_variables"))

# `make test` exports variables to this process that would change the targets.
ENVIRON = {name: value for name, value in os.environ.items()
           if name not in ("ARGS", "DRY_RUN", "GIVEN", "GOALS", "MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS", "MAKELEVEL",
                           "SMOLLM2")}

MODELS = "expected one of llm, base, stack, interleave, middle, solar"

TORCHRUN_WORDS = "torchrun --standalone --shutdown-timeout 1800 --nproc_per_node"


def make(*words, check=True, **environment):
    """Runs make without running the commands of the target."""
    result = subprocess.run(["make", "--no-print-directory", f"PYTHON={sys.executable}", *words], cwd=ROOT,
                            env=ENVIRON | {"DRY_RUN": "1"} | environment, capture_output=True, text=True, timeout=60)
    assert not check or result.returncode == 0, result.stderr
    return result


def commands(target, **variables):
    """The commands of a target as lines."""
    return [shlex.join(command) for command in target_commands(target, variables)]


def scripts(target, **variables):
    """(script, out) of each command of a target."""
    lines = commands(target, **variables)
    found = [(re.search(r"(\w+)\.py|-m (model\.hub)", line), re.search(r"--out(?:put_path)? (\S+)", line))
             for line in lines]
    return [(script[1] or script[2], out[1] if out else "") for script, out in found]


def test_everything_missing_is_built_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = "stack"
    assert scripts("train", TASK="empd", OUT=out) == [
        ("data_prep", "data/prepared/sample/simp.json"), ("data_prep", "data/prepared/sample/empd.json"),
        ("data_prep", "data/text/tiny"), ("pretrain", out), ("train", f"{out}/m1-simp"), ("train", f"{out}/m2-empd")]
    assert ("data_prep", "data/text/small") in scripts("pretrain", SIZE="small", OUT=out)


def test_a_task_outside_the_default_order_is_a_chain_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(make_variables, "known", lambda kind: [*known(kind), "mine"])
    chain = [("data_prep", "data/prepared/sample/mine.json"), ("train", f"{tmp_path}/m1-mine")]
    (tmp_path / "m0").mkdir()
    assert scripts("train", TASK="mine", OUT=f"{tmp_path}") == chain
    assert [where for _, where in scripts("train", TASK="mine", ORDER="simp mine", OUT=f"{tmp_path}")][-2:] == [
        f"{tmp_path}/m1-simp", f"{tmp_path}/m2-mine"]
    (tmp_path / "m1-simp").mkdir()
    with pytest.raises(UserError, match=f"{tmp_path}/m1-simp is a stage of another order of tasks than mine: choose "
                                        "another RUNS, or remove it"):
        commands("train", TASK="mine", OUT=f"{tmp_path}")
    assert scripts("train", TASK="empd", OUT=f"{tmp_path}")[-1] == ("train", f"{tmp_path}/m2-empd")
    assert targets.next_commands(Variables({"TASK": "mine", "RAW": "my/raw", "RUNS": "runs/mine"})) == [
        "make experiment SIZE=tiny RAW=my/raw RUNS=runs/mine ORDER=mine  # the models compared"]


def test_what_exists_is_not_built_again(tmp_path):
    for name in ("m0", "m1-simp"):
        (tmp_path / name).mkdir()
    ran = scripts("train", TASK="empd", OUT=f"{tmp_path}")
    assert [where for script, where in ran if script == "train"] == [f"{tmp_path}/m2-empd"]
    (tmp_path / "m0").rmdir()  # a finished stage needs no earlier one
    ran = scripts("train", TASK="empd", OUT=f"{tmp_path}")
    assert [where for script, where in ran if script == "train"] == [f"{tmp_path}/m2-empd"]
    assert "pretrain" not in dict(ran)
    (tmp_path / "m2-empd").mkdir()
    (tmp_path / "m1-simp").rmdir()  # train.py notices that the stage is finished
    assert scripts("train", TASK="empd", OUT=f"{tmp_path}") == [
        ("data_prep", "data/prepared/sample/empd.json"), ("train", f"{tmp_path}/m2-empd")]


def test_the_evaluation_split_has_the_given_size():
    prepared = [line for line in commands("experiment", EVAL_SIZE="0.01") if "data_prep.py task" in line]
    assert len(prepared) == 3
    assert all(line.endswith("--eval_dataset_size 0.01") for line in prepared)
    assert "--eval_dataset_size" not in commands("data")[-1]


def test_the_folder_of_the_models():
    assert [where for script, where in scripts("train", RUNS="mine", MODEL="llm") if script == "train"] == [
        "mine/llm/m1-simp"]
    assert commands("pretrain", RUNS="mine", MODEL="llm")[-1].endswith("--out mine/llm")


def test_a_task_may_come_again():
    assert [where for script, where in scripts("train", ORDER="simp empd simp", OUT="o") if script == "train"] == [
        "o/m1-simp", "o/m2-empd", "o/m3-simp"]
    assert "--tasks simp,empd --" in commands("evaluate", ORDER="simp empd simp", OUT="o")[-1]


def test_pretraining_and_the_study_call_their_scripts(tmp_path):
    text = commands("pretrain", MODEL="llm", NPROC="2", ARGS="--seed 3", TEXT=f"{tmp_path}")[-1]
    assert f"pretrain.py --size tiny --model llm --data {tmp_path} --out runs/tiny/llm" in text
    assert f"--launcher '.venv/bin/{TORCHRUN_WORDS} 2' '--args=--seed 3'" in text
    text = commands("growth-study", SIZE="small", SEEDS="1,2", ARGS="--dry_run")[-1]
    assert ("-m pipeline.growth_study --size small --data data/text/small --out runs/small/growth-study --seeds 1,2 "
            "--dry_run") in text
    assert commands("growth-plan", SIZE="7b", TOKENS="300e9") == [
        ".venv/bin/python stack.py plan --size 7b --tokens 300e9"]
    assert commands("growth-plan", PARAMS="7e9", TOKENS="300e9") == [
        ".venv/bin/python stack.py plan --params 7e9 --tokens 300e9"]


def test_a_plan_of_a_size_and_of_a_checkpoint():
    text, = commands("plan", SIZE="7b", NPROC="8", ZERO="3", GPU_MODEL="a100", GPU_MEMORY="40")
    assert "pipeline.plan --size 7b --processes 8 --zero 3 --gpu a100 --gpu_memory 40" in text
    assert "pipeline.plan --init some/dir --processes 1" in commands("plan", INIT="some/dir")[0]


def test_an_order_needs_no_task():
    assert "--order empd,inqqg" in commands("experiment", ORDER="empd inqqg")[-1]


def test_evaluation_of_a_stage_and_of_a_checkpoint(tmp_path):
    *before, text = commands("evaluate", TASK="empd", OUT=f"{tmp_path}", ARGS="--limit 3")
    assert any(f"--out {tmp_path}/m2-empd " in line for line in before)  # trained first, since it is missing
    assert len(set(before)) == len(before)
    assert text.endswith(f"evaluate.py --checkpoint {tmp_path}/m2-empd --data data/prepared/sample --tasks "
                         f"simp,empd,inqqg,exp,hgen --text data/text/tiny --reference {tmp_path}/m0 --suite sample "
                         "--limit 3")
    (tmp_path / "m2-empd").mkdir()
    assert "train" not in dict(scripts("evaluate", TASK="empd", OUT=f"{tmp_path}"))
    assert "--text" not in commands("evaluate", TASK="empd", OUT=f"{tmp_path}")[-1]  # nor is there m0
    (tmp_path / "m0").mkdir()
    assert f"--text {tmp_path} --reference {tmp_path}/m0 " in commands("evaluate", TASK="empd", OUT=f"{tmp_path}",
                                                                     TEXT=f"{tmp_path}")[-1]
    ran = scripts("evaluate", CHECKPOINT="some/dir", SUITE="local", FILES="my/files", TASKS="", NPROC="2")
    assert ran == [("evaluate", "")]
    text = commands("evaluate", CHECKPOINT="some/dir", SUITE="none", TASKS="simp", NPROC="2")[-1]
    assert f"{TORCHRUN_WORDS} 2 evaluate.py --checkpoint some/dir" in text
    assert "--suite none" in text
    assert "--text" not in text


def test_init_is_what_the_chain_was_trained_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("my/model", "runs/tiny/stack/m0"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to("my")
    for start, given, accepted in (("my/model", "my/model", True), ("my/model", "link/model", True),
                                   ("runs/tiny/stack/m0", "my/model", False), ("org/name", "org/name", True),
                                   ("a/model", "b/model", False), ("old/model", "my/model", True)):  # was moved
        (tmp_path / "chain/m1-simp").mkdir(parents=True, exist_ok=True)
        (tmp_path / "chain/m1-simp/run.json").write_text(json.dumps({"settings": {"init": start}}))
        for target, task in (("train", "empd"), ("evaluate", "empd"), ("evaluate", "simp")):
            variables = {"TASK": task, "SIZE": "tiny", "INIT": given, "OUT": "chain"}
            if accepted:
                assert any(f"-{task}" in line for line in commands(target, **variables))
            else:
                with pytest.raises(UserError, match=f"chain/m1-simp was trained from {start}, and INIT is {given}: "):
                    commands(target, **variables)


def test_arguments_of_an_evaluation_are_not_those_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the stage is missing
    *_, training, evaluation = commands("evaluate", TASK="simp", ARGS="--out x")
    assert "--out x" not in training
    assert evaluation.endswith("--out x")


def test_the_experiment_and_its_report():
    text = commands("experiment", SEEDS="1,2", NPROC="2")[-1]
    assert text.endswith("experiment.py --size tiny --data data/prepared/sample --out runs/tiny --suite sample --text "
                         f"data/text/tiny --seeds 1,2 --launcher '.venv/bin/{TORCHRUN_WORDS} 2'")
    text = commands("experiment", SIZE="", RUNS="runs/x", INIT_LLM="a", INIT_STACK="b", RAW="my/raw",
                    ORDER="simp exp simp", SUITE="local", FILES="my/files")[-1]
    assert text.endswith("experiment.py --data data/prepared/raw --out runs/x --suite local --order simp,exp,simp "
                         "--init_llm a --init_stack b --suite_files my/files")
    assert "--text my/text.txt" in commands("experiment", SIZE="7b", TEXT="my/text.txt")[-1]
    assert "--launcher slurm" in commands("experiment", LAUNCHER="slurm")[-1]
    text = commands("experiment", PAIRS="3", RATES="3e-4,1e-3", CONTROLS="flops,loss")[-1]
    assert text.endswith("--pairs 1,2,3 --rates 3e-4,1e-3 --controls flops,loss")
    for given, seeds in (("4,6", "4,6"), ("4, 6", "4,6"), ("4,", "4")):
        assert commands("experiment", PAIRS=given)[-1].endswith(f"--pairs {seeds}")
    assert commands("report", SIZE="small") == [".venv/bin/python report.py --runs runs/small"]


def test_a_checkpoint_instead_of_m0():
    text = " ".join(commands("train", TASK="empd", MODEL="llm", INIT="some/where/Smol", RAW="my/raw"))
    assert "--init some/where/Smol" in text
    assert "--init runs/Smol/llm/m1-simp" in text
    assert "--folder_path my/raw" in text
    assert "m0" not in text
    assert "--size" not in text


def test_published_weights_come_from_the_hub(tmp_path):
    lines = commands("train", SIZE="7b", OUT=f"{tmp_path}/7b", NPROC="8")
    assert lines[0].endswith("data_prep.py hub --task simp --output_path data/raw")
    assert lines[2].endswith(f"-m model.hub --source llm-stacking/StackLLM_7B_300BToken --out {tmp_path}/7b/m0")
    assert (f"{TORCHRUN_WORDS} 8 train.py --config configs/train/finetune.toml --size 7b"
            in lines[3])
    assert "pretrain.py --size 7b" in commands("pretrain", SIZE="7b", HUB="")[-1]
    (tmp_path / "7b/m0").mkdir(parents=True)
    assert commands("pretrain", SIZE="7b", OUT=f"{tmp_path}/7b") == []
    assert "--source my/own" in commands("pretrain", SIZE="7b", OUT=f"{tmp_path}/7b", HUB="my/own")[-1]  # is it that?
    for task in ("simp", "empd"):
        assert not any("model.hub" in line for line in commands("train", TASK=task, SIZE="7b", OUT=f"{tmp_path}/7b"))
        given = commands("train", TASK=task, SIZE="7b", OUT=f"{tmp_path}/7b", HUB="my/own", GIVEN="HUB")
        assert any(f"-m model.hub --source my/own --out {tmp_path}/7b/m0" in line for line in given)
        (tmp_path / "7b/m1-simp").mkdir(exist_ok=True)


def test_the_plan_is_that_of_the_run():
    """Shape and recipe are those that `make train` has with the same variables."""
    (line,), (trained,) = commands("plan", INIT="my/7b", SIZE="7b"), commands("train", INIT="my/7b", SIZE="7b")[-1:]
    assert "--init my/7b --size 7b" in line
    assert "--size 7b" in trained
    assert "--size" not in commands("plan", INIT="my/smol")[0] + commands("train", INIT="my/smol")[-1]


def test_a_path_that_the_system_refuses():
    result = subprocess.run([sys.executable, "-m", "pipeline.targets", "train"], cwd=ROOT, capture_output=True,
                            text=True, env=ENVIRON | {"OUT": "x" * 300, "DRY_RUN": "1"})
    assert error_line(result) == f"error: {'x' * 200}: File name too long"


def test_the_stages_of_a_method_have_a_folder(tmp_path):
    own, = commands("train", METHOD="expansion:per_task=true:new_layers=4", OUT=f"{tmp_path}", INIT="x")[-1:]
    assert own.endswith("--method expansion --per_task true --new_layers 4")
    replayed, = commands("train", METHOD="finetune:replay_share=0.01", TEXT="t", OUT=f"{tmp_path}", INIT="x")[-1:]
    assert replayed.endswith("--method finetune --replay_share 0.01 --replay_text t")
    assert f"--out {tmp_path}/expansion-per_task=true-new_layers=4/m1-simp" in own
    replay, = commands("train", METHOD="replay", OUT=f"{tmp_path}", INIT="x", TEXT="shards")[-1:]
    assert "--replay_text shards" in replay
    first, second = commands("train", TASK="empd", METHOD="rehearsal", OUT=f"{tmp_path}")[-2:]
    assert f"--out {tmp_path}/rehearsal/m1-simp " in first
    assert f"--out {tmp_path}/rehearsal/m2-empd " in second
    assert first.endswith(" --method rehearsal")
    assert second.endswith(" --method rehearsal")
    assert f"--init {tmp_path}/m0 " in first
    assert f"--init {tmp_path}/rehearsal/m1-simp " in second
    text = commands("experiment", METHOD="finetune,ewc:ewc_strength=3")[-1]
    assert "--methods finetune,ewc:ewc_strength=3" in text


def test_tests_and_style():
    assert commands("test", ARGS="-k 'a or b'", SMOLLM2="/w") == [
        "env -u ARGS -u GIVEN -u GOALS -u MAKEFLAGS -u MFLAGS OMP_NUM_THREADS=1 SMOLLM2=/w .venv/bin/python -m pytest "
        "-q -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder -k 'a or b'"]
    assert commands("lint") == [".venv/bin/ruff check .", ".venv/bin/python -m mypy"]
    assert commands("bench", FILES="f")[-1].endswith(
        "bench/run_all.py --data data/prepared/sample/simp.json --folder runs/bench --files f")


@pytest.mark.parametrize(("target", "variables", "said"), [
    ("train", {"TASK": "smp"}, "unknown TASK 'smp', expected one of simp, empd, inqqg, exp, hgen"),
    ("train", {"TASK": ""}, "unknown TASK '', expected one of simp, empd"),
    ("train", {"TASK": "exp", "ORDER": "simp empd simp"}, "unknown TASK 'exp', expected one of simp, empd"),
    ("train", {"ORDER": "simp smp"}, "unknown ORDER 'smp', expected one of empd, exp, hgen, inqqg, simp"),
    ("train", {"MODEL": "big"}, f"unknown MODEL 'big', {MODELS}"),
    ("pretrain", {"SIZE": "huge"}, "unknown SIZE 'huge', expected one of 1m, 3b, 410m, 7b, small, study, tiny"),
    ("train", {"INIT": "my/model", "SIZE": "7B"}, "unknown SIZE '7B', expected one of 1m, 3b"),
    ("experiment", {"INIT_LLM": "a", "INIT_STACK": "b", "SIZE": "7B"}, "unknown SIZE '7B'"),
    ("plan", {"SIZE": "7B"}, "unknown SIZE '7B'"),
    ("data", {"SOURCE": "web"}, "unknown SOURCE 'web', expected one of sample, raw, hub"),
    ("evaluate", {"TASKS": "simp smp"}, "unknown TASKS 'smp'"),
    ("train", {"METHOD": "replay:replay_text=mine"}, "METHOD: 'replay_text=mine' is not name=value of a setting that a "
     "method may have: the text that is replayed is TEXT, or --text"),
    ("plan", {"METHOD": "ewc:out=x"}, "METHOD: 'out=x' is not name=value of a setting"),
    ("evaluate", {"METHOD": "ewc:deepspeed=a/b"}, "METHOD: the method 'ewc:deepspeed=a/b' names a folder"),
    ("train", {"GIVEN": "TASK SEEDS RATES"}, "make train does not use SEEDS, RATES"),
    ("train", {"GIVEN": "TASK SUITE SEEDS", "GOALS": "train evaluate"}, "make train evaluate does not use SEEDS"),
    ("report", {"GIVEN": "INIT HUB"}, "make report does not use INIT, HUB"),
    ("lint", {"GIVEN": "ARGS"}, "make lint does not use ARGS"),
    ("train", {"METHOD": "ewc:help=1"}, "METHOD: 'help=1' is not name=value of a setting"),
    ("train", {"METHOD": "ewc:config=x"}, "METHOD: 'config=x' is not name=value of a setting"),
    ("growth-study", {"GIVEN": "OUT"}, "make growth-study does not use OUT"),
    ("evaluate", {"GIVEN": "METHOD CHECKPOINT MODEL", "CHECKPOINT": "x", "METHOD": "ewc"},
     "CHECKPOINT is evaluated instead of a stage: leave out METHOD, MODEL"),
    ("train", {"METHOD": "ewk"}, "unknown METHOD 'ewk', expected one of ewc, expansion, fapm"),
    ("train", {"NPROC": "0"}, "NPROC is '0', expected a whole number of at least 1"),
    ("plan", {"NPROC": "x"}, "NPROC is 'x', expected a whole number of at least 1"),
    ("train", {"ARGS": "--init x --out=y --learning_rate 1"}, "init, out cannot be given here"),
    ("train", {"ARGS": "'x"}, 'ARGS: "\'x" is not a command line: No closing quotation'),
    ("pretrain", {"OUT": "no/model", "TEXT": "no/shards"},
     "TEXT=no/shards does not exist: make token shards there with data_prep.py"),
    ("pretrain", {"SIZE": "7b", "ARGS": "--seed 1"}, "the m0 of 7b is downloaded: give HUB= to pretrain it"),
    ("experiment", {"SIZE": "7b", "HUB": ""}, "an experiment compares two: give INIT_LLM and INIT_STACK"),
    ("experiment", {"LAUNCHER": "slurm", "NPROC": "4"}, 'for Slurm ARGS="--gpus N"'),
    ("growth-study", {"LAUNCHER": "slurm"}, "LAUNCHER is for make experiment: for other targets give NPROC"),
    ("trian", {}, "unknown target 'trian', expected one of train, pretrain"),
    ("train", {"MODEL": "big", "TASK": "smp", "NPROC": "-1"}, f"unknown MODEL 'big', {MODELS}; "
     "unknown TASK 'smp', expected one of simp, empd, inqqg, exp, hgen; NPROC is '-1'")])
def test_wrong_variables_are_all_reported(target, variables, said):
    with pytest.raises(UserError) as error:
        target_commands(target, variables)
    assert said in str(error.value)


def test_names_may_be_divided_by_commas():
    for target in ("train", "experiment"):
        assert commands(target, ORDER="simp,empd") == commands(target, ORDER="simp empd")
    assert commands("evaluate", TASKS="simp,empd") == commands("evaluate", TASKS="simp empd")


def test_make_prints_the_commands_and_reports_errors_on_one_line():
    result = make("train", "TASK=empd", "OUT=o")
    assert result.stdout.splitlines() == commands("train", TASK="empd", OUT="o")
    assert make("train", TASK="empd", OUT="o").stdout == result.stdout  # variables in the environment
    result = make("train", "TASK=", "NPROC=0", check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert [line for line in result.stderr.splitlines() if not line.startswith("make: ")] == [
        "error: unknown TASK '', expected one of simp, empd, inqqg, exp, hgen; NPROC is '0', expected a whole number "
        "of at least 1"]


@pytest.mark.parametrize("in_environment", [False, True])
def test_values_arrive_unchanged_and_nothing_is_executed(tmp_path, in_environment):
    """From the command line or the environment, through make and the shell."""
    probe = tmp_path / "probe"
    values = {"INIT": "a b'c", "OUT": f"$(shell touch {probe})", "RAW": f'r`touch {probe}`"; touch {probe}; "',
              "FILES": f"x' ; touch {probe}; '", "CHECKPOINT": f"$$(touch {probe}) ${{HOME}} $HOME #c\\ \t\n|& ü",
              "ARGS": f"--limit '1 2' \"$(touch {probe})\""}
    of_checkpoint = {name: value for name, value in values.items() if in_environment or name not in ("INIT", "OUT")}
    words = [] if in_environment else [f"{name}={value}" for name, value in of_checkpoint.items()]
    environment = values if in_environment else {}
    expected = commands("evaluate", **of_checkpoint)
    assert make("evaluate", *words, **environment).stdout == "\n".join(expected) + "\n"
    evaluate = shlex.split(expected[-1])
    assert evaluate[evaluate.index("--checkpoint") + 1] == values["CHECKPOINT"]
    assert evaluate[-3:] == ["--limit", "1 2", f"$(touch {probe})"]
    train = commands("train", **values)[-1]
    assert shlex.quote(values["INIT"]) in train
    assert f"'$(shell touch {probe})/m1-simp'" in train
    model = f'x" ; touch {probe}; "'
    result = make("train", *([] if in_environment else [f"MODEL={model}"]), check=False,
                  **({"MODEL": model} if in_environment else {}))
    assert f"error: unknown MODEL {model!r}, {MODELS}\n" in result.stderr
    assert not probe.exists()


def test_a_command_runs_with_unchanged_words(monkeypatch, capfd):
    monkeypatch.setattr(targets, "PYTHON", sys.executable)
    monkeypatch.setenv("INIT", "a b'$(touch x)")
    monkeypatch.delenv("DRY_RUN", raising=False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        targets.main("plan")
    assert stopped.value.code == 2
    printed = capfd.readouterr()
    assert "-m pipeline.plan --init 'a b'\"'\"'$(touch x)' --processes 1\n" in printed.out
    assert "error: a b'$(touch x) is neither a checkpoint directory nor a Hub id" in printed.err


@pytest.mark.parametrize(("target", "given", "said"), [
    ("train", {"ARGS": "--learning_rat 1"}, "error: unknown flag '--learning_rat'"),
    ("train", {"METHOD": "ewc:foo=1"}, "error: unknown flag '--foo'"),
    ("evaluate", {"METHOD": "ewc:foo=1"}, "error: unknown flag '--foo'"),
    ("experiment", {"METHOD": "finetune,foo"}, "unknown method 'foo'"),
    ("evaluate", {"ARGS": "--limit few"}, "error: limit is 'few', expected a whole number"),
    ("experiment", {"ARGS": "--seeds=-1"}, "error: seeds is -1, expected at least 0")])
def test_arguments_are_checked_before_the_first_command(monkeypatch, tmp_path, capfd, target, given, said):
    def run_in_fork(words, **_):
        result = run_script(*words[1:], check=False)
        print(result.stderr, file=sys.stderr)
        return result

    monkeypatch.setattr(targets.subprocess, "run", run_in_fork)
    monkeypatch.setattr(targets, "run_command", lambda words: pytest.fail(f"{words} was run"))
    monkeypatch.setattr(targets, "SAMPLE_SUITE", tmp_path / "suite")
    for name, value in {"OUT": "/nonexistent", "TEXT": f"{tmp_path}", "NPROC": "2", **given}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DRY_RUN", raising=False)
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stopped:
        targets.main(target)
    assert stopped.value.code == 2
    assert said in capfd.readouterr().err


def test_arguments_of_a_single_stage_are_not_checked_apart(monkeypatch):
    """The stage itself checks them, seconds later."""
    ran = []
    monkeypatch.setattr(targets, "run_command", ran.append)
    monkeypatch.setattr(targets, "check_arguments", lambda words: pytest.fail(f"{words} was checked"))
    for name, value in {"ARGS": "--learning_rat 1", "OUT": "/nonexistent", "INIT": "some/dir", "TASK": "simp"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("DRY_RUN", raising=False)
    monkeypatch.chdir(ROOT)
    targets.main("train")
    assert ["data_prep.py" in ran[0], "train.py" in ran[-1], len(ran)] == [True, True, 2]


def test_interrupted_targets_end_without_a_traceback(tmp_path):
    (tmp_path / "shlex.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, "-m", "pipeline.targets", "train"], cwd=ROOT, text=True,
                               env=ENVIRON | {"PYTHONPATH": str(tmp_path)}, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, preexec_fn=accept_interrupts)
    assert process.stdout.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_a_command_that_an_interrupt_ends_is_no_error():
    with pytest.raises(SystemExit) as stopped:
        run_command([sys.executable, "-c", "import os, signal\n"
                     "signal.signal(signal.SIGINT, signal.SIG_DFL)\nos.kill(os.getpid(), signal.SIGINT)"])
    assert stopped.value.code == 130
    with pytest.raises(UserError, match="was killed by signal 9"):
        run_command(["bash", "-c", "kill -KILL $$"])


def test_a_command_that_ends_by_a_forwarded_signal_is_no_error():
    with pytest.raises(SystemExit) as stopped:
        run_command([sys.executable, "-c", "import os, signal, time\n"
                     "os.kill(os.getppid(), signal.SIGTERM)\ntime.sleep(9)"])
    assert stopped.value.code == 128 + signal.SIGTERM


def test_an_interrupt_in_the_last_moment_of_a_command_is_kept():
    """The command ends well, and the next one must not begin."""
    with pytest.raises(SystemExit) as stopped:
        run_command([sys.executable, "-c", "import os, signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                     "os.kill(os.getppid(), signal.SIGINT)\ntime.sleep(0.2)"])
    assert stopped.value.code == 130


def test_a_variable_that_make_does_not_know():
    result = make("experiment", "SEED=3", "METHODS=ewc", "SEEDS=3", check=False)
    assert result.returncode == 2
    assert "error: unknown variable METHODS, SEED: `make help` lists the variables" in result.stderr
    assert not set(re.findall(r'get\("([A-Z0-9_]+)"', SOURCES)) - {*VARIABLES, "GIVEN", "GOALS"}


def test_a_checkpoint_with_the_name_of_a_size():
    with pytest.raises(UserError, match=r"INIT is a folder with the name of the size small: give SIZE=small to use"):
        commands("train", INIT="models/small")
    assert "--size small" in commands("train", INIT="models/small", SIZE="small")[-1]
    assert "--size" not in commands("train", INIT="models/small", SIZE="", RUNS="runs/mine")[-1]


def test_an_experiment_starts_from_two_checkpoints():
    with pytest.raises(UserError, match="an experiment compares two: give INIT_LLM and INIT_STACK"):
        commands("experiment", INIT="my/checkpoint")


def test_the_next_commands_keep_the_folders():
    given = {"TASK": "simp", "MODEL": "llm", "RUNS": "my/runs", "EVAL_SIZE": "0.2", "SIZE": "410m", "HUB": ""}
    assert targets.next_commands(Variables(given))[0] == (
        "make train TASK=empd MODEL=llm SIZE=410m EVAL_SIZE=0.2 HUB= RUNS=my/runs  # the next task")
    assert targets.next_commands(Variables({"TASK": "hgen", "RUNS": "my/runs", "METHOD": "ewc"}))[0] == (
        "make experiment SIZE=tiny RUNS=my/runs METHOD=ewc  # the models compared")
    given = {"TASK": "hgen", "ORDER": "simp hgen", "MODEL": "llm", "RAW": "my/raw", "TEXT": "my/text", "OUT": "my/out",
             "NPROC": "2"}
    assert targets.next_commands(Variables(given))[0] == (
        "make experiment SIZE=tiny RAW=my/raw TEXT=my/text 'ORDER=simp hgen' NPROC=2  # the models compared")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough(unbuffered):
    """As in `make help | head -1`: no traceback, whether Python writes each line at once or all at the end."""
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run([sys.executable, "-m", "pipeline.targets", "help"], cwd=ROOT,
                            env=ENVIRON | {"PYTHONUNBUFFERED": unbuffered}, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (result.returncode, result.stderr) == (128 + signal.SIGPIPE, b"")


def test_help_needs_no_packages():
    result = subprocess.run([sys.executable, "-S", "-m", "pipeline.targets", "help"], cwd=ROOT, env=ENVIRON,
                            capture_output=True, text=True, check=True)
    assert make("help").stdout == result.stdout
    for name in (*COMMANDS, *known("size"), *known("method"), *known("eval"), *known("task")):
        assert re.search(rf"\b{name}\b", result.stdout), name
    names = re.findall(r'get\("([A-Z_]+)"', SOURCES)
    assert not {name for name in names if name not in result.stdout} - {"GIVEN", "GOALS"}


def test_every_target_is_one_that_make_knows():
    lines = re.search(r"^\.PHONY:((.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    phony = lines.replace("\\", "").split()
    assert set(phony) == {*COMMANDS, "help", "clean"}


def test_defaults():
    v = Variables({})
    assert (v.task, v.model, v.size, v.source, v.raw, str(v.out), v.runs, v.text, v.nproc, v.suite) == (
        "simp", "stack", "tiny", "sample", "data/raw", "runs/tiny/stack", "runs/tiny", "data/text/tiny", "1", "sample")
    assert Variables({"INIT": "a/b/"}).size == "b"
    assert [Variables(given).source for given in ({"SIZE": "410m"}, {"SIZE": "7b", "RAW": "r"}, {"SIZE": "small"})] == [
        "hub", "raw", "sample"]


@pytest.mark.parametrize(("target", "variables", "said"), [
    ("evaluate", {"SUITE": "nope"}, "unknown SUITE 'nope', expected one of local, paper, sample, none"),
    ("evaluate", {"SUITE": "my/gone.toml"}, "SUITE is my/gone.toml, which does not exist: expected a .toml file"),
    ("experiment", {"PAIRS": "0"}, "PAIRS is '0', expected at most 9,999 pairs, or seeds divided by commas"),
    ("experiment", {"PAIRS": "1;2"}, "PAIRS is '1;2', expected"), ("experiment", {"PAIRS": "10000"}, "at most 9,999"),
    ("experiment", {"PAIRS": "4 6"}, "PAIRS is '4 6', expected")])
def test_values_that_would_be_refused_only_after_pretraining(target, variables, said):
    with pytest.raises(UserError, match=re.escape(said)):
        commands(target, **variables)


def test_cleaning_removes_what_is_made_again_in_seconds():
    """A dry run prints it."""
    assert targets.Variables({"DRY_RUN": "0"}).dry_run is False
    printed = make("clean", DRY_RUN="1").stdout.splitlines()
    assert printed[0] == "rm -rf .venv .venv.lock data/prepared .pytest_cache .ruff_cache .mypy_cache"
    assert make("clean", "VENV=/", "CLEANED=/", DRY_RUN="1").stdout.splitlines() == printed
    assert printed[1].startswith("find . -name __pycache__")
