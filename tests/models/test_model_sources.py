"""Where a model comes from: told apart quickly, and never by waiting for a network."""

from __future__ import annotations

import socket
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from rewardprop_fast import hub
from rewardprop_fast.errors import ModelError
from rewardprop_fast.models.load import locate
from rewardprop_fast.models.random_init import tiny_stable_diffusion
from rewardprop_fast.models.skeleton import load_skeleton


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if nobody had said that this is offline, and no proxy were set."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)


def test_a_network_that_swallows_packets_is_given_up_on(online: None, monkeypatch) -> None:
    monkeypatch.setattr(socket, "create_connection", lambda *a, **k: time.sleep(30))
    started = time.monotonic()
    assert not hub.reachable(0.2)
    assert time.monotonic() - started < 5


def test_a_hub_that_answers_is_reachable_also_through_a_proxy(online: None, monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        assert hub.reachable(10)
        monkeypatch.setattr(constants, "ENDPOINT", "http://hub.invalid")
        assert not hub.reachable(10)
        proxies = {"http": f"http://127.0.0.1:{port}"}
        monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
        assert hub.reachable(10)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not hub.reachable(10)


def test_folders_and_hub_names_are_told_apart(tmp_path: Path, monkeypatch) -> None:
    assert locate(tmp_path) == (str(tmp_path), True)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert locate("owner/model") == ("owner/model", False)
    for missing in ("./model", "/no/such/model", "a/b/c", "model"):
        with pytest.raises(ModelError, match="There is no folder"):
            locate(missing)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    with pytest.raises(ModelError, match="'owner/model' is not a local folder"):
        locate("owner/model")


def test_a_downloaded_model_needs_no_network(tmp_path: Path, monkeypatch) -> None:
    commit = "0" * 40
    repository = tmp_path / "models--owner--model"
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "model_index.json").write_text("{}", encoding="utf-8")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "reachable", lambda: False)
    assert locate("owner/model") == ("owner/model", False)


def test_a_skeleton_has_the_shapes_and_no_weights(tmp_path: Path) -> None:
    pipe = tiny_stable_diffusion(prediction_type="v_prediction")
    pipe.save_pretrained(tmp_path)
    skeleton = load_skeleton(tmp_path)
    shapes = {name: p.shape for name, p in pipe.unet.named_parameters()}
    assert {name: p.shape for name, p in skeleton.unet.named_parameters()} == shapes
    assert {p.device for p in skeleton.unet.parameters()} == {torch.device("meta")}
    assert skeleton.scheduler.config["prediction_type"] == "v_prediction"
