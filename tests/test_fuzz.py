"""Damaged files: a command succeeds, or prints one line `error: …`, exits with status 2 and writes nothing.

Each file that the program reads is damaged at random in a copy of a folder of valid files, and a command reads it.
FUZZ_EXAMPLES is the number of examples over all files: `FUZZ_EXAMPLES=20000 pytest tests/test_fuzz.py` for a long run.
"""
import collections
import dataclasses
import json
import os
import re
import shutil

import pytest
import sentencepiece
import torch
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from safetensors.torch import load_file

from common.files import UserError, digest, parse_json
from common.writing import WRITING
from corpus.documents import is_held_out
from model.checkpoint import write_checkpoint, write_weights
from model.parameter_files import parameter_file_name, write_parameter_file
from model.tokenizer import TOKENIZER_FILES
from tests import damage
from tests.conftest import ROOT, random_model, sample_texts
from tests.fuzzing import MEMORY, Runner
from training.engine import REMEDY

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", 300))

SUITE = """[[benchmark]]
name = "next"
category = "Rs"
label = "next words"
num_fewshot = 1
file = "items.jsonl"
by = "kind"
doc_to_text = "text"
doc_to_choice = "choices"
doc_to_target = "label"

[[benchmark]]
name = "pairs"
category = "Bias"
metric = "pct_stereotype"
file = "pairs.jsonl"
pairs = true
"""
MAP = "".join(f'[[result]]\nmodel = "{model}"\nstage = "{stage}"\nfile = "{model}/{stage}/eval/results_1.json"\n'
              for model in ("llm", "stack") for stage in ("m0", "m1-simp"))
DEEPSPEED = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
             "zero_optimization": {"stage": 0, "contiguous_gradients": True, "reduce_bucket_size": 5e8},
             "bf16": {"enabled": "auto"}, "steps_per_print": 10000}
CONFIG = 'lr_scheduler_type = "cosine"\nlearning_rate = 1e-3\nseed = 1\ntrain_on_source = true\ndtype = "fp32"\n'

# Commands, which run in the folder. What they write is "out" or in it, unless they go on with something.
GROW = "grow --init checkpoint --out out/grown --factor 2"
TASK = "--task simp --folder_path raw --output_path out/simp.json --eval_dataset_size 2"
HUB = "--task empd --dataset hub --output_path out"
TEXT = "--source docs.jsonl --tokenizer checkpoint --output_path out/text"
EVALUATE = ("--checkpoint checkpoint --data tasks --tasks simp --suite suite/suite.toml --limit 2 --dtype fp32 "
            "--out out/eval")
MEASURE = "--checkpoint checkpoint --text text --text_length 16 --reference checkpoint --dtype fp32 --out out/eval"
STEP = "--max_steps 1 --global_batch_size 4 --dtype fp32 --out out/m1-simp"
TRAIN = ("--task simp --init checkpoint --data tasks/simp.json --max_source_length 128 --max_target_length 16 "
         f"{STEP}")
CONFIGURED = f"{TRAIN} --config config.toml --deepspeed deepspeed.json"
PRETRAIN = f"--init checkpoint --data text --seq_length 16 {STEP}"
RESUME = f"{TRAIN} --max_steps 3 --save_minutes 0"
REPORT = "--runs runs --out out/report"
RECIPE = "--size tiny --model llm --data text --out pretrained"
STUDY = "--size tiny --data text --out study --operators stack"
EXPERIMENT = ("--models llm --order simp --init_llm checkpoint --data tasks --suite suite/suite.toml --out experiment "
              "--dry_run")


@dataclasses.dataclass(frozen=True)
class Kind:
    """A file to damage, and the command that reads it."""
    entry: str  # see tests/fuzzing.py
    words: str
    inputs: str  # what the command reads, apart from the file and the folder that it lies in
    file: str
    weight: float  # proportional to the number of examples

    def __str__(self):
        return f"{self.entry}: {self.file}"

    def damages(self, content):
        """The strategy that damages the file."""
        ending = self.file.rpartition(".")[2]
        return getattr(damage, f"damaged_{ending}", damage.damaged_bytes)(content)

    def copy_inputs(self, source, folder):
        """Copies what the command reads."""
        for name in {*self.inputs.split(), self.file.partition("/")[0]}:
            (shutil.copytree if (source / name).is_dir() else shutil.copy)(source / name, folder / name)
        (folder / "out").mkdir()


