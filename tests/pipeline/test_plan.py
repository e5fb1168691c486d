"""Input and output of `make plan`."""
import re
from dataclasses import replace

import pytest

from common import settings
from common.configs import read_config
from common.files import UserError
from model.config import ModelConfig, size_config
from pipeline import pretraining
from pipeline.plan import PlanConfig, main, read_plan
from pipeline.step_time import GPUS, plan_step


def test_defaults_come_from_the_recipe():
    plan, recipe = read_plan(PlanConfig(size="7b", processes=8))
    assert (plan.zero, plan.max_tokens_per_microbatch, plan.gradient_checkpointing) == (2, 8_192, False)
    assert recipe.max_train_samples == 100_000
    plan, _ = read_plan(PlanConfig(size="tiny", dtype="fp32", zero=0, max_tokens_per_microbatch=99))
    assert (plan.zero, plan.max_tokens_per_microbatch, plan.gradient_checkpointing) == (0, 99, False)
    assert plan.sample_tokens == 128
    assert plan.prefix_tokens == 40
    pretraining, _ = read_plan(PlanConfig(size="small", phase="llm"))
    assert (pretraining.sample_tokens, pretraining.prefix_tokens) == (256, 0)


def test_a_micro_batch_is_at_most_the_samples_of_a_process():
    """256 samples of up to 1,024 + 256 tokens."""
    for processes, tokens in ((8, 8192), (64, 4 * 1280), (100, 3 * 1280), (256, 1280)):
        assert read_plan(PlanConfig(size="7b", processes=processes))[0].max_tokens_per_microbatch == tokens
    plan, _ = read_plan(PlanConfig(size="7b", phase="stack", processes=8))
    assert plan.max_tokens_per_microbatch == read_config("size", "7b")["stack"]["max_tokens_per_microbatch"]


def test_the_tokens_of_a_recipe_in_flops(capsys):
    """The FLOPs of a grown model include those of its base."""
    for phase, tokens in (("llm", 300e9), ("stack", 300e9 - 18_717_081_600 * flops_of_7b(8) / flops_of_7b(32))):
        main(PlanConfig(size="7b", phase=phase, processes=64))
        total, = re.findall(r"^  ([\d,]+) tokens ", capsys.readouterr().out, re.MULTILINE)
        assert float(total.replace(",", "")) == pytest.approx(tokens, rel=1e-5)


def flops_of_7b(layers):
    return size_config("7b", layers).flops(1)


def test_a_checkpoint_with_the_recipe_of_a_size(checkpoint):
    """As in `make train INIT=… SIZE=7b`: the shape is that of the checkpoint, how it is trained that of the size."""
    plan, recipe = read_plan(PlanConfig(size="7b", init=str(checkpoint), processes=8))
    assert plan.config == ModelConfig.read(checkpoint / "config.json")
    assert (plan.zero, plan.max_tokens_per_microbatch, recipe.global_batch_size) == (
        2, 8_192, read_config("size", "7b")["finetune"]["global_batch_size"])
    assert read_plan(PlanConfig(init=str(checkpoint)))[1].global_batch_size == 32


def test_the_recipe_may_offload(monkeypatch):
    monkeypatch.setattr(settings, "read_config", lambda *_: {"finetune": {"zero": 2, "offload": True}})
    assert read_plan(PlanConfig(size="7b", processes=8))[0].offload
    assert not read_plan(PlanConfig(size="7b", processes=8, offload=False))[0].offload


def test_the_recipe_says_what_is_trained(monkeypatch):
    adapted = read_plan(PlanConfig(size="7b", method="lora:lora_rank=8"))[0]
    recipe = read_config("size", "7b")["finetune"] | {"train": ["lora"], "lora_rank": 8}
    monkeypatch.setattr(settings, "read_config", lambda *_: {"finetune": recipe})
    plan, _ = read_plan(PlanConfig(size="7b"))
    assert plan.num_trained == adapted.num_trained < plan.config.num_parameters / 100
    assert plan.memory() == adapted.memory()


def test_a_size_that_does_not_say_when_it_grows(monkeypatch):
    recipe = {name: table for name, table in read_config("size", "tiny").items() if name != "growth"}
    monkeypatch.setattr(pretraining, "read_config", lambda *_: recipe)
    with pytest.raises(UserError, match="the size tiny has no at_tokens in the table \\[growth\\]"):
        main(PlanConfig(size="tiny", phase="stack"))


def test_it_suggests_what_to_change(capsys):
    main(PlanConfig(size="7b", processes=8, zero=3))
    assert "it fits, with " in capsys.readouterr().out
    main(PlanConfig(size="7b", processes=8, gpu_memory=80))  # as fine-tuned by default, without checkpointing
    printed = capsys.readouterr().out
    assert "gradient checkpointing off, reduction of gradients overlapped, blocks not compiled\n" in printed
    assert "it fits, with " in printed
    main(PlanConfig(size="7b", processes=8, zero=1, gpu_memory=45, gradient_checkpointing=True))
    assert "it does not fit in 95% of the memory: with --zero 2 it does" in capsys.readouterr().out
    main(PlanConfig(size="7b", processes=1, zero=2, gradient_checkpointing=True))
    assert "it does not fit in 95% of the memory: with --offload true it does" in capsys.readouterr().out
    main(PlanConfig(size="7b", processes=1, zero=2, gpu_memory=4))
    assert "95% of the memory: take more processes, or GPUs with more memory" in capsys.readouterr().out


