"""Real weights: `make test SMOLLM2=<directory of SmolLM2-135M> ARGS=tests/model/test_smollm2.py`; otherwise skipped."""
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model.hub import load_model
from model.tokenizer import Tokenizer
from tests.conftest import sample_texts

DIRECTORY = os.environ.get("SMOLLM2")
pytestmark = pytest.mark.skipif(not DIRECTORY, reason="SMOLLM2 is not set")


def test_tokens_and_logits_equal_transformers():
    tokenizer, theirs = Tokenizer(DIRECTORY), AutoTokenizer.from_pretrained(DIRECTORY)
    texts = [text for task in ("simp", "empd", "inqqg") for text in sample_texts(task)]
    encoded = tokenizer.encode_batch(texts)
    assert encoded == [theirs.encode(text, add_special_tokens=False) for text in texts]
    ids = torch.tensor([sum(encoded, [])[:768]])
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(DIRECTORY, dtype=torch.float32)(ids).logits
        torch.testing.assert_close(load_model(DIRECTORY)(ids), expected, atol=1e-4, rtol=0)