def moved(words, folder):
    """A command with another folder in place of the checkpoint."""
    return words.replace(" checkpoint", f" {folder}", 1)


FISHER, POSTERIOR = (f"posterior/{name}-00001-of-00001.safetensors" for name in ("fisher", "posterior"))
MODEL = {"checkpoint/config.json": 1, "checkpoint/model.safetensors": 1, "checkpoint/tokenizer.json": 1}
TESTS = {"tasks/simp.json": 2, "suite/suite.toml": 2, "suite/items.jsonl": 2, "suite/pairs.jsonl": 1,
         "checkpoint/generation_config.json": 0.5, **MODEL}
SETTINGS = {"tasks/simp.json": 2, "config.toml": 2, "deepspeed.json": 2, "checkpoint/growth.json": 1, **MODEL}
SHARDS = {"text/meta.json": 1, "text/train-00000.npy": 2, "text/val-00000.npy": 1}


def in_full(files, share):
    """Weights for a command that also computes, which takes about a second."""
    return {file: share * weight for file, weight in files.items()}


# (entry, words, inputs, {file: weight}), see Kind
COMMANDS = [
    ("stack", GROW, "", {
        "checkpoint/config.json": 3, "checkpoint/model.safetensors": 2, "checkpoint/tokenizer.json": 1,
        "checkpoint/tokenizer_config.json": 1, "checkpoint/special_tokens_map.json": 0.5, "checkpoint/growth.json": 1,
        "checkpoint/generation_config.json": 1}),
    ("stack", moved(GROW, "sharded"), "", {"sharded/model.safetensors.index.json": 2}),
    ("stack", moved(GROW, "bin"), "", {"bin/pytorch_model.bin": 2}),
    ("stack", moved(GROW, "bins"), "", {"bins/pytorch_model.bin.index.json": 1}),
    ("stack", moved(GROW, "spm"), "", {
        "spm/tokenizer.model": 1, "spm/added_tokens.json": 1, "spm/tokenizer_config.json": 1}),
    ("stack", moved(GROW, "runs/llm/m1-simp"), "", {"runs/llm/m1-simp/run.json": 0.5}),
    ("stack", moved(GROW, "smollm3"), "", {"smollm3/config.json": 1}),
    ("check training", moved(TRAIN, "smollm3") + " --template chat", "tasks", {
        "smollm3/chat_template.jinja": 1, "smollm3/tokenizer_config.json": 0.5}),
    ("train", moved(TRAIN, "smollm3") + " --template chat", "tasks", {
        "smollm3/config.json": 0.2, "smollm3/chat_template.jinja": 0.1}),
    ("plan", "--init checkpoint", "", {"checkpoint/config.json": 0.5}),
    ("task", TASK, "", {"raw/wiki_auto/simplification_1.train.json": 2, "raw/wiki_auto/simplification_1.test.json": 1}),
    ("hub", HUB, "", {"hub/data/train.parquet": 0.1}),
    ("text", TEXT, "checkpoint", {"docs.jsonl": 1}),
    ("text", TEXT.replace("jsonl", "txt"), "checkpoint", {"docs.txt": 0.5}),
    ("text", TEXT, "docs.jsonl", {"checkpoint/tokenizer.json": 0.5}),
    ("text", moved(TEXT, "spm"), "docs.jsonl", {"spm/tokenizer.model": 0.5}),
    ("text", TEXT.replace("out/text", "text"), "docs.jsonl checkpoint", {"text/meta.json": 0.5}),
    ("check evaluation", EVALUATE, "checkpoint tasks suite", TESTS),
    ("evaluate", EVALUATE, "checkpoint tasks suite", in_full(TESTS, 0.1)),
    ("evaluate", EVALUATE.replace("out/eval", "evaluated"), "checkpoint tasks suite", {
        "evaluated/results_1.json": 0.2, "evaluated/metrics-simp.json": 0.2, "evaluated/predictions-simp.jsonl": 0.1,
        "evaluated/samples_next_1.jsonl": 0.1, "evaluated/losses-task-simp.json": 0.2}),
    ("check evaluation", MEASURE, "checkpoint text", SHARDS),
    ("evaluate", MEASURE, "checkpoint text", in_full(SHARDS, 0.1)),
    ("check evaluation", MEASURE.replace("--text text", "--text docs.jsonl"), "checkpoint", {"docs.jsonl": 0.5}),
    ("check evaluation", MEASURE.replace("--reference checkpoint", "--reference runs/llm/m1-simp"), "checkpoint text", {
        "runs/llm/m1-simp/config.json": 0.5, "runs/llm/m1-simp/model.safetensors": 0.5}),
    ("check evaluation", moved(EVALUATE, "posterior") + " --posterior_samples 1", "tasks suite", {POSTERIOR: 0.5}),
    ("check training", CONFIGURED, "checkpoint tasks config.toml deepspeed.json", SETTINGS),
    ("train", CONFIGURED, "checkpoint tasks config.toml deepspeed.json", in_full(SETTINGS, 0.1)),
    ("check training", PRETRAIN, "checkpoint text", SHARDS),
    ("train", PRETRAIN, "checkpoint text", in_full(SHARDS, 0.2)),
    ("check training", moved(TRAIN, "posterior") + " --ewc_strength 1", "tasks", {FISHER: 0.5}),
    ("check training", moved(TRAIN, "posterior") + " --optimizer ivon", "tasks", {POSTERIOR: 0.5}),
    ("train", moved(TRAIN, "posterior") + " --ewc_strength 1", "tasks", {FISHER: 0.1}),
    ("train", moved(TRAIN, "posterior") + " --optimizer ivon", "tasks", {POSTERIOR: 0.1}),
    ("check training", moved(TRAIN, "runs/llm/m1-simp") + " --rehearsal 0.5", "tasks", {
        "runs/llm/m1-simp/run.json": 0.5}),
    ("train", RESUME.replace("out/", "killed/"), "checkpoint tasks", {
        "killed/m1-simp.partial/run.json": 0.2, "killed/m1-simp.partial/metrics.jsonl": 0.1,
        "killed/m1-simp.partial/resume/step-2/state.json": 0.3,
        "killed/m1-simp.partial/resume/step-2/rank-0.safetensors": 0.2}),
    ("report", REPORT, "", {
        "runs/stack/m1-simp/run.json": 1, "runs/stack/m1-simp/metrics.jsonl": 1,
        "runs/stack/m1-simp/eval/results_1.json": 2, "runs/stack/m1-simp/eval/samples_next_1.jsonl": 1,
        "runs/stack/m1-simp/eval/metrics-simp.json": 1, "runs/stack/m1-simp/eval/predictions-simp.jsonl": 1,
        "runs/stack/m1-simp/eval/losses-task-simp.json": 1,
        "runs/experiment/stack-m1-simp.json": 0.5}),
    ("report", "--results runs/map.toml --out out/report", "", {"runs/map.toml": 1}),
    ("report with figures", REPORT, "", {"runs/stack/m1-simp/eval/results_1.json": 0.1,
                                         "runs/stack/m1-simp/metrics.jsonl": 0.1}),
    ("pretrain", RECIPE, "text", {"pretrained/recipe.json": 0.5}),
    ("study", STUDY, "text", {"study/study.json": 0.5, "study/seed-42/stack/metrics.jsonl": 0.5}),
    ("experiment", EXPERIMENT, "checkpoint tasks suite experiment", {
        "experiment/experiment/llm-m1-simp.json": 0.5, "tasks/simp.json": 0.5, "suite/suite.toml": 0.5,
        "checkpoint/config.json": 0.5}),
]
KINDS = [Kind(entry, words, inputs, file, weight) for entry, words, inputs, files in COMMANDS
         for file, weight in files.items()]
