"""The model of a step's time (pipeline/step_time.py): its error on published runs, and what it says of three sizes.

    python bench/published_steps.py
    python bench/published_steps.py --fit

The runs are those of llm-foundry's training benchmarks (MosaicML, FSDP with full sharding:
https://github.com/mosaicml/llm-foundry/tree/061f2c7/scripts/train/benchmarking), of torchtitan (FSDP2:
https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md) and of DeepSpeed 0.14 with
a LLaMA of transformers (https://gist.github.com/chenyaofo/d4cd6a20ab4b95cb3a49491747e2139a, whose unit is taken to be
samples per second). Runs of Megatron-LM are not among them: the published ones split matrices or layers over GPUs, or
compute in FP8, neither of which this project does.
"""
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.scripts import run
from common.settings import setting
from model.config import ModelConfig
from pipeline import step_time
from pipeline.memory_plan import GIB, MemoryPlan, alternatives
from pipeline.step_time import GPUS, Step, plan_step

# An A800 is an A100 whose NVLink is slower. torchtitan's H100s have HBM2e, and run at 500 W.
CARDS = GPUS | {"a800": replace(GPUS["a100"], nvlink=200e9), "a100 40gb": replace(GPUS["a100"], memory_rate=1.56e12),
                "h100 hbm2e": replace(GPUS["h100"], memory_rate=2.4e12)}


def llama(layers: int, hidden: int, intermediate: int, vocab: int, tied: bool = False, kv_heads: int | None = None) \
        -> ModelConfig:
    """The configuration of a published shape with heads of 128."""
    heads = hidden // 128
    return ModelConfig(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, vocab_size=vocab,
                       num_attention_heads=heads, num_key_value_heads=kv_heads or heads, tie_word_embeddings=tied)


def mpt(layers: int, hidden: int) -> ModelConfig:
    """An MPT: its MLP of two matrices of 4·hidden has as many weights as three of 8/3·hidden."""
    return llama(layers, hidden, round(8 * hidden / 3), 50_432, tied=True)


SHAPES = {"MPT-7B": mpt(32, 4096), "MPT-13B": mpt(40, 5120), "MPT-30B": mpt(48, 7168), "MPT-70B": mpt(80, 8192),
          "LLaMA-7B": llama(32, 4096, 11_008, 32_000), "Llama-3-8B": llama(32, 4096, 14_336, 128_256, kv_heads=8),
          "13B": llama(40, 5120, 13_824, 32_000), "70B": llama(80, 8192, 28_672, 32_000, kv_heads=8)}


@dataclass(frozen=True)
class Published:
    """A published run. Gradients are reduced in fp32 or bf16 (4 or 2 bytes)."""
    framework: str
    card: str
    shape: str
    gpus: int
    length: int
    samples: int  # of a micro-step of a GPU
    micro_steps: int
    recomputed: float
    gradient_bytes: int
    tokens_per_second: float  # of a GPU
    zero: int = 3

    @property
    def kind(self) -> tuple[str, str]:
        """The framework and the generation of the GPUs, which share the rate that computation reaches."""
        return self.framework, "h100" if self.card.startswith("h100") else "a100"

    @property
    def step(self) -> Step:
        """The step of this run."""
        config = SHAPES[self.shape]
        return Step(config, self.gpus, self.zero, self.samples * self.length, self.micro_steps, self.length,
                    config.num_parameters, self.recomputed, gradient_bytes=self.gradient_bytes)

    def error(self, utilisation: float) -> float:
        """Relative error of the modelled throughput."""
        modelled = self.step.tokens_per_second(CARDS[self.card], utilisation) / self.gpus
        return modelled / self.tokens_per_second - 1


# torchtitan recomputes every other matrix product (its "selective" checkpointing).
FOUNDRY, TITAN, DEEPSPEED = "llm-foundry", "torchtitan", "DeepSpeed"
RUNS = [
    Published(FOUNDRY, "h100", "MPT-7B", 8, 2048, 6, 1, 0, 4, 10_643),
    Published(FOUNDRY, "h100", "MPT-7B", 8, 4096, 16, 2, 1, 4, 8_611),
    Published(FOUNDRY, "h100", "MPT-13B", 8, 2048, 2, 1, 0, 4, 4_792),
    Published(FOUNDRY, "h100", "MPT-13B", 32, 2048, 2, 1, 0, 4, 4_811),
    Published(FOUNDRY, "h100", "MPT-13B", 64, 2048, 2, 1, 0, 4, 4_800),
    Published(FOUNDRY, "h100", "MPT-30B", 8, 2048, 3, 21, 1, 4, 2_002),
    Published(FOUNDRY, "h100", "MPT-30B", 32, 2048, 14, 3, 1, 4, 2_308),
    Published(FOUNDRY, "h100", "MPT-70B", 32, 2048, 2, 16, 1, 4, 882),
    Published(FOUNDRY, "h100", "MPT-70B", 64, 2048, 8, 4, 1, 4, 1_039),
    Published(TITAN, "h100 hbm2e", "Llama-3-8B", 8, 8192, 2, 1, 0.5, 4, 5_762),
    Published(TITAN, "h100 hbm2e", "Llama-3-8B", 128, 8192, 2, 1, 0.5, 4, 5_605),
    Published(FOUNDRY, "a100", "MPT-7B", 8, 2048, 6, 2, 0, 4, 4_641),
    Published(FOUNDRY, "a100", "MPT-13B", 8, 2048, 2, 3, 0, 4, 2_262),
    Published(FOUNDRY, "a100", "MPT-30B", 8, 2048, 3, 21, 1, 4, 916),
    Published(FOUNDRY, "a100", "MPT-70B", 64, 2048, 8, 4, 1, 2, 410),
    Published(FOUNDRY, "a100", "MPT-70B", 32, 2048, 2, 16, 1, 2, 373),
    Published(FOUNDRY, "a100 40gb", "MPT-7B", 128, 2048, 18, 1, 1, 2, 3_623),
    Published(FOUNDRY, "a100 40gb", "MPT-13B", 128, 2048, 16, 1, 1, 2, 1_972),
    Published(FOUNDRY, "a100 40gb", "MPT-70B", 128, 2048, 4, 1, 1, 2, 376),
    Published(FOUNDRY, "a100 40gb", "MPT-70B", 64, 2048, 2, 1, 1, 2, 276),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 1, 8, 0, 2, 5.33 * 512, zero=2),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 1, 8, 1, 2, 4.19 * 512, zero=2),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 4, 2, 1, 2, 4.69 * 512, zero=2),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 2, 4, 0, 2, 4.95 * 512),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 2, 4, 1, 2, 4.45 * 512),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 8, 1, 1, 2, 4.73 * 512),
    Published(DEEPSPEED, "a800", "LLaMA-7B", 8, 4096, 8, 2, 1, 2, 4.32 * 512),
]


