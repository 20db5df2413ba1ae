"""A segmenter as a file: safetensors that say how to rebuild it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from tokcomp.dense.segmenter import Segmenter
from tokcomp.files import write_whole
from tokcomp.reading import parse_json, read_tensors, tensors_to_bytes

FORMAT, VERSION = "tokcomp.segmenter", 1
#: Arguments of timm's that would have it read something besides this file.
_OUTSIDE = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}

#: Of an image for a model that takes any size.
_MOST_PIXELS = 8192**2


@dataclass(frozen=True)
class SegmenterSettings:
    """How a segmenter is built; JSON data.

    ``img_size`` is (height, width); ``model_kwargs`` are timm's, such as ``{"depth": 4}``.
    """

    model: str
    img_size: tuple[int, int]
    head: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, pretrained: bool = False, **more: Any) -> Segmenter:
        """A new segmenter in evaluation mode, whose encoder returns every token; ``more`` is also passed to timm.

        Args:
            pretrained: load timm's weights into the encoder, their position embeddings resampled to ``img_size``.
        """
        import timm

        options: dict[str, Any] = {"num_classes": 0, **self.model_kwargs, **more}
        if not is_hierarchical(self.model):
            options = {"global_pool": "", "img_size": self.img_size, **options}
        encoder: Any = timm.create_model(self.model, pretrained=pretrained, **options)
        if is_hierarchical(self.model):
            encoder.reset_classifier(0, "", reset_other=True)  # its norm would never be trained
        return Segmenter(encoder, len(self.classes), self.head).eval()


def save_segmenter(
    path: Path, segmenter: Segmenter, settings: SegmenterSettings, facts: Mapping[str, Any] | None = None
) -> None:
    """Write weights, settings and ``facts`` (JSON data); the file is written whole or left as it was."""
    metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(asdict(settings))}
    metadata["facts"] = json.dumps(dict(facts or {}))
    write_whole(path, tensors_to_bytes(segmenter.state_dict(), metadata))


def load_segmenter(
    path: Path, img_size: tuple[int, int] | None = None, **more: Any
) -> tuple[Segmenter, SegmenterSettings]:
    """The segmenter of a file, in evaluation mode.

    Args:
        path: a file written by :func:`save_segmenter`.
        img_size: run it at another size than it was trained at.
        more: passed to timm, such as ``drop_path_rate``.

    Nothing is downloaded: the file names one of timm's own models and holds all of its weights.

    Raises:
        ValueError: the file does not exist, is not a segmenter's, is damaged, or does not fit its own description.
    """
    if not path.is_file():
        raise ValueError(f"the segmenter must be a file, got '{path}', which does not exist")
    try:
        weights, metadata = read_tensors(path, "a segmenter of tokcomp dense train")
    except OSError as error:
        raise ValueError(
            f"{path}: must be a segmenter of tokcomp dense train, got no readable file ({error})"
        ) from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: must be a segmenter of tokcomp dense train, got another kind of safetensors")
    if metadata.get("version") != str(VERSION):
        version = metadata.get("version")
        raise ValueError(f"{path}: version must be {VERSION}, got {version!r}; another tokcomp wrote it")
    try:
        settings = _settings(parse_json(metadata["settings"]), weights)
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: the metadata must say how the segmenter is built ({error})") from error
    try:
        segmenter = settings.build(**more)
        segmenter.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError, AssertionError, ArithmeticError, LookupError) as error:
        raise ValueError(f"{path}: does not fit the model that it names, {settings.model}: {error}") from error
    if img_size is not None and img_size != settings.img_size and not segmenter.hierarchical:
        encoder: Any = segmenter.encoder
        encoder.set_input_size(img_size)
    return segmenter, settings


def _settings(data: Any, weights: Mapping[str, Tensor]) -> SegmenterSettings:
    """Settings that a file may have: of timm's own models, and of nothing larger than the weights beside them."""
    tuples = {name: tuple(data[name]) for name in ("img_size", "classes", "mean", "std")}
    settings = SegmenterSettings(**{**data, **tuples})
    options = settings.model_kwargs
    if not is_timms_own(settings.model):
        raise ValueError(f"model must be one of timm's own, got {settings.model!r}")
    if not isinstance(options, dict) or _OUTSIDE & options.keys():
        raise ValueError(f"model_kwargs must describe only the model, got {options!r}")
    # Before memory is taken for them.
    largest = max((size for tensor in weights.values() for size in tensor.shape), default=0)
    if options.get("depth", 0) > len(weights) or any(number > largest for number in _numbers(options)):
        raise ValueError(f"model_kwargs must be those of the weights, got {options!r}")
    positions, patch = (weights.get(f"encoder.{name}") for name in ("pos_embed", "patch_embed.proj.weight"))
    pixels = positions.shape[1] * patch[0, 0].numel() if positions is not None and patch is not None else largest**2
    if is_hierarchical(settings.model):
        pixels = _MOST_PIXELS
    if len(settings.img_size) != 2 or settings.img_size[0] * settings.img_size[1] > pixels:
        raise ValueError(f"img_size must be that of the weights, got {settings.img_size}")
    return settings


def is_timms_own(model: Any) -> bool:
    """Whether a model's name needs no hub, which is asked in the network, and no folder."""
    import timm

    return isinstance(model, str) and not set(model) & set(":/\\") and timm.is_model(model)


def is_hierarchical(model: str) -> bool:
    """Whether a name of timm's is a MetaFormer's, whose maps a pyramid reads."""
    from timm.models import is_model_in_modules

    return is_model_in_modules(model, {"metaformer"})


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)
    elif isinstance(value, (int, float)):
        yield value