def test_time_is_a_range_of_what_published_runs_reach(capsys):
    def rows(**settings):
        main(PlanConfig(size="7b", **settings))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
        return {line[2:32].strip(): re.findall(r"[\d,.]*\d", line[32:]) for line in lines}

    step = plan_step(read_plan(PlanConfig(size="7b", processes=16))[0], 256)
    slow, fast = GPUS["h100"].utilisation
    printed = rows(processes=16)
    assert printed["computation, 1 × 2,048 tokens"] == [f"{step.computation(GPUS['h100'], share):.2f}"
                                                        for share in (fast, slow)]
    assert printed["speed"] == [f"{256 * 128 / step.seconds(GPUS['h100'], share):,.0f}" for share in (slow, fast)]
    one = rows(processes=16, gpu="a100", network=10, utilisation=0.5)
    gpu = replace(GPUS["a100"], network=1e10)
    assert one["step"] == [f"{step.seconds(gpu, 0.5):.2f}"]
    assert one["each GPU"] == [f"{256 * 128 / step.seconds(gpu, 0.5) / 16:,.0f}"]
    assert "speed" not in rows(device="cpu")
    idle = plan_step(read_plan(PlanConfig(size="7b", processes=512))[0], 256)  # half of the GPUs have no sample
    assert rows(processes=512)["speed"][0] == f"{256 * 128 / idle.seconds(GPUS['h100'], slow):,.0f}"


def test_the_recipe_gives_depth_and_dtype():
    base, recipe = read_plan(PlanConfig(size="7b", phase="base"))
    assert (base.config.num_hidden_layers, recipe.dtype) == (8, "bf16")
    assert read_plan(PlanConfig(size="study"))[0].dtype == "fp32"
    assert read_plan(PlanConfig(size="study", dtype="bf16"))[0].dtype == "bf16"


@pytest.mark.parametrize(("method", "said"), [
    ("finetune", False), ("lora", False), ("input_kl", True), ("replay", True)])
def test_time_of_a_method_that_takes_more_is_not_planned(capsys, method, said):
    main(PlanConfig(size="7b", method=method))
    assert ("TFLOP/s, without what the method adds\n" in capsys.readouterr().out) == said


def test_a_method_may_have_settings(capsys):
    ranks = [read_plan(PlanConfig(size="7b", method=method))[0].num_trained
             for method in ("lora", "lora:lora_rank=8", "lora:lora_rank=32")]
    assert ranks[0] == 2 * ranks[1] == ranks[2] / 2
    for own, same in (("finetune:input_kl=1.0", "input_kl"), ("finetune:ewc_strength=100", "ewc"), ("finetune", None)):
        assert read_plan(PlanConfig(size="7b", method=own))[0].memory() == read_plan(
            PlanConfig(size="7b", method=same))[0].memory()
    main(PlanConfig(size="7b", method="finetune:rehearsal=0.1"))
    assert "TFLOP/s, without what the method adds\n" in capsys.readouterr().out


@pytest.mark.parametrize(("flags", "said"), [
    (["--size", "7b", "--method", "lora:lora_rank=99999"], "lora_rank is 99999, more than the"),
    (["--size", "7b", "--phase", "llm", "--method", "ewc"], "a method is for fine-tuning, and the phase is llm"),
    (["--init", "runs/tiny/llm/m9"], "runs/tiny/llm/m9 is neither a checkpoint directory nor a Hub id"),
    (["--size", "410m"], "Or give a directory with the shape of the model as --init, or INIT"),
    (["--size", "7b", "--method", "lra"], "unknown method 'lra'"),
    ([], "neither --size nor --init says which model to train"),
    (["--init", "x", "--phase", "llm"], "the phase llm is a table of a size's file: give --size"),
    (["--size", "7b", "--processes", "0"], "processes is 0"),
    (["--size", "7b", "--utilisation", "40"], "utilisation is 40.0, expected a number from 0.001 to 1"),
    (["--size", "7b", "--tokens", "1e308"], "tokens is 1e+308, expected a number from 1 to 1e+18"),
    (["--size", "7b", "--network", "1e-300"], "network is 1e-300, expected a number from 0.001"),
    (["--size", "7b", "--gpu", "abacus"], "gpu is 'abacus', expected one of"),
    (["--size", "7b", "--gpu_memory", "inf"], "gpu_memory is inf, expected a finite number"),
    (["--size", "7b", "--sample_tokens", "9223372036854775806"], "sample_tokens is 9223372036854775806, expected"),
    (["--size", "7b", "--max_tokens_per_microbatch", "9223372036854775806"], "expected a number from 1 to 1073741824"),
    (["--size", "7b", "--zero", "1", "--offload"], "--offload needs --zero 2 or 3"),
    (["--size", "410m"], "StackLLM_410M_750BToken is not a directory here and cannot be downloaded from the Hub"),
    (["--size", "7b", "--zero", "0"], "ZeRO 0 keeps no fp32 master weights"), (["--size", "9b"], "unknown size '9b'")])
def test_invalid_plans(refusal, flags, said):
    assert said in refusal((PlanConfig, main), *flags)
