"""The kernels of linear layers compared with plain products."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import linear
from model.linear import Linear, can_pack, packed_weights
from model.lora import AdaptedLinear, LoRA

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return Linear(48, 80).requires_grad_(False)


@pytest.mark.parametrize("shape", [(48,), (1, 48), (2, 300, 48), (300, 2, 48), (2, 0, 48)])
@pytest.mark.parametrize("trained", ["x", "weight", "bias", "all"])
def test_fp32_by_onednn_has_the_gradients_of_a_product_in_fp64(layer, shape, trained, monkeypatch):
    monkeypatch.setattr(linear, "FP32_BY_ONEDNN", True)
    torch.manual_seed(1)
    x, coefficients = torch.randn(shape), torch.randn(*shape[:-1], 80)
    if len(shape) == 3:
        x = x.transpose(0, 1).contiguous().transpose(0, 1)  # as the views of attention are
    ours = {"x": x, "weight": layer.weight.data, "bias": layer.bias.data}
    exact = {name: tensor.double() for name, tensor in ours.items()}
    for tensors in (ours, exact):
        for name, tensor in tensors.items():
            tensor.requires_grad_(trained in (name, "all"))
    y, expected = linear.linear(*ours.values()), F.linear(*exact.values())
    assert y.grad_fn.name() == "OneDNNLinearBackward" or not x.numel()
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    ((y * coefficients).sum() + y.sum()).backward()  # a sum's gradient is one number, expanded
    ((expected * coefficients).sum() + expected.sum()).backward()
    for name, tensor in ours.items():
        if trained in (name, "all"):
            torch.testing.assert_close(tensor.grad.double(), exact[name].grad, rtol=1e-4, atol=1e-4)
        else:
            assert tensor.grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_to_pytorch(layer, dtype, monkeypatch):
    monkeypatch.setattr(linear, "FP32_BY_ONEDNN", True)
    layer, x = layer.to(dtype), torch.randn(5, 48, dtype=dtype)
    layer.weight.requires_grad_()
    assert layer(x).grad_fn.name() == "AddmmBackward0"


def test_compiled_code_has_no_call_of_onednn(layer, monkeypatch):
    """PyTorch's compiler cannot call it on weights that training changes."""
    def backend(graph, _):
        graphs.append(graph.code)
        return graph.forward

    graphs: list[str] = []
    monkeypatch.setattr(linear, "FP32_BY_ONEDNN", True)
    layer.weight.requires_grad_()
    y = torch.compile(layer, backend=backend, fullgraph=True)(torch.ones(5, 48))
    assert y.grad_fn.name() == "AddmmBackward0"
    assert "linear(" in graphs[0]
    assert "mkldnn" not in graphs[0]


def test_second_derivatives_are_refused(layer, monkeypatch):
    monkeypatch.setattr(linear, "FP32_BY_ONEDNN", True)
    x = torch.randn(5, 48, requires_grad=True)
    gradient, = torch.autograd.grad(layer(x).pow(2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("shape", [(1, 48), (16, 1, 48), (2, 300, 48), (0, 3, 48)])
def test_packed_weights_compute_the_same(layer, shape):
    x = torch.randn(shape)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with packed_weights(layer):
        assert layer.packed.is_mkldnn
        y = layer(x)
    assert layer.packed is None
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not can_pack(torch.empty(1, 1, dtype=torch.bfloat16)), reason="no products in bf16 on this CPU")
def test_in_bf16_they_are_equal_to_the_bit(layer):
    layer, x = layer.bfloat16(), torch.randn(16, 48, dtype=torch.bfloat16)
    expected = F.linear(x, layer.weight, layer.bias)
    with packed_weights(layer):
        assert layer.packed.is_mkldnn
        assert layer(x).equal(expected)


def test_the_copies_are_gone_after_an_error(layer):
    with pytest.raises(RuntimeError), packed_weights(layer):
        layer(torch.randn(1, 47))
    assert layer.packed is None


def test_without_memory_for_all_copies_there_are_none(layer, monkeypatch):
    """Decoding is slower then, but does not fail."""
    def limited(weight):
        if len(weight) > 48:
            raise RuntimeError(said)
        return reorder(weight)

    two, reorder = nn.Sequential(Linear(48, 48), layer).requires_grad_(False), torch.ops.mkldnn._reorder_linear_weight
    monkeypatch.setattr(torch.ops.mkldnn, "_reorder_linear_weight", limited)
    said = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 B"
    with packed_weights(two):
        assert [one.packed for one in two] == [None, None]
        assert two(torch.ones(48)).isfinite().all()
    said = "something else"
    with pytest.raises(RuntimeError, match=said), packed_weights(two):
        pass
    assert two[0].packed is None


def test_no_copies_are_made_that_leave_no_memory_for_batches(layer, monkeypatch):
    for left, packed in ((2 * layer.weight.nbytes, True), (2 * layer.weight.nbytes - 1, False)):
        monkeypatch.setattr(linear, "available_memory", lambda left=left: left)
        with packed_weights(layer):
            assert (layer.packed is not None) == packed


def test_an_adapter_is_added_to_the_packed_product(layer):
    adapted = AdaptedLinear(layer, LoRA(rank=2, alpha=4.0)).requires_grad_(False)
    for matrix in (adapted.lora_A, adapted.lora_B):
        matrix.normal_()
    x = torch.randn(5, 48)
    with packed_weights(adapted):
        assert adapted.packed.is_mkldnn
        torch.testing.assert_close(adapted(x), F.linear(x, adapted.merged(), adapted.bias), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weight", [torch.randn(80, 48, dtype=torch.float64), torch.empty(0),
                                    torch.empty(80, 48, device="meta")])
def test_a_dtype_without_kernels_a_part_of_zero_3_and_other_devices_are_left_as_they_are(layer, weight):
    layer.weight = nn.Parameter(weight)
    with packed_weights(layer):
        assert layer.packed is None
