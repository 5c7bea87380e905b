"""Classification heads that read the mean over a text's tokens, in place of the first token's state.

Encoders trained as sentence-transformers (MiniLM-L6 here) put what a text means into that mean; their first token's
state was never asked for it. BERT's pooler, a dense layer on the first token, goes; other families' heads stay whole.
The choice is a key of config.json, which `load_encoder` obeys; transformers alone ignores it and reads the first token.
"""

from __future__ import annotations

from typing import Any

import torch

from device.records import SlimpiError

KEY = "slimpi_pooling"
MEAN = "mean"
POOLED = frozenset({"bert", "distilbert", "mpnet", "roberta"})
"""Families (model_type) whose heads read the first token's last state, directly or through BERT's pooler."""


def pool_mean(model: Any) -> None:
    """Let a classifier's head read the mean from now on, and wherever it is saved and loaded by `load_encoder`.

    SlimpiError for a family whose head reads something else.
    """
    if model.config.model_type not in POOLED:
        known = ", ".join(sorted(POOLED))
        raise SlimpiError(f'a {model.config.model_type} has no pooling = "mean". Take one of {known}, or "first".')
    setattr(model.config, KEY, MEAN)
    attach_pooling(model)


def attach_pooling(model: Any) -> None:
    """Do what the model's config says; nothing where it says nothing, or where it was done already."""
    body = model.base_model
    if getattr(model.config, KEY, "") != MEAN or any(isinstance(m, _Mean) for m in body._forward_pre_hooks.values()):
        return
    mean = _Mean()
    body.register_forward_pre_hook(mean, with_kwargs=True)
    if getattr(body, "pooler", None) is not None:
        body.pooler = _Pooler(mean)
    else:
        body.register_forward_hook(_FirstIsMean(mean))


class _Mean:
    """Keeps the attention mask of the call that goes on."""

    def __call__(self, body: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.mask: torch.Tensor | None = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)

    def of(self, states: torch.Tensor) -> torch.Tensor:
        """(n, hidden) of states (n, tokens, hidden), over the tokens that the mask keeps."""
        if self.mask is None:
            return states.mean(1)
        mask = self.mask[:, :, None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


class _Pooler(torch.nn.Module):
    """In the place of BERT's: no weights."""

    def __init__(self, mean: _Mean) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.mean.of(states)


class _FirstIsMean:
    """Heads without a pooler take the first of the body's last states: here it is the only one."""

    def __init__(self, mean: _Mean) -> None:
        self.mean = mean

    def __call__(self, body: Any, args: tuple[Any, ...], output: Any) -> Any:
        states = self.mean.of(output[0])[:, None]
        if isinstance(output, tuple):
            return (states, *output[1:])
        output["last_hidden_state"] = states
        return output
