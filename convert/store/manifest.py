"""What a conversion has made: its source, every tensor's hash, the versions of the software."""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
from typing import Any, Literal

import numpy as np

from convert.hf.safetensors import Stored
from videonsa_jax.errors import UserError

FILE = "manifest.json"  # of a checkpoint, or of an export
FORMAT = 1
_READ_BYTES = 2**24  # at once
_PACKAGES = ("videonsa-jax", "jax", "orbax-checkpoint", "tensorstore", "numpy", "ml-dtypes")


@dataclasses.dataclass(frozen=True)
class Record:
    """One tensor in PyTorch's layout, in the dtype in which the conversion stored it."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str  # of its bytes, rows after rows


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Lies beside the weights it describes."""

    source: dict[str, Any]  # path and what identifies it there
    architecture: str  # name of a model family
    gates: Literal["source", "initialised"]  # or what else the source's family lacks
    dtype: str  # the policy: "keep", or what all tensors were cast to
    tensors: dict[str, Record]  # by canonical name
    versions: dict[str, str] = dataclasses.field(
        default_factory=lambda: {name: importlib.metadata.version(name) for name in _PACKAGES}
    )
    format: int = FORMAT


def write(folder: pathlib.Path, manifest: Manifest) -> None:
    """Writes `manifest.json`."""
    text = json.dumps({"format": manifest.format, **dataclasses.asdict(manifest)}, indent=1)
    (folder / FILE).write_text(text + "\n")


def read(folder: str | pathlib.Path) -> Manifest | None:
    """The manifest of a folder, None where there is none.

    Raises:
      UserError: it is damaged or of another format.
    """
    path = pathlib.Path(folder) / FILE
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text("utf-8"))
        if values["format"] != FORMAT:
            raise UserError(f"{path} has format {values['format']!r}, expected {FORMAT}")
        tensors = {
            name: Record(tuple(record["shape"]), record["dtype"], record["sha256"])
            for name, record in values["tensors"].items()
        }
        return Manifest(**(values | {"tensors": tensors}))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); convert again") from error


class Hashes:
    """SHA-256 of tensors whose parts come in the order of their bytes."""

    def __init__(self):
        self._running: dict[str, Any] = {}

    def update(self, name: str, part: np.ndarray) -> None:
        """The next part of a tensor, contiguous."""
        digest = self._running.setdefault(name, hashlib.sha256())
        digest.update(part.reshape(-1).view(np.uint8))

    def __getitem__(self, name: str) -> str:
        return self._running[name].hexdigest()


def sha256(tensor: Stored) -> str:
    """Of a tensor that lies in a file."""
    digest = hashlib.sha256()
    with tensor.file.open("rb") as file:
        file.seek(tensor.offset)
        for left in range(tensor.nbytes, 0, -_READ_BYTES):
            digest.update(file.read(min(left, _READ_BYTES)))
    return digest.hexdigest()
