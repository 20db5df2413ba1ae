"""A comparison's cells on disk: one file each, written whole, and used again only if it was made the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from tokcomp.files import write_whole
from tokcomp.reading import digest, read_json


def key_of(facts: Mapping[str, Any]) -> str:
    """A digest of JSON data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def weights_digest(model: nn.Module) -> str:
    """A digest of a model's weights: other weights, other results."""
    return digest(dict(model.state_dict()))[:16]


class Cells:
    """Files ``cells/<key>.json`` of a folder; the key is a digest of everything that the cell follows from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "cells"

    def load(self, key: str) -> dict[str, Any] | None:
        """The cell of that key; None if it is not there, or is not whole."""
        try:
            data = read_json(self.folder / f"{key}.json")
        except (OSError, ValueError):
            return None
        return data["cell"] if isinstance(data, dict) and isinstance(data.get("cell"), dict) else None

    def store(self, key: str, facts: Mapping[str, Any], cell: Mapping[str, Any]) -> None:
        text = json.dumps({"facts": facts, "cell": cell}, indent=1, allow_nan=False)
        write_whole(self.folder / f"{key}.json", text + "\n")
