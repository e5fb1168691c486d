"""Methods against forgetting equal plain PyTorch under every ZeRO stage, and refuse what they cannot use."""
import dataclasses
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from common import settings
from common.files import UserError, digest
from common.provenance import data_digest, describe, differences, read_lineage
from corpus.tasks import SFTDataset, read_task
from model.checkpoint import checkpoint_digest
from model.config import ModelConfig
from model.hub import load_model
from model.noise import standard_normal
from model.parameter_files import ParameterFiles, find_parameter_files, open_side_files
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, losses, read_metrics
from training import optimizers
from training.batches import sample_indices
from training.methods import find_side_files, num_updates, side_file_name
from training.optimizers import AnchoredAdamW
from training.rehearsal import check_earlier_tasks, earlier_tasks, rehearsed_items
from training.run import TASK_SEEDS
from training.train_config import TrainConfig

FLAGS = ["--max_train_samples", "60"]
IVON = ["--optimizer", "ivon", "--learning_rate", "0.02", "--max_grad_norm", "1", "--prior_precision", "1e4",
        "--clip_radius", "1"]


@pytest.fixture(scope="module")
def run(train):
    """A function that trains for some steps and returns the run's directory."""
    def call(out, *flags, steps=4, **options):
        train(out, "--max_steps", steps, *flags, **options)
        return out
    return call


@pytest.fixture(scope="module")
def ivon_stage(run, tmp_path_factory):
    """A stage trained with IVON, in one process without ZeRO."""
    return run(tmp_path_factory.mktemp("ivon") / "m1-simp", *IVON, "--zero", "0")


@pytest.fixture(scope="module")
def plain(run, tmp_path_factory):
    """A stage trained without a method."""
    return run(tmp_path_factory.mktemp("plain") / "m1-simp")


def read_values(stage, name, kind):
    """The values of one kind in a stage's side files, {parameter: flattened tensor}."""
    files = ParameterFiles(find_parameter_files(stage, name), "it")
    values = {key: torch.empty(shape.numel()) for key, shape in shapes_of(stage).items()}
    for key, into in values.items():
        files.read(kind, key, 0, into)
    return values


def equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in b) and a.keys() == b.keys()


def shapes_of(directory):
    return {name: tensor.shape for name, tensor in load_file(directory / "model.safetensors").items()}


def close(a, b, tolerance=1e-4):
    return all((a[name] - b[name]).norm() <= tolerance * b[name].norm() for name in b) and a.keys() == b.keys()


# ---------------------------------------------------------------------------------------------------------------- IVON

@pytest.mark.parametrize("zero", ["2", "3"])
def test_two_tasks_do_not_depend_on_processes_and_zero_stage(run, train, ivon_stage, tmp_path, zero):
    """The first task's posterior is the second one's prior, also if other numbers of processes write and read it."""
    second = *IVON, "--tau", "0.3", "--zero"
    m1 = run(tmp_path / "m1-simp", *IVON, "--zero", zero, launcher=2)
    assert losses(m1) == pytest.approx(losses(ivon_stage), rel=2e-6)
    for kind in ("mean", "precision"):
        assert close(read_values(m1, "posterior", kind), read_values(ivon_stage, "posterior", kind))
    if not (expected := ivon_stage.with_name("m2-simp")).exists():
        run(expected, *second, "0", init=ivon_stage)
    m2 = tmp_path / "m2-simp"
    printed = train(m2, "--max_steps", "4", *second, zero, init=ivon_stage, launcher=2).stdout
    assert f"prior: the posterior of {ivon_stage}\n" in printed
    assert losses(m2) == pytest.approx(losses(expected), rel=2e-6)
    if zero == "3":
        other = run(tmp_path / "m3-simp", *second, "0", init=m1)
        assert losses(other) == pytest.approx(losses(expected), rel=1e-5)


