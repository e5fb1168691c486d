"""Methods against forgetting: under every ZeRO stage, against plain PyTorch, and what they refuse."""
import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import settings
from common.files import UserError
from common.provenance import describe, identity, lineage
from corpus.tasks import SFTDataset, read_task
from model.checkpoint import checkpoint_digest
from model.config import ModelConfig
from model.hub import load_model
from model.parameter_files import ParameterFiles, find_parameter_files
from model.posterior import standard_normal
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, run_script
from training.batches import global_batch
from training.data import task_of
from training.methods import AnchoredAdamW, check_method, prior_files, side_files
from training.rehearsal import check_earlier_tasks, earlier_tasks, rehearsed
from training.train_config import TrainConfig

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
FLAGS = ["--task", "simp", "--global_batch_size", "8", "--learning_rate", "5e-3", "--max_eval_samples", "6",
         "--max_source_length", "128", "--max_target_length", "64", "--max_train_samples", "60", "--dtype", "fp32"]
PROBABILISTIC = ["--optimizer", "ivon", "--learning_rate", "0.02", "--max_grad_norm", "1", "--prior_precision",
                 "1e4", "--clip_radius", "1"]


@pytest.fixture(scope="module")
def train(checkpoint, simp_file):
    """A function that runs train.py for some steps, from the checkpoint or from another one."""
    def call(out, *flags, init=checkpoint, steps=4, interrupted=None, launcher=()):
        script = ["tests/interrupted.py", *interrupted, "train.py"] if interrupted else ["train.py"]
        run_script(*script, "--init", init, "--data", simp_file, "--out", out, *FLAGS, "--max_steps", steps,
                   *flags, launcher=launcher, check=not interrupted)
        return out
    return call


@pytest.fixture(scope="module")
def first(train, tmp_path_factory):
    """A stage that was trained with IVON, in one process without ZeRO."""
    return train(tmp_path_factory.mktemp("first") / "m1-simp", *PROBABILISTIC, "--zero", "0")


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line.get("loss", line.get("eval_loss")) for line in lines]


def values(directory, name, kind, shapes):
    """What a stage has written of a kind, by parameters."""
    parts = ParameterFiles(find_parameter_files(directory, name), "it")
    found = {key: torch.empty(shape.numel()) for key, shape in shapes.items()}
    for key, into in found.items():
        parts.read(kind, key, 0, into)
    return found


def shapes_of(directory):
    return {name: tensor.shape for name, tensor in load_file(directory / "model.safetensors").items()}


def close(a, b, tolerance=1e-4):
    return all((a[name] - b[name]).norm() <= tolerance * b[name].norm() for name in b) and a.keys() == b.keys()


# ------------------------------------------------------------------------------------------------------- probabilistic

@pytest.mark.parametrize(("zero", "launcher"), [("2", TORCHRUN), ("3", TORCHRUN)], ids=["ZeRO 2", "ZeRO 3"])
def test_two_tasks_are_the_same_whatever_carries_them_out(train, first, tmp_path, zero, launcher):
    """The second task's prior is the first one's posterior, written by one process and read by two, or otherwise."""
    shapes, expected = shapes_of(first), first.with_name("m2-simp")
    again = train(tmp_path / "m1-simp", *PROBABILISTIC, "--zero", zero, launcher=launcher)
    assert losses(again) == pytest.approx(losses(first), rel=2e-6)
    for kind in ("mean", "precision"):
        assert close(values(again, "posterior", kind, shapes), values(first, "posterior", kind, shapes))
    if not expected.exists():
        train(expected, *PROBABILISTIC, "--tau", "0.3", "--zero", "0", init=first)
    found = train(tmp_path / "m2-simp", *PROBABILISTIC, "--tau", "0.3", "--zero", zero, init=first, launcher=launcher)
    assert losses(found) == pytest.approx(losses(expected), rel=2e-6)
    if zero == "3":
        found = train(tmp_path / "m3-simp", *PROBABILISTIC, "--tau", "0.3", "--zero", "0", init=again)
        assert losses(found) == pytest.approx(losses(expected), rel=1e-5)


