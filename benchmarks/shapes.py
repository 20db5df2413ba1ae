"""The sizes that matter: blocks of the published models, and the rows of the DiffRate paper's Table 1."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BlockShape:
    """One compressing block of a published schedule: tokens in, left by pruning and by merging, class token counted."""

    model: str
    heads: int
    width: int  # of a head
    tokens: int
    num_prune_kept: int
    num_merge_kept: int

    @property
    def channels(self) -> int:
        return self.heads * self.width

    @property
    def id(self) -> str:
        return f"{self.model}-{self.tokens}to{self.num_prune_kept}to{self.num_merge_kept}"


#: The first compressing block of each schedule, and a later, smaller one of DeiT-S.
BLOCKS = (
    BlockShape("deit-t-0.6G", 3, 64, 197, 196, 187),
    BlockShape("deit-s-2.3G", 6, 64, 197, 192, 180),
    BlockShape("deit-s-2.3G", 6, 64, 156, 143, 127),
    BlockShape("deit-b-8.7G", 12, 64, 197, 192, 178),
    BlockShape("vit-l-31G", 16, 64, 197, 195, 191),
    BlockShape("vit-h-93G", 16, 80, 249, 248, 242),
)


@dataclass(frozen=True)
class PaperRow:
    """A method's line in Table 1: GFLOPs and images/s on an A100, batch 1024, fp16."""

    method: str
    gflops: float
    images_per_second: int


@dataclass(frozen=True)
class PaperModel:
    """A model of Table 1, its uncompressed line, and per budget one line for each method."""

    title: str
    name: str  # timm's
    gflops: float
    images_per_second: int
    budgets: dict[float, tuple[PaperRow, ...]]  # DiffRate's budget -> lines
    options: dict[str, Any] = field(default_factory=dict)


def _rows(evit: tuple[float, int], tome: tuple[float, int], diffrate: tuple[float, int]) -> tuple[PaperRow, ...]:
    return PaperRow("EViT", *evit), PaperRow("ToMe", *tome), PaperRow("DiffRate", *diffrate)


#: MAE models classify by average pooling; timm's tag has no classifier of its own.
_MAE = {"global_pool": "avg", "num_classes": 1000}


@dataclass(frozen=True)
class Subject:
    """A model at a published budget."""

    name: str  # timm's
    budget: float
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.name}-{self.budget}G"


#: What the speed goals are stated for, one budget a model.
SUBJECTS = {
    "deit-t": Subject("deit_tiny_patch16_224", 0.6),
    "deit-s": Subject("deit_small_patch16_224", 2.3),
    "deit-b": Subject("deit_base_patch16_224", 8.7),
    "vit-l": Subject("vit_large_patch16_224.mae", 31.0, _MAE),
    "vit-h": Subject("vit_huge_patch14_224.mae", 93.2, _MAE),
}

#: All of the table but LV-ViT-S, which timm does not have. MAE models take the place of their own checkpoints.
TABLE_1 = (
    PaperModel(
        "ViT-S (DeiT)",
        "deit_small_patch16_224",
        4.6,
        5039,
        {
            2.3: _rows((2.3, 8950), (2.3, 8874), (2.3, 8901)),
            2.9: _rows((3.0, 6807), (2.9, 6712), (2.9, 6744)),
        },
    ),
    PaperModel(
        "ViT-B (DeiT)",
        "deit_base_patch16_224",
        17.6,
        2130,
        {
            8.7: _rows((8.7, 4230), (8.8, 4023), (8.7, 4124)),
            11.5: _rows((11.5, 2886), (11.5, 2834), (11.5, 2865)),
        },
    ),
    PaperModel(
        "ViT-B (MAE)",
        "vit_base_patch16_224.mae",
        17.6,
        2130,
        {
            8.7: _rows((8.7, 4230), (8.8, 4023), (8.7, 4150)),
            11.5: _rows((11.5, 2886), (11.5, 2834), (11.5, 2865)),
        },
        _MAE,
    ),
    PaperModel(
        "ViT-L (MAE)",
        "vit_large_patch16_224.mae",
        61.6,
        758,
        {
            31.0: _rows((29.7, 1672), (31.0, 1550), (31.0, 1580)),
            42.3: _rows((39.6, 1089), (42.3, 1033), (42.3, 1045)),
        },
        _MAE,
    ),
    PaperModel(
        "ViT-H (MAE)",
        "vit_huge_patch14_224.mae",
        167.4,
        299,
        {
            93.2: _rows((99.1, 512), (92.9, 500), (93.2, 504)),
            103.4: _rows((112.9, 432), (103.4, 442), (103.4, 450)),
        },
        _MAE,
    ),
    PaperModel(
        "LV-ViT-S",
        "lvvit_s",
        6.6,
        3630,
        {3.9: (PaperRow("EViT", 3.9, 5077), PaperRow("DiffRate", 3.9, 5021))},
    ),
)
