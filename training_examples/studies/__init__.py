"""
Studies: many short trainings on Scenes that differ in one thing each.

They import what the recipes share, and scenes/, from the folder above: `PYTHONPATH=training_examples python -m
studies.experts` from the root of the repository.
"""
