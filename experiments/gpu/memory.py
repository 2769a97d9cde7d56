"""Peak memory of one training step: methods of local learning beside back-propagation.

    python experiments/gpu/memory.py                    what the CUDA allocator counts
    python experiments/gpu/memory.py --device meta      what `fedsim memory` foresees for the same steps

Real steps with random images: ResNet-101 at 224 px, ResNet-32 at 32 px in batches of 1024, ViT-B/16. A row
says the most bytes that were allocated in the third step (parameters, gradients, momentum, activations, a
kernel's workspace from torch's allocator), what torch had reserved then, and the time of a step. Gradient
checkpointing keeps exact gradients and is the honest rival.

The papers' figure for MAN on ResNet-101 in four blocks is 0.53 of back-propagation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import common
import torch

from fedsim.errors import UserError
from fedsim.local_learning.learner import LocallySupervised
from fedsim.local_learning.meters import peak_bytes
from fedsim.models.base import Classifier, DataInfo
from fedsim.models.resnet import resnet20, resnet32
from fedsim.models.timm_models import timm_model
from fedsim.models.tuning import full

METHODS = ("checkpointed-bp", "man", "man++", "dgl", "infopro", "hpff", "mlaan")
CLASSES = tuple(f"class {number}" for number in range(1000))
IMAGENET = DataInfo(CLASSES, (3, 224, 224))
#: network -> (what makes it, pixels a side, batch)
NETWORKS: dict[str, tuple[Callable[[], Classifier], int, int]] = {
    "resnet101": (partial(timm_model, IMAGENET, name="resnet101"), 224, 64),
    "resnet32": (resnet32, 32, 1024),
    "resnet20": (resnet20, 32, 1024),
    "vit-b16": (partial(timm_model, IMAGENET, name="vit_base_patch16_224"), 224, 64),
}
#: what the papers write about comes first
ORDER = (
    ("resnet101", 4),
    ("resnet32", 16),
    ("vit-b16", 4),
    ("resnet101", 2),
    ("resnet32", 4),
    ("vit-b16", 12),
)
TINY = (("resnet20", 4),)
_STEPS = 3


def cells(order: Sequence[tuple[str, int]]) -> Iterator[tuple[str, str, int]]:
    """Network, method, blocks; back-propagation once for each network, before the others."""
    begun: set[str] = set()
    for network, blocks in order:
        if network not in begun:
            begun.add(network)
            yield network, "bp", 1
        yield from ((network, method, blocks) for method in METHODS)


def measured(network: str, method: str, blocks: int, given: Any) -> dict[str, Any]:
    """One cell: peak and time of a step, or why there is none."""
    device = torch.device(given.device)
    make, size, batch = NETWORKS[network]
    batch = 4 if given.tiny else batch
    row = {"network": network, "batch": batch, "method": method, "blocks": blocks}
    torch.manual_seed(0)
    model = full(make()).to(device)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8).to(device)
    labels = (torch.arange(batch) % 10).to(device)
    try:
        learner = LocallySupervised(model, method, blocks, sample=images).train()
    except UserError as error:  # such as a method that needs maps, on a Transformer
        return {**row, "skipped": str(error)}
    tool = torch.optim.SGD(learner.parameters(), lr=0.01, momentum=0.9)
    for _ in range(_STEPS - 1):
        learner.local_step(images, labels, tool)
    tool.zero_grad(set_to_none=True)
    state = [value for entry in tool.state.values() for value in entry.values() if torch.is_tensor(value)]
    held = [*learner.parameters(), *learner.buffers(), *state, images, labels]
    common.settle(given.device)
    between = sum(tensor.untyped_storage().nbytes() for tensor in held)
    with peak_bytes(held, device) as peak:
        began = time.perf_counter()
        learner.local_step(images, labels, tool)
        common.settle(given.device)
        seconds = time.perf_counter() - began
    row |= {"peak": peak.bytes, "activations": peak.bytes - between}
    if given.device == "cuda":
        row |= {"reserved": torch.cuda.max_memory_reserved(), "step_seconds": round(seconds, 4)}
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write; every row has its share of back-propagation's peak."""
    given = common.arguments("memory", __doc__, devices=("cuda", "cpu", "meta")).parse_args(argv)
    report = common.Report(given)
    whole: dict[str, int] = {}
    for network, method, blocks in cells(TINY if given.tiny else ORDER):
        if report.late():
            return
        if given.device == "cuda":
            torch.cuda.empty_cache()
        try:
            row = measured(network, method, blocks, given)
        except torch.cuda.OutOfMemoryError as error:
            row = {"network": network, "method": method, "blocks": blocks, "skipped": str(error)}
        if "peak" in row:
            row["ratio"] = round(row["peak"] / whole.setdefault(network, row["peak"]), 3)
        report.add(**row)


if __name__ == "__main__":
    main()
