"""
Scenes: the data set, and the trainings of experts, backbones and a Prismer on it.

Its scripts import what the recipes share (training.py, muon.py) from the folder above. They run as modules of that
folder: `PYTHONPATH=training_examples python -m scenes.run_scenes` from the root of the repository.
"""
