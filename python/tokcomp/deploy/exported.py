"""tokcomp.export: a model in one file, compiled ahead of time for Python and C++ programs, or as ONNX."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from tokcomp.adapters.swap import original_class
from tokcomp.deploy.inputs import Inputs, check_images, checked_batch, inputs_of
from tokcomp.deploy.onnx_file import check_onnx, write_onnx
from tokcomp.deploy.watch import method_of, refuse_varying
from tokcomp.files import replacing
from tokcomp_kernels._version import __version__  # importing this registers the operators that packages call
from tokcomp_kernels.product_types import widened

#: Prefix of our keys in a package's metadata.
_PREFIX = "tokcomp_"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
#: What can be written: an AOTInductor package, or an ONNX file.
FORMATS = ("aoti", "onnx")


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    batch: int = 8,
    dynamic_batch: bool = True,
    max_batch: int = 1024,
    img_size: int | Sequence[int] | None = None,
    inductor_configs: Mapping[str, Any] | None = None,
    format: str | None = None,
    quantize: str | None = None,
) -> Path:
    """Write a model into one file, weights included: a compiled package, or an ONNX file. The model is not changed.

    A package ("aoti": ``torch.export`` and AOTInductor) needs neither timm nor this library to run: in Python, ``import
    tokcomp_kernels`` and ``torch._inductor.aoti_load_package``, or :func:`load_exported`, which checks its images; in
    C++, LibTorch and libtokcomp. Making it needs a C++ compiler; it is for the model's current type and device, and for
    this kind of processor.

    An ONNX file ("onnx", opset 18, input "images" [batch, C, H, W], output "logits") runs in ONNX Runtime, OpenVINO and
    TensorRT: the operators become sorts, gathers and matrix products, with neither a custom operator nor a scatter that
    adds. Making it needs ``pip install 'tokcomp[onnx]'``. A model that returns several tensors has as many outputs, by
    its own names.

    Args:
        model: in evaluation mode, compressed or plain, on the device where the package is to run, in the type in which
            it is to compute; for a package it must return one tensor of logits.
        path: the file to write, by convention ``.pt2`` or ``.onnx``; replaced if it exists.
        batch: number of images; with ``dynamic_batch``, the number to tune for.
        dynamic_batch: take any number of images, from 1 to ``max_batch`` for a package.
        max_batch: the largest batch of a package.
        img_size: side, or (height, width), of the images; None: the model's own.
        inductor_configs: further settings of ``torch._inductor.config``, such as ``{"max_autotune": True}``. On CPU
            ``freezing`` is set, which packs the weights for oneDNN.
        format: "aoti" or "onnx"; None: "onnx" for a path that ends in ``.onnx``, else "aoti".
        quantize: of an ONNX file, "int8": its linear layers in int8 by ONNX Runtime's dynamic quantisation.

    Returns:
        The path.

    Raises:
        ImportError: an ONNX file is wanted, and onnxscript, or for int8 onnxruntime, is not installed.
        TypeError: ``model`` is not a module, or of a type other than float32, float16 and, for a package, bfloat16.
        ValueError: it is in training mode, on the meta device or on several devices, has no image size, or keeps
            different numbers of tokens of different images; ``batch`` is below 1 or above ``max_batch``; the folder of
            ``path`` does not exist; ``format`` is unknown, or has no ``inductor_configs``; the weights exceed the 2 GiB
            of an ONNX file.
    """
    format = format_of(path, format)
    if format == "onnx" and inductor_configs:
        raise ValueError(f"inductor_configs must be left out for format='onnx', got {dict(inductor_configs)}")
    if quantize is not None and (quantize != "int8" or format != "onnx"):
        raise ValueError(f"quantize must be 'int8', for format='onnx' alone, got {quantize!r} for format={format!r}")
    inputs = inputs_of(model, img_size)
    if inputs.dtype not in _DTYPES.values():
        raise TypeError(f"model must be of {', '.join(_DTYPES)}, got {inputs.dtype}: convert it, as by model.float()")
    if checked_batch("batch", batch) > checked_batch("max_batch", max_batch) and dynamic_batch:
        raise ValueError(f"batch must be at most max_batch, {max_batch}, got {batch}")
    path = Path(path)
    if not path.parent.is_dir() or path.is_dir():
        raise ValueError(f"path must be a file in an existing folder, got '{path}'")
    model = getattr(model, "_orig_mod", model)
    refuse_varying(model, "export")
    if format == "onnx":
        check_onnx(model, inputs.dtype, quantize)
    lowest, highest = (1, max_batch) if dynamic_batch else (batch, batch)
    facts = {
        "version": __version__,
        "torch": torch.__version__,
        "model": original_class(model).__name__,
        "method": repr(method_of(model) or "none"),
        "channels": inputs.shape[0],
        "height": inputs.shape[1],
        "width": inputs.shape[2],
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "device": inputs.device.type,
        "min_batch": lowest,
        "max_batch": highest,
    }
    if format == "onnx":
        names = ("version", "torch", "model", "method", "channels", "height", "width", "dtype")
        program = _program(model, inputs, batch, lowest, highest)
        told = {_PREFIX + name: str(facts[name]) for name in names}
        write_onnx(program, path, told | ({} if quantize is None else {f"{_PREFIX}quantize": quantize}), quantize)
        return path
    configs: dict[str, Any] = {"freezing": inputs.device.type == "cpu"}
    configs |= {"aot_inductor.metadata": {_PREFIX + name: str(value) for name, value in facts.items()}}
    if hasattr(torch._inductor.config.aot_inductor, "check_lowerbound"):
        # torch.export assumes two images or more, but the program it makes serves one as well.
        configs["aot_inductor.check_lowerbound"] = False
    configs |= inductor_configs or {}
    with widened(inputs.batch(1)):
        program = _program(model, inputs, batch, lowest, highest)
    if not program.call_spec.out_spec.is_leaf():
        raise TypeError(f"model must return one tensor, got {program.call_spec.out_spec.type.__name__}")
    with replacing(path) as file:
        torch._inductor.aoti_compile_and_package(program, package_path=file, inductor_configs=configs)
    return path


def _program(model: nn.Module, inputs: Inputs, batch: int, lowest: int, highest: int) -> torch.export.ExportedProgram:
    shapes = None
    if lowest < highest:
        shapes = ({0: torch.export.Dim("batch", min=lowest, max=highest)},)
        batch = max(batch, 2)  # a dimension of 1 would be taken for a constant
    precision = torch.autocast(inputs.device.type, enabled=False)
    images = inputs.batch(batch)
    with torch.inference_mode(False), torch.no_grad(), precision:
        return torch.export.export(model, (images,), dynamic_shapes=shapes)


def format_of(path: str | os.PathLike[str], format: str | None) -> str:
    """The format that is asked for, or the one that the path's ending tells.

    Raises:
        ValueError: there is no such format.
    """
    if format is None:
        return "onnx" if Path(path).suffix == ".onnx" else "aoti"
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    return format


class ExportedModel:
    """A package opened by :func:`load_exported`: call it with images [B, C, H, W] for their logits.

    Any thread may call it, and batches take turns. The logits carry no gradient.
    """

    def __init__(self, path: Path, facts: Mapping[str, str], device_index: int) -> None:
        device = torch.device(facts["device"])
        if device.type == "cuda":
            device = torch.device("cuda", device_index if device_index >= 0 else torch.cuda.current_device())
        #: What the package was made from: model, method, versions, ...
        self.facts = dict(facts)
        shape = int(facts["channels"]), int(facts["height"]), int(facts["width"])
        self._inputs = Inputs(shape, _DTYPES[facts["dtype"]], device)
        self._batches = range(int(facts["min_batch"]), int(facts["max_batch"]) + 1)
        self._run = torch._inductor.aoti_load_package(str(path), device_index=device_index)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self._inputs.shape

    def __repr__(self) -> str:
        return f"ExportedModel({', '.join(f'{name}={value}' for name, value in self.facts.items())})"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, classes].

        Raises:
            TypeError, ValueError: the images are not a tensor of the type, size, device and number that the package was
                made for.
        """
        check_images(images, self._inputs)
        if tuple(images.shape[1:]) != self._inputs.shape or len(images) not in self._batches:
            low, high = self._batches[0], self._batches[-1]
            count = f"{low}" if low == high else f"{low} to {high}"
            raise ValueError(f"images must be {count} of {list(self._inputs.shape)}, got {list(images.shape)}")
        # Our operators would obey autocast, but the code around them does not.
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self._run(images.contiguous())
        return logits