Fragment = collections.namedtuple("Fragment", "name start count")
OUTCOMES = "examples", "successes", "refusals", "faults"
UNDAMAGED = set()  # commands that were run on valid files
COUNTS = {}  # kind -> Counter of OUTCOMES


class Folder:
    """A folder of valid files, made with the commands that the program has for it."""

    def __init__(self, path, runner):
        self.path, self.runner = path, runner

    def write(self, name, content):
        """Writes text, or a value as JSON, or a list of values as JSONL."""
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            content = "".join(json.dumps(line) + "\n" for line in content)
        path.write_text(content if isinstance(content, str) else json.dumps(content, indent=1))

    def run(self, entry, words):
        """Runs a command that has to succeed."""
        outcome = self.runner.run(entry, words, self.path)
        assert outcome.status == 0, (entry, words, outcome)

    def make_checkpoints(self, checkpoint):
        """Checkpoints in all formats."""
        tensors = {name: parameter.detach() for name, parameter in random_model().named_parameters()}
        shutil.copytree(checkpoint, self.path / "checkpoint")
        self.write("checkpoint/generation_config.json", {"bos_token_id": 1, "eos_token_id": [2], "do_sample": False})
        self.write("checkpoint/special_tokens_map.json", {"eos_token": {"content": "</s>", "lstrip": False},
                                                          "bos_token": "<s>"})
        self.write("checkpoint/growth.json", {"operator": "stack", "layer_map": [0, 1], "lineage": {"flops": 1e9}})
        family = random_model(
            model_type="smollm3", sliding_window=9, layer_types=["sliding_attention", "full_attention"],
            rope_scaling={"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 1024})
        (self.path / "smollm3").mkdir()
        write_checkpoint(self.path / "smollm3", family.config, family.named_parameters(), checkpoint)
        self.write("smollm3/chat_template.jinja",
                   "{% for message in messages %}{{ message.role + ': ' + message.content + eos_token }}{% endfor %}"
                   "{% if add_generation_prompt %}assistant: {% endif %}")
        for name in ("sharded", "bin", "bins", "spm", "posterior"):
            shutil.copytree(self.path / "checkpoint", self.path / name)
        for name in ("sharded", "bin", "bins"):
            (self.path / name / "model.safetensors").unlink()
        specs = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_weights(self.path / "sharded", specs, tensors.items(), 60_000)
        torch.save(tensors, self.path / "bin/pytorch_model.bin")
        weight_map = {name: f"pytorch_model-{index % 2}.bin" for index, name in enumerate(tensors)}
        for file in set(weight_map.values()):
            torch.save({name: tensors[name] for name in tensors if weight_map[name] == file}, self.path / "bins" / file)
        self.write("bins/pytorch_model.bin.index.json", {"metadata": {"total_size": 1}, "weight_map": weight_map})
        for name in ("tokenizer.json", "special_tokens_map.json", "generation_config.json"):
            (self.path / "spm" / name).unlink()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample_texts()), model_prefix=str(self.path / "spm/tokenizer"), vocab_size=400,
            model_type="bpe", byte_fallback=True, character_coverage=0.999, minloglevel=2)
        (self.path / "spm/tokenizer.vocab").unlink()
        self.write("spm/added_tokens.json", {"[PAD]": 400})
        self.write("spm/tokenizer_config.json", {"pad_token": "[PAD]", "eos_token": {"content": "</s>"}})
        fragments = [Fragment(name, 0, tensor.numel()) for name, tensor in tensors.items()]
        values = {"mean": lambda part: tensors[part.name].flatten(),
                  "precision": lambda part: torch.full((part.count,), 1e6)}
        for name, kinds in (("fisher", {"fisher": values["precision"]}), ("posterior", values)):
            write_parameter_file(self.path / "posterior" / parameter_file_name(name, 0, 1), fragments, kinds)

    def make_data(self):
        """Raw and preprocessed tasks, documents, token shards, a suite, settings."""
        for split, count in (("train", 6), ("test", 3)):
            raw = json.loads((ROOT / f"data/sample/wiki_auto/simplification_1.{split}.json").read_text())
            self.write(f"raw/wiki_auto/simplification_1.{split}.json", {name: raw[name][:count] for name in raw})
        self.run("task", TASK.replace("out/", "tasks/"))
        (self.path / "hub/data").mkdir(parents=True)
        turns = [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, sample_texts("empd"))]
        rows = [{"emotion": "proud", "situation": "I passed.", "conversations": turns}] * 3
        for split in ("train", "test"):
            Dataset.from_list(rows).to_parquet(self.path / f"hub/data/{split}.parquet")
        texts = sample_texts()[:40]
        texts.append(next(text for number in range(1000) if is_held_out(text := f"{texts[0]} {number}")))
        self.write("docs.jsonl", [{"text": text} for text in texts])
        lines = [f"{number:04} {texts[0]:.40}\n" for number in range(1000)]
        documents = ["".join([line.strip() + " "] * 300) + "\n" for line in lines]  # a document each
        self.write("docs.txt", "".join([*documents[:9], next(filter(is_held_out, documents))]))
        self.run("text", TEXT.replace("out/", ""))
        self.write("suite/suite.toml", SUITE)
        self.write("suite/items.jsonl", [
            {"text": text[:40], "choices": [text[40:60], text[:20]], "label": 0, "kind": kind}
            for text, kind in zip(texts, "aabba")])
        self.write("suite/pairs.jsonl", [{"sent_more": text[:30], "sent_less": text[30:60]} for text in texts[:3]])
        self.write("deepspeed.json", DEEPSPEED)
        self.write("config.toml", CONFIG)

    def make_runs(self):
        """Runs, evaluated; one that was killed; and what pretraining, studies and experiments record."""
        self.run("train and die", RESUME.replace("out/", "killed/"))
        for model in ("llm", "stack"):
            self.run("train", TRAIN.replace("out/", f"runs/{model}/"))
        self.run("evaluate", EVALUATE.replace("out/eval", "evaluated"))
        for file in (self.path / "evaluated").iterdir():
            file.rename(re.sub(r"_\d{4}-.*(\.jsonl?)", r"_1\1", str(file)))
        for name in ("llm/m0", "llm/m1-simp", "stack/m0", "stack/m1-simp"):
            shutil.copytree(self.path / "evaluated", self.path / "runs" / name / "eval")
        self.write("runs/map.toml", MAP)
        self.write("runs/experiment/stack-m1-simp.json", {"command": ["train.py", "--init", "x"], "inputs": {"a": "b"}})
        self.write("experiment/experiment/llm-m1-simp.json", {"command": ["train.py"], "inputs": {"a": "b"}})
        shutil.copytree(self.path / "runs/llm/m1-simp", self.path / "experiment/llm/m1-simp")
        self.run("pretrain", RECIPE)
        (self.path / "pretrained/m0").mkdir()
        for name in ("base", "base-trained-on", "stack", "scratch"):
            self.write(f"study/seed-42/{name}/metrics.jsonl", [
                {"step": step, "eval_loss": 5 - step / 9, "flops": 1e15 * step} for step in range(3)])
        self.run("study", STUDY)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The process that runs the commands."""
    runner = Runner(tmp_path_factory.mktemp("runner"))
    yield runner
    runner.close()


@pytest.fixture(scope="module")
def valid(runner, checkpoint, tmp_path_factory):
    """A folder of valid files."""
    folder = Folder(tmp_path_factory.mktemp("valid"), runner)
    folder.make_checkpoints(checkpoint)
    folder.make_data()
    folder.make_runs()
    return folder.path


@pytest.fixture(scope="module", autouse=True)
def table(request):
    """Prints the counts at the end, unless this process is a worker of pytest-xdist."""
    yield
    if not hasattr(request.config, "workerinput"):
        with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
            for name, count in [*COUNTS.items(), ("total", sum(COUNTS.values(), collections.Counter()))]:
                print(f"\n{name:<76}", *(f"{count[key]:6} {key}" for key in OUTCOMES), end="")


def put(path, content):
    """Replaces a file by damaged content, see tests/damage.py, and the file's digest where one is recorded."""
    old = digest([path])
    path.unlink()
    if content == "folder":
        path.mkdir()
    elif content == "dangling symlink":
        path.symlink_to("nothing")
    elif content == "symlink to itself":
        path.symlink_to(path.name)
    elif content is not None:
        path.write_bytes(content)
        for record in (path.with_name("meta.json"), path.with_name("state.json")):
            if record.exists() and record != path:
                record.write_text(record.read_text().replace(old, digest([path])))


