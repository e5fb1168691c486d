"""The memory plan: compared with what PyTorch keeps for the backward pass, and with values by hand."""
import dataclasses
import re
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from model.config import ModelConfig
from model.families import FAMILIES
from model.lora import LoRA, adapter_shapes, insert_adapters, is_adapter
from model.transformer import Block, Transformer, attention, rotary_table
from pipeline.memory_plan import GIB, MemoryPlan, MemoryPlanConfig, alternatives, main, read_plan, trained_parameters
from pipeline.pretraining import size_config
from pipeline.step_time import GPUS
from tests.conftest import SHAPE


def kept_for_backward(config, dtype, attend, tokens=64, block=None):
    """Bytes per token that autograd keeps for one block, without the weights and the rotary table."""
    block = block or Block(config).to(dtype)
    x = torch.zeros(1, tokens, config.hidden_size, dtype=dtype, requires_grad=True)
    rotary = rotary_table(config, torch.arange(tokens)[None], dtype)
    ignored = {tensor.untyped_storage().data_ptr() for tensor in (*block.parameters(), *rotary)}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = block(x, tuple(table[:, None] for table in rotary), attend)
    assert y.requires_grad
    return sum(size for place, size in kept.items() if place not in ignored) / tokens


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (8, 1)])
def test_activations_equal_those_that_autograd_keeps(device, dtype, heads):
    # on GPUs by the fused kernel, which bf16 attention on CPUs does not use
    fused = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    config = ModelConfig(**SHAPE | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]})
    plan = MemoryPlan(config, 1, 1, False, dtype, 4096, False, device, sample_tokens=64)
    assert plan.block_activations() == kept_for_backward(
        config, torch.bfloat16 if dtype == "bf16" else torch.float32, fused if device == "cuda" else attention)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_every_family(model_type, dtype):
    fused = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    config, kind = ModelConfig(**SHAPE, model_type=model_type), torch.bfloat16 if dtype == "bf16" else torch.float32
    plan = MemoryPlan(config, 1, 1, False, dtype, 4096, False, "cuda", sample_tokens=64)
    for trained in (True, False):
        block = Block(config).to(kind).requires_grad_(trained)
        assert plan.block_activations(trained) == kept_for_backward(config, kind, fused, block=block)


@pytest.mark.parametrize("adapters", [None, LoRA(4, 8.0), LoRA(3, 8.0, ("q_proj", "down_proj"))])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_blocks_that_are_frozen_or_adapted(dtype, adapters):
    """A frozen block keeps less, and one whose linear layers have adapters something else."""
    config, kind = ModelConfig(**SHAPE), torch.bfloat16 if dtype == "bf16" else torch.float32
    trained = adapter_shapes(config, adapters) if adapters else {"model.norm.weight": (32,)}
    plan = MemoryPlan(config, 1, 1, False, dtype, 4096, False, "cuda", sample_tokens=64, trained=trained)
    fused = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    model = Transformer(config)
    if adapters:
        insert_adapters(model, adapters)
        model = model.to_empty(device="cpu")
    block = model.model.layers[0].to(kind)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    kept = kept_for_backward(config, kind, fused, block=block)
    if adapters and len(adapters.targets) < 7:
        assert plan.block_activations(bool(adapters)) >= kept  # it takes all layers of a block to have adapters
    else:
        assert plan.block_activations(bool(adapters)) == kept


