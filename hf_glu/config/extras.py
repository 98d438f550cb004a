"""Which packages come with which extra, and the one line that says so where one is missing."""

from __future__ import annotations

from importlib.util import find_spec

from hf_glu.errors import MissingPackageError

# what is imported -> the extra that brings it
EXTRAS = {
    "datasets": "train",
    "evaluate": "train",
    "pandas": "train",
    "peft": "train",
    "pyarrow": "train",
    "scipy": "train",
    "sklearn": "train",
    "seqeval": "metrics",
    "rouge_score": "metrics",
    "sacrebleu": "metrics",
    "jinja2": "report",
    "matplotlib": "report",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "openvino": "openvino",
    "executorch": "executorch",
    "torchao": "quantize",
    "gguf": "gguf",
    "gradio": "play",
    "trl": "trl",
}
OF_TRAINING = ("datasets", "evaluate", "sklearn")  # that every task needs


def need(*packages: str, what: str) -> None:
    """Check that packages of extras are installed, before anything that takes long is begun.

    Args:
        packages: as they are imported, such as ``sklearn``.
        what: needs them: the beginning of the message, such as ``hf-glu finetune``.

    Raises:
        MissingPackageError: one isn't.
    """
    if error := lacking(*packages, what=what):
        raise error


def lacking(*packages: str, what: str) -> MissingPackageError | None:
    """Return the error that says which of the packages of `need` aren't installed, None where all are."""
    missing = [package for package in packages if find_spec(package) is None]
    if not missing:
        return None
    verb = "isn't" if len(missing) == 1 else "aren't"
    names = " and ".join([", ".join(missing[:-1]), missing[-1]] if len(missing) > 1 else missing)
    return MissingPackageError(f"{what} needs {names}, which {verb} installed: {install(*missing)}")


def of_import(error: ImportError, what: str) -> MissingPackageError | None:
    """Return what a failed import means, where the package that is missing comes with an extra; else None."""
    package = (error.name or "").partition(".")[0]
    return lacking(package, what=what) if isinstance(error, ModuleNotFoundError) and package in EXTRAS else None


def install(*packages: str) -> str:
    """Return the command that installs the extras of packages."""
    return f'pip install "hf_glu[{",".join(dict.fromkeys(EXTRAS[package] for package in packages))}]"'
