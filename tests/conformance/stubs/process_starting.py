"""What starts several processes is not in the sdist: a test of a sharding plan that got so far would fail."""


def run_distributed(*args, **kwargs):
    raise NotImplementedError("not in the sdist: what starts the processes of a tensor or expert parallel test")


def _start_rank_processes(*args, **kwargs):
    raise NotImplementedError("not in the sdist: what starts the processes of an FSDP test")


def _get_distributed_device_type() -> str:
    return "cpu"


def _get_distributed_backend() -> str:
    return "gloo"


def _get_rank_device(rank: int) -> str:
    return "cpu"


def _set_rank_device(rank: int) -> None:
    pass
