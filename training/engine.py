"""The DeepSpeed engine: building it, the optimizer step under every ZeRO stage, and saving its weights."""
import contextlib
import math
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from common.distributed import Distributed
from common.files import UserError, new_directory
from common.provenance import write_record
from model.checkpoint import CheckpointReader, is_finite, materialize_model, write_checkpoint
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer, initial_weights
from training.deepspeed_config import deepspeed_config, import_deepspeed
from training.optimizers import make_optimizer
from training.run_directory import last_checkpoint, prune_checkpoints
from training.zero_shards import local_fragments

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from training.data import TrainData
    from training.run import Run
    from training.train_state import TrainState


REMEDY = "Try a lower learning_rate, more warmup_steps or dtype fp32"  # for a run that diverges


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


def build_model(run: "Run") -> tuple[Tokenizer, Transformer]:
    """The tokenizer and the model, on the device and in the dtype of the run.

    Weights are read or initialized one tensor at a time. Under ZeRO-3 only rank 0 does so, and each rank keeps its
    slice of a tensor before the next one is read, so that no rank ever holds the whole model.
    """
    config = run.model_config
    weights = CheckpointReader(run.source).named_tensors(config) if run.cfg.init else \
        initial_weights(config, run.cfg.seed)
    if run.cfg.zero == 3:
        model = materialize_sharded(config, weights, run.dtype, run.dist, deepspeed_config(run.cfg))
    else:
        model = materialize_model(config, ((name, tensor.to(device=run.dist.device, dtype=run.dtype))
                                           for name, tensor in weights))
    model.model.gradient_checkpointing = run.cfg.gradient_checkpointing
    if run.cfg.compile:
        if not any(map(shutil.which, ("c++", "g++", "clang++", "cc", "gcc", "clang"))):
            raise UserError("--compile needs a C and C++ compiler, such as gcc and g++")
        model.compile_blocks()
    return Tokenizer(run.source), model.train()


def materialize_sharded(config: ModelConfig, weights: Iterator[tuple[str, torch.Tensor]],
                        dtype: torch.dtype, dist: Distributed, ds_config: dict[str, Any]) -> Transformer:
    """A Transformer whose parameters are sharded over the ranks for ZeRO-3, one module after another.

    DeepSpeed broadcasts rank 0's tensor to the other ranks, which pass an empty one, and each rank keeps its slice.
    """
    deepspeed = import_deepspeed(dist.device)
    with torch.device("meta"):
        model = Transformer(config)
    tied = {model.lm_head} if config.tie_word_embeddings else set()
    for module in model.modules():
        if module in tied:
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = next(weights)[1].to(dtype) if dist.rank == 0 else torch.empty(parameter.shape, dtype=dtype)
            setattr(module, leaf, torch.nn.Parameter(tensor.to(dist.device)))
        if not list(module.children()):
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)
    model.tie_weights()
    return model


def build_engine(run: "Run", model: Transformer) -> "DeepSpeedEngine":
    """The DeepSpeed engine, with weight decay on matrices only.

    Master weights, moments and accumulated gradients are fp32. DeepSpeed's learning-rate schedules and its scaling of
    the loss by accumulation steps are not used: train.py sets the rate and weights each micro-batch itself.
    """
    deepspeed = import_deepspeed(run.dist.device)
    shapes = {p: getattr(p, "ds_shape", p.shape) for p in model.parameters()}  # ds_shape: before ZeRO-3 sharded it
    groups = [{"params": [p for p, shape in shapes.items() if len(shape) == 2], "weight_decay": run.cfg.weight_decay},
              {"params": [p for p, shape in shapes.items() if len(shape) != 2], "weight_decay": 0.0}]
    with contextlib.redirect_stdout(None):  # one of DeepSpeed's optimizers prints memory statistics
        engine = deepspeed.initialize(model=model, optimizer=make_optimizer(run.cfg, groups),
                                      config=deepspeed_config(run.cfg))[0]
    if run.dist.world_size == 1 and not hasattr(engine.optimizer, "overlapping_partition_gradients_reduce_epilogue"):
        engine.enable_backward_allreduce = False  # it would copy all gradients to a buffer and back
    _set_pg_timeout(run.dist.timeout, engine.seq_data_parallel_group)  # this group has PyTorch's default of 30 minutes
    return engine


def optimizer_step(engine: "DeepSpeedEngine", max_grad_norm: float, rejected: bool) -> float:
    """Clips the gradients and updates the weights; returns the gradient norm before clipping.

    The weights do not change if the norm is not finite. A rejected loss has set the gradients to NaN, so the update
    is skipped and the norm is NaN.
    """
    if engine.zero_optimization():
        engine.step()  # clips, and skips the update if the norm is not finite
        if rejected and getattr(engine.optimizer, "cpu_offload", False):
            # DeepSpeed's ZeRO-2 with an offloaded optimizer keeps the gradients of a skipped step
            engine.optimizer.averaged_gradients = dict.fromkeys(engine.optimizer.averaged_gradients)
        return math.nan if rejected else float(engine.get_global_grad_norm())
    norm = float(torch.nn.utils.clip_grad_norm_(engine.module.parameters(), max_grad_norm or math.inf))
    if math.isfinite(norm):
        engine.step()
    else:
        engine.optimizer.zero_grad()
    return norm


def check_weights(run: "Run", engine: "DeepSpeedEngine") -> None:
    """Ends the run, on all ranks, if a weight is not finite: neither a checkpoint nor a state with it is saved."""
    def check() -> None:
        broken = [fragment.name for fragment in local_fragments(engine)
                  if not (is_finite(fragment.weights) and is_finite(fragment.of(fragment.flat)))]
        if broken:
            raise UserError(f"the optimizer has made weights that are not finite, in {len(broken)} parameters such as "
                            f"{broken[0]}; last good checkpoint: {last_checkpoint(run.directory)}. {REMEDY}")

    run.dist.on_all_ranks(check)


def save_checkpoint(run: "Run", engine: "DeepSpeedEngine", directory: Path,
                    record: dict[str, Any] | None = None) -> None:
    """Writes the weights as a Hugging Face checkpoint, and `record` as its run.json if given.

    A directory that does not exist yet appears atomically. All ranks take part: under ZeRO-3 each tensor is gathered
    from all of them, one at a time.
    """
    from deepspeed.runtime.zero import GatheredParameters
    check_weights(run, engine)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in engine.module.named_parameters():
            with GatheredParameters([parameter], enabled=engine.zero_optimization_partition_weights()):
                yield name, parameter.detach()

    if run.dist.rank == 0:
        with contextlib.nullcontext(directory) if directory.exists() else new_directory(directory) as folder:
            write_checkpoint(folder, engine.module.config, tensors(), run.source)
            if record:
                write_record(folder, record)
    else:
        for _ in tensors():
            pass


def save_epoch_checkpoint(run: "Run", engine: "DeepSpeedEngine", state: "TrainState", data: "TrainData") -> None:
    """Writes the checkpoint of an epoch, with a run.json, and removes the oldest ones beyond `save_total_limit`."""
    if not run.cfg.save_total_limit:
        return
    directory = run.directory / f"checkpoint-{state.step}"
    progress = {"flops": state.flops, "last_sample": data.position(state.step)}
    if not run.dist.on_rank0(directory.exists):  # a resumed run may repeat this step
        save_checkpoint(run, engine, directory, run.record | {"lineage": run.lineage_after(progress)})
    run.dist.on_rank0(lambda: prune_checkpoints(run.directory, run.cfg.save_total_limit))


def peak_memory(device: torch.device) -> int:
    """The most memory that this process has used, in bytes: of its GPU, or of the host."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
