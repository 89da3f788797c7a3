"""python -m pytest tests/test_losses.py"""
import math
import re
from dataclasses import replace

import pytest
import torch
from conftest import GOLDEN, golden
from test_data import CLASS_IDS, ROW, encode

from data import collate, longest, mismatch
from losses import (ANSWER, LOSSES, PREFS, RESPONSE, Scores, calibration, dpo_loss, kl_to_target,
                    kto_loss, mean_nll, score, sft, token_logps, uniform_sft)
from model import load_model, on_disk
from train import Config, jsd, to_tensors

O = Config(beta=0.1)
LOG2 = math.log(2)
LOSS_OF = {"mft": "gdpo-cal", "cdpo": "gdpo-pref", "mpo": "gdpo"}     # the authors' names


def close(found, want, rtol=1e-5, atol=1e-5):
    torch.testing.assert_close(found, torch.tensor(want), rtol=rtol, atol=atol)


def pair(logps=[[0, 0, -10], [0, 0, -12.]], ref=[[0, 0, -11], [0, 0, -11.5]], n_options=2.0,
         counts=[[1, 1, 5], [1, 1, 6]], z0=[0.1, 0.2, 0.3], pieces=[RESPONSE], **options):
    """(Scores of one row, pieces, options)."""
    logps, ref, counts = (torch.tensor([x]) for x in (logps, ref, counts))
    logps.requires_grad_()
    s = Scores(logps, counts, torch.full((1, 2), math.log(0.5)), torch.full((1, 2), 0.5),
               torch.tensor([[0.6, 0.2]]), torch.tensor([n_options]), ref, torch.tensor(z0))
    return s, pieces, replace(O, **options)


@pytest.mark.parametrize("case", golden("01"), ids=lambda c: c["name"])
def test_sequence_logps_agree_with_golden_01(case):
    labels, hidden = torch.tensor(case["labels"]), torch.tensor(case["logits"]).requires_grad_()
    b, t = torch.nonzero(labels[:, 1:] != -100, as_tuple=True)
    logps = token_logps(hidden[b, t], torch.eye(32), labels[b, t + 1, None])[:, 0]
    sums = torch.zeros(len(labels)).index_add(0, b, logps)
    if case["average_log_prob"]:
        sums = -mean_nll(sums[:, None], torch.bincount(b)[:, None])
    close(sums, case["logps"])
    if "grad" in case:
        sums.sum().backward()
        close(hidden.grad[-1], case["grad"])


@pytest.mark.parametrize("case", golden("02"), ids=lambda c: c["name"])
def test_dpo_agrees_with_golden_02(case):
    chosen, rejected, ref_chosen, ref_rejected = (
        torch.tensor(case[f"{model}_{side}_logps"], requires_grad=True)
        for model in ("policy", "reference") for side in ("chosen", "rejected"))
    losses = dpo_loss(chosen - ref_chosen, rejected - ref_rejected, case["beta"])
    close(losses, case["losses"])
    losses.mean().backward()
    close(chosen.grad, case["grad_policy_chosen"], 1e-4, 1e-6)


@pytest.mark.parametrize("case", golden("06"), ids=lambda c: c["name"])
def test_kto_agrees_with_golden_06(case):
    sums = lambda name: torch.tensor([sum(row) for row in case[name]])
    rewards = {k: sums(f"policy_{k}") - sums(f"reference_{k}")
               for k in ("chosen", "rejected", "KL")}
    z0, losses = rewards["KL"].mean().clamp(min=0), []
    assert z0.item() == pytest.approx(case["KL"], rel=1e-5)
    for side, weight in (("chosen", "desirable_weight"), ("rejected", "undesirable_weight")):
        r = rewards[side].requires_grad_()
        losses.append(kto_loss(r, side == "chosen", z0, case["beta"], case[weight]))
        losses[-1].sum().backward()
        close(r.grad, [row[0] for row in case[f"grad_{side}"]], 1e-4, 1e-8)
    close(torch.cat(losses), case["losses"], atol=0)