def test_the_first_ivon_step(run, checkpoint, simp_file, tmp_path):
    """The loss is that of the weights with the noise of (seed, step); the update is IVON's with their gradient."""
    out = run(tmp_path / "m1", *IVON, "--max_grad_norm", "0", steps=1)
    model, ess = load_model(checkpoint), 1e7
    delta = 1e4 / ess
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    noise = {name: torch.cat([part for *_, part in standard_normal((42, 0), name, p.numel(), 0, p.numel(), "cpu")])
             .view_as(p) for name, p in before.items()}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += noise[name] / (ess * (1e-3 + delta)) ** 0.5
    loss = mean_loss(model, checkpoint, simp_file, sample_indices(42, 60, 0, 8))
    loss.backward()
    assert losses(out)[1, "loss"] == pytest.approx(loss.item(), rel=1e-5)
    mean, precision = (read_values(out, "posterior", kind) for kind in ("mean", "precision"))
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        estimate = gradient * noise[name] * (ess * (1e-3 + delta)) ** 0.5
        hess = 1e-3 + 1e-3 * (estimate - 1e-3) + 0.5e-6 * (estimate - 1e-3) ** 2 / (1e-3 + delta)
        expected = before[name] - 0.02 * (gradient / (hess + delta)).clamp(-1, 1)
        assert torch.allclose(mean[name].view_as(expected), expected, rtol=1e-3, atol=1e-4), name
        assert torch.allclose(precision[name].view_as(expected), ess * (hess + delta), rtol=1e-2), name


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


@pytest.mark.parametrize(("zero", "launcher"), [("0", 1), ("2", 2), ("3", 2)])
def test_the_noise_is_removed_bit_for_bit(run, checkpoint, tmp_path, zero, launcher):
    """With a learning rate too small to change any weight, three steps leave the weights unchanged."""
    out = run(tmp_path / "m1", *IVON, "--learning_rate", "1e-30", "--zero", zero, steps=3, launcher=launcher)
    assert equal(*(load_file(path / "model.safetensors") for path in (out, checkpoint)))
    logged = losses(out)
    assert logged[0, "eval_loss"] == logged[3, "eval_loss"]
    assert len({logged[step, "loss"] for step in (1, 2, 3)}) == 3


def test_side_files_of_a_killed_run_are_removed(run, tmp_path):
    """Two processes have written them, and one process resumes."""
    flags = *IVON, "--save_minutes", "0"
    run(tmp_path / "m1", *flags, steps=3, interrupted=(3, "SIGKILL", 0))
    (tmp_path / "m1.partial/posterior-00002-of-00002.safetensors").write_bytes(b"half")
    out = run(tmp_path / "m1", *flags, steps=3)
    assert [path.name for path in find_parameter_files(out, "posterior")] == ["posterior-00001-of-00001.safetensors"]


@pytest.mark.parametrize("zero", ["0", "1"])
def test_a_skipped_step_leaves_the_mean_unchanged(run, tmp_path, zero):
    """From the eleventh step on, every loss is above the limit, so the weights are those of ten steps."""
    flags = *IVON, "--skip_loss_above", "1e-9", "--zero", zero
    ten, twelve = run(tmp_path / "ten", *flags, steps=10), run(tmp_path / "twelve", *flags, steps=12)
    assert equal(*(load_file(out / "model.safetensors") for out in (ten, twelve)))
    assert [entry["step"] for entry in read_metrics(twelve)[0] if "skipped_samples" in entry] == [11, 12]


def test_a_killed_ivon_run_resumes_bit_for_bit(run, ivon_stage, tmp_path):
    flags = *IVON, "--zero", "2", "--dtype", "bf16", "--save_minutes", "0", "--tau", "0.5"
    uninterrupted = run(tmp_path / "uninterrupted", *flags, init=ivon_stage, launcher=2)
    run(tmp_path / "resumed", *flags, init=ivon_stage, launcher=2, interrupted=(3, "SIGKILL", "all"))
    resumed = run(tmp_path / "resumed", *flags, init=ivon_stage, launcher=2)
    assert json.loads((resumed / "run.json").read_text())["resumed"][0]["after_step"] == 2
    assert losses(resumed) == losses(uninterrupted)
    for kind in ("mean", "precision"):
        assert equal(*(read_values(out, "posterior", kind) for out in (resumed, uninterrupted)))


