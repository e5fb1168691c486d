"""The decoder compared with transformers' Llama, in fp32."""
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2

import model.attention
import model.loss
from model.attention import attention, causal_attention
from model.config import ModelConfig
from model.kv_cache import KVCache
from model.loss import IGNORE_INDEX
from model.transformer import RMSNorm, Transformer, initial_weights, rotary_table, rotate
from tests.conftest import SHAPE, random_model
from training.engine import compile_blocks

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
VARIANTS = {
    "grouped": {},
    "multi-query": {"num_key_value_heads": 1},
    "full": {"num_key_value_heads": 4},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "head_dim": {"head_dim": 16},
    "theta": {"rope_theta": 500.0},
    "eps": {"rms_norm_eps": 1e-3},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
}


def twins(**shape):
    """Our model and that of transformers, with the same weights."""
    ours = random_model(**shape)
    given = SHAPE | shape
    rope = given.pop("rope_scaling", None) or {"rope_type": "default"}
    theirs = LlamaForCausalLM(LlamaConfig(**given, rope_parameters=rope | {"rope_theta": given.get("rope_theta", 1e4)}))
    state = ours.state_dict()
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert not missing
    return ours, theirs.eval()


@pytest.mark.parametrize("shape", VARIANTS.values(), ids=VARIANTS)
def test_logits_equal_transformers(shape):
    ours, theirs = twins(**shape)
    ids = torch.randint(SHAPE["vocab_size"], (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(ours(ids), expected, atol=1e-4, rtol=0)


def padded_batch():
    """Input ids, targets and transformers' labels and mask of three rows of different lengths."""
    generator, lengths, first = torch.Generator().manual_seed(2), (40, 33, 7), (25, 10, 3)
    ids = torch.randint(3, SHAPE["vocab_size"], (3, 41), generator=generator)
    labels = torch.full_like(ids, IGNORE_INDEX)
    mask = torch.zeros_like(ids)
    for row, (length, start) in enumerate(zip(lengths, first)):
        labels[row, start:length + 1] = ids[row, start:length + 1]
        mask[row, :length + 1] = 1
    return ids[:, :-1], labels[:, 1:], ids, labels, mask


@pytest.mark.parametrize("shape", [VARIANTS[name] for name in ("grouped", "tied", "biases", "llama3")])
def test_loss_and_gradients_equal_transformers(shape):
    ours, theirs = twins(**shape)
    input_ids, targets, ids, labels, mask = padded_batch()
    loss = ours(input_ids, targets) / (targets != IGNORE_INDEX).sum()
    loss.backward()
    expected = theirs(ids, attention_mask=mask, labels=labels).loss
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(ours, theirs)


def loss_after_prefix(theirs, prefix, ids, labels, mask):
    """The summed loss of transformers' model with a prefix in every row."""
    before = torch.full((len(ids), len(prefix)), IGNORE_INDEX)
    return theirs(torch.cat((prefix.expand(len(ids), -1), ids), 1), labels=torch.cat((before, labels), 1),
                  attention_mask=torch.cat((torch.ones_like(before), mask), 1), num_items_in_batch=1).loss


def assert_equal_gradients(ours, theirs):
    """Compares every gradient with that of the same name, relative to its largest value."""
    reference = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        scale = reference[name].grad.abs().max()
        assert scale > 0, name
        # Biases of keys that are not rotated have a gradient of zero: all scores change alike.
        assert (parameter.grad - reference[name].grad).abs().max() < 1e-4 * scale + 2e-6, name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
@pytest.mark.parametrize("shape", [VARIANTS[name] for name in ("grouped", "full")])
def test_a_prefix_is_as_if_it_stood_in_every_row(shape, gradient_checkpointing):
    ours, theirs = twins(**shape)
    ours.model.gradient_checkpointing = gradient_checkpointing
    input_ids, targets, ids, labels, mask = padded_batch()
    prefix = torch.randint(3, SHAPE["vocab_size"], (9,), generator=torch.Generator().manual_seed(4))
    places = []
    ours.model.norm.register_forward_hook(lambda module, given, result: places.append(result.shape[:2].numel()))
    loss = ours(input_ids, targets, prefix)
    loss.backward()
    assert places == [9 + input_ids.numel()]
    expected = loss_after_prefix(theirs, prefix, ids, labels, mask)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    assert_equal_gradients(ours, theirs)


def test_a_micro_step_does_not_wait_for_the_device():
    """On the meta device it is an error to ask for a value, which a GPU would have to finish computing."""
    with torch.device("meta"):
        on_device = Transformer(ModelConfig(**SHAPE))
    input_ids, targets, *_ = padded_batch()
    prefix = torch.zeros(5, dtype=torch.int64, device="meta")
    for arguments in ((), (prefix,)):
        loss = on_device(input_ids.to("meta"), targets, *arguments)
        loss.backward()
        assert loss.is_meta
    with pytest.raises(NotImplementedError, match="meta"):
        on_device(input_ids.to("meta"), targets.to("meta"))


def attention_of_gpus(config, T, S, weight):
    """`causal_attention` as for weights on a GPU."""
    return causal_attention(config, T, S, SimpleNamespace(device=torch.device("cuda"), dtype=weight.dtype))


def test_attention_after_a_prefix_is_the_same_on_gpus():
    config, generator = ModelConfig(**SHAPE), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, length, 8, generator=generator)
                         for heads, length in ((4, 5), (2, 9), (2, 9)))
    on_gpu, = attention_of_gpus(config, 5, 9, query).values()
    assert isinstance(on_gpu.keywords["attn_mask"], CausalBias)
    assert torch.allclose(on_gpu(query, key, value), attention(query, key, value), atol=1e-6)


