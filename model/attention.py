"""Attention masks, sliding windows, and the attention of each way to run the decoder.

Dimensions are those of transformer.py. Training pads on the right and needs no attention mask: under causal attention
no token attends to the padding after it. scaled_dot_product_attention can therefore use its causal flash kernel (on
GPUs in bf16, in pretraining cuDNN's where PyTorch prefers it; on CPUs in any dtype).
"""
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import ModelConfig

CPU = torch.cpu.get_capabilities()


def keeps_probabilities(device: str, dtype_bytes: int, num_scores: int) -> bool:
    """Returns whether training on a device of this type computes attention as two products and a softmax, which keeps
    the probabilities for the backward pass, instead of by SDPA.

    On CPUs in bf16 the backward pass of SDPA takes 2 to 5 times as long, unless the scores exceed 32 MiB: then most of
    the time goes into reading and writing them. The scores are rounded to bf16 before the softmax, as in transformers'
    "eager" attention: where their standard deviation is 3, the output differs from that in fp64 by 0.7% (SDPA 0.2%) and
    the gradients of query and key by 0.8% (SDPA 0.4%).
    """
    return device == "cpu" and dtype_bytes == 2 and dtype_bytes * num_scores <= 32 << 20


def uses_products(device: str, dtype_bytes: int, num_queries: int, num_scores: int) -> bool:
    """Returns whether attention without gradients on a device of this type is computed as two products and a softmax
    instead of by SDPA.

    In bf16 on CPUs with AVX-512, but without AMX, SDPA takes up to 3 times as long. It is used there, too, for few
    queries, as in decoding, since compiling a product takes longer, and for scores of more than 8 MiB, since the
    allocator may take new memory from the system for them in each call.
    """
    return (device == "cpu" and dtype_bytes == 2 and CPU.get("avx512_bf16", False) and not CPU.get("amx_bf16", False)
            and num_queries >= 16 and dtype_bytes * num_scores <= 8 << 20)


def copies_heads(device: str, dtype_bytes: int) -> bool:
    """Returns whether causal attention on a device of this type copies each key-value head for its query heads: on GPUs
    in fp32 the only kernel that takes grouped heads computes and keeps all scores (PyTorch 2.13)."""
    return device == "cuda" and dtype_bytes == 4