def test_the_first_step_by_hand(train, checkpoint, simp_file, tmp_path):
    """One step: the loss is that of the weights with the noise of (seed, step), the update IVON's at their gradient."""
    out = train(tmp_path / "m1", *PROBABILISTIC, "--max_grad_norm", "0", steps=1)
    model, samples = load_model(checkpoint), 1e7
    delta = 1e4 / samples
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    noise = {name: torch.cat([part for *_, part in standard_normal((42, 0), name, p.numel(), 0, p.numel(), "cpu")])
             .view_as(p) for name, p in before.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += noise[name] / (samples * (1e-3 + delta)) ** 0.5
    loss = mean_loss(model, checkpoint, simp_file, global_batch(42, 60, 0, 8))
    loss.backward()
    assert losses(out)[1] == pytest.approx(loss.item(), rel=1e-5)
    mean, precision = (values(out, "posterior", kind, shapes_of(out)) for kind in ("mean", "precision"))
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        estimate = gradient * noise[name] * (samples * (1e-3 + delta)) ** 0.5
        curvature = 1e-3 + 1e-3 * (estimate - 1e-3) + 0.5e-6 * (estimate - 1e-3) ** 2 / (1e-3 + delta)
        expected = before[name] - 0.02 * (gradient / (curvature + delta)).clamp(-1, 1)
        assert torch.allclose(mean[name].view_as(expected), expected, rtol=1e-3, atol=1e-4), name
        assert torch.allclose(precision[name].view_as(expected), samples * (curvature + delta), rtol=1e-2), name


def mean_loss(model, checkpoint, simp_file, indices):
    """The loss of a batch of the first 60 training samples, one sample at a time."""
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    samples = [data[index] for index in indices]
    total = 0.0
    for tokens, start in samples:
        ids = torch.from_numpy(tokens)
        total = total + torch.nn.functional.cross_entropy(model(ids[None, :-1])[0, start - 1:], ids[start:],
                                                          reduction="sum")
    return total / sum(len(tokens) - start for tokens, start in samples)


@pytest.mark.parametrize(("zero", "launcher"), [("0", ()), ("2", TORCHRUN), ("3", TORCHRUN)])
def test_the_noise_is_taken_back_bit_for_bit(train, checkpoint, tmp_path, zero, launcher):
    """At a rate at which no weight moves, three steps leave the weights as they were."""
    out = train(tmp_path / "m1", *PROBABILISTIC, "--learning_rate", "1e-30", "--zero", zero, steps=3, launcher=launcher)
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    found = losses(out)
    assert found[0] == found[-1]  # evaluated on the same weights
    assert len(set(found[1:-1])) == 3


def test_what_a_killed_attempt_has_left_is_not_read(train, tmp_path):
    """Such as the parts that two processes wrote, where one goes on."""
    flags = *PROBABILISTIC, "--save_minutes", "0"
    train(tmp_path / "m1", *flags, steps=3, interrupted=(3, "SIGKILL", 0))
    (tmp_path / "m1.partial/posterior-00002-of-00002.safetensors").write_bytes(b"half")
    out = train(tmp_path / "m1", *flags, steps=3)
    assert [path.name for path in find_parameter_files(out, "posterior")] == ["posterior-00001-of-00001.safetensors"]


@pytest.mark.parametrize("zero", ["0", "1"])
def test_a_batch_that_is_passed_over_leaves_the_mean(train, tmp_path, zero):
    """From the eleventh step on every loss is above the limit: the weights stay those of ten steps."""
    flags = *PROBABILISTIC, "--skip_loss_above", "1e-9", "--zero", zero
    ten, more = train(tmp_path / "ten", *flags, steps=10), train(tmp_path / "more", *flags, steps=12)
    a, b = (load_file(out / "model.safetensors") for out in (ten, more))
    assert all(torch.equal(a[name], b[name]) for name in a)
    lines = [json.loads(line) for line in (more / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "skipped_samples" in line] == [11, 12]


def test_a_killed_run_goes_on_bit_for_bit(train, first, tmp_path):
    flags = *PROBABILISTIC, "--zero", "2", "--dtype", "bf16", "--save_minutes", "0", "--tau", "0.5"
    whole = train(tmp_path / "whole", *flags, init=first, launcher=TORCHRUN)
    train(tmp_path / "cut", *flags, init=first, launcher=TORCHRUN, interrupted=(3, "SIGKILL", "all"))
    cut = train(tmp_path / "cut", *flags, init=first, launcher=TORCHRUN)
    assert json.loads((cut / "run.json").read_text())["resumed"][0]["after_step"] == 2
    assert losses(cut) == losses(whole)
    for kind in ("mean", "precision"):
        a, b = (values(out, "posterior", kind, shapes_of(whole)) for out in (cut, whole))
        assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_prior_is_the_posterior_before_in_full_precision_and_tempered(train, tmp_path):
    """The first task in bf16, whose checkpoint is rounded; the second one moves nothing and keeps the curvature."""
    first = train(tmp_path / "m1", *PROBABILISTIC, "--dtype", "bf16", "--zero", "1", steps=2)
    second = train(tmp_path / "m2", *PROBABILISTIC, "--learning_rate", "1e-30", "--sample_params", "false", "--tau",
                   "0.3", init=first, steps=1)
    shapes, weights = shapes_of(first), load_file(first / "model.safetensors")
    for name, mean in values(first, "posterior", "mean", shapes).items():
        assert torch.equal(values(second, "posterior", "mean", shapes)[name], mean)
        assert not torch.equal(weights[name].float().view(-1), mean)
    before, after = (values(stage, "posterior", "precision", shapes) for stage in (first, second))
    for name, precision in after.items():
        torch.testing.assert_close(precision, 1e7 * 1e-3 + 0.3 * before[name])


def test_the_posterior_is_part_of_what_a_checkpoint_is(first, tmp_path):
    """Of one that a run reads it from: another run's parent is the same without it."""
    copy = shutil.copytree(first, tmp_path / "copy")
    path, = find_parameter_files(copy, "posterior")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    probabilistic, ewc = TrainConfig(optimizer="ivon"), TrainConfig(ewc_strength=1.0)
    assert checkpoint_digest(copy, side_files(probabilistic)) != checkpoint_digest(first, side_files(probabilistic))
    for cfg in (ewc, TrainConfig(), dataclasses.replace(probabilistic, prior="weights")):
        assert checkpoint_digest(copy, side_files(cfg)) == checkpoint_digest(first, side_files(cfg))


# ------------------------------------------------------------------------------------------------------- deterministic

def test_fisher_information_averaging_and_pulls_under_other_stages(train, checkpoint, simp_file, tmp_path):
    flags = ["--ewc_strength", "1", "--l2_sp_rate", "0.1", "--wise_ft_alpha", "0.7", "--fisher_samples", "5"]
    runs = [train(tmp_path / "one", *flags, "--zero", "0"), train(tmp_path / "two", *flags, "--zero", "3",
                                                                  launcher=TORCHRUN)]
    assert losses(runs[1]) == pytest.approx(losses(runs[0]), rel=2e-6)
    found = [values(run, "fisher", "fisher", shapes_of(run)) for run in runs]
    assert close(found[1], found[0], 1e-3)
    model = load_model(runs[0])
    expected = {name: torch.zeros(parameter.numel()) for name, parameter in model.named_parameters()}
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    for index in global_batch(42, 60, 0, 5):
        model.zero_grad()
        tokens = len(data[index][0]) - data[index][1]
        (mean_loss(model, checkpoint, simp_file, [index]) * tokens).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.view(-1) ** 2 / 5
    assert close(found[0], expected, 1e-3)
    seconds = [train(tmp_path / "second", *flags, init=runs[0], steps=2),
               train(tmp_path / "other", *flags, "--zero", "2", init=runs[0], steps=2, launcher=TORCHRUN)]
    assert losses(seconds[1]) == pytest.approx(losses(seconds[0]), rel=2e-6)
    more, other = (values(second, "fisher", "fisher", shapes_of(second)) for second in seconds)
    assert close(other, more, 1e-3)  # to which the new task's is added
    assert all((more[name] >= found[0][name]).all() for name in more)
    assert any((more[name] > found[0][name]).any() for name in more)


def test_a_killed_run_with_pulls_goes_on_bit_for_bit(train, tmp_path):
    flags = ["--ewc_strength", "10", "--l2_sp_rate", "0.1", "--wise_ft_alpha", "0.7", "--fisher_samples", "3",
             "--zero", "1", "--dtype", "bf16", "--save_minutes", "0"]
    first = train(tmp_path / "first", *flags, launcher=TORCHRUN, steps=2)
    whole = train(tmp_path / "whole", *flags, init=first, launcher=TORCHRUN)
    train(tmp_path / "cut", *flags, init=first, launcher=TORCHRUN, interrupted=(3, "SIGKILL", "all"))
    cut = train(tmp_path / "cut", *flags, init=first, launcher=TORCHRUN)
    assert losses(cut) == losses(whole)
    a, b = (values(out, "fisher", "fisher", shapes_of(whole)) for out in (cut, whole))
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_averaging_after_training(train, checkpoint, tmp_path):
    trained = load_file(train(tmp_path / "trained") / "model.safetensors")
    averaged = train(tmp_path / "averaged", "--wise_ft_alpha", "0.25")
    before, found = load_file(checkpoint / "model.safetensors"), load_file(averaged / "model.safetensors")
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * before[name] + 0.25 * trained[name])
    assert losses(averaged)[1:-1] == losses(tmp_path / "trained")[1:-1]
    assert losses(averaged)[-1] != losses(tmp_path / "trained")[-1]  # the eval loss is that of the result


def test_pulls_by_hand():
    """AdamW at the gradient of the loss and the penalty; then a share of the way back."""
    start, fisher = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, 4.0])
    w, v = torch.nn.Parameter(torch.tensor([2.0, 2.5, 2.0])), torch.nn.Parameter(torch.tensor([2.0, 2.5, 2.0]))
    ours, plain = AnchoredAdamW([w], 0.1), torch.optim.AdamW([v], 0.1)
    ours.anchors, ours.fisher, ours.strength, ours.rate = {w: start}, {w: fisher}, 3.0, 0.2
    for _ in range(3):
        w.grad = torch.cos(w.detach())
        ours.step()
        plain.zero_grad()
        (torch.sin(v).sum() + 3.0 / 2 * (fisher * (v - start) ** 2).sum()).backward()
        plain.step()
        with torch.no_grad():
            v.lerp_(start, 0.2)
        torch.testing.assert_close(w, v)


