"""The training loop equals a plain PyTorch loop over transformers, however the work is distributed."""
import dataclasses
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from common.distributed import free_port
from common.dtypes import resolve_dtype
from common.files import read_json
from corpus.prompts import PROMPT, open_template
from corpus.shards import ShardDataset
from corpus.tasks import SFTDataset, read_task
from model.checkpoint import write_checkpoint
from model.config import ModelConfig
from model.hub import load_model
from model.tokenizer import Tokenizer
from model.transformer import initial_weights
from tests.conftest import SHAPE, TRAIN_FLAGS, error_line, losses, random_model, read_metrics, run_script, sample_texts
from train import learning_rate, main
from training.batches import count_tokens, make_microbatches, sample_indices
from training.engine import run_weights
from training.run import first_sample, num_samples
from training.run_directory import prune_checkpoints, start_run
from training.train_config import TrainConfig

FLAGS = ["--max_steps", "20", "--warmup_steps", "4", "--lr_scheduler_type", "cosine", "--weight_decay", "0.1",
         "--max_grad_norm", "1", "--eval_steps", "10", "--max_train_samples", "60", "--examples", "2",
         "--logging_steps", "8"]


@pytest.fixture(scope="module")
def finished(train, tmp_path_factory):
    """(directory, standard output) of a finished run of 20 steps in one process."""
    out = tmp_path_factory.mktemp("runs") / "m1-simp"
    return out, train(out).stdout


def test_learning_rate_schedules():
    cfg = TrainConfig(learning_rate=1.0, warmup_steps=3, min_lr_ratio=0.1)

    def rates(schedule):
        scheduled = dataclasses.replace(cfg, lr_scheduler_type=schedule)
        return [round(learning_rate(scheduled, step, 13), 4) for step in (0, 1, 2, 3, 8, 12)]

    assert rates("constant") == [0.25, 0.5, 0.75, 1, 1, 1]
    assert rates("linear") == [0.25, 0.5, 0.75, 1, 0.55, 0.19]
    assert rates("cosine") == [0.25, 0.5, 0.75, 1, 0.55, round(0.1 + 0.9 * (1 + math.cos(0.9 * math.pi)) / 2, 4)]
    wsd = dataclasses.replace(cfg, lr_scheduler_type="wsd", decay_ratio=0.5, warmup_steps=0)
    assert [round(learning_rate(wsd, step, 8), 4) for step in range(8)] == [1, 1, 1, 1, 1, 0.775, 0.55, 0.325]


def test_a_stage_of_the_original_tool_continues(simp_file, tmp_path):
    """Its checkpoints have a SentencePiece tokenizer and one more embedding, of the added [PAD]: 32,001 of them."""
    start = tmp_path / "start"
    start.mkdir()
    SentencePieceTrainer.train(sentence_iterator=iter(sample_texts()), model_prefix=str(start / "tokenizer"),
                               vocab_size=400, model_type="bpe", byte_fallback=True, minloglevel=2)
    (start / "tokenizer.vocab").unlink()
    files = {"added_tokens.json": {"[PAD]": 400}, "special_tokens_map.json": {
        "bos_token": "<s>", "eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "<unk>"},
        "tokenizer_config.json": {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}}
    for name, content in files.items():
        (start / name).write_text(json.dumps(content))
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 401}))
    torch.save(model.state_dict(), start / "pytorch_model.bin")
    (start / "config.json").write_text(json.dumps(model.config.to_dict() | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "pad_token_id": 400}))
    run_script("train.py", *TRAIN_FLAGS, "--init", start, "--data", simp_file, "--out", tmp_path / "m1-simp",
               "--max_steps", "2")
    (entry, _), (before, _) = read_metrics(tmp_path / "m1-simp")
    assert entry["loss"] == pytest.approx(before["eval_loss"], abs=0.2)
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "m1-simp", dtype=torch.float32)
    assert after.config.vocab_size == 401
    assert torch.equal(after.model.embed_tokens.weight[400], model.model.embed_tokens.weight[400])  # never an input
    assert (tmp_path / "m1-simp/tokenizer.model").read_bytes() == (start / "tokenizer.model").read_bytes()
    assert Tokenizer(tmp_path / "m1-simp").pad_id == 400


def test_an_evaluation_in_parts(train, finished, tmp_path):
    """A split that is larger than what is evaluated between two updates of the progress bar."""
    train(tmp_path / "parts", "--max_steps", "1", patch="train.EVAL_SAMPLES = 2")
    whole, parts = (losses(path)[0, "eval_loss"] for path in (finished[0], tmp_path / "parts"))
    assert parts == pytest.approx(whole, rel=1e-6)


def test_losses_equal_a_plain_loop_over_transformers(finished, checkpoint, simp_file):
    """The plain loop uses transformers' model and tokenizer, PyTorch's AdamW and clipping, and one sample at a time."""
    logged, evaluated = read_metrics(finished[0])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    splits = json.loads(simp_file.read_text())

    def encode(item):
        source = [1, *tokenizer.encode(PROMPT.format(source=item["input"]), add_special_tokens=False)]
        target = [*tokenizer.encode(item["output"], add_special_tokens=False), 2][:64]
        if len(source) > 128:
            marker = tokenizer.encode("\n\n### Response:", add_special_tokens=False)
            source = source[:128 - len(marker)] + marker
        return torch.tensor([source + target]), torch.tensor([[-100] * len(source) + target]), len(target)

    def mean_loss(items, backward=False):
        samples = [encode(item) for item in items]
        num_targets, total = sum(count for *_, count in samples), 0.0
        for ids, labels, count in samples:
            loss = model(ids, labels=labels).loss * count / num_targets
            total += loss.item()
            if backward:
                loss.backward()
        return total

    decayed = [p for n, p in model.named_parameters() if not n.endswith("norm.weight")]
    not_decayed = [p for n, p in model.named_parameters() if n.endswith("norm.weight")]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": not_decayed, "weight_decay": 0.0}], betas=(0.9, 0.999), eps=1e-8)
    train = splits["train"][:60]
    assert evaluated[0]["eval_loss"] == pytest.approx(mean_loss(splits["eval"][:6]), rel=1e-5)
    for step in range(12):
        expected = mean_loss([train[i] for i in sample_indices(42, 60, 8 * step, 8 * step + 8)], backward=True)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 5e-3 * (min(1, (step + 1) / 5)) * (1 + math.cos(math.pi * max(0, step - 4) / 16)) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad()
        assert logged[step]["lr"] == pytest.approx(lr)
        assert logged[step]["loss"] == pytest.approx(expected, rel=2e-5), step
        assert logged[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-3), step


