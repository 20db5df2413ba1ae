"""The small models of the library's tests."""

from tests.library.conftest import images_for, make_vit, published  # noqa: F401
from tests.train.conftest import free_port  # noqa: F401