def test_the_prior_is_the_tempered_fp32_posterior_of_the_stage_before(run, tmp_path):
    """The first task's bf16 checkpoint is rounded. The second task changes no weight and keeps the Hessian estimate."""
    m1 = run(tmp_path / "m1", *IVON, "--dtype", "bf16", "--zero", "1", steps=2)
    m2 = run(tmp_path / "m2", *IVON, "--learning_rate", "1e-30", "--sample_params", "false", "--tau", "0.3", init=m1,
             steps=1)
    means, weights = read_values(m1, "posterior", "mean"), load_file(m1 / "model.safetensors")
    assert equal(read_values(m2, "posterior", "mean"), means)
    assert not any(torch.equal(weights[name].float().view(-1), mean) for name, mean in means.items())
    before, after = (read_values(stage, "posterior", "precision") for stage in (m1, m2))
    for name, precision in after.items():
        torch.testing.assert_close(precision, 1e7 * 1e-3 + 0.3 * before[name])


def test_the_side_files_that_a_run_reads_are_identified(ivon_stage, tmp_path):
    copy = shutil.copytree(ivon_stage, tmp_path / "copy")
    path, = find_parameter_files(copy, "posterior")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    ivon, ewc = TrainConfig(optimizer="ivon"), TrainConfig(ewc_strength=1.0)
    assert digest(find_side_files(ivon, copy, {})) != digest(find_side_files(ivon, ivon_stage, {}))
    for cfg in (ewc, TrainConfig(), dataclasses.replace(ivon, prior="weights")):
        assert find_side_files(cfg, copy, {}) == []


# ------------------------------------------------------------------------------------------------------------ anchored

def test_fisher_information_wise_ft_and_l2_sp_under_other_zero_stages(run, checkpoint, simp_file, tmp_path):
    flags = ["--ewc_strength", "1", "--l2_sp_rate", "0.1", "--wise_ft_alpha", "0.7", "--fisher_samples", "5"]
    m1, m1_zero3 = (run(tmp_path / "m1", *flags, "--zero", "0"),
                    run(tmp_path / "m1-zero3", *flags, "--zero", "3", launcher=2))
    assert losses(m1_zero3) == pytest.approx(losses(m1), rel=2e-6)
    fisher = read_values(m1, "fisher", "fisher")
    assert close(read_values(m1_zero3, "fisher", "fisher"), fisher, 1e-3)
    model = load_model(m1)
    expected = {name: torch.zeros(parameter.numel()) for name, parameter in model.named_parameters()}
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    for index in sample_indices(42, 60, 0, 5):
        model.zero_grad()
        num_targets = len(data[index][0]) - data[index][1]
        (mean_loss(model, checkpoint, simp_file, [index]) * num_targets).backward()
        for name, parameter in model.named_parameters():
            expected[name] += parameter.grad.view(-1) ** 2 / 5
    assert close(fisher, expected, 1e-3)
    m2 = run(tmp_path / "m2", *flags, init=m1, steps=2)
    record = json.loads((m2 / "run.json").read_text())
    assert record["parent_digest"] == checkpoint_digest(m1)  # as evaluate.py and the report know m1
    assert record["side_digest"] == digest(find_side_files(TrainConfig(ewc_strength=1.0), m1, {}))
    m2_zero2 = run(tmp_path / "m2-zero2", *flags, "--zero", "2", init=m1, steps=2, launcher=2)
    assert losses(m2_zero2) == pytest.approx(losses(m2), rel=2e-6)
    total = read_values(m2, "fisher", "fisher")  # the sum over both tasks
    assert close(read_values(m2_zero2, "fisher", "fisher"), total, 1e-3)
    assert all((total[name] >= fisher[name]).all() for name in total)
    assert any((total[name] > fisher[name]).any() for name in total)


def test_a_killed_anchored_run_resumes_bit_for_bit(run, tmp_path):
    flags = ["--ewc_strength", "10", "--l2_sp_rate", "0.1", "--wise_ft_alpha", "0.7", "--fisher_samples", "3",
             "--zero", "1", "--dtype", "bf16", "--save_minutes", "0"]
    m1 = run(tmp_path / "m1", *flags, launcher=2, steps=2)
    uninterrupted = run(tmp_path / "uninterrupted", *flags, init=m1, launcher=2)
    run(tmp_path / "resumed", *flags, init=m1, launcher=2, interrupted=(3, "SIGKILL", "all"))
    resumed = run(tmp_path / "resumed", *flags, init=m1, launcher=2)
    assert losses(resumed) == losses(uninterrupted)
    assert equal(*(read_values(out, "fisher", "fisher") for out in (resumed, uninterrupted)))


