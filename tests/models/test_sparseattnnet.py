"""SparseAttnNet: which pixels it sees, how its coarse map learns, and the rule of k."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from sparseattn.models import KeepRule, SparseAttnNet, SparseAttnNetConfig

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = SparseAttnNetConfig(classes=3, dim=32, heads=2, coarse_width=4, embed_width=16, keep=0.15)


def make(**changes) -> SparseAttnNet:
    return SparseAttnNet(dataclasses.replace(SMALL, **changes))


def test_sees_the_pixels_of_highest_value_and_nothing_else() -> None:
    model = make().eval()
    images = torch.rand(2, 1, 8, 12)
    output = model(images)
    assert output.chosen.shape == (2, 14)  # 0.15 * 96, rounded
    best = output.coarse.flatten(1).topk(14).indices.sort().values
    assert torch.equal(output.chosen, best)
    # pixels that are not chosen reach the logits through the coarse map alone
    coarse = output.coarse[:, None].detach()
    model.coarse.register_forward_hook(lambda *_: torch.logit(coarse))
    hidden = torch.ones(2, 96, dtype=torch.bool).scatter(1, best, False).view(2, 1, 8, 12)
    changed = torch.where(hidden, torch.rand(2, 1, 8, 12), images)
    torch.testing.assert_close(model(changed).logits, output.logits)
    shown = torch.where(hidden, images, images + 1)
    assert not torch.allclose(model(shown).logits, output.logits)


def test_ties_go_to_the_lowest_index() -> None:
    # an event camera's frame is mostly zero: equal values everywhere but at a few places
    model = make().eval()
    for parameter in model.coarse.parameters():
        torch.nn.init.zeros_(parameter)
    output = model(torch.zeros(1, 1, 8, 8))
    assert output.chosen.tolist() == [list(range(10))]
    assert torch.isfinite(output.logits).all()


def test_all_pixels_and_one() -> None:
    images, labels = torch.rand(2, 1, 5, 5), torch.tensor([0, 2])
    for keep, count in ((1.0, 25), (0.001, 1)):
        output = make(keep=keep)(images, labels)
        assert output.chosen.shape == (2, count)
        output.loss.backward()


@pytest.mark.parametrize("gradient", ["gate", "bias", "none"])
@pytest.mark.parametrize("distill", [0.0, 0.5])
def test_what_reaches_the_coarse_map(gradient: str, distill: float) -> None:
    model = make(gradient=gradient, distill=distill)
    model(torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])).loss.backward()
    grads = [p.grad for p in model.coarse.parameters()]
    learns = gradient != "none" or distill > 0
    assert all((grad is not None and bool(grad.any())) == learns for grad in grads)
    assert all(p.grad is not None for p in model.blocks.parameters())


@pytest.mark.parametrize("source", ["last", "mean"])
def test_losses_are_their_formulas(source: str) -> None:
    model = make(distill_from=source, explore=0.0)
    images, labels = torch.rand(3, 1, 8, 8), torch.tensor([0, 1, 2])
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda _m, _i, out: seen.append(out[1]))
    output = model(images, labels)
    torch.testing.assert_close(output.task_loss, F.cross_entropy(output.logits, labels))
    fine = seen[-1] if source == "last" else sum(seen) / len(seen)
    fine = fine / fine.sum(1, keepdim=True)
    coarse = output.coarse.flatten(1).gather(1, output.chosen)
    coarse = coarse / coarse.sum(1, keepdim=True)
    expected = (fine * (fine.log() - coarse.log())).sum(1).mean()
    torch.testing.assert_close(output.distill_loss, expected)
    total = output.task_loss + SMALL.distill * output.distill_loss
    torch.testing.assert_close(output.loss, total)


def test_bias_adds_the_log_of_the_map_to_the_logits() -> None:
    model = make(depth=1).eval()
    images = torch.rand(2, 1, 6, 6)
    block, given = model.blocks[0], []
    block.register_forward_hook(lambda _m, args, out: given.append((args[0], out[1])))
    output = model(images)
    tokens, fine = given[0]
    attention, seen = block.attention, block.attention_norm(tokens)
    q, k, _ = F.linear(seen, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
    q, k = (x.unflatten(-1, (2, 16)).transpose(1, 2) for x in (q, k))
    bias = output.coarse.flatten(1).gather(1, output.chosen).log()
    logits = (q[:, :, -1:] @ k.mT) / 4 + F.pad(bias, (0, 1))[:, None, None]
    torch.testing.assert_close(fine, logits.softmax(-1).mean(1)[:, 0, :-1])


def test_exploration_is_of_training_alone() -> None:
    model = make(explore=0.5)
    images = torch.rand(1, 1, 8, 8)
    drawn = {tuple(model(images).chosen[0].tolist()) for _ in range(8)}
    assert len(drawn) > 1 and all(len(set(pixels)) == 10 for pixels in drawn)
    model.eval()
    assert len({tuple(model(images).chosen[0].tolist()) for _ in range(8)}) == 1


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    model = make().eval()
    images = torch.rand(3, 1, 8, 8)
    whole = model(images)
    others = model(torch.cat([images[:1], 100 * torch.rand(2, 1, 8, 8)]))
    assert torch.equal(whole.logits[0], others.logits[0])


def test_saves_its_config_its_weights_and_its_share(tmp_path) -> None:
    model = make().eval()
    model.keep, model.explore = 0.3, 0.07
    model.save_pretrained(tmp_path)
    loaded = SparseAttnNet.from_pretrained(str(tmp_path)).eval()
    assert loaded.config == model.config and (loaded.keep, loaded.explore) == (0.3, 0.07)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(loaded(images).logits, model(images).logits)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 30, "heads": 4}, "expected a multiple of heads, heads=4"),
        ({"keep": 0.0}, "keep is 0.0; expected a share"),
        ({"explore": 1.0}, "explore is 1.0"),
        ({"gradient": "all"}, "expected gate, bias or none"),
        ({"distill_from": "first"}, "expected last or mean"),
        ({"classes": 0}, "classes is 0"),
    ],
)
def test_a_wrong_config_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**changes)


def test_wrong_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images has shape \[8, 8\]; expected \[B, 1, H, W\]"):
        make()(torch.rand(8, 8))


def run_rule(losses: list[float], **options) -> list[float]:
    rule = KeepRule(0.5, **options)
    return [rule.update(loss, len(losses)) for loss in losses]


def test_k_falls_while_the_loss_does_and_stops_at_the_floor() -> None:
    trace = run_rule([2 * 0.9**i for i in range(60)])
    assert trace[2] == 0.5 and trace[3] == pytest.approx(0.425)
    assert trace[-1] == 0.15 and trace == sorted(trace, reverse=True)


def test_a_flat_loss_counts_as_no_worse() -> None:
    assert run_rule([1.0] * 60, low=0.05)[-1] == pytest.approx(0.05)


def test_k_rises_after_the_second_worsening_and_is_held() -> None:
    falling = [1.0] * 8
    trace = run_rule(falling + [1.0 + 0.2 * i for i in range(40)])
    low = trace[7]
    assert min(trace) == low and trace[-1] == pytest.approx(low / 0.85)
    changes = [i for i in range(1, len(trace)) if trace[i] != trace[i - 1] and i > 7]
    assert len(changes) == 1 and changes[0] == 11  # judged after epochs 10 and 12


def test_noise_of_a_small_loss_is_no_worsening() -> None:
    losses = [2.0, 0.5] + [0.002 * (1 + i % 7) for i in range(38)]
    assert run_rule(losses)[-1] == 0.15


def test_k_is_frozen_at_the_end() -> None:
    trace = run_rule([1.0] * 20, low=0.01)
    assert len(set(trace[15:])) == 1 and trace[14] != trace[12]


def test_the_rule_continues_from_its_state() -> None:
    losses = [2 * 0.9**i for i in range(7)] + [1.5] * 13
    whole, first = KeepRule(0.5), KeepRule(0.5)
    expected = [whole.update(loss, 20) for loss in losses]
    found = [first.update(loss, 20) for loss in losses[:9]]
    second = KeepRule(0.5)
    second.load_state_dict(first.state_dict())
    assert found + [second.update(loss, 20) for loss in losses[9:]] == expected


@pytest.mark.parametrize("options", [{"low": 0.6}, {"high": 0.4}, {"factor": 0.0}, {"window": 1}])
def test_a_wrong_rule_is_refused(options: dict) -> None:
    with pytest.raises(ValueError, match="KeepRule"):
        KeepRule(0.5, **options)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="loss is nan"):
        KeepRule(0.5).update(float("nan"), 10)
