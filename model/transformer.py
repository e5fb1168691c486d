"""A decoder-only transformer in the Llama layout, with Hugging Face's parameter names.

Dimensions:  B batch, T tokens of this call, S keys that are attended to, C hidden size, F feed-forward size,
             H query heads, K key-value heads, D head size, V vocabulary, N tokens with a target, P of a common prefix.

Training pads on the right and needs no attention mask: under a causal mask a real token never sees the padding
behind it, so scaled_dot_product_attention is free to take its causal flash kernel (on GPUs in bf16, on CPUs in fp32).
"""
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from model.loss import IGNORE_INDEX, Head


class RMSNorm(nn.Module):
    """Root mean square norm in fp32 (Zhang and Sennrich, arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        full = x.float()
        full = full * torch.rsqrt(full.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * full.to(x.dtype)


def rotary_frequencies(config, device=None):
    """Angles per position of the rotary embedding, [D/2] in fp32 (Su et al., arXiv 2104.09864, eq. 15).

    With `rope_scaling` "linear" all are divided by the factor; with "llama3" the low frequencies are divided, the
    high ones stay, and those between are interpolated by how often they turn within the original context.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
    frequencies = 1.0 / config.rope_theta ** exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    if scaling["rope_type"] == "linear":
        return frequencies / scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling["factor"])


def rotary_table(config, positions, dtype):
    """Cosines and sines for positions [..., T], each [..., T, D]: the D/2 angles twice, as half-split rotation asks."""
    angles = positions[..., None].float() * rotary_frequencies(config, positions.device)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, cos, sin):
    """Turns x [B, H, T, D] by its positions. Dimension i is paired with i + D/2, as in Hugging Face's Llama."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def attention(query, key, value, bias=None):
    """Softmax attention of query [B, H, T, D] over key and value [B, K, S, D]: causal, the queries being the last T of
    S tokens, or with a bias.

    The bias [1|B, 1, H/K·T, S] is added to the scores: 0 where a query sees a key, -inf where it does not. With fewer
    key-value heads than query heads, the H/K query heads of a group then stand as further queries of their key-value
    head, which no kernel has to know of; `group_bias` repeats a bias for them.
    """
    (B, H, T, D), (K, S) = query.shape, key.shape[1:3]
    written_out = query.device.type == "cpu" and query.dtype is torch.bfloat16  # SDPA takes 2 to 5 times as long there
    if bias is None and T == S and not written_out:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=H != K)
    if bias is None and query.device.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # keeps the flash kernel; takes a second to import
        return F.scaled_dot_product_attention(query, key, value, causal_lower_right(T, S), enable_gqa=H != K)
    if bias is None:
        seen = torch.ones(1, T, S, dtype=torch.bool, device=query.device).tril_(S - T)
        bias = group_bias(seen, H // K, query.dtype)
    query = query.reshape(B, K, -1, D)
    if not written_out:
        return F.scaled_dot_product_attention(query, key, value, bias).reshape(B, H, T, D)
    query, key, value = (x.flatten(0, 1) for x in (query, key, value))  # B·K H/K·T|S D
    scores = torch.baddbmm(bias.expand(B, K, -1, -1).flatten(0, 1), query, key.mT, alpha=D ** -0.5)
    return (scores.softmax(-1) @ value).view(B, H, T, D)


def group_bias(seen, group, dtype):
    """The bias [B, 1, H/K·T, S] for what each query sees, a boolean [B, T, S], with H/K = `group` queries a key."""
    bias = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -math.inf)
    return bias.repeat(1, group, 1)[:, None]


class SharedPrefix:
    """The attention of a prefix and B rows of T tokens that follow it, in the place of a cache.

    The model reads all as one text of P + B·T tokens, so that everything runs once on the prefix; attention is causal
    in each row, with the prefix before it.
    """

    def __init__(self, prefix, rows, device):
        self.prefix, self.rows = prefix, rows  # P, (B, T)
        B, T = rows
        self.positions = torch.cat((torch.arange(prefix), torch.arange(prefix, prefix + T).repeat(B)))[None].to(device)

    def attend(self, layer, query, key, value):
        """Attention of query [1, H, P + B·T, D] over key and value [1, K, P + B·T, D]."""
        prefix, rows = zip(*map(self.split, (query, key, value)))
        seen = (torch.cat((x.expand(len(y), -1, -1, -1), y), 2) for x, y in zip(prefix[1:], rows[1:]))  # B K P+T D
        y = attention(rows[0], *seen)  # B H T D
        return torch.cat((attention(*prefix), y.transpose(0, 1).flatten(1, 2)[None]), 2)

    def split(self, x):
        """The prefix [1, H, P, D] and the rows [B, H, T, D] of x [1, H, P + B·T, D]."""
        prefix, rows = x.split((self.prefix, x.shape[2] - self.prefix), 2)
        return prefix, rows[0].unflatten(1, self.rows).transpose(0, 1)


class Attention(nn.Module):
    """Causal self-attention with K key-value heads for H query heads (GQA: Ainslie et al., arXiv 2305.13245)."""

    def __init__(self, config, index):
        super().__init__()
        C, H, K, D = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.index, self.head_dim = index, D
        self.q_proj = nn.Linear(C, H * D, bias=config.attention_bias)
        self.k_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.v_proj = nn.Linear(C, K * D, bias=config.attention_bias)
        self.o_proj = nn.Linear(H * D, C, bias=config.attention_bias)

    def forward(self, x, rotary, cache=None):
        B, T, _ = x.shape
        query, key, value = (projection(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # B H|K T D
                             for projection in (self.q_proj, self.k_proj, self.v_proj))
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        y = attention(query, key, value) if cache is None else cache.attend(self.index, query, key, value)  # B H T D
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))  # B T C


class MLP(nn.Module):
    """SwiGLU feed-forward (Shazeer, arXiv 2002.05202, eq. 6)."""

    def __init__(self, config):
        super().__init__()
        C, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, hidden, bias=config.mlp_bias)
        self.up_proj = nn.Linear(C, hidden, bias=config.mlp_bias)
        self.down_proj = nn.Linear(hidden, C, bias=config.mlp_bias)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each after a norm and added to the residual stream."""

    def __init__(self, config, index):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rotary, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Token ids [B, T] to final hidden states [B, T, C].

    A cache says where the tokens stand, `cache.positions` [B, T], and what they see, `cache.attend(layer, query, key,
    value)`; without one they are the first T tokens of their texts, and attention is causal.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False  # recompute each block in the backward pass instead of keeping it
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, cache=None):
        x = self.embed_tokens(input_ids)  # B T C
        positions = torch.arange(input_ids.shape[1], device=x.device)[None] if cache is None else cache.positions
        cos, sin = rotary_table(self.config, positions, x.dtype)
        rotary = cos[:, None], sin[:, None]  # 1|B 1 T D
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rotary, cache, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x, rotary, cache)
        return self.norm(x)


