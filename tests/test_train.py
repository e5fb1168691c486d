"""The loop: against a plain PyTorch loop over transformers, and against itself under other processes and budgets."""
import dataclasses
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.distributed import free_port
from corpus.shards import ShardDataset
from corpus.tasks import PROMPT, SFTDataset, read_task
from model.tokenizer import Tokenizer
from tests.conftest import ROOT, error_line, run_script
from train import learning_rate, prune
from training.batches import count_tokens, global_batch, make_microbatches
from training.run_directory import start_run
from training.train_config import TrainConfig

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
FLAGS = ["--task", "simp", "--dtype", "fp32", "--global_batch_size", "8", "--max_steps", "20",
         "--learning_rate", "5e-3", "--warmup_steps", "4", "--lr_scheduler_type", "cosine",
         "--weight_decay", "0.1", "--max_grad_norm", "1", "--max_eval_samples", "6", "--eval_steps", "10",
         "--max_source_length", "128", "--max_target_length", "64", "--max_train_samples", "60"]


def run_train(checkpoint, simp_file, out, *flags, launcher=(), check=True, **environment):
    return run_script("train.py", "--init", checkpoint, "--data", simp_file, "--out", out, *FLAGS, *flags,
                      launcher=launcher, check=check, **environment)


def steps(out):
    lines = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "eval_loss" in line]


@pytest.fixture(scope="module")
def finished(checkpoint, simp_file, tmp_path_factory):
    """A finished run of 20 steps in one process, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "m1-simp"
    return out, run_train(checkpoint, simp_file, out)


def test_learning_rates_by_hand():
    cfg = TrainConfig(learning_rate=1.0, warmup_steps=3, min_lr_ratio=0.1)

    def rates(kind, steps=(0, 1, 2, 3, 8, 12)):
        changed = dataclasses.replace(cfg, lr_scheduler_type=kind)
        return [round(learning_rate(changed, step, 13), 4) for step in steps]

    assert rates("constant") == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates("linear") == [0.25, 0.5, 0.75, 1, 0.55, 0.19]
    assert rates("cosine") == [0.25, 0.5, 0.75, 1, 0.55, round(0.1 + 0.9 * (1 + math.cos(0.9 * math.pi)) / 2, 4)]
    wsd = dataclasses.replace(cfg, lr_scheduler_type="wsd", decay_ratio=0.5, warmup_steps=0)
    assert [round(learning_rate(wsd, step, 8), 4) for step in range(8)] == [1, 1, 1, 1, 1, 0.775, 0.55, 0.325]


def test_equals_a_plain_loop_over_transformers(finished, checkpoint, simp_file):
    """An independent loop: transformers' model and tokenizer, AdamW and clipping of PyTorch, one sample at a time."""
    out, _ = finished
    logged, evaluated = steps(out)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    splits = json.loads(simp_file.read_text())

    def tokens(item):
        source = [1, *tokenizer.encode(PROMPT.format(source=item["input"]), add_special_tokens=False)]
        target = tokenizer.encode(item["output"], add_special_tokens=False)[:63] + [2]
        if len(source) > 128:
            marker = tokenizer.encode("\n\n### Response:", add_special_tokens=False)
            source = source[:128 - len(marker)] + marker
        return torch.tensor([source + target]), torch.tensor([[-100] * len(source) + target]), len(target)

    def mean_loss(items, backward=False):
        samples = [tokens(item) for item in items]
        count, total = sum(n for *_, n in samples), 0.0
        for ids, labels, n in samples:
            part = model(ids, labels=labels).loss * n / count
            total += part.item()
            if backward:
                part.backward()
        return total

    decayed = [p for n, p in model.named_parameters() if not n.endswith("norm.weight")]
    others = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                  betas=(0.9, 0.999), eps=1e-8)
    train = splits["train"][:60]
    assert evaluated[0]["eval_loss"] == pytest.approx(mean_loss(splits["eval"][:6]), rel=1e-5)
    for step in range(12):
        expected = mean_loss([train[i] for i in global_batch(42, 60, 8 * step, 8 * step + 8)], backward=True)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = 5e-3 * (min(1, (step + 1) / 5)) * (1 + math.cos(math.pi * max(0, step - 4) / 16)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
        assert logged[step]["lr"] == pytest.approx(rate)
        assert logged[step]["loss"] == pytest.approx(expected, rel=2e-5), step
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step


@pytest.mark.parametrize(("flags", "launcher"), [
    (["--max_tokens_per_microbatch", "200"], []),
    (["--max_tokens_per_microbatch", "200", "--gradient_checkpointing"], TORCHRUN),
    (["--max_tokens_per_microbatch", "9000", "--zero", "0"], TORCHRUN),
    (["--zero", "2"], TORCHRUN),
    (["--zero", "3", "--gradient_checkpointing"], TORCHRUN),
], ids=["small micro-batches", "two processes", "two processes, large micro-batches", "ZeRO 2", "ZeRO 3"])
def test_same_losses_whatever_carries_it_out(finished, checkpoint, simp_file, tmp_path, flags, launcher):
    run_train(checkpoint, simp_file, tmp_path / "run", *flags, launcher=launcher)
    expected, found = steps(finished[0]), steps(tmp_path / "run")
    assert len(found[0]) == 20
    for key, ours, theirs in (("loss", found[0], expected[0]), ("eval_loss", found[1], expected[1])):
        assert [line["step"] for line in ours] == [line["step"] for line in theirs]
        for a, b in zip(ours, theirs):
            assert a[key] == pytest.approx(b[key], rel=1e-5), (key, a["step"])
    assert expected[0][-1]["loss"] < expected[0][0]["loss"] - 0.3  # it did train
    weights = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
               for path in (finished[0], tmp_path / "run")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-3 for name in weights[0])


