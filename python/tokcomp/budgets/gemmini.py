"""An analytic model of Gemmini, Berkeley's systolic-array generator: latency and power of a ViT (DiffRate, App. B.2).

docs/budgets.md gives the equations, the source of each constant, and what was checked against the paper. All of it is
arithmetic on tensors: hardware points are the first dimension [P, 1], token counts the second [T].
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from tokcomp.adapters import UnsupportedModelError, find_adapter
from tokcomp.adapters.timm_vit.embedding import is_plain_projection
from tokcomp.budgets.base import check_number
from tokcomp.cost import TokenCounts

#: Table 7: the values that each parameter may have.
SPACE: dict[str, tuple[float, ...]] = {
    "tile_rows": (1, 2, 4, 8),
    "tile_columns": (1, 2, 4, 8),
    "mesh_rows": (4, 8, 16, 32),
    "mesh_columns": (4, 8, 16, 32),
    "bus_bits": (64, 128, 256, 512),
    "scratchpad_banks": (1, 2, 4, 8, 16),
    "scratchpad_mb": (0.25, 0.5, 1, 2, 4),
    "accumulator_kb": (64, 128, 256, 512, 1024),
}
#: Rows and columns of output that may be held at once: powers of two, in rows and in array widths.
_TILE_ROWS = tuple(2.0**power for power in range(3, 11))
_TILE_WIDTHS = tuple(2.0**power for power in range(7))


@dataclass(frozen=True)
class Gemmini:
    """A point of Table 7's space. The defaults are Gemmini's own: 16 x 16 PEs, 256 KB scratchpad, 64 KB accumulator.

    Raises:
        ValueError: a parameter is not one of Table 7's values.
    """

    tile_rows: int = 1  # PEs of a tile: combinational, no register between them
    tile_columns: int = 1
    mesh_rows: int = 16  # tiles of the mesh: registers between them
    mesh_columns: int = 16
    bus_bits: int = 128  # DMA width
    scratchpad_banks: int = 4
    scratchpad_mb: float = 0.25
    accumulator_kb: int = 64

    def __post_init__(self) -> None:
        for name, values in SPACE.items():
            value = getattr(self, name)
            if value not in values:
                raise ValueError(f"{name} must be one of {', '.join(f'{one:g}' for one in values)}, got {value!r}")

    def to_json(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Technology:
    """Clock and energies. The defaults are for 8-bit inputs and 32-bit sums; docs/budgets.md gives their sources.

    Raises:
        ValueError: a value is negative or not finite.
    """

    clock_mhz: float = 305.0  # for tiles of one PE; a tile's chain of adders lowers it
    tile_delay: float = 1.7 / 15  # increase of the cycle per further PE in a tile's column
    images_per_second: float = 1e3 / 68.1  # rate at which the power is computed
    energy_scale: float = 1.0  # factor on the five energies that follow, which are for 45 nm
    mac_pj: float = 0.3  # 8-bit multiplication and 32-bit addition
    pe_pj: float = 0.3  # registers of a PE, per multiply-add
    idle_pj: float = 0.03  # clock of a PE, per cycle, busy or idle
    sram_pj: float = 1.25  # per byte of an 8 KB bank; grows with the square root of the bank
    dram_pj: float = 0.0  # per byte outside the accelerator
    static_mw_per_pe: float = 0.005
    static_mw_per_kb: float = 0.01

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), positive=field.name == "clock_mhz")

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Gemm(NamedTuple):
    """``repeats`` products [m, k] x [k, n]; None stands for the token count."""

    m: int | None
    k: int | None
    n: int | None
    repeats: int = 1


class Rows(NamedTuple):
    """A row-wise function (softmax, LayerNorm) of ``rows`` per token of ``length`` (None: the token count) elements."""

    rows: int
    length: int | None


class Layer(NamedTuple):
    """The work that depends on one token count."""

    gemms: tuple[Gemm, ...]
    rows: tuple[Rows, ...]


class Workload(NamedTuple):
    """A ViT as matrix products: the fixed work, and each block's parts before and after its compression."""

    fixed: Layer
    attention: tuple[Layer, ...]
    mlp: tuple[Layer, ...]
    num_tokens: int

    @classmethod
    def of(cls, model: nn.Module) -> Workload:
        """The workload of one image.

        Raises:
            TypeError: (UnsupportedModelError) it is not a timm VisionTransformer, or one whose cost is unknown.
        """
        adapter: Any = find_adapter(model)
        if not isinstance(model, VisionTransformer):
            raise UnsupportedModelError(
                f"the Gemmini model supports timm's VisionTransformer, not a {type(model).__name__}"
            )
        own: Any = model
        if not is_plain_projection(own.patch_embed):
            raise UnsupportedModelError(
                f"the Gemmini model supports patches of one convolution, not a {type(own.patch_embed).__name__}"
            )
        patches = adapter.num_tokens(model) - adapter.geometry(model).num_prefix_tokens
        weight = own.patch_embed.proj.weight
        fixed = [Gemm(patches, weight[0].numel(), weight.shape[0])]
        for name in ("attn_pool", "head", "head_dist"):
            fixed += _linears(getattr(own, name, None), tokens=1)
        attention, mlp = [], []
        for block in own.blocks:
            heads, width = block.attn.num_heads, block.attn.head_dim
            products = (Gemm(None, width, None, heads), Gemm(None, None, width, heads))
            norm = Rows(1, own.embed_dim)
            attention.append(Layer((*_linears(block.attn), *products), (norm, Rows(heads, None))))
            mlp.append(Layer(tuple(_linears(block.mlp)), (norm,)))
        return cls(Layer(tuple(fixed), ()), tuple(attention), tuple(mlp), adapter.num_tokens(model))


