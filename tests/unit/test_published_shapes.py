"""Published shapes: the parameters that transformers counts of them are those the authors name on their pages."""

from __future__ import annotations

import pytest

from layerplan.cli import main
from layerplan.models.published import find_published, list_published, load_shape_and_type
from layerplan.models.ref import ModelRef


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("Qwen/Qwen3-0.6B-Base", 596_049_920),
        ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
        ("Qwen/Qwen3-4B-Base", 4_022_468_096),
        ("Qwen/Qwen3-8B-Base", 8_190_735_360),
        ("Qwen/Qwen3-14B-Base", 14_768_307_200),
        ("Qwen/Qwen3-32B", 32_762_123_264),
        ("Qwen/Qwen3-30B-A3B-Base", 30_532_122_624),
        ("Qwen/Qwen2.5-0.5B", 494_032_768),
        ("Qwen/Qwen2.5-1.5B", 1_543_714_304),
        ("Qwen/Qwen2.5-7B", 7_615_616_512),
        ("meta-llama/Llama-3.2-1B", 1_235_814_400),
        ("meta-llama/Llama-3.2-3B", 3_212_749_824),
        ("meta-llama/Llama-3.1-8B", 8_030_261_248),
        ("meta-llama/Llama-3.1-70B", 70_553_706_496),
        ("HuggingFaceTB/SmolLM2-135M", 134_515_008),
        ("HuggingFaceTB/SmolLM2-360M", 361_821_120),
        ("HuggingFaceTB/SmolLM2-1.7B", 1_711_376_384),
        ("mistralai/Mistral-7B-v0.3", 7_248_023_552),
        ("google/gemma-2-2b", 2_614_341_888),
        ("google/gemma-2-9b", 9_241_705_984),
    ],
)
def test_a_published_shape_has_the_published_number_of_parameters(name: str, total: int) -> None:
    shape, model_type = load_shape_and_type(ModelRef(name))
    assert shape.total_params == total
    assert model_type in name.lower().replace(".", "").replace("-", "") or model_type in ("llama", "qwen2", "qwen3_moe")


def test_every_entry_has_names_of_the_hub() -> None:
    assert len(list_published()) >= 30 and all(name.count("/") == 1 for name in list_published())
    assert find_published("Qwen/Qwen3-0.6B-Base", revision="v2") is None and find_published("nobody/nothing") is None


def test_a_paper_config_is_priced_and_dry_run_without_a_network(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: pytest.fail("the hub was asked"))
    assert main(["plan", "price", "Qwen/Qwen3-0.6B-Base"]) == 0
    assert "596,049,920 parameters" in capsys.readouterr().out
    assert main(["run", "--config", "jobs/configs/qwen3_0p6b_freeze_deep.yaml", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "note   corpus.sources.0.path=data/cci3-hq: no such file or folder; a run would stop here" in shown
    assert "28 layers, 596,049,920 parameters" in shown and "text   not known yet: " in shown and "FLOPs  " in shown
