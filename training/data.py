"""The samples of a training run."""
from collections.abc import Sequence
from dataclasses import dataclass

from common.files import UserError
from corpus.shards import WINDOW_TOKENS, ShardDataset, check_shards
from corpus.tasks import SFTDataset, read_task
from model.tokenizer import Tokenizer
from training.batches import GlobalBatch, Sample, SampleDataset, replay_with_replacement, replayed_range, sample_indices
from training.rehearsal import rehearsed_items
from training.run import Run, num_samples
from training.run_directory import saved_states
from training.train_config import TrainConfig

HELD_OUT_WINDOWS = 64  # enough for a loss, and evaluated in seconds


@dataclass(frozen=True)
class TrainData:
    """The samples to train and to evaluate on, the test items of a task, and the part of the stream to train on:
    positions [run.first_sample, last) of the shuffled epochs."""
    run: Run
    train: SampleDataset
    eval: SampleDataset
    test: list[dict]
    held_out: Sequence[Sample]  # windows of the held-out pretraining text; empty without one
    replay: SampleDataset | None  # windows of the pretraining text to train on again
    last: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return -(-(self.last - self.run.first_sample) // self.run.cfg.global_batch_size)

    def position(self, step: int) -> int:
        """The position in the stream after a number of steps."""
        return min(self.run.first_sample + step * self.run.cfg.global_batch_size, self.last)

    def batch(self, step: int) -> GlobalBatch:
        """The global batch of a step; the last one may be smaller."""
        cfg, start, stop, size = self.run.cfg, self.position(step), self.position(step + 1), len(self.train)
        indices = sample_indices(cfg.seed, size, start, stop)
        windows = self.replay or []
        replayed = replay_with_replacement(self.run.task_seed, len(windows), step, cfg.replay_share,
                                           cfg.global_batch_size) if windows else []
        return GlobalBatch(indices, [self.train[index] for index in indices], replayed,
                           [windows[index] for index in replayed], stop // size > start // size)

    def sample(self, count: int) -> list[Sample]:
        """Random training samples, at most `count`: the first ones of the stream."""
        size = len(self.train)
        return [self.train[index] for index in sample_indices(self.run.cfg.seed, size, 0, min(count, size))]


def load_data(run: Run, tokenizer: Tokenizer) -> TrainData:
    """Tokenizes the task, or opens the token shards, and prints what the run trains on."""
    cfg = run.cfg
    items: list[dict] = []
    test: list[dict] = []
    train: SampleDataset
    evaluation: SampleDataset
    if cfg.task:
        splits, _ = read_task(cfg.data)
        items = rehearsed_items(cfg, run.earlier_tasks)
        lengths = cfg.max_source_length, cfg.max_target_length
        train = samples = SFTDataset(splits["train"][:cfg.max_train_samples] + items, tokenizer, *lengths,
                                     cfg.train_on_source, cfg.template)
        if samples.long_prompts or samples.cut_targets:
            run.dist.print0(f"{samples.long_prompts:,} of {len(samples):,} prompts reach max_source_length "
                            f"{lengths[0]:,}, to which longer ones are cut; {samples.cut_targets:,} targets are cut to "
                            f"max_target_length {lengths[1]:,}")
        evaluation = SFTDataset(splits["eval"][:cfg.max_eval_samples], tokenizer, *lengths, template=cfg.template)
        test = splits["test"]
    else:
        train = ShardDataset(cfg.data, "train", cfg.seq_length, cfg.max_train_samples)
        evaluation = ShardDataset(cfg.data, "val", cfg.seq_length, cfg.max_eval_samples)
    held_out = run.dist.on_all_ranks(lambda: load_held_out(run))
    replay = run.dist.on_all_ranks(lambda: load_replay(run))
    earlier = f", {len(items):,} of them from earlier tasks" if items else ""
    run.dist.print0(f"model: {run.model_config.num_parameters:,} parameters, {run.model_config.num_hidden_layers} "
                    f"layers, {cfg.dtype} on {run.dist.world_size} × {run.dist.device.type}; {len(train):,} training "
                    f"samples{earlier}, {len(evaluation):,} evaluation samples")
    last = run.first_sample + num_samples(cfg, run.model_config, len(train), run.lineage, run.trained)
    data = TrainData(run, train, evaluation, test, held_out, replay, last)
    run.dist.on_all_ranks(lambda: check_steps(cfg, data.steps))
    if (steps := cfg.schedule_steps or data.steps) <= cfg.warmup_steps:
        run.dist.print0(f"note: the learning rate warms up for {cfg.warmup_steps} of {steps} steps, and never reaches "
                        f"{cfg.learning_rate:g}")
    return data


def check_steps(cfg: TrainConfig, steps: int) -> None:
    """Raises UserError if a run of this many steps exceeds its schedule, or replays nothing."""
    if cfg.schedule_steps and cfg.schedule_start + steps > cfg.schedule_steps:
        raise UserError(f"schedule_start {cfg.schedule_start} and the {steps} steps of this run are more than the "
                        f"schedule_steps {cfg.schedule_steps}: raise it")
    for name, is_used in (("replay_share", cfg.replay_share), ("self_replay_share", cfg.self_replay_kl)):
        if is_used and not replayed_range(steps - 1, getattr(cfg, name), cfg.global_batch_size).stop:
            raise UserError(f"{name} is {getattr(cfg, name)}, so that {steps} steps of {cfg.global_batch_size} samples "
                            "replay nothing: raise it")


def load_held_out(run: Run) -> list[Sample]:
    """The first windows of the held-out part of `held_out_text`; empty without one. Raises UserError if this part is
    damaged."""
    path = run.cfg.held_out_text
    if path is None:
        return []
    check_shards(path, run.dist.local_rank, run.dist.local_world_size, split="val")
    dataset = ShardDataset(path, "val", window_tokens(run), HELD_OUT_WINDOWS)
    return [dataset[index] for index in range(len(dataset))]


def load_replay(run: Run) -> SampleDataset | None:
    """The windows of the training part of `replay_text`; None without replay. Raises UserError if this part is
    damaged, which a resumed run does not check again."""
    if not run.cfg.replay_share:
        return None
    if not saved_states(run.directory):
        check_shards(str(run.cfg.replay_text), run.dist.local_rank, run.dist.local_world_size, split="train")
    return ShardDataset(str(run.cfg.replay_text), "train", window_tokens(run))


def window_tokens(run: Run) -> int:
    """The length of a window of pretraining text."""
    return min(WINDOW_TOKENS, run.model_config.max_position_embeddings)