def without_compiler(folder):
    """The environment of a run that finds no compiler; DeepSpeed would compile extensions in the folder `compiled`."""
    return {"PATH": str(folder / "bin"), "CXX": "none", "TORCH_EXTENSIONS_DIR": str(folder / "compiled")}


CHUNKS = "import model.loss; model.loss.chunk_rows = lambda *_: 20"


@pytest.mark.parametrize(("flags", "launcher", "patch"), [
    (["--max_tokens_per_microbatch", "200"], 1, ""),
    (["--max_tokens_per_microbatch", "200", "--gradient_checkpointing"], 2, ""),
    (["--max_tokens_per_microbatch", "9000", "--zero", "0"], 2, ""),
    (["--zero", "2"], 2, ""),
    (["--zero", "3", "--gradient_checkpointing"], 2, CHUNKS),
], ids=["small micro-batches", "two processes", "two processes, large micro-batches", "ZeRO 2", "ZeRO 3"])
def test_losses_do_not_depend_on_how_the_work_is_distributed(train, finished, tmp_path, flags, launcher, patch):
    """DeepSpeed compiles extensions when they are first used; training uses none. Under ZeRO 3 ranks with different
    numbers of targets, and so of chunks of the loss, make the same collective calls."""
    train(tmp_path / "run", *flags, launcher=launcher, patch=patch, **without_compiler(tmp_path))
    assert not (tmp_path / "compiled").exists()
    expected, actual = losses(finished[0]), losses(tmp_path / "run")
    assert len(actual) == 20 + 3
    assert actual == pytest.approx(expected, rel=1e-5)
    assert expected[20, "loss"] < expected[1, "loss"] - 0.3  # the model has learned
    weights = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
               for path in (finished[0], tmp_path / "run")]
    assert all((weights[0][name] - weights[1][name]).abs().max() < 1e-3 for name in weights[0])


def test_bf16_keeps_fp32_master_weights(train, tmp_path):
    """bf16 master weights would lose steps of 1e-5: a bf16 weight near 0.2 has a resolution of 1e-3."""
    flags = ["--learning_rate", "1e-5", "--lr_scheduler_type", "constant", "--max_steps", "30", "--eval_steps", "30",
             "--max_train_samples", "8"]
    train(tmp_path / "fp32", *flags)
    train(tmp_path / "1", *flags, "--dtype", "bf16", "--zero", "1")
    train(tmp_path / "2", *flags, "--dtype", "bf16", "--zero", "2", launcher=2)
    expected, *decreases = (losses(tmp_path / name)[1, "loss"] - losses(tmp_path / name)[30, "loss"]
                            for name in ("fp32", "1", "2"))
    assert expected > 0.01
    assert decreases == pytest.approx([expected] * 2, rel=0.5)
    for name in ("1", "2"):
        assert AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto").dtype == torch.bfloat16


def test_losses_of_compiled_blocks(train, finished, tmp_path):
    """The graphs of the blocks are captured and run. To generate code for them would take minutes. None is captured
    while examples are decoded, whose lengths are all different."""
    patch = """if True:
        import torch
        compiled, decode = torch.nn.Module.compile, train.decode_examples
        def run_graph(graph, inputs):
            print("graph")
            return graph.forward
        torch.nn.Module.compile = lambda block: print("compiled") or compiled(block, backend=run_graph)
        train.decode_examples = lambda *args: print("decoding") or decode(*args)"""
    training, decoding = train(tmp_path / "run", "--compile", "--max_tokens_per_microbatch", "200",
                               patch=patch).stdout.split("decoding\n")
    assert training.count("compiled\n") == 2
    assert "graph\n" in training
    assert "graph\n" not in decoding
    assert losses(tmp_path / "run") == pytest.approx(losses(finished[0]), rel=1e-5)


def test_the_weights_are_saved_before_examples_are_decoded(train, tmp_path):
    patch = """if True:
        from common.files import UserError
        def fail(*args):
            raise UserError("no examples")
        train.decode_examples = fail"""
    assert error_line(train(tmp_path / "run", patch=patch, check=False)) == "error: no examples"
    AutoModelForCausalLM.from_pretrained(tmp_path / "run.partial")


