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
from bench.timing import compare, dtype_of, in_batches, our_step, print_profile, small_checkpoint, their_step
from common.distributed import Distributed
from common.settings import run, setting
from corpus.tasks import SFTDataset, read_task
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from training.batches import count_tokens, global_batch
from training.engine import build_engine, build_model
from training.train_config import TrainConfig


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


def run_settings(cfg):
    """Those of train.py for the steps: ZeRO-1, under which DeepSpeed clips the gradients of all."""
    checkpoint = cfg.checkpoint or str(small_checkpoint(Path(cfg.folder)))
    return TrainConfig(task="simp", init=checkpoint, dtype=cfg.dtype, learning_rate=cfg.learning_rate, zero=1)


def our_engine(settings, dist):
    """The engine on our model."""
    return build_engine(settings, build_model(settings, Path(settings.init), dist)[1], dist)


def ours(settings, dist):
    """Our step."""
    return partial(our_step, our_engine(settings, dist), settings=settings, dist=dist)


def theirs(settings, batch_size, by_length, dist):
    """The step of transformers, on a global batch as it comes or sorted by length."""
    model = AutoModelForCausalLM.from_pretrained(settings.init, dtype=dtype_of(settings)).to(dist.device).train()
    step = partial(their_step, build_engine(settings, model, dist), batch_size=batch_size)
    return (lambda samples: step(sorted(samples, key=lambda sample: len(sample[0])))) if by_length else step


def main(cfg):
    """Prints the rates, their ratios, how far apart the losses are, and the profile."""
    settings = run_settings(cfg)
    dtype, config = dtype_of(settings), ModelConfig.read(Path(settings.init) / "config.json")
    data = SFTDataset(read_task(cfg.data)[0]["train"][:cfg.samples], Tokenizer(settings.init), settings.max_source_length,
                    settings.max_target_length)
    steps = 1 + len(data) // cfg.global_batch_size * cfg.repeats
    batches = [[data[index] for index in global_batch(settings.seed, len(data), start, start + cfg.global_batch_size)]
               for start in range(0, steps * cfg.global_batch_size, cfg.global_batch_size)]
    read = sum(count_tokens(batch)[0] for batch in batches)
    slots = sum(len(rows) * max(count_tokens([row])[0] for row in rows) for batch in batches
                for rows in in_batches(batch, cfg.batch_size))
    print(f"{config.num_parameters:,} parameters, {dtype}; samples of {read / steps / cfg.global_batch_size:.0f} tokens, "
          f"in transformers' batches as they come {1 - read / slots:.0%} padding")
    compare({"transformers": partial(theirs, settings, cfg.batch_size, False),
             "transformers, by length": partial(theirs, settings, cfg.batch_size, True),
             "ours": partial(ours, settings)}, batches, 1, dtype, config)
    with Distributed() as dist:
        if dist.device.type == "cpu":
            print_profile(settings, our_engine(settings, dist), batches[:3], dist)


if __name__ == "__main__":
    run((FinetuningBenchSettings, main), __doc__)
