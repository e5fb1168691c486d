"""Pretraining beside transformers and beside a plain loop: the same losses, tokens a second, and where the time goes.

    python bench/pretraining.py                                     the size small, on random tokens
    python bench/pretraining.py --size tiny --dtype fp32

All take the same steps from the same weights on the same packed sequences, in turns: ours and transformers'
LlamaForCausalLM under the same DeepSpeed configuration; and plain PyTorch as in nanoGPT, the same architecture with
fused query, key and value, torch's own RMS norm and fused AdamW, under autocast where the dtype is bf16, as it is and
compiled. The profile is of our steps, on a CPU.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import (
    compare,
    dtype_of,
    in_batches,
    our_step,
    print_profile,
    random_model,
    random_samples,
    random_weights,
    their_step,
)
from common.distributed import Distributed
from common.settings import run, setting, unknown_name
from model.transformer import rotary_table
from pipeline.jobs import shape
from training.batches import collate
from training.engine import build_engine
from training.train_config import TrainConfig


@dataclass(frozen=True)
class PretrainingBenchSettings:
    """Settings of the benchmark."""
    size: str = setting("small", "size preset whose shape the model has")
    seq_length: int = setting(256, "tokens of a sample")
    global_batch_size: int = setting(16, "samples in a step")
    batch_size: int = setting(16, "samples at once in transformers and in the plain loop")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")
    repeats: int = setting(8, "steps that are measured, after two that are not")
    learning_rate: float = setting(1e-3, "learning rate")
    compile: bool = setting(True, "measure the plain loop compiled, too: needs a C++ compiler")

    def problems(self):
        return unknown_name("size", self.size)


class PlainBlock(nn.Module):
    """One layer, its query, key and value projections one matrix."""

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
    """The decoder as a plain module; forward gives the mean loss."""

    def __init__(self, config, weights):
        super().__init__()
        self.config, weights = config, dict(weights)
        self.embedding = nn.Parameter(weights["model.embed_tokens.weight"])
        self.blocks = nn.ModuleList(PlainBlock(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.Parameter(weights["model.norm.weight"])
        self.head = self.embedding if config.tie_word_embeddings else nn.Parameter(weights["lm_head.weight"])
        for index, block in enumerate(self.blocks):
            given = {name.removeprefix(f"model.layers.{index}.").removesuffix(".weight"): tensor
                     for name, tensor in weights.items() if name.startswith(f"model.layers.{index}.")}
            block.load_state_dict({
                "norm_1": given["input_layernorm"], "norm_2": given["post_attention_layernorm"],
                "qkv.weight": torch.cat([given[f"self_attn.{x}_proj"] for x in "qkv"]),
                "out.weight": given["self_attn.o_proj"], "down.weight": given["mlp.down_proj"],
                "gate_up.weight": torch.cat((given["mlp.gate_proj"], given["mlp.up_proj"]))})

    def forward(self, ids, targets):
        x = F.embedding(ids, self.embedding)
        cos, sin = rotary_table(self.config, torch.arange(ids.shape[1], device=ids.device), x.dtype)
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = F.linear(F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps), self.head)
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def plain(cfg, settings, compiled, dist):
    """The step of the plain loop."""
    dtype, model = dtype_of(settings), Plain(shape(cfg.size), random_weights(shape(cfg.size), dist.device, torch.float32))
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, cfg.learning_rate, (settings.adam_beta1, settings.adam_beta2), fused=True)
    forward = torch.compile(model) if compiled else model

    def step(samples):
        total, batches = 0.0, in_batches(samples, cfg.batch_size)
        for batch in batches:
            ids, targets = (tensor.to(dist.device) for tensor in collate(batch))
            with torch.autocast(dist.device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = forward(ids, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return step


def their_model(config, device, dtype):
    """transformers' model with the weights of `random_model`."""
    with device:
        model = AutoModelForCausalLM.from_config(LlamaConfig(**vars(config)), dtype=dtype).train()
    with torch.no_grad():
        for name, tensor in random_weights(config, device, dtype):
            model.get_parameter(name).copy_(tensor)
    return model


def theirs(cfg, settings, dist):
    """The step of transformers."""
    model = their_model(shape(cfg.size), dist.device, dtype_of(settings))
    return partial(their_step, build_engine(settings, model, dist), batch_size=cfg.batch_size)


def our_engine(cfg, settings, dist):
    """The engine on our model."""
    return build_engine(settings, random_model(shape(cfg.size), dist.device, dtype_of(settings)), dist)


def ours(cfg, settings, dist):
    """Our step."""
    return partial(our_step, our_engine(cfg, settings, dist), settings=settings, dist=dist)


def main(cfg):
    """Prints rates, ratios, how far apart the losses are, and the profile."""
    config = shape(cfg.size)
    settings = TrainConfig(dtype=cfg.dtype, learning_rate=cfg.learning_rate, weight_decay=0.1, adam_beta2=0.95,
                             max_grad_norm=1.0, zero=1)  # under which DeepSpeed clips the gradients
    ways = {"transformers": partial(theirs, cfg, settings), "plain": partial(plain, cfg, settings, False)}
    ways |= {"plain, compiled": partial(plain, cfg, settings, True)} if cfg.compile else {}
    ways["ours"] = partial(ours, cfg, settings)
    generator = np.random.default_rng(0)
    batches = [random_samples(generator, config, cfg.global_batch_size, cfg.seq_length) for _ in range(2 + cfg.repeats)]
    dtype = dtype_of(settings)
    print(f"{config.num_parameters:,} parameters, {dtype}, {cfg.global_batch_size} × {cfg.seq_length} tokens a step")
    compare(ways, batches, 2, dtype, config)
    with Distributed() as dist:
        if dist.device.type == "cpu":
            # a sample fewer, for the number of tokens not to be that of the vocabulary, which tells the head's products
            print_profile(settings, our_engine(cfg, settings, dist), [samples[1:] for samples in batches[:5]], dist)


if __name__ == "__main__":
    run((PretrainingBenchSettings, main), __doc__)
