"""Models by their hub id: by the real client, against a stand-in of the hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from layerplan.errors import ModelError
from layerplan.models import hub
from layerplan.models.hub import list_fetched_weights
from layerplan.models.ref import ModelRef
from tests.hub_server import COMMIT, HubRepository, ask_hub_at, read_files, serving
from tests.model_folders import edit_weights, save_tiny_base

NEXT = "b" * 40


@pytest.fixture(autouse=True)
def online(repository: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    hub._fetch_commit.cache_clear()
    with serving(repository):
        ask_hub_at(repository.endpoint, tmp_path / "cache", monkeypatch)
        yield


def make_base(folder: Path, edit: Any = None) -> Path:
    """A base in shards, beside a file of weights in a format of its authors that transformers does not read."""
    from layerplan.models.causal_lm import load_causal_lm

    save_tiny_base(folder)
    if edit is not None:
        edit_weights(folder, edit)
    load_causal_lm(str(folder)).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def double_the_norm(tensors: dict[str, Any]) -> None:
    tensors["model.norm.weight"] = 2 * tensors["model.norm.weight"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return make_base(folder / "first"), make_base(folder / "second", double_the_norm)


@pytest.fixture
def repository(bases: tuple[Path, Path]) -> HubRepository:
    commits = {commit: read_files(folder) for commit, folder in zip((COMMIT, NEXT), bases, strict=True)}
    commits[COMMIT]["consolidated.safetensors"] = b"not read"
    return HubRepository("models", "owner/base", commits)


def test_the_identity_is_that_of_a_folder_with_the_same_weights(
    repository: HubRepository, bases: tuple[Path, Path]
) -> None:
    first, second = (ModelRef(str(folder)).identity().weights_sha256 for folder in bases)
    model = ModelRef("owner/base")
    pinned = model.at_commit()
    assert pinned == ModelRef("owner/base", revision=COMMIT) and pinned.at_commit() == pinned
    assert model.identity().weights_sha256 == model.hash_files()["weights"] == first != second
    repository.branches["main"] = NEXT
    assert model.identity().weights_sha256 == second
    assert pinned.identity().weights_sha256 == first and pinned.identity().revision == COMMIT
    assert not any("consolidated" in request for request in repository.requests)


def test_whoever_waits_for_weights_is_told_once(repository: HubRepository, caplog: pytest.LogCaptureFixture) -> None:
    model = ModelRef("owner/base").at_commit()
    with caplog.at_level("INFO", logger="layerplan"):
        model.identity(), model.skeleton()
    (said,) = [each for each in caplog.messages if "weights" in each]
    count = len(list_fetched_weights(model.folder()))
    assert said == f"fetching weights of owner/base from the hub, {count} of {count} files, 0.0 GiB in all"


def test_weights_are_not_fetched_to_price_a_plan(repository: HubRepository) -> None:
    assert ModelRef("owner/base").identity(with_weights=False).weights_sha256 is None
    assert not any("safetensors" in request for request in repository.requests)


def test_the_hub_is_not_asked_again_for_what_a_commit_holds(repository: HubRepository) -> None:
    model = ModelRef("owner/base", revision=COMMIT)
    for _ in range(2):
        repository.requests.clear()  # at first transformers looks for files that there are not, and remembers
        model.check()
        model.identity(), model.config(), model.shape(), model.max_positions(), model.skeleton(), model.load()
        assert model.tokenizer_file().is_file()
    assert repository.requests == []


def test_what_cannot_be_fetched_is_said_in_one_line(
    repository: HubRepository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ModelRef("owner/base")
    missing = (
        "model.name=owner/none: no such folder, and the hub has no such model, or none that HF_TOKEN may read",
        "model.revision=v9: the hub's owner/base has no such branch, tag or commit",
        "model.name=no/such/id: no such folder, and not a hub id of the form owner/name",
    )
    for model, words in zip(
        (ModelRef("owner/none"), ModelRef("owner/base", revision="v9"), ModelRef("no/such/id")), missing, strict=True
    ):
        for ask in (model.config, model.folder, model.tokenizer_file, model.at_commit):
            expect(ask, words)
    repository.token = "hf_right"
    expect(base.config, "model.name=owner/base: is gated on the hub; accept its terms there and set HF_TOKEN")
    repository.token = None
    del repository.commits[COMMIT]["tokenizer.json"]
    expect(base.tokenizer_file, "model.name=owner/base: has no tokenizer.json; of a tokenizer of another kind")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    for ask in (base.config, base.folder):
        expect(
            ask,
            "model.name=owner/base: no such folder, not in this machine's cache of the hub, and the hub cannot be asked",
        )


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (
            "pytorch_model.bin",
            "only pytorch_model.bin; other formats are not read: load it with transformers and save it",
        ),
        ("q4.gguf", "download a GGUF file of it and name that, such as q4.gguf"),
        ("note.txt", "it is not a whole checkpoint"),
    ],
)
def test_weights_in_another_format_are_told_as_what_they_are(file: str, words: str, repository: HubRepository) -> None:
    small = {name: content for name, content in repository.commits[COMMIT].items() if "safetensors" not in name}
    repository.commits[COMMIT] = small | {file: b"weights"}
    model = ModelRef("owner/base")
    for ask in (model.check, model.identity):
        with pytest.raises(ModelError, match=r"model.name=owner/base: the hub has no \*.safetensors weights.*" + words):
            ask()


def expect(ask: Callable[[], object], words: str) -> None:
    with pytest.raises(ModelError) as caught:
        ask()
    assert str(caught.value).startswith(words) and "\n" not in str(caught.value)


def test_a_name_that_begins_with_a_tilde_is_below_the_home_of_whoever_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To transformers it would be a hub id, and on a worker's machine another folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    save_tiny_base(tmp_path / "models" / "mine")
    model = ModelRef("~/models/mine/")
    monkeypatch.setenv("HOME", "/nowhere")
    assert model.name == str(tmp_path / "models" / "mine") and model.shape().num_layers == 3
