"""The section of docs/results.md on what GPUs would show, with what was measured beside it once there is any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.page.tables import Record, markdown, number, paragraph

#: Batch sizes of the table over batches.
_BATCHES = (1, 8, 32, 128, 1024)


class Predicted:
    """Predictions by place, and the measurements that belong beside them."""

    def __init__(self, data: Mapping[str, Any], records: Sequence[Record]) -> None:
        self.data = data
        self._rates = {
            (row["gpu"], row["model"], row["entry"], row["batch"], row["precision"]): row for row in data["rows"]
        }
        self._records = records

    def rate(self, gpu: str, model: str, entry: str, batch: int, precision: str = "float16") -> float:
        return self._rates[gpu, model, entry, batch, precision]["images_per_second"]

    def measured(self, gpu: str, model: str, entry: str, batch: int, precision: str = "float16") -> float | None:
        """Images per second of the latest record of that GPU, of that model at that cost; None where there is none."""
        gflops = self._rates[gpu, model, entry, batch, precision]["gflops"]
        for record in reversed(self._records):
            if gpu not in record.provenance["device"]:
                continue
            for row in record.data["rows"]:
                same = row.get("model") == model and row.get("name") == entry
                same = same and (row.get("batch"), row.get("precision")) == (batch, precision)
                if same and abs(row.get("gflops", 0) / gflops - 1) < 0.02:
                    return row["images_per_second"]
        return None


def predicted_section(data: Mapping[str, Any], records: Sequence[Record]) -> str:
    """The section. ``records``: those of GPUs."""
    predicted = Predicted(data, records)
    state = "" if records else " **No GPU has run any of this.**"
    parts = [
        "## Predicted for GPUs",
        paragraph(
            f"Predicted, not measured.{state} The multiply-adds and bytes of each kernel are counted",
            "(`benchmarks.model.traffic_triton`; tests compare the counts with the loads, stores and products of the",
            "interpreted kernels, exactly), and its time is that of its slowest resource at an assumed share of the",
            "device's rate. Figures: [predictions.json](../benchmarks/results/predictions.json). A measurement",
            "of the same",
            "model, batch and precision appears beside its prediction as soon as its record is in",
            "`benchmarks/results/`.",
        ),
        "![Predicted images per second of DeiT-S against batch size, and speed over the published code by model.]"
        "(images/results-predicted.png)",
    ]
    for gpu in data["gpus"]:
        parts += [f"### {gpu}, batch 1024, float16: images per second, predicted", _models(predicted, gpu)]
    parts += [
        paragraph(
            "; ".join(f"*{name}*: {text}" for name, text in data["stacks"].items())
            + ". *Uncompressed*: tokcomp's kernels",
            "without compression. *Timm compiled*: the conventional stack without compression. The entry that measures",
            "*tokcomp* is `tokcomp-graph`. *Published, in the paper*: DiffRate's Table 1, measured by its authors.",
        ),
        "### Batch sizes on an H200, float16: images per second of tokcomp, predicted",
        "In brackets: speed over our own uncompressed model, over the published code.",
        _batches(predicted, "H200"),
        "### Where the time would go: H200, batch 1024, float16, predicted",
        *_kernels(data),
        "### Operators on an H200, batch 1024, float16: bytes counted, time predicted",
        paragraph(
            "A block of 197 tokens, 192 after pruning, 180 after merging; `bipartite_merge` makes 180 of the 197.",
            "*Least*: every row that is needed",
            "moved once;",
            "*floor*: that at the full copy rate. *Moved*: by our kernels between memory and the chip; *loads",
            "and stores*: asked",
            "of the caches.",
        ),
        _operators(data),
        "### Assumptions",
        _assumptions(data),
    ]
    return "\n\n".join(parts)


def _subjects(data: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Title, model, budget, in order."""
    return list(dict.fromkeys((row["title"], row["model"], row["budget"]) for row in data["rows"]))


def _models(predicted: Predicted, gpu: str) -> str:
    def rate(entry: str) -> Any:
        return lambda subject: number(predicted.rate(gpu, subject[1], entry, 1024))

    def ratio(entry: str, other: str) -> Any:
        return lambda subject: (
            f"{predicted.rate(gpu, subject[1], entry, 1024) / predicted.rate(gpu, subject[1], other, 1024):.2f}"
        )

    def measured(subject: tuple[str, str, float]) -> str:
        found = predicted.measured(gpu, subject[1], "tokcomp-graph", 1024)
        return "-" if found is None else number(found)

    def of_predicted(subject: tuple[str, str, float]) -> str:
        found = predicted.measured(gpu, subject[1], "tokcomp-graph", 1024)
        return "-" if found is None else f"{found / predicted.rate(gpu, subject[1], 'tokcomp-graph', 1024):.2f}"

    columns = [
        ("model", lambda subject: f"{subject[0]}, {subject[2]:g} G"),
        ("ideal", rate("ideal")),
        ("planned", rate("planned")),
        ("**tokcomp**", rate("tokcomp-graph")),
        ("linear_gelu", rate("tokcomp-graph-linear_gelu")),
        ("uncompressed", rate("tokcomp-graph-uncompressed")),
        ("conventional", rate("conventional")),
        ("timm compiled", rate("timm-compiled")),
        ("published", rate("published")),
        ("tokcomp / ideal", ratio("tokcomp-graph", "ideal")),
        ("/ published", ratio("tokcomp-graph", "published")),
        ("/ timm compiled", ratio("tokcomp-graph", "timm-compiled")),
        ("/ uncompressed", ratio("tokcomp-graph", "tokcomp-graph-uncompressed")),
        ("measured", measured),
        ("measured / predicted", of_predicted),
    ]
    paper: Mapping[str, Any] = predicted.data["paper"]
    if paper["gpu"] == gpu:
        known: Mapping[str, int] = paper["images_per_second"]
        columns.insert(
            9, ("published, in the paper", lambda subject: number(known[subject[0]]) if subject[0] in known else "")
        )
    return markdown(columns, _subjects(predicted.data))


