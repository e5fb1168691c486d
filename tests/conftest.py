"""Small checkpoints, and helpers that run the scripts as a user does. All tests are offline and deterministic."""
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "TRANSFORMERS_VERBOSITY": "error", "CUDA_VISIBLE_DEVICES": ""}  # the same tests with and without GPUs

import pytest
import torch
from torch.utils import collect_env

from common import scripts
from common.distributed import Distributed, free_port
from model.checkpoint import write_checkpoint
from model.config import ModelConfig
from model.tokenizer import train_tokenizer
from model.transformer import Transformer
from pipeline import jobs
from tests.fuzzing import LARGE_PAGES

ROOT = Path(__file__).parent.parent
WITHOUT_TRANSFORMERS = {"PYTHONPATH": str(ROOT / "tests/without_transformers")}
SHAPE = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
         "bos_token_id": 1, "eos_token_id": 2}
LONGEST = ("test_fuzz.py", "test_growth_study.py", "test_methods.py", "test_paper_suite.py", "test_resume.py",
           "test_selection.py", "test_train.py")
TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]
TRAIN_FLAGS = ["--task", "simp", "--global_batch_size", "8", "--learning_rate", "5e-3", "--max_eval_samples", "6",
               "--max_source_length", "128", "--max_target_length", "64", "--dtype", "fp32"]

collect_env.get_pretty_env_info = lambda: ""  # lm-eval would let pip list the packages after each evaluation


def pytest_collection_modifyitems(items):
    """The files that take longest start first: a process that starts one of them at the end would run on alone."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def random_model(seed=0, **shape):
    """A model with random weights, large enough that errors show in the logits."""
    model = Transformer(ModelConfig(**SHAPE | shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.eval()


def sample_texts(task="simp"):
    """The source texts of a task in data/sample."""
    folder = {"simp": "wiki_auto", "empd": "empathetic_dialogues", "inqqg": "eli5"}[task]
    return [text for path in sorted((ROOT / "data/sample" / folder).glob("*.json"))
            for text in json.loads(path.read_text())["src"]]


@pytest.fixture(scope="session", autouse=True)
def hub_cache(tmp_path_factory):
    """A cache of datasets of the tests' own, which is read from the environment when libraries are imported."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("cache"))