@pytest.mark.parametrize(("of_gpus", "shape"), [(False, {}), (True, {}), (False, {
    "model_type": "smollm3", "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"] * 5})])
def test_compiled_blocks_of_many_layers_and_sizes(of_gpus, shape, monkeypatch):
    """Graphs are captured and run, without code for them, which would take minutes. No graph is interrupted, and the
    layers are not compiled again and again until PyTorch gives up."""
    from torch import _dynamo
    plain, compiled = (random_model(num_hidden_layers=10, **shape) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    compile_block = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda block: compile_block(block, backend="eager", fullgraph=True))
    if of_gpus:
        monkeypatch.setattr(model.attention, "causal_attention", attention_of_gpus)
    _dynamo.reset()
    with _dynamo.config.patch(fail_on_recompile_limit_hit=True, recompile_limit=8):
        compile_blocks(compiled)
        for rows, length, prefix_length in ((2, 8, 9), (3, 11, 9), (4, 20, 5), (2, 7, 3)):
            ids, targets = torch.randint(3, 500, (2, rows, length), generator=generator)
            prefix = torch.randint(3, 500, (prefix_length,), generator=generator)
            loss = compiled(ids, targets, prefix)
            loss.backward()
            with torch.no_grad():
                assert compiled(ids, targets).item() == pytest.approx(plain(ids, targets).item(), rel=1e-5)
            assert loss.item() == pytest.approx(plain(ids, targets, prefix).item(), rel=1e-5)
    _dynamo.reset()


@pytest.mark.parametrize("change", ["chunks", "gradient_checkpointing"])
def test_memory_savers_change_nothing(change, monkeypatch):
    plain, saving = random_model(), random_model()
    input_ids, targets, *_ = padded_batch()
    plain(input_ids, targets).backward()
    if change == "chunks":
        monkeypatch.setattr(model.loss, "chunk_rows", lambda *_: 5)
    else:
        saving.model.gradient_checkpointing = True
    heads, linear = [], model.loss.linear
    monkeypatch.setattr(model.loss, "linear", lambda x, weight:
                        (heads.append(len(x)) if len(weight) == SHAPE["vocab_size"] else 0) or linear(x, weight))
    saving(input_ids, targets).backward()
    num_targets = int((targets != IGNORE_INDEX).sum())
    assert max(heads) == (5 if change == "chunks" else num_targets)
    for ours, expected in zip(saving.parameters(), plain.parameters()):
        assert (ours.grad - expected.grad).abs().max() < 1e-5 * expected.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_heads_gradient_is_as_exact_in_many_chunks_as_in_one(dtype, monkeypatch):
    """Summed in bf16 the error with 64 chunks is five times that of one chunk."""
    V, C, N = 256, 32, 1024
    generator = torch.Generator().manual_seed(6)
    hidden = (torch.randn(N, C, generator=generator) + 0.5).to(dtype)
    weight = (0.1 * torch.randn(V, C, generator=generator)).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    reference = weight.detach().double().requires_grad_()
    F.cross_entropy(hidden.double() @ reference.T, targets, reduction="sum").backward()
    errors = []
    for rows in (N, 16):
        monkeypatch.setattr(model.loss, "chunk_rows", lambda *_, rows=rows: rows)
        weight.grad = None
        model.loss.FusedLinearLoss.apply(hidden, weight, targets, None, True).backward()
        assert weight.grad.dtype == dtype
        errors.append(float((weight.grad.double() - reference.grad).norm() / reference.grad.norm()))
    assert errors[0] < {torch.bfloat16: 3e-3, torch.float32: 1e-6}[dtype]
    assert errors[1] < 1.5 * errors[0]


