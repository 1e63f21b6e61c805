"""Example inputs for the common tasks, made from a configuration: enough to trace a network and to verify it."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from isthmus.batches import Batch
from isthmus.errors import DataError

__all__ = ["example_for"]

_EXAMPLES = 2
_TOKENS = 7
_IMAGE_SIZE = 224
_SAMPLES = 8000


def example_for(model: nn.Module) -> Batch:
    """Make two example inputs for a transformers network.

    Text gets ``input_ids`` and ``attention_mask`` (pairs of texts also ``token_type_ids``), vision
    ``pixel_values``, audio ``input_features`` or ``input_values``, encoder-decoders ``decoder_input_ids`` as
    well, and text with images both. Values are drawn at random, from seed 0.

    Raises:
        DataError: the network's inputs are of another kind.
    """
    names = set(inspect.signature(model.forward).parameters)
    return Batch((), _Maker(model, names).inputs())


class _Maker:
    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self._model, self._names = model, names
        self._config: Any = model.config
        self._generator = torch.Generator().manual_seed(0)

    def inputs(self) -> dict[str, Tensor]:
        main = str(getattr(self._model, "main_input_name", "input_ids"))
        made: dict[str, Tensor] = {}
        if main == "input_ids" or (main == "pixel_values" and self._is_dual):
            made |= self._text()
        if main == "pixel_values" or self._is_dual:
            made["pixel_values"] = self._image()
        if main in ("input_features", "input_values"):
            made[main] = self._sound()
        if not made:
            raise DataError(
                f"No example inputs are known for {type(self._model).__name__}, which reads {main!r}. Pass "
                "example={...}: keyword inputs as the network's forward takes them."
            )
        if getattr(self._config, "is_encoder_decoder", False) and "decoder_input_ids" in self._names:
            made["decoder_input_ids"] = self._tokens(self._rows, self._vocabulary)
        return made

    @property
    def _is_dual(self) -> bool:
        """Whether text and image are two inputs (CLIP), not an image placed among the tokens."""
        config = self._config
        among = any(getattr(config, k, None) is not None for k in ("image_token_id", "image_token_index"))
        has_both = all(getattr(config, k, None) is not None for k in ("text_config", "vision_config"))
        return has_both and not among and {"input_ids", "pixel_values"} <= self._names

    @property
    def _rows(self) -> int:
        """Two examples; one where several would need a padding token to be told apart."""
        padded = getattr(self._config, "pad_token_id", None) is not None
        last_token = type(self._model).__name__.endswith("ForSequenceClassification")
        return _EXAMPLES if padded or not last_token else 1

    @property
    def _text_config(self) -> Any:
        return getattr(self._config, "text_config", None) or self._config

    @property
    def _vocabulary(self) -> int:
        return int(getattr(self._text_config, "vocab_size", 2))

    def _tokens(self, rows: int, kinds: int) -> Tensor:
        """Draw tokens, none of them the padding token, which some networks leave out."""
        padding = getattr(self._text_config, "pad_token_id", None)
        drawn = torch.randint(0, max(kinds, 1), (rows, _TOKENS), generator=self._generator)
        return drawn if padding is None else torch.where(drawn == padding, (drawn + 1) % max(kinds, 1), drawn)

    def _text(self) -> dict[str, Tensor]:
        made = {"input_ids": self._tokens(self._rows, self._vocabulary)}
        if "attention_mask" in self._names:
            made["attention_mask"] = torch.ones(self._rows, _TOKENS, dtype=torch.int64)
        if "token_type_ids" in self._names and int(getattr(self._config, "type_vocab_size", None) or 0) > 1:
            made["token_type_ids"] = (torch.arange(_TOKENS) > _TOKENS // 2).long().repeat(self._rows, 1)
        return made

    def _image(self) -> Tensor:
        config = getattr(self._config, "vision_config", None) or self._config
        size = getattr(config, "image_size", None) or _IMAGE_SIZE
        height, width = (size, size) if isinstance(size, int) else size
        return self._noise(_EXAMPLES, int(getattr(config, "num_channels", 3)), height, width)

    def _sound(self) -> Tensor:
        config = self._config
        bands, positions = (
            getattr(config, "num_mel_bins", None),
            getattr(config, "max_source_positions", None),
        )
        if bands and positions:
            return self._noise(_EXAMPLES, bands, 2 * positions)
        if bands and getattr(config, "max_length", None):
            return self._noise(_EXAMPLES, config.max_length, bands)
        return self._noise(_EXAMPLES, _SAMPLES)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)
