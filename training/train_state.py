"""The counters of the training loop, saved with its state, and the log entry and progress line of a step."""
import dataclasses
import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from common.files import is_number
from common.formatting import format_duration
from training.batches import GlobalBatch
from training.data import TrainData

SPIKE_WINDOW, SPIKE_MINIMUM = 50, 10  # steps whose mean loss defines a loss spike, and how many are needed


class StepResult(NamedTuple):
    """The outcome of one step."""
    loss: float  # mean negative log-likelihood over the targets of the global batch, in nats
    grad_norm: float  # before clipping; nan if the loss was rejected
    computed_tokens: float  # token positions computed, over all ranks: padding included, a shared prefix counted once

    @property
    def applied(self) -> bool:
        """Whether the optimizer has updated the weights."""
        return math.isfinite(self.grad_norm)

    def skipped(self, max_loss: float) -> bool:
        """Whether the update was skipped because the loss exceeds a limit."""
        return max_loss < self.loss < math.inf


@dataclass
class TrainState:
    """Progress of a run."""
    step: int = 0
    tokens: int = 0  # tokens read
    computed_tokens: float = 0  # token positions computed: padding included, a shared prefix counted once
    seconds: float = 0.0
    flops: float = 0.0  # includes those spent on the initial checkpoint
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None  # of the last evaluation
    text_loss_before: float | None = None  # on the held-out pretraining text
    text_loss_after: float | None = None
    text_digest: str | None = None  # of the text of text_loss_before
    losses: list[float] = dataclasses.field(default_factory=list)  # of the last applied steps
    skips: int = 0  # steps skipped since then

    def check(self) -> None:
        """Raises ValueError if a counter is not a finite number; a saved state may be damaged."""
        counters = [self.step, self.tokens, self.computed_tokens, self.seconds, self.flops, self.skips, *self.losses,
                    *filter(None, (self.eval_loss_before, self.eval_loss_after, self.text_loss_before))]
        if type(self.step) is not int or self.step < 1 or not all(map(is_number, counters)) or min(counters) < 0:
            raise ValueError("a counter is not valid")

    def max_loss(self, ratio: float | None) -> float:
        """The loss above which a step is skipped: `ratio` times the mean of the last steps."""
        return ratio * statistics.fmean(self.losses) if ratio and len(self.losses) >= SPIKE_MINIMUM else math.inf

    def has_reached(self, loss: float | None) -> bool:
        """Whether the last eval loss is at most `loss`; never if that is None."""
        return loss is not None and self.eval_loss_after is not None and self.eval_loss_after <= loss

    def add_step(self, batch: GlobalBatch, result: StepResult, seconds: float, flops: float) -> None:
        """Counts a step."""
        self.step += 1
        self.tokens += batch.num_tokens
        self.computed_tokens += result.computed_tokens
        self.seconds += seconds
        self.flops += flops
        self.skips = 0 if result.applied else self.skips + 1
        if result.applied:
            self.losses = [*self.losses, result.loss][-SPIKE_WINDOW:]

    def log_entry(self, batch: GlobalBatch, result: StepResult, lr: float, seconds: float) -> dict[str, Any]:
        """The line of metrics.jsonl for the last step added."""
        return {"step": self.step, "loss": result.loss, "lr": lr,
                "grad_norm": result.grad_norm if result.applied else None, "tokens": self.tokens, "flops": self.flops,
                "tokens_per_s": batch.num_tokens / seconds, "elapsed": self.seconds,
                "computed": result.computed_tokens / batch.num_tokens,
                **({} if result.applied else {"skipped_samples": batch.indices}),
                **({} if result.applied or not batch.replay else {"skipped_windows": batch.replay_indices})}

    def progress_line(self, steps: int, result: StepResult, lr: float) -> str:
        """The printed line for the last step added."""
        remaining = format_duration(self.seconds / self.step * (steps - self.step))
        norm = f"{result.grad_norm:7.3f}" if result.applied else f"{'–':>7}"
        return (f"step {self.step:>{len(str(steps))}}/{steps}  loss {result.loss:7.4f}  lr {lr:.2e}  "
                f"norm {norm}  {self.tokens / self.seconds:9,.0f} tokens/s  "
                f"computed {self.computed_tokens / self.tokens:4.0%}  left {remaining}")

    def result(self, data: TrainData) -> dict[str, Any]:
        """The result of a finished run, for run.json."""
        return {"eval_loss_before": self.eval_loss_before, "eval_loss_after": self.eval_loss_after,
                "text_loss_before": self.text_loss_before, "text_loss_after": self.text_loss_after,
                "steps": self.step, "first_sample": data.run.first_sample, "last_sample": data.position(self.step),
                "tokens": self.tokens, "flops": self.flops, "seconds": self.seconds,
                "tokens_per_s": self.tokens / self.seconds if self.step else 0.0,
                "computed": self.computed_tokens / self.tokens if self.step else 0.0}
