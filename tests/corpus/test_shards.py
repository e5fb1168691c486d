"""Token shards as samples for pretraining."""
import numpy as np
import pytest

from common.files import UserError
from corpus.shards import ShardDataset


def test_samples_cover_each_token_of_the_shards_once(tmp_path):
    np.save(tmp_path / "train-00000.npy", np.arange(0, 95, dtype=np.uint16))
    np.save(tmp_path / "train-00001.npy", np.arange(1000, 1041, dtype=np.uint16))
    data = ShardDataset(tmp_path, "train", 10)
    samples = [data[index] for index in range(len(data))]
    assert len(samples) == 9 + 4
    targets = [token for tokens, first in samples for token in tokens[first:].tolist()]
    assert targets == [*range(1, 91), *range(1001, 1041)]
    assert all(len(tokens) == 11 for tokens, _ in samples)
    with pytest.raises(UserError, match="holds no token shards val"):
        ShardDataset(tmp_path, "val", 10)
    with pytest.raises(UserError, match="no train shard has the 201 tokens"):
        ShardDataset(tmp_path, "train", 200)
