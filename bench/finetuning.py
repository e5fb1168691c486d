"""Fine-tuning compared with transformers: losses, and tokens per second without padding.

    python bench/finetuning.py --checkpoint DIR --data data/prepared/raw/simp.json
    python bench/finetuning.py --data data/prepared/sample/simp.json --folder DIR       random weights of the size small

All variants take the same steps one after another, twice, on the same samples, with the same optimizer and DeepSpeed
configuration. transformers' LlamaForCausalLM gets batches of `batch_size` samples, in the given order or with the
samples of a global batch sorted by length, padded to the longest. It computes the logits of all tokens. Its loss is the
mean over the target tokens of the global batch, as ours is. On a CPU a profile of our steps follows.
"""
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import compare, profile_steps
from bench.workload import make_our_step, make_transformers_step, small_checkpoint, split_batches, torch_dtype
from common.files import UserError
from common.scripts import run
from common.settings import setting
from corpus.tasks import SFTDataset, read_task
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from training.batches import count_tokens, sample_indices
from training.train_config import TrainConfig


@dataclass(frozen=True)
class FinetuningBenchConfig:
    """Settings of the benchmark."""
    data: str = setting(None, "preprocessed task file", required=True)
    checkpoint: str | None = setting(None, "checkpoint to fine-tune; none: random weights of the size small")
    folder: str | None = setting(None, "folder for these")
    samples: int = setting(256, "training samples, each used once per repeat", at_least=1)
    global_batch_size: int = setting(32, "samples in a step", at_least=1)
    batch_size: int = setting(8, "samples in a batch of transformers", at_least=1)
    repeats: int = setting(1, "measurements of each step, after one step that is not measured", at_least=1)
    dtype: Literal["auto", "bf16", "fp32"] = setting("auto", "weights; auto: bf16 if the hardware multiplies it")
    learning_rate: float = setting(2e-5, "learning rate", above=0)

    def problems(self):
        return [] if self.checkpoint or self.folder else ["give --checkpoint or --folder"]


def main(cfg):
    """Prints the rates, their ratios, the differences of the losses, and the profile."""
    # with ZeRO-1 DeepSpeed clips the gradients of all variants
    train_cfg = TrainConfig(task="simp", init=str(cfg.checkpoint or small_checkpoint(cfg.folder)), dtype=cfg.dtype,
                            learning_rate=cfg.learning_rate, zero=1)
    dtype, config = torch_dtype(train_cfg), ModelConfig.read(Path(train_cfg.init) / "config.json")
    data = SFTDataset(read_task(cfg.data)[0]["train"][:cfg.samples], Tokenizer(train_cfg.init),
                      train_cfg.max_source_length, train_cfg.max_target_length)
    if len(data) < cfg.global_batch_size:
        raise UserError(f"{len(data)} samples are less than a batch of {cfg.global_batch_size}: give more, or a "
                        "smaller --global_batch_size")
    steps = 1 + len(data) // cfg.global_batch_size * cfg.repeats
    batches = split_batches([data[index] for index in sample_indices(
        train_cfg.seed, len(data), 0, steps * cfg.global_batch_size)], cfg.global_batch_size)
    tokens = sum(count_tokens(batch)[0] for batch in batches)
    padded = sum(len(rows) * max(count_tokens([row])[0] for row in rows) for batch in batches
                 for rows in split_batches(batch, cfg.batch_size))
    print(f"{config.num_parameters:,} parameters, {dtype}; samples of {tokens / steps / cfg.global_batch_size:.0f} "
          f"tokens; in transformers' batches {1 - tokens / padded:.0%} padding")
    compare({"transformers": partial(make_transformers_step, train_cfg, config, cfg.batch_size, False),
             "transformers, by length": partial(make_transformers_step, train_cfg, config, cfg.batch_size, True),
             "ours": partial(make_our_step, train_cfg, config)}, batches, 1, dtype, config)
    profile_steps(train_cfg, config, batches[:3])


if __name__ == "__main__":
    run((FinetuningBenchConfig, main), __doc__)
