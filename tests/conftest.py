"""Shared by all tests: the plugin registered, no network, one thread, quiet logs."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path += [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "recipes")]

import pytest
import torch
import transformers
from footprint import Small

import hf_glu
from hf_glu import cli
from hf_glu.errors import IncompatibleTransformersError

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.fixture(autouse=True)
def _fresh():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hf_glu.register()
    yield
    hf_glu.register()


@pytest.fixture(autouse=True)
def _small():
    """Fail a test that takes the process above what every machine has."""
    with Small():
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Skip a test that is refused what the installed versions lack (`hf_glu.compat`); the pinned ones lack nothing."""
    try:
        return (yield)
    except IncompatibleTransformersError as error:
        pytest.skip(str(error))


@pytest.fixture
def run_cli(capsys):
    """Run the command line in this process: the exit code, standard output and standard error."""

    def runs(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return runs