def test_a_method_trains_a_part_of_the_7b():
    config, trained = trained_parameters(size_config("7b"), "lora")
    plan = MemoryPlan(config, 8, 3, False, "bf16", 16_384, True, method="lora", trained=trained)
    matrices = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 11008), (4096, 11008), (11008, 4096))
    assert plan.num_trained == 32 * 16 * sum(map(sum, matrices))
    assert plan.memory()["fp32 weights and moments"] == 12 * plan.num_trained / 8
    assert plan.memory()["weights"] == 2 * (5_933_109_248 + plan.num_trained) / 8
    assert plan.memory()["gradients"] == 8 * plan.num_trained / 8
    grown, trained = trained_parameters(size_config("7b"), "expansion")
    assert grown.num_hidden_layers == 34
    expanded = MemoryPlan(grown, 8, 3, False, "bf16", 16_384, False, method="expansion", trained=trained)
    assert expanded.num_trained == 2 * (5_933_109_248 - 2 * 32_000 * 4096 - 4096) / 32
    below = dataclasses.replace(expanded, trained={name: shape for name, shape in trained.items() if ".33." in name})
    assert below.activations() == 16_384 * 2 * below.block_activations()  # the last block, and one more
    full, frozen = expanded.block_activations(), expanded.block_activations(trained=False)
    assert expanded.activations() == 16_384 * (3 * full + 16 * frozen)  # of the layers 16 to 33
    assert trained_parameters(size_config("7b"), "ewc") == (size_config("7b"), None)
    replayed = MemoryPlan(size_config("7b"), 8, 3, False, "bf16", 16_384, True, method="self_replay")
    assert replayed.memory()["the start of the chain"] == 2 * 5_933_109_248


def test_the_published_7b_by_hand():
    plan = MemoryPlan(size_config("7b"), 8, 3, False, "bf16", 16_384, True)
    rows, parameters = plan.memory(), 5_933_109_248
    assert rows["weights"] == parameters * 2 / 8
    assert rows["fp32 weights and moments"] == parameters * 12 / 8
    assert rows["gradients"] == parameters * (4 + 4) / 8  # accumulated, and in the update of a sub-group
    assert plan.total() == sum(rows.values()) - min(rows["logits"], rows["buffers"])
    assert rows["gathered weights"] == 2e9
    assert rows["logits"] == 8 * 1048 * 32_000 + (4 + 2) * 32_000 * 4096  # 16 chunks, and the head's gradient
    short = dataclasses.replace(plan, max_tokens_per_microbatch=1000)
    assert short.logits() == 8 * 1000 * 32_000
    assert dataclasses.replace(plan, dtype="fp32").logits() == 8 * 1048 * 32_000
    attention = 2 * 32 * 128 * 4096
    assert plan.step(8).flops() == 8 * parameters + 4 * attention
    assert plan.disk(1) == parameters * (2 + 2 + 24)
    later = dataclasses.replace(plan, method="vcl")  # with the prior's mean and precision
    assert later.memory()["fp32 weights and moments"] == parameters * 20 / 8
    assert later.disk(1) == plan.disk(1) + 8 * parameters
    plain = dataclasses.replace(plan, zero=0, dtype="fp32", processes=1)
    assert sum(plain.memory()[name] for name in ("weights", "fp32 weights and moments", "gradients")) == 16 * parameters
    offloaded = dataclasses.replace(plan, offload=True)
    assert offloaded.memory()["fp32 weights and moments"] == offloaded.memory()["weights"] == 0
    assert offloaded.host() - plan.host() == pytest.approx(22 * parameters)
    stage2 = dataclasses.replace(plan, zero=2, offload=True)
    assert stage2.memory()["gradients"] == parameters * 4 / 8  # DeepSpeed keeps them on the device
    assert stage2.host() - plan.host() == pytest.approx(18 * parameters)


def test_gradients_are_collected_in_two_buffers_while_reductions_overlap():
    plan = MemoryPlan(size_config("7b"), 8, 2, False, "bf16", 8192, False)
    assert plan.buffers() == 500_000_000 * (2 * 2 + 4)
    assert dataclasses.replace(plan, offload=True).buffers() == 500_000_000 * (2 + 4)
    assert dataclasses.replace(plan, zero=3).buffers() == 500_000_000 * (2 + 4)


def test_defaults_come_from_the_recipe():
    plan, recipe = read_plan(MemoryPlanConfig(size="7b", processes=8))
    assert (plan.zero, plan.max_tokens_per_microbatch, plan.gradient_checkpointing) == (2, 8_192, False)
    assert recipe["max_train_samples"] == 100_000
    plan, _ = read_plan(MemoryPlanConfig(size="tiny", dtype="fp32", zero=0, max_tokens_per_microbatch=99))
    assert (plan.zero, plan.max_tokens_per_microbatch, plan.gradient_checkpointing) == (0, 99, False)
    assert plan.sample_tokens == 128
    assert read_plan(MemoryPlanConfig(size="small", recipe="llm"))[0].sample_tokens == 256


