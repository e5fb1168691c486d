"""Training of some parameters, block expansion and LoRA: equal to plain PyTorch and PEFT, under every ZeRO stage."""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import stack
import train as train_script
from common.provenance import read_lineage
from corpus.tasks import SFTDataset, read_task
from model.checkpoint import CheckpointReader, empty_model
from model.config import ModelConfig
from model.growth import expand, grow_model
from model.hub import load_model
from model.lora import LoRA, adapted_tensors, adapter_shapes, insert_adapters
from model.loss import FusedLinearLoss
from model.tokenizer import Tokenizer
from model.transformer import Transformer, parameter_shapes
from tests.conftest import SHAPE, error_line, losses, random_model, read_metrics
from training.batches import count_tokens, sample_indices
from training.selection import selected_shapes, training_flops
from training.train_config import TrainConfig

FLAGS = ["--max_train_samples", "60", "--max_steps", "4", "--max_grad_norm", "1", "--weight_decay", "0.1"]
PATTERNS = "model.layers.1.mlp.*,model.norm.weight"
LORA = ["--train", "lora", "--lora_rank", "4", "--lora_alpha", "16"]


def changed(start, end):
    """The parameters that differ between two checkpoints."""
    before, after = (load_file(directory / "model.safetensors") for directory in (start, end))
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


# ------------------------------------------------------------------------------------------------- some parameters

@pytest.fixture(scope="module")
def partial(train, tmp_path_factory):
    """A run that trains the parameters of PATTERNS, in one process without ZeRO, and its standard output."""
    out = tmp_path_factory.mktemp("partial") / "m1-simp"
    return out, train(out, "--train", PATTERNS).stdout


def test_only_what_is_selected_changes(partial, checkpoint):
    out, said = partial
    assert changed(checkpoint, out) == {"model.norm.weight", *(f"model.layers.1.mlp.{name}_proj.weight"
                                                               for name in ("gate", "up", "down"))}
    assert "training 4,640 of 48,288 parameters (9.6%): layer 1 and model.norm.weight" in said


def test_selected_parameters_follow_a_plain_loop(partial, checkpoint, simp_file):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    trained = [(name, p) for name, p in model.named_parameters()
               if name.startswith("model.layers.1.mlp.") or name == "model.norm.weight"]
    optimizer = torch.optim.AdamW([{"params": [p for _, p in trained if p.ndim == 2], "weight_decay": 0.1},
                                   {"params": [p for _, p in trained if p.ndim != 2], "weight_decay": 0.0}],
                                  lr=5e-3, betas=(0.9, 0.999), eps=1e-8)
    expected = plain_losses(model, [p for _, p in trained], optimizer, checkpoint, simp_file)
    assert [entry["loss"] for entry in read_metrics(partial[0])[0]] == pytest.approx(expected, rel=1e-5)
    saved = load_file(partial[0] / "model.safetensors")
    for name, parameter in trained:
        torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-4, atol=1e-5)


def plain_losses(model, parameters, optimizer, checkpoint, simp_file, steps=4):
    """The losses of a loop over a model of transformers, one sample at a time."""
    dataset = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    found = []
    for step in range(steps):
        samples = [dataset[index] for index in sample_indices(42, len(dataset), 8 * step, 8 * step + 8)]
        total, num_targets = 0.0, count_tokens(samples)[1]
        for tokens, first in samples:
            ids = torch.tensor(tokens)[None]
            log_p = model(ids).logits[0, :-1].log_softmax(-1)
            nll = -log_p.gather(1, ids[0, 1:, None])[first - 1:].sum() / num_targets
            nll.backward()
            total += nll.item()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found.append(total)
    return found


@pytest.mark.parametrize(("zero", "processes"), [("1", 1), ("2", 2), ("3", 1), ("3", 2)])
@pytest.mark.parametrize("kind", ["patterns", "lora"])
def test_losses_do_not_depend_on_processes_and_zero_stage(train, partial, adapted, checkpoint, tmp_path, zero,
                                                          processes, kind):
    expected, flags = (partial[0], ["--train", PATTERNS]) if kind == "patterns" else (adapted[0], LORA)
    train(tmp_path / "run", *flags, "--zero", zero, launcher=processes)
    assert losses(tmp_path / "run") == pytest.approx(losses(expected), rel=1e-5)
    assert changed(checkpoint, tmp_path / "run") == changed(checkpoint, expected)
    if kind == "lora":
        ours, others = (load_file(out / "adapter/adapter_model.safetensors") for out in (tmp_path / "run", expected))
        assert ours.keys() == others.keys()
        for name, tensor in others.items():
            torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("zero", ["1", "3"])