@dataclass(frozen=True)
class PublishedStepsConfig:
    """What to print."""
    fit: bool = setting(False, "search the numbers of the model that are fitted")


def fitted_utilisations(runs: Iterable[Published]) -> dict[tuple[str, str], float]:
    """The share of the matrix rate with the lowest mean error, for each framework and generation of GPUs."""
    kinds = dict.fromkeys(one.kind for one in runs)
    return {kind: min((share / 100 for share in range(20, 90)),
                      key=lambda share: mean(abs(one.error(share)) for one in runs if one.kind == kind))
            for kind in kinds}


def mean_error(shares: dict[tuple[str, str], float]) -> float:
    """Mean of the errors' sizes."""
    return mean(abs(one.error(shares[one.kind])) for one in RUNS)


def fit() -> None:
    """Prints the mean error over a grid of the two numbers that are the same for all runs."""
    print(f"{'exposed':>8} {'collectives':>12} {'mean error':>11}")
    for exposed, collectives in product((0, 0.25, 0.5, 0.75, 1), (0.5, 0.7, 0.9)):
        step_time.EXPOSED, step_time.COLLECTIVES = exposed, collectives
        print(f"{exposed:8} {collectives:12} {mean_error(fitted_utilisations(RUNS)):11.1%}")


def compare() -> None:
    """Prints each published run with the modelled throughput."""
    shares = fitted_utilisations(RUNS)
    for (framework, card), share in shares.items():
        print(f"{framework} on {card}: computation at {share:.0%} of the matrix rate")
    print(f"\n{'':11} {'GPUs':16} {'model':11} ZeRO {'tokens':>7} steps published modelled error")
    for one in RUNS:
        error = one.error(shares[one.kind])
        print(f"{one.framework:11} {f'{one.gpus} × {one.card}':16} {one.shape:11} {one.zero:4} "
              f"{one.samples * one.length:7,} {one.micro_steps:5} {one.tokens_per_second:9,.0f} "
              f"{one.tokens_per_second * (1 + error):8,.0f} {error:+5.0%}")
    middle = {kind: mean(CARDS[kind[1]].utilisation) for kind in shares}
    print(f"mean error {mean_error(shares):.1%}; with the middle of a GPU's range for all frameworks "
          f"{mean_error(middle):.1%}")


def sizes() -> None:
    """Prints memory and speed of pretraining and fine-tuning three sizes on one to 64 nodes."""
    gpu = GPUS["h100"]
    print(f"\n{'':5} {'GPUs':>5} {'plan':45} {'memory':>8}   pretraining   fine-tuning, tokens/s of a GPU")
    for name, gpus in product(("7B", "13B", "70B"), (8, 64, 512)):
        shape = SHAPES["LLaMA-7B" if name == "7B" else name]
        first = MemoryPlan(shape, gpus, 2, False, "bf16", 8192, False)
        plan = next((p for p in (first, *alternatives(first)) if p.total() < gpu.memory * GIB), first)
        text = (f"ZeRO-{plan.zero}{' offloaded' * plan.offload}{', checkpointing' * plan.gradient_checkpointing}, "
                f"{plan.max_tokens_per_microbatch:,} tokens")
        speeds = []
        for length, batch in ((2048, 4 << 20), (128, 256 * 128)):
            step = plan_step(replace(plan, sample_tokens=length), batch)
            slow, fast = (step.tokens_per_second(gpu, share) / gpus for share in gpu.utilisation)
            speeds.append("not modelled" if plan.offload else f"{slow:,.0f}–{fast:,.0f}")
        print(f"{name:5} {gpus:5} {text:45} {plan.total() / GIB:4.0f} GiB {speeds[0]:>13} {speeds[1]:>13}")
    print("pretraining: 4,194,304 tokens a step in texts of 2,048; fine-tuning: 256 samples of 128 tokens a step")


def main(cfg: PublishedStepsConfig) -> None:
    """Prints the tables, or the fit."""
    if cfg.fit:
        return fit()
    compare()
    sizes()


if __name__ == "__main__":
    run((PublishedStepsConfig, main), __doc__)
