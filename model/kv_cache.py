"""A key-value cache that is allocated once.

Dimensions:  B rows of a batch, T new tokens of a row, S columns of the cache, C hidden size, H query heads, K key-value
             heads, D head size.
"""
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from model.attention import Attend, attention, window_masks
from model.prefix_packing import Segment, packed_passes, sort_sequences
from model.transformer import Transformer

PREFILL_TOKENS = 4096  # tokens of a pass over the prompts


class KVCache:
    """Keys and values of all layers, [B, K, S, D] each. All rows fill the same columns. An AttentionContext."""

    def __init__(self, model: Transformer, batch_size: int, columns: int):
        config, weight = model.config, model.lm_head.weight
        self.model, self.length = model, 0
        shape = (batch_size, config.num_key_value_heads, columns, config.head_dim)
        self.keys = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        self.values = [weight.new_zeros(shape) for _ in range(config.num_hidden_layers)]

    def advance(self, positions: Tensor, mask: Tensor) -> None:
        """Sets the positions [B, T] of the next tokens and the columns they attend to, a boolean mask [B, T, S].

        The last T of the S columns are those of the tokens themselves. Call this before each call of the decoder.
        """
        self.positions, self.length = positions, mask.shape[2]
        self.masks = window_masks(mask, self.model.config, self.keys[0].dtype)

    def of_layer(self, index: int) -> Attend:
        """Returns the attention of a layer."""
        return partial(self.attend, index)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Stores key and value [B, K, T, D] in the last columns and returns the attention of query [B, H, T, D]."""
        keys, values = (tensors[layer][:len(query), :, :self.length] for tensors in (self.keys, self.values))
        keys[:, :, -query.shape[2]:], values[:, :, -query.shape[2]:] = key, value
        return attention(query, keys, values, self.masks[self.model.config.window(layer)])

    def prefill(self, prompts: Sequence[list[int]]) -> Tensor:
        """Fills the cache with prompts and returns the hidden state of the last token of each, [B, C]."""
        sequences, places = sort_sequences(prompts)
        last: dict[int, Tensor] = {}
        self.length = max(map(len, prompts))
        for segments, hidden in packed_passes(self.model, sequences, PREFILL_TOKENS, keep=True):
            for segment in segments:
                if segment.stop == len(sequences[segment.sequence]):
                    for row in np.flatnonzero(np.equal(places, segment.sequence)).tolist():
                        self.fill(row, [*segment.path, (segment, segment.stop)])
                        last[row] = hidden[segment.rows(segment.stop)][-1]
        return torch.stack([last[row] for row in range(len(prompts))])

    def fill(self, row: int, path: list[tuple[Segment, int]]) -> None:
        """Copies the keys and values of a packed sequence, pairs (segment, stop), into the first columns of a row."""
        for segment, stop in path:
            for layer in range(len(self.keys)):
                size = stop - segment.start
                self.keys[layer][row, :, segment.start:stop] = segment.keys[layer][0, :, :size]
                self.values[layer][row, :, segment.start:stop] = segment.values[layer][0, :, :size]

    def copy_row(self, source: int, target: int) -> None:
        """Copies one row to another."""
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :self.length] = tensor[source, :, :self.length]