def test_frozen_weights_stay_bit_for_bit_in_bf16(train, checkpoint, tmp_path, zero):
    model = load_model(checkpoint, torch.bfloat16)
    train(tmp_path / "run", "--train", PATTERNS, "--dtype", "bf16", "--zero", zero, launcher=2)
    saved = load_file(tmp_path / "run/model.safetensors")
    same = {name for name, parameter in model.named_parameters() if torch.equal(saved[name], parameter.detach())}
    assert {name for name in saved if name.startswith("model.layers.1.mlp.")} == saved.keys() - same - {
        "model.norm.weight"}


@pytest.mark.parametrize("flags", [["--train", PATTERNS, "--zero", "3"], [*LORA, "--zero", "1"]])
def test_a_resumed_run_continues(train, checkpoint, tmp_path, flags):
    train(tmp_path / "whole", *flags)
    train(tmp_path / "resumed", *flags, interrupted=(3, "SIGTERM", "all"), launcher=2)
    assert (tmp_path / "resumed.partial/resume").exists()
    train(tmp_path / "resumed", *flags)
    assert losses(tmp_path / "resumed") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)
    assert changed(checkpoint, tmp_path / "resumed") == changed(checkpoint, tmp_path / "whole")


def test_the_head_has_no_gradient_if_it_is_frozen():
    hidden, weight = torch.randn(6, 4, requires_grad=True), torch.randn(9, 4)
    targets = torch.tensor([0, 3, 8, 1, 1, 5])
    loss = FusedLinearLoss.apply(hidden, weight, targets, None, True)
    loss.backward()
    expected = torch.autograd.grad(F.cross_entropy(hidden @ weight.T, targets, reduction="sum"), hidden)
    torch.testing.assert_close(hidden.grad, expected[0])
    frozen, trained = hidden.detach(), weight.clone().requires_grad_()
    FusedLinearLoss.apply(frozen, trained, targets, None, True).backward()
    expected = torch.autograd.grad(F.cross_entropy(frozen @ trained.T, targets, reduction="sum"), trained)
    torch.testing.assert_close(trained.grad, expected[0])


# ---------------------------------------------------------------------------------------------------- block expansion

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_expansion_preserves_the_function_bit_for_bit(dtype, bias):
    base = random_model(num_hidden_layers=4, attention_bias=bias, mlp_bias=bias).to(dtype)
    grown = grow_model(base, expand(4, 6), zero_init=True)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert torch.equal(grown(ids), base(ids))


def test_expansion_maps():
    assert expand(4, 6) == [0, 1, 1, 2, 3, 3]
    assert expand(32, 40) == [layer for layer in range(32) for _ in range(1 + (layer % 4 == 3))]  # LLaMA Pro's
    assert expand(30, 34) == sorted([*range(30), 6, 14, 21, 29])
    assert expand(3, 6) == [0, 0, 1, 1, 2, 2]


@pytest.fixture(scope="module")
def expanded(train, tmp_path_factory):
    """Two tasks with one inserted layer, and the second one again with a layer of its own."""
    folder = tmp_path_factory.mktemp("expanded")
    flags = ["--train", "new_layers", "--new_layers", "1"]
    train(folder / "m1", *flags)
    train(folder / "m2", *flags, init=folder / "m1")
    train(folder / "own", *flags, "--per_task", init=folder / "m1")
    return folder


def test_expansion_at_the_start_of_a_chain(expanded, partial, checkpoint):
    """The first task inserts a layer and trains it alone, the second one trains the same layer."""
    before, of_the_checkpoint = (read_metrics(out)[1][0]["eval_loss"] for out in (expanded / "m1", partial[0]))
    assert before == pytest.approx(of_the_checkpoint, rel=1e-6)
    start, m1 = load_file(checkpoint / "model.safetensors"), load_file(expanded / "m1/model.safetensors")
    assert ModelConfig.read(expanded / "m1/config.json").num_hidden_layers == 3
    assert all(torch.equal(m1[name], tensor) for name, tensor in start.items())  # the new layer is the last
    assert m1["model.layers.2.self_attn.o_proj.weight"].abs().max() > 0
    assert changed(expanded / "m1", expanded / "m2") == {name for name in m1 if name.startswith("model.layers.2.")}
    assert read_lineage(expanded / "m2")["new_layers"] == [2]


