"""The model of a step's time (pipeline/step_time.py): its error on published runs, and what it says of three sizes.

    python bench/published_steps.py
    python bench/published_steps.py --runs    each run
    python bench/published_steps.py --fit     other values of the fitted numbers

bench/published_steps.csv has the runs: all of llm-foundry's training benchmarks of 7B parameters and more in bf16 with
full sharding (MosaicML, FSDP: https://github.com/mosaicml/llm-foundry/tree/8c8dd48/scripts/train/benchmarking), those
of torchtitan (FSDP2: https://github.com/pytorch/torchtitan/blob/main/benchmarks/llama3_h100_202412_torchtitan.md) and
of DeepSpeed 0.14 with a LLaMA of transformers
(https://gist.github.com/chenyaofo/d4cd6a20ab4b95cb3a49491747e2139a, whose unit is taken to be samples per second). Runs
of Megatron-LM are not among them: the published ones split matrices or layers over GPUs, or compute in FP8, neither of
which this project does. Columns: `samples` of a micro-step of a GPU, `recomputed` the share of the forward pass that is
computed twice (torchtitan's "selective" checkpointing recomputes every other matrix product), `gradient_bytes` in which
gradients are reduced, `tokens_per_second` of a GPU.
"""
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.scripts import run
from common.settings import setting
from model.config import ModelConfig
from pipeline import step_time
from pipeline.memory_plan import GIB, PREFIX_TOKENS, MemoryPlan, alternatives
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
    """A published run, a line of the table."""
    framework: str
    card: str
    shape: str
    gpus: int
    length: int
    samples: int
    micro_steps: int
    zero: int
    recomputed: float
    gradient_bytes: int
    tokens_per_second: float

    @property
    def kind(self) -> tuple[str, str]:
        """The framework and the generation of the GPUs, which share the rate that matrix products reach."""
        return self.framework, "h100" if self.card.startswith("h100") else "a100"

    @property
    def group(self) -> str:
        """The group of runs for which errors are printed."""
        size = "more than 64 GPUs" if self.gpus > 64 else "texts above 4,096 tokens" if self.length > 4096 else ""
        return " ".join(filter(None, (f"{self.framework} on {self.card}", size and f"({size})")))

    @property
    def step(self) -> Step:
        """The step of this run."""
        config = SHAPES[self.shape]
        return Step(config, self.gpus, self.zero, tokens=self.samples * self.length, micro_steps=self.micro_steps,
                    length=self.length, trained=config.num_parameters, reached=config.num_parameters,
                    recomputed=self.recomputed, gradient_bytes=self.gradient_bytes)

    def modelled(self, utilisation: float) -> float:
        """The modelled throughput in tokens per second of a GPU."""
        step = self.step
        return step.micro_steps * step.tokens / step.seconds(CARDS[self.card], utilisation)

    def error(self, utilisation: float) -> float:
        """Relative error of the modelled throughput."""
        return self.modelled(utilisation) / self.tokens_per_second - 1


def read_runs() -> list[Published]:
    """The runs of the table."""
    with open(Path(__file__).with_suffix(".csv"), newline="") as file:
        return [Published(*(value if name in ("framework", "card", "shape") else float(value) if name == "recomputed"
                            else int(value) for name, value in row.items())) for row in csv.DictReader(file)]


@dataclass(frozen=True)
class PublishedStepsConfig:
    """Settings of the output."""
    runs: bool = setting(False, "print each run")
    fit: bool = setting(False, "print the error for other values of the fitted numbers")


def fitted_utilisations(runs: Sequence[Published]) -> dict[tuple[str, str], float]:
    """The share of the matrix rate with the lowest mean error, for each framework and generation of GPUs."""
    kinds = dict.fromkeys(one.kind for one in runs)
    return {kind: min((share / 100 for share in range(20, 90)),
                      key=lambda share: mean(abs(one.error(share)) for one in runs if one.kind == kind))
            for kind in kinds}


def left_out_error(one: Published, runs: Sequence[Published]) -> float:
    """Error of a run where its kind's utilisation is fitted to the others."""
    others = [other for other in runs if other.kind == one.kind and other != one]
    return one.error(fitted_utilisations(others)[one.kind])


def mean_size(errors: Sequence[float]) -> float:
    """Mean of the errors' sizes."""
    return mean(map(abs, errors))


