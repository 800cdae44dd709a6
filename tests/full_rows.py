"""The naive equivalent of the shared prefix: what Policy.logprobs is held against."""

import torch
from torch import Tensor

import kernels
from layers import recomputed
from model import Policy, PromptBatch


def full_logprobs(policy: Policy, batch: PromptBatch, ids: Tensor, lengths: Tensor, temperature: float = 1.0) -> Tensor:
    """The naive equivalent of logprobs(prefix(batch), ...): one full row per completion, nothing shared."""
    order = batch.order.to(ids.device)
    out = torch.zeros(ids.shape, dtype=torch.promote_types(policy.compute_dtype, torch.float32), device=ids.device)
    prompts = policy.embed_prompts(batch)
    for row, caller in enumerate(order.tolist()):
        p = batch.lengths[row]
        for member in range(ids.shape[1]):
            n = int(lengths[caller, member])
            tokens = ids[caller, member, :n]
            x = torch.cat((prompts[row, :p], policy.embed(tokens)))[None]  # (1, p + n, H)
            text = (batch.next_position[row] + torch.arange(n, device=ids.device)).expand(3, -1)
            cos, sin = policy.rotary(torch.cat((batch.positions[:, row, :p], text), dim=1)[:, None])
            for layer in policy.model.layers:
                x, _, _ = recomputed(layer.prefix, x, cos, sin, when=policy.checkpointing)
            logits = policy.logits(policy.model.norm(x[0, p - 1 : p + n - 1]))
            logp = kernels.token_logprob(logits, tokens, temperature)
            out[caller, member, :n] = logp
    return out
