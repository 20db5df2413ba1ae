"""A segmenter as a file: safetensors that say how to build it again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tokcomp.dense.segmenter import Segmenter
from tokcomp.files import replacing

FORMAT, VERSION = "tokcomp.segmenter", 1


@dataclass(frozen=True)
class SegmenterSettings:
    """How a segmenter is built; JSON data.

    ``img_size`` is (height, width); ``model_kwargs`` are timm's, ``{"depth": 4}`` say.
    """

    model: str
    img_size: tuple[int, int]
    head: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def build(self, *, pretrained: bool = False, **more: Any) -> Segmenter:
        """A new segmenter in evaluation mode, whose encoder gives every token; ``more`` goes to timm too.

        Args:
            pretrained: load timm's weights into the encoder, their position embeddings resampled to ``img_size``.
        """
        import timm

        options = {"num_classes": 0, "global_pool": "", "img_size": self.img_size, **self.model_kwargs}
        encoder = timm.create_model(self.model, pretrained=pretrained, **options, **more)
        return Segmenter(encoder, len(self.classes), self.head).eval()


def save_segmenter(
    path: Path, segmenter: Segmenter, settings: SegmenterSettings, facts: Mapping[str, Any] | None = None
) -> None:
    """Write weights, settings and ``facts`` (JSON data); the file is there whole or as it was before."""
    from safetensors.torch import save

    metadata = {"format": FORMAT, "version": str(VERSION), "settings": json.dumps(asdict(settings))}
    metadata["facts"] = json.dumps(dict(facts or {}))
    tensors = {key: value.detach().cpu().contiguous() for key, value in segmenter.state_dict().items()}
    with replacing(path) as file:
        file.write(save(tensors, metadata=metadata))


def load_segmenter(
    path: Path, img_size: tuple[int, int] | None = None, **more: Any
) -> tuple[Segmenter, SegmenterSettings]:
    """The segmenter of a file, in evaluation mode.

    Args:
        path: of :func:`save_segmenter`.
        img_size: run it at another size than it was trained at.
        more: goes to timm, ``drop_path_rate`` say.

    Raises:
        ValueError: the file is not there, is not a segmenter's, or does not fit what it says.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"the segmenter must be a file, got '{path}', which is not there")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: must be a segmenter of tokcomp dense train, got no safetensors ({error})") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path}: must be a segmenter of tokcomp dense train, got another kind of safetensors")
    if metadata.get("version") != str(VERSION):
        version = metadata.get("version")
        raise ValueError(f"{path}: version must be {VERSION}, got {version!r}; another tokcomp wrote it")
    data = json.loads(metadata["settings"])
    tuples = {name: tuple(data[name]) for name in ("img_size", "classes", "mean", "std")}
    settings = SegmenterSettings(**{**data, **tuples})
    try:
        segmenter = settings.build(**more)
        segmenter.load_state_dict(weights)
    except (RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: does not fit the model that it names, {settings.model}: {error}") from error
    if img_size is not None and img_size != settings.img_size:
        encoder: Any = segmenter.encoder
        encoder.set_input_size(img_size)
    return segmenter, settings