def test_the_heads_gradient_cannot_be_differentiated_again():
    hidden, weight = torch.ones(4, 8), torch.ones(16, 8, requires_grad=True)
    loss = model.loss.FusedLinearLoss.apply(hidden, weight, torch.arange(4), None, True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_training_uses_the_flash_kernel():
    input_ids, targets, *_ = padded_batch()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), mock.patch.object(  # any other kernel is an error
            F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as sdpa:
        random_model()(input_ids, targets).backward()
        random_model()(input_ids, targets, input_ids[0, :5]).backward()
    assert sdpa.call_count == 2 * (1 + 2)  # once in each layer, and twice with a prefix


def test_no_target_has_zero_loss_and_gradient():
    ours = random_model()
    loss = ours(torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), IGNORE_INDEX))
    loss.backward()
    assert loss.item() == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in ours.parameters())


def test_cache_gives_the_logits_of_the_whole_sequence():
    ours = random_model()
    ids = torch.randint(SHAPE["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(3))
    cache, pieces = KVCache(ours, 2, 30), []
    with torch.no_grad():
        for start, stop in ((0, 17), (17, 18), (18, 25), (25, 30)):
            positions = torch.arange(start, stop).expand(2, -1)
            cache.advance(positions, torch.arange(stop) <= positions[:, :, None])
            pieces.append(ours.lm_head(ours.model(ids[:, start:stop], cache)))
        torch.testing.assert_close(torch.cat(pieces, 1), ours(ids), atol=1e-5, rtol=0)


def test_parameter_count():
    for shape in ({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True}, {"head_dim": 16}):
        ours = random_model(**shape)
        assert ours.config.num_parameters == sum(parameter.numel() for parameter in ours.parameters())
    published = ModelConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                            num_attention_heads=32, num_key_value_heads=8)
    assert published.num_parameters == 5_933_109_248


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("theirs", [modeling_llama, modeling_olmo2], ids=["llama", "olmo2"])
def test_norm_and_rotation_equal_transformers_bit_for_bit(theirs, dtype):
    """Llama rounds to the dtype of the model before it multiplies with the weights of a norm, and rounds the table of
    the rotation; OLMo 2 rounds the products."""
    name = theirs.__name__.rpartition("_")[2]
    shape = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = ModelConfig(**SHAPE | shape | {"model_type": name})
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 700, 32), (32,)))
    norms = [norm.to(dtype) for norm in (
        RMSNorm(32, config), getattr(theirs, f"{name.capitalize()}RMSNorm")(32, config.rms_norm_eps))]
    for norm in norms:
        norm.weight.data.copy_(weight)
    assert torch.equal(*(norm(x) for norm in norms))
    positions = torch.arange(700)
    rotary = getattr(theirs, f"{name.capitalize()}RotaryEmbedding")(
        AutoConfig.for_model(name, **shape, rope_theta=10_000.0))
    table, expected = rotary_table(config, positions, dtype), rotary(x, positions[None])
    assert all(torch.equal(one, two[0]) for one, two in zip(table, expected))
    query = torch.randn(1, 2, 700, 32, generator=generator).to(dtype)
    assert torch.equal(rotate(query, *table), theirs.apply_rotary_pos_emb(query, query, *expected)[0])


def test_new_weights():
    config = ModelConfig(**SHAPE, attention_bias=True, initializer_range=0.05)
    one, again, other = (dict(initial_weights(config, seed)) for seed in (1, 1, 2))
    matrices = [name for name, tensor in one.items() if tensor.ndim == 2]
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in matrices)
    assert len({one[name].flatten()[0].item() for name in matrices}) == len(matrices)
    for name in matrices:
        assert one[name].std().item() == pytest.approx(0.05, rel=0.1), name
    assert all((tensor == (0 if name.endswith("bias") else 1)).all() for name, tensor in one.items()
               if name not in matrices)
