"""Workloads of the benchmarks: random weights and samples, our steps and transformers' steps, and train.py."""
import dataclasses
import io
import pickle
import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from common.configs import ROOT
from common.dtypes import TORCH_DTYPES, resolve_dtype
from common.files import UserError, read_json, read_json_lines
from common.settings import setting
from common.stop_request import StopRequest
from common.writing import new_directory
from model.checkpoint import write_checkpoint
from model.config import ModelConfig, size_config
from model.loss import IGNORE_INDEX
from model.tokenizer import train_tokenizer
from model.transformer import initial_weights, parameter_shapes
from train import train_step
from training.batches import count_tokens
from training.deepspeed_config import resolve_zero_stage
from training.engine import build_engine, build_model, run_weights
from training.run import Run
from training.run_directory import partial_directory
from training.train_config import TrainConfig

# Settings of glibc's allocator that return freed memory at once: a process then holds what its tensors hold.
FRUGAL_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class SimpBenchConfig:
    """Settings of the benchmarks that fine-tune on the task simp."""
    data: str = setting(None, "preprocessed file of the task simp", required=True)
    folder: str = setting(None, "folder to work in", required=True)
    checkpoint: str | None = setting(None, "checkpoint to fine-tune; none: random weights of the size small")


def random_checkpoint(folder, config, dtype=torch.float32):
    """Returns `folder`, a checkpoint with random weights and a tokenizer of the sample's texts.

    It is made if it does not exist. Raises UserError if it exists with another shape.
    """
    config = dataclasses.replace(config, eos_token_id=2)  # the id that train_tokenizer assigns
    if not folder.exists():
        with new_directory(folder) as partial:
            (partial / "tokenizer").mkdir()
            texts = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("data/sample/*/*.json"))]
            train_tokenizer(texts, config.vocab_size, partial / "tokenizer")
            write_checkpoint(partial, config, random_weights(config, "cpu", dtype), partial / "tokenizer")
    elif ModelConfig.read(folder / "config.json") != config:
        raise UserError(f"{folder} holds a model of another shape: delete it, or choose another folder")
    return folder


def small_checkpoint(folder):
    """Returns a checkpoint of the size small with random weights, in a folder."""
    return random_checkpoint(Path(folder) / "small", size_config("small"))


