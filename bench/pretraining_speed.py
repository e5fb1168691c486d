"""Pretraining compared with transformers and a plain loop: losses, tokens per second, and where the time goes.

    python bench/pretraining_speed.py                                     the size small, on random tokens
    python bench/pretraining_speed.py --size tiny --dtype fp32

All variants take the same steps one after another, twice, from the same weights, on the same packed sequences: this
project and transformers' LlamaForCausalLM under the same DeepSpeed configuration, and plain PyTorch as in nanoGPT; this
project and the plain loop also compiled. The plain loop has the same architecture with a fused projection of query, key
and value, PyTorch's RMS norm and fused AdamW, under autocast if the dtype is bf16. On a CPU a profile of our steps
follows.
"""
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import compare, profile_steps
from bench.workload import (
    make_our_step,
    make_transformers_step,
    random_samples,
    random_weights,
    split_batches,
    torch_dtype,
)
from common.scripts import run
from common.settings import setting
from model.config import size_config
from model.transformer import rotary_table
from training.batches import collate
from training.train_config import TrainConfig


@dataclass(frozen=True)
class PretrainingBenchConfig:
    """Settings of the benchmark."""
    size: str = setting("small", "size preset that gives the model's shape", names="size")
    seq_length: int = setting(256, "tokens of a sample", at_least=1)
    global_batch_size: int = setting(16, "samples in a step", at_least=2)
    batch_size: int = setting(16, "samples in a batch of transformers and of the plain loop", at_least=1)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 if the hardware multiplies it")
    repeats: int = setting(8, "steps to measure, after two that are not measured", at_least=1)
    learning_rate: float = setting(1e-3, "learning rate", above=0)
    compile: bool = setting(True, "also measure the plain loop and this project compiled; needs a C++ compiler")


class PlainBlock(nn.Module):
    """One layer with a fused projection of query, key and value."""

    def __init__(self, config):
        super().__init__()
        C, D = config.hidden_size, config.head_dim
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads
        self.eps, self.head_dim = config.rms_norm_eps, D
        self.norm_1, self.norm_2 = nn.Parameter(torch.ones(C)), nn.Parameter(torch.ones(C))
        self.qkv = nn.Linear(C, sum(self.heads) * D, bias=False)
        self.out = nn.Linear(self.heads[0] * D, C, bias=False)
        self.gate_up = nn.Linear(C, 2 * config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, C, bias=False)

    def forward(self, x, cos, sin):
        B, T, C = x.shape
        qkv = self.qkv(F.rms_norm(x, (C,), self.norm_1, self.eps)).view(B, T, -1, self.head_dim).transpose(1, 2)
        q, k, v = qkv.split(self.heads, 1)
        q, k = (t * cos + torch.cat((-t[..., self.head_dim // 2:], t[..., :self.head_dim // 2]), -1) * sin
                for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads[0] != self.heads[1])
        x = x + self.out(y.transpose(1, 2).reshape(B, T, -1))
        gate, up = self.gate_up(F.rms_norm(x, (C,), self.norm_2, self.eps)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Plain(nn.Module):
    """The decoder as a plain module; forward returns the mean loss."""

    def __init__(self, config, weights):
        super().__init__()
        self.config, weights = config, dict(weights)
        self.embedding = nn.Parameter(weights["model.embed_tokens.weight"])
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(weights["model.norm.weight"])
        self.head = self.embedding if config.tie_word_embeddings else nn.Parameter(weights["lm_head.weight"])
        for index, block in enumerate(self.blocks):
            layer = {name.removeprefix(f"model.layers.{index}.").removesuffix(".weight"): tensor
                     for name, tensor in weights.items() if name.startswith(f"model.layers.{index}.")}
            block.load_state_dict({
                "norm_1": layer["input_layernorm"], "norm_2": layer["post_attention_layernorm"],
                "qkv.weight": torch.cat([layer[f"self_attn.{x}_proj"] for x in "qkv"]),
                "out.weight": layer["self_attn.o_proj"], "down.weight": layer["mlp.down_proj"],
                "gate_up.weight": torch.cat((layer["mlp.gate_proj"], layer["mlp.up_proj"]))})

    def forward(self, ids, targets):
        x = F.embedding(ids, self.embedding)
        cos, sin = rotary_table(self.config, torch.arange(ids.shape[1], device=ids.device), x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps), self.head)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def make_plain_step(cfg, config, batch_size, compiled, dist):
    """A function from a global batch to the loss of the plain loop's step on it."""
    model = Plain(config, random_weights(config, dist.device, torch.float32))
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": cfg.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, cfg.learning_rate, (cfg.adam_beta1, cfg.adam_beta2), fused=True)
    forward, use_bf16 = torch.compile(model) if compiled else model, torch_dtype(cfg) is torch.bfloat16

    def step(samples):
        total, batches = 0.0, split_batches(samples, batch_size)
        for batch in batches:
            ids, targets = (tensor.to(dist.device) for tensor in collate(batch))
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=use_bf16):
                loss = forward(ids, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return step


def main(cfg):
    """Prints the rates, their ratios, the differences of the losses, and the profile."""
    config = size_config(cfg.size)
    train_cfg = TrainConfig(dtype=cfg.dtype, learning_rate=cfg.learning_rate, weight_decay=0.1, adam_beta2=0.95,
                            max_grad_norm=1.0, zero=1)  # with ZeRO-1 DeepSpeed clips the gradients
    variants = {"transformers": partial(make_transformers_step, train_cfg, config, cfg.batch_size, False),
                "plain": partial(make_plain_step, train_cfg, config, cfg.batch_size, False)}
    if cfg.compile:
        variants["plain, compiled"] = partial(make_plain_step, train_cfg, config, cfg.batch_size, True)
    variants["ours"] = partial(make_our_step, train_cfg, config)
    if cfg.compile:
        variants["ours, compiled"] = partial(make_our_step, replace(train_cfg, compile=True), config)
    generator, dtype = np.random.default_rng(0), torch_dtype(train_cfg)
    batches = [random_samples(generator, config, cfg.global_batch_size, cfg.seq_length) for _ in range(2 + cfg.repeats)]
    print(f"{config.num_parameters:,} parameters, {dtype}, {cfg.global_batch_size} × {cfg.seq_length} tokens a step")
    compare(variants, batches, 2, dtype, config)
    # one sample fewer: the profile finds the head's products by the vocabulary's size, which the tokens must not equal
    profile_steps(train_cfg, config, [samples[1:] for samples in batches[:5]])


if __name__ == "__main__":
    run((PretrainingBenchConfig, main), __doc__)