def fit(runs: Sequence[Published]) -> None:
    """Prints the mean error over a grid of the numbers that several frameworks share."""
    print(f"{'exposed':>8} {'collectives':>12} {'attention: h100':>16} {'a100':>5} {'mean error':>11}")
    for exposed, collectives in product((0.5, 0.75, 1), (0.5, 0.7, 0.9)):
        step_time.EXPOSED, step_time.COLLECTIVES = exposed, collectives
        best, errors = [], []
        for generation in ("h100", "a100"):
            own = [one for one in runs if one.kind[1] == generation]
            cards = {name: card for name, card in CARDS.items() if any(one.card == name for one in own)}
            tried = []
            for attention in (1, 1.5, 2, 2.5, 3, 3.5, 4, 5):
                CARDS.update({name: replace(card, attention=attention) for name, card in cards.items()})
                shares = fitted_utilisations(own)
                tried.append((attention, [one.error(shares[one.kind]) for one in own]))
            attention, found = min(tried, key=lambda pair: mean_size(pair[1]))
            best.append(attention)
            errors += found
        print(f"{exposed:8} {collectives:12} {best[0]:16} {best[1]:5} {mean_size(errors):11.1%}")


def print_runs(runs: Sequence[Published], shares: dict[tuple[str, str], float]) -> None:
    """Prints each published run with the modelled throughput."""
    print(f"\n{'':11} {'GPUs':16} {'model':11} ZeRO {'length':>7} {'tokens':>7} steps published modelled error")
    for one in runs:
        modelled = one.modelled(shares[one.kind])
        print(f"{one.framework:11} {f'{one.gpus} × {one.card}':16} {one.shape:11} {one.zero:4} {one.length:7,} "
              f"{one.samples * one.length:7,} {one.micro_steps:5} {one.tokens_per_second:9,.0f} {modelled:8,.0f} "
              f"{one.error(shares[one.kind]):+5.0%}")


def compare(runs: Sequence[Published], shares: dict[tuple[str, str], float]) -> None:
    """Prints the utilisations, and the errors by framework, card and kind of run."""
    for (framework, card), share in shares.items():
        print(f"{framework} on {card}: matrix products at {share:.0%} of the matrix rate")
    errors = [one.error(shares[one.kind]) for one in runs]
    print(f"\n{'':53} {'runs':>4} {'mean error':>10} {'size':>6} {'largest':>8}")
    for group in dict.fromkeys(one.group for one in runs):
        own = [error for one, error in zip(runs, errors) if one.group == group]
        print(f"{group:53} {len(own):4} {mean(own):+10.1%} {mean_size(own):6.1%} {max(own, key=abs):+8.0%}")
    middle = [one.error(mean(CARDS[one.card].utilisation)) for one in runs]
    print(f"{'all':53} {len(runs):4} {mean(errors):+10.1%} {mean_size(errors):6.1%} {max(errors, key=abs):+8.0%}")
    left_out = [left_out_error(one, runs) for one in runs]
    print(f"mean size {mean_size(left_out):.1%} with utilisations fitted without the run, {mean_size(middle):.1%} with "
          "the middle of a GPU's range for all frameworks")


def sizes() -> None:
    """Prints memory and speed of pretraining and fine-tuning three sizes on one to 64 nodes."""
    gpu = GPUS["h100"]
    print(f"\n{'':5} {'GPUs':>5} {'plan':60} {'memory':>8}   pretraining   fine-tuning, tokens/s of a GPU")
    for name, gpus in product(("7B", "13B", "70B"), (8, 64, 512)):
        shape = SHAPES["LLaMA-7B" if name == "7B" else name]
        first = MemoryPlan(shape, gpus, 2, False, "bf16", 8192, False, prefix_tokens=PREFIX_TOKENS)
        plan = next((one for one in (first, *alternatives(first)) if one.fits(gpu.memory)), first)
        host = f" offloaded to {plan.host() / GIB:,.0f} GiB" if plan.offload else ""
        text = ", ".join(filter(None, (f"ZeRO-{plan.zero}{host}", plan.gradient_checkpointing and "checkpointing",
                                       f"{plan.max_tokens_per_microbatch:,} tokens")))
        speeds = []
        for length, samples in ((2048, 2048), (128, 256)):
            step = plan_step(replace(plan, sample_tokens=length), samples)
            slow, fast = (length * samples / step.seconds(gpu, share) / gpus for share in gpu.utilisation)
            speeds.append("not modelled" if plan.offload else f"{slow:,.0f}–{fast:,.0f}")
        print(f"{name:5} {gpus:5} {text:60} {plan.total() / GIB:4.0f} GiB {speeds[0]:>13} {speeds[1]:>13}")
    print("pretraining: 2,048 samples of 2,048 tokens a step; fine-tuning: 256 samples of 128 tokens a step")


def main(cfg: PublishedStepsConfig) -> None:
    """Prints the tables, or the fit."""
    runs = read_runs()
    if cfg.fit:
        fit(runs)
        return
    shares = fitted_utilisations(runs)
    compare(runs, shares)
    if cfg.runs:
        print_runs(runs, shares)
    sizes()


if __name__ == "__main__":
    run((PublishedStepsConfig, main), __doc__)
