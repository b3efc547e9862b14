import dataclasses

import pytest

from bench import truncated
from flexjax.checkpoint import open_store
from flexjax.cli import BAD_INPUT, run_command
from flexjax.models.config import OPTConfig, named_config


def test_only_the_number_of_layers_differs():
    whole = named_config("opt-30b")
    few = truncated.truncated_config("opt-30b", 3)
    assert few.num_hidden_layers == 3
    assert dataclasses.replace(few, num_hidden_layers=48) == whole


@pytest.mark.parametrize("layers", ["0", "49", "-1"])
def test_a_number_of_layers_that_the_model_has_not_is_refused(tmp_path, capsys, layers):
    args = ["opt-30b", layers, str(tmp_path / "store")]
    assert run_command(truncated._main, truncated.build_parser(), args) == BAD_INPUT
    assert "ask for 1 to 48" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_store_has_so_many_layers(tmp_path, monkeypatch):
    tiny = OPTConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=32,
    )
    monkeypatch.setattr(truncated, "named_config", lambda name: tiny)
    args = ["tiny", "2", str(tmp_path / "store")]
    assert run_command(truncated._main, truncated.build_parser(), args) == 0
    store = open_store(tmp_path / "store")
    assert store.config.num_hidden_layers == 2
    assert {name.split(".")[1] for name in store.tensors if "layers." in name} == {
        *("0", "1")
    }
