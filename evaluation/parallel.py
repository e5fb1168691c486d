"""A model that scores and decodes texts: rank 0 asks, and all processes share the work.

Only rank 0 knows of tasks and benchmarks. The others `serve`: they wait for their share of the next request, carry it
out and hand the result back.
"""
import numpy as np
import torch
from tqdm import tqdm

from model.generation import generate
from model.loglikelihood import log_likelihoods
from model.parameter_files import POSTERIOR, ParameterFiles, find_parameter_files
from model.posterior import draw
from model.prefix_packing import common_prefix, sort_sequences

SCORE_TOKENS, DECODE_COLUMNS = 4096, 32768  # of a pass, and of a batch's key-value cache: less where memory runs out


class ParallelModel:
    """log-likelihoods and generated tokens of one model, over all processes of `world`."""

    def __init__(self, dist, model, tokenizer):
        self.dist, self.model, self.tokenizer = dist, model, tokenizer
        self.counts = {"computed": 0, "asked": 0}  # tokens through the model, and tokens of all requests one by one

    def log_likelihoods(self, pairs):
        """(log p(continuation | context) in nats, whether it is the greedy one) of pairs of token id lists."""
        if not pairs:
            return []
        shares = prefix_shares([context + continuation for context, continuation in pairs], self.dist.world_size)
        answers = self._ask("score", [[pairs[i] for i in share] for share in shares])
        for name in self.counts:
            self.counts[name] += sum(counts[name] for _, counts in answers)
        return restore(shares, [values for values, _ in answers])

    def generate(self, prompts, decoding, stops=()):
        """New token ids of each prompt, a list of token ids, up to eos or to where one of the texts `stops` appears."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        shares = [order[rank::self.dist.world_size] for rank in range(self.dist.world_size)]
        return restore(shares, self._ask("decode", [(decoding, stops, share, [prompts[i] for i in share])
                                                    for share in shares]))

    def draw_weights(self, directory, key):
        """Gives the model one draw from the posterior beside a checkpoint, the same on all processes."""
        self._ask("draw", [(directory, key)] * self.dist.world_size)

    def serve(self):
        """Carries out shares of rank 0's requests until it dismisses the other processes."""
        while (request := self.dist.scatter()) is not None:
            name, share = request
            self.dist.gather(getattr(self, f"_{name}")(share))

    def dismiss(self):
        """Ends `serve` on the other processes."""
        self.dist.scatter([None] * self.dist.world_size)

    def _ask(self, name, shares):
        _, share = self.dist.scatter([(name, share) for share in shares])
        return self.dist.gather(getattr(self, f"_{name}")(share))

    def _score(self, pairs):
        with self._progress("scoring", len(pairs), "request") as bar:
            return log_likelihoods(self.model, pairs, SCORE_TOKENS, bar.update)

    @torch.no_grad()
    def _draw(self, request):
        directory, key = request
        parts = ParameterFiles(find_parameter_files(directory, POSTERIOR), f"the posterior in {directory}")
        for name, parameter in self.model.named_parameters():
            mean, precision = torch.empty(2, parameter.numel())
            parts.read("mean", name, 0, mean)
            parts.read("precision", name, 0, precision)
            parameter.view(-1).copy_(draw(mean, precision, key, name))

    def _decode(self, share):
        decoding, stops, samples, prompts = share
        def stopped(ids):
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in stops)
        with self._progress("decoding", len(prompts), "prompt") as bar:
            return generate(self.model, prompts, decoding, self.tokenizer.eos_ids, stopped if stops else None, samples,
                            DECODE_COLUMNS, bar.update)

    def _progress(self, what, total, unit):
        return tqdm(desc=what, total=total, unit=unit, leave=False, disable=None if self.dist.rank == 0 else True)


def prefix_shares(sequences, size):
    """Indices of sequences in `size` shares of about as many tokens to compute, with common prefixes kept together."""
    unique, places = sort_sequences(sequences)
    new = [len(ids) - (common_prefix(unique[place - 1], ids) if place else 0) for place, ids in enumerate(unique)]
    ends = np.cumsum(new)
    shares = [[] for _ in range(size)]
    for index in sorted(range(len(sequences)), key=places.__getitem__):
        shares[min(size - 1, int((ends[places[index]] - 1) * size // ends[-1]))].append(index)
    return shares


def restore(shares, answers):
    """Answers to shares of indices, in the order of the indices."""
    found = {index: answer for share, values in zip(shares, answers) for index, answer in zip(share, values)}
    return [found[index] for index in range(len(found))]
