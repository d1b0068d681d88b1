"""What `sparseattn validate` measures: the checks, their file, and that broken ones are found."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("accelerate", reason='needs pip install "sparseattn[train]"')
pytest.importorskip("sklearn", reason='needs pip install "sparseattn[samples]"')

import sparseattn
from sparseattn.benchmarks import claims
from sparseattn.claims import batch_mates, encoder, finding, pixels, step_time
from sparseattn.claims.finding import Effort
from sparseattn.claims.registry import CHECKS
from sparseattn.cli.main import main
from sparseattn.cli.validate import NAMES

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = Effort(seeds=1, epochs=1, seconds=0.01)


def test_findings_are_printed_and_added_to_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "new" / "found.json"
    assert main(["validate", "V1", "V8", "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "| V1 | Adaptor" in printed and printed.count("| holds |") == 2
    monkeypatch.setitem(CHECKS, "V2", lambda effort: finding.found("a claim", "a lie", False))
    assert main(["validate", "V10", "V2", "--json", str(path)]) == 1
    assert "| V2 | a claim | a lie | does not hold |" in capsys.readouterr().out
    found = claims.read(path)
    assert list(found) == ["V1", "V2", "V8", "V10"]
    verdicts = [one["verdict"] for one in found.values()]
    assert verdicts == ["holds", "does not hold", "holds", "cannot be shown here"]
    with pytest.raises(SystemExit):
        main(["validate", "V99"])
    path.write_text(json.dumps({"format": "other"}))
    with pytest.raises(ValueError, match="is not a file of sparseattn validate"):
        claims.read(path)


def test_the_command_knows_all_checks() -> None:
    assert tuple(CHECKS) == NAMES


def test_every_attention_op_is_held_against_its_batch_mates() -> None:
    ops = {name for name in sparseattn.__all__ if name.endswith("_attention")}
    assert ops == set(batch_mates.cases())
    found = batch_mates.batch_mates(SHORT)
    assert found.verdict == "holds", found.measured


@pytest.mark.parametrize("what", ["values", "gradients"])
def test_an_op_that_sees_its_batch_mates_is_found_out(what: str) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        others = k.mean(0, keepdim=True)
        if what == "values":
            return v + others
        return v + (v - v.detach()) * others  # the same values, other gradients

    assert batch_mates.sees_batch_mates(attend)


def test_counting_predicts_the_step() -> None:
    """D. Attention is N / (6 D + N) of a block; a quarter of the quality loss' forward is added."""
    share = 1024 / (6 * 192 + 1024)
    added = 0.25 / 3
    assert step_time.predicted_share("maps", 1024) == pytest.approx(1 - 0.75 * share * 0.75 + added)
    linear, attention = 1 - share, share
    kept = linear / 4 + attention / 16
    assert step_time.predicted_share("tokens", 1024) == pytest.approx(0.25 + 0.75 * kept + added)


def test_steps_are_timed() -> None:
    shares = step_time.step_shares(64, 0.01)
    assert set(shares) == {"maps", "tokens"} and min(shares.values()) > 0


def test_an_encoder_that_differs_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encoder.active_shares() == [0.25] * 4
    exact = encoder._sparse_maps
    monkeypatch.setattr(
        encoder, "_sparse_maps", lambda *given: [1.001 * grid for grid in exact(*given)]
    )
    assert not all(judgement.passed for judgement in encoder.equality(encoder.SMALL))


def test_few_pixels_must_be_few_and_accurate() -> None:
    def runs(accuracy: float, keep: float) -> list[pixels.Run]:
        return [pixels.Run(accuracy, keep, None)] * 2

    everything = runs(0.97, 1.0)
    assert pixels.is_near(runs(0.955, 0.15), everything)
    assert not pixels.is_near(runs(0.945, 0.15), everything)
    assert not pixels.is_near([*runs(0.97, 0.15), *runs(0.97, 0.18)], everything)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["V3", "V5", "V6", "V9"])
def test_claims_hold(name: str) -> None:
    found = CHECKS[name](Effort(seeds=2))
    assert found.verdict == "holds", found.measured
