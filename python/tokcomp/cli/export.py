"""tokcomp export."""

from __future__ import annotations

import argparse
from pathlib import Path

from tokcomp.cli import method_options, options
from tokcomp.cli.errors import UserError, blame, check_output_file

DESCRIPTION = """\
Write a model, compressed or not, into one file, weights included (docs/deploying.md). Either compiled ahead of time by
torch.export and AOTInductor: Python programs run it with tokcomp.load_exported, C++ programs with LibTorch and
libtokcomp; it is built by a C++ compiler, and computes on the kind of device and in the type that are chosen here. Or
as ONNX, for ONNX Runtime, OpenVINO and TensorRT, which needs pip install 'tokcomp[onnx]'.
"""

EXAMPLES = """\
examples:
  tokcomp export -m tokcomp_digits_vit --pretrained --method tome --r 8 -o digits.pt2
      the bundled model, for any batch up to 1024; no download
  tokcomp export -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3 -o deit.pt2
      the schedule that the DiffRate paper published for this model and budget
  tokcomp export -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3 -o deit.onnx
      the same as an ONNX file
  tokcomp export -m deit_small_patch16_224 --pretrained --method diffrate --gflops 2.3 --quantize int8 -o int8.onnx
      and with its linear layers in int8
  tokcomp export -m deit_base_patch16_224 --checkpoint mine.safetensors --method diffrate --schedule mine.json \\
      --device cuda --model-dtype float16 -b 64 --static-batch -o mine.pt2
      your own weights and schedule, in half precision, for exactly 64 images at a time
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    options.add_model_options(parser, default="deit_small_patch16_224")
    method_options.add_method_options(parser)
    group = parser.add_argument_group("package")
    group.add_argument(
        "-o", "--output", type=Path, required=True, metavar="FILE", help="the file, usually .pt2 or .onnx"
    )
    group.add_argument(
        "--format", choices=("aoti", "onnx"), help="compiled package or ONNX (default: onnx for a FILE.onnx, else aoti)"
    )
    group.add_argument(
        "--quantize", choices=("int8",), help="of an ONNX file: its linear layers in int8, by onnxruntime"
    )
    group.add_argument(
        "--model-dtype", choices=("float32", "float16", "bfloat16"), help="convert the weights (default: as they are)"
    )
    group.add_argument(
        "-b", "--batch-size", type=options.positive_int, default=8, metavar="N", help="batch to tune for (default: 8)"
    )
    group.add_argument(
        "--max-batch", type=options.positive_int, default=1024, metavar="N", help="largest batch (default: 1024)"
    )
    group.add_argument("--static-batch", action="store_true", help="only take batches of --batch-size images")


def run(args: argparse.Namespace) -> int:
    check_output_file("--output", args.output)
    if not args.static_batch and args.batch_size > args.max_batch:
        raise UserError(
            f"--batch-size must be at most --max-batch, {args.max_batch}, got {args.batch_size}; raise the latter"
        )
    device = options.chosen_device(args.device)
    import torch

    from tokcomp.deploy.exported import export, format_of

    model = options.build_model(args)
    method_options.compress_by(args, model, method_options.build_method(args, model))
    model.to(device, getattr(torch, args.model_dtype) if args.model_dtype else None)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with blame(f"--model '{args.model}'"):
        export(
            model,
            args.output,
            batch=args.batch_size,
            dynamic_batch=not args.static_batch,
            max_batch=args.max_batch,
            img_size=args.img_size,
            format=args.format,
            quantize=args.quantize,
        )
    onnx = format_of(args.output, args.format) == "onnx"
    count = "any number of" if onnx else f"1 to {args.max_batch}"
    count = f"{args.batch_size}" if args.static_batch else count
    megabytes = args.output.stat().st_size / 1e6
    print(
        f"written: {args.output} ({megabytes:.1f} MB, {options.describe_weights(args)}; {count} images"
        + ("" if onnx else f", {device.type}")
        + ")"
    )
    if onnx:
        print(f"run it:  onnxruntime.InferenceSession('{args.output}').run(None, {{'images': images}})[0]")
    else:
        print(f"run it:  tokcomp.load_exported('{args.output}')(images)")
    return 0