@pytest.mark.parametrize("trained", ["all", "lora"])
def test_zero_3_saves_models_above_its_limits_of_live_parameters(train, checkpoint, simp_file, tmp_path, trained):
    """Limits and model are those of DeepSpeed and a 7B, divided by 12,000: the model has 6.7 times as many parameters
    as may be live. Then evaluations leave parameters behind that are being gathered."""
    model = random_model(num_hidden_layers=12, hidden_size=64, intermediate_size=172, head_dim=16)
    (tmp_path / "deep").mkdir()
    write_checkpoint(tmp_path / "deep", model.config, model.named_parameters(), checkpoint)
    limits = {"stage3_max_live_parameters": 83_000, "stage3_max_reuse_distance": 83_000, "sub_group_size": 83_000,
              "stage3_prefetch_bucket_size": 4_200, "reduce_bucket_size": 42_000,
              "stage3_param_persistence_threshold": 1}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3, "overlap_comm": True, **limits}}))
    train(tmp_path / "m1", "--max_steps", "2", "--train", trained, "--deepspeed", tmp_path / "ds.json",
          init=tmp_path / "deep", launcher=2)
    nll, count, saved = 0.0, 0, load_model(tmp_path / "m1")
    for ids, first in SFTDataset(read_task(simp_file)[0]["eval"][:6], Tokenizer(checkpoint), 128, 64):
        ids = torch.from_numpy(ids)
        with torch.no_grad():
            logits = saved(ids[None, :-1])[0, first - 1:]
        nll += torch.nn.functional.cross_entropy(logits, ids[first:], reduction="sum")
        count += len(ids) - first
    result = read_json(tmp_path / "m1/run.json")["result"]
    assert result["eval_loss_after"] == pytest.approx(float(nll / count), rel=1e-5)


@pytest.mark.parametrize("zero", ["1", "3"])
@pytest.mark.parametrize("method", [[], ["--method", "vcl", "--weight_decay", "0"]])
def test_the_host_does_not_wait_for_the_gpu(train, tmp_path, zero, method):
    """But where weights are changed that ZeRO-3 then gathers on another stream, and for the loss and the gradient norm,
    which are read once a step. DeepSpeed's timer would wait from the third step on."""
    patch = """if True:
        import sys, torch
        from unittest.mock import patch
        def counted(function):
            def call(*args):
                from deepspeed.accelerator import get_accelerator
                waits, readers = [], []
                def reading(read):
                    def call(tensor):
                        code = sys._getframe(1).f_code
                        # IVON's update reads a number in host memory
                        if "site-packages" not in code.co_filename and code.co_name != "update":
                            readers.append(code.co_name)
                        return read(tensor)
                    return call
                reads = {name: reading(getattr(torch.Tensor, name)) for name in (
                    "item", "tolist", "__bool__", "__float__", "__int__")}
                with patch.object(type(get_accelerator()), "synchronize", lambda *_: waits.append(0)), \
                        patch.multiple(torch.Tensor, **reads):
                    result = function(*args)
                print(function.__name__, len(waits), *readers)
                return result
            return call
        from training.methods import Variational
        Variational.before_step = counted(Variational.before_step)
        train.train_step, train.evaluate = counted(train.train_step), counted(train.evaluate)"""
    lines = train(tmp_path / "run", "--zero", zero, *method, "--max_steps", "4", "--max_tokens_per_microbatch", "200",
                  patch=patch).stdout.splitlines()
    assert {line for line in lines if line.startswith(("train_step", "evaluate"))} == {
        "train_step 0 all_reduce_sum optimizer_step", "evaluate 0 all_reduce_sum", "evaluate 0"}
    assert [line for line in lines if line.startswith("before_step")] == \
        4 * bool(method) * [f"before_step {int(zero == '3')}"]


def test_bf16_gradients_are_accumulated_in_fp32(checkpoint):
    """A gradient and 1/512 of it add up to 513/512 of it; in bf16, whose numbers have eight bits, to itself."""
    code = """if True:
        import sys, torch
        from common.distributed import Distributed
        from model import load_model
        from training.engine import build_engine
        from training.run import Run
        from training.train_config import TrainConfig
        from training.zero_shards import base_optimizer
        ids = torch.arange(3, 43).view(2, 20)
        with Distributed() as dist:
            for zero in (1, 2, 3):
                totals = []
                for scales in ([1.0], [1.0, 2.0 ** -9]):
                    model = load_model(sys.argv[1], torch.bfloat16)
                    cfg = TrainConfig(dtype="bf16", zero=zero, max_grad_norm=0.0)
                    engine = build_engine(Run(cfg, dist, None, None, model.config, {}, {}), model)
                    optimizer = base_optimizer(engine)
                    totals.append(0.0)

                    def add(optimizer, *_):
                        totals[-1] += sum(float(flat.grad.double().abs().sum()) for group in optimizer.param_groups
                                          for flat in group["params"] if flat.grad is not None)

                    optimizer.register_step_pre_hook(add)  # stages 2 and 3 take a step for each group
                    for scale in scales:
                        engine.set_gradient_accumulation_boundary(scale == scales[-1])
                        engine.backward(scale * engine(ids, ids), scale_wrt_gas=False)
                    engine.step()
                print("ratio", totals[1] / totals[0])"""
    lines = run_script("-c", code, checkpoint).stdout.splitlines()
    ratios = [float(line.split()[1]) for line in lines if line.startswith("ratio")]
    assert ratios == 3 * [pytest.approx(513 / 512, rel=1e-6)]