def test_wise_ft_averages_after_training(run, plain, checkpoint, tmp_path):
    averaged = run(tmp_path / "averaged", "--wise_ft_alpha", "0.25")
    initial, last, average = (load_file(path / "model.safetensors") for path in (checkpoint, plain, averaged))
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.75 * initial[name] + 0.25 * last[name])
    expected, actual = losses(plain), losses(averaged)
    assert actual.pop((4, "eval_loss")) != expected.pop((4, "eval_loss"))  # the eval loss is that of the average
    assert actual == expected


@pytest.mark.parametrize(("zero", "processes"), [("0", 1), ("2", 2), ("3", 2)])
def test_fapm_undoes_the_changes_with_the_smallest_scores(run, plain, checkpoint, tmp_path, zero, processes):
    pruned = run(tmp_path / "pruned", "--fapm_sparsity", "0.8", "--zero", zero, launcher=processes)
    initial, last, result = (load_file(path / "model.safetensors") for path in (checkpoint, plain, pruned))
    for name, start in initial.items():
        change = (last[name] - start).abs()
        score = change - start.abs().mean() * change / start.abs()
        count = int(np.ceil(0.8 * start.numel())) if start.ndim == 2 else 0
        limit = score.flatten().sort().values[count - 1] if count else -torch.inf
        expected = torch.where(score <= limit, start, last[name])
        differs = ~torch.isclose(result[name], expected, rtol=1e-4, atol=1e-5)
        assert differs.sum() <= 2e-3 * start.numel(), name  # scores that are equal but for rounding
        assert (result[name] == start).sum() >= count


def test_anchored_adamw_equals_adamw_on_the_penalized_loss(monkeypatch):
    """AdamW on the loss plus the penalties of EWC and L2-SP, then decoupled L2-SP's move to the initial weights, which
    falls with the learning rate."""
    monkeypatch.setattr(optimizers, "BLOCK", 2)
    start, fisher = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 0.0, 4.0])
    w, v = torch.nn.Parameter(torch.tensor([2.0, 2.5, 2.0])), torch.nn.Parameter(torch.tensor([2.0, 2.5, 2.0]))
    anchored, plain = AnchoredAdamW([w], 0.1), torch.optim.AdamW([v], 0.1)
    anchored.anchors, anchored.fisher, anchored.rate = {w: start}, {w: fisher}, 2.0
    anchored.ewc_strength, anchored.l2_strength = 3.0, 0.7
    for lr in (0.1, 0.06, 0.01):
        for optimizer in (anchored, plain):
            optimizer.param_groups[0]["lr"] = lr
        w.grad = torch.cos(w.detach())
        anchored.step()
        plain.zero_grad()
        penalty = 3.0 / 2 * (fisher * (v - start) ** 2).sum() + 0.7 / 2 * ((v - start) ** 2).sum()
        (torch.sin(v).sum() + penalty).backward()
        plain.step()
        with torch.no_grad():
            v.lerp_(start, 2.0 * lr)
        torch.testing.assert_close(w, v)


# ----------------------------------------------------------------------------------------------------------- rehearsal

@pytest.fixture
def chain(checkpoint, simp_file, tmp_path):
    """A stage whose run.json says that it was trained on two tasks."""
    splits, tasks = read_task(simp_file)[0], []
    for task, limit in (("simp", 40), ("empd", None)):
        data, stage = tmp_path / f"{task}.json", tmp_path / "m2-empd"
        items = [item | {"output": f"{task} {index}"} for index, item in enumerate(splits["train"])]
        data.write_text(json.dumps(splits | {"train": items}))
        tasks.append({"task": task, "data": str(data), "data_digest": data_digest(data), "max_train_samples": limit})
    shutil.copytree(checkpoint, stage)
    (stage / "run.json").write_text(json.dumps({"lineage": {"tasks": tasks}}))
    return stage


