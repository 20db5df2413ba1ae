"""One of a run's targets: its proxies, how they learn, and what is logged about them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tokcomp.budgets import Budget
from tokcomp.cost import TokenCounts
from tokcomp.runs.recipe import Recipe, make_optimizer
from tokcomp.search.model import DiffRateSearch


class Target:
    """One target's search: its proxies, their optimizer, and sums for the log."""

    def __init__(self, name: str, search: DiffRateSearch, budgets: Sequence[Budget], recipe: Recipe) -> None:
        self.name, self.search, self.budgets = name, search, list(budgets)
        self.parameters = [parameter for parameter in search.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(recipe, self.parameters)
        device = self.parameters[0].device
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, cross entropy, steps since the last row
        self.rows: list[dict[str, float]] = []

    @torch.no_grad()
    def budgets_learn(self, step: int) -> None:
        """The budgets' own steps, with the counts that the step has produced."""
        learning = [budget for budget in self.budgets if type(budget).step is not Budget.step]
        if learning:
            counts = self.search.counts()
            for budget in learning:
                with torch.enable_grad():
                    budget.step(counts, step)

    def columns(self) -> list[str]:
        depth = len(self.search.prune)
        per_block = [f"{name}_{block}" for name in ("kept", "prune", "merge") for block in range(depth)]
        return ["loss", "cross_entropy", "lr", "gflops", *self.costs_of(None), "top1", *per_block]

    def costs_of(self, counts: TokenCounts | None) -> dict[str, float]:
        """The budgets' costs by name; repeated names are numbered."""
        costs: dict[str, float] = {}
        for budget in self.budgets:
            name, number = budget.name, 2
            while name in costs:
                name, number = f"{budget.name}_{number}", number + 1
            costs[name] = 0.0 if counts is None else float(budget.cost(counts))
        return costs

    def flat_gradient(self, *numbers: Tensor) -> Tensor:
        """The gradients and further numbers in one row."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        return torch.cat([*gradients, *(number.to(gradients[0].dtype).reshape(1) for number in numbers)])

    def take_gradient(self, flat: Tensor) -> None:
        start = 0
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.copy_(flat[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    @torch.no_grad()
    def values(self) -> dict[str, float]:
        """The current state of the search: the log's row, without the figures of the steps themselves."""
        counts, schedule = self.search.counts(), self.search.schedule()
        values: dict[str, float] = {"gflops": float(self.search.flops(counts)) / 1e9, **self.costs_of(counts)}
        lists = {"kept": counts.num_out.tolist(), "prune": schedule.num_prune_kept, "merge": schedule.num_merge_kept}
        for name, numbers in lists.items():
            values.update({f"{name}_{block}": int(number) for block, number in enumerate(numbers or ())})
        return values

    def state(self) -> dict[str, Any]:
        return {
            "logits": self.search.proxy_state(),
            "optimizer": self.optimizer.state_dict(),
            "sums": self.sums,
            "budgets": [budget.state_dict() for budget in self.budgets],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.search.load_proxy_state(state["logits"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.sums.copy_(state["sums"])
        for budget, saved in zip(self.budgets, state["budgets"], strict=True):
            budget.load_state_dict(saved)
