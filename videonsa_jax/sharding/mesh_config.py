"""The sizes of the mesh's axes."""

import dataclasses
import math

REST = -1  # as the size of one axis: all devices that the other axes leave


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; the product is the number of devices. One axis may be -1."""

    dcn: int = 1  # groups of devices joined by the slower network: copies of the parameters
    data: int = 1  # copies of the parameters; rows are split
    fsdp: int = REST  # rows and parameters are split
    tensor: int = 1  # heads, mlp width and vocabulary are split
    context: int = 1  # the sequence is split

    def __post_init__(self):
        sizes = dataclasses.astuple(self)
        if min(sizes) < REST or 0 in sizes or sizes.count(REST) > 1:
            raise ValueError(
                f"mesh={dataclasses.asdict(self)}: sizes must be positive; one of them may be "
                f"{REST}, which takes all devices that the others leave"
            )

    def resolved(self, devices: int) -> "MeshConfig":
        """With as many of `devices` as the other axes leave in place of -1, at least one."""
        given = math.prod(size for size in dataclasses.astuple(self) if size != REST)
        left = max(devices // given, 1)
        sizes = dataclasses.asdict(self)
        return MeshConfig(**{axis: left if n == REST else n for axis, n in sizes.items()})