def rehearsed(cfg, past):
    return rehearsed_items(cfg, earlier_tasks(cfg, data_digest(cfg.data), past))


def test_rehearsal_samples_every_earlier_task(chain, simp_file):
    cfg, past = TrainConfig(data=str(simp_file), rehearsal=0.05), read_lineage(chain)
    # 5% of the first 40 items and of all 112; an update that picked others would change the results of a seed
    assert [item["output"] for item in rehearsed(cfg, past)] == [
        "simp 32", "simp 7", "empd 78", "empd 105", "empd 92", "empd 74", "empd 97", "empd 6"]
    assert rehearsed(dataclasses.replace(cfg, seed=1), past) != rehearsed(cfg, past)
    assert rehearsed(dataclasses.replace(cfg, rehearsal=0.0), past) == []
    own = dataclasses.replace(cfg, data=past["tasks"][1]["data"])  # a task learned again
    assert {item["output"].split()[0] for item in rehearsed(own, past)} == {"simp"}
    repeated = {"tasks": [*past["tasks"], past["tasks"][0] | {"max_train_samples": 20}]}  # the last time counts
    assert [task["max_train_samples"] for task in earlier_tasks(cfg, data_digest(simp_file), repeated)] == [20, None]


def test_rehearsal_needs_the_data_of_earlier_tasks(chain, checkpoint, simp_file, tmp_path):
    cfg = TrainConfig(init=str(checkpoint), data=str(simp_file), rehearsal=0.05)
    assert earlier_tasks(cfg, "digest", read_lineage(checkpoint)) == []
    path, tasks = tmp_path / "simp.json", earlier_tasks(cfg, "digest", read_lineage(chain))
    check_earlier_tasks(tasks)
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match=r"simp.json, which simp was learned from, but it has changed since"):
        check_earlier_tasks(tasks)
    path.unlink()
    with pytest.raises(UserError, match="but it does not exist any more"):
        check_earlier_tasks(tasks)


def test_rehearsal_in_a_run(run, train, chain, checkpoint, tmp_path):
    out = run(tmp_path / "m3", "--rehearsal", "0.1", init=chain, steps=2, launcher=2)
    record, before = (json.loads((path / "run.json").read_text()) for path in (out, chain))
    assert record["rehearsed"] == [task["data_digest"] for task in before["lineage"]["tasks"]]
    assert [task["task"] for task in record["lineage"]["tasks"]] == ["simp", "empd", "simp"]
    flags, data = ["--max_steps", "1", "--rehearsal", "0.1"], tmp_path / "simp.json"
    result = train(tmp_path / "m4", *flags, init=chain, data=data)
    assert "71 training samples, 11 of them from earlier tasks" in result.stdout  # none of the run's own task
    items = read_task(data)[0]["train"][:60] + rehearsed(TrainConfig(data=str(data), rehearsal=0.1), before["lineage"])
    chosen = [items[index] for index in sample_indices(42, 71, 0, 8)]
    assert any(item["output"].startswith("empd") for item in chosen)
    (tmp_path / "chosen.json").write_text(json.dumps({"train": chosen, "eval": [], "test": []}))
    loss = mean_loss(load_model(chain), checkpoint, tmp_path / "chosen.json", range(8))
    assert losses(tmp_path / "m4")[1, "loss"] == pytest.approx(loss.item(), rel=1e-5)
    (tmp_path / "empd.json").unlink()  # a finished stage does not need it
    assert "is finished already" in train(tmp_path / "m4", *flags, init=chain, data=data).stdout


# ------------------------------------------------------------------------------------------------------------- refusals

