"""Batched decoding: greedy, sampling and beam search with a key-value cache that is allocated once.

Prompts are left-aligned in the cache. The new tokens follow the longest prompt, M columns per step for M beams. A mask
says which columns each beam attends to. Beams with a common past attend to the same columns, so reordering beams moves
rows of the mask and no keys or values.

Dimensions:  B items of a batch, M beams per item, W tokens of the longest prompt, S columns of the cache, otherwise as
             in transformer.py. Greedy decoding and sampling have one beam.
"""
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.files import UserError
from common.settings import check_values, non_defaults, setting
from model.kv_cache import KVCache
from model.linear import packed_weights
from model.logits import finite_logits
from model.oom import halve_batch
from model.transformer import Transformer

NEVER = -1e9  # score of a candidate that must not be chosen

StopCriterion = Callable[[list[int]], bool]  # whether generation ends with these new ids, such as at a stop string


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding settings, with the names of transformers' GenerationConfig. Some defaults differ (there, top_k is 50),
    and `seed` is this program's."""
    max_new_tokens: int = setting(64, "maximum number of new tokens", at_least=1)
    num_beams: int = setting(1, "number of beams", at_least=1, at_most=1000)
    length_penalty: float = setting(1.0, "a finished beam's score is its log-likelihood / length ** length_penalty",
                                    at_least=-1, at_most=10)  # far beyond them, scores overflow or pass NEVER
    early_stopping: bool | Literal["never"] = setting(
        False, "true: stop with num_beams finished beams; false: stop when a better beam is unlikely; never: stop when "
               "none is possible")
    no_repeat_ngram_size: int = setting(0, "block repeated n-grams of this size; 0: off", at_least=0)
    do_sample: bool = setting(False, "sample instead of taking the most probable token")
    temperature: float = setting(1.0, "divisor of the logits", at_least=1e-3)
    top_k: int = setting(0, "sample from the k most probable tokens; 0: all", at_least=0)
    top_p: float = setting(1.0, "sample from the most probable tokens with this total probability", above=0, at_most=1)
    seed: int = setting(42, "seed of sampling", at_least=0)

    def problems(self) -> list[str]:
        """Returns what is wrong with the values, as sentences."""
        problems = check_values(self)
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            problems.append(f"early_stopping is {self.early_stopping!r}, expected true, false or never")
        if self.do_sample and self.num_beams > 1:
            problems.append("do_sample and num_beams above 1 exclude each other")
        valid = not problems
        for used, needs, names in ((self.do_sample, "do_sample", ("temperature", "top_k", "top_p")),
                                   (self.num_beams > 1, "num_beams above 1", ("length_penalty", "early_stopping"))):
            if (given := non_defaults(self, *names)) and not used and valid:
                problems.append(f"{' and '.join(given)} would change nothing without {needs}")
        return problems


@dataclass(frozen=True)
class BatchOptions:
    """Batching options of `generate`."""
    sample_ids: Sequence[int] | None = None  # of each prompt, default: its index. Sampling depends on it and the seed
    max_tokens: int = 32768  # columns of the cache, summed over the rows of a batch
    progress: Callable[[int], object] | None = None  # called with the number of prompts finished since the last call


