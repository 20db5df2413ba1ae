"""What the model card of a plugin says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tokcomp.hub import Bars, Card
from tokcomp.tocom.layers import describe
from tokcomp.tocom.variants import STEPS

if TYPE_CHECKING:
    from tokcomp.tocom.plugin import ToCom


def card_of(plugin: ToCom) -> Card:
    """The card, with a picture of how much each step changes the weights."""
    provenance = plugin.provenance or {}
    facts = {name: value for name, value in provenance.items() if name != "command"}
    facts |= {
        "method": plugin.method or "any",
        "degrees": f"0 to {plugin.max_degree}",
        "rank of a step": plugin.rank,
        "made for": describe(plugin.widths),
        "parameters": sum(parameter.numel() for parameter in plugin.parameters()),
    }
    bars = None
    if plugin.arithmetic == STEPS:
        norms = step_norms(plugin)
        caption = "Change of the weights by each step to a higher degree (Frobenius norm)"
        bars = Bars(caption, norms, max(norms) or 1.0, first=1)
    else:
        facts["arithmetic"] = plugin.arithmetic
    command = provenance.get("command")
    return Card(
        title="ToCom plugin",
        tag="tocom",
        lead="Moves a vision transformer that was trained at one degree of token compression to another, without "
        "training (Token Compensator, ECCV 2024).",
        use="""
import tokcomp

plugin = tokcomp.ToCom.from_pretrained("owner/name", model)  # or this folder
plugin.fold(model, source=0, target=8)
tokcomp.compress(model, tokcomp.ToMe(8))
""",
        facts=facts,
        bars=bars,
        command=command if isinstance(command, str) else None,
    )


@torch.no_grad()
def step_norms(plugin: ToCom) -> list[float]:
    """The Frobenius norm of each step's matrices up @ down, over q and v of all blocks together."""
    squares = torch.zeros(plugin.max_degree, dtype=torch.float64)
    for ups, downs in ((plugin.q_up, plugin.q_down), (plugin.v_up, plugin.v_down)):
        for up, down in zip(ups, downs, strict=True):
            left = up.double().cpu().unflatten(1, (plugin.max_degree, plugin.rank))  # [A, degrees, rank]
            right = down.double().cpu().unflatten(0, (plugin.max_degree, plugin.rank))  # [degrees, rank, C]
            squares += (left.transpose(0, 1) @ right).square().sum((1, 2))
    return squares.sqrt().tolist()
