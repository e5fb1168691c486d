"""Decoding compared with transformers' generate: the same tokens, and new tokens per second.

    python bench/decoding.py --checkpoint DIR --data data/prepared/raw/simp.json          greedy and two beam searches

Both decode the same prompts, the first test items of a task, in turn. transformers decodes batches of
`batch_size` prompts, and all prompts at once, padded on the left. This project decodes batches of the same size, and
batches as large as its token budget allows. Each difference between outputs is measured by a forward pass of
transformers over the texts: for greedy decoding the difference between the logits of the first two different tokens,
for beam search the difference between the scores of the texts.

The memory's bound is the time that reading the weights and the used columns of the cache takes, once in each step, at
the rate at which this machine reads memory. The bound of both is at least the time of each step's products at the rate
of large ones. The pass over the prompts, attention and all else come on top.
"""
import statistics
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parent.parent))
from bench.timing import matrix_rate, read_rate, timed
from bench.workload import split_batches
from common.scripts import run
from common.settings import setting
from corpus.prompts import open_template
from corpus.tasks import read_task
from model.generation import BatchOptions, GenerationConfig, generate
from model.hub import load_model
from model.kv_cache import KVCache
from model.tokenizer import Tokenizer

DTYPES = ("float32", "bfloat16", "float16", "float64")
MODES = {"greedy": GenerationConfig(),
         "5 beams, no repeated 3-grams": GenerationConfig(num_beams=5, no_repeat_ngram_size=3),
         "4 beams, length penalty 0.9, no repeated 2-grams":
             GenerationConfig(num_beams=4, length_penalty=0.9, no_repeat_ngram_size=2)}


@dataclass(frozen=True)
class DecodingBenchConfig:
    """Settings of the benchmark."""
    checkpoint: str = setting(None, "checkpoint directory", required=True)
    data: str = setting(None, "preprocessed task file", required=True)
    samples: int = setting(64, "prompts", at_least=1)
    batch_size: int = setting(16, "prompts in a batch of transformers", at_least=1)
    max_new_tokens: int = setting(80, "maximum number of new tokens", at_least=1)
    repeats: int = setting(1, "measurements of each variant", at_least=1)
    dtype: str = setting("float32", "dtype of the weights, as in torch", names=DTYPES)


def transformers_generate(model, decoding, eos, batch_size, prompts):
    """transformers' generate on batches in the given order, padded on the left; returns new ids without the eos."""
    outputs = []
    for batch in split_batches(prompts, batch_size):
        width = max(map(len, batch))
        ids = torch.tensor([[eos] * (width - len(prompt)) + prompt for prompt in batch])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch])
        new = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), do_sample=False,
                             max_new_tokens=decoding.max_new_tokens, num_beams=decoding.num_beams,
                             length_penalty=decoding.length_penalty,
                             no_repeat_ngram_size=decoding.no_repeat_ngram_size, pad_token_id=eos, eos_token_id=eos)
        outputs += [row[:row.index(eos)] if eos in row else row for row in new[:, width:].tolist()]
    return outputs


class Bounds:
    """Adds up the least seconds of decoding: in each step the weights and the used columns of the cache are read
    (`memory`), and the products of all beams with the weights computed, whichever takes longer (`both`).

    read_rate: bytes per second. matrix_rate: FLOP per second.
    """

    def __init__(self, model, read_rate, matrix_rate):
        self.rates, self.memory, self.both = (read_rate, matrix_rate), 0.0, 0.0
        self.weights = [*model.model.layers.parameters(), *model.lm_head.parameters()]
        model.model.register_forward_hook(self.count)

    def count(self, decoder, inputs, output):
        """A hook of the decoder: counts a step, which is a pass over the cache."""
        if len(inputs) > 1 and isinstance(inputs[1], KVCache):
            tokens, cache = inputs[0], inputs[1]  # tokens [B, M], a column of the cache for each of M beams
            columns = cache.keys[0][:len(tokens), :, :cache.length]
            size = sum(weight.numel() for weight in self.weights)
            elements = size + 2 * len(cache.keys) * columns.numel()
            reading = elements * columns.element_size() / self.rates[0]
            computing = 2 * size * tokens.numel() / self.rates[1]
            self.memory += reading
            self.both += max(reading, computing)


