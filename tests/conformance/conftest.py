"""Nothing in this folder is for `make test`: conformance.py runs it beside the library's common tests."""

collect_ignore = ["models", "stubs"]
