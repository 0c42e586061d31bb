"""No common test of exporting runs: they are not in the sdist."""


class ExportTesterMixin:
    pass
