"""Embeddings kept on the host and on disk: the same to the last bit, and never in the way."""

from __future__ import annotations

import errno
import os
import warnings
from pathlib import Path

import pytest
import torch

from rewardprop_fast.models import EmbeddingCache, PromptEncoder
from rewardprop_fast.models.embedding_cache import identity_of_encoders
from rewardprop_fast.models.encoders import Encoders, encoders
from rewardprop_fast.models.random_init import tiny_stable_diffusion, tiny_stable_diffusion_xl
from rewardprop_fast.rollout import Conditioning

TEXTS = ["a red apple", "", "a green pear"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def pipe(request):
    return tiny_stable_diffusion() if request.param == "sd" else tiny_stable_diffusion_xl()


def same(a: Conditioning, b: Conditioning) -> bool:
    pairs = [(a.positive, b.positive)]
    assert (a.negative is None) == (b.negative is None)
    if a.negative is not None:
        pairs.append((a.negative, b.negative))
    for part in ("positive_added", "negative_added"):
        mine, theirs = getattr(a, part), getattr(b, part)
        assert mine.keys() == theirs.keys()
        pairs += [(mine[key], theirs[key]) for key in mine]
    assert all(x.dtype == y.dtype for x, y in pairs)
    return all(torch.equal(x, y) for x, y in pairs)


def encoder_that_fails(pipe, monkeypatch):
    def refuse(**_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(pipe, "encode_prompt", refuse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guided", [True, False])
def test_a_later_run_reads_what_an_earlier_one_computed(pipe, tmp_path, monkeypatch, dtype, guided):
    for network in (pipe.unet, *encoders(pipe)):
        torch.nn.Module.to(network, dtype)
    expected = PromptEncoder(pipe, 16, 24, "grey", guided)(TEXTS)
    folder = tmp_path / "some" / "folder"
    first = PromptEncoder(pipe, 16, 24, "grey", guided, EmbeddingCache(folder))(TEXTS)
    assert same(first, expected)
    assert len(list(folder.iterdir())) == len(TEXTS)
    encoder_that_fails(pipe, monkeypatch)
    later = PromptEncoder(pipe, 16, 24, "grey", guided, EmbeddingCache(folder))
    assert same(later(TEXTS), expected)
    with pytest.raises(AssertionError, match="encoded again"):
        later(["another"])


@pytest.mark.parametrize(
    "change",
    ["size", "negative", "guided", "weights", "tokenizer", "config"],
)
def test_everything_that_decides_is_in_the_key(tmp_path, monkeypatch, change):
    pipe = tiny_stable_diffusion_xl()
    cache = EmbeddingCache(tmp_path)
    PromptEncoder(pipe, 16, 24, "grey", True, cache)(TEXTS)
    size, negative, guided = (16, 24), "grey", True
    if change == "size":
        size = (24, 16)
    elif change == "negative":
        negative = "blue"
    elif change == "guided":
        guided = False
    elif change == "weights":
        with torch.no_grad():
            next(reversed(list(pipe.text_encoder_2.parameters()))).flatten()[-1].add_(1)
    elif change == "tokenizer":
        pipe.tokenizer_2.add_tokens(["<new>"])
    else:
        pipe.register_to_config(force_zeros_for_empty_prompt=False)
    expected = PromptEncoder(pipe, *size, negative, guided)(TEXTS)
    assert same(PromptEncoder(pipe, *size, negative, guided, cache)(TEXTS), expected)
    assert len(list(tmp_path.iterdir())) == 2 * len(TEXTS)


def test_the_same_weights_have_one_identity():
    one, other = tiny_stable_diffusion(), tiny_stable_diffusion()
    assert identity_of_encoders(one) == identity_of_encoders(other)
    PromptEncoder(one, 16, 16)(TEXTS)
    assert identity_of_encoders(one) == identity_of_encoders(other)  # used or not
    assert identity_of_encoders(one) != identity_of_encoders(tiny_stable_diffusion(seed=1))


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None, "positive"])
def test_a_damaged_file_is_written_anew(pipe, tmp_path, damage):
    expected = PromptEncoder(pipe, 16, 16)(TEXTS)
    PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path))(TEXTS)
    for path in tmp_path.iterdir():
        data = path.read_bytes()
        if damage == "positive":
            data = data.replace(b'"positive"', b'"other_one"'[:10])
        path.write_bytes(data[:-1] if damage is None else data if damage == "positive" else damage)
    with pytest.warns(UserWarning, match="damaged file") as caught:
        assert same(PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path))(TEXTS), expected)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path))(TEXTS), expected)


