"""What Triton's interpreter needs to run beside newer NumPy."""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter


def take_indices_from_arrays() -> None:
    """Let kernels' scalars be indices: of an array of one element, as in Triton 3.6, NumPy 2.4 makes no int."""
    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
