"""Log-likelihoods, losses and generation with one model on all processes.

Only rank 0 knows tasks and benchmarks. It sends requests; the other ranks run `serve`, which computes their share of
each request and sends back the result, or what went wrong. Rank 0 raises the error; no rank waits for one that failed.
"""
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from common.distributed import Distributed
from common.files import UserError, first_line
from model.generation import BatchOptions, GenerationConfig, generate
from model.loglikelihood import log_likelihoods
from model.parameter_files import POSTERIOR, ParameterFiles, find_parameter_files
from model.posterior import sample_posterior
from model.prefix_packing import common_prefix, sort_sequences
from model.token_losses import Sample, sample_losses
from model.tokenizer import Tokenizer
from model.transformer import Transformer

# A method of ParallelModel that computes the answer to a share of a request. The ranks receive it by its name.
Computation = Callable[["ParallelModel", Any], Any]


class ParallelModel:
    """A model whose requests are divided among all processes of `dist`; `reference` is for the KL divergence."""

    def __init__(self, dist: Distributed, model: Transformer, tokenizer: Tokenizer,
                 reference: Transformer | None = None):
        self.dist, self.model, self.tokenizer, self.reference = dist, model, tokenizer, reference
        # tokens of a forward pass, and columns of a batch's key-value cache; a request that runs out of memory halves
        # them for itself
        self.score_tokens, self.decode_columns = (4096, 32_768) if dist.device.type == "cpu" else (32_768, 262_144)
        self.counts = {"computed": 0, "asked": 0}  # tokens computed, and tokens of all requests without sharing

    def log_likelihoods(self, pairs: Sequence[tuple[Any, Any]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context) in nats, whether greedy decoding gives it) of each pair.

        A pair is (context, continuation), both lists or both `array`s of token ids, which are joined by +.
        """
        if not pairs:
            return []
        shares = partition_by_prefix([context + continuation for context, continuation in pairs], self.dist.world_size)
        answers = self._request(ParallelModel._score, [[pairs[i] for i in share] for share in shares])
        for name in self.counts:
            self.counts[name] += sum(counts[name] for _, counts in answers)
        return restore_order(shares, [values for values, _ in answers])

    def losses(self, samples: Sequence[Sample]) -> list[tuple[float, float]]:
        """(negative log-likelihood, KL divergence from the reference) of each sample, as `sample_losses` sums them.

        Without a reference the divergence is 0.
        """
        shares = partition_by_prefix([ids[:-1] for ids, _ in samples], self.dist.world_size)
        return restore_order(shares, self._request(
            ParallelModel._losses, [[samples[i] for i in share] for share in shares]))

    def generate(self, prompts: Sequence[list[int]], config: GenerationConfig,
                 stops: Sequence[str] = ()) -> list[list[int]]:
        """The new token ids of each prompt, up to an end-of-text token or the first text in `stops`."""
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        shares = [order[rank::self.dist.world_size] for rank in range(self.dist.world_size)]
        requests = [(config, stops, share, [prompts[i] for i in share]) for share in shares]
        return restore_order(shares, self._request(ParallelModel._decode, requests))

    def load_posterior_sample(self, directory: str | Path, key: tuple) -> None:
        """Sets the weights to a sample from the posterior in a checkpoint directory. `key` seeds the sample."""
        self._request(ParallelModel._load_sample, [(directory, key)] * self.dist.world_size)

    def serve(self) -> None:
        """Computes this rank's shares of requests until rank 0 calls `dismiss`."""
        request: tuple[Computation, Any] | None
        while (request := self.dist.scatter()) is not None:
            self.dist.gather(self._compute(*request))

    def dismiss(self) -> None:
        """Ends `serve` on the other processes."""
        self.dist.scatter([None] * self.dist.world_size)

    def _request(self, computation: Computation, shares: list) -> list:
        answers = self.dist.gather(self._compute(*self.dist.scatter([(computation, share) for share in shares])))
        if failures := [failure for _, failure in answers if failure]:
            raise UserError(f"{self.tokenizer.directory}: {failures[0]}")
        return [answer for answer, _ in answers]

    def _compute(self, computation: Computation, share: Any) -> tuple[Any, str]:
        """(the answer to this rank's share of a request, why there is none)."""
        try:
            return computation(self, share), ""
        except UserError as error:
            return None, str(error)
        except Exception as error:  # a bug, or a failure of the hardware
            traceback.print_exc()
            return None, f"{type(error).__name__} on rank {self.dist.rank}: {first_line(error)}"

    def _score(self, pairs: list) -> tuple:
        with self._progress("scoring", len(pairs), "request") as bar:
            return log_likelihoods(self.model, pairs, self.score_tokens, bar.update)

    def _losses(self, samples: list) -> list:
        with self._progress("losses", len(samples), "sample") as bar:
            nll, kl = sample_losses(self.model, samples, self.reference, self.score_tokens, bar.update)
        return list(zip(nll.tolist(), (np.zeros(len(samples)) if kl is None else kl).tolist()))

    def _decode(self, share: tuple) -> list:
        config, stops, samples, prompts = share

        def stopped(ids: list[int]) -> bool:
            text = self.tokenizer.decode(ids)
            return any(stop in text for stop in stops)

        with self._progress("decoding", len(prompts), "prompt") as bar:
            # The text of a special token, which `decode` leaves out, may be in `stops`.
            return generate(self.model, prompts, config, self.tokenizer.eos_ids | self.tokenizer.special_ids(stops),
                            stopped if stops else None, BatchOptions(samples, self.decode_columns, bar.update))

    @torch.no_grad()
    def _load_sample(self, share: tuple) -> None:
        directory, key = share
        posterior = ParameterFiles(find_parameter_files(directory, POSTERIOR), f"the posterior in {directory}")
        for name, parameter in self.model.named_parameters():
            mean, precision = torch.empty(2, parameter.numel())
            posterior.read("mean", name, 0, mean)
            posterior.read("precision", name, 0, precision)
            mean, precision = mean.to(parameter.device), precision.to(parameter.device)
            parameter.view(-1).copy_(sample_posterior(mean, precision, key, name))

    def _progress(self, description: str, total: int, unit: str) -> tqdm:
        return tqdm(desc=description, total=total, unit=unit, leave=False, disable=self.dist.hides_progress)


def partition_by_prefix(sequences: Sequence, num_shares: int) -> list[list[int]]:
    """Divides sequences into shares, in sorted order, by the tokens to compute. Returns their indices.

    Sequences with a common prefix are neighbours, and a prefix is computed once in each share that has it: a share that
    begins within a group of them has more to compute than the others.
    """
    if num_shares == 1:
        return [list(range(len(sequences)))]
    unique, places = sort_sequences(sequences)
    new = [len(ids) - (common_prefix(unique[place - 1], ids) if place else 0) for place, ids in enumerate(unique)]
    ends = np.cumsum(new)
    shares: list[list[int]] = [[] for _ in range(num_shares)]
    for index in sorted(range(len(sequences)), key=places.__getitem__):
        shares[min(num_shares - 1, int((ends[places[index]] - 1) * num_shares // ends[-1]))].append(index)
    return shares


def restore_order(shares: Sequence[Sequence[int]], answers: Sequence[Sequence]) -> list:
    """The answers to shares of indices, sorted by index."""
    by_index = {index: answer for share, values in zip(shares, answers) for index, answer in zip(share, values)}
    return [by_index[index] for index in range(len(by_index))]