@functools.cache
def preloaded():
    """The process that runs scripts in forks, see tests/preloaded.py."""
    environment = os.environ | WITHOUT_TRANSFORMERS | LARGE_PAGES | {"OMP_NUM_THREADS": "1"}  # as `make test` has it
    return subprocess.Popen([sys.executable, "tests/preloaded.py"], cwd=ROOT, env=environment, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def run_script(*words, check=True, launcher=1, **environment):
    """Runs `python <words>` in the repository without transformers; returns the finished process.

    launcher: number of ranks, in forks of a process that has imported the libraries; or the words before <words>, such
    as TORCHRUN or [sys.executable], for new processes.
    """
    words = list(map(str, words))
    # These are read when Python starts and when libraries are imported, which in a fork is over.
    if isinstance(launcher, int) and any(name.startswith(("PYTHONPATH", "HF_")) for name in environment):
        launcher = [sys.executable]
    environment = os.environ | WITHOUT_TRANSFORMERS | environment
    if isinstance(launcher, int):
        result = run_ranks(words, launcher, environment)
    else:
        result = subprocess.run([*launcher, *words], cwd=ROOT, env=environment, capture_output=True, text=True,
                                timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def run_ranks(words, ranks, environment):
    """Runs a command line on some ranks; returns their output together, and the status of the first that failed."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(free_port())}
        requests = [{"words": words, "stdout": f"{folder}/{rank}.out", "stderr": f"{folder}/{rank}.err",
                     "environment": environment | (own | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                                                   if ranks > 1 else {})} for rank in range(ranks)]
        server = preloaded()
        server.stdin.write(json.dumps(requests) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        stdout, stderr = ("".join(Path(request[name]).read_text() for request in requests)
                          for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess(words, next(filter(None, statuses), 0), stdout, stderr)


@pytest.fixture
def forked_jobs(monkeypatch):
    """Lets the jobs of pretrain.py, of the growth study and of experiment.py that have no launcher run in forks, see
    tests/preloaded.py."""
    def run_command(command):
        if command[0] != sys.executable:
            return run_in_process(command)
        result = run_script(*command[1:], check=False)
        print(result.stdout, end="")
        print(result.stderr, end="", file=sys.stderr)
        if result.returncode:
            sys.exit(result.returncode)

    run_in_process = jobs.run_command
    for module in ("pipeline.jobs", "experiment"):
        monkeypatch.setattr(f"{module}.run_command", run_command)


def accept_interrupts():
    """Lets SIGINT end a new process. Shells start background processes, such as `make test &`, with SIGINT ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def error_line(result):
    """The only line `error: …` that a command prints; checks the exit status and that there is no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return lines[0]


def read_metrics(out):
    """(training entries, evaluation entries) of a run's metrics.jsonl."""
    entries = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
    return tuple([entry for entry in entries if kind in entry] for kind in ("loss", "eval_loss"))


def losses(out):
    """The losses of a run, {(step, "loss" or "eval_loss"): loss}; checks that none is logged twice."""
    logged = [((entry["step"], kind), entry[kind])
              for kind, entries in zip(("loss", "eval_loss"), read_metrics(out)) for entry in entries]
    assert len(dict(logged)) == len(logged)
    return dict(logged)


@pytest.fixture(scope="module")
def train(request, checkpoint, simp_file):
    """A function that runs train.py with TRAIN_FLAGS, the FLAGS of the test's module and further flags.

    It returns the process. interrupted: (step, signal, rank) as in tests/interrupted.py; the exit status is not
    checked then. patch: Python code that runs before train.main.
    """
    def call(out, *flags, init=checkpoint, data=simp_file, interrupted=(), patch="", launcher=1, check=True,
             **environment):
        script = ["tests/interrupted.py", *interrupted, "train.py"] if interrupted else ["train.py"]
        if patch:
            script = ["-c", f"import sys; sys.path[0] = {str(ROOT)!r}; import train\n{patch}\n"
                            "train.scripts.run((train.TrainConfig, train.main), '')"]
            launcher = launcher if isinstance(launcher, int) else [*launcher, "--no_python", sys.executable]
        return run_script(*script, "--init", init, "--data", data, "--out", out, *TRAIN_FLAGS, *request.module.FLAGS,
                          *flags, launcher=launcher, check=check and not interrupted, **environment)
    return call


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that runs a script in this process and returns the line `error: …` with which it exits."""
    def call(commands, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as exit:
            scripts.dispatch(commands, "")
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert exit.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]
    return call


@pytest.fixture(scope="module")
def dist():
    """A process group of one process."""
    with mock.patch.dict(os.environ), Distributed() as group:  # restores the environment
        yield group


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A directory with a byte-level BPE tokenizer of 512 tokens, which names a bos token, as those of Llama do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sample_texts(), SHAPE["vocab_size"], folder)
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"bos_token": "<s>"}))
    return folder


@pytest.fixture(scope="session")
def checkpoint(tokenizer_dir, tmp_path_factory):
    """A checkpoint directory: two layers with random weights and grouped-query attention, and the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = random_model()
    write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def simp_file(tmp_path_factory):
    """The Simp task of data/sample, preprocessed by data_prep.py."""
    path = tmp_path_factory.mktemp("prepared") / "simp.json"
    run_script("data_prep.py", "task", "--task", "simp", "--folder_path", "data/sample", "--output_path", path)
    return path


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory):
    """A suite with one multiple-choice benchmark of ten items."""
    folder = tmp_path_factory.mktemp("suite")
    texts = sample_texts()
    (folder / "items.jsonl").write_text("\n".join(json.dumps(
        {"text": text[:40], "choices": [text[40:60], texts[n + 1][:20]], "label": 0}) for n, text in
        enumerate(texts[:10])))
    (folder / "suite.toml").write_text('[[benchmark]]\nname = "next"\ncategory = "Rs"\nfile = "items.jsonl"\n'
                                       'doc_to_text = "text"\ndoc_to_choice = "choices"\ndoc_to_target = "label"\n')
    return folder / "suite.toml"


@pytest.fixture(scope="session")
def tasks(simp_file, tmp_path_factory):
    """A folder with two task files."""
    folder = tmp_path_factory.mktemp("tasks")
    for task in ("simp", "empd"):
        shutil.copy(simp_file, folder / f"{task}.json")
    return folder