def test_a_place_that_cannot_become_a_run_is_refused(train, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    (tmp_path / "run.partial").write_text("notes")
    for name, said in (("link", "link is a link to nothing, expected"), ("run", "run.partial is a file, expected")):
        assert said in error_line(train(tmp_path / name, check=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run.partial"]


def test_training_does_not_import_the_compiler():
    """It takes seconds. A step is that of PyTorch's AdamW, bit for bit."""
    code = """if True:
        import sys, torch
        from training.deepspeed_config import import_deepspeed
        from training.ivon import IVON
        from training.optimizers import AdamW
        compile_function = torch.compile
        import_deepspeed(torch.device("cpu"))
        assert torch.compile is compile_function
        import deepspeed.runtime.zero.muon.original_muon  # as DeepSpeed does when ZeRO starts
        weights = [torch.nn.Parameter(torch.arange(6.0)) for _ in range(2)]
        IVON(weights, 0.1, 9.0, 1.0, (0.9, 0.9), 1.0).zero_grad()
        for kind, weight in zip((AdamW, torch.optim.AdamW), weights):
            optimizer = kind([weight], lr=0.1, weight_decay=0.1, fused=True)
            for _ in range(3):
                (weight ** 3).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            print(kind.__module__, "torch._dynamo" in sys.modules)
        assert torch.equal(*weights)"""
    lines = run_script("-c", code, launcher=[sys.executable]).stdout.splitlines()
    assert lines == ["training.optimizers False", "torch.optim.adamw True"]


@pytest.mark.skipif(resolve_dtype("auto") == "fp32", reason="this CPU compiles no kernels for bf16")
def test_the_cache_of_compiled_kernels_is_bounded():
    """600 kernels take about 380 MiB."""
    code = ("import torch; from common.distributed import Distributed\n"
            "def resident(): return int(open('/proc/self/statm').read().split()[1]) * 4096 / 2 ** 20\n"
            "x, y, out = (torch.zeros(shape, dtype=torch.bfloat16) for shape in ((900, 512), (512, 256), (900, 256)))\n"
            "with Distributed():\n"
            "    torch.mm(x, y, out=out)\n"
            "    before = resident()\n"
            "    for rows in range(200, 800): torch.mm(x[:rows], y, out=out[:rows])\n"
            "    print(resident() - before)")
    assert float(run_script("-c", code).stdout) < 150


def test_files_of_a_finished_run(finished, checkpoint, simp_file):
    out, printed = finished
    assert sorted(path.name for path in out.iterdir()) == [
        "checkpoint-15", "config.json", "metrics.jsonl", "model.safetensors", "run.json", "tokenizer.json",
        "tokenizer_config.json"]  # epochs end after 60 and 120 samples, in steps 8 and 15; save_total_limit is 1
    assert not out.with_name("m1-simp.partial").exists()
    run = json.loads((out / "run.json").read_text())
    assert run["settings"]["learning_rate"] == 5e-3
    assert (run["settings"]["dtype"], run["settings"]["zero"], run["processes"], run["device"]) == ("fp32", 0, 1, "cpu")
    assert len(run["parent_digest"]) == len(run["data_digest"]) == 64
    assert run["versions"]["torch"] == torch.__version__
    logged, evaluated = read_metrics(out)
    assert run["result"]["eval_loss_before"] == evaluated[0]["eval_loss"] > run["result"]["eval_loss_after"]
    assert run["result"]["eval_loss_after"] == evaluated[-1]["eval_loss"]
    assert [line["step"] for line in evaluated] == [0, 10, 20]
    assert all(0.5 < line["computed"] < 1 and line["tokens_per_s"] > 0 for line in logged)
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    batch = [data[index] for index in sample_indices(42, 60, 0, 8)]
    computed = sum(len(prefix) + ids.numel() for ids, _, prefix in make_microbatches(
        TrainConfig(), SimpleNamespace(rank=0, world_size=1), batch))
    assert logged[0]["computed"] == pytest.approx(computed / count_tokens(batch)[0])
    assert logged[-1]["tokens"] == run["result"]["tokens"] > 9000
    before, after = evaluated[0]["eval_loss"], evaluated[-1]["eval_loss"]
    losses_line = f"before {before:.4f}  after {after:.4f}  {after - before:+.4f}  ████████████████████  learned\n"
    for text in ("example 2     model:", "example 2 reference:", losses_line, f"checkpoint: {out}"):
        assert text in printed
    assert "example 3" not in printed
    assert re.findall(r"^step +(\d+)/20  loss ", printed, re.MULTILINE) == ["1", "8", "16", "20"]
    assert len(run["result"]["examples"]) == 2
    assert "pretraining text" not in printed
    _, info = AutoModelForCausalLM.from_pretrained(out / "checkpoint-15", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_decoded_examples_equal_those_of_transformers(finished, checkpoint, simp_file):
    model = AutoModelForCausalLM.from_pretrained(finished[0], dtype=torch.float32)
    tokenizer, template = AutoTokenizer.from_pretrained(checkpoint), open_template("alpaca", Tokenizer(checkpoint))
    expected = []
    for item in read_task(simp_file)[0]["test"][:2]:
        ids = torch.tensor(template.encode_prompts([item["input"]], 128))
        new = model.generate(ids, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, ids.shape[1]:]
        assert new[-1] == 2  # it ends before 64 tokens
        expected.append({"input": item["input"], "output": item["output"],
                         "prediction": tokenizer.decode(new, skip_special_tokens=True).strip()})
    assert json.loads((finished[0] / "run.json").read_text())["result"]["examples"] == expected


def test_a_finished_run_is_not_repeated(train, finished):
    out, _ = finished
    before = (out / "model.safetensors").stat().st_mtime_ns
    result = train(out, "--max_tokens_per_microbatch", "999")  # a setting that does not change the numbers
    assert "is finished already, nothing to do" in result.stdout
    assert f"checkpoint: {out}" in result.stdout
    assert (out / "model.safetensors").stat().st_mtime_ns == before


def test_a_finished_run_of_another_version(train, finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "m1")
    run = read_json(out / "run.json")
    del run["result"]["peak_memory_bytes"]
    (out / "run.json").write_text(json.dumps(run))
    line = error_line(train(out, check=False))
    assert f"{out}/run.json is damaged or not the record of a finished run of this version" in line


def test_a_finished_run_does_not_need_its_parent(train, checkpoint, tmp_path):
    parent = shutil.copytree(checkpoint, tmp_path / "m0")
    flags = "--max_steps", "1", "--max_eval_samples", "1"
    train(tmp_path / "m1", *flags, init=parent)
    shutil.rmtree(parent)
    assert "finished already" in train(tmp_path / "m1", *flags, init=parent).stdout
    line = error_line(train(tmp_path / "m1", *flags, "--seed", "1", init=parent, check=False))
    assert "seed is 42 there and 1 here" in line
    line = error_line(train(tmp_path / "m1", *flags, init=tmp_path / "typo", check=False))
    assert f"{tmp_path}/typo" in line
    record = json.loads((tmp_path / "m1/run.json").read_text())
    del record["result"]
    (tmp_path / "m1/run.json").write_text(json.dumps(record))
    line = error_line(train(tmp_path / "m1", *flags, init=parent, check=False))
    assert f"m1 is a run that was not finished: remove it, or name it {tmp_path}/m1.partial to continue it" in line


def test_checkpoints_of_an_unfinished_run_are_kept(tmp_path):
    record, partial = {"settings": {}, "parent_digest": None, "data_digest": ""}, tmp_path / "m1.partial"
    partial.mkdir()
    start_run(partial, record)
    for step in (3, 6):
        (partial / f"checkpoint-{step}").mkdir()
        start_run(partial, record)
        assert [path.name for path in partial.iterdir()] == ["run.json"]
    assert (tmp_path / "m1.partial.old/checkpoint-3").is_dir()
    assert (tmp_path / "m1.partial.old-2/checkpoint-6").is_dir()


def test_other_settings_are_refused_with_the_differences(train, finished, simp_file, tmp_path):
    out, _ = finished
    line = error_line(train(out, "--seed", "7", "--warmup_steps", "0", check=False))
    assert "belongs to a run with other settings" in line
    assert "seed is 42 there and 7 here; warmup_steps is 4 there and 0 here" in line
    splits = json.loads(simp_file.read_text())
    splits["train"].pop()
    (tmp_path / "other.json").write_text(json.dumps(splits))
    assert "different: the data (" in error_line(train(out, data=tmp_path / "other.json", check=False))


def test_trains_on_a_file_of_the_original_tool(train, tmp_path):
    """A preprocessed file as the original tool wrote it: no references, other fields, and one empty target."""
    item = {"input": "Simplify: a very difficult sentence", "output": "easy", "src_info": None, "index": 0}
    splits = {"train": [item] * 8 + [item | {"output": ""}], "eval": [item] * 2, "test": [item]}
    (tmp_path / "simp.json").write_text(json.dumps(splits))
    result = train(tmp_path / "run", "--max_steps", "3", data=tmp_path / "simp.json")
    assert "1 samples have no target and are left out: train[8]" in result.stdout
    assert "note: the learning rate warms up for 4 of 3 steps, and never reaches " in result.stdout
    assert losses(tmp_path / "run")[3, "loss"] < losses(tmp_path / "run")[1, "loss"]


def test_pretraining_a_base_and_its_grown_model(tmp_path, checkpoint, simp_file):
    """The phases of the recipe on your own text. The grown model continues in the data where the base stopped."""
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is a number; {n + 1} comes after it."}) + "\n"
                            for n in range(900)))
    run_script("data_prep.py", "text", "--source", text, "--vocab_size", "400", "--output_path", tmp_path / "shards")
    common = ["train.py", "--config", "configs/train/pretrain.toml", "--size", "tiny", "--data", tmp_path / "shards",
              "--seq_length", "32", "--dtype", "fp32"]
    run_script(*common, "--phase", "base", "--num_hidden_layers", "2", "--global_batch_size", "4",
               "--max_tokens", "2560", "--out", tmp_path / "base")
    logged, evaluated = read_metrics(tmp_path / "base")
    assert len(logged) == 20
    assert evaluated[0]["eval_loss"] == pytest.approx(math.log(4096), abs=0.1)  # uniform predictions
    assert evaluated[-1]["eval_loss"] < 5
    assert all(line["computed"] == 1 for line in logged)
    assert json.loads((tmp_path / "base/config.json").read_text())["num_hidden_layers"] == 2
    run_script("stack.py", "grow", "--init", tmp_path / "base", "--factor", "4", "--out", tmp_path / "grown")
    # 6·N·D with N = 4096·96 + 96 + layers × (96·(96 + 32 + 32 + 96) + 3·96·256 + 2·96)
    deep, shallow = (4096 * 96 + 96 + layers * (96 * 256 + 3 * 96 * 256 + 2 * 96) for layers in (8, 2))
    spent = 6 * shallow * 2560
    assert logged[-1]["flops"] == spent
    stack = [*common, "--phase", "stack", "--init", tmp_path / "grown", "--global_batch_size", "2"]
    line = error_line(run_script(*stack, "--out", tmp_path / "m0", "--max_flops", spent + 6 * deep * 60,
                                 check=False))
    assert f"one step costs {6 * deep * 64:.4g} and --init has already used {spent:.4g}" in line
    run_script(*stack, "--out", tmp_path / "m0", "--max_flops", spent + 6 * deep * 64 * 7.9)
    logged, evaluated = read_metrics(tmp_path / "m0")
    assert [line["flops"] for line in logged] == [spent + 6 * deep * 64 * step for step in range(1, 8)]
    assert (evaluated[0]["flops"], evaluated[-1]["flops"]) == (spent, logged[-1]["flops"])
    assert json.loads((tmp_path / "m0/config.json").read_text())["num_hidden_layers"] == 8
    # the base was trained on 80 samples, and the first step after growth on the next two
    shards = ShardDataset(tmp_path / "shards", "train", 32)
    rows = torch.stack([torch.from_numpy(shards[i][0]) for i in sample_indices(42, len(shards), 80, 82)])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "grown", dtype=torch.float32)
    with torch.no_grad():
        assert logged[0]["loss"] == pytest.approx(model(rows, labels=rows).loss.item(), rel=1e-5)
    lineage = json.loads((tmp_path / "m0/run.json").read_text())["lineage"]
    assert lineage["text"]["samples"] == 80 + 14
    assert lineage["flops"] == logged[-1]["flops"]
    result = run_script(*stack, "--out", tmp_path / "x", "--seed", "1", "--max_flops", "none", "--max_tokens", "64")
    assert "starting at the first sample" in result.stdout
    assert json.loads((tmp_path / "x/run.json").read_text())["result"]["first_sample"] == 0
    result = run_script(*common, "--phase", "stack", "--init", checkpoint, "--out", tmp_path / "y", check=False)
    assert "was made with a tokenizer other than that of" in error_line(result)
    result = run_script("train.py", "--init", checkpoint, "--data", simp_file, "--out", tmp_path / "y", check=False)
    assert "is a file, expected a directory of token shards: for a task file give --task" in error_line(result)


def test_a_run_without_a_step_is_refused_before_its_weights_are_read(train, tmp_path):
    """LoRA says how many parameters it trains when the model is there."""
    result = train(tmp_path / "m1", "--train", "lora", "--schedule_steps", "1", check=False)
    assert "schedule_steps 1: raise it" in error_line(result)
    assert "parameters (" not in result.stdout


def test_pretraining_ends_at_an_eval_loss(checkpoint, tmp_path):
    """The run ends after the first evaluation that reaches the loss, also if it was resumed, or before its first step.
    """
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"{n} is a number; {n + 1} comes after it."}) + "\n"
                            for n in range(900)))
    run_script("data_prep.py", "text", "--source", text, "--tokenizer", checkpoint, "--output_path",
               tmp_path / "shards")

    def pretrain(name, loss, *interrupted):
        script = ["tests/interrupted.py", *interrupted] if interrupted else []
        result = run_script(*script, "train.py", "--init", checkpoint, "--data", tmp_path / "shards", "--seq_length",
                            "32", "--global_batch_size", "4", "--learning_rate", "2e-3", "--max_steps", "12",
                            "--max_eval_samples", "8", "--eval_steps", "3", "--save_minutes", "0", "--dtype", "fp32",
                            "--stop_at_eval_loss", loss, "--out", tmp_path / name, check=not interrupted)
        path = tmp_path / name / "run.json"
        return result.stdout, json.loads(path.read_text()) if path.exists() else None

    _, whole = pretrain("whole", "none")
    evaluated = {line["step"]: line["eval_loss"] for line in read_metrics(tmp_path / "whole")[1]}
    assert sorted(evaluated) == [0, 3, 6, 9, 12]
    assert sorted(evaluated.values(), reverse=True) == list(evaluated.values())
    printed, run = pretrain("level", evaluated[6])
    assert f"the eval loss is at most {evaluated[6]}: ending after step 6" in printed
    assert (run["result"]["steps"], run["result"]["eval_loss_after"]) == (6, evaluated[6])
    assert (run["result"]["last_sample"], run["lineage"]["text"]["samples"]) == (24, 24)
    assert run["settings"]["stop_at_eval_loss"] == evaluated[6]
    assert run["lineage"]["flops"] == read_metrics(tmp_path / "level")[0][-1]["flops"] == whole["lineage"]["flops"] / 2
    expected = {key: loss for key, loss in losses(tmp_path / "whole").items() if key[0] <= 6}
    assert losses(tmp_path / "level") == expected
    for step in ("5", "6"):  # killed in this step
        pretrain(f"killed-{step}", evaluated[6], step, "SIGKILL", "all")
        printed, run = pretrain(f"killed-{step}", evaluated[6])
        assert f"resuming after step {int(step) - 1}" in printed
        assert (run["result"]["steps"], losses(tmp_path / f"killed-{step}")) == (6, expected)
    _, run = pretrain("at-once", evaluated[0])
    assert (run["result"]["steps"], run["result"]["eval_loss_after"], run["lineage"]["flops"]) == (0, evaluated[0], 0)
    assert run["lineage"]["text"]["samples"] == 0
    start, end = (load_file(folder / "model.safetensors") for folder in (checkpoint, tmp_path / "at-once"))
    assert all(torch.equal(start[name], end[name]) for name in start)
    _, run = pretrain("not-reached", evaluated[12] / 2)
    assert run["result"]["steps"] == 12

    pretrain("read-once", "none", "7", "SIGKILL", "all")  # a resumed run does not check all shards again
    shard, = (tmp_path / "shards").glob("train-*.npy")
    shard.write_bytes(shard.read_bytes()[:-2] + b"\x05\x00")  # the last token, which no sample has
    assert "resuming after step 6" in pretrain("read-once", "none")[0]
    assert losses(tmp_path / "read-once") == losses(tmp_path / "whole")
    with pytest.raises(AssertionError, match="is not the shard that meta.json describes"):
        pretrain("again", "none")


