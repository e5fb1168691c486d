"""The memory plan: compared with what PyTorch keeps for the backward pass, and with values by hand."""
import dataclasses
from functools import partial

import pytest
import torch

import model.attention
from model.attention import SharedPrefix, attention, causal_sdpa, copies_heads
from model.config import ModelConfig, size_config
from model.families import FAMILIES
from model.lora import LoRA, adapter_shapes, insert_adapters, is_adapter
from model.transformer import Block, Transformer, rotary_table
from pipeline.memory_plan import GIB, MemoryPlan, alternatives
from pipeline.plan import PlanConfig, run_settings, trained_parameters
from pipeline.step_time import plan_step
from tests.conftest import SHAPE


@pytest.fixture
def fused(monkeypatch):
    """Attention as on a GPU, which bf16 attention on a CPU is not for short samples."""
    monkeypatch.setattr(model.attention, "copies_heads", lambda _, dtype_bytes: copies_heads("cuda", dtype_bytes))
    return partial(causal_sdpa, is_causal=True)


def settings_of(method):
    """The settings of fine-tuning with a method."""
    return run_settings(PlanConfig(method=method))


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
@pytest.mark.parametrize("tokens", [64, 2304])
def test_activations_equal_those_that_autograd_keeps(device, dtype, heads, tokens, request):
    attend = request.getfixturevalue("fused") if device == "cuda" else attention
    config = ModelConfig(**SHAPE | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]})
    plan = MemoryPlan(config, 1, 1, False, dtype, tokens, False, device, sample_tokens=tokens)
    assert plan.block_activations() == kept_for_backward(config, torch.bfloat16 if dtype == "bf16" else torch.float32,
                                                         attend, tokens)


@pytest.mark.parametrize("heads", [(4, 4), (4, 1)])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_samples_that_share_a_prefix(dtype, heads, fused):
    """Eight rows of 24 tokens after a prefix of 16."""
    config, kind = ModelConfig(**SHAPE | {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}), \
        torch.bfloat16 if dtype == "bf16" else torch.float32
    shared = SharedPrefix(config, 16, torch.Size((8, 24)), torch.zeros(1, dtype=kind))
    shared.of_prefix = shared.of_rows = {None: fused}  # keeps the same with any mask
    plan = MemoryPlan(config, 1, 1, False, dtype, 16 + 8 * 24, False, "cuda", sample_tokens=40, prefix_tokens=16)
    kept = kept_for_backward(config, kind, shared.of_layer(0), 16 + 8 * 24)
    assert plan.block_activations() == pytest.approx(kept, rel=1e-12)


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_every_family(model_type, dtype, fused):
    config, kind = ModelConfig(**SHAPE, model_type=model_type), torch.bfloat16 if dtype == "bf16" else torch.float32
    plan = MemoryPlan(config, 1, 1, False, dtype, 4096, False, "cuda", sample_tokens=64)
    for trained in (True, False):
        block = Block(config).to(kind).requires_grad_(trained)
        assert plan.block_activations(trained) == kept_for_backward(config, kind, fused, block=block)


@pytest.mark.parametrize("adapters", [None, LoRA(4, 8.0), LoRA(3, 8.0, ("q_proj", "down_proj"))])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_activations_of_blocks_that_are_frozen_or_adapted(dtype, adapters, fused):
    """A frozen block keeps less, and one whose linear layers have adapters something else."""
    config, kind = ModelConfig(**SHAPE), torch.bfloat16 if dtype == "bf16" else torch.float32
    trained = adapter_shapes(config, adapters) if adapters else {"model.norm.weight": (32,)}
    plan = MemoryPlan(config, 1, 1, False, dtype, 4096, False, "cuda", sample_tokens=64, trained=trained)
    decoder = Transformer(config)
    if adapters:
        insert_adapters(decoder, adapters)
        decoder = decoder.to_empty(device="cpu")
    block = decoder.model.layers[0].to(kind)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    kept = kept_for_backward(config, kind, fused, block=block)
    if adapters and len(adapters.targets) < 7:
        assert plan.block_activations(bool(adapters)) >= kept  # it takes all layers of a block to have adapters
    else:
        assert plan.block_activations(bool(adapters)) == kept


