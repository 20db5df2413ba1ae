"""An ONNX file's linear layers in int8, by ONNX Runtime's dynamic quantisation."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

#: By this in its metadata the quantiser knows a model that needs no preparation, and does not advise one.
_PREPARED = ("onnx.quant.pre_process", "onnxruntime.quant")


def quantiser() -> Any:
    """ONNX Runtime's quantisation.

    Raises:
        ImportError: onnxruntime, or the onnx that it needs for this, is not installed.
    """
    try:
        return importlib.import_module("onnxruntime.quantization")
    except ImportError as error:
        raise ImportError(f"int8 needs onnxruntime: pip install 'tokcomp[onnx]' onnxruntime ({error})") from error


def in_int8(proto: Any) -> Any:
    """The model with its products by constant weights in int8; it may be changed.

    Weights beforehand, a scale for each output; activations in each call, a scale for each tensor of the batch.
    Attention, merging and the patch embedding stay in float: both sides of the former are computed, and ONNX Runtime's
    int8 convolution is the slower one.
    """
    import onnx

    quantization = quantiser()
    key, value = _PREPARED
    proto.metadata_props.add(key=key, value=value)
    # Shapes are inferred anew: the quantiser of 1.23 transposes weights, and then stumbles over their old ones.
    del proto.graph.value_info[:]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        quantization.quantize_dynamic(
            proto, path, per_channel=True, op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        made = onnx.load(path)
    for entry in [one for one in made.metadata_props if one.key.startswith("onnx.")]:
        made.metadata_props.remove(entry)
    return made