# ----------------------------------------------------------------------------------------------------------- rehearsal

@pytest.fixture
def chain(checkpoint, simp_file, tmp_path):
    """A stage that was trained on two files of their own, as its run.json has it."""
    items, tasks = read_task(simp_file)[0], []
    for task, limit in (("simp", 40), ("empd", None)):
        data, stage = tmp_path / f"{task}.json", tmp_path / "m2-empd"
        split = [item | {"output": f"{task} {index}"} for index, item in enumerate(items["train"])]
        data.write_text(json.dumps(items | {"train": split}))
        tasks.append(task_of(TrainConfig(task=task, data=str(data), max_train_samples=limit)))
    shutil.copytree(checkpoint, stage)
    (stage / "run.json").write_text(json.dumps({"lineage": {"tasks": tasks}}))
    return stage


def test_a_share_of_every_earlier_task_is_trained_on_again(chain, simp_file):
    cfg, past = TrainConfig(data=str(simp_file), rehearsal=0.05), lineage(chain)
    picked = [item["output"].split() for item in rehearsed(cfg, past)]
    assert [task for task, _ in picked] == ["simp"] * 2 + ["empd"] * round(0.05 * 112)
    assert all(int(index) < 40 for task, index in picked if task == "simp")
    assert len({tuple(pair) for pair in picked}) == len(picked)
    assert rehearsed(cfg, past) == rehearsed(cfg, past)
    assert rehearsed(dataclasses.replace(cfg, seed=1), past) != rehearsed(cfg, past)
    assert rehearsed(dataclasses.replace(cfg, rehearsal=0.0), past) == []
    own = dataclasses.replace(cfg, data=past["tasks"][1]["data"])  # a task that comes again rehearses the others
    assert {item["output"].split()[0] for item in rehearsed(own, past)} == {"simp"}
    again = {"tasks": [*past["tasks"], past["tasks"][0] | {"max_train_samples": 20}]}  # and counts from its last time
    assert [task["max_train_samples"] for task in earlier_tasks(cfg, again)] == [20, None]


