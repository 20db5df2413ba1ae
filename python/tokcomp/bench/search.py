"""A search step side by side: the published code's, as it is and with its backbone frozen, and ours.

A step is forward, loss and backward. All sides start from the same proxies, see the same images and take turns;
nothing is timed unless logits and proxy gradients agree on fresh images.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokcomp.adapters.timm_vit.embedding import image_shape
from tokcomp.bench.models import PRECISIONS, DisagreementError, create_model
from tokcomp.bench.published_search import PublishedSearch
from tokcomp.measure.timing import Samples, rotating
from tokcomp.search.model import DiffRateSearch

#: Who may take a step, in the order of tables: the published search; the same without gradients for the weights it does
#: not train; ours; ours with every token of the last block, dead or not.
COMPETITORS = ("published", "published-frozen", "tokcomp", "tokcomp-whole")
GRANULARITY = 4
#: Images that the correctness gate looks at.
GATE_IMAGES = 4
#: Weight of the squared multiply-adds, in G, in the loss of a timed step.
FLOPS_WEIGHT = 5.0


@dataclass(frozen=True)
class Row:
    """One competitor. ``speedup``: over the published search; median, least and most of the rounds.

    ``memory``: bytes at the peak of a step beyond what the model took before it; ``total_memory``: of all.
    """

    name: str
    batch: int
    precision: str
    images_per_second: float
    least_images_per_second: float
    most_images_per_second: float
    speedup: tuple[float, float, float]
    seconds: tuple[float, ...]
    memory: int
    total_memory: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class Step:
    """One competitor's search step on a model of its own."""

    def __init__(self, competitor: str, model: nn.Module, precision: str, *, granularity: int = GRANULARITY) -> None:
        if competitor not in COMPETITORS:
            raise ValueError(f"competitor must be one of {', '.join(COMPETITORS)}, got {competitor!r}")
        self.precision = PRECISIONS[precision]
        model = copy.deepcopy(model)
        self.search: Any
        if competitor.startswith("published"):
            self.search = PublishedSearch(model, granularity).to(next(model.parameters()).device)
            model.requires_grad_(competitor == "published")
        else:
            self.search = DiffRateSearch(model, granularity)
            if competitor == "tokcomp-whole":
                self.search._prefix_only_block = None
        self.search.eval()
        self.flops_weight = FLOPS_WEIGHT
        set_proxies(self.search)

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Logits of a step, whose gradients are left in the proxies."""
        self.search.zero_grad(set_to_none=True)
        half = self.precision != torch.float32
        with torch.autocast(images.device.type, self.precision) if half else nullcontext():
            logits, flops = self.search(images)
        loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
        (loss + self.flops_weight * (flops / 1e9).square()).backward()
        return logits.detach()

    def gradients(self) -> Tensor:
        """The proxies' gradients, one after the other."""
        proxies = (*self.search.prune, *self.search.merge)
        rows = [torch.zeros_like(one.logits) if one.logits.grad is None else one.logits.grad for one in proxies]
        return torch.cat(rows).double()


def set_proxies(search: Any) -> None:
    """Put a search where it is after some time: two thirds of the multiply-adds, kept numbers that fall."""
    depth = len(search.prune)
    for block in range(depth):
        for proxy, extra in ((search.prune[block], 0.0), (search.merge[block], 0.3)):
            places = torch.linspace(0, 1, len(proxy.logits), device=proxy.logits.device, dtype=proxy.logits.dtype)
            centre = 0.75 * (block + extra) / depth
            with torch.no_grad():
                proxy.logits.copy_(-20 * (places - centre).square())


def check_agreement(name: str, model: nn.Module, precision: str) -> dict[str, float]:
    """Compare a competitor's logits and proxy gradients on fresh random images; raises DisagreementError.

    The oracle is the published search in float64. In its own precision a competitor may be twice as far from it as the
    published search is, plus one rounding: for logits the median image counts, since a rounding that swaps two nearly
    equal tokens changes an image's logits in either; for gradients the sum over the images.
    """
    device = next(model.parameters()).device
    images, labels = draw(model, GATE_IMAGES)
    sides = {
        "oracle": Step("published", copy.deepcopy(model).double(), "float32"),
        "published": Step("published", model, precision),
        name: Step(name, model, precision),
    }
    sides["oracle"].search.double()
    set_proxies(sides["oracle"].search)
    logits, gradients = {}, {}
    for side, step in sides.items():
        step.flops_weight = 0.0  # it would drown what comes through the model
        logits[side] = step(images.double() if side == "oracle" else images, labels)
        gradients[side] = step.gradients()
    again = sides[name](images, labels)
    if not torch.equal(again, logits[name]) or not torch.equal(sides[name].gradients(), gradients[name]):
        raise DisagreementError(f"two steps of {name} on the same images differ")
    errors = {}
    for side in ("published", name):
        off = logits[side].double() - logits["oracle"]
        errors[f"{side} logits"] = (off.norm(dim=1) / logits["oracle"].norm(dim=1)).median().item()
        off = gradients[side] - gradients["oracle"]
        errors[f"{side} gradients"] = (off.norm() / gradients["oracle"].norm()).item()
    # Gradients carry eps = 1e-6 of the masked softmax, whose maximum the kernels hold constant.
    slack = torch.finfo(PRECISIONS[precision]).eps
    for what, floor in (("logits", slack), ("gradients", slack + 1e-5)):
        have, theirs = errors[f"{name} {what}"], errors[f"published {what}"]
        if not have <= 2 * theirs + floor:
            raise DisagreementError(
                f"{name}: {what} are {have:.3g} off in {precision} on {device.type}, the published search's "
                f"{theirs:.3g}: more than twice as far from float64"
            )
    return errors


