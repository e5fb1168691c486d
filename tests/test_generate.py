"""Decoding against transformers' generate."""
import torch
from transformers import AutoModelForCausalLM

from model.checkpoint import load_model
from model.generate import greedy


def test_greedy_equals_transformers_on_prompts_of_mixed_length(checkpoint):
    ours, theirs = load_model(checkpoint), AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    prompts = [torch.randint(3, 512, (length,), generator=generator).tolist() for length in (1, 5, 23, 40, 8, 31)]
    expected = [theirs.generate(torch.tensor([prompt]), max_new_tokens=24, do_sample=False, eos_token_id=None,
                                pad_token_id=0)[0, len(prompt):].tolist() for prompt in prompts]
    assert greedy(ours, prompts, 24, eos_id=-1) == expected
    end = expected[2][6]  # as if this token ended the text
    cut = [tokens[:tokens.index(end)] if end in tokens else tokens for tokens in expected]
    assert len(cut[2]) <= 6
    assert greedy(ours, prompts, 24, eos_id=end) == cut
