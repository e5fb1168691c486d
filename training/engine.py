"""The DeepSpeed engine: building it, the optimizer step under every ZeRO stage, and saving its weights."""
import contextlib
import math
import resource
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.distributed_c10d import _set_pg_timeout

from common.distributed import Distributed
from common.files import UserError
from common.provenance import write_record
from common.writing import explain_os_errors, new_directory
from model.checkpoint import CheckpointReader, empty_model, is_finite, set_weights, write_checkpoint
from model.growth import grown_tensors
from model.lora import ADAPTER, AdaptedLinear, adapted_tensors, insert_adapters, is_adapter, write_adapter
from model.transformer import Transformer, initial_weights
from training.data import TrainData
from training.deepspeed_config import deepspeed_config, import_deepspeed
from training.optimizers import make_optimizer
from training.run import Run
from training.run_directory import last_checkpoint, prune_checkpoints
from training.selection import describe_selection
from training.train_state import TrainState
from training.zero_shards import local_fragments

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

REMEDY = "Try a lower learning_rate, more warmup_steps or dtype fp32"  # for a run that diverges


def build_model(run: Run) -> Transformer:
    """The model, on the device and in the dtype of the run.

    Weights are read or initialized one tensor at a time. Under ZeRO-3 only rank 0 does so, and each rank keeps its
    slice of a tensor before the next one is read, so that no rank ever holds the whole model.
    """
    model, weights = empty_model(run.model_config), run_weights(run)
    if run.cfg.lora:
        insert_adapters(model, run.cfg.lora)
        weights = adapted_tensors(model, weights, run.task_seed)
    if run.cfg.zero == 3:
        shard_weights(model, weights, run.dtype, run.dist, deepspeed_config(run.cfg))
    else:
        set_weights(model, ((name, tensor.to(device=run.dist.device, dtype=run.dtype)) for name, tensor in weights))
    freeze(model, run)
    model.model.gradient_checkpointing = run.cfg.gradient_checkpointing
    if run.cfg.compile:
        compile_blocks(model)
    return model.train()


def compile_blocks(model: Transformer) -> None:
    """Compiles the blocks with torch.compile: once for all blocks of a kind, and again when sizes of micro-batches
    change."""
    config, limits = model.config, torch._dynamo.config
    kinds = {(config.window(layer), config.rotates(layer)) for layer in range(config.num_hidden_layers)}
    # All kinds share the code of a block. PyTorch compiles a piece of code 8 times at most.
    limits.recompile_limit = max(limits.recompile_limit, 8 * len(kinds))
    for block in model.model.layers:
        block.compile()


def eager_blocks(compiled: bool) -> AbstractContextManager:
    """A context in which compiled blocks run without compiled code: each length of a decoded text would be compiled."""
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


def run_weights(run: Run) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of the weights that a run starts from, in model order, without adapters: those of the initial
    checkpoint, expanded if the run begins with an expansion, or new ones."""
    config = run.model_config
    if not run.cfg.init:
        return initial_weights(config, run.cfg.seed)
    reader = CheckpointReader(run.source)
    if not run.layer_map:
        return reader.named_tensors(config)
    reader.check(config.with_layers(range(len(set(run.layer_map)))))
    return grown_tensors(reader, config, run.layer_map, zero_init=True)


def freeze(model: Transformer, run: Run) -> None:
    """Freezes the parameters that a run does not train, and prints how many it trains."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in run.trained)
    total = sum(math.prod(getattr(p, "ds_shape", p.shape)) for p in model.parameters())
    if run.num_trained < total:
        run.dist.print0(f"training {run.num_trained:,} of {total:,} parameters ({run.num_trained / total:.1%}): "
                        + describe_selection(run.trained, run.model_config))


def shard_weights(model: Transformer, weights: Iterator[tuple[str, torch.Tensor]], dtype: torch.dtype,
                  dist: Distributed, ds_config: dict[str, Any]) -> None:
    """Fills a Transformer on the meta device and shards its parameters over the ranks for ZeRO-3, one module after
    another.

    DeepSpeed broadcasts rank 0's tensor to the other ranks, which pass an empty one, and each rank keeps its slice.
    """
    deepspeed = import_deepspeed(dist.device)
    tied = {model.lm_head} if model.config.tie_word_embeddings else set()
    for module in model.modules():
        if module in tied:
            continue
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            tensor = next(weights)[1].to(dtype) if dist.rank == 0 else torch.empty(parameter.shape, dtype=dtype)
            setattr(module, leaf, torch.nn.Parameter(tensor.to(dist.device)))
        if not list(module.children()):
            deepspeed.zero.Init(module=module, config_dict_or_path=ds_config)
    model.tie_weights()


