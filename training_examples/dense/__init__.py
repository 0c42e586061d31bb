"""
Dense tasks: the multi-task layouts of PASCAL-Context and NYUD-v2, and the measures of their tasks.

[`multi_task_data`] reads the data, [`measures`] compares predicted maps with true ones.
"""
