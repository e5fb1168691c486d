"""Pretraining beside transformers and beside a plain loop: the same losses, tokens a second, and where the time goes.

    python bench/pretraining.py                                     the size small, on random tokens
    python bench/pretraining.py --size tiny --dtype fp32

All take the same steps from the same weights on the same packed sequences, in turns: ours and transformers'
LlamaForCausalLM under the same DeepSpeed configuration; and plain PyTorch as in nanoGPT, the same architecture with
fused query, key and value, torch's own RMS norm and fused AdamW, under autocast where the dtype is bf16, as it is and
compiled. `of a matrix product` is 6·N FLOPs a token over the rate of a large matrix product in the same dtype, measured
in between. The profile is of our steps, on a CPU: the time of operators by what they are for, and what is left between
them.
"""
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from batches import collate
from bench.common import dtype_of, in_batches, matrix_rate, random_model, random_samples, random_weights, their_step
from build import build_engine
from distributed import Processes
from model.transformer import rotary_table
from settings import run, setting, unknown_name
from stages import shape
from train import take_step
from train_settings import TrainSettings


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


def plain_loop(s, model, settings, dtype, device):
    """A function that takes a step of a plain module; it returns the mean loss."""
    groups = [{"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": settings.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim != 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, s.learning_rate, (settings.adam_beta1, settings.adam_beta2), fused=True)

    def step(samples):
        total, batches = 0.0, in_batches(samples, s.batch_size)
        for batch in batches:
            ids, targets = (tensor.to(device) for tensor in collate(batch))
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16):
                loss = model(ids, targets) / len(batches)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(total)
    return step


def kind(event, vocabulary):
    """What the time that an operator spends itself is for."""
    name, shapes, above = event.name, [shape for shape in event.input_shapes or [] if shape], event.cpu_parent
    product = name in ("aten::mm", "aten::addmm", "aten::bmm", "aten::mkldnn_linear", "aten::_mkldnn_linear")
    while above:
        if "AccumulateGrad" in above.name:
            return "DeepSpeed: gradients"
        if above.name == "engine.step":
            return "optimizer" if "adamw" in name else "DeepSpeed: step"
        above = above.cpu_parent
    if any(vocabulary in shape if product else shape[-1] == vocabulary for shape in shapes):
        return "head and loss"
    if product:
        return "matrix products"
    return "attention" if "scaled_dot_product" in name else "norms, rotation, elementwise"


def print_profile(settings, engine, batches, world, vocabulary):
    """Prints where the time of our steps goes."""
    step = engine.step

    def named_step():
        with record_function("engine.step"):
            step()

    engine.step = named_step
    spent = Counter()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        began = time.perf_counter()
        for samples in batches:
            take_step(settings, engine, samples, world)
        took = (time.perf_counter() - began) / len(batches)
    engine.step = step
    for event in profiled.events():
        if event.name.startswith("aten::"):
            spent[kind(event, vocabulary)] += event.self_cpu_time_total / 1e6 / len(batches)
    spent["between operators: Python, DeepSpeed, autograd"] = took - sum(spent.values())
    print(f"a step of ours, {took:.3f} s while it is profiled:")
    for name, seconds in spent.most_common():
        print(f"  {name:<48} {seconds:7.3f} s {seconds / took:6.1%}")


def main(s):
    """Prints rates, ratios, how far apart the losses are, and the profile."""
    config = shape(s.size)
    settings = TrainSettings(dtype=s.dtype, learning_rate=s.learning_rate, weight_decay=0.1, adam_beta2=0.95,
                             max_grad_norm=1.0, zero=1)  # under which DeepSpeed clips the gradients
    dtype = dtype_of(settings)
    with Processes() as world:
        engine = build_engine(settings, random_model(config, world.device, dtype), world)
        peer = LlamaForCausalLM(LlamaConfig(**vars(config))).to(world.device, dtype).train()
        peer.load_state_dict(dict(random_weights(config, world.device, dtype)), strict=not config.tie_word_embeddings)
        theirs = build_engine(settings, peer, world)
        plain = [Plain(config, random_weights(config, world.device, torch.float32)) for _ in range(1 + s.compile)]
        ways = {"transformers": lambda samples: their_step(theirs, samples, s.batch_size),
                "plain": plain_loop(s, plain[0], settings, dtype, world.device)}
        if s.compile:
            ways["plain, compiled"] = plain_loop(s, torch.compile(plain[1]), settings, dtype, world.device)
        ways["ours"] = lambda samples: take_step(settings, engine, samples, world)[0]
        generator, products = np.random.default_rng(0), []
        speeds, losses = {way: [] for way in ways}, {way: [] for way in ways}
        for number in range(2 + s.repeats):
            samples = random_samples(generator, config, s.global_batch_size, s.seq_length)
            products.append(matrix_rate(world.device, dtype, repeats=5))
            for way, step in ways.items():
                began = time.perf_counter()
                losses[way].append(step(samples))
                if number > 1:
                    speeds[way].append(s.global_batch_size * s.seq_length / (time.perf_counter() - began))
        product, base = statistics.median(products), statistics.median(speeds["transformers"])
        print(f"{config.num_parameters:,} parameters, {dtype}, {s.global_batch_size} × {s.seq_length} tokens a step; "
              f"a matrix product: {product / 1e9:,.0f} GFLOP/s")
        print(f"{'':<16} {'tokens/s':>9} {'ratio':>6} {'of a matrix product':>20} {'losses apart':>13}")
        for way, found in speeds.items():
            speed = statistics.median(found)
            apart = max(abs(a / b - 1) for a, b in zip(losses[way], losses["transformers"]))
            print(f"{way:<16} {speed:>9,.0f} {speed / base:>6.2f} {config.flops(speed) / product:>20.1%} "
                  f"{apart:>13.1e}")
        if world.device.type == "cpu":
            print_profile(settings, engine, [samples] * 4, world, config.vocab_size)


if __name__ == "__main__":
    run((PretrainingBenchSettings, main), __doc__)