def build_engine(run: Run, model: Transformer) -> "DeepSpeedEngine":
    """The DeepSpeed engine, with weight decay on matrices only.

    Master weights, moments and accumulated gradients are fp32. DeepSpeed's learning-rate schedules and its scaling of
    the loss by accumulation steps are not used: train.py sets the rate and weights each micro-batch itself.
    """
    deepspeed = import_deepspeed(run.dist.device)
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ds_shape: before ZeRO-3 sharded it
        (matrices if len(shape) == 2 else others).append(parameter)
    groups = [{"params": parameters, "weight_decay": decay}
              for parameters, decay in ((matrices, run.cfg.weight_decay), (others, 0.0)) if parameters]
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


def check_finite_weights(run: Run, engine: "DeepSpeedEngine") -> None:
    """Ends the run, on all ranks, if a weight is not finite: neither a checkpoint nor a state with it is saved."""
    def check() -> None:
        broken = [fragment.name for fragment in local_fragments(engine)
                  if not (is_finite(fragment.weights) and is_finite(fragment.of(fragment.flat)))]
        if broken:
            raise UserError(f"the optimizer has made weights that are not finite, in {len(broken)} parameters such as "
                            f"{broken[0]}; last good checkpoint: {last_checkpoint(run.directory)}. {REMEDY}")

    run.dist.on_all_ranks(check)


def save_checkpoint(run: Run, engine: "DeepSpeedEngine", directory: Path,
                    record: dict[str, Any] | None = None) -> None:
    """Writes the weights as a Hugging Face checkpoint, adapters merged, and `record` as its run.json if given.

    A directory that does not exist yet appears atomically. All ranks take part: under ZeRO-3 each tensor is gathered
    from all of them, one at a time.
    """
    check_finite_weights(run, engine)
    release_gathered(engine)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in engine.module.named_parameters():
            if is_adapter(name):
                continue
            module = engine.module.get_submodule(name.rpartition(".")[0])
            adapted = isinstance(module, AdaptedLinear) and name.endswith("weight")
            with gathered(engine, list(module.parameters()) if adapted else [parameter]):
                yield name, module.merged().detach() if adapted else parameter.detach()

    if run.dist.rank == 0:
        with contextlib.nullcontext(directory) if directory.exists() else new_directory(directory) as folder:
            write_checkpoint(folder, engine.module.config, tensors(), run.source, run.dtype)
            if record:
                write_record(folder, record)
    else:
        for _ in tensors():
            pass


def save_adapter(run: Run, engine: "DeepSpeedEngine") -> None:
    """Writes the adapters in the format of PEFT to `adapter/` in the directory of the run. All ranks take part."""
    directory = run.directory
    release_gathered(engine)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in run.trained:
            parameter = engine.module.get_parameter(name)
            with gathered(engine, [parameter]):
                yield name, parameter.detach()

    if run.dist.rank == 0:
        with explain_os_errors(directory / ADAPTER):
            (directory / ADAPTER).mkdir(exist_ok=True)
        assert run.cfg.lora
        write_adapter(directory / ADAPTER, run.cfg.lora, str(run.cfg.init), tensors(), run.trained, run.dtype)
    else:
        for _ in tensors():
            pass


def release_gathered(engine: "DeepSpeedEngine") -> None:
    """Releases the parameters that ZeRO-3 holds whole or is gathering.

    `gathered` cannot gather a parameter that is being gathered already. An evaluation leaves some behind: if a model is
    above DeepSpeed's limits of live parameters, its last layers begin to gather what a backward pass would need.
    """
    if engine.zero_optimization_partition_weights():
        engine.optimizer.checkpoint_event_prologue()


def gathered(engine: "DeepSpeedEngine", parameters: list[torch.nn.Parameter],
             modifier_rank: int | None = None) -> AbstractContextManager:
    """A context in which this rank has the whole of some parameters, which ZeRO-3 shards. modifier_rank: the rank whose
    changes are kept."""
    from deepspeed.runtime.zero import GatheredParameters
    return GatheredParameters(parameters, modifier_rank, enabled=engine.zero_optimization_partition_weights())


def save_epoch_checkpoint(run: Run, engine: "DeepSpeedEngine", state: TrainState, data: TrainData) -> None:
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