def _linears(module: nn.Module | None, tokens: int | None = None) -> list[Gemm]:
    parts = () if module is None else module.modules()
    return [Gemm(tokens, part.in_features, part.out_features) for part in parts if isinstance(part, nn.Linear)]


class Hardware(NamedTuple):
    """Hardware points side by side, each field [P, 1] float64, in the units that the equations use."""

    rows: Tensor  # PEs that a weight tile's column spans, R
    columns: Tensor  # PEs across, C
    stages: Tensor  # registers from one corner of the mesh to the other
    bus: Tensor  # bytes per cycle
    banks: Tensor
    scratchpad: Tensor  # bytes
    accumulator: Tensor  # bytes
    cycle_ms: Tensor

    @classmethod
    def of(cls, values: Mapping[str, Tensor], technology: Technology) -> Hardware:
        """Made from Table 7's parameters by name, each [P]."""
        own = {name: values[name].double().unsqueeze(-1) for name in SPACE}
        slowdown = 1 + technology.tile_delay * (own["tile_rows"] - 1)
        return cls(
            rows=own["tile_rows"] * own["mesh_rows"],
            columns=own["tile_columns"] * own["mesh_columns"],
            stages=own["mesh_rows"] + own["mesh_columns"],
            bus=own["bus_bits"] / 8,
            banks=own["scratchpad_banks"],
            scratchpad=own["scratchpad_mb"] * 2**20,
            accumulator=own["accumulator_kb"] * 2**10,
            cycle_ms=slowdown / (technology.clock_mhz * 1e3),
        )


class Work(NamedTuple):
    """The cost of some work: each field [P, T]."""

    cycles: Tensor
    macs: Tensor
    scratchpad_bytes: Tensor
    accumulator_bytes: Tensor
    dram_bytes: Tensor

    def plus(self, other: Work, times: int = 1) -> Work:
        return Work(*(mine + times * theirs for mine, theirs in zip(self, other, strict=True)))


