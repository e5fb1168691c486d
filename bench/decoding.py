"""Decoding beside transformers' generate: the same tokens, and new tokens a second.

    python bench/decoding.py --checkpoint DIR --data data/prepared/raw/simp.json          greedy and two beam searches

Both decode the same prompts, the first test items of a task, in turns. transformers gets them in batches of
`batch_size` and all at once, padded on the left; ours in batches of the same size, and as many as its token budget
allows. Where outputs differ, the difference is explained: by how far apart the logits of the two tokens are where
greedy decoding parts, and the scores of the two texts for beam search, both by a pass of transformers over the texts.
"""
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from common.settings import run, setting
from corpus.tasks import encode_prompts, read_task
from model.generation import GenerationConfig, generate
from model.hub import load_model
from model.tokenizer import Tokenizer

MODES = {"greedy": GenerationConfig(),
         "5 beams, no repeated 3-grams": GenerationConfig(num_beams=5, no_repeat_ngram_size=3),
         "4 beams, length penalty 0.9, no repeated 2-grams":
             GenerationConfig(num_beams=4, length_penalty=0.9, no_repeat_ngram_size=2)}


@dataclass(frozen=True)
class DecodingBenchSettings:
    """Settings of the benchmark."""
    checkpoint: str | None = setting(None, "checkpoint directory")
    data: str | None = setting(None, "preprocessed task file")
    samples: int = setting(64, "prompts")
    batch_size: int = setting(16, "prompts at once in transformers")
    max_new_tokens: int = setting(80, "new tokens of a prompt, at most")
    repeats: int = setting(1, "times that each is measured")
    dtype: str = setting("float32", "dtype of the weights, a name of torch's")

    def problems(self):
        return [f"--{name} is missing" for name in ("checkpoint", "data") if not getattr(self, name)]


def theirs(model, prompts, decoding, eos, batch_size):
    """transformers' generate over batches in the given order, padded on the left; new ids without the eos."""
    outputs = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start:start + batch_size]
        width = max(map(len, batch))
        ids = torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        new = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                             max_new_tokens=decoding.max_new_tokens, num_beams=decoding.num_beams,
                             length_penalty=decoding.length_penalty,
                             no_repeat_ngram_size=decoding.no_repeat_ngram_size, pad_token_id=eos, eos_token_id=eos)
        outputs += [row[:row.index(eos)] if eos in row else row for row in new[:, width:].tolist()]
    return outputs


@torch.no_grad()
def explain(model, prompt, ours, other, decoding, eos):
    """How far apart two outputs are: in logits where greedy decoding parts, in their scores for beam search."""
    def log_p(ids):
        logits = model(torch.tensor([prompt + ids], device=model.device)).logits
        return logits[0, len(prompt) - 1:].float().log_softmax(-1)

    if decoding.num_beams == 1:
        at = next(i for i, (a, b) in enumerate(zip(ours + [eos], other + [eos])) if a != b)
        row = log_p(ours[:at])[at]
        return abs(float(row[(ours + [eos])[at]] - row[(other + [eos])[at]]))
    scores = []
    for ids in (ours, other):
        ids = ids + [eos] if len(ids) < decoding.max_new_tokens else ids
        total = log_p(ids)[range(len(ids)), ids].sum()
        scores.append(float(total) / len(ids) ** decoding.length_penalty)
    return scores[0] - scores[1]


def main(cfg):
    """Prints for each mode the rates, their ratios, and every difference."""
    dtype, tokenizer = getattr(torch, cfg.dtype), Tokenizer(cfg.checkpoint)
    prompts = encode_prompts(tokenizer, [item["input"] for item in read_task(cfg.data)[0]["test"][:cfg.samples]], 1024)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(cfg.checkpoint, dtype, device)
    other = AutoModelForCausalLM.from_pretrained(cfg.checkpoint, dtype=dtype).to(device)
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {cfg.dtype} on "
          f"{device}, {torch.get_num_threads()} threads")
    for name, mode in MODES.items():
        decoding = replace(mode, max_new_tokens=cfg.max_new_tokens)
        slots = max(map(len, prompts)) + decoding.num_beams * cfg.max_new_tokens
        first, same = f"transformers, batches of {cfg.batch_size}", f"ours, batches of {cfg.batch_size}"
        all_at_once = "ours, under its token budget"
        ways = {first: lambda p, d=decoding: theirs(other, p, d, tokenizer.eos_id, cfg.batch_size),
                "transformers, all at once": lambda p, d=decoding: theirs(other, p, d, tokenizer.eos_id, len(p)),
                same: lambda p, d=decoding, b=slots * cfg.batch_size: generate(model, p, d, tokenizer.eos_ids, budget=b),
                all_at_once: lambda p, d=decoding: generate(model, p, d, tokenizer.eos_ids)}
        seconds, outputs = dict.fromkeys(ways, 0.0), {}
        for call in ways.values():
            call(prompts[:1])
        for _ in range(cfg.repeats):
            for way, call in ways.items():
                began = time.perf_counter()
                outputs[way] = call(prompts)
                seconds[way] += (time.perf_counter() - began) / cfg.repeats
        counts = {way: sum(map(len, outputs[way])) for way in ways}
        print(name)
        for way in ways:
            ratio = counts[way] / seconds[way] / (counts[first] / seconds[first])
            print(f"  {way}: {counts[way]} new tokens in {seconds[way]:.1f} s, {counts[way] / seconds[way]:.1f} a "
                  f"second, ratio {ratio:.2f}", flush=True)
        differ = [i for i in range(len(prompts)) if outputs[first][i] != outputs[same][i]]
        print(f"  equal to transformers: {len(prompts) - len(differ)} of {len(prompts)}; under the token budget equal "
              f"to ours in batches: {sum(a == b for a, b in zip(outputs[same], outputs[all_at_once]))}")
        for i in differ:
            gap = explain(other, prompts[i], outputs[same][i], outputs[first][i], decoding, tokenizer.eos_id)
            print(f"  prompt {i} differs: {'score, ours less theirs' if decoding.num_beams > 1 else 'logits apart'} "
                  f"{gap:.2e}", flush=True)


if __name__ == "__main__":
    run((DecodingBenchSettings, main), __doc__)