def causal_sdpa(query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
    """Computes scaled_dot_product_attention of query [B, H, T, D] over key and value [B, K, S, D]. mask: its arguments
    that make it causal."""
    H, K = query.shape[1], key.shape[1]
    if H != K and copies_heads(query.device.type, query.element_size()):
        key, value = (x.repeat_interleave(H // K, 1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, **mask, enable_gqa=key.shape[1] != H)


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """Computes softmax attention of query [B, H, T, D] over key and value [B, K, S, D], and returns [B, H, T, D].

    Without a mask, attention is causal and the queries are the last T of the S tokens. A mask [1|B, 1, H/K·T, S] from
    `additive_mask` is added to the scores. With a mask, GQA heads are folded into the query axis: [B, K, H/K·T, D].
    """
    (B, H, T, D), (K, S) = query.shape, key.shape[1:3]
    device, dtype_bytes, num_scores = query.device.type, query.element_size(), B * H * T * S
    manual = keeps_probabilities(device, dtype_bytes, num_scores) if query.requires_grad else \
        uses_products(device, dtype_bytes, T, num_scores)
    if attn_mask is None and T == S and not manual:
        return causal_sdpa(query, key, value, is_causal=True)
    if attn_mask is None:
        causal = torch.ones(1, T, S, dtype=torch.bool, device=query.device).tril_(S - T)
        attn_mask = additive_mask(causal, H // K, query.dtype)
    query = query.reshape(B, K, -1, D)  # B K H/K·T D
    if not manual:
        return F.scaled_dot_product_attention(query, key, value, attn_mask).reshape(B, H, T, D)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # B·K H/K·T|S D
    scores = torch.baddbmm(attn_mask.expand(B, K, -1, -1).flatten(0, 1), query, key.mT, alpha=D ** -0.5)
    return (scores.softmax(-1) @ value).view(B, H, T, D)


def additive_mask(mask: Tensor, group_size: int, dtype: torch.dtype) -> Tensor:
    """Returns the mask [B, 1, H/K·T, S] for `attention`: 0 where the boolean mask [B, T, S] is true, otherwise -inf.
    It is repeated for the H/K = `group_size` query heads of each key-value head."""
    bias = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -math.inf)
    return bias.repeat(1, group_size, 1)[:, None]


def within_window(mask: Tensor, window: int | None) -> Tensor:
    """Returns the mask [B, T, S] with the last `window` tokens that each query attends to (sliding window attention:
    Jiang et al., Mistral 7B, arXiv 2310.06825). The tokens a query attends to are in the order of their positions."""
    return mask if window is None else mask & (mask.cumsum(-1) > mask.sum(-1, keepdim=True) - window)


def window_masks(mask: Tensor, config: ModelConfig, dtype: torch.dtype) -> dict[int | None, Tensor]:
    """Returns {window: mask for `attention`} of a boolean mask [B, T, S], for all windows of the model's layers."""
    return {window: additive_mask(within_window(mask, window), config.group_size, dtype) for window in config.windows}


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # query, key and value -> attention, as `attention` without a mask


def causal_attention(config: ModelConfig, T: int, S: int, like: Tensor) -> dict[int | None, Attend]:
    """Returns {window: causal attention of the last T of S tokens} for all windows of the model's layers. `like`
    gives device and dtype."""
    def within(window: int | None) -> Attend:
        if window and window < S:
            mask = within_window(torch.ones(1, T, S, dtype=torch.bool, device=like.device).tril_(S - T), window)
            return partial(attention, attn_mask=additive_mask(mask, config.group_size, like.dtype))
        if T < S and like.device.type == "cuda":
            # Keeps the flash kernel, as no other mask does. Made in a compiled block it would interrupt the graph. The
            # import takes a second.
            from torch.nn.attention.bias import causal_lower_right
            return partial(causal_sdpa, attn_mask=causal_lower_right(T, S))
        return attention
    return {window: within(window) for window in config.windows}


class AttentionContext(Protocol):
    """The attention of a call of `Decoder`: plain causal attention, a key-value cache, a packed pass or a shared
    prefix."""
    positions: Tensor  # 1|B T

    def of_layer(self, index: int) -> Attend: ...


class CausalAttention:
    """Plain causal attention of hidden states [B, T, C] from position 0."""

    def __init__(self, config: ModelConfig, x: Tensor):
        T = x.shape[1]
        self.config, self.positions = config, torch.arange(T, device=x.device)[None]  # 1 T
        self.by_window = causal_attention(config, T, T, x)

    def of_layer(self, index: int) -> Attend:
        """Returns the attention of a layer."""
        return self.by_window[self.config.window(index)]


class SharedPrefix:
    """Attention for B rows of T tokens that continue one prefix of P tokens, read as one sequence of P + B·T tokens.

    The prefix is computed once. Each row attends causally to the prefix and to itself.
    """

    def __init__(self, config: ModelConfig, prefix_length: int, rows: torch.Size, weight: Tensor):
        self.config, self.P, self.rows = config, prefix_length, rows  # rows: (B, T)
        own = torch.arange(self.P, self.P + rows[1], device=weight.device).repeat(rows[0])
        self.positions = torch.cat((torch.arange(self.P, device=weight.device), own))[None]  # 1 P+B·T
        self.of_prefix = causal_attention(config, self.P, self.P, weight)
        self.of_rows = causal_attention(config, rows[1], self.P + rows[1], weight)

    def of_layer(self, index: int) -> Attend:
        """Returns the attention of a layer."""
        window = self.config.window(index)
        return partial(self.attend, self.of_prefix[window], self.of_rows[window])

    def attend(self, of_prefix: Attend, of_rows: Attend, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Returns the attention of query [1, H, P + B·T, D] over key and value [1, K, P + B·T, D]."""
        prefix, rows = zip(*map(self.split, (query, key, value)))
        keys_values = (torch.cat((x.expand(len(y), -1, -1, -1), y), 2) for x, y in zip(prefix[1:], rows[1:]))
        y = of_rows(rows[0], *keys_values)  # B H T D, over keys and values B K P+T D
        query, *others = prefix
        copies = (x.clone() for x in others)  # views would make autograd keep the memory of the rows, too
        return torch.cat((of_prefix(query, *copies), y.transpose(0, 1).flatten(1, 2)[None]), 2)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Splits x [1, H, P + B·T, D] into the prefix [1, H, P, D] and the rows [B, H, T, D]."""
        prefix, rows = x.split((self.P, x.shape[2] - self.P), 2)
        return prefix, rows[0].unflatten(1, self.rows).transpose(0, 1)