def gemm_work(m: Tensor, k: Tensor, n: Tensor, hardware: Hardware) -> Work:
    """One product [m, k] x [k, n], weight-stationary, double-buffered, in its best tiling.

    Args:
        m, k, n: token counts or constants, broadcastable to [P, T] with the hardware.
        hardware: [P, 1] points.
    """
    m, k, n, *points = torch.broadcast_tensors(m.double(), k.double(), n.double(), *hardware)
    own = Hardware(*(point.unsqueeze(-1) for point in points))
    m, k, n = m.unsqueeze(-1), k.unsqueeze(-1), n.unsqueeze(-1)  # [P, T, 1]
    pairs = torch.tensor(list(itertools.product(_TILE_ROWS, _TILE_WIDTHS)), dtype=m.dtype, device=m.device)
    i, j = pairs[:, 0], pairs[:, 1] * own.columns  # [tilings], [P, T, tilings]: rows and columns of a tile of outputs
    row_tiles, column_tiles = (m / i).ceil(), (n / j).ceil()
    k_tiles, n_tiles = (k / own.rows).ceil(), (n / own.columns).ceil()
    sums_fit = 4 * torch.minimum(i, m) * j <= own.accumulator / 2
    half = own.scratchpad / 2
    left, right, out = m * k, k * n, m * n  # bytes
    # Nothing stays; a panel of rows stays while all columns pass; a panel of columns stays while all rows pass.
    orders = torch.stack(
        [
            _where((torch.minimum(i, m) + j) * own.rows <= half, left * column_tiles + right * row_tiles),
            _where(torch.minimum(i, m) * k + j * own.rows <= half, left + right * row_tiles),
            _where(k * torch.minimum(j, n) + torch.minimum(i, m) * own.rows <= half, left * column_tiles + right),
        ]
    )
    bytes_in = _where(sums_fit, orders.amin(0))
    compute = own.rows * torch.maximum((m / own.rows).ceil(), row_tiles) * k_tiles * n_tiles
    stalls = bytes_in / own.columns / own.banks
    cycles = torch.maximum(compute + stalls, (bytes_in + out) / own.bus)
    # The fastest tiling; among equals, the one that moves least, outside and inside.
    best = (cycles + 1e-6 * (bytes_in + right * row_tiles)).argmin(-1, keepdim=True)

    def chosen(values: Tensor) -> Tensor:
        return values.expand_as(cycles).gather(-1, best).squeeze(-1)

    bytes_in = chosen(bytes_in)
    streamed = (left * n_tiles).squeeze(-1) + chosen(right * row_tiles)
    return Work(
        cycles=chosen(cycles) + (own.rows + own.stages).squeeze(-1),
        macs=(m * k * n).squeeze(-1),
        scratchpad_bytes=streamed + bytes_in,
        accumulator_bytes=(8 * out * k_tiles).squeeze(-1),
        dram_bytes=bytes_in + out.squeeze(-1),
    )


def _where(fits: Tensor, value: Tensor) -> Tensor:
    return torch.where(fits, value, math.inf)


def rows_work(rows: Tensor, length: Tensor, hardware: Hardware) -> Work:
    """Softmax or LayerNorm of ``rows`` rows on the way out of the accumulator: three passes, one row of the array per
    cycle."""
    rows, length, *points = torch.broadcast_tensors(rows.double(), length.double(), *hardware)
    own = Hardware(*points)
    cycles = 3 * rows * (length / own.columns).ceil()
    elements = rows * length
    moved = 2 * elements  # in and out, 8 bits
    return Work(
        cycles=torch.maximum(cycles, moved / own.bus),
        macs=torch.zeros_like(cycles),
        scratchpad_bytes=torch.zeros_like(cycles),
        accumulator_bytes=4 * 3 * elements,
        dram_bytes=moved,
    )


def layer_work(layer: Layer, tokens: Tensor, hardware: Hardware) -> Work:
    """All of a layer at each token count [T] on each hardware point: fields [P, T]."""
    tokens = tokens.double()
    nothing = torch.zeros(torch.broadcast_shapes(hardware.rows.shape, tokens.shape), dtype=tokens.dtype).to(
        tokens.device
    )
    total = Work(*(nothing for _ in Work._fields))

    def size(value: int | None) -> Tensor:
        return tokens if value is None else torch.full_like(tokens, value)

    for gemm in layer.gemms:
        total = total.plus(gemm_work(size(gemm.m), size(gemm.k), size(gemm.n), hardware), gemm.repeats)
    for rows in layer.rows:
        total = total.plus(rows_work(rows.rows * tokens, size(rows.length), hardware))
    return total


def latency_ms(work: Work, hardware: Hardware) -> Tensor:
    """[P, T] milliseconds."""
    return work.cycles * hardware.cycle_ms


def energy_mj(work: Work, hardware: Hardware, technology: Technology) -> Tensor:
    """[P, T] millijoules, without the power drawn at rest."""
    sram = technology.sram_pj / math.sqrt(8 * 2**10)
    scratchpad = sram * (hardware.scratchpad / hardware.banks).sqrt()
    accumulator = sram * (hardware.accumulator / 2).sqrt()  # two banks, as in Gemmini's default
    picojoules = (
        (technology.mac_pj + technology.pe_pj) * work.macs
        + technology.idle_pj * hardware.rows * hardware.columns * work.cycles
        + scratchpad * work.scratchpad_bytes
        + accumulator * work.accumulator_bytes
        + technology.dram_pj * work.dram_bytes
    )
    return technology.energy_scale * picojoules * 1e-9


