"""No common test of generation runs: they are not in the sdist. Ours are tests/modeling_prismer/test_generation.py."""


class GenerationTesterMixin:
    pass