def test_an_expansion_that_the_chain_did_not_begin_with(expanded, train, checkpoint, tmp_path):
    flags = ["--train", "new_layers", "--new_layers", "2"]
    assert "new_layers is 2, but the chain of tasks of" in error_line(
        train(tmp_path / "out", *flags, init=expanded / "m1", check=False))
    stack.grow(stack.GrowConfig(init=str(checkpoint), out=str(tmp_path / "grown"), factor=2))
    train(tmp_path / "m1", init=tmp_path / "grown")
    assert "began with 0 new layers: give the same number at all tasks, or --per_task" in error_line(
        train(tmp_path / "m2", *flags, init=tmp_path / "m1", check=False))
    train(tmp_path / "m2", *flags, "--per_task", init=tmp_path / "m1")
    assert read_lineage(tmp_path / "m2")["new_layers"] == [2, 5]


def test_a_killed_run_that_began_with_an_expansion(expanded, train, tmp_path):
    flags = ["--train", "new_layers", "--new_layers", "1", "--save_minutes", "0"]
    train(tmp_path / "m1", *flags, interrupted=(3, "SIGKILL", 0))
    assert "resuming after step 2" in train(tmp_path / "m1", *flags).stdout
    assert losses(tmp_path / "m1") == losses(expanded / "m1")
    assert not changed(tmp_path / "m1", expanded / "m1")


def test_expansion_for_each_task(expanded):
    assert ModelConfig.read(expanded / "own/config.json").num_hidden_layers == 4
    assert read_lineage(expanded / "own")["new_layers"] == [3]
    m1, own = (load_file(expanded / name / "model.safetensors") for name in ("m1", "own"))
    assert all(torch.equal(own[name], tensor) for name, tensor in m1.items())


def test_new_layers_of_another_model_are_refused(train, checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "m0")
    for layers, outside in (([1, 4, 5], "4, 5"), ([0, "1"], "1"), ([True], "True")):
        (tmp_path / "m0/growth.json").write_text(json.dumps({"lineage": {"new_layers": layers}}))
        line = error_line(train(tmp_path / "m1", "--train", "new_layers", init=tmp_path / "m0", check=False))
        assert f"has 2 layers, but its growth.json or run.json names the new layers {outside}: it is that of" in line


def test_growth_ends_the_block_expansion_of_a_chain(expanded, train, tmp_path):
    """Whose new layers are those of the growth from then on."""
    stack.grow(stack.GrowConfig(init=str(expanded / "m1"), out=str(tmp_path / "grown"), factor=2))
    line = error_line(train(tmp_path / "m2", "--train", "new_layers", "--new_layers", "1", init=tmp_path / "grown",
                            check=False))
    assert "began with 0 new layers: give the same number at all tasks, or --per_task" in line


def test_new_layers_of_a_grown_checkpoint(train, checkpoint, tmp_path):
    """Those of growth.json, and after training those of run.json."""
    stack.grow(stack.GrowConfig(init=str(checkpoint), out=str(tmp_path / "grown"), operator="expand", new_layers=2))
    assert json.loads((tmp_path / "grown/growth.json").read_text())["layer_map"] == [0, 0, 1, 1]
    train(tmp_path / "m1", "--train", "new_layers", init=tmp_path / "grown")
    assert {name.split(".")[2] for name in changed(tmp_path / "grown", tmp_path / "m1")} == {"1", "3"}
    again = stack.GrowConfig(init=str(tmp_path / "m1"), out=str(tmp_path / "again"), operator="expand", new_layers=1)
    stack.grow(again)
    assert read_lineage(tmp_path / "again")["new_layers"] == [4]


# --------------------------------------------------------------------------------------------------------------- LoRA

@pytest.fixture(scope="module")
def adapted(train, tmp_path_factory):
    """A run with adapters, in one process without ZeRO, and its standard output."""
    out = tmp_path_factory.mktemp("lora") / "m1-simp"
    return out, train(out, *LORA).stdout


