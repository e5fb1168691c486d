"""Fine-tuning beside transformers: the same losses, and real tokens a second.

    python bench/finetuning.py --checkpoint DIR --data data/prepared/raw/simp.json
    python bench/finetuning.py --data data/prepared/sample/simp.json --folder DIR       random weights of the size small

All take the same steps on the same samples under the same DeepSpeed configuration with the same optimizer, in turns.
transformers' LlamaForCausalLM gets `batch_size` samples at once in the order in which they come, or those of a global
batch sorted by length, padded to the longest, and makes the logits of all tokens; its loss is the mean over the target
tokens of the global batch, as ours is. A rate counts the tokens of the samples, without padding. The profile is of our
steps, on a CPU.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from batches import TaskData, count_tokens, global_batch, read_task
from bench.common import compare, dtype_of, in_batches, our_step, print_profile, small_checkpoint, their_step
from build import build_engine, build_model
from distributed import Processes
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from settings import run, setting
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
    repeats: int = setting(1, "times that each step is measured, after one that is not")
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 where the hardware multiplies it")
    learning_rate: float = setting(2e-5, "learning rate")

    def problems(self):
        found = [] if self.data else ["--data is missing"]
        return found + ([] if self.checkpoint or self.folder else ["give --checkpoint or --folder"])


def run_settings(s):
    """Those of train.py for the steps: ZeRO-1, under which DeepSpeed clips the gradients of all."""
    checkpoint = s.checkpoint or str(small_checkpoint(Path(s.folder)))
    return TrainSettings(task="simp", init=checkpoint, dtype=s.dtype, learning_rate=s.learning_rate, zero=1)


def our_engine(settings, world):
    """The engine on our model."""
    return build_engine(settings, build_model(settings, Path(settings.init), world)[1], world)


def ours(settings, world):
    """Our step."""
    return partial(our_step, our_engine(settings, world), settings=settings, world=world)


def theirs(settings, batch_size, by_length, world):
    """The step of transformers, on a global batch as it comes or sorted by length."""
    model = AutoModelForCausalLM.from_pretrained(settings.init, dtype=dtype_of(settings)).to(world.device).train()
    step = partial(their_step, build_engine(settings, model, world), batch_size=batch_size)
    return (lambda samples: step(sorted(samples, key=lambda sample: len(sample[0])))) if by_length else step


def main(s):
    """Prints the rates, their ratios, how far apart the losses are, and the profile."""
    settings = run_settings(s)
    dtype, config = dtype_of(settings), ModelConfig.read(Path(settings.init) / "config.json")
    data = TaskData(read_task(s.data)[0]["train"][:s.samples], Tokenizer(settings.init), settings.max_source_length,
                    settings.max_target_length)
    steps = 1 + len(data) // s.global_batch_size * s.repeats
    batches = [[data[index] for index in global_batch(settings.seed, len(data), start, start + s.global_batch_size)]
               for start in range(0, steps * s.global_batch_size, s.global_batch_size)]
    read = sum(count_tokens(batch)[0] for batch in batches)
    slots = sum(len(rows) * max(count_tokens([row])[0] for row in rows) for batch in batches
                for rows in in_batches(batch, s.batch_size))
    print(f"{config.num_parameters:,} parameters, {dtype}; samples of {read / steps / s.global_batch_size:.0f} tokens, "
          f"in transformers' batches as they come {1 - read / slots:.0%} padding")
    compare({"transformers": partial(theirs, settings, s.batch_size, False),
             "transformers, by length": partial(theirs, settings, s.batch_size, True),
             "ours": partial(ours, settings)}, batches, 1, dtype, config)
    with Processes() as world:
        if world.device.type == "cpu":
            print_profile(settings, our_engine(settings, world), batches[:3], world)


if __name__ == "__main__":
    run((FinetuningBenchSettings, main), __doc__)
