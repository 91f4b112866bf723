"""The fault of ours inside what an engine raises, and a run that may go on with other settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray.exceptions

from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError, CorpusError, LayerplanError, TrainingError, find_layerplan_error
from layerplan.pipeline.run_folder import open_run_folder

RETRY_NOTE = (
    "\nFailed to apply UDF transform after 1/1 attempts (total backoff 0.0s).\nTo change retry attempts, backoff, or which"
    " errors are retried, configure `ray.data.DataContext.get_current()`"
)


def wrap(cause: Exception) -> Exception:
    """As Ray hands on what a task raised: of its class and of Ray's, with the whole stack as text."""
    error = ray.exceptions.RayTaskError("task", "Traceback ...", cause).as_instanceof_cause()
    assert isinstance(error, Exception)
    return error


def test_a_fault_is_found_without_the_stack_and_the_retry_note():
    error = wrap(CorpusError("corpus.x=1: is wrong" + RETRY_NOTE))
    assert isinstance(error, LayerplanError)
    assert "corpus.x=1" not in str(error).splitlines()[0]
    found = find_layerplan_error(error)
    assert type(found) is CorpusError
    assert str(found) == "corpus.x=1: is wrong"


def test_the_first_worker_is_heard():
    error = RuntimeError("workers failed")
    error.worker_failures = {0: wrap(CorpusError("first")), 1: TrainingError("second")}  # type: ignore[attr-defined]
    assert str(find_layerplan_error(error)) == "first"


def test_a_fault_that_was_handled_is_not_taken_for_the_cause():
    try:
        try:
            raise CorpusError("handled and gone")
        except CorpusError:
            raise RuntimeError("out of memory") from None
    except RuntimeError as error:
        assert find_layerplan_error(error) is None


def test_a_fault_on_the_way_is_found():
    try:
        try:
            raise CorpusError("the reason")
        except CorpusError as fault:
            raise RuntimeError("wrapped") from fault
    except RuntimeError as error:
        assert str(find_layerplan_error(error)) == "the reason"


def test_a_run_goes_on_with_the_other_tokenizer_library(tmp_path: Path):
    def config(**corpus: object) -> RunConfig:
        values = {"name": "r", "storage_path": str(tmp_path), "model": {"type": "scratch"}}
        return RunConfig.model_validate({**values, "corpus": {"seq_len": 64, **corpus}})

    open_run_folder(config())
    open_run_folder(config(tokenizer_library="tokenizers"))
    with pytest.raises(ConfigError, match=r"corpus\.deduplicate"):
        open_run_folder(config(deduplicate=False))


@pytest.mark.parametrize(
    ("folder", "words"),
    [
        ("what?", r"storage_path: '.*what\?/r' has '\?'"),
        ("a%20b", "has '%20', which ends or changes an address"),
        ("a\nb", r"has '\\n'"),
        ("ftp://host/runs", r"storage_path=ftp://host/runs: ftp:// is not served; .* is, and s3://, gs://, gcs://"),
        ("file:///data/runs", "file:// is not served"),
        ("s3://KEY:SECRET@bucket/runs", r"storage_path=s3://\*\*\*@bucket/runs: keys in an address"),
        ("s3://bucket/runs?scheme=http", "takes no options; set the server in the environment"),
        ("s3://bucket/../runs", "without empty parts, `.`, `..`"),
        ("s3://", "s3://bucket or s3://bucket/folder is expected"),
        ("s3://bucket/a%20b", "has '%20', which ends or changes an address"),
    ],
)
def test_a_folder_that_cannot_stand_in_an_address_is_refused_by_the_character(tmp_path: Path, folder: str, words: str):
    path = folder if "://" in folder else str(tmp_path / folder)
    values = {"name": "r", "storage_path": path, "model": {"type": "scratch"}, "corpus": {"seq_len": 64}}
    with pytest.raises(ConfigError, match=words):
        open_run_folder(RunConfig.model_validate(values))
    assert not list(tmp_path.iterdir())
    open_run_folder(RunConfig.model_validate(values | {"storage_path": str(tmp_path / "50 % & #1 [文]")}))
