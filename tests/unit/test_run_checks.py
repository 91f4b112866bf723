"""What is looked at before anything is built: here, whether the tokenizer fits the model, and a run's earlier config."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_model

from eval.held_out import read_held_out
from layerplan.artifacts import write_text
from layerplan.config.corpus import SourceConfig
from layerplan.config.evaluation import HeldOutConfig
from layerplan.config.load import dump_config
from layerplan.config.run import RunConfig
from layerplan.errors import ConfigError, CorpusError, EvaluationError, ModelError, PlanError
from layerplan.models.freezing import AppliedPlan
from layerplan.pipeline.candidates import DEFAULT_SWEEP
from layerplan.pipeline.checks import check_model, check_rows
from layerplan.pipeline.dry_run import print_corpus_dry_run, print_dry_run
from layerplan.pipeline.file_checks import check_benchmarks, check_corpus
from layerplan.pipeline.measure_dry_run import print_measure_dry_run
from layerplan.pipeline.run_folder import locate_run_folder, open_run_folder
from layerplan.pipeline.sweep_dry_run import print_sweep_dry_run
from layerplan.plan.memory import MemoryEstimate
from layerplan.plan.placement import Placement
from layerplan.run_folder import RESULT_NAME
from layerplan.train.build import render_placement
from tests.qwen3 import TINY_QWEN3, build_tiny_qwen3
from tests.tiny_tokenizer import make_bytes, save_tokenizer

ROOT = Path(__file__).resolve().parents[2]
ROWS = 257


def make_model(folder: Path, *, control: tuple[str, ...], ordinary: tuple[str, ...] = ()) -> RunConfig:
    """A model with an embedding of 257 rows, one for each byte and one more."""
    files = {"config": TINY_QWEN3 | {"vocab_size": ROWS, "eos_token_id": 256}}
    save_tokenizer(folder / "model", make_bytes(), control=control, ordinary=ordinary, **files)
    save_model(build_tiny_qwen3(vocab_size=ROWS), str(folder / "model" / "model.safetensors"))
    return make_config(folder)


def make_config(folder: Path, **corpus: Any) -> RunConfig:
    model = {"type": "pretrained", "name": str(folder / "model")}
    values = {"name": "run", "storage_path": str(folder / "runs"), "model": model, "corpus": {"seq_len": 64} | corpus}
    return RunConfig.model_validate(values | {"plan": {"type": "full"}})


def test_only_an_id_that_text_can_yield_must_have_a_row_in_the_embedding(tmp_path: Path) -> None:
    """A control token one past the embedding never occurs in text; when it is asked for, it may."""
    check_model(make_model(tmp_path, control=("<eos>", "<late>")))
    words = (
        r"documents can yield token '<late>' \(257\), the embedding has 257 rows; the tokenizer does not fit the model"
    )
    with pytest.raises(ModelError, match=words):
        check_model(make_config(tmp_path, control_tokens="token"))
    with pytest.raises(ModelError, match=words.replace("<late>", "<tool>")):
        check_model(make_model(tmp_path / "other", control=("<eos>",), ordinary=("<tool>",)))


def test_a_run_in_rays_copy_of_a_jobs_working_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next submission with another file in the directory has another copy, and would begin the run anew."""
    here = tmp_path / "session" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    here.mkdir(parents=True)
    monkeypatch.chdir(here)
    config = make_model(tmp_path, control=("<eos>",))
    assert locate_run_folder(config).root == tmp_path / "runs" / "run"
    with pytest.raises(ConfigError, match=r"storage_path=runs: lies in Ray's temporary copy .* an absolute path"):
        open_run_folder(config.model_copy(update={"storage_path": "runs"}))
    assert list(here.iterdir()) == []


def test_an_address_that_lost_a_slash_is_no_folder(tmp_path: Path) -> None:
    config = make_model(tmp_path, control=("<eos>",))
    with pytest.raises(ConfigError, match=r"storage_path=s3:/bucket/x: an address has two slashes after its scheme"):
        locate_run_folder(config.model_copy(update={"storage_path": str(Path("s3://bucket/x"))}))