class Transformer(nn.Module):
    """The decoder with its output head.

    `forward(input_ids)` gives logits [B, T, V]. `forward(input_ids, targets)` gives the summed negative
    log-likelihood (a scalar in nats, fp32) of the targets [B, T] that are not IGNORE_INDEX: targets[b, t] is the
    token expected after input_ids[b, t]. The head runs only there. A prefix [P] stands before each of the rows; it is
    computed once.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        self.tie_weights()

    def tie_weights(self):
        """Makes the head and the embedding one parameter where the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, input_ids, targets=None, prefix=None):
        if prefix is None or not len(prefix):
            hidden = self.model(input_ids)  # B T C
        else:
            text = torch.cat((prefix, input_ids.flatten()))[None]
            hidden = self.model(text, SharedPrefix(len(prefix), input_ids.shape, text.device))
            hidden = hidden[0, len(prefix):].unflatten(0, input_ids.shape)  # B T C
        if targets is None:
            return self.lm_head(hidden)  # B T V
        wanted = targets != IGNORE_INDEX
        return self.lm_head(hidden[wanted], targets[wanted])  # N C, N


def initial_weights(config, seed):
    """The weights for training from scratch, as pairs (name, tensor in fp32): normal with `initializer_range`, norms 1,
    biases 0. One is held at a time."""
    generator = torch.Generator().manual_seed(seed)
    for name, shape in parameter_shapes(config).items():
        if len(shape) == 2:
            yield name, torch.empty(shape).normal_(0.0, config.initializer_range, generator=generator)
        else:
            yield name, torch.full(shape, 0.0 if name.endswith("bias") else 1.0)


def parameter_shapes(config):
    """Name -> shape of every parameter of a model, in its own order and a tied head left out; takes no memory."""
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Transformer(config).named_parameters()}
