"""The Makefile builds what is missing, in order."""
import re
import shlex
import subprocess

import pytest

from tests.conftest import ROOT


def make(*words, check=True):
    result = subprocess.run(["make", "--no-print-directory", "-n", *words], cwd=ROOT, capture_output=True, text=True,
                            timeout=60)
    assert not check or result.returncode == 0, result.stderr
    return result


def scripts(*words):
    """(script, out) of each command that make would run."""
    lines = make(*words).stdout.replace("\\\n", " ").splitlines()
    found = [(re.search(r"(\w+)\.py|-m (model\.hub)", line), re.search(r"--out(?:put_path)? +(\S+)", line))
             for line in lines if ".py" in line or "-m model" in line]
    return [(script[1] or script[2], out[1] if out else "") for script, out in found]


def test_everything_missing_is_built_in_order(tmp_path):
    out = tmp_path / "stack"
    found = scripts("train", "TASK=empd", f"OUT={out}")
    assert [where for script, where in found if script in ("pretrain", "train")] == [
        f"{out}", f"{out}/m1-simp", f"{out}/m2-empd"]
    assert ("data_prep", "a/text") in scripts("pretrain", "TEXT=a/text", f"OUT={out}")


def test_what_is_there_is_not_built_again(tmp_path):
    for name in ("m0", "m1-simp"):
        (tmp_path / name).mkdir()
    ran = scripts("train", "TASK=empd", f"OUT={tmp_path}")
    assert [where for script, where in ran if script == "train"] == [f"{tmp_path}/m2-empd"]
    (tmp_path / "m2-empd").mkdir()
    (tmp_path / "m1-simp").rmdir()  # a finished stage needs no earlier one; train.py sees that it is finished
    ran = scripts("train", "TASK=empd", f"OUT={tmp_path}")
    assert [where for script, where in ran if script == "train"] == [f"{tmp_path}/m2-empd"]


def test_pretraining_and_the_study_call_their_scripts():
    text = make("pretrain", "MODEL=llm", "NPROC=2", "ARGS=--seed 3", "TEXT=my/text").stdout
    assert "pretrain.py --size tiny --model llm --data my/text --out runs/tiny/llm" in text
    assert '--launcher ".venv/bin/torchrun --standalone --nproc_per_node 2"' in text
    assert '--args="--seed 3"' in text
    text = make("growth-study", "SIZE=small", "SEEDS=1,2", "ARGS=--dry_run").stdout.replace("\\\n", " ")
    assert "-m pipeline.growth_study --size small --data data/text/small --out runs/small/growth-study" in text
    assert re.search("--seeds 1,2 +--dry_run", text)
    text = make("growth-plan", "SIZE=7b", "TOKENS=300e9").stdout.replace("\\\n", " ")
    assert re.search("stack.py plan +--size 7b +--tokens 300e9", text)
    text = make("growth-plan", "PARAMS=7e9", "TOKENS=300e9").stdout.replace("\\\n", " ")
    assert re.search("stack.py plan --params 7e9 +--tokens 300e9", text)


def test_a_plan_before_a_node_is_booked():
    text = " ".join(make("plan", "SIZE=7b", "NPROC=8", "ZERO=3", "GPU_MEMORY=80").stdout.replace("\\\n", " ").split())
    assert "pipeline.memory_plan --size 7b --processes 8 --zero 3 --gpu_memory 80" in text
    assert "pipeline.memory_plan --init some/dir --processes 1" in make("plan", "INIT=some/dir").stdout


def test_an_order_of_ones_own_needs_no_task():
    assert "--order empd,inqqg" in make("experiment", "ORDER=empd inqqg").stdout


def test_evaluation_of_a_stage_and_of_a_checkpoint(tmp_path):
    text = make("evaluate", "TASK=empd", f"OUT={tmp_path}", "ARGS=--limit 3").stdout.replace("\\\n", " ")
    assert f"--out {tmp_path}/m2-empd" in text  # trained before, since it is missing
    assert re.search(rf"evaluate.py --checkpoint {tmp_path}/m2-empd --data data/prepared/sample +"
                     "--tasks simp,empd,inqqg,exp,hgen +--suite sample +--limit 3", text)
    ran = scripts("evaluate", "CHECKPOINT=some/dir", "SUITE=local", "FILES=my/files", "TASKS=", "NPROC=2")
    assert ran == [("evaluate", "")]
    text = make("evaluate", "CHECKPOINT=some/dir", "SUITE=none", "TASKS=simp", "NPROC=2").stdout.replace("\\\n", " ")
    assert "torchrun --standalone --nproc_per_node 2 evaluate.py --checkpoint some/dir" in text
    assert "--suite" not in text


