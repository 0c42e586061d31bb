"""
SMART-101: puzzles for children, as a data set and as a test of reasoners. generate.py writes puzzles of our own.

The scripts import training.py and run_lm.py from the folder above. Run them as modules from the root of the
repository: `PYTHONPATH=training_examples python -m smart.run_smart`.
"""
