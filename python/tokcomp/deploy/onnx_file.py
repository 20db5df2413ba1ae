"""A model as an ONNX file, for runtimes that know nothing of PyTorch or of these operators."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils import _pytree

from tokcomp.deploy.onnx_forms import FORMS
from tokcomp.deploy.onnx_int8 import in_int8, quantiser
from tokcomp.files import replacing

#: The first opset with all that is used here, LayerNormalization the youngest; the newest of the exporter's own choice.
OPSET = 18
DTYPES = (torch.float32, torch.float16)
#: What a protobuf message, and so a file with its weights inside, can hold.
_MOST_BYTES = 2**31 - 1


def check_onnx(model: nn.Module, dtype: torch.dtype, quantize: str | None = None) -> None:
    """Refuse what an ONNX file cannot be made of, before any work.

    Raises:
        ImportError: onnxscript is not installed, or for int8 onnxruntime.
        TypeError, ValueError: the weights are of a type that runtimes do not compute in, or too large for one file.
    """
    try:
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise ImportError(f"format='onnx' needs onnxscript: pip install 'tokcomp[onnx]' ({error})") from error
    if dtype not in DTYPES:
        names = " or ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise TypeError(f"model must be {names} for format='onnx', got {dtype}: convert it, as by model.float()")
    if quantize is not None:
        if dtype != torch.float32:
            raise TypeError(f"model must be float32 for quantize='int8', got {dtype}: convert it, as by model.float()")
        quantiser()
    nbytes = sum(one.numel() * one.element_size() for one in (*model.parameters(), *model.buffers()))
    if nbytes > _MOST_BYTES:
        raise ValueError(
            f"model must be below 2 GiB, which is all that one ONNX file holds, got {nbytes / 2**30:.1f} GiB of weights"
            + (": convert it, model.half()" if dtype == torch.float32 else "")
        )


def write_onnx(program: ExportedProgram, path: Path, facts: Mapping[str, str], quantize: str | None = None) -> None:
    """Write an exported program, whole or not at all.

    Its input is "images"; its output "logits" or, where the model returns several, what the model calls them. ``facts``
    become the file's metadata. ``quantize``: "int8", or None.
    """
    names = _output_names(program)
    plain = program.run_decompositions(FORMS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own use of what PyTorch is about to retire
        exported: Any = torch.onnx.export(
            plain,
            input_names=["images"],
            output_names=names,
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    proto = exported.model_proto
    for part in (*proto.graph.node, *proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del part.metadata_props[:]  # where each came from in the source, with paths of this machine
    if quantize is not None:
        proto = in_int8(proto)
    for name, value in facts.items():
        proto.metadata_props.add(key=name, value=value)
    with replacing(path) as file:
        file.write(proto.SerializeToString())


def _output_names(program: ExportedProgram) -> list[str]:
    spec = program.call_spec.out_spec
    if spec is None or spec.is_leaf():
        return ["logits"]
    leaves, _ = _pytree.tree_flatten_with_path(_pytree.tree_unflatten(range(spec.num_leaves), spec))
    return ["_".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path) for path, _ in leaves]