def test_rehearsal_that_cannot_be(chain, checkpoint, simp_file, tmp_path):
    cfg = TrainConfig(init=str(checkpoint), data=str(simp_file), rehearsal=0.05)
    with pytest.raises(UserError, match="was fine-tuned on no task before: leave it out for the first task"):
        earlier_tasks(cfg, lineage(checkpoint))
    path, past = tmp_path / "simp.json", lineage(chain)
    check_earlier_tasks(cfg, past)
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"simp.json, which simp was learned from, but it has changed since"):
        check_earlier_tasks(cfg, past)
    path.unlink()
    with pytest.raises(UserError, match="but it does not exist any more"):
        check_earlier_tasks(cfg, past)


def test_rehearsal_in_a_run(train, chain, checkpoint, tmp_path):
    out = train(tmp_path / "m3", "--rehearsal", "0.1", init=chain, steps=2, launcher=TORCHRUN)
    run, before = (json.loads((path / "run.json").read_text()) for path in (out, chain))
    assert run["rehearsed"] == [task["data_digest"] for task in before["lineage"]["tasks"]]
    assert [task["task"] for task in run["lineage"]["tasks"]] == ["simp", "empd", "simp"]
    words = ["train.py", "--init", chain, "--out", tmp_path / "m4", *FLAGS, "--max_steps", "1", "--rehearsal", "0.1"]
    result = run_script(*words, "--data", tmp_path / "simp.json")
    assert "71 training samples, 11 of them of earlier tasks" in result.stdout  # not of its own
    (tmp_path / "empd.json").unlink()  # of no use to a stage that is finished
    assert "is finished already" in run_script(*words, "--data", tmp_path / "simp.json").stdout


