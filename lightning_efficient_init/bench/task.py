"""What one row is to build and load: small, so that it can be sent to a fresh process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

DTYPES = {"32-true": torch.float32, "bf16-true": torch.bfloat16, "16-true": torch.float16}


@dataclass(frozen=True, slots=True)
class Task:
    """A model and its weights.

    Attributes:
        model: The model's name, see `constructor_of`.
        paths: Where the weights are, in each form: "pth" (a bare state dict by ``torch.save``), "safetensors" (a folder
            with shards and an index, or one file) or "ckpt" (a Lightning checkpoint of `LoadedModule`).
        precision: As Lightning calls it.
        accelerator: "cpu" or "cuda".
        num_bytes: Bytes of the model's weights in that precision.
    """

    model: str
    paths: Mapping[str, str]
    precision: str
    accelerator: str
    num_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that models are built in."""
        return DTYPES[self.precision]

    @property
    def device(self) -> torch.device:
        """The one device."""
        return torch.device("cuda", 0) if self.accelerator == "cuda" else torch.device("cpu")