@pytest.mark.parametrize("case", golden("03"), ids=lambda c: c["name"])
def test_calibration_agrees_with_golden_03(case):
    logits, target = torch.tensor(case["logits"]), torch.tensor(case["probabilities"])
    first = [next(t for t, y in enumerate(row) if y != -100) for row in case["labels"]]
    hidden = logits[torch.arange(len(first)), torch.tensor(first) - 1].requires_grad_()
    class_logps = token_logps(hidden, torch.eye(32), torch.tensor(CLASS_IDS).expand(len(first), 6))
    kl = kl_to_target(class_logps, target)
    close(kl, case["per_example_kl"])
    close(class_logps.exp().sum(-1), case["class_mass"], 1e-5, 1e-6)
    assert jsd(class_logps.detach().double().exp(), target) == pytest.approx(
        case["per_example_jsd"], abs=1e-3)
    kl.mean().backward()
    close(hidden.grad, case["grad_kl_at_position"], 1e-4, 1e-5)


def items_of(batch, n=None):
    """A golden batch's first n rows. The belief ends at the response's first `>`."""
    rows = []
    for item, p in zip(batch["items"][:n], batch["probabilities"]):
        row = ROW | {"prompt": item["prompt"][3:-3], "probabilities": p}
        chosen = item.get("chosen", item.get("generation"))
        for side, answer in (("accept", chosen), ("reject", item.get("rejected", chosen))):
            parts = re.fullmatch("(.)(?:<(.*?)>)?(.*)", answer).groups()
            row |= zip((f"{side}_choice_id", f"{side}_choice", f"{side}_response"), parts)
        rows.append(row)
    return encode(*rows)


def golden_08(kto):
    return pytest.mark.parametrize("family, case, batch", [
        pytest.param(family, case, found["batches"][case["batch"]], id=f"{family}-{case['name']}")
        for family in ("gpt2", "neox") for found in [golden(f"08_{family}")]
        for case in found["cases"] if ("kto" in case["name"]) == kto])


def scored(family, items, branches):
    """(the tiny policy, Scores of the items, the tiny reference's log-probs within)."""
    b = to_tensors(collate(items, branches, CLASS_IDS), "cpu")
    model, ref = (load_model(GOLDEN / f"{family}_tiny{x}") for x in ("", "_ref"))
    s = score(model, model.head, b)
    s.ref = score(ref, ref.head, b).logps.detach()
    return model, s


def check_gradients(losses, model, case):
    if case["grad"] is None:
        return
    losses.mean().backward()
    stored = case["grad"]["per_parameter_l2_and_probe"]
    for p in model.parameters():
        p.data = p.grad                                   # on_disk then lays out the gradient
    for name, g in on_disk(model).items():
        l2, probe = stored.get(name) or stored["lm_head.weight"]
        g = g.flatten().double()
        assert g.norm().item() == pytest.approx(l2, rel=1e-3, abs=1e-5), name
        i = torch.arange(len(g), dtype=torch.float64)
        assert (g * i.cos()).sum().item() == pytest.approx(probe, rel=1e-3, abs=1e-3), name


@golden_08(kto=False)
def test_objectives_agree_with_golden_08(family, case, batch):
    """Losses, their parts and the gradient of every parameter, on tiny checkpoints."""
    name = case["name"].split("_")[0]
    loss, smoothing = LOSSES[LOSS_OF.get(name, name)], case.get("options", {})
    model, s = scored(family, items_of(batch), loss.branches)
    losses, parts = loss.objective(s, replace(
        O, beta=case["beta"], label_smoothing=smoothing.get("label_smoothing", 0.0)))
    want = case["f32"] | case["f32"].get("recommended", {})
    close(losses.mean(), want["loss"], 1e-4)
    if "kl" in parts:
        close(parts["kl"].mean(), case["f32"]["kl"], 1e-4)
        close(-parts["belief_nll"], want["belief_logp_avg"], 1e-4)
    if "pref" in parts:
        close(parts["pref"], want["preference_losses"], 3e-4)
        sums = s.logps[..., ANSWER if name in ("dpo", "ipo") else [RESPONSE]].sum(-1)
        close(sums[:, 0], want["policy_chosen_logps"], 1e-4)
        close(sums[:, 1], want["policy_rejected_logps"], 1e-4)
    check_gradients(losses, model, case)