class IncrementalWriter(pickle.Pickler):
    """Writes a file as lit-gpt's incremental_save does: each tensor's values at once, as a record of the archive, the
    description at the end, with protocol 5; tensors through _rebuild_from_type_v2."""

    def __init__(self, archive: Any, buffer: io.BytesIO):
        super().__init__(buffer, protocol=5)
        self.archive, self.count = archive, 0

    def persistent_id(self, obj: Any) -> Any:
        return obj[1] if isinstance(obj, tuple) and obj and obj[0] == "a storage" else None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return NotImplemented
        storage, key = obj.untyped_storage(), str(self.count)
        self.count += 1
        self.archive.write_record(f"data/{key}", storage, storage.nbytes())
        kind = {torch.float32: torch.FloatStorage, torch.bfloat16: torch.BFloat16Storage}[obj.dtype]
        named = ("a storage", ("storage", kind, key, "cpu", storage.nbytes() // obj.element_size()))
        arguments = named, obj.storage_offset(), tuple(obj.shape), obj.stride(), False, OrderedDict()
        return torch._tensor._rebuild_from_type_v2, (torch._utils._rebuild_tensor_v2, torch.Tensor, arguments, {})


def incremental_save(state: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors as the published models were written."""
    archive, buffer = torch._C.PyTorchFileWriter(str(path)), io.BytesIO()
    IncrementalWriter(archive, buffer).dump(state)
    archive.write_record("data.pkl", buffer.getvalue(), len(buffer.getvalue()))
    archive.write_end_of_file()


def random_weights(config, device, dtype):
    """Returns an iterator over (name, tensor) of new weights, those of a run with the default seed."""
    return ((name, tensor.to(device, dtype)) for name, tensor in initial_weights(config, TrainConfig.seed))


def random_samples(generator, config, count, length):
    """Samples of random tokens, each of which is a target."""
    return [(generator.integers(0, config.vocab_size, length + 1), 1) for _ in range(count)]


def split_batches(samples, size):
    """Consecutive batches of at most `size` samples."""
    return [samples[start:start + size] for start in range(0, len(samples), size)]


def torch_dtype(cfg):
    """The torch.dtype of a run's weights."""
    return TORCH_DTYPES[resolve_dtype(cfg.dtype)]


def make_run(cfg, dist, model_config):
    """A Run of all parameters without data or a record, with `dtype` and `zero` of the TrainConfig resolved."""
    choices = {"dtype": resolve_dtype(cfg.dtype), "zero": resolve_zero_stage(cfg, dist.world_size)}
    return Run(dataclasses.replace(cfg, **choices), dist, StopRequest(), Path(cfg.init or ""), model_config, {}, {},
               trained=parameter_shapes(model_config))


def transformers_model(run):
    """transformers' model with the weights of `build_model`."""
    from transformers import AutoModelForCausalLM, LlamaConfig
    if run.cfg.init:
        model = AutoModelForCausalLM.from_pretrained(run.cfg.init, dtype=run.dtype).to(run.dist.device)
    else:
        with run.dist.device:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**vars(run.model_config)), dtype=run.dtype)
        with torch.no_grad():
            for name, tensor in run_weights(run):
                model.get_parameter(name).copy_(tensor)
    if run.cfg.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model.train()


def transformers_step(engine, batch_size, samples):
    """Takes one step of transformers' model on a global batch; returns the mean loss over its target tokens."""
    num_targets, total, batches = count_tokens(samples)[1], 0.0, split_batches(samples, batch_size)
    for index, batch in enumerate(batches):
        engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
        loss = engine(**pad(batch, engine.device), num_items_in_batch=num_targets, use_cache=False).loss
        engine.backward(loss, scale_wrt_gas=False)
        total += loss.detach()
    engine.step()
    return float(total)


def pad(samples, device):
    """Input ids, attention mask and labels of samples for transformers, padded on the right."""
    width = max(len(tokens) for tokens, _ in samples)
    ids = torch.zeros((len(samples), width), dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for row, (tokens, first) in enumerate(samples):
        ids[row, :len(tokens)] = torch.from_numpy(tokens)
        mask[row, :len(tokens)] = 1
        labels[row, first:len(tokens)] = ids[row, first:len(tokens)]
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def make_our_step(cfg, config, dist):
    """A function from a global batch to the loss of train.py's step on it."""
    run = make_run(cfg, dist, config)
    engine = build_engine(run, build_model(run))
    return lambda samples: train_step(run, engine, [samples]).loss


def make_transformers_step(cfg, config, batch_size, by_length, dist):
    """A function from a global batch, optionally sorted by length, to the loss of transformers' step on it."""
    run = make_run(cfg, dist, config)
    engine = build_engine(run, transformers_model(run))
    return lambda samples: transformers_step(
        engine, batch_size, sorted(samples, key=lambda sample: len(sample[0])) if by_length else samples)


def torchrun_command(processes, *flags):
    """The words of a command that fine-tunes on simp with train.py under torchrun."""
    return [str(word) for word in (Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node",
                                   processes, "train.py", "--task", "simp", *flags)]


def run_train(processes, out, *flags):
    """Runs train.py on simp, replacing `out`; returns (the result in run.json, the steps in metrics.jsonl).

    Its output is printed only if it fails, and then this process exits with its status.
    """
    for directory in (out, partial_directory(out)):
        shutil.rmtree(directory, ignore_errors=True)
    result = subprocess.run(torchrun_command(processes, "--out", out, *flags), cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        print(result.stdout + result.stderr, file=sys.stderr)
        sys.exit(result.returncode)
    steps = [line for line in read_json_lines(out / "metrics.jsonl") if "loss" in line]
    return read_json(out / "run.json")["result"], steps
