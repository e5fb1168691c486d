"""Batched decoding: greedy, sampling and beam search over a key-value cache that is allocated once.

Prompts of different lengths stand left-aligned in the cache, and behind the longest one come the new tokens, M columns
a step for M beams. What a beam sees is a row of a mask. Beams that fork have their past in common, as columns of one
item that both see, so choosing among beams moves rows of the mask and never a key or a value.

Dimensions:  B items of a batch, M beams of each, W tokens of the longest prompt, S columns of the cache, otherwise as
             in transformer.py. Greedy decoding and sampling have one beam.
"""
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from model.oom import halve, out_of_memory
from model.prefix_packing import packed_passes, sort_sequences
from model.transformer import attention, group_bias

NEVER = -1e9  # the score of what must not be chosen


@dataclass(frozen=True)
class GenerationConfig:
    """How to decode, under the names and with the meanings of transformers' GenerationConfig."""
    max_new_tokens: int = 64
    num_beams: int = 1
    length_penalty: float = 1.0  # a finished beam's score is its log-likelihood over its length to this power
    early_stopping: bool | Literal["never"] = False  # true: at M finished beams; "never": when none can become better
    no_repeat_ngram_size: int = 0
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    seed: int = 42

    def problems(self):
        """What is wrong with the values, as sentences."""
        found = [f"{name} is {getattr(self, name)}, expected at least {least}" for name, least in
                 (("max_new_tokens", 1), ("num_beams", 1), ("no_repeat_ngram_size", 0), ("top_k", 0), ("seed", 0))
                 if getattr(self, name) < least]
        found += [f"temperature is {self.temperature}, expected above 0"] if not self.temperature > 0 else []
        found += [f"top_p is {self.top_p}, expected above 0 and at most 1"] if not 0 < self.top_p <= 1 else []
        found += ["do_sample and num_beams above 1 exclude each other"] if self.do_sample and self.num_beams > 1 else []
        return found


