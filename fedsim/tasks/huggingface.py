"""Models of Hugging Face's `transformers`, as modules from token ids to logits.

    model: {name: "fedsim.tasks.huggingface:pretrained", path: my/folder}

Departures: attention is the eager one, so that clients of a stack run as one program also where the base is frozen, and
weights saved in half precision are read as float32, which is what trains.

Letters: B samples, T positions, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Logits(nn.Module):
    """A model of transformers that is called with token ids [B, T] and gives its logits.

    Args:
        model: of transformers.
        pad: the token whose positions nobody looks at, unless a mask is given; None if there is none. Models that look
            back only need no mask where padding stands behind the tokens.
        looks_back: no position of the model sees a later one.
    """

    def __init__(self, model: nn.Module, pad: int | None, looks_back: bool = False) -> None:
        super().__init__()
        self.model, self.pad, self.looks_back = model, pad, looks_back

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Tensor:
        if attention_mask is None and self.pad is not None:
            attention_mask = input_ids != self.pad
        if attention_mask is not None:
            more["attention_mask"] = self._scores(attention_mask) if attention_mask.ndim == 2 else attention_mask
        return self.model(input_ids=input_ids, **more).logits

    def _scores(self, mask: Tensor) -> Tensor:
        """A mask [B, T], 0 for padding, as what is added to the scores [B, 1, 1 or T, T].

        Of one with two axes transformers asks whether it masks anything, which under vmap nobody can answer.
        """
        hidden = (mask == 0)[:, None, None, :]
        if self.looks_back:
            hidden = hidden | torch.ones(mask.shape[1:] * 2, dtype=torch.bool, device=mask.device).triu(1)
        return torch.zeros(hidden.shape, device=mask.device).masked_fill(hidden, torch.finfo(torch.float32).min)


def pretrained(
    input_shape: Sequence[int] | Mapping[str, Sequence[int]],
    num_classes: int,
    *,
    path: str | None = None,
    config: Mapping[str, Any] | None = None,
    head: str = "AutoModelForSequenceClassification",
) -> nn.Module:
    """A model from a folder or the hub, or one of a configuration that starts from random numbers.

    Args:
        input_shape: [T] token ids, or a dictionary's `input_ids` and whatever else the model takes by name.
        num_classes: K, the labels of a classifier's head.
        path: what `from_pretrained` takes; None for a model of `config`.
        config: `model_type` and its settings, such as {model_type: bert, num_hidden_layers: 2}.
        head: one of transformers' `AutoModelFor...` classes.

    Raises:
        ValueError: without transformers, or if not just one of path and config is given.
    """
    try:
        import transformers
    except ModuleNotFoundError as e:
        raise ValueError("needs the package transformers: pip install 'fedsim-stacks[transformers]'") from e
    if (path is None) == (config is None):
        raise ValueError("give either path, a folder or a model of the hub, or config, settings with a model_type")
    known = [name for name in dir(transformers) if name.startswith("AutoModelFor")]
    if head not in known:
        raise ValueError(f"head must be one of transformers' {', '.join(known)}, got {head!r}")
    make = getattr(transformers, head)
    if path is not None:
        settings = transformers.AutoConfig.from_pretrained(path, num_labels=num_classes)
    else:
        settings = transformers.AutoConfig.for_model(**dict(config or {}), num_labels=num_classes)
    options = {"config": settings, "attn_implementation": "eager", "dtype": torch.float32}  # as all that trains
    model = make.from_config(**options) if path is None else make.from_pretrained(path, **options)
    (length,) = input_shape["input_ids"] if isinstance(input_shape, Mapping) else input_shape
    looks_back = _looks_back_only(model, length)
    return Logits(model, None if looks_back else settings.pad_token_id, looks_back)


def _looks_back_only(model: Any, length: int) -> bool:
    """Whether the first position sees nothing of the last one: tried, as configurations do not say."""
    ids = torch.ones(2, length, dtype=torch.int64)
    ids[1, -1] = 2
    with torch.no_grad():
        first = model.eval().base_model(ids)[0][:, 0]
    return length > 1 and torch.equal(first[0], first[1])
