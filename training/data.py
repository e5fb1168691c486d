"""The samples of a training run."""
from collections.abc import Sequence
from dataclasses import dataclass

from corpus.shards import ShardDataset, check_shards
from corpus.tasks import SFTDataset, read_task
from model.tokenizer import Tokenizer
from training.batches import GlobalBatch, Sample, SampleDataset, sample_indices
from training.rehearsal import earlier_tasks, rehearsed_items
from training.run import Run, num_samples

HELD_OUT_WINDOWS, HELD_OUT_TOKENS = 64, 256  # of the held-out text: enough for a loss, and evaluated in seconds


@dataclass(frozen=True)
class TrainData:
    """The samples to train and to evaluate on, the test items of a task, and the part of the stream to train on."""
    train: SampleDataset
    eval: SampleDataset
    test: list[dict]
    held_out: Sequence[Sample]  # windows of the held-out pretraining text; empty without one
    seed: int
    batch_size: int
    first: int  # positions [first, last) in the stream of shuffled epochs
    last: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return -(-(self.last - self.first) // self.batch_size)

    def position(self, step: int) -> int:
        """The position in the stream after a number of steps."""
        return min(self.first + step * self.batch_size, self.last)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step; the last one may be smaller."""
        start, stop, size = self.position(step), self.position(step + 1), len(self.train)
        indices = sample_indices(self.seed, size, start, stop)
        return GlobalBatch(indices, [self.train[index] for index in indices], stop // size > start // size)

    def sample(self, count: int) -> list[Sample]:
        """Random training samples, at most `count`: the first ones of the stream."""
        size = len(self.train)
        return [self.train[index] for index in sample_indices(self.seed, size, 0, min(count, size))]


def load_data(run: Run, tokenizer: Tokenizer) -> TrainData:
    """Tokenizes the task, or opens the token shards, and prints what the run trains on."""
    cfg = run.cfg
    items: list[dict] = []
    test: list[dict] = []
    train: SampleDataset
    evaluation: SampleDataset
    if cfg.task:
        splits, _ = read_task(cfg.data)
        items = rehearsed_items(cfg, earlier_tasks(cfg, run.data_digest, run.lineage))
        lengths = cfg.max_source_length, cfg.max_target_length
        train = SFTDataset(splits["train"][:cfg.max_train_samples] + items, tokenizer, *lengths, cfg.train_on_source)
        evaluation = SFTDataset(splits["eval"][:cfg.max_eval_samples], tokenizer, *lengths)
        test = splits["test"]
    else:
        train = ShardDataset(cfg.data, "train", cfg.seq_length, cfg.max_train_samples)
        evaluation = ShardDataset(cfg.data, "val", cfg.seq_length, cfg.max_eval_samples)
    held_out = run.dist.on_all_ranks(lambda: load_held_out(run))
    earlier = f", {len(items):,} of them from earlier tasks" if items else ""
    run.dist.print0(f"model: {run.model_config.num_parameters:,} parameters, {run.model_config.num_hidden_layers} "
                    f"layers, {cfg.dtype} on {run.dist.world_size} × {run.dist.device.type}; {len(train):,} training "
                    f"samples{earlier}, {len(evaluation):,} evaluation samples")
    last = run.first_sample + num_samples(cfg, run.model_config, len(train), run.lineage)
    return TrainData(train, evaluation, test, held_out, cfg.seed, cfg.global_batch_size, run.first_sample, last)


def load_held_out(run: Run) -> list[Sample]:
    """The first windows of the held-out part of `held_out_text`; empty without one. Raises UserError if this part is
    damaged."""
    path, config = run.cfg.held_out_text, run.model_config
    if path is None:
        return []
    check_shards(path, split="val")
    dataset = ShardDataset(path, "val", min(HELD_OUT_TOKENS, config.max_position_embeddings), HELD_OUT_WINDOWS)
    return [dataset[index] for index in range(len(dataset))]
