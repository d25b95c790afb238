"""A run whose documents are isolated, from training to a probed score of its file; and what is refused."""

from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from run_helpers import losses_of, short, train_run

from epigram.data.dataset import DataFolder
from epigram.errors import UserError
from epigram.evaluation.windows import METHODS
from epigram.run import weights
from epigram.run.describe import describe, print_description
from epigram.run.score import score_model
from epigram.run.setup import check_documents, check_fit
from epigram.run.submission.bundle import shipped_sources


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    folder = tmp_path_factory.mktemp("isolated") / "run"
    train_run(data_path, folder, "model.documents=isolated")
    return folder


def test_a_run_learns_and_its_file_keeps_the_promise(run: Path, finished: Path, data_path: Path) -> None:
    """Probes of every method, the isolation probe among them, on the packed model."""
    losses, joined = losses_of(run), losses_of(finished)
    assert losses[-1] < losses[0] - 0.3
    assert losses[1] != joined[1], "the same recipe but for this"
    assert weights.load_model(run, "cpu").gpt.config.isolated
    result = score_model(run, str(data_path), methods=METHODS, device="cpu", with_probes=True)
    for method in METHODS:
        found = {finding["name"]: finding["passed"] for finding in result["probes"][method]}
        assert found.pop("isolation") and all(found.values()) and len(found) == 6


def test_a_document_scores_the_same_wherever_it_stands(run: Path, data: DataFolder) -> None:
    """Also in the run's own packed weights: what stands before it in the window is not seen."""
    model, bos = weights.load_model(run, "cpu").gpt, data.tokenizer.bos_id
    tokens = data.stream("val")[data.stream("val") != bos].astype(np.int64)
    before = torch.from_numpy(tokens[:60])[None]
    own = torch.tensor([[bos, *tokens[200:240].tolist()]])
    alone = model.nll(own[:, :-1], own[:, 1:], rope_len=128)
    behind = torch.cat([before, own], dim=1)
    found = model.nll(behind[:, :-1], behind[:, 1:], rope_len=128)[:, 60:]
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_a_tokenizer_that_does_not_fit_is_refused(run: Path, data: DataFolder, monkeypatch) -> None:
    config = short("model.documents=isolated")
    check_fit(config, data)
    with pytest.raises(UserError, match=r"begin with token 1 by the tokenizer, with token 3 .* set model.bos_id=1"):
        check_fit(short("model.documents=isolated", "model.bos_id=3"), data)
    without = Mock(tokenizer=Mock(vocab_size=512, bos_id=-1))
    with pytest.raises(UserError, match="the tokenizer has none: set model.documents=joined"):
        check_fit(config, without)
    check_fit(short("model.bos_id=3"), data)
    other = Mock(wraps=data.tokenizer, vocab_size=512, bos_id=2)
    monkeypatch.setattr(weights.Tokenizer, "from_bytes", lambda proto: other)
    with pytest.raises(UserError, match="begin with token 2 by the tokenizer, with token 1 by the model"):
        weights.load_model(run, "cpu")


def test_a_recipe_that_cannot_be_is_refused() -> None:
    with pytest.raises(UserError, match='documents = "isolated" needs the token .* bos_id = 512 is none of the 512'):
        short("model.documents=isolated", "model.bos_id=512")
    with pytest.raises(UserError, match="documents = 'each' must be one of joined, isolated"):
        short("model.documents=each")
    check_documents(short("model.bos_id=9").model, 1)


@pytest.mark.parametrize("documents", ["joined", "isolated"])
def test_describe_says_it(documents: str, capsys) -> None:
    found = describe(short(f"model.documents={documents}"))
    assert found["documents"] == documents
    print_description(found)
    assert f"documents are {documents}" in capsys.readouterr().out


def test_a_submission_holds_all_of_it() -> None:
    assert "epigram/model/documents.py" in shipped_sources()