def load_exported(path: str | os.PathLike[str], *, device_index: int = -1) -> ExportedModel:
    """Open what :func:`export` wrote. A package is a program: do not open one from a source you do not trust.

    Unlike ``torch._inductor.aoti_load_package``, which reads out of bounds if images have a different size than at the
    export, it checks every batch.

    Args:
        path: the package.
        device_index: the GPU to run on; -1: the current one.

    Raises:
        FileNotFoundError, ValueError: there is no such file, or it is not a package written by :func:`export`.
        RuntimeError: the package is for CUDA, which is not available; or PyTorch cannot open it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"path must be a package written by tokcomp.export, got '{path}', which does not exist")
    facts = _facts_of(path)
    if facts["device"] == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"'{path}' was exported for CUDA, which is not available here: export the model on the CPU")
    try:
        return ExportedModel(path, facts, device_index)
    except RuntimeError as error:
        raise RuntimeError(
            f"'{path}' could not be opened by torch {torch.__version__}; it was exported by torch {facts['torch']}"
        ) from error


def _facts_of(path: Path) -> dict[str, str]:
    """The facts that :func:`export` wrote about a package."""
    try:
        loader: Any = torch._C._aoti.AOTIModelPackageLoader
        metadata = loader.load_metadata_from_package(str(path), "model")
    except RuntimeError as error:
        raise ValueError(f"path must be a package written by tokcomp.export, got '{path}'") from error
    facts = {name.removeprefix(_PREFIX): value for name, value in metadata.items() if name.startswith(_PREFIX)}
    if "max_batch" not in facts:
        raise ValueError(f"path must be a package written by tokcomp.export, got '{path}' without its metadata")
    return facts
