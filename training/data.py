"""The samples of a training run."""
from common.distributed import resolve_dtype
from common.files import UserError
from common.provenance import data_digest
from corpus.shards import ShardDataset
from corpus.tasks import SFTDataset, read_task
from training.rehearsal import earlier_tasks, rehearsed


def check_same_data(cfg, past, dist):
    """Fails where a process sees other data than rank 0, such as an old copy on its own disk."""
    earlier = earlier_tasks(cfg, past) if cfg.rehearsal else []
    for path in (cfg.data, *(task["data"] for task in earlier)):
        digests = dist.gather(dist.on_all_ranks(lambda path=path: data_digest(path)))
        dist.on_rank0(lambda path=path, digests=digests: compare_digests(path, digests))


def compare_digests(path, digests):
    """Raises UserError where the digests that the processes found for the data differ."""
    other = [rank for rank, found in enumerate(digests) if found != digests[0]]
    if other:
        raise UserError(f"{path} is not the same on all nodes: digest {digests[0]:.12} on rank 0, "
                        f"{digests[other[0]]:.12} on rank {other[0]}: copy it there again, or use a shared folder")


def text_of(cfg):
    """What tells the stream of pretraining samples: places in it mean the same only where all of this is equal."""
    return {"data_digest": data_digest(cfg.data), "seed": cfg.seed, "seq_length": cfg.seq_length,
            "max_train_samples": cfg.max_train_samples}


def task_of(cfg):
    """What the next tasks have to know of a run's own, to train on its samples again."""
    return {"task": cfg.task, "data": str(cfg.data), "data_digest": data_digest(cfg.data),
            "max_train_samples": cfg.max_train_samples}


def first_sample(cfg, past):
    """The place in the stream of samples where the run starts: in pretraining behind what its checkpoint has seen."""
    text = past.get("text", {})
    if cfg.skip_samples is not None or cfg.task or {**text_of(cfg), "samples": text.get("samples")} != text:
        return cfg.skip_samples or 0
    return text["samples"]


def samples_to_train(cfg, config, size, past):
    """How many samples the run takes from the stream, of a split of `size`."""
    if cfg.max_steps:
        return cfg.max_steps * cfg.global_batch_size
    if cfg.max_tokens:
        return cfg.max_tokens // cfg.seq_length
    if cfg.max_flops:  # whole batches
        steps = (cfg.max_flops - past.get("flops", 0)) // config.flops(cfg.global_batch_size * cfg.seq_length)
        return max(0, int(steps)) * cfg.global_batch_size
    return max(1, round(cfg.num_train_epochs * size))


def load_data(cfg, past, tokenizer, config, dist):
    """The samples: {"train", "eval"} to index, and for a task {"test"}, its raw items."""
    if cfg.task:
        splits, _ = read_task(cfg.data)
        lengths = cfg.max_source_length, cfg.max_target_length
        again = rehearsed(cfg, past)
        data = {"train": SFTDataset(splits["train"][:cfg.max_train_samples] + again, tokenizer, *lengths,
                                  cfg.train_on_source),
                "eval": SFTDataset(splits["eval"][:cfg.max_eval_samples], tokenizer, *lengths),
                "test": splits["test"]}
    else:
        data = {"train": ShardDataset(cfg.data, "train", cfg.seq_length, cfg.max_train_samples),
                "eval": ShardDataset(cfg.data, "val", cfg.seq_length, cfg.max_eval_samples), "test": []}
    dist.print0(f"model: {config.num_parameters:,} parameters, {config.num_hidden_layers} layers, "
              f"{resolve_dtype(cfg.dtype)} on {dist.world_size} × {dist.device.type}; "
              f"{len(data['train']):,} training samples"
              + (f", {len(again):,} of them of earlier tasks" if cfg.task and again else "")
              + f", {len(data['eval']):,} to evaluate on")
    return data