# -------------------------------------------------------------------------------------------------------- what it says

@pytest.mark.parametrize(("flags", "said"), [
    (["--tau", "0"], "tau is 0.0, expected a number above 0 and at most 1"),
    (["--tau", "1.5"], "tau is 1.5"), (["--tau", "nan"], "tau is nan"),
    (["--method", "ewk"], "unknown method 'ewk', expected one of averaging, constant"),
    (["--rehearsal", "1.1"], "rehearsal is 1.1, expected a number from 0 to 1"),
    (["--optimizer", "ivon", "--weight_decay", "0.1"], "weight_decay is 0.1, but with IVON the prior"),
    (["--method", "vcl", "--ewc_strength", "1"], "ewc_strength pull towards the weights of --init, as the "),
    (["--method", "vcl", "--task", "none"], "mode is for fine-tuning: give --task"),
    (["--fisher_samples", "0"], "fisher_samples is 0, expected at least 1"),
    (["--curvature", "0"], "curvature is 0.0, expected a number above 0")])
def test_settings_that_contradict_one_another(flags, said):
    with pytest.raises(UserError) as caught:
        settings.load(TrainConfig, ["--task", "simp", "--init", "x", "--data", "x", "--out", "x", *flags], "")
    assert said in str(caught.value)


def test_a_method_lies_between_the_sizes_recipe_and_the_flags():
    words = ["--config", "configs/train/finetune.toml", "--size", "tiny", "--task", "simp", "--init", "x", "--data",
             "x", "--out", "x", "--method", "vcl"]
    cfg = settings.load(TrainConfig, words, "")
    assert (cfg.optimizer, cfg.learning_rate, cfg.weight_decay, cfg.num_train_epochs) == ("ivon", 1e-3, 0.0, 10.0)
    assert settings.load(TrainConfig, [*words, "--learning_rate", "0.5"], "").learning_rate == 0.5
    run = describe(dataclasses.asdict(cfg), "parent", "data")  # a run is its settings, by whatever name they came
    assert identity(run) == identity(describe(dataclasses.asdict(cfg) | {"method": None}, "parent", "data"))
    for path in (ROOT / "configs/method").glob("*.toml"):
        assert settings.load(TrainConfig, [*words[:-1], path.stem], "").method == path.stem