def test_a_method_trains_a_part_of_the_7b():
    config, trained = trained_parameters(size_config("7b"), settings_of("lora"))
    plan = MemoryPlan(config, 8, 3, False, "bf16", 16_384, True, settings=settings_of("lora"), trained=trained)
    matrices = ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 11008), (4096, 11008), (11008, 4096))
    assert plan.num_trained == 32 * 16 * sum(map(sum, matrices))
    assert plan.memory()["fp32 weights and moments"] == 12 * plan.num_trained / 8
    assert plan.memory()["weights"] == 2 * (5_933_109_248 + plan.num_trained) / 8
    assert plan.memory()["gradients"] == 8 * plan.num_trained / 8
    grown, trained = trained_parameters(size_config("7b"), settings_of("expansion"))
    assert grown.num_hidden_layers == 34
    expanded = MemoryPlan(grown, 8, 3, False, "bf16", 16_384, False, settings=settings_of("expansion"), trained=trained)
    assert expanded.num_trained == 2 * (5_933_109_248 - 2 * 32_000 * 4096 - 4096) / 32
    below = dataclasses.replace(expanded, trained={name: shape for name, shape in trained.items() if ".33." in name})
    assert below.activations() == 16_384 * 2 * below.block_activations()  # the last block, and one more
    full, frozen = expanded.block_activations(), expanded.block_activations(trained=False)
    assert expanded.activations() == 16_384 * (3 * full + 16 * frozen)  # of the layers 16 to 33
    assert trained_parameters(size_config("7b"), settings_of("ewc")) == (size_config("7b"), None)
    replayed = MemoryPlan(size_config("7b"), 8, 3, False, "bf16", 16_384, True, settings=settings_of("self_replay"))
    assert replayed.memory()["the start of the chain"] == 2 * 5_933_109_248


def test_the_published_7b_by_hand():
    plan = MemoryPlan(size_config("7b"), 8, 3, False, "bf16", 16_384, True)
    rows, parameters = plan.memory(), 5_933_109_248
    assert rows["weights"] == parameters * 2 / 8
    assert rows["fp32 weights and moments"] == parameters * 12 / 8
    in_fp32 = dataclasses.replace(plan, dtype="fp32").memory()
    assert in_fp32["weights"] + in_fp32["fp32 weights and moments"] == parameters * 16 / 8  # and the master weights
    assert rows["gradients"] == parameters * (4 + 4) / 8  # accumulated, and in the update of a sub-group
    assert plan.total() == sum(rows.values()) - min(rows["logits"], rows["buffers"])
    assert rows["gathered weights"] == 2e9
    assert rows["logits"] == 8 * 1048 * 32_000 + (4 + 2) * 32_000 * 4096  # 16 chunks, and the head's gradient
    short = dataclasses.replace(plan, max_tokens_per_microbatch=1000)
    assert short.logits() == 8 * 1000 * 32_000
    assert dataclasses.replace(plan, dtype="fp32").logits() == 8 * 1048 * 32_000
    assert plan_step(plan, 8).recomputed == 1
    assert plan.disk(1) == parameters * (2 + 2 + 24)
    later = dataclasses.replace(plan, settings=settings_of("vcl"))  # with the prior's mean and precision
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
    assert plan.buffers() == 500_000_000 * (3 * 2 + 4)  # and a copy of what several processes own
    assert dataclasses.replace(plan, processes=1).buffers() == 500_000_000 * (2 * 2 + 4)
    assert dataclasses.replace(plan, offload=True).buffers() == 500_000_000 * (2 * 2 + 4)
    assert dataclasses.replace(plan, zero=0, dtype="fp32").buffers() == 500_000_000 * 4
    assert dataclasses.replace(plan, zero=0, dtype="fp32", processes=1).buffers() == 0
    assert dataclasses.replace(plan, zero=3).buffers() == 500_000_000 * (4 + 4)  # in fp32, and a copy


def test_alternatives_need_at_most_as_much():
    plan = MemoryPlan(size_config("7b"), 8, 1, False, "bf16", 16_384, False)
    assert all(one.total() <= plan.total() for one in alternatives(plan))
    assert not plan.fits(80)
    assert plan.fits(plan.total() / GIB / 0.949)  # 95% of the memory may be filled
    assert not plan.fits(plan.total() / GIB / 0.951)
    assert dataclasses.replace(plan, zero=2, gradient_checkpointing=True).fits(80)
    assert next(one for one in alternatives(dataclasses.replace(plan, zero=2)) if one.fits(79)) == \
        dataclasses.replace(plan, zero=2, max_tokens_per_microbatch=4096)  # before checkpointing
    small = MemoryPlan(size_config("7b"), 8, 1, False, "bf16", 1024, False)
    assert {one.max_tokens_per_microbatch for one in alternatives(small)} == {1024}
