"""Small checkpoints and a way to run the scripts as a user does. Everything is offline and deterministic."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
               "TRANSFORMERS_VERBOSITY": "error"}

import pytest
import torch

from common import settings
from common.distributed import Distributed
from model.checkpoint import write_checkpoint
from model.config import ModelConfig
from model.tokenizer import train_tokenizer
from model.transformer import Transformer

ROOT = Path(__file__).parent.parent
SHAPE = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048,
         "bos_token_id": 1, "eos_token_id": 2}


def random_model(seed=0, **shape):
    """A model with random weights, of a size that shows in the logits."""
    model = Transformer(ModelConfig(**SHAPE | shape))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.2, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    return model.eval()


def sample_texts(task="simp"):
    """The source texts of a task of data/sample."""
    folder = {"simp": "wiki_auto", "empd": "empathetic_dialogues", "inqqg": "eli5"}[task]
    return [text for path in sorted((ROOT / "data/sample" / folder).glob("*.json"))
            for text in json.loads(path.read_text())["src"]]


def run_script(*words, check=True, launcher=(), **environment):
    """Runs `python <words>` in the project, without transformers."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests/without_transformers"), **environment}
    command = [*launcher, *map(str, words)] if launcher else [sys.executable, *map(str, words)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


def error_line(result):
    """The one line that a refused command prints; checks the status and that there is no traceback."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2, (result.returncode, result.stdout, result.stderr)
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture
def refusal(monkeypatch, capsys):
    """A function that runs a script in this process and returns the one line with which it refuses."""
    def call(commands, *words):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, words)])
        with pytest.raises(SystemExit) as exit:
            settings.dispatch(commands, "")
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert exit.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]
    return call


@pytest.fixture(scope="module")
def dist():
    """This process as the only one of a run; the environment is put back."""
    before = dict(os.environ)
    with Distributed() as alone:
        yield alone
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    """A directory with a byte-level BPE tokenizer of 512 tokens."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(sample_texts(), SHAPE["vocab_size"], folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(tokenizer_dir, tmp_path_factory):
    """A checkpoint directory: random weights, two layers, grouped-query attention, and the tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = random_model()
    write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
    return folder


@pytest.fixture(scope="session")
def simp_file(tmp_path_factory):
    """The sample's Simp task, preprocessed by the script."""
    path = tmp_path_factory.mktemp("prepared") / "simp.json"
    run_script("data_prep.py", "task", "--task", "simp", "--folder_path", "data/sample", "--output_path", path)
    return path


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory):
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