def snapshot(folder):
    """{path: size and time} of all that lies in a folder."""
    return {str(path.relative_to(folder)): path.is_dir() or (path.lstat().st_size, path.lstat().st_mtime_ns)
            for path in folder.rglob("*")}


def is_sound(path):
    """Whether a file that the program has made holds finite numbers only, if it is JSON or safetensors."""
    if path.name in TOKENIZER_FILES:  # copied
        return True
    try:
        if path.suffix in (".json", ".jsonl"):
            for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
                parse_json(text, path)
        return path.suffix != ".safetensors" or all(value.isfinite().all() for value in load_file(path).values())
    except UserError:
        return False


def find_faults(outcome, folder, before):
    """Problems of the end of a command, as sentences."""
    after = snapshot(folder)
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    found = [f"exit status {outcome.status}"] * (outcome.status not in (0, 2))
    found += ["a traceback"] * ("Traceback" in outcome.stdout + outcome.stderr)
    found += [f"{len(outcome.errors)} error lines"] * (len(outcome.errors) != (outcome.status == 2))
    found += ["too much memory"] * (outcome.memory > MEMORY or "memory of this machine" in outcome.stderr)
    if any(REMEDY in line for line in outcome.errors):  # a run that has diverged keeps its log
        changed = [path for path in changed if ".partial" not in path or not is_sound(folder / path)]
    if outcome.status == 0:
        changed = [path for path in changed if WRITING in path or path in after and not is_sound(folder / path)]
    return found + [f"wrote {', '.join(changed)}"] * bool(changed)