def test_peft_loads_the_adapter_with_the_same_logits(adapted, checkpoint):
    out, said = adapted
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    peft = PeftModel.from_pretrained(model, out / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    ids = torch.randint(0, SHAPE["vocab_size"], (2, 50), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(peft(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-4)
        with peft.disable_adapter():
            assert (peft(ids).logits - merged(ids).logits).abs().max() > 0.01
    again = peft.merge_and_unload().state_dict()
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, again[name], rtol=1e-6, atol=1e-6)
    assert "training 3,712 of 52,000 parameters (7.1%): all 2 layers" in said


def test_losses_equal_those_of_peft(adapted, train, checkpoint, simp_file, tmp_path):
    """For 20 steps, from the same start of the adapters."""
    out = tmp_path / "run"
    train(out, *LORA, "--max_steps", "20")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=16, target_modules=list(TrainConfig.lora_targets)))
    shapes = adapter_shapes(ModelConfig.read(checkpoint / "config.json"), LoRA(4, 16.0))
    values = peft.state_dict()
    fresh = first_adapter(checkpoint)
    with torch.no_grad():
        for name in shapes:
            values[f"base_model.model.{name}.default.weight"].copy_(fresh[name])
    trained = [p for p in peft.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    expected = plain_losses(peft, trained, optimizer, checkpoint, simp_file, steps=20)
    assert [entry["loss"] for entry in read_metrics(out)[0]] == pytest.approx(expected, rel=1e-4)


def first_adapter(checkpoint):
    """The adapters' values before training."""
    config = ModelConfig.read(checkpoint / "config.json")
    model = empty_model(config)
    insert_adapters(model, LoRA(4, 16.0))
    return dict(adapted_tensors(model, CheckpointReader(checkpoint).named_tensors(config), 42))


@pytest.mark.parametrize(("zero", "processes"), [("1", 1), ("3", 2)])
def test_the_final_losses_are_those_of_the_merged_weights(train, simp_file, tmp_path, zero, processes):
    """In bf16 the merged weights are rounded."""
    train(tmp_path / "m1", *LORA, "--dtype", "bf16", "--zero", zero, launcher=processes)
    train(tmp_path / "m2", "--dtype", "bf16", "--zero", "1", "--max_steps", "1", init=tmp_path / "m1")
    after, before = (read_metrics(tmp_path / name)[1] for name in ("m1", "m2"))
    assert before[0]["eval_loss"] == pytest.approx(after[-1]["eval_loss"], rel=1e-6)


def test_adapters_start_as_those_of_peft(checkpoint):
    """A is uniform with the same bound, B is 0."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=list(TrainConfig.lora_targets))).state_dict()
    pools = {}
    for name, value in first_adapter(checkpoint).items():
        if name.endswith(("lora_A", "lora_B")):
            theirs = peft[f"base_model.model.{name}.default.weight"]
            assert theirs.shape == value.shape
            for kind, tensor in (("ours", value), ("theirs", theirs)):
                pools.setdefault((name[-1], kind), []).append(tensor.flatten() * value.shape[1] ** 0.5)
    ours, theirs = (torch.cat(pools["A", kind]) for kind in ("ours", "theirs"))
    assert max(ours.abs().max(), theirs.abs().max()) <= 1 + 1e-6
    assert float(ours.std()) == pytest.approx(float(theirs.std()), rel=0.05)
    assert not torch.cat(pools["B", "ours"] + pools["B", "theirs"]).any()


def test_each_task_has_adapters_of_its_own(train, checkpoint, tmp_path):
    """Of a learning rate at which they stay what they were; the first one's are those of the seed."""
    flags = [*LORA, "--learning_rate", "1e-30", "--max_steps", "1"]
    train(tmp_path / "m1", *flags)
    train(tmp_path / "m2", *flags, init=tmp_path / "m1")
    first, second = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("m1", "m2"))
    for name, expected in first_adapter(checkpoint).items():
        if name.endswith("lora_A"):
            theirs = f"base_model.model.{name}.weight"
            assert torch.equal(first[theirs], expected)
            assert not torch.isclose(second[theirs], expected).any()


def test_lora_on_a_grown_model(train, checkpoint, tmp_path):
    stack.grow(stack.GrowConfig(init=str(checkpoint), out=str(tmp_path / "grown"), factor=2))
    train(tmp_path / "m1", *LORA, "--lora_targets", "q_proj,v_proj", init=tmp_path / "grown")
    assert changed(tmp_path / "grown", tmp_path / "m1") == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in range(4) for name in "qv"}


# ---------------------------------------------------------------------------------------------------------- bad input

