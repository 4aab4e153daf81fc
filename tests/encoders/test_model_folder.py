"""What a --model word means: the network is asked for a hub id alone, and for nothing but plain weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from prerank_tools.encoders.model_folder import find_model, model_digest
from prerank_tools.errors import UsageError
from tests.encoders import tiny_models


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """A hub that knows `some/bert`; what it was asked for."""
    asked: list[tuple[str, dict[str, Any]]] = []

    def snapshot_download(name: str, **words: Any) -> str:
        asked.append((name, words))
        if name != "some/bert":
            raise OSError("no such repository")
        return str(tiny_models.bert(tmp_path / "snapshot"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_a_hub_id_is_fetched_without_code_and_pickles(hub: list[tuple[str, dict[str, Any]]]) -> None:
    assert (find_model("some/bert") / "config.json").is_file()
    patterns = hub[0][1]["allow_patterns"]
    assert "*.safetensors" in patterns
    assert not {"*.py", "*.bin", "*.pt", "*.pkl", "*"} & set(patterns)


@pytest.mark.parametrize("name", ["nowhere", "./some/bert", "/some/bert", "a/b/c", "some\\bert", "../bert"])
def test_what_is_no_hub_id_never_reaches_the_network(hub: list[Any], name: str) -> None:
    with pytest.raises(UsageError, match="no such folder"):
        find_model(name)
    assert hub == []


def test_a_folder_comes_before_a_hub_id_of_its_name(
    hub: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_models.bert(tmp_path / "some" / "bert")
    assert find_model("some/bert") == Path("some/bert") and hub == []


def test_a_hub_that_does_not_answer_is_one_error(hub: list[Any]) -> None:
    with pytest.raises(UsageError, match="neither a folder nor a model the hub gives"):
        find_model("some/other")


def test_the_digest_is_the_models_not_the_folders(tmp_path: Path) -> None:
    one, two = tiny_models.bert(tmp_path / "one"), tiny_models.bert(tmp_path / "two")
    assert model_digest(one) == model_digest(two)
    (two / "README.md").write_text("words")
    assert model_digest(one) == model_digest(two)
    assert model_digest(one) != model_digest(tiny_models.bert(tmp_path / "three", num_hidden_layers=1))
