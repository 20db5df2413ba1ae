"""The small models of the library's tests."""

from __future__ import annotations

from tests.library.conftest import make_vit, meta_model  # noqa: F401
