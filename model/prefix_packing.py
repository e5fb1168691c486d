"""Forward passes over many sequences with common prefixes: each prefix is computed once, and nothing is padded.

Sorted sequences of token ids form a prefix tree, which is walked depth first: each sequence shares a prefix with the
one before it and adds new tokens. The new tokens of consecutive sequences are packed into passes of a given number of
tokens. A token attends to the tokens before it in its sequence, its *path*: tokens of the same pass, and keys and
values kept from earlier passes. Between two passes only the path of the next sequence is kept, so the memory is that of
one pass and of the key-value cache of one sequence, however many sequences there are.

Dimensions:  N tokens of a pass, C hidden size, H query heads, K key-value heads, D head size.
"""
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from model.attention import Attend, attention, window_masks
from model.oom import halve_batch
from model.transformer import Transformer

GROUP_MULTIPLE = 32  # the numbers of queries and keys of a group are rounded up to multiples of it


def group_tokens(device: str) -> int:
    """Returns how many tokens of segments under one path attend in one call on a device of this type. More tokens mean
    fewer calls, which are expensive on GPUs, but more masked scores."""
    return 128 if device == "cpu" else 1024


@dataclass(eq=False)
class Segment:
    """New tokens that one sequence adds to a pass: positions [start, stop) of `sequence`, an index in sorted order.

    The tokens before `start` are its path: pairs (segment, stop), each with the segment's positions up to `stop`.
    """
    sequence: int
    start: int
    stop: int
    path: list[tuple["Segment", int]]
    offset: int  # of its first token in the pass
    keys: list[torch.Tensor] = field(default_factory=list)  # of each layer [1, K, stop - start, D], if kept
    values: list[torch.Tensor] = field(default_factory=list)

    def rows(self, stop: int, origin: int = 0) -> slice:
        """Returns the rows of the pass, counted from row `origin`, that hold its tokens up to a position."""
        return slice(self.offset - origin, self.offset - origin + stop - self.start)