@pytest.mark.parametrize(("zero", "launcher"), [("1", []), ("2", TORCHRUN)])
def test_bf16_keeps_fp32_master_weights(zero, launcher, checkpoint, simp_file, tmp_path):
    """With bf16 master weights steps of 1e-5 would be lost: a bf16 weight near 0.2 has a resolution of 1e-3."""
    flags = ["--dtype", "bf16", "--learning_rate", "1e-5", "--lr_scheduler_type", "constant", "--max_steps", "30",
             "--eval_steps", "30", "--max_train_samples", "8"]
    run_train(checkpoint, simp_file, tmp_path / "fp32", *flags, "--dtype", "fp32")
    run_train(checkpoint, simp_file, tmp_path / "bf16", *flags, "--zero", zero, launcher=launcher)
    lost = [steps(tmp_path / name)[0][0]["loss"] - steps(tmp_path / name)[0][-1]["loss"] for name in ("fp32", "bf16")]
    assert lost[0] > 0.01
    assert lost[1] == pytest.approx(lost[0], rel=0.5)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "bf16", dtype="auto")
    assert saved.dtype == torch.bfloat16


def test_bf16_gradients_are_accumulated_in_fp32(checkpoint):
    """What DeepSpeed itself says of the engine that a bf16 run gets: weights, accumulated gradients."""
    code = ("import dataclasses, sys, torch, train; from distributed import Distributed\n"
            "from model.checkpoint import load_model\n"
            "s = train.TrainConfig(dtype='bf16')\n"
            "with Distributed() as world:\n"
            "    for zero in (1, 2, 3):\n"
            "        s = dataclasses.replace(s, zero=zero)\n"
            "        engine = train.build_engine(s, load_model(sys.argv[1], torch.bfloat16), world)\n"
            "        print(*engine.get_data_types(), engine.communication_data_type)")
    lines = run_script("-c", code, checkpoint).stdout.splitlines()
    assert lines == ["torch.bfloat16 torch.float32 torch.float32"] * 3


def test_one_thread_where_the_environment_asks_for_one():
    code = "import torch; from distributed import Distributed\nwith Distributed(): print(torch.get_num_threads())"
    assert run_script("-c", code, OMP_NUM_THREADS="1").stdout.strip() == "1"


def test_compiled_kernels_of_many_shapes_are_not_all_kept():
    """600 of them take about 380 MiB where the hardware multiplies bf16 (elsewhere none are compiled)."""
    code = ("import torch; from build import import_deepspeed; from distributed import Distributed\n"
            "def held(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2 ** 20\n"
            "x, y, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((900, 512), (512, 256), (900, 256)))\n"
            "with Distributed() as world:\n"
            "    import_deepspeed(world)\n"
            "    torch.mm(x, y, out=out)\n"
            "    before = held()\n"
            "    for rows in range(200, 800): torch.mm(x[:rows], y, out=out[:rows])\n"
            "    print(held() - before)")
    assert float(run_script("-c", code).stdout) < 150


