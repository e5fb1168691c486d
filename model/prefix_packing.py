"""Forward passes over many texts that begin alike: what they have in common is computed once, and nothing is padded.

Sequences of token ids, sorted, are a tree walked depth first: each has a prefix in common with the one before it, and
brings new tokens behind that. The new tokens of one sequence after another are packed into passes of a given number of
tokens. A token sees the tokens before it in its sequence, its *path*: those of its own pass, and keys and values kept
from earlier passes. Since the walk is depth first, what has to be kept between two passes is the path of the next
sequence alone: the memory is that of one pass and of the key-value cache of one sequence, however many there are.

Dimensions:  N tokens of a pass, otherwise as in transformer.py.
"""
from dataclasses import dataclass, field

import numpy as np
import torch

from model.oom import halve, out_of_memory
from model.transformer import attention, group_bias

GROUP_TOKENS = 128  # neighbours below one path attend in one call, up to so many: fewer calls, more masked scores


@dataclass(eq=False)
class Segment:
    """New tokens that one sequence brings to a pass: positions [start, stop) of `sequence`, an index in sorted order.

    path: pairs (segment, stop) of which the tokens before `start` are made, each up to its position `stop`.
    """
    sequence: int
    start: int
    stop: int
    path: list
    offset: int  # of its first token in its pass
    keys: list = field(default_factory=list)  # of each layer [1, K, stop - start, D], where they are kept
    values: list = field(default_factory=list)

    def rows(self, stop):
        """Where its tokens up to a position stand in its pass."""
        return slice(self.offset, self.offset + stop - self.start)


class Group:
    """Consecutive segments of a pass below one path; they attend to it, and to one another by a mask, in one call."""

    def __init__(self, segments, config, dtype, device):
        first, last = segments[0], segments[-1]
        self.path, self.rows = first.path, slice(first.offset, last.offset + last.stop - last.start)
        self.bias = None
        if len(segments) == 1 and not first.start:
            return
        size = self.rows.stop - self.rows.start
        seen = torch.zeros((size, first.start + size), dtype=torch.bool)
        seen[:, :first.start] = True
        shift = first.start - first.offset  # from a row of the pass to its column here
        for segment in segments:
            rows = slice(segment.offset - first.offset, segment.offset - first.offset + segment.stop - segment.start)
            for part, stop in segment.path:
                if part.start >= first.start:
                    seen[rows, part.offset + shift:part.offset + shift + stop - part.start] = True
            own = slice(segment.offset + shift, segment.offset + shift + segment.stop - segment.start)
            seen[rows, own] = torch.ones(segment.stop - segment.start, segment.stop - segment.start).tril_().bool()
        self.bias = group_bias(seen[None].to(device), config.group_size, dtype)


class Pass:
    """The attention of one packed pass, in the place of a cache: where its tokens stand, and what they see."""

    def __init__(self, segments, kept, config, dtype, device):
        self.positions = torch.cat([torch.arange(s.start, s.stop) for s in segments])[None].to(device)  # 1 N
        self.here, self.kept = set(segments), [segment for segment in segments if segment in kept]
        groups, tokens = [], 0
        for segment in segments:
            size = segment.stop - segment.start
            if groups and segment.start >= groups[-1][0].start and tokens + size <= GROUP_TOKENS:
                groups[-1].append(segment)
                tokens += size
            else:
                groups.append([segment])
                tokens = size
        self.groups = [Group(group, config, dtype, device) for group in groups]

    def attend(self, layer, query, key, value):
        """Attention of query [1, H, N, D]; keeps keys and values [1, K, N, D] that later passes will see."""
        y = torch.empty_like(query)
        for group in self.groups:
            seen = [(key[:, :, part.rows(stop)], value[:, :, part.rows(stop)]) if part in self.here else
                    (part.keys[layer][:, :, :stop - part.start], part.values[layer][:, :, :stop - part.start])
                    for part, stop in group.path] + [(key[:, :, group.rows], value[:, :, group.rows])]
            keys, values = (torch.cat(tensors, 2) for tensors in zip(*seen))
            y[:, :, group.rows] = attention(query[:, :, group.rows], keys, values, group.bias)
        for segment in self.kept:
            segment.keys.append(key[:, :, segment.rows(segment.stop)].clone())
            segment.values.append(value[:, :, segment.rows(segment.stop)].clone())
        return y


def sort_sequences(sequences):
    """Sequences of token ids as arrays, sorted and without repetitions; and the place of each in that order."""
    keys = [np.asarray(ids, dtype=">u4").tobytes() for ids in sequences]  # big-endian bytes sort as the numbers do
    order = {key: place for place, key in enumerate(sorted(set(keys)))}
    return [np.frombuffer(key, dtype=">u4").astype(np.int64) for key in order], [order[key] for key in keys]


def common_prefix(first, second):
    """How many tokens two arrays begin with alike."""
    size = min(len(first), len(second))
    differ = np.flatnonzero(first[:size] != second[:size])
    return int(differ[0]) if len(differ) else size


def trim(path, length):
    """The parts of a path, pairs (owner, stop) from left to right, that lie before a position."""
    kept = []
    for owner, stop in path:
        if kept and kept[-1][1] >= length or not length:
            break
        kept.append((owner, min(stop, length)))
    return kept


def packed_passes(model, sequences, budget, keep=False):
    """Runs a model over sorted sequences, in passes of at most `budget` tokens.

    Yields for each pass its segments and their final hidden states [N, C]. With `keep` every segment keeps its keys and
    values, for a cache to be filled with. Where memory runs out, the pass is tried again with half the tokens, but not
    with `keep`: then it is what is kept that fills the memory.
    """
    weight = model.lm_head.weight
    index, path = 0, []
    while index < len(sequences):
        segments, room, next_index, next_path = [], budget, index, path
        while next_index < len(sequences) and room:
            ids, start = sequences[next_index], next_path[-1][1] if next_path else 0
            stop = min(len(ids), start + room)
            segments.append(Segment(next_index, start, stop, next_path, budget - room))
            room -= stop - start
            next_path = [*next_path, (segments[-1], stop)]
            if stop == len(ids):
                next_index += 1
                shared = common_prefix(ids, sequences[next_index]) if next_index < len(sequences) else 0
                next_path = trim(next_path, shared)
        tokens = np.concatenate([sequences[segment.sequence][segment.start:segment.stop] for segment in segments])
        try:
            kept = set(segments) if keep else {segment for segment, _ in next_path}
            cache = Pass(segments, kept, model.config, weight.dtype, weight.device)
            hidden = model.model(torch.from_numpy(tokens)[None].to(weight.device), cache)[0]
        except Exception as error:
            if keep or not out_of_memory(error):
                raise
            budget = halve(len(tokens), "tokens", error)
            continue
        yield segments, hidden
        index, path = next_index, next_path
