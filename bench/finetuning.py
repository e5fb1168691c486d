"""Fine-tuning beside transformers: the same losses, and real tokens a second.

    python bench/finetuning.py --checkpoint DIR --data data/prepared/raw/simp.json
    python bench/finetuning.py --data data/prepared/sample/simp.json --folder DIR       random weights of the size small

Both take the same steps on the same samples under the same DeepSpeed configuration with the same optimizer, in turns.
transformers' LlamaForCausalLM gets `batch_size` samples at once in the order in which they come, padded to the longest,
and makes the logits of all tokens; its loss is the mean over the target tokens of the global batch, as ours is. A rate
counts the tokens of the samples, without padding. `of a matrix product` is 6·N FLOPs for each of them over the rate of
a large matrix product in the same dtype, measured in between.
"""
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from batches import TaskData, count_tokens, global_batch, read_task
from bench.common import dtype_of, in_batches, matrix_rate, small_checkpoint, their_step
from build import build_engine, build_model
from distributed import Processes
from settings import run, setting
from train import take_step
from train_settings import TrainSettings


@dataclass(frozen=True)
class FinetuningBenchSettings:
    """Settings of the benchmark."""
    data: str | None = setting(None, "preprocessed task file")
    checkpoint: str | None = setting(None, "checkpoint to fine-tune; none: random weights of the size small")
    folder: str | None = setting(None, "folder for those")
    samples: int = setting(256, "training samples, each seen once a repeat")
    global_batch_size: int = setting(32, "samples in a step")
    batch_size: int = setting(8, "samples at once in transformers")
    repeats: int = setting(2, "times that each step is measured, after one that is not")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")
    learning_rate: float = setting(2e-5, "learning rate")

    def problems(self):
        found = [] if self.data else ["--data is missing"]
        return found + ([] if self.checkpoint or self.folder else ["give --checkpoint or --folder"])


def main(s):
    """Prints the rates, their ratio, and how far apart the losses are."""
    checkpoint = Path(s.checkpoint) if s.checkpoint else small_checkpoint(Path(s.folder))
    settings = TrainSettings(task="simp", init=str(checkpoint), dtype=s.dtype, learning_rate=s.learning_rate,
                             zero=1)  # under which DeepSpeed clips the gradients of both
    dtype = dtype_of(settings)
    with Processes() as world:
        tokenizer, model = build_model(settings, checkpoint, world)
        data = TaskData(read_task(s.data)[0]["train"][:s.samples], tokenizer, settings.max_source_length,
                        settings.max_target_length)
        ours = build_engine(settings, model, world)
        peer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype).to(world.device).train()
        theirs = build_engine(settings, peer, world)
        ways = {"transformers": lambda samples: their_step(theirs, samples, s.batch_size),
                "ours": lambda samples: take_step(settings, ours, samples, world)[0]}
        steps = len(data) // s.global_batch_size
        batches = [[data[index] for index in global_batch(settings.seed, len(data), start, start + s.global_batch_size)]
                   for start in range(0, (1 + steps * s.repeats) * s.global_batch_size, s.global_batch_size)]
        speeds, losses, products = {way: [] for way in ways}, {way: [] for way in ways}, []
        for number, samples in enumerate(batches):
            products.append(matrix_rate(world.device, dtype, repeats=5))
            for way, step in ways.items():
                began = time.perf_counter()
                losses[way].append(step(samples))
                speeds[way].append(count_tokens(samples)[0] / (time.perf_counter() - began))
            print(f"step {number}: loss {losses['transformers'][-1]:.4f} and {losses['ours'][-1]:.4f}, tokens/s "
                  f"{speeds['transformers'][-1]:,.0f} and {speeds['ours'][-1]:,.0f}", flush=True)
    read, slots = count_tokens(data.samples)[0], sum(len(batch) * max(count_tokens([sample])[0] for sample in batch)
                                                     for batch in in_batches(data.samples, s.batch_size))
    product = statistics.median(products)
    print(f"{model.config.num_parameters:,} parameters, {dtype}; {len(data)} samples of {read / len(data):.0f} tokens, "
          f"in transformers' batches {1 - read / slots:.0%} padding; a matrix product: {product / 1e9:,.0f} GFLOP/s")
    print(f"{'':<14} {'tokens/s':>9} {'ratio':>6} {'of a matrix product':>20}")
    base = statistics.median(speeds["transformers"][1:])
    for way, found in speeds.items():
        speed = statistics.median(found[1:])
        print(f"{way:<14} {speed:>9,.1f} {speed / base:>6.2f} {model.config.flops(speed) / product:>20.1%}")
    apart = [abs(a / b - 1) for a, b in zip(losses["ours"], losses["transformers"])]
    print(f"losses of {len(apart)} steps: largest relative difference {max(apart):.1e}, mean "
          f"{statistics.fmean(apart):.1e}")


if __name__ == "__main__":
    run((FinetuningBenchSettings, main), __doc__)