def test_what_a_finished_run_leaves(finished, checkpoint, simp_file):
    out, result = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-15", "config.json", "metrics.jsonl", "model.safetensors", "run.json", "tokenizer.json",
        "tokenizer_config.json"]  # epochs end after 60, 120 samples: steps 8, 15; save_total_limit is 1
    assert not out.with_name("m1-simp.partial").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["learning_rate"] == 5e-3
    assert (run["settings"]["dtype"], run["settings"]["zero"], run["processes"], run["device"]) == ("fp32", 0, 1, "cpu")
    assert len(run["parent_digest"]) == len(run["data_digest"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    logged, evaluated = steps(out)
    assert run["result"]["eval_loss_before"] == evaluated[0]["eval_loss"] > run["result"]["eval_loss_after"]
    assert run["result"]["eval_loss_after"] == evaluated[-1]["eval_loss"]
    assert [line["step"] for line in evaluated] == [0, 10, 20]
    assert all(0.5 < line["computed"] < 1 and line["tokens_per_s"] > 0 for line in logged)
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    batch = [data[index] for index in global_batch(42, 60, 0, 8)]
    places = sum(len(prefix) + ids.numel() for ids, _, prefix in make_microbatches(batch, 4096, 32))
    assert logged[0]["computed"] == pytest.approx(places / count_tokens(batch)[0])
    assert logged[-1]["tokens"] == run["result"]["tokens"] > 9000
    for text in ("example 3     model:", "example 3 reference:", "eval loss before", f"checkpoint: {out}"):
        assert text in result.stdout
    _, info = AutoModelForCausalLM.from_pretrained(out / "checkpoint-15", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_finished_run_is_not_done_again(finished, checkpoint, simp_file):
    out, _ = finished
    before = (out / "model.safetensors").stat().st_mtime_ns
    result = run_train(checkpoint, simp_file, out, "--max_tokens_per_microbatch", "999")  # changes no number
    assert "is finished already, nothing to do" in result.stdout
    assert f"checkpoint: {out}" in result.stdout
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_outlives_its_parent(checkpoint, simp_file, tmp_path):
    parent = shutil.copytree(checkpoint, tmp_path / "m0")
    flags = "--max_steps", "1", "--max_eval_samples", "1"
    run_train(parent, simp_file, tmp_path / "m1", *flags)
    shutil.rmtree(parent)
    assert "finished already" in run_train(parent, simp_file, tmp_path / "m1", *flags).stdout
    line = error_line(run_train(parent, simp_file, tmp_path / "m1", *flags, "--seed", "1", check=False))
    assert "seed is 42 there and 1 here" in line


def test_checkpoints_of_an_unfinished_run_are_kept(tmp_path):
    run = {"settings": {}, "parent_digest": None, "data_digest": None}
    partial = start_run(tmp_path / "m1", run)
    assert partial == tmp_path / "m1.partial"
    (partial / "checkpoint-3").mkdir()
    assert start_run(tmp_path / "m1", run) == partial
    assert [path.name for path in partial.iterdir()] == ["run.json"]
    assert (tmp_path / "m1.partial.old/checkpoint-3").is_dir()


def test_loss_in_slices_under_zero_3(finished, checkpoint, simp_file, tmp_path):
    """Ranks with different numbers of targets, and so of slices, still make the same collective calls."""
    code = ("import sys, model.transformer, train; model.transformer.LOGITS_PER_CHUNK['cpu'] = 20 * 512;"
            "sys.argv = sys.argv[1:]; train.settings.run((train.TrainConfig, train.main), '')")
    (tmp_path / "run.py").write_text(code)
    run_script(tmp_path / "run.py", "train.py", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "run",
               *FLAGS, "--zero", "3", launcher=TORCHRUN, PYTHONPATH=f"{ROOT}:{ROOT / 'tests/without_transformers'}")
    for a, b in zip(steps(tmp_path / "run")[0], steps(finished[0])[0]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_other_settings_are_refused_with_the_differences(finished, checkpoint, simp_file, tmp_path):
    out, _ = finished
    line = error_line(run_train(checkpoint, simp_file, out, "--seed", "7", "--warmup_steps", "0", check=False))
    assert "belongs to a run with other settings" in line
    assert "seed is 42 there and 7 here; warmup_steps is 4 there and 0 here" in line
    data = json.loads(simp_file.read_text())
    data["train"].pop()
    (tmp_path / "other.json").write_text(json.dumps(data))
    assert "trained on other data" in error_line(run_train(checkpoint, tmp_path / "other.json", out, check=False))


def test_the_original_tools_format_trains(checkpoint, tmp_path):
    """A preprocessed file as the original tool wrote it: no references, other fields, and one empty target."""
    item = {"input": "Simplify: a very difficult sentence", "output": "easy", "src_info": None, "index": 0}
    splits = {"train": [item] * 8 + [item | {"output": ""}], "eval": [item] * 2, "test": [item]}
    (tmp_path / "simp.json").write_text(json.dumps(splits))
    result = run_train(checkpoint, tmp_path / "simp.json", tmp_path / "run", "--max_steps", "3")
    assert "1 samples have no target and are left out: train[8]" in result.stdout
    assert steps(tmp_path / "run")[0][-1]["loss"] < steps(tmp_path / "run")[0][0]["loss"]


def test_pretraining_from_new_weights_and_on_from_a_base(tmp_path, checkpoint):
    """The recipe's phases on a text of one's own; the grown run goes on in the data where the base stopped."""
    text = tmp_path / "text.jsonl"
    lines = (json.dumps({"text": f"{n} is a number; {n + 1} comes after it."}) + "\n" for n in range(900))
    text.write_text("".join(lines))
    run_script("data_prep.py", "text", "--source", text, "--vocab_size", "400", "--output_path", tmp_path / "shards")
    common = ["train.py", "--config", "configs/train/pretrain.toml", "--size", "tiny", "--data", tmp_path / "shards",
              "--seq_length", "32", "--dtype", "fp32"]
    run_script(*common, "--phase", "base", "--num_hidden_layers", "2", "--global_batch_size", "4",
               "--max_tokens", "2560", "--out", tmp_path / "base")
    logged, evaluated = steps(tmp_path / "base")
    assert len(logged) == 20
    assert evaluated[0]["eval_loss"] == pytest.approx(math.log(4096), abs=0.1)  # new weights know nothing
    assert evaluated[-1]["eval_loss"] < 5
    assert all(line["computed"] == 1 for line in logged)
    assert json.loads((tmp_path / "base/config.json").read_text())["num_hidden_layers"] == 2
    run_script("stack.py", "grow", "--init", tmp_path / "base", "--factor", "4", "--out", tmp_path / "grown")
    # 6 N D by hand: N is 4096·96 + 96 + layers × (96·(96 + 32 + 32 + 96) + 3·96·256 + 2·96)
    deep, shallow = (4096 * 96 + 96 + layers * (96 * 256 + 3 * 96 * 256 + 2 * 96) for layers in (8, 2))
    spent = 6 * shallow * 2560
    assert logged[-1]["flops"] == spent
    after = [*common, "--phase", "stack", "--init", tmp_path / "grown", "--out", tmp_path / "m0", "--global_batch_size",
             "2"]
    line = error_line(run_script(*after, "--max_flops", spent + 6 * deep * 60, check=False))
    assert f"one step costs {6 * deep * 64:.4g} and what was spent on --init before {spent:.4g}" in line
    run_script(*after, "--max_flops", spent + 6 * deep * 64 * 7.9)
    logged, evaluated = steps(tmp_path / "m0")
    assert [line["flops"] for line in logged] == [spent + 6 * deep * 64 * step for step in range(1, 8)]
    assert (evaluated[0]["flops"], evaluated[-1]["flops"]) == (spent, logged[-1]["flops"])
    assert json.loads((tmp_path / "m0/config.json").read_text())["num_hidden_layers"] == 8
    # by samples: the base saw 80 of them, and the first step after growth sees the next two
    shards = ShardDataset(tmp_path / "shards", "train", 32)
    rows = torch.stack([torch.from_numpy(shards[i][0]) for i in global_batch(42, len(shards), 80, 82)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    with torch.no_grad():
        assert logged[0]["loss"] == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)
    told = json.loads((tmp_path / "m0/run.json").read_text())
    assert told["lineage"]["text"]["samples"] == 80 + 14
    assert told["lineage"]["flops"] == logged[-1]["flops"]
    anew = run_script(*common, "--phase", "stack", "--init", tmp_path / "grown", "--out", tmp_path / "x", "--seed", "1",
                      "--max_flops", "none", "--max_tokens", "64", "--global_batch_size", "2")
    assert "starting at the first sample" in anew.stdout
    assert json.loads((tmp_path / "x/run.json").read_text())["result"]["first_sample"] == 0
    other = run_script(*common, "--phase", "stack", "--init", checkpoint, "--out", tmp_path / "y", check=False)
    assert "was made with another tokenizer" in error_line(other)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(checkpoint, simp_file, tmp_path):
    from safetensors.torch import load_file, save_file
    broken = shutil.copytree(checkpoint, tmp_path / "broken")
    state = load_file(broken / "model.safetensors")
    state["model.norm.weight"][0] = math.inf
    save_file(state, broken / "model.safetensors")
    line = error_line(run_train(broken, simp_file, tmp_path / "run", check=False))
    first = global_batch(42, 60, 0, 8)
    assert "step 1 was stopped before the optimizer: loss nan" in line
    assert str(first) in line
    assert "last good checkpoint: the one that the run started from" in line
    assert not (tmp_path / "run").exists()


def test_bad_input_ends_before_training_with_nothing_written(checkpoint, simp_file, tmp_path):
    small = shutil.copytree(checkpoint, tmp_path / "small")
    data = (small / "model.safetensors").read_bytes()
    (small / "model.safetensors").write_bytes(data[:-10])
    cases = [
        (["--data", tmp_path / "none.json"], "none.json does not exist or is not a preprocessed task file"),
        (["--init", small], "model.safetensors is truncated or damaged"),
        (["--init", tmp_path], "is no checkpoint: it holds no config.json"),
        (["--task", "smp"], "unknown task 'smp'"),
        (["--data", tmp_path], "is not a preprocessed task file"),
        (["--max_source_length", "2000"], "more than the model's max_position_embeddings 2048"),
    ]
    for flags, said in cases:
        assert said in error_line(run_train(checkpoint, simp_file, tmp_path / "run", *flags, check=False))
        assert not (tmp_path / "run").exists()
        assert not (tmp_path / "run.partial").exists()


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(checkpoint, simp_file, tmp_path):
    """The first epoch's checkpoint fits; a real limit on the size of files comes into force before the second."""
    code = ("import resource, sys, runpy, train; sys.argv = sys.argv[1:]; real, calls = train.save, []\n"
            "def save(*args):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
            "    real(*args)\n"
            "train.save = save; train.settings.run((train.TrainConfig, train.main), '')")
    result = run_script("-c", code, "train.py", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "run",
                        *FLAGS, check=False)
    assert "cannot write" in error_line(result)
    assert not (tmp_path / "run").exists()
    kept = tmp_path / "run.partial"
    assert [path.name for path in kept.glob("checkpoint-*")] == ["checkpoint-8"]
    AutoModelForCausalLM.from_pretrained(kept / "checkpoint-8")


def test_a_bad_task_file_leaves_nothing_behind(checkpoint, tmp_path):
    (tmp_path / "simp.json").write_text('{"train": [{"input": "x"}], "eval": [], "test": []}')
    line = error_line(run_train(checkpoint, tmp_path / "simp.json", tmp_path / "run", check=False))
    assert "train[0] is no object with the texts 'input' and 'output'" in line
    assert [path.name for path in tmp_path.iterdir()] == ["simp.json"]


def test_no_compiler_is_needed(checkpoint, simp_file, tmp_path):
    """DeepSpeed compiles parts of itself where they are used; here none is, so an empty PATH does."""
    (tmp_path / "bin").mkdir()
    run_train(checkpoint, simp_file, tmp_path / "run", "--max_steps", "1", launcher=[sys.executable, *TORCHRUN],
              PATH=str(tmp_path / "bin"), CXX="none", TORCH_EXTENSIONS_DIR=str(tmp_path / "compiled"))
    assert (tmp_path / "run/model.safetensors").exists()
    assert not (tmp_path / "compiled").exists()


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for limit, kept in ((5, {2, 9, 10}), (3, {2, 9, 10}), (2, {9, 10}), (0, set())):
        prune(tmp_path, limit)
        assert {int(path.name.split("-")[1]) for path in tmp_path.iterdir()} == kept


def test_under_the_deepspeed_launcher(finished, checkpoint, simp_file, tmp_path):
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info",
                "eyJsb2NhbGhvc3QiOiBbMCwgMV19", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    run_train(checkpoint, simp_file, tmp_path / "run", launcher=launcher)
    for a, b in zip(steps(tmp_path / "run")[0], steps(finished[0])[0]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