class KVCache:
    """Keys and values of all layers, [B, K, S, D] a layer, filled column by column by all rows alike.

    Before each call of the decoder `see` says where the new tokens stand in their texts and what they see.
    """

    def __init__(self, config, batch_size, columns, dtype, device):
        self.config, self.dtype, self.length = config, dtype, 0
        shape = (batch_size, config.num_key_value_heads, columns, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_hidden_layers)]

    def see(self, positions, seen):
        """The next tokens stand at positions [B, T] and see columns, a boolean [B, T, S]; the last T are their own."""
        self.positions, self.bias = positions, group_bias(seen, self.config.group_size, self.dtype)
        self.length = seen.shape[2]

    def attend(self, layer, query, key, value):
        """Attention of query [B, H, T, D], behind whose key and value [B, K, T, D] are stored in the last columns."""
        rows, start = len(query), self.length - query.shape[2]
        for stored, new in ((self.keys[layer], key), (self.values[layer], value)):
            stored[:rows, :, start:self.length] = new
        return attention(query, self.keys[layer][:rows, :, :self.length], self.values[layer][:rows, :, :self.length],
                         self.bias)

    def fill(self, row, path):
        """Copies the keys and values of a packed sequence, pairs (segment, stop), into the first columns of a row."""
        for segment, stop in path:
            for layer in range(len(self.keys)):
                size = stop - segment.start
                self.keys[layer][row, :, segment.start:stop] = segment.keys[layer][0, :, :size]
                self.values[layer][row, :, segment.start:stop] = segment.values[layer][0, :, :size]

    def move(self, source, target):
        """Copies one row over another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :self.length] = tensor[source, :, :self.length]


@torch.no_grad()
def generate(model, prompts, decoding, eos_ids=(), stopped=None, samples=None, budget=32768, progress=None):
    """Continues each prompt, a list of token ids. Returns the new ids of each, without the one of eos_ids that ends it.

    stopped: a function of the ids so far that says whether they are to end there, such as at a stop string. samples: a
    number for each prompt; what is drawn for it depends on that and the seed alone. budget: columns of the cache, over
    all rows of a batch. The longest prompts come first; where memory runs out, the batch is halved. progress: called
    with a number of prompts whenever so many are done.
    """
    samples = range(len(prompts)) if samples is None else samples
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    outputs, most = [None] * len(prompts), len(prompts)
    while order:
        columns = len(prompts[order[0]]) + decoding.num_beams * decoding.max_new_tokens
        batch = order[:min(most, max(1, budget // columns))]
        try:
            results = decode(model, [prompts[i] for i in batch], decoding, eos_ids, stopped,
                             [samples[i] for i in batch])
        except Exception as error:
            if not out_of_memory(error):
                raise
            most = halve(len(batch), "prompts", error)
            continue
        for index, ids in zip(batch, results):
            outputs[index] = ids
        order = order[len(batch):]
        if progress:
            progress(len(batch))
    return outputs


def decode(model, prompts, decoding, eos_ids, stopped, samples):
    """Continues the prompts of one batch; items that are finished leave it."""
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    beams, width = decoding.num_beams, max(map(len, prompts))
    cache = KVCache(model.config, len(prompts), width + beams * (decoding.max_new_tokens - 1), dtype, device)
    hidden = prefill(model, prompts, cache)[:, None].expand(-1, beams, -1)  # B M C
    search = (BeamSearch if beams > 1 else Sampling)(prompts, decoding, eos_ids, stopped, samples, device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    seen = torch.zeros((len(prompts), beams, cache.keys[0].shape[2]), dtype=torch.bool, device=device)
    seen[:, :, :width] = (torch.arange(width, device=device) < lengths[:, None])[:, None]
    outputs, items = [None] * len(prompts), list(range(len(prompts)))
    for step in range(decoding.max_new_tokens):
        tokens, origin, done = search.advance(model.lm_head(hidden).float(), step)
        done = done.tolist()
        for row, item in enumerate(items):
            if done[row]:
                outputs[item] = search.result(row, step + 1)
        if all(done):
            break
        seen = seen.gather(1, origin[:, :, None].expand_as(seen))
        if any(done):
            rows = rows_that_stay(done)
            for target, source in enumerate(rows):
                if target != source:
                    cache.move(source, target)
            search.keep(rows)
            items, tokens, seen, lengths = [items[row] for row in rows], tokens[rows], seen[rows], lengths[rows]
        column = width + step * beams
        seen[:, :, column:column + beams] = torch.eye(beams, dtype=torch.bool, device=device)
        cache.see((lengths + step)[:, None].expand(-1, beams), seen[:, :, :column + beams])
        hidden = model.model(tokens, cache)
    return outputs


def rows_that_stay(done):
    """The rows that are not done, in an order that moves few: the last ones take the places of those that leave."""
    count = done.count(False)
    last = [row for row in range(count, len(done)) if not done[row]]
    return [last.pop() if done[row] else row for row in range(count)]


def prefill(model, prompts, cache, budget=4096):
    """Runs the prompts through the model, what they begin with in common once, and fills a cache with them.

    Returns the hidden state of each prompt's last token, [B, C].
    """
    sequences, places = sort_sequences(prompts)
    rows = [[] for _ in sequences]
    for row, place in enumerate(places):
        rows[place].append(row)
    last, cache.length = [None] * len(prompts), max(map(len, prompts))
    for segments, hidden in packed_passes(model, sequences, budget, keep=True):
        for segment in segments:
            if segment.stop == len(sequences[segment.sequence]):
                for row in rows[segment.sequence]:
                    cache.fill(row, [*segment.path, (segment, segment.stop)])
                    last[row] = hidden[segment.rows(segment.stop)][-1]
    return torch.stack(last)


class Search:
    """What greedy decoding, sampling and beam search have in common: the tokens so far, and where they may end.

    `tokens` [B, M, W + max_new_tokens] are right-aligned prompts with the new tokens behind them, -1 where none is.
    """

    def __init__(self, prompts, decoding, eos_ids, stopped, samples, device):
        self.decoding, self.stopped = decoding, stopped
        self.eos = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self.width = max(map(len, prompts))
        tokens = np.full((len(prompts), decoding.num_beams, self.width + decoding.max_new_tokens), -1)
        for row, prompt in enumerate(prompts):
            tokens[row, :, self.width - len(prompt):self.width] = prompt
        self.tokens = torch.from_numpy(tokens).to(device)

    def block_repeats(self, scores, step):
        """Scores [B, M, V] with -inf for every token that would repeat an n-gram of prompt and output."""
        size, length = self.decoding.no_repeat_ngram_size, self.width + step
        if size and length >= size:
            windows = self.tokens[:, :, :length].unfold(2, size, 1)  # B M length-size+1 size
            repeats = (windows[..., :-1] == self.tokens[:, :, None, length - size + 1:length]).all(-1)
            repeats &= windows[..., -1] >= 0
            item, beam, _ = repeats.nonzero(as_tuple=True)
            scores[item, beam, windows[..., -1][repeats]] = -torch.inf
        return scores

    def ends(self, tokens, step):
        """Which of the candidates [B, n, W + max_new_tokens] end with the token of this step: eos, stopped, or full."""
        found = torch.isin(tokens[:, :, self.width + step], self.eos)
        if self.stopped:
            texts = tokens[:, :, self.width:self.width + step + 1].flatten(0, 1).tolist()
            found |= torch.tensor([self.stopped(ids) for ids in texts], device=found.device).view_as(found)
        return found | (step + 1 == self.decoding.max_new_tokens)

    def plan_microbatches(self, ids):
        """A finished row of new tokens as a list, without what follows its end and without the eos."""
        ids = [token for token in ids.tolist() if token >= 0]
        return ids[:-1] if ids and ids[-1] in self.eos.tolist() else ids

    def keep(self, rows):
        """Drops the state of all rows but these, and puts them in this order."""
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value is not self.eos:
                setattr(self, name, value[rows])


class Sampling(Search):
    """One beam: the most probable token, or one drawn from the filtered distribution."""

    def __init__(self, prompts, decoding, eos_ids, stopped, samples, device):
        super().__init__(prompts, decoding, eos_ids, stopped, samples, device)
        draws = [np.random.default_rng([decoding.seed, sample]).random(decoding.max_new_tokens) for sample in samples]
        self.draws = torch.from_numpy(np.stack(draws)).to(device)  # in fp64, so that all tokens can be hit

    def advance(self, logits, step):
        """Takes a token for each row of logits [B, 1, V]: returns tokens and origins [B, 1], and who is done [B]."""
        logits = self.block_repeats(logits, step)
        if self.decoding.do_sample:
            logits = filtered(logits, self.decoding.temperature, self.decoding.top_k, self.decoding.top_p)
            cumulative = logits.double().softmax(-1).cumsum(-1)  # B 1 V
            draws = self.draws[:, None, step, None] * cumulative[:, :, -1:]
            tokens = torch.searchsorted(cumulative, draws, right=True)[:, :, 0].clamp_(max=logits.shape[-1] - 1)
        else:
            tokens = logits.argmax(-1)
        self.tokens[:, :, self.width + step] = tokens
        return tokens, torch.zeros_like(tokens), self.ends(self.tokens, step)[:, 0]

    def result(self, row, count):
        """The new tokens of a row that is done."""
        return self.cut(self.tokens[row, 0, self.width:self.width + count])


def filtered(logits, temperature, top_k, top_p):
    """Logits [..., V] over the temperature, -inf beyond the top_k largest and beyond the smallest set of tokens whose
    probabilities reach top_p (nucleus sampling: Holtzman et al., arXiv 1904.09751). Ties with the k-th are kept."""
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(stable=True)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False  # the most probable token stays in any case
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
    return logits


class BeamSearch(Search):
    """Beam search as transformers defines it, with its rules for when a search is over (`early_stopping`).

    Each item keeps M running beams with their scores, and its best M finished ones with theirs over length^penalty.
    """

    def __init__(self, prompts, decoding, eos_ids, stopped, samples, device):
        super().__init__(prompts, decoding, eos_ids, stopped, samples, device)
        shape = self.tokens.shape[:2]
        self.scores = torch.full(shape, NEVER, device=device)  # all beams begin alike: only the first one counts
        self.scores[:, 0] = 0
        self.finished = self.tokens.clone()
        self.finished_scores = torch.full(shape, NEVER, device=device)
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)

    def advance(self, logits, step):
        """Extends the beams by logits [B, M, V]: returns tokens and origins [B, M], and which items are done [B]."""
        beams = logits.shape[1]
        count = max(2, 1 + len(self.eos)) * beams  # beside the M best, enough others to go on with if those all end
        top, token = self.block_repeats(logits.log_softmax(-1), step).topk(min(count, logits.shape[2]))  # B M n
        top, index = (top + self.scores[:, :, None]).flatten(1).topk(count)  # B n: the best of the best of each beam
        origin, token = index // token.shape[2], token.flatten(1).gather(1, index)
        candidates = pick(self.tokens, origin)
        candidates[:, :, self.width + step] = token
        ends = self.ends(candidates, step)
        self.finish(candidates, top, ends, step + 1)
        self.scores, chosen = (top + ends * NEVER).topk(beams)
        self.tokens = pick(candidates, chosen)
        over = self.over(step + 1) | ends.all(1)
        return token.gather(1, chosen), origin.gather(1, chosen), over

    def finish(self, candidates, top, ends, length):
        """Puts candidates that end, of the M best, among the finished beams where they are better."""
        scores = top / length ** self.decoding.length_penalty
        beams = self.decoding.num_beams
        ends = ends & (torch.arange(top.shape[1], device=top.device) < beams)
        scores = scores.masked_fill(~ends, NEVER)
        self.finished_scores, chosen = torch.cat((self.finished_scores, scores), 1).topk(beams)
        self.finished = pick(torch.cat((self.finished, candidates), 1), chosen)
        self.is_finished = torch.cat((self.is_finished, ends), 1).gather(1, chosen)

    def over(self, length):
        """Which searches are over: the best running beam, at its best, would not beat the worst finished one; or all M
        are finished, where that is enough."""
        rule, penalty = self.decoding.early_stopping, self.decoding.length_penalty
        at = self.decoding.max_new_tokens if rule == "never" and penalty > 0 else length
        best = self.scores[:, :1] / at ** penalty
        worst = torch.where(self.is_finished, self.finished_scores.min(1, keepdim=True).values, NEVER)
        return ~(best > worst).any(1) | (self.is_finished.all(1) if rule is True else False)

    def result(self, row, count):
        """The new tokens of the best beam of an item that is done."""
        return self.cut(self.finished[row, 0, self.width:])


def pick(tokens, beams):
    """tokens [B, m, L] of the beams [B, n]: [B, n, L]."""
    return tokens.gather(1, beams[:, :, None].expand(-1, -1, tokens.shape[2]))
