"""What runs of the trainer share."""

import pytest
import tiny_run

from benchmarks.faults.runs import compiled_once


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module", autouse=True)
def compile_once(compiled):
    """What one run has compiled the others read, in processes of their own as well."""
    with compiled_once(compiled):
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return tiny_run.write_corpus(tmp_path_factory.mktemp("corpus"))
