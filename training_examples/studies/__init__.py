"""
Studies of how a Prismer learns with experts and uses them: many short trainings that are compared.

The scripts import training.py, muon.py and scenes/ from the folder above. Run them from the root of the repository:
`PYTHONPATH=training_examples python -m studies.claims`.
"""