@torch.inference_mode()  # in bf16 on a CPU, steps take 6% less time than under no_grad
def generate(model: Transformer, prompts: Sequence[list[int]], config: GenerationConfig,
             eos_ids: Collection[int] = (), stop: StopCriterion | None = None,
             options: BatchOptions | None = None) -> list[list[int]]:
    """Returns the new token ids of each prompt, without the id of `eos_ids` that ends them.

    Batches are formed from the longest prompts to the shortest. If memory runs out, the batch is halved. Raises
    UserError for an invalid `config`, a prompt that is empty or leaves no room in the model's context for the new
    tokens, and a logit that is not finite.
    """
    problems = config.problems() + [f"prompt {index} has no token" for index, ids in enumerate(prompts) if not ids]
    longest, context = max(map(len, prompts), default=0), model.config.max_position_embeddings
    if longest + config.max_new_tokens > context:
        problems.append(f"a prompt of {longest} tokens and {config.max_new_tokens} new ones are more than the model's "
                        f"max_position_embeddings, {context}")
    if problems:
        raise UserError("; ".join(problems))
    options = options or BatchOptions()
    sample_ids = range(len(prompts)) if options.sample_ids is None else options.sample_ids
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    outputs: list[list[int]] = [[] for _ in prompts]
    max_batch_size = len(prompts)
    with packed_weights(model):
        while order:
            columns = len(prompts[order[0]]) + config.num_beams * config.max_new_tokens
            batch = order[:min(max_batch_size, max(1, options.max_tokens // columns))]
            try:
                results = generate_batch(model, [prompts[index] for index in batch], config, eos_ids, stop,
                                         [sample_ids[index] for index in batch])
            except Exception as error:
                max_batch_size = halve_batch(len(batch), "prompts", error)
                continue
            for index, ids in zip(batch, results):
                outputs[index] = ids
            order = order[len(batch):]
            if options.progress:
                options.progress(len(batch))
    return outputs


def generate_batch(model: Transformer, prompts: list[list[int]], config: GenerationConfig, eos_ids: Collection[int],
                   stop: StopCriterion | None, sample_ids: list[int]) -> list[list[int]]:
    """Returns the new token ids of each prompt of one batch. Finished items leave the batch."""
    device, beams, width = model.lm_head.weight.device, config.num_beams, max(map(len, prompts))
    cache = KVCache(model, len(prompts), width + beams * (config.max_new_tokens - 1))
    hidden = cache.prefill(prompts)[:, None].expand(-1, beams, -1)  # B M C
    search = BeamSearch(prompts, config, eos_ids, stop, device) if beams > 1 else \
        Sampling(prompts, config, eos_ids, stop, device, sample_ids)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask = torch.zeros((len(prompts), beams, cache.keys[0].shape[2]), dtype=torch.bool, device=device)  # B M S
    mask[:, :, :width] = (torch.arange(width, device=device) < lengths[:, None])[:, None]
    outputs: list[list[int]] = [[] for _ in prompts]
    items = list(range(len(prompts)))  # the prompt of each row
    for step in range(config.max_new_tokens):
        tokens, origin, done = search.advance(finite_logits(model, hidden), step)
        for row, item in enumerate(items):
            if done[row]:
                outputs[item] = search.result(row)
        if all(done):
            break
        mask = mask.gather(1, origin[:, :, None].expand_as(mask))
        if any(done):
            rows = rows_to_keep(done)
            for target, source in enumerate(rows):
                if target != source:
                    cache.copy_row(source, target)
            search.select_rows(rows)
            items, tokens, mask, lengths = [items[row] for row in rows], tokens[rows], mask[rows], lengths[rows]
        column = width + step * beams
        mask[:, :, column:column + beams] = torch.eye(beams, dtype=torch.bool, device=device)
        cache.advance((lengths + step)[:, None].expand(-1, beams), mask[:, :, :column + beams])
        hidden = model.model(tokens, cache)
    return outputs


def rows_to_keep(done: list[bool]) -> list[int]:
    """Returns the rows that are not done, in an order that moves few: the last ones fill the places of done rows."""
    count = done.count(False)
    last = [row for row in range(count, len(done)) if not done[row]]
    return [last.pop() if done[row] else row for row in range(count)]


class Search:
    """The tokens of a batch and the rules for their end, shared by greedy decoding, sampling and beam search.

    `tokens` [B, M, W + max_new_tokens] holds right-aligned prompts followed by the new tokens, and -1 elsewhere.
    """

    def __init__(self, prompts: list[list[int]], config: GenerationConfig, eos_ids: Collection[int],
                 stop: StopCriterion | None, device: torch.device | str):
        self.config, self.stop = config, stop
        self.eos_ids = torch.tensor(sorted(eos_ids), dtype=torch.long, device=device)
        self.width = max(map(len, prompts))
        tokens = np.full((len(prompts), config.num_beams, self.width + config.max_new_tokens), -1)
        for row, prompt in enumerate(prompts):
            tokens[row, :, self.width - len(prompt):self.width] = prompt
        self.tokens = torch.from_numpy(tokens).to(device)

    def block_repeats(self, scores: Tensor, step: int) -> Tensor:
        """Sets the scores [B, M, V] of tokens that would repeat an n-gram of prompt and output to -inf."""
        size, length = self.config.no_repeat_ngram_size, self.width + step
        if size and length >= size:
            windows = self.tokens[:, :, :length].unfold(2, size, 1)  # B M length-size+1 size
            repeats = (windows[..., :-1] == self.tokens[:, :, None, length - size + 1:length]).all(-1)
            repeats &= windows[..., -1] >= 0
            item, beam, _ = repeats.nonzero(as_tuple=True)
            scores[item, beam, windows[..., -1][repeats]] = -torch.inf
        return scores

    def ends(self, tokens: Tensor, step: int) -> Tensor:
        """Returns which candidates [B, n, W + max_new_tokens] end at this step: by eos, stop criterion or length."""
        ends = torch.isin(tokens[:, :, self.width + step], self.eos_ids)
        if self.stop:
            new_ids = tokens[:, :, self.width:self.width + step + 1].flatten(0, 1).tolist()
            ends |= torch.tensor([self.stop(ids) for ids in new_ids], device=ends.device).view_as(ends)
        return ends | (step + 1 == self.config.max_new_tokens)

    def new_ids(self, tokens: Tensor) -> list[int]:
        """Returns the new ids of a finished sequence of tokens [W + max_new_tokens], without the final eos."""
        ids = [token for token in tokens[self.width:].tolist() if token >= 0]
        return ids[:-1] if ids and ids[-1] in self.eos_ids.tolist() else ids

    def select_rows(self, rows: list[int]) -> None:
        """Keeps the state of the given rows, in their order."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor) and value is not self.eos_ids:
                setattr(self, name, value[rows])


class Sampling(Search):
    """One beam: takes the most probable token, or samples from the filtered distribution."""

    def __init__(self, prompts: list[list[int]], config: GenerationConfig, eos_ids: Collection[int],
                 stop: StopCriterion | None, device: torch.device | str, sample_ids: Sequence[int]):
        super().__init__(prompts, config, eos_ids, stop, device)
        uniform = [np.random.default_rng([config.seed, sample]).random(config.max_new_tokens) for sample in sample_ids]
        self.uniform = torch.from_numpy(np.stack(uniform)).to(device)  # in fp64, to reach tokens of low probability

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor, list[bool]]:
        """Chooses a token per row of logits [B, 1, V]. Returns tokens and their beams [B, 1], and who is done."""
        logits = self.block_repeats(logits, step)
        if self.config.do_sample:
            logits = filter_logits(logits, self.config.temperature, self.config.top_k, self.config.top_p)
            cumulative = logits.double().softmax(-1).cumsum(-1)  # B 1 V
            thresholds = self.uniform[:, step, None, None] * cumulative[:, :, -1:]
            tokens = torch.searchsorted(cumulative, thresholds, right=True)[:, :, 0].clamp_(max=logits.shape[-1] - 1)
        else:
            tokens = logits.argmax(-1)
        self.tokens[:, :, self.width + step] = tokens
        return tokens, torch.zeros_like(tokens), self.ends(self.tokens, step)[:, 0].tolist()

    def result(self, row: int) -> list[int]:
        """Returns the new tokens of a row that is done."""
        return self.new_ids(self.tokens[row, 0])


def filter_logits(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Divides logits [..., V] by the temperature, and sets those outside top-k and top-p to -inf.

    Top-k keeps ties with the k-th largest. Top-p keeps the smallest set of tokens whose probabilities reach top_p
    (nucleus sampling: Holtzman et al., arXiv 1904.09751).
    """
    logits = logits / temperature
    if top_k:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[..., -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ascending, order = logits.sort(stable=True)
        tail = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        tail[..., -1] = False  # always keep the most probable token
        logits = logits.masked_fill(torch.zeros_like(tail).scatter(-1, order, tail), -torch.inf)
    return logits


class BeamSearch(Search):
    """Beam search as in transformers: M running beams with their log-likelihoods, and the M best finished beams."""

    def __init__(self, prompts: list[list[int]], config: GenerationConfig, eos_ids: Collection[int],
                 stop: StopCriterion | None, device: torch.device | str):
        super().__init__(prompts, config, eos_ids, stop, device)
        shape = self.tokens.shape[:2]
        self.scores = torch.full(shape, NEVER, device=device)  # all beams start equal, so only the first one counts
        self.scores[:, 0] = 0
        self.finished = self.tokens.clone()
        self.finished_scores = torch.full(shape, NEVER, device=device)
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)

    def advance(self, logits: Tensor, step: int) -> tuple[Tensor, Tensor, list[bool]]:
        """Extends the beams by logits [B, M, V]. Returns tokens and their beams [B, M], and who is done."""
        beams = logits.shape[1]
        count = max(2, 1 + len(self.eos_ids)) * beams  # enough to continue M beams if the M best candidates all end
        top, token = self.block_repeats(logits.log_softmax(-1), step).topk(min(count, logits.shape[2]))  # B M n
        top, index = (top + self.scores[:, :, None]).flatten(1).topk(count)  # B n: the best over all beams
        origin, token = index // token.shape[2], token.flatten(1).gather(1, index)
        candidates = gather_beams(self.tokens, origin)
        candidates[:, :, self.width + step] = token
        ends = self.ends(candidates, step)
        self.finish(candidates, top, ends, step + 1)
        self.scores, chosen = (top + ends * NEVER).topk(beams)
        self.tokens = gather_beams(candidates, chosen)
        done = self.is_done(step + 1) | ends.all(1)
        return token.gather(1, chosen), origin.gather(1, chosen), done.tolist()

    def finish(self, candidates: Tensor, top: Tensor, ends: Tensor, length: int) -> None:
        """Replaces finished beams by better ones: those of the M best candidates [B, n, …] that end."""
        beams = self.config.num_beams
        ends = ends & (torch.arange(top.shape[1], device=top.device) < beams)
        scores = (top / length ** self.config.length_penalty).masked_fill(~ends, NEVER)
        self.finished_scores, chosen = torch.cat((self.finished_scores, scores), 1).topk(beams)
        self.finished = gather_beams(torch.cat((self.finished, candidates), 1), chosen)
        self.is_finished = torch.cat((self.is_finished, ends), 1).gather(1, chosen)

    def is_done(self, length: int) -> Tensor:
        """Returns which searches [B] are over: the best possible score of the running beams does not exceed the worst
        finished score, or all M beams are finished and `early_stopping` is true."""
        early_stopping, penalty = self.config.early_stopping, self.config.length_penalty
        best_length = self.config.max_new_tokens if early_stopping == "never" and penalty > 0 else length
        best = self.scores[:, :1] / best_length ** penalty
        worst = torch.where(self.is_finished, self.finished_scores.min(1, keepdim=True).values, NEVER)
        return ~(best > worst).any(1) | (self.is_finished.all(1) if early_stopping is True else False)

    def result(self, row: int) -> list[int]:
        """Returns the new tokens of the best beam of an item that is done."""
        return self.new_ids(self.finished[row, 0])


def gather_beams(tokens: Tensor, beams: Tensor) -> Tensor:
    """Returns the tokens [B, n, L] of the given beams [B, n] of tokens [B, m, L]."""
    return tokens.gather(1, beams[:, :, None].expand(-1, -1, tokens.shape[2]))
