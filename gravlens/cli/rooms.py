"""Files of the package, each loaded when something is first asked of it: help and completion wait for none of them."""
# ruff: noqa: F401
# pyright: reportUnusedImport=false

from importlib import import_module
from typing import TYPE_CHECKING

ELSEWHERE = {"fetched": "settings.fetched", "organism": "settings.refusal"}

if TYPE_CHECKING:
    import gravlens.ablation as ablation
    import gravlens.checkpoints as checkpoints
    import gravlens.directions as directions
    import gravlens.fetch as fetch
    import gravlens.finetune as finetune
    import gravlens.inspection as inspection
    import gravlens.machine as machine
    import gravlens.paired as paired
    import gravlens.paper as paper
    import gravlens.placement as placement
    import gravlens.planning as planning
    import gravlens.plots as plots
    import gravlens.prompts as prompts
    import gravlens.questions as questions
    import gravlens.report as report
    import gravlens.reproduce as reproduce
    import gravlens.residual_store as residual_store
    import gravlens.residuals as residuals
    import gravlens.settings.fetched as fetched
    import gravlens.settings.refusal as organism
    import gravlens.store as store
    import gravlens.style as style
    import gravlens.trajectory as trajectory
else:

    def __getattr__(name: str) -> object:
        if name.startswith("_"):
            raise AttributeError(name)
        return import_module(f"gravlens.{ELSEWHERE.get(name, name)}")
