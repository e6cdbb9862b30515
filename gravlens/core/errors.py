"""The one exception of gravlens: what was given, what was wanted, what to try."""

from numbers import Integral


class GravlensError(ValueError):
    """Bad input, said so that a newcomer can mend it.

    Args:
        given: what was found, naming the input (a full sentence).
        wanted: what would have been right (a full sentence).
        remedy: what to do about it (an instruction).
    """

    def __init__(self, given: str, wanted: str, remedy: str) -> None:
        super().__init__(f"{given} {wanted} Try: {remedy}")
        self.given, self.wanted, self.remedy = given, wanted, remedy

    def __reduce__(self) -> tuple[type["GravlensError"], tuple[str, str, str]]:
        """Survive the way back from a worker process."""
        return type(self), (self.given, self.wanted, self.remedy)


def check_layer(layer: int, n_layers: int) -> int:
    """Return `layer` where `blocks.{layer}.hook_resid_post` exists, else raise `GravlensError`."""
    if isinstance(layer, bool) or not isinstance(layer, Integral) or not 0 <= layer < n_layers:
        raise GravlensError(
            f"Layer {layer!r} was asked for.",
            f"Layers are whole numbers from 0 to {n_layers - 1}: layer l is blocks.l.hook_resid_post.",
            f"a layer between 0 and {n_layers - 1} (the last one is {n_layers - 1}, there is no -1).",
        )
    return int(layer)