@pytest.mark.parametrize(("flags", "message"), [
    (["--tau", "0"], "tau is 0.0, expected a number above 0 and at most 1"),
    (["--tau", "1.5"], "tau is 1.5"), (["--tau", "nan"], "tau is nan"),
    (["--method", "ewk"], "unknown method 'ewk', expected one of ewc, expansion, fapm"),
    (["--rehearsal", "1.1"], "rehearsal is 1.1, expected a number from 0 to 1"),
    (["--optimizer", "ivon", "--weight_decay", "0.1"], "weight_decay is 0.1, but IVON's prior takes its place"),
    (["--method", "vcl", "--ewc_strength", "1"], "ewc_strength pull towards the weights of --init, as IVON's prior"),
    (["--method", "vcl", "--task", "none"], "optimizer ivon is for fine-tuning: give --task"),
    (["--method", "vcl", "--prior", "weights", "--tau", "0.5"], "tau would change nothing with prior weights"),
    (["--method", "vcl", "--prior", "posterior", "--prior_precision", "1"],
     "prior_precision would change nothing with prior posterior"),
    (["--decay_ratio", "0.5"], "decay_ratio would change nothing with lr_scheduler_type constant"),
    (["--fisher_samples", "0"], "fisher_samples is 0, expected at least 1"),
    (["--hess_init", "0"], "hess_init is 0.0, expected a number above 0")])
def test_bad_settings_are_refused(flags, message):
    with pytest.raises(UserError) as error:
        settings.load(TrainConfig, ["--task", "simp", "--init", "x", "--data", "x", "--out", "x", *flags])
    assert message in str(error.value)


def test_a_method_overrides_the_recipe_of_the_size_and_flags_override_the_method():
    words = ["--config", "configs/train/finetune.toml", "--size", "tiny", "--task", "simp", "--init", "x", "--data",
             "x", "--out", "x", "--method", "vcl"]
    cfg = settings.load(TrainConfig, words)
    assert (cfg.optimizer, cfg.learning_rate, cfg.weight_decay, cfg.num_train_epochs) == ("ivon", 1e-3, 0.0, 10.0)
    assert settings.load(TrainConfig, [*words, "--learning_rate", "0.5"]).learning_rate == 0.5
    record = describe(dataclasses.asdict(cfg), "parent", "data")  # settings identify a run, the method's name does not
    assert differences(record, describe(dataclasses.asdict(cfg) | {"method": None}, "parent", "data"), {}) == []
    for path in (ROOT / "configs/method").glob("*.toml"):
        assert settings.load(TrainConfig, [*words[:-1], path.stem, "--replay_text", "x"]).method == path.stem


def open_required(cfg, source, config, lineage):
    """Opens the side files that a run reads from its initial checkpoint, as training.checks does."""
    find_side_files(cfg, source, lineage)
    return open_side_files(source, side_file_name(cfg), config)


def test_priors_that_do_not_fit_are_refused(checkpoint, ivon_stage, tmp_path):
    config = ModelConfig.read(checkpoint / "config.json")
    cfg = TrainConfig(optimizer="ivon", prior="posterior")
    with pytest.raises(UserError, match="no posterior to use as the prior: fine-tune it with --optimizer ivon"):
        open_required(cfg, checkpoint, config, {})
    auto, posterior = dataclasses.replace(cfg, prior="auto"), find_parameter_files(ivon_stage, "posterior")
    assert find_side_files(auto, checkpoint, {}) == []
    assert find_side_files(dataclasses.replace(cfg, prior="weights"), ivon_stage, {}) == []
    assert find_side_files(auto, ivon_stage, {}) == posterior != []
    open_required(cfg, ivon_stage, config, {})
    with pytest.raises(UserError, match="is that of another model: 1,536 values of mean of model.layers.0.mlp.down_pro"
                                        "j.weight, expected 2,048"):
        open_required(cfg, ivon_stage, dataclasses.replace(config, intermediate_size=64), {})
    tensors = load_file(posterior[0])
    path = tmp_path / "posterior-00001-of-00001.safetensors"
    save_file({key.replace("layers.1", "layers.7"): value for key, value in tensors.items()}, path)
    with pytest.raises(UserError, match="0 values of mean of model.layers.1.input_layernorm.weight, expected 32"):
        open_required(cfg, tmp_path, config, {})
    path.rename(tmp_path / "posterior-00001-of-00002.safetensors")
    with pytest.raises(UserError, match="holds 1 of the 2 files posterior-"):
        open_required(cfg, tmp_path, config, {})
    save_file({"mean": torch.zeros(3)}, path)
    with pytest.raises(UserError, match="was not written by this program: it holds 'mean'"):
        ParameterFiles([path], "it")


