"""What an adapter for a model family has to offer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn

from tokcomp.methods.base import Geometry, Method, TokenShape

if TYPE_CHECKING:
    from tokcomp.adapters.projections import Projection
    from tokcomp.blocks.search import BlockSearch
    from tokcomp.methods.learned import PassageMethod


class UnsupportedModelError(TypeError):
    """A model, or a module inside it, that no adapter understands. The model is left unchanged."""


class BlockCost(NamedTuple):
    """Multiply-adds of one block: ``projections * N + 2 * width * N^2 + mlp * M`` for N tokens in and M out."""

    projections: int
    width: int
    mlp: int


class Cost(NamedTuple):
    """Multiply-adds of one image: ``embed * N`` for N tokens in, the blocks, and ``head_per_token * M + head``.

    ``head`` is all that does not depend on the tokens: the classifier, and a backbone or stem before the blocks.
    """

    embed: int
    blocks: tuple[BlockCost, ...]
    head_per_token: int
    head: int


class Adapter(ABC):
    """A model family."""

    #: For messages: how people call the family.
    family: str

    @abstractmethod
    def claims(self, model: nn.Module) -> bool:
        """Whether ``model`` is of this family."""

    @abstractmethod
    def check(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError naming the first module that is not understood."""

    @abstractmethod
    def geometry(self, model: nn.Module) -> Geometry:
        """Depth and token counts."""

    @abstractmethod
    def num_tokens(self, model: nn.Module) -> int:
        """Tokens, prefix included, that enter block 0 at the model's own image size."""

    def grid(self, model: nn.Module, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the patches, prefix tokens aside, for images of this size.

        Raises:
            ValueError: such images cannot be cut into patches.
            UnsupportedModelError: this family does not say.
        """
        raise UnsupportedModelError(f"{self.family}: the grid of its patches is not known")

    def tokens_of_batch(self, model: nn.Module, batch: Any) -> list[int]:
        """Tokens that enter block 0 of each image of a batch that is no tensor of images.

        Raises:
            TypeError: this family takes images [B, C, H, W] alone.
        """
        raise TypeError(f"images must be a tensor [B, C, H, W], got {type(batch).__name__}")

    def cost(self, model: nn.Module, img_size: tuple[int, int] | None = None) -> Cost:
        """Multiply-adds, for :func:`tokcomp.flops`, of images of this height and width; None: of the model's own.

        Raises:
            UnsupportedModelError: this family does not say.
        """
        raise UnsupportedModelError(f"{self.family}: its multiply-adds are not known")

    def validate(self, model: nn.Module, method: Method) -> None:  # noqa: B027  any method, as a rule
        """Raise if this model's pooling or head cannot work with ``method``."""

    @abstractmethod
    def patch(self, model: nn.Module, method: Method) -> None:
        """Make ``model`` compress by ``method``. Called on a plain model that passed every check; must not fail."""

    def check_attention(self, model: nn.Module, method: Method) -> None:
        """Raise UnsupportedModelError if a model compressed by ``method`` cannot keep its own attention."""
        raise UnsupportedModelError(f"{self.family}: its own attention cannot be kept; leave attention at 'tokcomp'")

    def keep_attention(self, model: nn.Module) -> None:  # noqa: B027  those that can
        """Make a compressed model run its own attention until :meth:`unpatch`."""

    def keeps_attention(self, model: nn.Module) -> bool:
        """Whether ``model`` is compressed and runs its own attention."""
        return False

    def check_int8(self, model: nn.Module) -> None:
        """Raise if the products of a model, plain or compressed, cannot be computed in int8."""
        raise UnsupportedModelError(f"{self.family}: its products cannot be computed in int8; timm's ViTs' can")

    def use_int8(self, model: nn.Module) -> None:  # noqa: B027  those that can
        """Make a compressed model compute its products in int8 until :meth:`unpatch`."""

    def uses_int8(self, model: nn.Module) -> bool:
        """Whether ``model`` is compressed and computes its products in int8."""
        return False

    @abstractmethod
    def unpatch(self, model: nn.Module) -> None:
        """Undo :meth:`patch`; does nothing to a plain model."""

    @abstractmethod
    def method(self, model: nn.Module) -> Method | None:
        """The method that ``model`` is compressed by, None for a plain model."""

    @abstractmethod
    def sources(self, model: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor | None]]:
        """Run the model: the last block's tokens [B, M, C], and each block's source map (None: nothing dropped)."""

    def check_passage(self, model: nn.Module, method: PassageMethod) -> None:
        """Raise unless ``model`` can run ``method`` and has the trained parts that it may need, for its settings.

        Raises:
            ValueError: it has none, or they are for other settings.
            UnsupportedModelError: this family, or its head, takes no such method.
        """
        raise UnsupportedModelError(
            f"{self.family}: {type(method).__name__} is for plain vision transformers; use ToMe"
        )

    def token_shape(self, model: nn.Module) -> TokenShape:
        """The shape of its blocks' tokens.

        Raises:
            UnsupportedModelError: this family does not say.
        """
        raise UnsupportedModelError(f"{self.family}: the shape of its tokens is not known")

    def holder(self, model: nn.Module) -> nn.Module:
        """The module that holds the trained parts of learned methods."""
        return model

    def image_shape(self, model: nn.Module) -> tuple[int, int, int]:
        """Channels, height and width of the model's own images.

        Raises:
            UnsupportedModelError: this family does not say.
        """
        raise UnsupportedModelError(f"{self.family}: the shape of its images is not known")

    def num_classes(self, model: nn.Module) -> int:
        """Classes that the model's logits are for; 0: it gives features."""
        return int(getattr(model, "num_classes", 0))

    def logits(self, output: Any) -> Tensor:
        """Logits, or pooled features [B, K], of what the model's forward returned."""
        return output

    def projections(self, model: nn.Module) -> list[Projection]:
        """Where the weights are that make q and v, one per block in running order; ToCom changes them.

        Raises:
            UnsupportedModelError: this family does not say, or a block's come from something else than layers.
        """
        raise UnsupportedModelError(f"{self.family}: which weights make q and v is not known, so ToCom can change none")

    def warm_up(self, model: nn.Module) -> None:  # noqa: B027  nothing, as a rule
        """Make now what the first batch would otherwise have to make: packed weights, say."""

    def check_search(self, model: nn.Module) -> None:
        """Raise UnsupportedModelError if a plain model of this family has nothing that a search could go by."""
        raise UnsupportedModelError(f"{self.family}: a schedule cannot be searched on it")

    def reads_patches(self, model: nn.Module) -> bool:
        """Whether the head reads patch tokens; the search then leaves the last block as it is."""
        return True

    def search(self, model: nn.Module, images: Tensor, blocks: Sequence[BlockSearch]) -> Tensor:
        """Logits of a plain model whose attention and reduction ``blocks`` do, one per compressible block."""
        raise UnsupportedModelError(f"{self.family}: a schedule cannot be searched on it")
