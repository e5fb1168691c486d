"""Fine-tuning of every family, on two processes, compared with a plain loop over transformers."""
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from analysis.results import losses_of
from corpus.tasks import SFTDataset, read_task
from evaluation.conditions import task_conditions, unlike
from model.checkpoint import write_checkpoint
from model.families import FULL, SLIDING
from model.hub import load_model
from model.tokenizer import Tokenizer
from tests.conftest import TRAIN_FLAGS, error_line, random_model, read_metrics, run_script
from tests.hub import HubStandIn
from training.batches import sample_indices

CHATML = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SHAPES = {
    "mistral": {"model_type": "mistral", "sliding_window": 20},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True, "sliding_window": 20, "layer_types": [FULL, SLIDING]},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0]},
    "olmo2": {"model_type": "olmo2"},
}


def make_checkpoint(folder, tokenizer_dir, **shape):
    """A random checkpoint of a family, with a tokenizer without bos and with a chat template."""
    folder.mkdir()
    model = random_model(**shape, bos_token_id=None)
    write_checkpoint(folder, model.config, model.named_parameters(), tokenizer_dir)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": None, "chat_template": CHATML}))
    return folder


def plain_losses(folder, samples, steps):
    """Losses of a plain loop over transformers' model with AdamW, sample by sample; norms and biases do not decay."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    kept = {parameter for name, parameter in model.named_parameters() if name.endswith(("norm.weight", "bias"))}
    groups = [{"params": [parameter for parameter in model.parameters() if parameter not in kept], "weight_decay": 1.0},
              {"params": list(kept), "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=5e-3), []
    for step in range(steps):
        batch = [samples[index] for index in sample_indices(42, len(samples), 8 * step, 8 * step + 8)]
        num_targets, losses = sum(len(ids) - first for ids, first in batch), [*losses, 0.0]
        for ids, first in batch:
            labels = np.where(np.arange(len(ids)) < first, -100, ids)
            loss = model(torch.tensor(ids)[None], labels=torch.tensor(labels)[None]).loss
            loss = loss * (len(ids) - first) / num_targets
            loss.backward()
            losses[-1] += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return losses


@pytest.mark.parametrize("template", ["alpaca", "chat"])
@pytest.mark.parametrize("family", SHAPES)
def test_losses_equal_a_plain_loop(family, template, tokenizer_dir, simp_file, tmp_path):
    start = make_checkpoint(tmp_path / "start", tokenizer_dir, **SHAPES[family])
    run_script("train.py", *TRAIN_FLAGS, "--init", start, "--data", simp_file, "--out", tmp_path / "m1", "--max_steps",
               "3", "--template", template, "--zero", "3" if template == "chat" else "1", "--max_train_samples", "40",
               "--weight_decay", "1", launcher=2)
    samples = SFTDataset(read_task(simp_file)[0]["train"][:40], Tokenizer(start), 128, 64, template=template)
    text = Tokenizer(start).fast.decode(samples[0][0], skip_special_tokens=False)
    assert text.startswith("<|im_start|>user\n" if template == "chat" else "Below is an instruction")  # without bos
    logged = [entry["loss"] for entry in read_metrics(tmp_path / "m1")[0]]
    assert logged == pytest.approx(plain_losses(start, samples, 3), rel=2e-5)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "m1", dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        torch.testing.assert_close(load_model(tmp_path / "m1")(ids), trained(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_chain_keeps_its_template_and_evaluation_knows_it(tokenizer_dir, simp_file, tmp_path):
    """The checkpoint comes from the Hub, as with `make train INIT=Qwen/Qwen3-0.6B ARGS="--template chat"`."""
    start = make_checkpoint(tmp_path / "start", tokenizer_dir, **SHAPES["qwen3"])
    data = tmp_path / "data"
    data.mkdir()
    (data / "simp.json").write_bytes(simp_file.read_bytes())
    flags = ["--data", data / "simp.json", "--max_steps", "1"]
    with HubStandIn() as hub:
        hub.add("models", "Qwen/Qwen3-0.6B", {path.name: path.read_bytes() for path in start.iterdir()})
        run_script("train.py", *TRAIN_FLAGS, "--init", "Qwen/Qwen3-0.6B", *flags, "--out", tmp_path / "m1",
                   "--template", "chat", **hub.environment(tmp_path / "cache"))
    refused = run_script("train.py", *TRAIN_FLAGS, "--init", tmp_path / "m1", *flags, "--out", tmp_path / "m2",
                         check=False)
    assert error_line(refused) == (f"error: template is alpaca, but the last task of {tmp_path / 'm1'} was trained "
                                   "with chat: give --template chat")
    run_script("evaluate.py", "--checkpoint", tmp_path / "m1", "--tasks", "simp", "--data", data, "--limit", "4",
               "--dtype", "fp32")
    run_script("evaluate.py", "--checkpoint", start, "--tasks", "simp", "--data", data, "--limit", "4", "--dtype",
               "fp32", "--out", tmp_path / "plain")
    for place, template in (("m1/eval", "chat"), ("plain", "alpaca")):
        metrics = json.loads((tmp_path / place / "metrics-simp.json").read_text())
        assert task_conditions(metrics, "sari")["template"] == template
    own, other = (losses_of(json.loads((tmp_path / place / "losses-task-simp.json").read_text()))
                  for place in ("m1/eval", "plain"))
    assert unlike(own.conditions, other.conditions) == ["template"]
