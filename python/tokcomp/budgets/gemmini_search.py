"""Latency and power on Gemmini as budgets, with a search of the hardware as well (DiffRate, App. B.2, Eq. 15-18)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokcomp.budgets.base import Budget, check_number, check_target, least_counts
from tokcomp.budgets.gemmini import (
    SPACE,
    Gemmini,
    GemminiCost,
    Technology,
    can_be_generated,
    every_point,
    points_of,
)
from tokcomp.budgets.staircase import Staircase
from tokcomp.cost import TokenCounts, counts_of
from tokcomp.runs.steps import derived_seed

#: The cost model's results, in the order of their first dimension: name, unit.
METRICS = (("gemmini_latency", "ms"), ("gemmini_power", "mW"))
#: Number of points whose loss is compared before one of them is chosen.
LIKELIEST = 32
#: Distinguishes the Gumbel noise's use of a seed from all others.
_NOISE = 101


def log_cosh(x: Tensor) -> Tensor:
    """log(cosh(x)) of Eq. 16, without overflow."""
    return x.abs() + F.softplus(-2 * x.abs()) - math.log(2)


class GemminiSearch:
    """A Gemmini shared by a latency budget and a power budget, and searched in alternation with the rates.

    Rates (Eq. 17): :attr:`budgets` hold the hardware fixed. Hardware (Eq. 18): :meth:`hardware_step`, which the first
    budget's ``step`` calls, holds the rates fixed and moves the parameters' logits by Adam and a straight-through
    Gumbel softmax. docs/budgets.md says where this departs from the equations as printed, and why.

    Args:
        model: a timm VisionTransformer.
        target_ms, target_mw: targets, at least one of them: milliseconds per image, and milliwatts.
        latency_weight, power_weight: lambda_la and lambda_pw of Eq. 15. Far from its target, the gradient of Eq. 16 is
            one per ms or mW, times the weight.
        hardware: the point where the hardware's search starts, or the fixed hardware if it is not searched.
        search_hardware: whether the hardware learns.
        learning_rate: learning rate for the hardware's logits.
        temperature: temperature of the Gumbel softmax.
        seed: seeds its noise, which is a function of seed and step.
        technology: clock and energies.
        granularity: the search's granularity, which determines the smallest reachable costs.

    Raises:
        TargetError: no reachable schedule meets the target on any hardware that Gemmini can generate (or on the given
            one if it is not searched); the message gives both ends of the reachable range.
        TypeError: (UnsupportedModelError) the model is not understood.
        ValueError: there is no target, or a number is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        target_ms: float | None = None,
        target_mw: float | None = None,
        latency_weight: float = 1.0,
        power_weight: float = 1.0,
        hardware: Gemmini | None = None,
        search_hardware: bool = True,
        learning_rate: float = 0.05,
        temperature: float = 1.0,
        seed: int = 0,
        technology: Technology | None = None,
        granularity: int = 1,
    ) -> None:
        if target_ms is None and target_mw is None:
            raise ValueError("a Gemmini budget needs target_ms, target_mw or both, got neither")
        check_number("learning_rate", learning_rate, positive=True)
        self.temperature = check_number("temperature", temperature, positive=True)
        self.seed = seed
        self.search_hardware = search_hardware
        self.cost = GemminiCost(model, technology)
        self._start = Gemmini() if hardware is None else hardware
        self._weights = torch.tensor(
            [
                0.0 if target_ms is None else check_number("latency_weight", latency_weight),
                0.0 if target_mw is None else check_number("power_weight", power_weight),
            ],
            dtype=torch.float64,
        )
        self._allowed = _allowed_points()
        self._places = {
            name: torch.searchsorted(torch.tensor(values, dtype=torch.float64), self._allowed[name])
            for name, values in SPACE.items()
        }
        if search_hardware and not bool(can_be_generated(points_of([self._start]))):
            raise ValueError(f"hardware must be a point that Gemmini can generate, a square array, got {self._start}")
        with torch.no_grad():
            counts = least_counts(model, granularity), counts_of(model)
            ends = torch.stack([self.cost(points_of([self._start]), one)[:, 0] for one in counts], 1)  # [2, 2]
            self._uncompressed = ends[:, 1].tolist()
        targets = (("target_ms", target_ms), ("target_mw", target_mw))
        self.budgets: list[Budget] = []
        reach: list[list[float]] | None = None  # the least and the most that any point costs, each in ms and mW
        for metric, (name, target) in enumerate(targets):
            if target is None:
                continue
            target = check_number(name, target, positive=True)
            smallest, largest = ends[metric].tolist()
            where = f"{METRICS[metric][1]} on this Gemmini"
            if search_hardware and not smallest <= target <= largest:  # the start cannot; perhaps another can
                if reach is None:
                    reach = [self.cost.range(self._allowed, one)[end] for end, one in enumerate(counts)]
                smallest, largest = (end[metric] for end in reach)
                where = f"{METRICS[metric][1]} on any Gemmini of Table 7"
            check_target(name, target, where, smallest=smallest, uncompressed=largest)
            self.budgets.append(_GemminiBudget(self, metric, target, leads=not self.budgets))
        self._targets = torch.tensor([0.0 if target is None else target for _, target in targets], dtype=torch.float64)
        # The starting value is e times as likely as each other value: enough to begin there, little enough to leave.
        self.logits = {
            name: torch.tensor(
                [float(value == getattr(self._start, name)) for value in values], dtype=torch.float64
            ).requires_grad_()
            for name, values in SPACE.items()
        }
        self.optimizer = torch.optim.Adam(list(self.logits.values()), lr=learning_rate)
        self._hardware = self._start
        self._tables: _Tables | None = None

    def hardware(self) -> Gemmini:
        """The point for which the rates are currently searched; Gemmini can generate it."""
        return self._hardware

    def costs(self, counts: TokenCounts) -> Tensor:
        """[2] ms and mW on :meth:`hardware`: exact, stepwise values, with smoothed gradients to the counts (Eq. 17)."""
        if self._tables is None or self._tables.hardware != self._hardware:
            self._tables = _Tables(self.cost, self._hardware)
        return self._tables(counts, counts.num_in.device)

    def hardware_step(self, counts: TokenCounts, step: int) -> Tensor | None:
        """Move the hardware's logits once, with the rates fixed (Eq. 18), and choose a point by them.

        A point is drawn by Gumbel softmax. For each of its parameters, every value of Table 7 is tried with the others
        as drawn, and the gradient for the value's probability is the loss at that point: sum of weight * log cosh(E -
        T).

        Args:
            counts: [L] the search's counts, on any device; they are moved to the CPU, and no gradient is taken.
            step: number of the step, which determines the noise.

        Returns:
            The loss of the point chosen, 0-dim, without gradient; None if the hardware is not searched.
        """
        if not self.search_hardware:
            return None
        generator = torch.Generator().manual_seed(derived_seed(self.seed, step, _NOISE))
        soft: list[Tensor] = []
        drawn: dict[str, float] = {}
        for name, logits in self.logits.items():
            noise = -torch.empty_like(logits).exponential_(generator=generator).log()  # Gumbel's distribution
            soft.append(((logits + noise) / self.temperature).softmax(0))
            drawn[name] = SPACE[name][int(soft[-1].detach().argmax())]
        tried = _columns([{**drawn, name: value} for name, values in SPACE.items() for value in values])
        cpu = TokenCounts(counts.num_in.detach().cpu(), counts.num_out.detach().cpu())
        self.optimizer.zero_grad()
        (torch.cat(soft) * self._losses(tried, cpu)).sum().backward()
        self.optimizer.step()
        return self._choose(cpu)

    @torch.no_grad()
    def _choose(self, counts: TokenCounts) -> Tensor:
        """Choose the best among the likeliest points that Gemmini can generate and the last choice; returns its
        loss."""
        likely = self._log_probability().topk(LIKELIEST).indices
        values = {
            name: torch.cat([column[likely], _columns([self._hardware.to_json()])[name]])
            for name, column in self._allowed.items()
        }
        losses = self._losses(values, counts)
        best = int(losses.argmin())
        self._hardware = _point({name: float(column[best]) for name, column in values.items()})
        return losses[best]

    def _log_probability(self) -> Tensor:
        """[A] log probability of each point that Gemmini can generate, up to a constant."""
        score = torch.zeros_like(self._allowed["bus_bits"])
        for name, place in self._places.items():
            score += self.logits[name].detach().log_softmax(0)[place]
        return score

    @torch.no_grad()
    def _losses(self, values: Mapping[str, Tensor], counts: TokenCounts) -> Tensor:
        """[P] the weighted sum of Eq. 16's losses at each point."""
        distances = self.cost(values, counts) - self._targets.unsqueeze(-1)
        return (self._weights.unsqueeze(-1) * log_cosh(distances)).sum(0)

    def state_dict(self) -> dict[str, Any]:
        """Logits, Adam's moments and the point: with the step number, all that is needed to resume exactly."""
        return {
            "hardware": self._hardware.to_json(),
            "logits": {name: logits.detach().clone() for name, logits in self.logits.items()},
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what :meth:`state_dict` returned.

        Raises:
            ValueError: it is not the state of a Gemmini search; nothing is changed.
        """
        logits = state.get("logits", {})
        shapes = {name: tuple(value.shape) for name, value in self.logits.items()}
        if (
            not {"hardware", "optimizer"} <= state.keys()
            or {name: tuple(value.shape) for name, value in logits.items()} != shapes
        ):
            raise ValueError(
                "the state must be that of a Gemmini search: logits for Table 7's parameters, point, optimizer"
            )
        hardware = _point(state["hardware"])
        self.optimizer.load_state_dict(state["optimizer"])
        with torch.no_grad():
            for name, value in logits.items():
                self.logits[name].copy_(value)
        self._hardware = hardware


class _GemminiBudget(Budget):
    """Eq. 16 for one of the metrics. The first of a search's budgets leads: its step moves the hardware."""

    def __init__(self, search: GemminiSearch, metric: int, target: float, *, leads: bool) -> None:
        self.name, self.unit = METRICS[metric]
        self.target, self.weight = float(target), float(search._weights[metric])
        self.search, self._metric, self._leads = search, metric, leads

    def cost(self, counts: TokenCounts) -> Tensor:
        return self.search.costs(counts)[self._metric]

    def loss(self, counts: TokenCounts) -> Tensor:
        return log_cosh(self.cost(counts) - self.target)

    def step(self, counts: TokenCounts, step: int) -> None:
        if self._leads:
            self.search.hardware_step(counts, step)

    def state_dict(self) -> dict[str, Any]:
        return self.search.state_dict() if self._leads and self.search.search_hardware else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self._leads and self.search.search_hardware:
            self.search.load_state_dict(state)
        else:
            super().load_state_dict(state)

    def describe(self) -> dict[str, Any]:
        return {
            **super().describe(),
            "uncompressed": self.search._uncompressed[self._metric],
            "searched": self.search.search_hardware,
            "start": self.search._start.to_json(),
            "hardware": self.search.hardware().to_json(),
            "technology": self.search.cost.technology.to_json(),
        }


class _Tables:
    """A model's costs on one point as functions of the token counts."""

    def __init__(self, cost: GemminiCost, hardware: Gemmini) -> None:
        self.hardware = hardware
        workload, values = cost.workload, points_of([hardware])
        reach = max(16, hardware.tile_rows * hardware.mesh_rows, hardware.tile_columns * hardware.mesh_columns)
        with torch.no_grad():
            tables = cost.tables(values, torch.arange(workload.num_tokens + 1))
            self._fixed = cost.fixed(values)[:, 0]
        stairs = {layer: Staircase(table[:, 0], reach) for layer, table in tables.items()}
        self._parts = [
            (stairs[layer], [block for block, one in enumerate(layers) if one == layer])
            for layers in (workload.attention, workload.mlp)
            for layer in dict.fromkeys(layers)
        ]
        self._num_attention = len(dict.fromkeys(workload.attention))

    def __call__(self, counts: TokenCounts, device: torch.device) -> Tensor:
        if self._fixed.device != device:
            self._fixed = self._fixed.to(device)
            self._parts = [(stairs.to(device), blocks) for stairs, blocks in self._parts]
        total = self._fixed
        for index, (stairs, blocks) in enumerate(self._parts):
            tokens = counts.num_in if index < self._num_attention else counts.num_out
            total = total + stairs(tokens[blocks]).sum(-1)
        return total


def _columns(rows: list[dict[str, float]]) -> dict[str, Tensor]:
    return {name: torch.tensor([row[name] for row in rows], dtype=torch.float64) for name in SPACE}


def _allowed_points() -> dict[str, Tensor]:
    values = every_point()
    allowed = can_be_generated(values)
    return {name: value[allowed] for name, value in values.items()}


def _point(values: Mapping[str, float]) -> Gemmini:
    whole: dict[str, Any] = {name: value if name == "scratchpad_mb" else int(value) for name, value in values.items()}
    return Gemmini(**whole)
