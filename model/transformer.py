"""A decoder-only transformer in the layout of Llama and related families, with Hugging Face's parameter names.

Dimensions:  B batch, T query tokens, S key tokens, C hidden size, H query heads, K key-value heads, D head size,
             V vocabulary, N tokens with a target, P tokens of a shared prefix.
"""
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.distributed import to_device
from model.attention import Attend, AttentionContext, CausalAttention, SharedPrefix, attention
from model.config import ModelConfig
from model.linear import Linear
from model.loss import IGNORE_INDEX, Head


class RMSNorm(nn.Module):
    """Root mean square norm in fp32 (Zhang and Sennrich, arXiv 1910.07467). The weight multiplies in the dtype of the
    model, or in fp32 (`Family.fp32_factors`)."""

    def __init__(self, size: int, config: ModelConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps, self.in_fp32 = config.rms_norm_eps, config.family.fp32_factors

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return (self.weight * y).to(x.dtype) if self.in_fp32 else self.weight * y.to(x.dtype)


def rotary_frequencies(config: ModelConfig, device: torch.device | None = None) -> Tensor:
    """Returns the angles per position of the rotary embedding, [D/2] in fp32 (Su et al., arXiv 2104.09864, eq. 15).

    `rope_scaling` "linear" divides all frequencies by the factor. "llama3" and "yarn" divide low frequencies, keep high
    ones, and interpolate between them by the number of rotations within the original context: "llama3" in this number,
    "yarn" in the index of the frequency (Peng et al., arXiv 2309.00071, section 3.2).
    """
    D, scaling = config.head_dim, config.rope_scaling
    exponents = torch.arange(0, D, 2, dtype=torch.float32, device=device) / D
    frequencies = 1.0 / config.rope_theta ** exponents
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    most = scaling["original_max_position_embeddings"] / (2 * math.pi)  # rotations of the highest frequency, which is 1
    if scaling["rope_type"] == "yarn":
        fast, slow = (D / 2 * math.log(most / scaling.get(name, default), config.rope_theta)  # indices of frequencies
                      for name, default in (("beta_fast", 32), ("beta_slow", 1)))
        low, high = max(math.floor(fast), 0), min(math.ceil(slow), D - 1)
        keep = 1 - ((D / 2 * exponents - low) / max(high - low, 0.001)).clamp(0, 1)
    else:
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((most * frequencies - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotary_table(config: ModelConfig, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of positions [..., T], each [..., T, D]: the D/2 angles twice, for half-split rotation. They
    have the dtype of the model, or fp32 (`Family.fp32_factors`)."""
    dtype = torch.float32 if config.family.fp32_factors else dtype
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return (angles.cos() * config.rotary_scale).to(dtype), (angles.sin() * config.rotary_scale).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [B, H, T, D] by its positions. Dimension i is paired with i + D/2, as in Hugging Face's Llama."""
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention with K key-value heads for H query heads (GQA: Ainslie et al., arXiv 2305.13245). Qwen3
    normalizes each head of query and key, OLMo 2 all heads together."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.qk_norm = D, config.family.qk_norm
        qkv_bias = config.attention_bias or config.family.qkv_bias
        self.q_proj = Linear(C, H * D, bias=qkv_bias)
        self.k_proj = Linear(C, K * D, bias=qkv_bias)
        self.v_proj = Linear(C, K * D, bias=qkv_bias)
        self.o_proj = Linear(H * D, C, bias=config.attention_bias)
        if self.qk_norm:
            sizes = (D, D) if self.qk_norm == "head" else (H * D, K * D)
            self.q_norm, self.k_norm = (RMSNorm(size, config) for size in sizes)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend = attention) -> Tensor:
        B, T, _ = x.shape
        query, key, value = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # B T H·D|K·D
        if self.qk_norm == "projection":
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (y.view(B, T, -1, self.head_dim).transpose(1, 2) for y in (query, key, value))  # B H|K T D
        if self.qk_norm == "head":
            query, key = self.q_norm(query), self.k_norm(key)
        if rotary:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        y = attend(query, key, value)  # B H T D
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # B T C


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(C, hidden, bias=config.mlp_bias)
        self.up_proj = Linear(C, hidden, bias=config.mlp_bias)
        self.down_proj = Linear(hidden, C, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each applied to a norm of the residual stream and added to it. With
    `norm_after` (OLMo 2: arXiv 2501.00656, section 3.2), their outputs are normalized instead."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.norm_after = config.family.norm_after
        if not self.norm_after:
            self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config)
        if self.norm_after:
            self.post_feedforward_layernorm = RMSNorm(config.hidden_size, config)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, attend: Attend = attention) -> Tensor:
        if self.norm_after:
            x = x + self.post_attention_layernorm(self.self_attn(x, rotary, attend))
            return x + self.post_feedforward_layernorm(self.mlp(x))
        x = x + self.self_attn(self.input_layernorm(x), rotary, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class Embedding(nn.Embedding):
    """The token embedding. Not initialized on the meta device: PyTorch would import its compiler for that (2 s)."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class Decoder(nn.Module):
    """Computes final hidden states [B, T, C] of token ids [B, T]; without a context, causally from position 0."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass instead of storing it
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)

    def forward(self, input_ids: Tensor, context: AttentionContext | None = None) -> Tensor:
        x = self.embed_tokens(input_ids)  # B T C
        context = context or CausalAttention(self.config, x)
        cos, sin = rotary_table(self.config, context.positions, x.dtype)
        rotary = cos[:, None], sin[:, None]  # 1|B 1 T D
        for index, layer in enumerate(self.layers):
            given = x, (rotary if self.config.rotates(index) else None), context.of_layer(index)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, *given, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(*given)
        return self.norm(x)


class Transformer(nn.Module):
    """The decoder with its output head.

    `forward(input_ids)` returns logits [B, T, V]. `forward(input_ids, targets)` returns the negative log-likelihood in
    nats, a fp32 scalar, summed over the targets [B, T] that are not IGNORE_INDEX. targets[b, t] is the token expected
    after input_ids[b, t]. The head runs only at those positions. On a GPU the targets should be in host memory, where
    they are counted without waiting for the GPU. A prefix [P] precedes every row and is computed once. With a teacher,
    the `target_states` and the head weight of another model, the result is the summed divergence KL(teacher || model)
    of the next token at the same positions.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Makes the head and the embedding one parameter if the configuration ties them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids: Tensor, targets: Tensor | None = None, prefix: Tensor | None = None,
                teacher: tuple[Tensor, Tensor] | None = None) -> Tensor:
        if targets is None:
            return self.lm_head(self.hidden_states(input_ids, prefix))  # B T V
        states, labels = self.target_states(input_ids, targets, prefix)
        return self.lm_head(states, *(teacher or (labels,)))

    def hidden_states(self, input_ids: Tensor, prefix: Tensor | None) -> Tensor:
        """Returns the final hidden states [B, T, C] of the rows."""
        if prefix is None or not len(prefix):
            return self.model(input_ids)
        sequence = torch.cat((prefix, input_ids.flatten()))[None]  # 1 P+B·T
        hidden = self.model(sequence, SharedPrefix(self.config, len(prefix), input_ids.shape, self.lm_head.weight))
        return hidden[0, len(prefix):].unflatten(0, input_ids.shape)  # B T C

    def target_states(self, input_ids: Tensor, targets: Tensor, prefix: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the hidden states [N, C] at the positions that predict a target, and these targets [N]."""
        hidden = self.hidden_states(input_ids, prefix)
        index = (targets != IGNORE_INDEX).flatten().nonzero()[:, 0]
        labels = to_device(targets.flatten()[index], hidden.device)
        return hidden.flatten(0, 1)[to_device(index, hidden.device)], labels


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, fp32 tensor) of a new model: matrices normal with `initializer_range`, norms 1, biases 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            yield name, torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
        else:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of every parameter in model order, without a tied head. Allocates no memory."""
    with torch.device("meta"):  # all layers have the shapes of one
        one_layer = Transformer(config.with_layers([0]))
    embedding, *rest = ((name, tuple(parameter.shape)) for name, parameter in one_layer.named_parameters())
    layers = [(f"model.layers.{index}.{name.removeprefix('model.layers.0.')}", shape)
              for index in range(config.num_hidden_layers) for name, shape in rest if name.startswith("model.layers.")]
    return dict([embedding, *layers, *(item for item in rest if not item[0].startswith("model.layers."))])