def test_a_non_finite_loss_stops_before_the_optimizer(train, tmp_path):
    patch = ("import torch; engine_of = train.build_engine\n"
             "def broken(run, model):\n"
             "    with torch.no_grad(): model.model.norm.weight[0] = torch.inf\n"
             "    return engine_of(run, model)\n"
             "train.build_engine, train.evaluate = broken, lambda *_: 1.0")
    line = error_line(train(tmp_path / "run", patch=patch, check=False))
    assert "step 1 was aborted before the optimizer update: loss nan" in line
    assert str(sample_indices(42, 60, 0, 8)) in line
    assert "last good checkpoint: the initial checkpoint" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("flags", "ranks", "message"), [
    (["--max_steps", "1"], 1, "the evaluation loss is nan"),  # made by the last step, so that no later loss shows it
    (["--save_minutes", "0", "--zero", "1", "--dtype", "bf16"], 2, "made weights that are not finite"),
    (["--save_minutes", "0", "--zero", "3"], 2, "made weights that are not finite"),
])
def test_weights_that_are_not_finite_are_not_published(train, tmp_path, flags, ranks, message):
    line = error_line(train(tmp_path / "run", "--learning_rate", "1e308", "--warmup_steps", "0", *flags,
                            launcher=ranks, check=False))
    assert message in line
    assert "last good checkpoint: the initial checkpoint. Try a lower learning_rate" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    assert not list(tmp_path.rglob("*.safetensors"))