@golden_08(kto=True)
def test_gdpo_kto_agrees_with_golden_08(family, case, batch):
    """Unpaired rows, each with the response of the next as its mismatch, belief in and out."""
    items, want, o = items_of(batch), case["f32"], case["options"]
    for item, other in zip(items, items[1:] + items[:1]):
        item.beliefs += (other.beliefs[0],)
        item.responses += (other.responses[0],)
    model, s = scored(family, items, ("chosen", "mismatch"))
    pieces = [RESPONSE] if "excluded" in case["name"] else ANSWER
    r, other = (s.logps - s.ref)[..., pieces].sum(-1).unbind(1)
    z0 = other.detach().mean().clamp(min=0)
    close(z0, want["z0"], 1e-3)
    good = torch.tensor([x == "chosen" for x in batch["status"]])
    losses = torch.where(good, kto_loss(r, True, z0, o["beta"], o["desirable_weight"]),
                         kto_loss(r, False, z0, o["beta"], o["undesirable_weight"]))
    whole = losses + calibration(s, O)[0]
    close(whole.mean(), want["loss"], 1e-4)
    close(torch.cat([losses[good], losses[~good]]), want["kto_losses_desirable_first"], 1e-3)
    check_gradients(whole, model, case)


AT_REF = {"ref": [[0, 0, -10], [0, 0, -12.]]}
lost = lambda reward: 1 / (1 + math.exp(reward))         # 1 - sigmoid


@pytest.mark.parametrize("name, options, value", [
    ("dpo", AT_REF, LOG2), ("ipo", AT_REF, 25.0), ("cal-dpo", {"beta": 1.0, **AT_REF}, 0.94314718),
    ("dil", AT_REF, -0.5), ("dil-bce", AT_REF, 2 * LOG2), ("dpo-soft", AT_REF, LOG2),
    ("kto", {"z0": [0.0, 0, 0], **AT_REF}, 0.5), ("pipa-n", AT_REF, 2 * LOG2),
    ("pipa-m", AT_REF, 2 * LOG2), ("dpo", {}, 0.62095705), ("ipo", {}, 12.25),
    ("ipo", {"beta": 1.0}, 1.0),
    ("cal-dpo", {"beta": 0.001}, 249250.82641328), ("cal-dpo", {"beta": 1.0}, 0.20141328 + 0.125),
    ("dil", {}, -math.exp(0.2) + math.exp(-1 / 6) / 2),
    ("dil-bce", {}, 0.59813887 + math.log1p(math.exp(-1 / 12))),
    ("pipa-n", {}, 0.78733867), ("pipa-n", {"prior": 0.3}, 0.85077349),
    ("pipa-m", {"prior": 0.3}, 0.20397280 + 0.20084306),
    ("hdpo", {"beta": 1.0}, 0.20141328), ("hdpo", {"beta": 0.0}, math.log1p(math.exp(-2))),
    ("dpo-soft", {}, 0.62095705 + 0.25 * 0.15),     # labels 3 to 1, margin 0.15
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.97407698),
    ("simpo", {"beta": 2.5, "gamma": 1.375}, 1.60041265),
    ("kto", {}, (lost(0.07) + lost(0.08)) / 2),
    ("kto", {"pieces": ANSWER}, (lost(0.04) + lost(0.11)) / 2),           # z0 of the same pieces
    ("kto", {"z0": [0.0, 0, -5]}, (lost(0.1) + lost(0.05)) / 2)])         # clamped at 0
def test_preference_terms_give_the_numbers_worked_by_hand(name, options, value):
    assert PREFS[name].term(*pair(**options)).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", ["ipo", "cal-dpo"])
def test_a_beta_of_0_has_no_goal(name):
    with pytest.raises(ValueError, match="--beta must be more than 0"):
        PREFS[name].term(*pair(beta=0.0))


@pytest.mark.parametrize("name", PREFS)
def test_every_preference_term_raises_chosen_lowers_rejected_and_reads_no_belief(name):
    """Cal-DPO, IPO and PIPA-M stop or turn around past their targets, so near the reference."""
    s, *rest = pair(beta=0.05, prior=0.3)
    [g] = torch.autograd.grad(PREFS[name].term(s, *rest).sum(), s.logps)
    assert g[0, 0, RESPONSE] < 0 < g[0, 1, RESPONSE] and g[..., :RESPONSE].abs().sum() == 0


@pytest.mark.parametrize("name", ["dil", "pipa-m"])
def test_exponents_are_clipped_far_above_the_reference(name):
    """PIPA-M's where the policy says more than it can."""
    s, *rest = pair([[0, 0, 4000.0]] * 2)
    loss = PREFS[name].term(s, *rest)
    [gradient] = torch.autograd.grad(loss.sum(), s.logps)
    assert loss.isfinite().all() and gradient.abs().sum() == 0


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (2, 3, 1), (1, 5, 2, 2), (3, 1, 2)])
def test_mismatched_pairs_are_a_derangement_over_different_prompts(sizes):
    """Also of odd numbers, and where prompts repeat; every answer is lent once."""
    for seed in range(5):
        items = encode(*(ROW | {"prompt": f"p{g}", "accept_response": f"{g}{n}"}
                         for g, size in enumerate(sizes) for n in range(size)))
        mismatch(items, 96, seed)
        own = {tuple(i.responses[0]): i.prompt for i in items}
        lent = {tuple(i.responses[2]): i.prompt for i in items}
        assert lent.keys() == own.keys() and all(own[answer] != lent[answer] for answer in own)


