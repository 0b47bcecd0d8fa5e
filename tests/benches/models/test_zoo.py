"""Models by name, by a factory and from folders: what they give, and wrong names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bigops
from bigops.benches.harness import LeftOut
from bigops.benches.models import by_config, kept, pretrained, subject, zoo
from bigops.benches.models.subject import Subject
from tests.benches.models import small

HERE = "tests.benches.models.small"


def of(name: str) -> Subject:
    return next(iter(zoo.subjects(name)))


# --- a user's own ------------------------------------------------------------------------------


def test_a_factory_gives_its_first_output() -> None:
    found = of(f"{HERE}:tokens")
    assert found.shape == "2x6"
    assert found.calibration == [found.inputs]
    assert torch.equal(found.model(*found.inputs), small.tokens()[0](*found.inputs)[0])
    assert not any(p.requires_grad for p in found.model.parameters())


def test_a_factory_may_give_calibration() -> None:
    found = of(f"{HERE}:with_calibration")
    assert [len(one) for one in found.calibration] == [1, 1]
    assert not torch.equal(found.calibration[0][0], found.inputs[0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bert-huge", "expected one of minilm, .*module:factory or a folder; got 'bert-huge'"),
        (f"{HERE}:absent", "no attribute 'absent'"),
        ("no_such_module:f", "No module named 'no_such_module'"),
        (f"{HERE}:nothing", "expected .* to give .model, example_inputs. .* got NoneType"),
    ],
)
def test_wrong_names_are_errors(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        of(name)


def test_a_folder_without_a_config_is_an_error(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    with pytest.raises(ValueError, match=r"expected config.json of save_pretrained"):
        of(str(tmp_path))


def test_a_folder_of_save_pretrained(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**small.BERT)).eval()
    model.save_pretrained(tmp_path)
    found = of(str(tmp_path))
    ids, mask = found.inputs
    with torch.no_grad():
        assert torch.equal(
            found.model(ids, mask), model(input_ids=ids, attention_mask=mask).last_hidden_state
        )


def test_a_folder_with_the_file_of_bigops_save_has_its_weights(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**small.BERT)).eval()
    model.save_pretrained(tmp_path)
    bigops.compress_(model, bigops.Int8())
    bigops.save(model, tmp_path / "model.safetensors")
    found = of(str(tmp_path))
    query = "encoder.layer.0.attention.self.query"
    plain = found.model.get_submodule(f"model.{query}")
    assert type(plain) is nn.Linear
    assert torch.equal(plain.weight, model.get_submodule(query).weight + 0.0)


# --- by config -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn() -> dict[str, Subject]:
    pytest.importorskip("transformers")
    return {
        "bert": by_config.bert("bert", 4, 8, **small.BERT),
        "albert": by_config.albert("albert", 2, 8, **small.BERT, embedding_size=16),
        "vit": by_config.vit("vit", 1, **small.VIT),
        "llama": by_config.llama("llama", False, 8, **small.LLAMA),
        "llama-step": by_config.llama("llama-step", True, 8, **small.LLAMA),
        "t5": by_config.t5("t5", False, 2, 8, **small.T5),
        "t5-step": by_config.t5("t5-step", True, 2, 8, **small.T5),
    }


SHAPES = {
    "bert": (4, 8, 32),
    "albert": (2, 8, 32),
    "vit": (1, 1000),
    "llama": (1, 8, 128),
    "llama-step": (1, 1, 128),
    "t5": (2, 8, 32),
    "t5-step": (2, 1, 128),
}


@pytest.mark.parametrize("name", SHAPES)
def test_each_runs_on_its_inputs_and_on_its_calibration(
    drawn: dict[str, Subject], name: str
) -> None:
    found = drawn[name]
    with torch.no_grad():
        out = found.model(*found.inputs)
        assert out.shape == SHAPES[name]
        assert found.model(*found.calibration[-1]).shape == SHAPES[name]
    assert found.decode == name.endswith("step")
    assert [x.shape for x in found.calibration[0]] == [x.shape for x in found.inputs]


def test_a_step_equals_the_last_position_of_the_whole(drawn: dict[str, Subject]) -> None:
    whole, step = drawn["llama"], drawn["llama-step"]
    ids = torch.cat([subject.tokens(1, 7, 128, 0), step.inputs[0]], 1)
    with torch.no_grad():
        expected = whole.model(ids)[:, -1:]
        torch.testing.assert_close(step.model(*step.inputs), expected)


def test_a_step_leaves_its_cache_as_it_was(drawn: dict[str, Subject]) -> None:
    step = drawn["llama-step"]
    before = [x.clone() for x in step.inputs]
    with torch.no_grad():
        first = step.model(*step.inputs)
        assert torch.equal(first, step.model(*step.inputs))
    assert all(map(torch.equal, before, step.inputs))


def test_padding_is_in_the_mask(drawn: dict[str, Subject]) -> None:
    _, mask = drawn["bert"].inputs
    assert mask.sum(1).tolist() == [8, 8, 8, 6]


# --- pretrained ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minilm", "smollm2", "smollm2-step"])
def test_what_is_not_installed_is_left_out_by_name(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(package: str) -> Path:
        raise LeftOut(f"{package} is not installed ({name})")

    monkeypatch.setattr(pretrained, "package", missing)
    assert list(zoo.subjects(name)) == []
    assert f"{name} left out:" in capsys.readouterr().err


def test_retrieval_counts_own_answers() -> None:
    vectors = torch.eye(4)[:, None]  # [question, one token, width]
    mask = torch.ones(1, 1)
    asked = [(v[None], mask) for v in vectors]
    swapped = [asked[1], asked[0], *asked[2:]]
    assert pretrained.retrieval(lambda ids, mask: ids, asked, asked) == 100.0
    assert pretrained.retrieval(lambda ids, mask: ids, asked, swapped) == 50.0


def test_perplexity_of_even_guesses_is_the_vocabulary() -> None:
    windows = [(torch.arange(6)[None],), (torch.arange(6)[None] + 1,)]
    even = pretrained.perplexity(lambda ids: torch.zeros(1, 6, 10), windows)
    assert even == pytest.approx(10.0)


def test_verses_are_spaced_over_the_whole_book(tmp_path: Path) -> None:
    import sqlite3

    with sqlite3.connect(tmp_path / "b.db") as base:
        base.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
        for place in range(10):
            for version in "k3":
                row = (version, place // 5, 1, place % 5, f"{version}{place}")
                base.execute("insert into bible values (?, ?, ?, ?, ?)", row)
    assert pretrained.verses(tmp_path / "b.db", "3", 2) == ["30", "35"]
    assert pretrained.verses(tmp_path / "b.db", "k", 2, 1) == ["k1", "k6"]


def test_what_is_kept_is_found_by_what_it_was_made_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kept.folder() == tmp_path / "bigops" / "benches"
    first, same, other = (of(f"{HERE}:tokens") for _ in range(3))
    assert kept.stem(first, "1") == kept.stem(same, "1") != kept.stem(first, "2")
    with torch.no_grad():
        other.model.get_parameter("model.embed.weight")[0, 0] += 1e-3
    assert kept.stem(other, "1") != kept.stem(first, "1")
    assert kept.stem(of(f"{HERE}:with_calibration"), "1") != kept.stem(first, "1")


# --- lengths -------------------------------------------------------------------------------------


def test_a_request_is_one_row_of_the_length_asked() -> None:
    ids = torch.arange(8).view(2, 4)
    assert subject.resized((ids, ids), 6)[1].tolist() == [[0, 1, 2, 3, 0, 1]]
    assert subject.resized((ids,), 2)[0].tolist() == [[0, 1]]


def test_a_model_without_lengths_is_refused() -> None:
    with pytest.raises(ValueError, match="expected all of one shape .batch, tokens., got"):
        subject.resized((torch.ones(1, 3, 4, 4),), 8)
