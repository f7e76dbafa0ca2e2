"""`tbps-model export MODEL --onnx --out DIR`: the encoders of a model as ONNX files, checked and timed against torch on the CPU.

The batch is dynamic; all other sizes are those of the model. Features are unit-norm. `encoders.json` says what goes in.
"""

import argparse
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quant_pre_process, quantize_dynamic
from prettytable import PrettyTable
from torch import Tensor, nn

from tbps_common.bench.timer import measure
from tbps_common.errors import InputError
from tbps_common.files import write_json
from tbps_common.models.contents import read_config
from tbps_common.models.hub import Encoder
from tbps_common.models.layouts import known_papers
from tbps_common.models.source import find_model, is_hub_folder
from tbps_common.run.command import EXIT_FAILURE

LOWEST_COSINE = 0.9999
_LARGEST_MESSAGE = 2**31  # an ONNX file is one protobuf message; larger weights go beside it


@dataclass(frozen=True)
class Comparison:
    """An ONNX file beside the torch module that it was made of.

    Attributes:
        path: of the file.
        megabytes: of the file and its weights.
        milliseconds: of one batch, the best of five in turns.
        torch_milliseconds: of the same batch.
        cosine: the lowest between the features of both.
    """

    path: Path
    megabytes: float
    milliseconds: float
    torch_milliseconds: float
    cosine: float


def main(flags: argparse.Namespace) -> int:
    """Export, compare, print; the exit status is 1 if the features of an exported encoder are not those of torch.

    Raises:
        InputError: the model is not in the layout of the hub, or of a paper whose encoders cannot be exported.
    """
    folder = Path(find_model(flags.model, "MODEL"))
    config = read_config(folder) if is_hub_folder(folder) else None
    if config is None:
        raise InputError(
            f"{folder} is not a folder in the layout of the hub: make one with tbps-model convert --to hub"
        )
    papers = {paper.name.lower(): paper for paper in known_papers() if paper.convert}
    paper = papers.get(str(config.get("model_type")))
    if paper is None:
        raise InputError(
            f"{folder} is a model of type {config.get('model_type')!r}, but only those of {', '.join(papers)} are exported"
        )
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    comparisons, described, whole = [], {}, 0
    for encoder in import_module(paper.convert).encoders(folder):
        whole = _bytes_of(encoder.model)
        path = export(encoder, out)
        comparisons.append(compare(encoder, path, flags.batch_size))
        if flags.int8:
            comparisons.append(compare(encoder, quantise(path), flags.batch_size))
        described[encoder.name] = {
            "file": path.name,
            "inputs": {name: [*tensor.shape[1:]] for name, tensor in encoder.inputs(1).items()},
            "output": "feature, unit-norm",
            "note": encoder.note,
        }
    write_json(out / "encoders.json", {"paper": paper.name, "encoders": described})
    table = PrettyTable(["file", "MB", "ms", "torch ms", "ms / torch ms", "lowest cosine"], align="r")
    for found in comparisons:
        table.add_row(
            [
                found.path.name,
                f"{found.megabytes:.2f}",
                *(f"{value:.1f}" for value in (found.milliseconds, found.torch_milliseconds)),
                f"{found.milliseconds / found.torch_milliseconds:.2f}",
                f"{found.cosine:.6f}",
            ]
        )
    print(
        f"batches of {flags.batch_size} on the CPU, {torch.get_num_threads()} thread(s); the whole model in torch: "
        f"{whole / 1e6:.2f} MB\n{table}"
    )
    wrong = [found for found in comparisons if found.cosine < LOWEST_COSINE and not found.path.stem.endswith("int8")]
    for found in wrong:
        print(
            f"error: the features of {found.path} differ from torch's: cosine {found.cosine:.6f}, at least {LOWEST_COSINE} is needed"
        )
    return EXIT_FAILURE if wrong else 0


class _Exported(nn.Module):
    """An encoder as a module whose `forward` gives its features."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.model = encoder.model
        self.call = encoder.call

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.call(self.model, *inputs)


def export(encoder: Encoder, out: Path) -> Path:
    """Write `<name>.onnx` (and `<name>.onnx.data`, if the weights are beyond 2 GB) with torch's exporter."""
    example = encoder.inputs(2)
    batch = torch.export.Dim("batch", min=1, max=4096)
    work = Path(tempfile.mkdtemp(prefix=".export", dir=out))
    try:
        # The exporter and its optimizer remark on what they then deal with; the comparison below is what counts.
        logging.getLogger("onnxscript").setLevel(logging.ERROR)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                _Exported(encoder).eval(),
                tuple(example.values()),
                input_names=list(example),
                output_names=["feature"],
                dynamo=True,
                dynamic_shapes=(tuple({0: batch} for _ in example),),
                verbose=False,
            )
        assert program is not None
        program.save(work / f"{encoder.name}.onnx", external_data=_bytes_of(encoder.model) >= _LARGEST_MESSAGE // 2)
        return _move_all(work, out) / f"{encoder.name}.onnx"
    finally:
        shutil.rmtree(work, ignore_errors=True)


def quantise(path: Path) -> Path:
    """Write `<name>.int8.onnx`: the constant matrices of linear layers in 8 bits, their inputs quantised as they come."""
    target = path.with_name(f"{path.stem}.int8.onnx")
    work = Path(tempfile.mkdtemp(prefix=".export", dir=path.parent))
    try:
        external = path.with_name(f"{path.name}.data").exists()
        prepared = work / "prepared.onnx"
        quant_pre_process(path, prepared, skip_symbolic_shape=True, save_as_external_data=external)
        quantize_dynamic(
            prepared,
            work / target.name,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            use_external_data_format=external,
            extra_options={"MatMulConstBOnly": True},
        )
        for left in work.glob("prepared*"):
            left.unlink()
        return _move_all(work, path.parent) / target.name
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _move_all(work: Path, out: Path) -> Path:
    """Put what was written into place, the ONNX file last."""
    for path in sorted(work.iterdir(), key=lambda path: path.suffix == ".onnx"):
        os.replace(path, out / path.name)
    return out


def open_encoder(path: str | os.PathLike[str]) -> Callable[..., Tensor]:
    """A function of tensors in the order of the file's inputs, computed by onnxruntime on the CPU with torch's number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # waiting threads sleep, as torch's do
    session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def run(*inputs: Tensor) -> Tensor:
        (feature,) = session.run(["feature"], {name: value.numpy() for name, value in zip(names, inputs)})
        return torch.from_numpy(feature)

    return run


@torch.no_grad()
def compare(encoder: Encoder, path: Path, batch_size: int) -> Comparison:
    """The lowest cosine over batches of 1 and `batch_size`, sizes, and times of the larger batch."""
    onnx.checker.check_model(os.fspath(path))
    run, module = open_encoder(path), _Exported(encoder).eval()
    lowest = 1.0
    for size in (1, batch_size):
        inputs = tuple(encoder.inputs(size).values())
        ours, theirs = run(*inputs), module(*inputs)
        lowest = min(lowest, float(nn.functional.cosine_similarity(ours, theirs, dim=-1).min()))
    beside = path.with_name(f"{path.name}.data")
    costs = measure({"onnx": lambda: run(*inputs), "torch": lambda: module(*inputs)})
    return Comparison(
        path,
        (path.stat().st_size + (beside.stat().st_size if beside.exists() else 0)) / 1e6,
        1e3 * costs["onnx"].wall_s,
        1e3 * costs["torch"].wall_s,
        lowest,
    )


def _bytes_of(model: nn.Module) -> int:
    return sum(weight.nbytes for weight in model.parameters())
