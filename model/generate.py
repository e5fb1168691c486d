"""Batched decoding with a key-value cache."""
import torch

from .transformer import KVCache


@torch.no_grad()
def greedy(model, prompts, max_new_tokens, eos_id):
    """Continues each prompt with its most probable tokens, up to `max_new_tokens` or the end of text.

    prompts: lists of token ids, of any lengths. Returns the new ids of each, without the eos. The prompts stand
    left-aligned in one batch; each row counts its own positions, so padding changes nothing.
    """
    device, dtype = model.lm_head.weight.device, model.lm_head.weight.dtype
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    width = int(lengths.max())
    batch = torch.tensor([prompt + [0] * (width - len(prompt)) for prompt in prompts], device=device)  # B T
    rows = torch.arange(len(prompts), device=device)
    cache = KVCache(model.config, len(prompts), width + max_new_tokens, dtype, device)

    positions = torch.arange(width, device=device).expand_as(batch)
    hidden = model.model(batch, cache, positions)[rows, lengths - 1]  # B C
    outputs, finished = [[] for _ in prompts], [False] * len(prompts)
    for step in range(max_new_tokens):
        tokens = model.lm_head(hidden).argmax(-1)  # B
        for row, token in enumerate(tokens.tolist()):
            finished[row] = finished[row] or token == eos_id
            if not finished[row]:
                outputs[row].append(token)
        if all(finished) or step + 1 == max_new_tokens:
            break
        hidden = model.model(tokens[:, None], cache, (lengths + step)[:, None])[:, 0]
    return outputs