def test_the_experiment_and_its_report():
    text = re.sub(r"[\\\s]+", " ", make("experiment", "SEEDS=1,2", "NPROC=2").stdout)
    assert ("experiment.py --size tiny --data data/prepared/sample --out runs/tiny --suite sample "
            '--text data/text/tiny --seeds 1,2 --launcher ".venv/bin/torchrun --standalone --nproc_per_node 2"') in text
    text = re.sub(r"[\\\s]+", " ", make("experiment", "SIZE=", "RUNS=runs/x", "INIT_LLM=a", "INIT_STACK=b",
                                        "RAW=my/raw", "ORDER=simp exp simp", "SUITE=local", "FILES=my/files").stdout)
    assert ("experiment.py --data data/prepared/raw --out runs/x --suite local --order simp,exp,simp --init_llm a "
            "--init_stack b --suite_files my/files") in text
    assert "--launcher slurm" in make("experiment", "LAUNCHER=slurm").stdout
    assert "report.py --runs runs/small" in make("report", "SIZE=small").stdout


def test_a_checkpoint_of_ones_own_takes_the_place_of_m0():
    text = make("train", "TASK=empd", "MODEL=llm", "INIT=some/where/Smol", "RAW=my/raw").stdout
    assert "--init some/where/Smol" in text
    assert "--init runs/Smol/llm/m1-simp" in text
    assert "--folder_path my/raw" in text
    assert "m0" not in text
    assert "--size" not in text


def test_published_weights_come_from_the_hub(tmp_path):
    text = make("train", "SIZE=7b", f"OUT={tmp_path}/7b", "NPROC=8").stdout
    assert f"-m model.hub llm-stacking/StackLLM_7B_300BToken {tmp_path}/7b/m0" in text
    assert "data_prep.py hub --task simp --output_path data/raw" in text
    assert "torchrun --standalone --nproc_per_node 8 train.py --config configs/train/finetune.toml --size 7b" in text


@pytest.mark.parametrize(("words", "said"), [
    (["train", "TASK=smp"], "unknown TASK 'smp', expected one of: simp empd inqqg exp hgen"),
    (["train", "MODEL=big"], "unknown MODEL 'big', expected one of: stack llm"),
    (["pretrain", "SIZE=huge"], "unknown SIZE 'huge', expected one of: 3b 410m 7b small tiny"),
    (["data", "SOURCE=web"], "unknown SOURCE 'web', expected one of: sample raw hub")])
def test_unknown_words(words, said):
    result = make(*words, check=False)
    assert result.returncode == 2
    assert said in result.stderr


def test_every_command_of_the_readme_is_one_that_make_knows():
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    commands = re.findall(r"^make ([^\n#]+)", "".join(blocks), flags=re.MULTILINE)
    assert len(commands) >= 5
    for command in commands:
        make(*shlex.split(command))


def test_the_stages_of_a_method_lie_in_its_folder(tmp_path):
    lines = make("train", "TASK=empd", "METHOD=rehearsal", f"OUT={tmp_path}").stdout.replace("\\\n", " ")
    lines = " ".join(lines.split())
    first, second = (re.search(f"--out {tmp_path}/rehearsal/{name} (.*?) ?(\\.venv|$)", lines)[1]
                     for name in ("m1-simp", "m2-empd"))
    assert first == "--method rehearsal --rehearsal 0"  # there is no task before
    assert second == "--method rehearsal"
    assert f"--init {tmp_path}/m0 " in lines
    assert f"--init {tmp_path}/rehearsal/m1-simp " in lines
    text = make("experiment", "METHOD=finetune,ewc:ewc_strength=3").stdout
    assert "--methods finetune,ewc:ewc_strength=3" in text
    assert "unknown METHOD 'ewk', expected one of: averaging" in make("train", "METHOD=ewk", check=False).stderr