@pytest.mark.parametrize(("flags", "said"), [
    (["--train", "new_layers"], "has no new layers: expected a growth.json of stack.py, or a run that started from it"),
    (["--train", "model.layer.*"], "train: no parameter matches model.layer.*: expected all, new_layers, lora or"),
    (["--train", "model.*,lm_head.*"], "train: model.*, lm_head.* matches all parameters: give all"),
    (["--train", "lora", "--lora_rank", "17"],
     "lora_rank is 17, more than the 16 of model.layers.0.self_attn.k_proj.weight [16, 32]: lower it"),
    (["--train", "lora,model.norm.weight"], "give all or lora alone, or what else is to be trained"),
    (["--train", "all,model.norm.weight"], "give all or lora alone, or what else is to be trained"),
    (["--train", "lora", "--new_layers", "1"], "train lora adapts the layers of --init: set new_layers to 0"),
    (["--ewc_strength", "1", "--new_layers", "1"], "ewc_strength is about the weights of --init: set new_layers to 0"),
    (["--train", "lora", "--task", "none"], "train lora is for fine-tuning: give --task"),
    (["--train", "lora", "--lora_targets", "lm_head"],
     "unknown lora_targets 'lm_head', expected one of q_proj, k_proj"),
    (["--train", "lora", "--wise_ft_alpha", "0.5"], "would pull the adapters to their random start"),
    (["--lora_rank", "8", "--lora_alpha", "8"], "lora_rank and lora_alpha would change nothing without train lora"),
    (["--tau", "0.5"], "tau would change nothing without optimizer ivon: give it as well"),
    (["--fisher_samples", "9"], "fisher_samples would change nothing without ewc_strength: give it as well"),
    (["--self_replay_share", "0.5"], "self_replay_share would change nothing without self_replay_kl"),
    (["--l2_sp_rate", "1"], "l2_sp_rate is 1.0, expected"),
    (["--wise_ft_alpha", "0"], "wise_ft_alpha is 0.0, expected"),
    (["--train", "new_layers", "--ewc_strength", "1"], "ewc_strength knows the importance of all weights"),
    (["--new_layers", "3"], "expand inserts at most one layer behind each of 2 and cannot make 5: choose at most 4"),
    (["--per_task"], "per_task is about the layers that new_layers inserts: give their number"),
    (["--train", ""], "train: no parameter matches : expected all, new_layers, lora or")])
def test_settings_that_cannot_be(refusal, checkpoint, simp_file, tmp_path, flags, said):
    line = refusal((TrainConfig, train_script.main), "--task", "simp", "--init", checkpoint, "--data", simp_file,
                   "--out", tmp_path / "out", *flags)
    assert said in line
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_not_a_checkpoint(refusal, adapted, simp_file, tmp_path):
    line = refusal((TrainConfig, train_script.main), "--task", "simp", "--init", adapted[0] / "adapter", "--data",
                   simp_file, "--out", tmp_path / "out")
    assert "adapter holds an adapter of PEFT and no checkpoint: give the directory of the merged weights" in line


def test_a_selection_in_model_order():
    config = ModelConfig(**SHAPE)
    chosen = selected_shapes(["lm_head.weight", "new_layers"], config, None, {"new_layers": [1]}, "it")
    assert list(chosen) == [*(name for name in parameter_shapes(config) if name.startswith("model.layers.1.")),
                            "lm_head.weight"]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("patterns", [["all"], ["model.layers.2.*"], ["*.q_proj.weight"], ["lm_head.weight"],
                                      ["model.embed_tokens.weight", "model.layers.3.*"]])
def test_flops_equal_those_that_pytorch_counts(patterns, tied, monkeypatch):
    """In matrix products, apart from attention. Norms have parameters and no products, the input embedding neither."""
    monkeypatch.setattr("model.linear.FP32_BY_ONEDNN", False)  # PyTorch does not count oneDNN's products
    if tied and "lm_head.weight" in patterns:
        patterns = ["model.norm.weight"]  # the head is the embedding
    config = ModelConfig(512, 64, 176, 4, 4, tie_word_embeddings=tied)
    model, tokens = Transformer(config), torch.arange(3, 67).view(2, 32)
    chosen = selected_shapes(patterns, config, None, {}, "it")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, tokens.roll(-1, 1)).sum().backward()
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operator, count in counts.items() if "attention" not in str(operator))
    lookups = 0 if tied else 2 * (1 + 2 * ("model.embed_tokens.weight" in chosen)) * 512 * 64 * 64
    assert products == pytest.approx(training_flops(64, config, chosen) - lookups, rel=0.03)  # by layers
