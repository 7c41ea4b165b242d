"""Adds low-rank adapters to the kernels they change, box by box, while a checkpoint is exported."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from convert.store.orbax_stream import Index, StoredArray
from videonsa_jax.config.schema import LoRAConfig
from videonsa_jax.training.optimizer import is_adapter


@dataclasses.dataclass(frozen=True)
class Adapter:
    """lora_in [l inputs rank] and lora_out [l rank outputs], float32 in memory."""

    inputs: np.ndarray
    outputs: np.ndarray
    scale: float

    def add(self, index: Index, block: np.ndarray) -> np.ndarray:
        """The box `index` of a kernel [l inputs outputs] with the adapter added, in its dtype."""
        layers, *rest = index
        count = self.inputs.ndim - 2  # input dimensions
        left = self.inputs[(layers, *rest[:count])]
        right = self.outputs[(layers, slice(None), *rest[count:])]
        change = [np.tensordot(a, b, axes=1) for a, b in zip(left, right, strict=True)]
        return (block.astype(np.float32) + self.scale * np.stack(change)).astype(block.dtype)


def split(
    arrays: Mapping[str, StoredArray], lora: LoRAConfig
) -> tuple[dict[str, StoredArray], dict[str, Adapter]]:
    """Stored parameters -> those without adapters, and the adapters by path of their kernel."""
    halves = {path: array for path, array in arrays.items() if is_adapter(path)}
    kernels = {path: array for path, array in arrays.items() if path not in halves}
    adapters = {}
    for module in sorted({path.rpartition("/")[0] for path in halves}):
        inputs, outputs = (_whole(halves[f"{module}/{half}"]) for half in ("lora_in", "lora_out"))
        adapters[f"{module}/kernel"] = Adapter(inputs, outputs, lora.alpha / lora.rank)
    return kernels, adapters


def _whole(array: StoredArray) -> np.ndarray:
    """All of an array: adapters are small."""
    out = np.empty(array.shape, np.float32)
    for index, block in array.read(array.boxes(layered=True)):
        out[index] = block
    return out