def round_up(number: int, multiple: int) -> int:
    """Returns the least multiple that is not below a number."""
    return -(-number // multiple) * multiple


class Group:
    """Consecutive segments of a pass that attend in one call, under the path of the first.

    `queries` and `keys` are rows of the pass: the queries attend to the path and to the keys. Their numbers are rounded
    up beyond the segments, because on CPUs oneDNN compiles a kernel for each shape of a product. The segments do not
    attend to the keys beyond them, and the next group overwrites the outputs of the queries beyond them.

    `masks` are those of the attention by the window of the layer (see ModelConfig). They are None for a single segment
    without a path that is not longer than any window: it needs only causal attention.
    """

    def __init__(self, segments: list[Segment], pass_length: int, model: Transformer):
        first, last, config = segments[0], segments[-1], model.config
        size = last.rows(last.stop, first.offset).stop
        num_queries = round_up(size, GROUP_MULTIPLE)
        num_keys = round_up(first.start + num_queries, GROUP_MULTIPLE) - first.start
        self.path = first.path
        self.queries, self.keys = (slice(first.offset, min(first.offset + number, pass_length))
                                   for number in (num_queries, num_keys))
        self.masks = dict[int | None, torch.Tensor | None].fromkeys(config.windows)
        if len(segments) == 1 and not first.start and all(num_queries <= (window or num_queries)
                                                          for window in config.windows):
            return
        mask = torch.zeros((self.queries.stop - first.offset, first.start + self.keys.stop - first.offset),
                           dtype=torch.bool)
        mask[:, :first.start] = True
        own = mask[:, first.start:]
        for segment in segments:
            for part, stop in (*segment.path, (segment, segment.stop)):
                if part.start >= first.start:
                    own[segment.rows(segment.stop, first.offset), part.rows(stop, first.offset)] = True
        mask = mask.tril_(first.start)[None].to(model.lm_head.weight.device)
        self.masks |= window_masks(mask, config, model.lm_head.weight.dtype)


class PackedPass:
    """Attention of one packed pass, an AttentionContext.

    The segments attend in groups, one call of attention for each. A group is consecutive segments under the path of the
    first. It ends before a segment that starts at an earlier position, and so leaves that path, and before one with
    which it would have more than `group_tokens` tokens.
    """

    def __init__(self, segments: list[Segment], kept: set[Segment], model: Transformer):
        positions = torch.cat([torch.arange(segment.start, segment.stop) for segment in segments])
        device = model.lm_head.weight.device
        self.config = model.config
        self.positions, most = positions[None].to(device), group_tokens(device.type)  # 1 N
        self.segments, self.kept = set(segments), [segment for segment in segments if segment in kept]
        groups: list[list[Segment]] = []
        for segment in segments:
            if groups and segment.start >= groups[-1][0].start and \
                    segment.rows(segment.stop, groups[-1][0].offset).stop <= most:
                groups[-1].append(segment)
            else:
                groups.append([segment])
        self.groups = [Group(group, len(positions), model) for group in groups]

    def of_layer(self, index: int) -> Attend:
        """Returns the attention of a layer."""
        return partial(self.attend, index)

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Returns the attention of query [1, H, N, D]. Keeps the keys and values that later passes attend to."""
        y, window = torch.empty_like(query), self.config.window(layer)
        for group in self.groups:
            keys_values = [(key[:, :, part.rows(stop)], value[:, :, part.rows(stop)]) if part in self.segments else
                           (part.keys[layer][:, :, :stop - part.start], part.values[layer][:, :, :stop - part.start])
                           for part, stop in group.path] + [(key[:, :, group.keys], value[:, :, group.keys])]
            keys, values = (torch.cat(tensors, 2) if group.path else tensors[0] for tensors in zip(*keys_values))
            y[:, :, group.queries] = attention(query[:, :, group.queries], keys, values, group.masks[window])
        for segment in self.kept:
            segment.keys.append(key[:, :, segment.rows(segment.stop)].clone())
            segment.values.append(value[:, :, segment.rows(segment.stop)].clone())
        return y


def sort_sequences(sequences: Sequence[Sequence[int] | np.ndarray]) -> tuple[list[np.ndarray], list[int]]:
    """Returns the distinct sequences of token ids as sorted arrays, and the index of each input sequence among them."""
    keys = [np.asarray(ids, dtype=">u4").tobytes() for ids in sequences]  # big-endian bytes sort like the numbers
    order = {key: place for place, key in enumerate(sorted(set(keys)))}
    return [np.frombuffer(key, dtype=">u4").astype(np.int64) for key in order], [order[key] for key in keys]


def common_prefix(first: np.ndarray, second: np.ndarray) -> int:
    """Returns the length of the common prefix of two arrays."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


def tree_rows(sequences: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    """Yields, for each of the sorted sequences, the row of each of its positions.

    Rows number the hidden states that `packed_passes` yields, from the first pass to the last. They do not depend on
    where the passes are cut. Sequences share the rows of a common prefix.
    """
    previous, rows, count = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for ids in sequences:
        shared = common_prefix(previous, ids)
        rows = np.concatenate((rows[:shared], np.arange(count, count + len(ids) - shared)))
        count += len(ids) - shared
        previous = ids
        yield rows


def trim_path(path: list[tuple[Any, int]], length: int) -> list[tuple[Any, int]]:
    """Returns the parts of a path, pairs (owner, stop) from left to right, that lie before a position."""
    starts = [0, *(stop for _, stop in path)]
    return [(owner, min(stop, length)) for start, (owner, stop) in zip(starts, path) if start < length]


def packed_passes(model: Transformer, sequences: Sequence[np.ndarray], max_tokens: int,
                  keep: bool = False) -> Iterator[tuple[list[Segment], torch.Tensor]]:
    """Runs a model over sorted sequences in passes of at most `max_tokens` tokens.

    Yields the segments of each pass and their final hidden states [N, C]. If memory runs out, a pass is tried again
    with half the tokens. With `keep`, all segments keep their keys and values, to fill a cache. A pass is then not
    tried again, because it is the kept tensors that use up the memory.
    """
    index = 0
    path: list[tuple[Segment, int]] = []
    while index < len(sequences):
        segments: list[Segment] = []
        room, next_index, next_path = max_tokens, index, path
        while next_index < len(sequences) and room:
            ids, start = sequences[next_index], next_path[-1][1] if next_path else 0
            stop = min(len(ids), start + room)
            segments.append(Segment(next_index, start, stop, next_path, max_tokens - room))
            room -= stop - start
            next_path = [*next_path, (segments[-1], stop)]
            if stop == len(ids):
                next_index += 1
                shared = common_prefix(ids, sequences[next_index]) if next_index < len(sequences) else 0
                next_path = trim_path(next_path, shared)
        tokens = np.concatenate([sequences[segment.sequence][segment.start:segment.stop] for segment in segments])
        try:
            kept = set(segments) if keep else {segment for segment, _ in next_path}
            input_ids = torch.from_numpy(tokens)[None].to(model.lm_head.weight.device)
            hidden = model.model(input_ids, PackedPass(segments, kept, model))[0]
        except Exception as error:
            if keep:
                raise
            max_tokens = halve_batch(len(tokens), "tokens", error)
            continue
        yield segments, hidden
        index, path = next_index, next_path