def draw(model: Any, batch: int) -> tuple[Tensor, Tensor]:
    """Random images for the model, and labels."""
    device = next(model.parameters()).device
    return torch.randn(batch, *image_shape(model), device=device), torch.randint(
        0, model.num_classes, (batch,), device=device
    )


def compare_search(
    name: str,
    *,
    batch: int,
    precision: str,
    device: torch.device,
    measure: Callable[[Mapping[str, Callable[[], Any]]], Mapping[str, Samples]],
    competitors: Sequence[str] = COMPETITORS,
    **options: Any,
) -> list[Row]:
    """Gate our entries, then have ``measure`` time all competitors' steps in turns; rows of those that it timed.

    Args:
        name, options: of the timm model.
        batch: images per step.
        precision: a name in :data:`~tokcomp.bench.models.PRECISIONS`; other than float32 by autocast, on all sides.
        device: where to run.
        measure: times named calls in turns and gives each one's samples.
        competitors: some of :data:`COMPETITORS`, the published search among them.
    """
    model = create_model(name, device=device, **options)
    for competitor in competitors:
        if not competitor.startswith("published"):
            check_agreement(competitor, model, precision)
    steps = {competitor: Step(competitor, model, precision) for competitor in competitors}
    inputs = [draw(model, batch) for _ in range(2)]
    samples = measure({competitor: rotating(step, inputs) for competitor, step in steps.items()})
    rows = []
    for competitor in samples:
        if device.type == "cuda":
            memory, total = _cuda_memory(steps[competitor], inputs[0])
        else:
            memory, total = _cpu_memory(competitor, name, batch, precision, options)
        one = samples[competitor]
        rows.append(
            Row(
                name=competitor,
                batch=batch,
                precision=precision,
                images_per_second=batch / one.median,
                least_images_per_second=batch / one.most,
                most_images_per_second=batch / one.least,
                speedup=one.speedup_over(samples["published"]),
                seconds=one.seconds,
                memory=memory,
                total_memory=total,
            )
        )
    return rows


def _cuda_memory(step: Step, inputs: tuple[Tensor, Tensor]) -> tuple[int, int]:
    device = inputs[0].device
    step.search.zero_grad(set_to_none=True)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step(*inputs)
    torch.cuda.synchronize(device)
    used = torch.cuda.max_memory_allocated(device) - before
    own = sum(one.numel() * one.element_size() for one in (*step.search.parameters(), *step.search.buffers()))
    return used, used + own


def _cpu_memory(competitor: str, name: str, batch: int, precision: str, options: dict[str, Any]) -> tuple[int, int]:
    """In a process of its own: the allocator gives no peak, and what another side freed would be used again."""
    arguments = json.dumps([competitor, name, batch, precision, options])
    # Not `-m tokcomp.bench.search`: this very module is imported already by the time it would run.
    code = f"from tokcomp.bench.search import _print_cpu_memory as run; run({arguments!r})"
    path = [str(Path(__file__).parents[2]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {path!r}; {code}"],
        capture_output=True,
        text=True,
        check=True,
    )
    used, total = json.loads(done.stdout.splitlines()[-1])
    return used, total


def _print_cpu_memory(arguments: str) -> None:
    """Two steps of one competitor; prints the bytes at the peak beyond those before, and of the whole process."""
    competitor, name, batch, precision, options = json.loads(arguments)
    model = create_model(name, **options)
    step, inputs = Step(competitor, model, precision), draw(model, batch)
    before = _status_bytes("VmRSS")
    for _ in range(2):
        step(*inputs)
    peak = _status_bytes("VmHWM")
    print(json.dumps([peak - before, peak]))


def _status_bytes(name: str) -> int:
    """A figure of /proc/self/status. (getrusage's peak would be that of the process that started this one.)"""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