def _batches(predicted: Predicted, gpu: str) -> str:
    def cell(batch: int) -> Any:
        def text(subject: tuple[str, str, float]) -> str:
            ours, whole, published = (
                predicted.rate(gpu, subject[1], entry, batch)
                for entry in ("tokcomp-graph", "tokcomp-graph-uncompressed", "published")
            )
            found = predicted.measured(gpu, subject[1], "tokcomp-graph", batch)
            measured = "" if found is None else f", measured {number(found)}"
            return f"{number(ours)} ({ours / whole:.2f}x, {ours / published:.2f}x{measured})"

        return text

    columns: list[tuple[str, Any]] = [("model", lambda subject: subject[0])]
    columns += [(f"batch {batch}", cell(batch)) for batch in _BATCHES]
    return markdown(columns, _subjects(predicted.data))


def _kernels(data: Mapping[str, Any]) -> list[str]:
    columns = [
        ("kernel", lambda part: f"`{part['kernel']}`"),
        ("launches", lambda part: number(part["launches"])),
        ("GFLOP in tiles", lambda part: number(part["gflop"])),
        ("MB", lambda part: number(part["megabytes"])),
        ("us", lambda part: number(part["us"])),
        ("share", lambda part: f"{100 * part['share']:.1f} %"),
        ("bound by", lambda part: part["bound"]),
    ]
    parts = []
    for title in ("DeiT-S", "DeiT-B"):
        rows = [part for part in data["kernels"] if part["title"] == title]
        parts += [f"{title} at its published schedule:", markdown(columns, rows)]
    return parts


def _operators(data: Mapping[str, Any]) -> str:
    columns = [
        ("operator", lambda row: row["operator"]),
        ("C", lambda row: number(row["channels"])),
        ("kernels", lambda row: number(row["kernels"])),
        ("least, MB", lambda row: number(row["least_megabytes"])),
        ("moved, MB", lambda row: number(row["moved_megabytes"])),
        ("moved / least", lambda row: f"{row['moved_megabytes'] / row['least_megabytes']:.2f}"),
        ("loads and stores, MB", lambda row: number(row["cache_megabytes"])),
        ("floor, us", lambda row: number(row["floor_us"])),
        ("predicted, us", lambda row: number(row["predicted_us"])),
        ("predicted / floor", lambda row: f"{row['predicted_us'] / row['floor_us']:.2f}"),
        ("CUDA C++, us", lambda row: number(row["predicted_cuda_us"]) if row["predicted_cuda_us"] else ""),
    ]
    return markdown(columns, data["operators"])


def _assumptions(data: Mapping[str, Any]) -> str:
    columns = [
        ("GPU", lambda gpu: gpu["name"]),
        ("products, TFLOP/s", lambda gpu: number(gpu["matrix_flops_per_s"] / 1e12)),
        ("copy, TB/s", lambda gpu: number(gpu["copy_bytes_per_s"] / 1e12)),
        ("L2, TB/s", lambda gpu: number(gpu["cache_bytes_per_s"] / 1e12)),
        ("attention tiles, TFLOP/s", lambda gpu: number(gpu["tile_flops_per_s"] / 1e12)),
        ("exponentials, T/s", lambda gpu: number(gpu["exponentials_per_s"] / 1e12)),
        ("multiprocessors", lambda gpu: number(gpu["processors"])),
    ]
    values: Mapping[str, Any] = data["assumptions"]
    microseconds = {key: f"{1e6 * value:.1f}" for key, value in values.items() if key.endswith("_seconds")}
    compressing, plain = values["eager_launches_per_block"]
    text = paragraph(
        f"Products of tuned libraries reach {values['product_share']:.0%} of that rate, in Triton",
        f"{values['triton_product_share']:.0%} of what those do, less where tiles do",
        "not fill the",
        f"multiprocessors; passes over memory {values['memory_share']:.0%} of the copy rate. Kernels of a",
        "CUDA graph are",
        f"{microseconds['graph_gap_seconds']} us apart, others {microseconds['stream_gap_seconds']}; none",
        "takes less than",
        f"{microseconds['least_kernel_seconds']} us. The published code launches {compressing} kernels in a",
        "block under",
        f"autocast ({plain} without compression), {microseconds['eager_launch_seconds']} us each from Python.",
        "Each tensor is",
        "read from memory once per kernel; what a kernel reads again comes from the L2. Not modelled: clocks that fall",
        "under load, PyTorch's allocator, the copy of the images to the GPU.",
    )
    return f"{markdown(columns, list(data['gpus'].values()))}\n\n{text}"
