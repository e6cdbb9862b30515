"""Histories of trained organisms, and histories that move an organism's weights without training."""

from pathlib import Path

from worlds.judged import Judged

from gravlens.models.opening import quiet
from gravlens.studies.evidence import damage_of
from gravlens.studies.experiment import draw_noise, make_checkpoint, measure_history, preregister, run_arm
from gravlens.studies.study import Study

FIRST = 101  # organisms from here on: none that anything was chosen on


def study_of(seed: int, cache: Path) -> Study:
    """Return the study of an organism of this seed."""
    return Study.at(Judged(organism=seed), cache)


def make_organism(seed: int, cache: Path) -> None:
    """Make witness and anchor, preregister, and make every run, its null and damage."""
    study = study_of(seed, cache)
    with quiet():
        for name in study.organism.checkpoints:
            make_checkpoint(study, name)
        measure_history(study)
        preregister(study)
        for arm, run in ((arm, run) for arm in study.organism.arms for run in arm.seeds):
            run_arm(study, arm, run)
        for step in study.organism.noise:
            draw_noise(study, step)
        damage_of(study, study.organism.layers_in_mean)
