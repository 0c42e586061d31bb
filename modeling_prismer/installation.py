"""Checks how this package was started and where its parts come from. It is imported first, so it must be light."""

import sys
from importlib.util import find_spec
from pathlib import Path


PACKAGE = Path(__file__).resolve().parent


def is_command() -> bool:
    """
    Whether this process is `prismer` or `python -m modeling_prismer`.

    `import modeling_prismer` registers the classes with the Auto classes, which imports torch. The command line does
    that after it has read its arguments, so that `--help` and errors in arguments need no torch.
    """
    script = _script()
    if script is None:  # with -m, Python imports this package before its `__main__`
        arguments = sys.orig_argv
        return sys.argv[:1] == ["-m"] and arguments[arguments.index("-m") + 1] == "modeling_prismer"
    if script.name == "__main__.py":  # Windows: Scripts/prismer.exe/__main__.py
        script = script.parent
    return script.stem == "prismer" and script.suffix in ("", ".exe")


def check_one_checkout() -> None:
    """
    Checks that all code comes from one place.

    A checkout is three folders that an editable install maps into one package. In the folder of another checkout,
    Python takes modeling_prismer/ from there and the other two from the installed one.

    Raises:
        ImportError: if processing/ or conversion/ belongs to another checkout or to none, or if the running script
            does.
    """
    is_checkout = (PACKAGE.parent / "setup.cfg").is_file() and not (PACKAGE / "processing").is_dir()
    home = PACKAGE.parent if is_checkout else PACKAGE
    remedy = f"Install this checkout: pip install -e '{home}'" if is_checkout else "Install the package again."
    for name in ("processing", "conversion"):
        spec = find_spec(f"modeling_prismer.{name}")
        if spec is None or spec.origin is None:
            raise ImportError(f"modeling_prismer was imported from {PACKAGE}, but {name} was not found. {remedy}")
        folder = Path(spec.origin).resolve().parent
        if folder != home / name:
            raise ImportError(
                f"two checkouts are mixed: modeling_prismer comes from {PACKAGE}, but modeling_prismer.{name} comes "
                f"from {folder}. {remedy}"
            )
    script = _script()
    if not is_checkout or script is None or "site-packages" in script.parts:
        return
    if script.is_relative_to(Path(sys.prefix).resolve()):
        return
    for folder in script.parents:
        if (folder / "setup.cfg").is_file() and (folder / "modeling_prismer" / "__init__.py").is_file():
            if folder != home:
                raise ImportError(
                    f"two checkouts are mixed: {script} belongs to {folder}, but modeling_prismer comes from "
                    f"{PACKAGE}. Install the script's checkout: pip install -e '{folder}'"
                )
            return


def _script() -> Path | None:
    """The file that Python runs; none in an interactive session, with -c, and while -m looks for its module."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if path is None else Path(path).resolve()