def test_a_mismatched_pair_fits_the_context_and_one_prompt_alone_is_refused():
    items = encode(ROW | {"prompt": "p" * 20}, ROW | {"prompt": "q", "accept_response": "a" * 60},
                   max_length=80)
    mismatch(items, 80, 0)
    assert longest(items[0]) == 80 and len(items[0].responses[2]) < 61
    with pytest.raises(ValueError, match="2 of 2 rows have the same prompt"):
        mismatch(encode(ROW, ROW), 96, 0)


@pytest.mark.parametrize("name", LOSSES)
def test_every_objective_has_a_number_per_row_and_leaves_the_scores_alone(name):
    s, _, o = pair()
    before = s.logps.clone()
    loss, parts = LOSSES[name].objective(s, o)
    assert all(x.shape == (1,) and x.isfinite() for x in (loss, *parts.values()))
    assert torch.equal(s.logps, before) and LOSSES[name].branches[0] == "chosen"


def test_sft_kl_adds_the_kl_term_both_kl_the_rejected_and_the_anchor_the_accepted_response():
    s, _, o = pair(w_kl=5.0)
    kl = kl_to_target(s.class_logps, s.target)
    loss, parts = LOSSES["sft-kl"].objective(s, o)
    close(loss - sft(s, o)[0], (5 * kl).tolist())
    close(LOSSES["both-kl"].objective(s, o)[0] - loss, [12 / 6])
    plain, of_gdpo = LOSSES["gdpo"].objective(s, o)
    close(LOSSES["gdpo"].objective(s, replace(o, w_anchor=0.5))[0] - plain, [0.5 * 10 / 5])
    assert parts["kl"] == kl and of_gdpo["response_nll"] == 10 / 5


def test_uniform_sft_is_sft_over_evenly_spread_beliefs():
    """Over all pairs (accepted by the shares, rejected evenly from the rest), the loss is the plain
    mean of the options' NLL, whatever the shares."""
    shares, nll = [0.7, 0.2, 0.1], [1.0, 5.0, 11.0]
    expected = 0.0
    for a, p in enumerate(shares):
        for r in set(range(3)) - {a}:
            s, _, o = pair([[-nll[a], 0, 0], [-nll[r], 0, 0]], counts=[[1, 0, 0]] * 2, n_options=3)
            expected += p / 2 * uniform_sft(s, o)[0].item()
    assert expected == pytest.approx(sum(nll) / 3)


def test_chunks_give_the_values_and_gradients_of_the_whole():
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    tokens = torch.randint(30, (50, 3))
    results = []
    for chunk in (1000, 16):                             # 16 does not divide 50
        out = token_logps(hidden, head, tokens, chunk)
        loss = (out * torch.arange(150.).view(50, 3)).sum()
        results.append((out, *torch.autograd.grad(loss, (hidden, head))))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("offset", [0, -60, -100])
def test_the_class_distribution_is_float32_under_bfloat16_autocast(offset):
    """GPT-2's logits lie at -60 to -110, where bfloat16 steps by half a nat."""
    torch.manual_seed(0)
    hidden, head = torch.randn(200, 33), torch.randn(50, 33)
    hidden[:, -1], head[:, -1] = 1, offset
    batch = dict.fromkeys(("ids", "paths", "cells", "target", "pair", "n_options"), 0) | {
        "at": torch.arange(200), "first": torch.arange(200), "counts": torch.zeros(1, 1, 3),
        "tokens": torch.arange(7).expand(200, 7), "slot": torch.zeros(200, dtype=torch.long)}
    want = score(lambda *where: hidden, head, batch).class_logps
    with torch.autocast("cpu", torch.bfloat16):
        got = score(lambda *where: hidden, head, batch).class_logps
        naive = torch.nn.functional.linear(hidden, head).float().log_softmax(-1)[:, :6]
    assert jsd(got.exp(), want.exp()).max() < 1e-3
    assert offset == 0 or jsd(naive.exp(), want.exp()).mean() > 0.02     # what it would be