@torch.no_grad()
def output_difference(model, prompt, outputs, decoding, eos):
    """The difference between two outputs: between the first two different logits, or for beam search the scores."""
    def log_p(ids):
        logits = model(torch.tensor([prompt + ids], device=model.device)).logits
        return logits[0, len(prompt) - 1:].float().log_softmax(-1)

    if decoding.num_beams == 1:
        first, second = (ids + [eos] for ids in outputs)
        at = next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
        row = log_p(first[:at])[at]
        return abs(float(row[first[at]] - row[second[at]]))
    scores = []
    for ids in outputs:
        ids = ids + [eos] if len(ids) < decoding.max_new_tokens else ids
        total = log_p(ids)[range(len(ids)), ids].sum()
        scores.append(float(total) / len(ids) ** decoding.length_penalty)
    return scores[0] - scores[1]


def main(cfg):
    """Prints the rates of each mode, their ratios, and the differences."""
    dtype, tokenizer = getattr(torch, cfg.dtype), Tokenizer(cfg.checkpoint)
    items = read_task(cfg.data)[0]["test"][:cfg.samples]
    prompts = open_template("alpaca", tokenizer).encode_prompts([item["input"] for item in items], 1024)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(cfg.checkpoint, dtype, device)
    baseline = AutoModelForCausalLM.from_pretrained(cfg.checkpoint, dtype=dtype).to(device)
    bounds = Bounds(model, read_rate(), matrix_rate(device, dtype))
    print(f"{len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {cfg.dtype} on "
          f"{device}, {torch.get_num_threads()} threads; memory is read at {bounds.rates[0] / 1e9:.1f} GB/s, large "
          f"products run at {bounds.rates[1] / 1e9:.0f} GFLOP/s")
    for name, mode in MODES.items():
        decoding = replace(mode, max_new_tokens=cfg.max_new_tokens)
        columns = max(map(len, prompts)) + decoding.num_beams * cfg.max_new_tokens
        options, eos = BatchOptions(max_tokens=columns * cfg.batch_size), tokenizer.eos_id
        first, same = f"transformers, batches of {cfg.batch_size}", f"ours, batches of {cfg.batch_size}"
        full = "ours, under its token budget"
        variants = {
            first: partial(transformers_generate, baseline, decoding, eos, cfg.batch_size),
            "transformers, all at once": partial(transformers_generate, baseline, decoding, eos, len(prompts)),
            same: partial(generate, model, config=decoding, eos_ids=tokenizer.eos_ids, options=options),
            full: partial(generate, model, config=decoding, eos_ids=tokenizer.eos_ids)}
        seconds, outputs, least = dict.fromkeys(variants, 0.0), {}, {}
        for decode in variants.values():
            decode(prompts[:1])
        for _ in range(cfg.repeats):
            for variant, decode in variants.items():
                bounds.memory = bounds.both = 0.0
                took, outputs[variant] = timed(decode, prompts)
                seconds[variant] += took / cfg.repeats
                least[variant] = bounds.memory, bounds.both
        print(name)
        for variant in variants:
            tokens = sum(map(len, outputs[variant]))
            ratio = tokens / seconds[variant] / (sum(map(len, outputs[first])) / seconds[first])
            memory, both = (f"{one / seconds[variant]:.0%}" for one in least[variant])
            shares = f", {memory} of the memory's bound, {both} of both" if "ours" in variant else ""
            print(f"  {variant}: {tokens} new tokens in {seconds[variant]:.1f} s, {tokens / seconds[variant]:.1f} "
                  f"tokens/s, ratio {ratio:.2f}{shares}", flush=True)
        different = [i for i in range(len(prompts)) if outputs[first][i] != outputs[same][i]]
        print(f"  equal to transformers: {len(prompts) - len(different)} of {len(prompts)}; equal in both of our "
              f"batchings: {sum(a == b for a, b in zip(outputs[same], outputs[full]))}")
        gaps = [output_difference(baseline, prompts[i], (outputs[same][i], outputs[first][i]), decoding, eos)
                for i in different]
        if gaps:
            quantity = "score, ours minus transformers'" if decoding.num_beams > 1 else "difference of the logits"
            print(f"  {quantity} where they differ: {statistics.fmean(gaps):.1e} in the mean, {min(gaps):.1e} to "
                  f"{max(gaps):.1e}", flush=True)


if __name__ == "__main__":
    run((DecodingBenchConfig, main), __doc__)
