"""A run's model as files for other programs: safetensors always, and what its library reads.

<out>/model.safetensors   the whole tuned model (frozen parts included), names as in the model
      model.json          class names in the order of the logits, shape of a sample
      experiment.toml     what made it
      open_clip/ hf/ peft/  as those libraries read it, where the model is one (`export_forms`)
      README.md           how to load all this
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsim.errors import UserError
from fedsim.files import write_atomic
from fedsim.runs import Run
from fedsim.version import fedsim_version

if TYPE_CHECKING:
    from flwr.app import ArrayRecord

    from fedsim.models.base import Classifier
    from fedsim.task import Task

_ABOUT = "model.json"  #: classes, what a sample is and says, where modules are looked up
_README = """\
# {name}: {state}

{strategy} on {data}, {clients} clients, written by fedsim {version}.

```python
from fedsim.export import load_model

model = load_model("{folder}")  # no data needed
logits = model(images)  # images as stored: uint8 or float32 {shape}; classes are in model.json
```
"""


def export(run: Run, out: Path) -> dict[str, Any]:
    """Write the model of a run.

    Args:
        run: a finished run, or one with a checkpoint.
        out: folder to write into, made if needed.

    Returns:
        `folder`, `files` (names in it), `state` ("final state" or the round of the checkpoint) and
        `notices` (what the user should know).

    Raises:
        UserError: the run has no state yet, or the state does not fit the experiment's model.
    """
    from safetensors.torch import save

    from fedsim import building
    from fedsim.export_forms import write_forms

    experiment = run.experiment()
    arrays, state = _state(run)
    task = building.build(experiment)
    try:
        task.load(arrays)
    except ValueError as error:
        raise UserError(f"{run.folder}: the state does not fit the experiment's model: {error}") from error
    tensors = {key: value.detach().cpu().clone() for key, value in task.model.state_dict().items()}
    write_atomic(out / "model.safetensors", save(tensors))
    info = task.data.info
    about = {
        "classes": info.classes,
        "sample_shape": info.sample_shape,
        "dtype": info.dtype,
        "padding": info.padding,
        "attributes": [[attribute.name, attribute.values] for attribute in info.attributes],
        "folders": experiment.folders,
    }
    write_atomic(out / _ABOUT, (json.dumps(about, ensure_ascii=False, indent=2) + "\n").encode())
    write_atomic(out / "experiment.toml", experiment.toml().encode())
    forms, how, missing = write_forms(task.model, out)
    text = _README.format(
        name=experiment.name,
        state=state,
        strategy=experiment["strategy"].name,
        data=experiment["data"].name,
        clients=experiment.clients,
        version=fedsim_version(),
        folder=out,
        shape=["n", *info.sample_shape],
    )
    write_atomic(out / "README.md", (text + how).encode())
    return {
        "folder": str(out),
        "files": ["model.safetensors", _ABOUT, "experiment.toml", *forms, "README.md"],
        "state": state,
        "notices": _notices(run, task, state) + missing,
    }


def load_model(folder: str | os.PathLike[str]) -> Classifier:
    """The model of an exported run, in eval mode; neither the run nor its data are needed.

    Args:
        folder: what `fedsim export` wrote.

    Returns:
        Maps inputs as stored [n, *sample_shape] to logits [n, classes].

    Raises:
        UserError: the folder is no export.
    """
    from safetensors.torch import load_file

    from fedsim import config
    from fedsim.building import build_model
    from fedsim.data.attributes import Attribute
    from fedsim.models.base import DataInfo

    place = Path(folder)
    try:
        about = json.loads((place / _ABOUT).read_text("utf-8"))
        tensors = load_file(place / "model.safetensors")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place} is no export of a run ({error}); make one with: fedsim export RUN"
        ) from error
    path = place / "experiment.toml"
    experiment = config.from_tables(config.read(path), source=str(path), folders=about["folders"])
    attributes = tuple(Attribute(name, tuple(values)) for name, values in about["attributes"])
    shape = tuple(about["sample_shape"])
    info = DataInfo(tuple(about["classes"]), shape, attributes, about["dtype"], padding=about.get("padding"))
    model = build_model(experiment, info)
    model.load_state_dict(tensors)
    model.eval()
    return model


def _state(run: Run) -> tuple[ArrayRecord, str]:
    """The final shared state, or that of the newest checkpoint."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from fedsim import messages

    path = run.folder / "state.safetensors"
    if run.finished:
        try:
            return messages.arrays_of(load_file(path)), "final state"
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: damaged or unreadable ({error})") from error
    tree, _ = run.latest_checkpoint()
    if tree is None:
        raise UserError(f"{run.folder} has no state yet; go on with: fedsim resume {run.folder}")
    progress = tree["progress"]
    return progress["arrays"], f"state after round {progress['server_round']}"


def _notices(run: Run, task: Task, state: str) -> list[str]:
    found = []
    if not run.finished:
        found.append(f"the run is not finished: this is the {state}")
    personal = [entry.name for entry in task.selection.personal]
    if personal:
        found.append(
            f"{len(personal)} entries are personal and stay with the clients (first: {personal[0]}); "
            "the exported model has their initial values"
        )
    return found