@pytest.mark.parametrize("path", ["$HOME/runs", "${SCRATCH}/runs", "/data/$USER"])
def test_a_variable_is_no_folder_either(path: str, tmp_path: Path) -> None:
    config = make_model(tmp_path, control=("<eos>",)).model_copy(update={"storage_path": path})
    with pytest.raises(ConfigError, match="variables are not replaced in a config; write the path, or `~`"):
        locate_run_folder(config)


def test_a_dry_run_shows_what_is_known_of_the_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_model(tmp_path, control=("<eos>", "<late>"))
    print_dry_run(config)
    shown = capsys.readouterr().out
    assert "text   documents are ended with '<eos>' (256), control tokens in them as text" in shown
    assert "258 entries; text yields ids below 257, control tokens 1 more" in shown
    assert "end of text '<eos>' (256), named by config.json; before a text nothing; padding none" in shown
    (tmp_path / "model" / "tokenizer.json").unlink()
    print_dry_run(config)
    assert "text   not known yet: model.name=" in capsys.readouterr().out


def test_rows_longer_than_the_models_positions_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    """By a run before its cluster starts, and by a dry run."""
    make_model(tmp_path, control=("<eos>",))
    config = make_config(tmp_path, seq_len=65)
    for check in (check_rows, print_dry_run):
        with pytest.raises(PlanError, match=r"corpus\.seq_len=65: the model has 64 positions"):
            check(config)


def test_a_held_out_text_that_is_missing_is_named_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    make_model(tmp_path, control=("<eos>",))
    config = make_config(tmp_path, sources=[{"path": str(tmp_path / "text.txt")}])
    held_out = [HeldOutConfig(name="target", source=SourceConfig(path=str(tmp_path / "none")))]
    config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"held_out": held_out})})
    words = f"evaluation.held_out (target).source.path={tmp_path / 'none'}: no such file or folder"
    for read in (check_corpus, lambda config: read_held_out(config.evaluation.held_out[0])):
        with pytest.raises(CorpusError, match=re.escape(words)):
            read(config)
    print_dry_run(config)
    assert f"note   {words}; a run would stop here" in capsys.readouterr().out


