"""A result's layers and their mean in one table, for assertions that run over both."""

from typing import Any

import pandas as pd


def stacked(found: Any) -> pd.DataFrame:
    """`.table`, then `.layer_mean` with the layer <NA>."""
    return pd.concat(
        [one.astype({"layer": "Int64"}) for one in (found.table, found.layer_mean.assign(layer=pd.NA))],
        ignore_index=True,
    )