def static_mw(hardware: Hardware, technology: Technology) -> Tensor:
    """[P, 1] milliwatts at rest."""
    kilobytes = (hardware.scratchpad + hardware.accumulator) / 2**10
    return technology.static_mw_per_pe * hardware.rows * hardware.columns + technology.static_mw_per_kb * kilobytes


class GemminiCost:
    """Latency and power of one model on any hardware points: exact, stepwise values.

    Args:
        model: a timm VisionTransformer.
        technology: clock, energies, image rate.
    """

    def __init__(self, model: nn.Module, technology: Technology | None = None) -> None:
        self.workload = Workload.of(model)
        self.technology = Technology() if technology is None else technology

    def tables(self, values: Mapping[str, Tensor], tokens: Tensor) -> dict[Layer, Tensor]:
        """Each kind of layer at each token count [T]: [2, P, T] ms and mW, without the fixed part."""
        hardware = Hardware.of(values, self.technology)
        layers = dict.fromkeys((*self.workload.attention, *self.workload.mlp))
        return {layer: self._metrics(layer_work(layer, tokens, hardware), hardware) for layer in layers}

    def fixed(self, values: Mapping[str, Tensor]) -> Tensor:
        """The part that does not depend on token counts: [2, P] ms and mW (embedding, head; power at rest)."""
        hardware = Hardware.of(values, self.technology)
        one = torch.ones(1, dtype=torch.float64, device=hardware.rows.device)
        both = self._metrics(layer_work(self.workload.fixed, one, hardware), hardware)
        rest = static_mw(hardware, self.technology)
        return (both + torch.stack([torch.zeros_like(rest), rest])).squeeze(-1)

    def _metrics(self, work: Work, hardware: Hardware) -> Tensor:
        power = self.technology.images_per_second * energy_mj(work, hardware, self.technology)
        return torch.stack([latency_ms(work, hardware), power])

    def __call__(self, values: Mapping[str, Tensor], counts: TokenCounts) -> Tensor:
        """[2, P] ms and mW of the whole model at these counts [L], on each of P points."""
        hardware = Hardware.of(values, self.technology)
        total = self.fixed(values)
        for layers, tokens in ((self.workload.attention, counts.num_in), (self.workload.mlp, counts.num_out)):
            for layer in dict.fromkeys(layers):  # equal blocks at once
                blocks = [index for index, one in enumerate(layers) if one == layer]
                distinct, times = tokens.detach().double()[blocks].unique(return_counts=True)
                metrics = self._metrics(layer_work(layer, distinct, hardware), hardware)
                total = total + metrics @ times.to(metrics.dtype)
        return total

    @torch.no_grad()
    def range(self, values: Mapping[str, Tensor], counts: TokenCounts) -> tuple[list[float], list[float]]:
        """The least and the most of all points, each in ms and mW, at these counts [L]."""
        # So many points at a time that their tilings [P, T, tilings] stay in a core's cache.
        parts = [self(dict(zip(values, part, strict=True)), counts).aminmax(dim=1) for part in _chunks(values)]
        least, most = (torch.stack(ends).aminmax(dim=0) for ends in zip(*parts, strict=True))
        return least.min.tolist(), most.max.tolist()


def _chunks(values: Mapping[str, Tensor], length: int = 1024) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(value.split(length) for value in values.values()), strict=True)


def points_of(hardware: Sequence[Gemmini]) -> dict[str, Tensor]:
    """Table 7's parameters of these points by name, each [P]."""
    return {name: torch.tensor([getattr(one, name) for one in hardware], dtype=torch.float64) for name in SPACE}


@lru_cache(maxsize=1)
def every_point() -> dict[str, Tensor]:
    """The whole of Table 7's space: each parameter [128000]."""
    grids = torch.meshgrid(*(torch.tensor(values, dtype=torch.float64) for values in SPACE.values()), indexing="ij")
    return {name: grid.flatten() for name, grid in zip(SPACE, grids, strict=True)}


def can_be_generated(values: Mapping[str, Tensor]) -> Tensor:
    """[P] bool: whether Gemmini's generator accepts the point.

    It requires a square array, and banks whose rows (of one array width) are a multiple of the array's height.
    """
    rows, columns = (values[f"tile_{side}"] * values[f"mesh_{side}"] for side in ("rows", "columns"))
    scratchpad_rows = values["scratchpad_mb"] * 2**20 / values["scratchpad_banks"] / columns
    accumulator_rows = values["accumulator_kb"] * 2**10 / 2 / (4 * columns)
    return (rows == columns) & (scratchpad_rows % rows == 0) & (accumulator_rows % rows == 0)