def test_a_folder_that_cannot_be_written_is_a_warning(pipe, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match=r"cannot be written .*No space left") as caught:
        found = PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path))(TEXTS)
    assert len(caught) == 1
    assert same(found, PromptEncoder(pipe, 16, 16)(TEXTS))
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_place_of_the_folder(pipe, tmp_path):
    (tmp_path / "cache").write_text("")
    with pytest.warns(UserWarning, match="cannot be"):
        found = PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path / "cache"))(TEXTS)
    assert same(found, PromptEncoder(pipe, 16, 16)(TEXTS))


class Moves:
    """Where each module was sent, in order; nothing moves."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[tuple[torch.nn.Module, str]] = []
        monkeypatch.setattr(
            "rewardprop_fast.models.encoders._move",
            lambda module, device: self.log.append((module, str(device))),
        )
        monkeypatch.setattr(Encoders, "REST", torch.device("meta"))

    def take(self) -> list[str]:
        found, self.log = [device for _, device in self.log], []
        return found


def test_encoders_leave_while_their_prompts_are_encoded_ahead(pipe, monkeypatch):
    moves, count = Moves(monkeypatch), len(encoders(pipe))
    assert pipe.text_encoder in encoders(pipe)
    assert pipe.vae.encoder in encoders(pipe)
    assert pipe.unet not in encoders(pipe)
    assert pipe.vae.decoder not in encoders(pipe)
    encoder = PromptEncoder(pipe, 16, 16)
    with encoder.ahead(TEXTS):
        assert moves.take() == ["meta"] * count
        encoder(TEXTS)
        assert moves.take() == []
        encoder(["another"])  # they come back for it, and leave again
        assert moves.take() == ["cpu"] * count + ["meta"] * count
        encoder(["another"])
        assert moves.take() == []
    assert moves.take() == ["cpu"] * count
    assert not encoder.encoders.away


def test_encoders_come_back_after_an_error(pipe, monkeypatch):
    moves, count = Moves(monkeypatch), len(encoders(pipe))
    encoder = PromptEncoder(pipe, 16, 16)
    with pytest.raises(ZeroDivisionError), encoder.ahead(TEXTS):
        raise ZeroDivisionError
    assert moves.take() == ["meta"] * count + ["cpu"] * count


def test_what_moves_comes_back_as_it_was():
    pipe = tiny_stable_diffusion_xl()
    before = [p.clone() for module in encoders(pipe) for p in module.parameters()]
    kept = [p for module in encoders(pipe) for p in module.parameters()]
    away = Encoders(pipe)
    away.leave()
    away.leave()
    assert away.away
    away.come_back()
    away.come_back()
    after = [p for module in encoders(pipe) for p in module.parameters()]
    assert all(a is b for a, b in zip(after, kept, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_what_is_remembered_lies_on_the_host(pipe):
    encoder = PromptEncoder(pipe, 16, 16)
    encoder(TEXTS)
    assert {known.positive.device.type for known in encoder._known.values()} == {"cpu"}


def test_keys_are_names_of_files(pipe, tmp_path):
    PromptEncoder(pipe, 16, 16, cache=EmbeddingCache(tmp_path))(["../a/b", "x" * 500, "\x00 ü"])
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 3
    assert all(len(name) == 64 + len(".safetensors") for name in names)
    assert Path(tmp_path).is_dir()