def test_a_dry_run_tells_every_local_text_that_a_run_would_miss(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the words of the run; below the numbers, for which texts are not needed. What lies elsewhere is not asked for."""
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    make_model(tmp_path, control=("<eos>",))
    sources = [str(tmp_path / "text.txt"), "/nope/text", "s3://bucket/text", "hub://owner/texts"]
    config = make_config(tmp_path, sources=[{"path": path} for path in sources])
    benchmarks = [{"name": "ceval", "path": "hub"}, {"name": "cmmlu", "path": "/nope/cmmlu"}]
    config = RunConfig.model_validate(config.model_dump() | {"evaluation": {"benchmarks": benchmarks}})
    text = "corpus.sources.1.path=/nope/text: no such file or folder"
    questions = "evaluation.benchmarks: cmmlu: /nope/cmmlu does not exist; a folder of CSV files is expected"
    print_dry_run(config)
    shown = capsys.readouterr().out
    notes = [line for line in shown.splitlines() if line.endswith("; a run would stop here")]
    assert notes == [f"note   {words}; a run would stop here" for words in (text, questions)]
    assert f"source {tmp_path / 'text.txt'}: 1 file, 6 bytes as stored" in shown and "FLOPs  " in shown
    with pytest.raises(CorpusError, match=re.escape(text)):
        check_corpus(config)
    config.evaluation.benchmarks.pop(0)
    with pytest.raises(EvaluationError, match=re.escape(questions)):
        check_benchmarks(config)


def test_what_files_tell_is_said_before_pytorch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    save_tokenizer(tmp_path / "model", make_bytes(), control=("<eos>",), config=TINY_QWEN3)
    text, away = {"path": str(tmp_path / "text.txt")}, {"path": "/nope/text"}
    base, other = str(tmp_path / "model"), str(tmp_path / "none")
    faults = [(other, text, []), (base, away, []), (base, text, [{"name": "cmmlu", "path": "/nope"}])]
    code = f"""
import sys
from layerplan.config.load import validate_config
from layerplan.errors import LayerplanError
from layerplan.pipeline.chain import continue_pretraining
for name, source, benchmarks in {faults!r}:
    values = {{"name": "run", "storage_path": {str(tmp_path / "runs")!r}, "model": {{"type": "pretrained", "name": name}}}}
    values |= {{"corpus": {{"sources": [source]}}, "plan": {{"type": "full"}}}}
    if benchmarks:
        values["evaluation"] = {{"benchmarks": benchmarks}}
    try:
        continue_pretraining(validate_config(values))
    except LayerplanError as error:
        print(str(error).partition("=")[0].partition(":")[0], "torch" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    said = ["model.name False", "corpus.sources.0.path False", "evaluation.benchmarks False"]
    assert done.stdout.splitlines() == said, done.stderr


def test_text_of_a_base_is_looked_for_until_the_base_is_made(tmp_path: Path) -> None:
    """And text of a corpus when there is no store of it."""
    model = {"type": "scratch", "pretrain_sources": [{"path": "/nope/base"}]}
    corpus = {"seq_len": 64, "sources": [{"path": "/nope/text"}], "store": str(tmp_path / "store")}
    values = make_config(tmp_path).model_dump() | {"model": model, "corpus": corpus}
    config = RunConfig.model_validate(values)
    with pytest.raises(CorpusError, match=r"model\.pretrain_sources\.0\.path=/nope/base: no such file or folder"):
        check_corpus(config)
    write_text(locate_run_folder(config).base_model / RESULT_NAME, "{}")
    check_corpus(config)


def test_the_dry_run_of_measuring_says_what_is_read_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.txt").write_text("a text", encoding="utf-8")
    make_model(tmp_path, control=("<eos>",))
    print_measure_dry_run(make_config(tmp_path, sources=[{"path": str(tmp_path / "text.txt")}]), ["fisher", "pilot"])
    shown = capsys.readouterr().out.partition("\n}\n")[2]  # behind the config
    assert f"source {tmp_path / 'text.txt'}: 1 file," in shown
    assert "measure fisher: 4,096 tokens in rows of 256" in shown, "16 rows"
    assert "measure pilot: 51,200 tokens in rows of 256" in shown, "50 of 1,000 steps, 4 rows each"
    assert "tokens 262" not in shown and "probes" not in shown and "spectrum" not in shown


def test_the_dry_run_of_a_corpus_says_what_there_is_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in (("a.txt", 1_000_000), ("b.txt", 500_000)):
        (tmp_path / "text").mkdir(exist_ok=True)
        (tmp_path / "text" / name).write_text("x" * size, encoding="utf-8")
    make_model(tmp_path, control=("<eos>",))
    print_corpus_dry_run(make_config(tmp_path, sources=[{"path": str(tmp_path / "text")}]))
    shown = capsys.readouterr().out
    assert f"source {tmp_path / 'text'}: 2 files, 1.5 MB as stored" in shown
    assert "documents are ended with '<eos>' (256)" in shown and "FLOPs" not in shown
    assert not (tmp_path / "runs").exists()


def test_the_dry_run_of_a_sweep_lists_every_trial(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_model(tmp_path, control=("<eos>",))
    layers = TINY_QWEN3["num_hidden_layers"]
    print_sweep_dry_run(config, DEFAULT_SWEEP.model_copy(update={"split_ratios": None, "boundaries": [1]}))
    shown = capsys.readouterr().out
    assert f"{layers} layers" in shown and "trials 1, each" in shown and "boundary_01: " in shown and "in all" in shown
    with pytest.raises(ConfigError, match=r"sweep.boundaries.*99"):
        print_sweep_dry_run(config, DEFAULT_SWEEP.model_copy(update={"split_ratios": None, "boundaries": [99]}))


def test_a_run_of_a_version_without_a_field_has_its_default(tmp_path: Path) -> None:
    """And one whose field was there and differs is another run."""
    config = make_model(tmp_path, control=("<eos>",))
    folder = open_run_folder(config)
    content = json.loads(dump_config(config))
    del content["corpus"]["control_tokens"], content["corpus"]["deduplicate"]
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    assert open_run_folder(config) == folder
    content["corpus"]["seq_len"] = 32
    folder.config.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"exists with corpus.seq_len=32"):
        open_run_folder(config)


def test_a_run_whose_address_has_credentials_is_continued_with_the_same_or_others(tmp_path: Path) -> None:
    """They are not written down, so they cannot differ; a folder in which an earlier version wrote them continues too."""
    with_credentials = [
        make_config(tmp_path, sources=[{"path": f"https://anna:{password}@host/x.jsonl"}])
        for password in ("one", "two")
    ]
    folder = open_run_folder(with_credentials[0])
    assert "one" not in json.loads(folder.config.read_text(encoding="utf-8"))["corpus"]["sources"][0]["path"]
    assert open_run_folder(with_credentials[1]) == folder
    folder.config.write_text(json.dumps(with_credentials[0].model_dump(mode="json")), encoding="utf-8")
    assert open_run_folder(with_credentials[1]) == folder


@pytest.mark.parametrize("made", ["plan", "sweep"])
def test_a_plan_may_be_mended_until_something_is_made_by_it(tmp_path: Path, made: str) -> None:
    """One that was refused after its measurement, say: the measurement is kept, and so is the name."""
    folder = open_run_folder(make_config(tmp_path))
    values = make_config(tmp_path).model_dump()
    other = RunConfig.model_validate(values | {"plan": {"type": "freeze_deep", "boundary": 1}})
    write_text(folder.profile, "{}")
    open_run_folder(other)
    assert json.loads(folder.config.read_text(encoding="utf-8"))["plan"]["boundary"] == 1
    write_text(getattr(folder, made), "{}")
    with pytest.raises(ConfigError, match=r"exists with plan.type='freeze_deep', this config has 'full'"):
        open_run_folder(make_config(tmp_path))


@pytest.mark.parametrize("made", ["plan", "sweep", "manifest", "base_model", "measurements"])
def test_sources_may_be_mended_until_something_is_made_of_them(tmp_path: Path, made: str) -> None:
    wrong, right = (make_config(tmp_path, sources=[{"path": "text", "text_column": name}]) for name in ("txt", "text"))
    folder = open_run_folder(wrong)
    open_run_folder(right)
    write_text(getattr(folder, made), "{}")
    with pytest.raises(ConfigError, match=r"exists with corpus\.sources="):
        open_run_folder(wrong)


def test_another_kind_of_plan_under_an_old_name_is_one_fault(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    write_text(open_run_folder(config).plan, "{}")
    other = RunConfig.model_validate(config.model_dump() | {"plan": {"type": "freeze_deep", "boundary": 1}, "seed": 3})
    with pytest.raises(ConfigError) as caught:
        open_run_folder(other)
    assert [line.partition(",")[0] for line in caught.value.args] == [
        "name: run 'run' exists with plan.type='full'",
        "name: run 'run' exists with seed=0",
    ]


@pytest.mark.parametrize(
    ("asked", "parallelism", "told"),
    [
        (
            {"num_replicas": 2, "frozen_sharding": "shard"},
            "auto",
            "train.num_replicas=2 and train.frozen_sharding=shard do nothing without train.parallelism=shard",
        ),
        ({"num_replicas": 2}, "auto", "train.num_replicas=2 does nothing without train.parallelism=shard"),
        ({"frozen_sharding": "replicate"}, "auto", ""),
        ({"num_replicas": 2, "frozen_sharding": "shard"}, "shard", ""),
    ],
)
def test_what_is_said_of_shards_in_vain_is_told_beside_the_placement(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], asked: dict[str, Any], parallelism: str, told: str
) -> None:
    """`auto` replicates a model that fits, by the dry run and when the run starts."""
    config = make_model(tmp_path, control=("<eos>",))
    train = {"num_workers": 2, "global_batch_size": 4, "parallelism": parallelism, **asked}
    config = RunConfig.model_validate(config.model_dump() | {"train": train})
    print_dry_run(config)
    dry = capsys.readouterr().out
    settled = "shard" if parallelism == "shard" else "replicate"
    estimate = MemoryEstimate(0.0, 0.0, 0.0, 0.0)
    started = render_placement(
        Placement(settled, "shard"), estimate, 1.0, AppliedPlan(frozenset(), frozenset()), config.train
    )
    for shown in (dry, started):
        assert f"parallelism {settled}" in shown
        assert told in shown and ("nothing without" in shown) == bool(told)