def test_ewc_needs_the_fisher_information_of_the_stage_before(chain, checkpoint):
    config, cfg = ModelConfig.read(checkpoint / "config.json"), TrainConfig(ewc_strength=1.0)
    open_required(cfg, checkpoint, config, read_lineage(checkpoint))  # the first task
    with pytest.raises(UserError, match="has no Fisher information of empd, which it was trained on: train it "):
        open_required(cfg, chain, config, read_lineage(chain))


def test_values_are_read_across_files(tmp_path):
    save_file({"fisher/w@0": torch.arange(4.0)}, tmp_path / "fisher-00001-of-00002.safetensors")
    save_file({"fisher/w@4": torch.arange(4.0, 10.0)}, tmp_path / "fisher-00002-of-00002.safetensors")
    files = ParameterFiles(find_parameter_files(tmp_path, "fisher"), "it")
    files.check(("fisher",), {"w": 10})
    into = torch.empty(5)
    files.read("fisher", "w", 2, into)
    assert into.tolist() == [2, 3, 4, 5, 6]


def test_the_penalties_of_a_run_equal_those_of_a_plain_loop(run, checkpoint, simp_file, tmp_path):
    """EWC, both forms of L2-SP and the settings of AdamW reach the optimizer: plain PyTorch on the second task."""
    m1 = run(tmp_path / "m1", "--ewc_strength", "1", "--fisher_samples", "3", steps=2)
    m2 = run(tmp_path / "m2", "--ewc_strength", "40", "--l2_sp_strength", "20", "--l2_sp_rate", "0.1", "--adam_beta1",
             "0.8", "--adam_beta2", "0.95", "--adam_epsilon", "1e-3", "--max_grad_norm", "0", init=m1)
    model, start, fisher = load_model(m1), load_file(m1 / "model.safetensors"), read_values(m1, "fisher", "fisher")
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, (0.8, 0.95), 1e-3, 0.0)
    for step in range(4):
        loss = mean_loss(model, checkpoint, simp_file, sample_indices(42, 60, 8 * step, 8 * step + 8))
        moved = {name: weight - start[name] for name, weight in model.named_parameters()}
        penalty = sum(20 * (fisher[name].view_as(move) * move ** 2).sum() + 10 * (move ** 2).sum()
                      for name, move in moved.items())
        (loss + penalty).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                weight.lerp_(start[name], 0.1)
        assert losses(m2)[step + 1, "loss"] == pytest.approx(loss.item(), rel=2e-5), step
    expected = {name: weight.detach() - start[name] for name, weight in model.named_parameters()}
    assert close({name: tensor - start[name] for name, tensor in load_file(m2 / "model.safetensors").items()},
                 expected, 1e-2)


def test_each_task_has_noise_of_its_own(run, checkpoint, simp_file, tmp_path):
    """The first loss of the second task: noise of the second task's seed around the first task's means."""
    m1 = run(tmp_path / "m1", *IVON, steps=1)
    m2 = run(tmp_path / "m2", *IVON, "--tau", "0.3", "--seed", "7", init=m1, steps=1)
    model, means, precisions = load_model(m1), *(read_values(m1, "posterior", kind) for kind in ("mean", "precision"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            size = parameter.numel()
            noise = torch.cat([part for *_, part in standard_normal((7 + TASK_SEEDS, 0), name, size, 0, size, "cpu")])
            parameter.copy_((means[name] + noise / (1e7 * 1e-3 + 0.3 * precisions[name]).sqrt()).view_as(parameter))
        loss = mean_loss(model, checkpoint, simp_file, sample_indices(7, 60, 0, 8))
    assert losses(m2)[1, "loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_moments_without_a_record_of_their_updates_are_refused():
    run = SimpleNamespace(cfg=SimpleNamespace(init="m0"), lineage={})
    with pytest.raises(UserError, match="m0 has optimizer moments, but no record"):
        num_updates(run)
    assert num_updates(SimpleNamespace(lineage={"updates": 7})) == 7
