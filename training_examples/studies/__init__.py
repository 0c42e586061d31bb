"""
Studies: many short trainings on Scenes, each of which differs from a common one in a single setting.

The scripts import training.py, muon.py and scenes/ from the folder above. Run them from the root of the repository:
`PYTHONPATH=training_examples python -m studies.experts`.
"""