def test_initial_weights_that_overflow_are_to_blame_before_the_first_step(train, tmp_path):
    line = error_line(train(tmp_path / "run", patch="train.evaluate = lambda *_: float('nan')", check=False))
    assert "the evaluation loss is nan; no step was taken yet: check the weights of --init, or try --dtype fp32" in line


def test_the_last_good_checkpoint_is_one(train, tmp_path):
    """The learning rate explodes in the second epoch, whose checkpoint is not written."""
    patch = "rate = train.learning_rate; train.learning_rate = lambda cfg, step, steps: 1e-3 if step < 8 else 1e308"
    flags = "--max_steps", "20", "--max_train_samples", "64", "--save_total_limit", "9"
    line = error_line(train(tmp_path / "run", *flags, patch=patch, check=False))
    assert f"last good checkpoint: {tmp_path}/run.partial/checkpoint-8" in line
    weights = load_file(tmp_path / "run.partial/checkpoint-8/model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    assert not (tmp_path / "run").exists()


def test_an_epochs_checkpoint_knows_its_task(train, refusal, checkpoint, simp_file, tmp_path):
    train(tmp_path / "run", "--max_steps", "none", "--num_train_epochs", "2", "--ewc_strength", "1",
          "--max_train_samples", "16", "--fisher_samples", "2", interrupted=(3, "SIGKILL", "all"))
    start = tmp_path / "run.partial/checkpoint-2"
    lineage = json.loads((start / "run.json").read_text())["lineage"]
    assert [task["task"] for task in lineage["tasks"]] == ["simp"]
    assert lineage["flops"] == read_metrics(tmp_path / "run.partial")[0][1]["flops"]
    flags = "--init", start, "--data", simp_file, "--out", tmp_path / "next", *TRAIN_FLAGS, "--ewc_strength", "1"
    assert f"{start} has no Fisher information of simp" in refusal((TrainConfig, main), *flags)


def test_bad_input_is_refused_before_anything_is_written(refusal, monkeypatch, checkpoint, simp_file, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    truncated = shutil.copytree(checkpoint, tmp_path / "truncated")
    content = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[:-10])
    bad_task = tmp_path / "bad.json"
    bad_task.write_text('{"train": [{"input": "x"}], "eval": [], "test": []}')
    cases = [
        (["--data", tmp_path / "none.json"], "none.json does not exist or is not a preprocessed task file"),
        (["--init", truncated], "model.safetensors is truncated or damaged"),
        (["--init", tmp_path], "is not a checkpoint: it holds no config.json"),
        (["--task", "smp"], "unknown task 'smp'"),
        (["--data", tmp_path], "is not a preprocessed task file"),
        (["--data", bad_task], "train[0] is not an object with the texts 'input' and 'output'"),
        (["--max_source_length", "2000"], "more than the model's max_position_embeddings 2048"),
        (["--wandb", "project"], "needs the package wandb, which is not installed: pip install wandb"),
        (["--out", "/"], "cannot write '/': expected the name of a new file or folder"),
        (["--out", "."], "cannot write '.': expected the name of a new file or folder"),
        (["--out", tmp_path / ("x" * 300)], "File name too long"),
        (["--out", "/proc/x"], "cannot write /proc/x.partial: No such file or directory"),
        (["--out", bad_task / "x"], "a part of that path is a file, not a folder"),
        (["--seed", 2 ** 64], "seed is 18446744073709551616, expected a whole number below 2**63"),
        (["--num_train_epochs", "1e308"], "num_train_epochs is 1e+308, expected a number above 0 and at most 10000"),
        (["--timeout_minutes", "1e308"], "timeout_minutes is 1e+308, expected"),
        (["--stop_at_eval_loss", "3"], "stop_at_eval_loss is for pretraining"),
        (["--stop_at_eval_loss", "0"], "stop_at_eval_loss is 0.0, expected a number above 0"),
        (["--held_out_text", tmp_path / "none"], "none does not exist: make token shards with data_prep.py text"),
        (["--held_out_text", bad_task], "bad.json"),
        (["--weight_decay", "inf"], "weight_decay is inf, expected a finite number"),
        (["--ewc_strength", "inf"], "ewc_strength is inf, expected a finite number"),
        (["--config", tmp_path], "cannot be read: Is a directory"),
    ]
    for flags, message in cases:
        assert message in refusal((TrainConfig, main), "--init", checkpoint, "--data", simp_file, "--out",
                                  tmp_path / "run", *TRAIN_FLAGS, *flags)
        assert {path.name for path in tmp_path.iterdir()} == {"truncated", "bad.json"}


def test_a_full_disk_leaves_the_earlier_checkpoint_intact(train, tmp_path):
    """The first epoch's checkpoint fits; before the second, the operating system limits the size of files."""
    patch = ("import resource, training.engine as engine\n"
             "save_checkpoint, calls = engine.save_checkpoint, []\n"
             "def save(*args):\n"
             "    calls.append(1)\n"
             "    if len(calls) == 2: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))\n"
             "    save_checkpoint(*args)\n"
             "engine.save_checkpoint = save")
    assert "cannot write" in error_line(train(tmp_path / "run", patch=patch, check=False))
    assert not (tmp_path / "run").exists()
    partial = tmp_path / "run.partial"
    assert [path.name for path in partial.glob("checkpoint-*")] == ["checkpoint-8"]
    AutoModelForCausalLM.from_pretrained(partial / "checkpoint-8")


def test_out_of_memory_is_told_with_what_to_do(train, finished, tmp_path):
    """The second step asks for more memory than there are addresses. With smaller micro-batches the run continues."""
    patch = ("import torch\n"
             "optimizer_step, calls = train.optimizer_step, []\n"
             "def step(*args):\n"
             "    calls.append(1)\n"
             "    if len(calls) == 2: torch.empty(1 << 50)\n"
             "    return optimizer_step(*args)\n"
             "train.optimizer_step = step")
    line = error_line(train(tmp_path / "run", "--save_minutes", "0", patch=patch, check=False))
    assert "out of memory: " in line
    assert "allocate" in line
    assert "Try a smaller --max_tokens_per_microbatch, --zero 2 or 3" in line
    train(tmp_path / "run", "--save_minutes", "0", "--max_tokens_per_microbatch", "64")
    assert losses(tmp_path / "run") == pytest.approx(losses(finished[0]), rel=1e-5)


def test_only_the_newest_checkpoints_are_kept(tmp_path):
    for step in (2, 10, 9):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for limit, kept in ((5, {2, 9, 10}), (3, {2, 9, 10}), (2, {9, 10}), (0, set())):
        prune_checkpoints(tmp_path, limit)
        assert {int(path.name.split("-")[1]) for path in tmp_path.iterdir()} == kept


def test_deepspeed_launcher(train, finished, tmp_path):
    """In new processes, in which DeepSpeed finds no compiler: the forks of the other tests know one already."""
    launcher = [sys.executable, "-m", "deepspeed.launcher.launch", "--world_info",
                "eyJsb2NhbGhvc3QiOiBbMCwgMV19", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    train(tmp_path / "run", "--max_tokens_per_microbatch", "200", "--gradient_checkpointing", launcher=launcher,
          **without_compiler(tmp_path))
    assert not (tmp_path / "compiled").exists()
    assert losses(tmp_path / "run") == pytest.approx(losses(finished[0]), rel=1e-5)


def test_gradient_checkpointing_wraps_each_block(train, tmp_path):
    patch = ("import model.transformer as t; real = t.checkpoint\n"
             "t.checkpoint = lambda *given, **options: print('recomputed') or real(*given, **options)")
    for name, flags, times in (("plain", [], 0), ("saving", ["--gradient_checkpointing"], 2)):
        result = train(tmp_path / name, "--max_steps", "1", *flags, patch=patch)
        assert result.stdout.count("recomputed\n") == times, name


def test_the_loss_on_the_prompt(train, finished, checkpoint, simp_file, tmp_path):
    """Training includes the prompt, of the samples of the seed. Evaluations are on the targets alone, as without
    --train_on_source."""
    train(tmp_path / "run", "--max_steps", "1", "--train_on_source", "--seed", "7")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    data = SFTDataset(read_task(simp_file)[0]["train"][:60], Tokenizer(checkpoint), 128, 64)
    batch = [torch.tensor(data[index][0])[None] for index in sample_indices(7, 60, 0, 8)]
    with torch.no_grad():
        nll = sum(model(ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in batch)
    logged = losses(tmp_path / "run")
    assert logged[1, "loss"] == pytest.approx(nll / sum(ids.shape[1] - 1 for ids in batch), rel=1e-5)
    assert logged[0, "eval_loss"] == losses(finished[0])[0, "eval_loss"]


def test_new_weights_follow_the_seed():
    config = ModelConfig(**SHAPE)
    for seed in (1, 2):
        found = dict(run_weights(SimpleNamespace(cfg=TrainConfig(seed=seed), model_config=config)))
        assert all(torch.equal(found[name], tensor) for name, tensor in initial_weights(config, seed))


def test_fractions_of_epochs():
    counts = [num_samples(TrainConfig(num_train_epochs=epochs), None, 10, {}, {}) for epochs in (0.01, 1.5, 2)]
    assert counts == [1, 15, 20]


def test_where_a_run_starts_in_the_stream():
    """Pretraining on the text of --init goes on behind it, unless skip_samples says where."""
    lineage = {"text": {"data_digest": "text", "seed": 42, "seq_length": 32, "max_train_samples": None, "samples": 80}}
    for given, expected in (({}, 80), ({"seq_length": 64}, 0), ({"skip_samples": 6}, 6), ({"skip_samples": 0}, 0),
                            ({"task": "simp"}, 0), ({"task": "simp", "skip_samples": 6}, 6)):
        assert first_sample(TrainConfig(**{"seq_length": 32} | given), "text", lineage) == expected, given


def test_the_last_epoch_has_no_checkpoint_of_its_own(train, tmp_path):
    train(tmp_path / "run", "--max_steps", "none", "--num_train_epochs", "2", "--max_train_samples", "16",
          "--save_total_limit", "9")
    assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
