"""Placement of checkpoints while they are read: device, dtype, device map, downloads kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from gravlens.core.errors import GravlensError, said
from gravlens.models.precision import as_dtype

DeviceMap: TypeAlias = str | Mapping[str, Any] | None
OFFLOADED = ("disk", "meta")


@dataclass(frozen=True)
class Placement:
    """How the checkpoints of a sequence are loaded; models in memory keep their device and dtype.

    Attributes:
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, `"mps"`, …, or `"auto"`: a GPU if there is one.
        dtype: a torch dtype or its name (`"bf16"`), or `"stored"`: as each file stores its weights.
        device_map: `"auto"`, or module name -> device as for accelerate, for a model larger than one GPU; excludes
            `device`. Offloading (to disk, or to CPU memory next to a GPU) is not supported.
        keep: number of downloaded revisions to keep on disk, including the current one, besides the prefetched next
            one. None: no eviction. Witness, anchor, and files that were in the cache before are never evicted.

    Examples:
        >>> placement = gl.Placement(device="auto", dtype="bf16")
        >>> vs = gl.locate_vrev(seq, placement=gl.Placement(dtype="stored"))
        >>> vs.layers
        (0, 1, 2)
    """

    device: str = "cpu"
    dtype: torch.dtype | str = torch.float32
    device_map: DeviceMap = None
    keep: int | None = None

    def __post_init__(self) -> None:
        as_dtype(self.dtype)
        check_map(self.device, self.device_map)
        if self.keep is not None and (isinstance(self.keep, bool) or self.keep < 1):
            wanted = "The revision that is being read stays on disk, so at least 1 is needed."
            remedy = "keep=1 (disk space for two), or None, which keeps all."
            raise GravlensError(f"keep={self.keep!r} was given.", wanted, remedy)

    @property
    def where(self) -> dict[str, Any]:
        """Device, dtype and device map as arguments of `open_model`."""
        return {"device": self.device, "dtype": self.dtype, "device_map": self.device_map}


def as_device(name: str | torch.device) -> torch.device:
    """Return an available device (`"auto"`: the first GPU, else the CPU); raise if it is unknown or not available."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        module = torch.get_device_module(device)  # torch.device accepts a "cuda:7" that is not there
        here = module.is_available() and (device.index or 0) < module.device_count()
    except (RuntimeError, AttributeError) as error:
        raise _no_device(name, "is not a device that models run on") from error
    if not here:
        raise _no_device(name, "is not on this machine, or this build of torch cannot use it")
    return device


def check_map(device: str | torch.device | None, device_map: DeviceMap) -> None:
    """Raise if both a device and a map are given, or if the map offloads."""
    if device_map is None:
        return
    if str(device or "cpu") != "cpu":
        given, wanted = f"device={str(device)!r} and a device_map were given.", "A map assigns a device to each part."
        raise GravlensError(given, wanted, "only one of them; device_map='auto' spreads a model over all GPUs.")
    places = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    if offloaded := {str(place) for place in places} & set(OFFLOADED):
        raise no_offloading(f"device_map sends parts to {', '.join(sorted(offloaded))}")


def no_offloading(found: str) -> GravlensError:
    """Return the error for weights that would be copied to the device in each pass."""
    wanted = "All weights must be on devices, so that the next checkpoint's can be copied into them."
    return GravlensError(f"{found}.", wanted, "a smaller dtype (bf16), more GPUs, or the device cpu.")


def no_room(source: object, error: Exception) -> GravlensError:
    """Return the error for a model that is larger than its device."""
    given = f"{source} does not fit on its device ({said(error)})."
    remedy = "the dtype bf16, the device cpu, or device_map='auto' over several GPUs."
    return GravlensError(given, "All weights of a model must fit at once.", remedy)


def _no_device(name: str | torch.device, what: str) -> GravlensError:
    kind = torch.accelerator.current_accelerator(check_available=True)
    here = f"cpu and {kind}" if kind else "cpu"
    return GravlensError(
        f"The device {str(name)!r} {what}.", f"Available: {here}.", "auto, which takes a GPU if there is one."
    )