def test_priors_that_cannot_be(checkpoint, first, tmp_path):
    config = ModelConfig.read(checkpoint / "config.json")
    cfg = TrainConfig(optimizer="ivon", prior="posterior")
    with pytest.raises(UserError, match="has no posterior to be the prior: fine-tune it with IVON first"):
        check_method(cfg, checkpoint, config, {})
    assert prior_files(dataclasses.replace(cfg, prior="auto"), checkpoint) == []
    assert prior_files(dataclasses.replace(cfg, prior="weights"), first) == []
    assert prior_files(dataclasses.replace(cfg, prior="auto"), first) == find_parameter_files(first, "posterior") != []
    check_method(cfg, first, config, {})
    with pytest.raises(UserError, match="is that of another model: 1,536 values of mean of model.layers.0.mlp.down_pro"
                                        "j.weight, expected 2,048"):
        check_method(cfg, first, dataclasses.replace(config, intermediate_size=64), {})
    tensors = load_file(find_parameter_files(first, "posterior")[0])
    name = tmp_path / "posterior-00001-of-00001.safetensors"
    save_file({key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}, name)
    with pytest.raises(UserError, match="0 values of mean of model.layers.1.input_layernorm.weight, expected 32"):
        check_method(cfg, tmp_path, config, {})
    name.rename(tmp_path / "posterior-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="holds 1 of the 2 files posterior-"):
        check_method(cfg, tmp_path, config, {})
    save_file({"mean": torch.zeros(3)}, name)
    with pytest.raises(UserError, match="is no file of this program: it holds 'mean'"):
        ParameterFiles([name], "it")


def test_ewc_needs_what_the_stage_before_measured(chain, checkpoint):
    config, cfg = ModelConfig.read(checkpoint / "config.json"), TrainConfig(ewc_strength=1.0)
    check_method(cfg, checkpoint, config, lineage(checkpoint))  # the first task
    with pytest.raises(UserError, match="has no Fisher information of empd, which it was trained on: train it "):
        check_method(cfg, chain, config, lineage(chain))


def test_parts_are_read_across_files(tmp_path):
    save_file({"fisher/w@0": torch.arange(4.0)}, tmp_path / "fisher-00001-of-00002.safetensors")
    save_file({"fisher/w@4": torch.arange(4.0, 10.0)}, tmp_path / "fisher-00002-of-00002.safetensors")
    parts = ParameterFiles(find_parameter_files(tmp_path, "fisher"), "it")
    parts.check(("fisher",), {"w": 10})
    into = torch.empty(5)
    parts.read("fisher", "w", 2, into)
    assert into.tolist() == np.arange(2.0, 7.0).tolist()