def place_of(outcome):
    """The line of this project where a traceback ends, None without one; tells faults apart."""
    lines = re.findall(rf'File "{ROOT}/((?!tests|\.venv)[^"]+)", line (\d+)', outcome.stderr)
    return ":".join(lines[0 if "most recent call first" in outcome.stderr else -1]) if lines else None


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_damaged_files(kind, runner, valid, tmp_path):
    counts = COUNTS[str(kind)] = collections.Counter()
    faults = {}  # by place: (description, faults, stderr), the shortest one

    def run(description, content=None, damaged=True):
        folder = tmp_path / "copy"
        folder.mkdir()
        kind.copy_inputs(valid, folder)
        if damaged:
            put(folder / kind.file, content)
        before = snapshot(folder)
        outcome = runner.run(kind.entry, kind.words, folder)
        found = find_faults(outcome, folder, before)
        shutil.rmtree(folder)
        counts.update(["examples", "faults" if found else "refusals" if outcome.status else "successes"])
        if found:
            place = f"{place_of(outcome) or found[0]:.80}"
            text = f"{description}: {'; '.join(found)}\n{outcome.stderr[-2000:]}"
            faults[place] = min(faults.get(place, text), text, key=len)
            counts[place] += 1
        return outcome

    if (kind.entry, kind.words) not in UNDAMAGED:
        UNDAMAGED.add((kind.entry, kind.words))
        assert run("undamaged", damaged=False).status == 0, faults
    number = round(EXAMPLES * kind.weight / sum(kind.weight for kind in KINDS))

    @settings(max_examples=max(1, number), derandomize=True, database=None, deadline=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))
    @given(kind.damages((valid / kind.file).read_bytes()))
    def run_examples(damaged):
        run(*damaged)

    run_examples()
    if path := os.environ.get("FUZZ_REPORT"):
        with open(path, "a") as file:
            for place, text in faults.items():
                file.write(json.dumps([str(kind), place, counts[place], text]) + "\n")
    assert not faults, "\n\n".join(faults.values())