def test_it_suggests_what_to_change(capsys):
    main(MemoryPlanConfig(size="7b", processes=8, zero=3))
    assert "it fits, with " in capsys.readouterr().out
    main(MemoryPlanConfig(size="7b", processes=8, gpu_memory=80))  # as fine-tuned by default, without checkpointing
    printed = capsys.readouterr().out
    assert "gradient checkpointing off, reduction of gradients overlapped, blocks not compiled\n" in printed
    assert "it fits, with " in printed
    main(MemoryPlanConfig(size="7b", processes=8, zero=1, gpu_memory=60, gradient_checkpointing=True))
    assert "it does not fit: with --zero 2 it does" in capsys.readouterr().out
    main(MemoryPlanConfig(size="7b", processes=1, zero=2, gradient_checkpointing=True))
    assert "it does not fit: with --offload true it does" in capsys.readouterr().out
    main(MemoryPlanConfig(size="7b", processes=1, zero=2, gpu_memory=4))
    assert "it does not fit: take more processes, or GPUs with more memory" in capsys.readouterr().out


def test_time_is_a_range_of_what_published_runs_reach(capsys):
    def rows(**settings):
        main(MemoryPlanConfig(size="7b", **settings))
        lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith(" ")]
        return {line[2:32].strip(): re.findall(r"[\d,.]*\d", line[32:]) for line in lines}

    step = read_plan(MemoryPlanConfig(size="7b", processes=16))[0].step(256 * 128)
    printed = rows(processes=16)
    assert printed["computation, 1 × 2,048 tokens"] == [f"{step.computation(GPUS['h100'], share):.2f}"
                                                        for share in (0.54, 0.39)]
    assert printed["speed"] == [f"{step.tokens_per_second(GPUS['h100'], share):,.0f}" for share in (0.39, 0.54)]
    one = rows(processes=16, gpu="a100", network=10, utilisation=0.5)
    slow = dataclasses.replace(GPUS["a100"], network=1e10)
    assert one["step"] == [f"{step.seconds(slow, 0.5):.2f}"]
    assert one["each GPU"] == [f"{step.tokens_per_second(slow, 0.5) / 16:,.0f}"]
    assert "speed" not in rows(device="cpu")


def test_alternatives_need_at_most_as_much():
    plan = MemoryPlan(size_config("7b"), 8, 1, False, "bf16", 16_384, False)
    assert all(one.total() <= plan.total() for one in alternatives(plan))
    assert plan.total() / GIB > 80
    small = MemoryPlan(size_config("7b"), 8, 1, False, "bf16", 1024, False)
    assert {one.max_tokens_per_microbatch for one in alternatives(small)} == {1024}


@pytest.mark.parametrize(("flags", "said"), [
    ([], "give either --size or --init"), (["--size", "7b", "--processes", "0"], "processes is 0"),
    (["--size", "7b", "--utilisation", "40"], "utilisation is 40.0, expected a number from 0.001 to 1"),
    (["--size", "7b", "--tokens", "1e308"], "tokens is 1e+308, expected a number from 1 to 1e+18"),
    (["--size", "7b", "--network", "1e-300"], "network is 1e-300, expected a number from 0.001"),
    (["--size", "7b", "--gpu", "abacus"], "gpu is 'abacus', expected one of"),
    (["--size", "7b", "--gpu_memory", "inf"], "gpu_memory is inf, expected a finite number"),
    (["--size", "7b", "--sample_tokens", "9223372036854775806"], "sample_tokens is 9223372036854775806, expected"),
    (["--size", "7b", "--max_tokens_per_microbatch", "9223372036854775806"], "expected a number from 1 to 1073741824"),
    (["--size", "7b", "--zero", "1", "--offload"], "--offload needs --zero 2 or 3, not 1"),
    (["--size", "7b", "--zero", "0"], "ZeRO 0 keeps no fp32 master weights"), (["--size", "9b"], "unknown size '9b'")])
def test_invalid_plans(refusal, flags, said):
    assert said in refusal((MemoryPlanConfig, main), *flags)
