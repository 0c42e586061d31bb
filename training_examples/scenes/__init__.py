"""
The Scenes data set, and scripts that train experts, backbones and a Prismer on it.

The scripts import training.py and muon.py from the folder above. Run them as modules from the root of the repository:
`PYTHONPATH=training_examples python -m scenes.run_scenes`.
"""
