"""What a user would run in place of tokcomp: other runtimes on the uncompressed model, each as its makers advise.

All but torchao take the model through ONNX, its shape fixed to the batch that is timed, and as many threads as PyTorch
has. They come with ``pip install 'tokcomp[bench]'``; one that is absent or does not fit says so in a
:class:`RivalError`.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokcomp.adapters.timm_vit.embedding import image_shape
from tokcomp.deploy.exported import export
from tokcomp.deploy.onnx_int8 import in_int8
from tokcomp.measure.instruction_sets import instruction_sets, level_in_force
from tokcomp_kernels.product_types import product_dtype

#: Opset from which LayerNormalization is one operator, which all of these have.
_OPSET = 17
#: ONNX Runtime's name of who runs, by rival and device type.
_PROVIDERS = {
    ("onnxruntime", "cpu"): "CPUExecutionProvider",
    ("onnxruntime-int8", "cpu"): "CPUExecutionProvider",
    ("tokcomp-onnx", "cpu"): "CPUExecutionProvider",
    ("tokcomp-onnx-int8", "cpu"): "CPUExecutionProvider",
    ("onnxruntime", "cuda"): "CUDAExecutionProvider",
    ("tensorrt", "cuda"): "TensorrtExecutionProvider",
}


class RivalError(RuntimeError):
    """A rival is not installed, or cannot do here what it would be compared with."""


def build_rival(
    name: str, model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int
) -> Callable[[Tensor], Tensor]:
    """Images [batch, C, H, W] to logits [batch, classes].

    Args:
        name: "onnxruntime", "onnxruntime-int8" (dynamic quantisation, a scale per output channel), "openvino",
            "openvino-int8" (of the same file), "tensorrt" (ONNX Runtime's provider).
        model: the plain model in float32. It stays as it is.
        dtype: what it computes in. OpenVINO takes float32 images and computes in bfloat16 itself.
        device: where to run.
        batch: images per call.

    Raises:
        RivalError: it is not installed, or has no such dtype or device.
    """
    in_openvino = name.startswith("openvino")
    core = _openvino_core(dtype, device) if in_openvino else None
    runtime, provider = (None, "") if in_openvino else _runtime(name, dtype, device)
    exported = to_onnx(model, torch.float32 if in_openvino else dtype, device, batch)
    if name.endswith("-int8"):
        exported = _prepared_int8(exported)
    if in_openvino:
        return _compiled_openvino(core, exported, dtype)
    return _session(runtime, provider, name, exported, dtype, device)


def build_exported(
    name: str, model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int
) -> Callable[[Tensor], Tensor]:
    """The same for a compressed model through :func:`tokcomp.export`, for a name in ``bench.entries.EXPORTED``.

    Raises:
        RivalError: the runtime is not installed, or has no such dtype or device.
        ImportError: onnxscript is not installed.
    """
    in_openvino = name.startswith("tokcomp-openvino")
    core = _openvino_core(dtype, device) if in_openvino else None
    runtime, provider = (None, "") if in_openvino else _runtime(name, dtype, device)
    quantize = "int8" if name.endswith("-int8") else None
    with tempfile.TemporaryDirectory() as folder:
        path = export(model, Path(folder) / "model.onnx", batch=batch, dynamic_batch=False, quantize=quantize)
        exported = path.read_bytes()
    if in_openvino:
        return _compiled_openvino(core, exported, dtype)
    return _session(runtime, provider, name, exported, dtype, device)


def _runtime(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, str]:
    """ONNX Runtime, and what of it runs this rival here."""
    provider = _PROVIDERS.get((name, device.type))
    if provider is None or dtype == torch.bfloat16 or (device.type == "cpu" and dtype != torch.float32):
        raise RivalError(f"{name} does not run a ViT in {str(dtype).removeprefix('torch.')} on {device.type}")
    found = instruction_sets()
    if device.type == "cpu" and found and level_in_force(found) != found["cpu"]:
        raise RivalError(f"ONNX Runtime cannot be kept from {found['cpu']}, which is switched off for all others")
    runtime = _imported("onnxruntime")
    if provider not in runtime.get_available_providers():
        raise RivalError(f"the installed onnxruntime has no {provider}")
    return runtime, provider


def _session(
    runtime: Any, provider: str, name: str, exported: bytes, dtype: torch.dtype, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """An ONNX file's bytes in ONNX Runtime, on images and logits in PyTorch's own memory."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors alone
    settings: dict[str, str] = {}
    if device.type == "cuda":
        stream = torch.cuda.current_stream(device)
        settings = {"device_id": str(stream.device_index), "user_compute_stream": str(stream.cuda_stream)}
        if name == "tensorrt":
            settings["trt_fp16_enable"] = str(dtype == torch.float16)
    session = runtime.InferenceSession(exported, options, providers=[(provider, settings)])
    if provider not in session.get_providers():  # which it replaces by the CPU without an error
        raise RivalError(f"onnxruntime cannot use its {provider} here")
    shape = tuple(session.get_outputs()[0].shape)

    def run(images: Tensor) -> Tensor:
        images = images.contiguous()
        logits = torch.empty(shape, dtype=dtype, device=device)
        binding = session.io_binding()
        for bind, label, tensor in ((binding.bind_input, "images", images), (binding.bind_output, "logits", logits)):
            element = str(tensor.dtype).removeprefix("torch.")
            bind(label, device.type, device.index or 0, element, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return logits

    return run


def quantised_by_torchao(model: nn.Module) -> nn.Module:
    """The model, in place, with linear layers in int8: activations by their range in each call, weights by output.

    Raises:
        RivalError: torchao is not installed.
    """
    quantization = _imported("torchao.quantization")
    quantization.quantize_(model, quantization.Int8DynamicActivationInt8WeightConfig())
    return model


def to_onnx(model: nn.Module, dtype: torch.dtype, device: torch.device, batch: int) -> bytes:
    """The model as an ONNX file's bytes: input "images" of a fixed shape, output "logits".

    Raises:
        RivalError: onnx is not installed.
    """
    _imported("onnx")
    images = torch.zeros(batch, *image_shape(model), dtype=dtype, device=device)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter that needs no more than onnx is called the older one
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            copy.deepcopy(model).to(dtype).eval(),
            (images,),
            path,
            dynamo=False,
            opset_version=_OPSET,
            input_names=["images"],
            output_names=["logits"],
        )
        return path.read_bytes()


def _prepared_int8(exported: bytes) -> bytes:
    """Its linear layers in int8, after ONNX Runtime's own preparation, as it advises."""
    onnx = _imported("onnx")
    with tempfile.TemporaryDirectory() as folder:
        source, ready = (Path(folder) / f"{name}.onnx" for name in ("float", "ready"))
        source.write_bytes(exported)
        _imported("onnxruntime.quantization.shape_inference").quant_pre_process(str(source), str(ready))
        return in_int8(onnx.load(ready)).SerializeToString()


#: What OpenVINO is asked to compute in.
_HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def _openvino_core(dtype: torch.dtype, device: torch.device) -> Any:
    """OpenVINO, if it runs this type there."""
    if device.type != "cpu" or dtype not in _HINTS:
        raise RivalError(f"openvino does not run in {str(dtype).removeprefix('torch.')} on {device.type} here")
    core = _imported("openvino").Core()
    # It offers bfloat16 by what the CPU has, but fails in the first layer if oneDNN's limit takes that away.
    offered = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if dtype == torch.bfloat16 and not (offered and product_dtype(dtype, "cpu") == dtype):
        raise RivalError("openvino has no bfloat16 on this CPU")
    return core


def _compiled_openvino(core: Any, exported: bytes, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """An ONNX file's bytes in OpenVINO."""
    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": _HINTS[dtype],
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = core.compile_model(core.read_model(exported), "CPU", settings)

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(compiled([images.contiguous().numpy()], share_inputs=True)[0])

    return run


def _imported(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise RivalError(f"{name} cannot be imported: pip install 'tokcomp[bench]' ({error})") from error
