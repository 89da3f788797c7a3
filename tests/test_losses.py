"""python -m pytest tests/test_losses.py"""
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, CharTokenizer, golden

from data import collate, encode_rows, longest, mismatch
from losses import (ANSWER, BELIEF, LOSSES, PREFS, RESPONSE, Scores, calibration, dpo_loss,
                    kl_to_target, kto_loss, mean_nll, score, sft, token_logps, uniform_sft)
from model import load_model, on_disk
from train import jsd, to_tensors

O = SimpleNamespace(beta=0.1, alpha=1.0, w_kl=1.0, w_belief=1.0, w_pref=1.0, w_anchor=0.0,
                    label_smoothing=0.0, gamma=0.5, prior=0.5, lambda_d=1.0, lambda_u=1.0)
CLASSES = [str(k) for k in range(6)]
ROW = {"prompt": "q", "options": ["x", "y"], "probabilities": [0, 0, 0.5, 0, 0.5, 0],
       "accept_choice_id": "4", "accept_choice": "x", "accept_response": "a",
       "reject_choice_id": "2", "reject_choice": "y", "reject_response": "r"}
dpo, gdpo = (LOSSES[name].objective for name in ("dpo", "gdpo"))


def scores(logps, ref=None, counts=None, class_logps=None, target=None, n_options=None):
    """Scores of B rows with two branches, from lists."""
    logps = torch.tensor(logps, dtype=torch.float32)
    B = len(logps)
    return Scores(logps, torch.ones(logps.shape) if counts is None else torch.tensor(counts),
                  torch.full((B, 2), math.log(0.5)) if class_logps is None else class_logps,
                  torch.full((B, 2), 0.5) if target is None else target,
                  torch.tensor([[0.6, 0.2]]).expand(B, 2),
                  torch.full((B,), 2.0) if n_options is None else n_options,
                  logps.clone() if ref is None else torch.tensor(ref, dtype=torch.float32))


def rows_of(case_items, probabilities):
    """Golden strings -> rows of our columns. The belief ends at the response's first `>`."""
    def split(answer):
        head, close, text = answer.partition(">")
        if not close:
            return answer[0], None, answer[1:]
        return head[0], head[2:], text
    rows = []
    for item, p in zip(case_items, probabilities):
        a, b = split(item["chosen"]), split(item.get("rejected", item["chosen"]))
        row = {"prompt": item["prompt"].removeprefix("<Q>").removesuffix("<A>"),
               "options": ["x", "y"], "probabilities": p}
        for side, (label, belief, text) in (("accept", a), ("reject", b)):
            row |= {f"{side}_choice_id": label, f"{side}_choice": belief, f"{side}_response": text}
        rows.append(row)
    return rows



@pytest.mark.parametrize("case", golden("01"), ids=lambda c: c["name"])
def test_sequence_logps_agree_with_golden_01(case):
    hidden, head = torch.tensor(case["logits"]).requires_grad_(), torch.eye(32)
    at = [(b, t) for b, row in enumerate(case["labels"]) for t, y in enumerate(row)
          if y != -100 and t]
    b, t = torch.tensor(at).T
    y = torch.tensor(case["labels"])[b, t]
    logps = token_logps(hidden[b, t - 1], head, y[:, None])[:, 0]
    sums = torch.zeros(len(case["labels"])).index_add(0, b, logps)
    if case["average_log_prob"]:
        sums = -mean_nll(sums[:, None], torch.bincount(b)[:, None])
    torch.testing.assert_close(sums, torch.tensor(case["logps"]), rtol=1e-5, atol=1e-5)
    if "grad" in case:
        sums.sum().backward()
        torch.testing.assert_close(hidden.grad[-1], torch.tensor(case["grad"]),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", golden("02"), ids=lambda c: c["name"])
def test_dpo_agrees_with_golden_02(case):
    pc, pr, rc, rr = (torch.tensor(case[k]) for k in (
        "policy_chosen_logps", "policy_rejected_logps", "reference_chosen_logps",
        "reference_rejected_logps"))
    pc.requires_grad_()
    losses = dpo_loss(pc - rc, pr - rr, case["beta"])
    torch.testing.assert_close(losses, torch.tensor(case["losses"]), rtol=1e-5, atol=1e-5)
    losses.mean().backward()
    torch.testing.assert_close(pc.grad, torch.tensor(case["grad_policy_chosen"]),
                               rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", golden("03"), ids=lambda c: c["name"])
def test_calibration_agrees_with_golden_03(case):
    logits, target = torch.tensor(case["logits"]), torch.tensor(case["probabilities"])
    first = [next(t for t, y in enumerate(row) if y != -100) for row in case["labels"]]
    hidden = logits[torch.arange(len(first)), torch.tensor(first) - 1].requires_grad_()
    classes = torch.arange(15, 21).expand(len(first), 6)
    class_logps = token_logps(hidden, torch.eye(32), classes)
    kl = kl_to_target(class_logps, target)
    torch.testing.assert_close(kl, torch.tensor(case["per_example_kl"]), rtol=1e-5, atol=1e-5)
    mass = class_logps.exp().sum(-1)
    torch.testing.assert_close(mass, torch.tensor(case["class_mass"]), rtol=1e-5, atol=1e-6)
    assert jsd(class_logps.detach().double().exp(), target) == pytest.approx(
        case["per_example_jsd"], abs=1e-3)
    kl.mean().backward()
    torch.testing.assert_close(hidden.grad, torch.tensor(case["grad_kl_at_position"]),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
@pytest.mark.parametrize("case_name", [
    "sft", "mft", "cdpo", "mpo", "dpo", "mpo_label_smoothing", "ipo", "mpo_quirk_rows",
    "cdpo_quirk_rows", "mft_quirk_rows"])
def test_objectives_agree_with_golden_08(family, case_name):
    """Losses, their parts and the gradient of every parameter, on tiny checkpoints."""
    case = next((c for c in golden(f"08_{family}")["cases"] if c["name"] == case_name), None)
    if case is None:
        assert (family, case_name) == ("neox", "ipo")       # there is none
        return
    batch = golden(f"08_{family}")["batches"][case["batch"]]
    name = {"mft": "gdpo-cal", "cdpo": "gdpo-pref", "mpo": "gdpo", "mpo_label_smoothing": "gdpo",
            "ipo": "ipo"}.get(case["name"].removesuffix("_quirk_rows"), case["name"])
    loss = LOSSES[name]
    items = encode_rows(rows_of(batch["items"], batch["probabilities"]), CharTokenizer(),
                        {"classes": CLASSES}, 96)
    b = to_tensors(collate(items, loss.branches, list(range(15, 21))), "cpu")
    model, ref = (load_model(GOLDEN / f"{family}_tiny{x}") for x in ("", "_ref"))
    s = score(model, model.head, b)
    with torch.no_grad():
        s.ref = score(ref, ref.head, b).logps
    smoothing = case.get("options", {}).get("label_smoothing", 0.0)
    losses, parts = loss.objective(s, SimpleNamespace(**vars(O) | {
        "beta": case["beta"], "label_smoothing": smoothing}))
    expected = case["f32"]
    want = expected.get("recommended", {}).get("loss", expected["loss"])
    assert losses.mean().item() == pytest.approx(want, rel=1e-4)
    if "kl" in parts:
        assert parts["kl"].mean().item() == pytest.approx(expected["kl"], rel=1e-4)
        assert (-parts["belief_nll"]).tolist() == pytest.approx(
            expected["recommended"]["belief_logp_avg"], rel=1e-4)
    if "pref" in parts:
        want = expected.get("recommended", expected)
        assert parts["pref"].tolist() == pytest.approx(
            want["preference_losses"], rel=3e-4, abs=1e-5)
        pieces = [RESPONSE] if name not in ("dpo", "ipo") else ANSWER
        assert s.logps[:, 0, pieces].sum(-1).tolist() == pytest.approx(
            want["policy_chosen_logps"], rel=1e-4)
        assert s.logps[:, 1, pieces].sum(-1).tolist() == pytest.approx(
            want["policy_rejected_logps"], rel=1e-4)
    if case["grad"] is not None:
        losses.mean().backward()
        check_gradients(model, case["grad"]["per_parameter_l2_and_probe"])


def check_gradients(model, stored):
    for ours, p in model.named_parameters():
        [(name, (shape, g))] = on_disk(ours, p.grad, model.cfg).items()
        l2, probe = stored.get(name) or stored["lm_head.weight"]
        g = g.flatten().double()
        assert g.norm().item() == pytest.approx(l2, rel=1e-3, abs=1e-5), name
        i = torch.arange(len(g), dtype=torch.float64)
        assert (g * i.cos()).sum().item() == pytest.approx(probe, rel=1e-3, abs=1e-3), name


@pytest.mark.parametrize("case", golden("06"), ids=lambda c: c["name"])
def test_kto_agrees_with_golden_06(case):
    rewards = {k: torch.tensor([sum(row) for row in case[f"policy_{k}"]])
               - torch.tensor([sum(row) for row in case[f"reference_{k}"]])
               for k in ("chosen", "rejected", "KL")}
    z0 = rewards["KL"].mean().clamp(min=0)
    assert z0.item() == pytest.approx(case["KL"], rel=1e-5)
    beta, weights = case["beta"], (case["desirable_weight"], case["undesirable_weight"])
    losses = []
    for side, desirable, weight in zip(("chosen", "rejected"), (True, False), weights):
        r = rewards[side].requires_grad_()
        losses += kto_loss(r, desirable, z0, beta, weight).tolist()
        if len(r):
            kto_loss(r, desirable, z0, beta, weight).sum().backward()
            theirs = [row[0] for row in case[f"grad_{side}"]]
            assert r.grad.tolist() == pytest.approx(theirs, rel=1e-4, abs=1e-8)
    assert losses == pytest.approx(case["losses"], rel=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "neox"])
@pytest.mark.parametrize("name, pieces", [("kto", ANSWER), ("kto_belief_excluded", [RESPONSE])])
def test_gdpo_kto_agrees_with_golden_08(family, name, pieces):
    """Unpaired rows, each with the response of the next as its mismatch, belief in and out."""
    case = next(c for c in golden(f"08_{family}")["cases"] if c["name"] == name)
    batch = golden(f"08_{family}")["batches"][case["batch"]]
    items = encode_rows(rows_of([{"prompt": i["prompt"], "chosen": i["generation"]}
                                 for i in batch["items"]], batch["probabilities"]),
                        CharTokenizer(), {"classes": CLASSES}, 96)
    for item, other in zip(items, items[1:] + items[:1]):
        item.beliefs += (other.beliefs[0],)
        item.responses += (other.responses[0],)
    b = to_tensors(collate(items, ("chosen", "mismatch"), list(range(15, 21))), "cpu")
    model, ref = (load_model(GOLDEN / f"{family}_tiny{x}") for x in ("", "_ref"))
    s = score(model, model.head, b)
    with torch.no_grad():
        s.ref = score(ref, ref.head, b).logps
    r = (s.logps - s.ref)[..., pieces].sum(-1)
    z0, expected = r[:, 1].detach().mean().clamp(min=0), case["f32"]
    assert z0.item() == pytest.approx(expected["z0"], rel=1e-3)
    weights = case["options"]["desirable_weight"], case["options"]["undesirable_weight"]
    good = torch.tensor([x in ("chosen", "desirable", 1, True) for x in batch["status"]])
    beta = case["options"]["beta"]
    losses = torch.where(good, kto_loss(r[:, 0], True, z0, beta, weights[0]),
                         kto_loss(r[:, 0], False, z0, beta, weights[1]))
    whole = losses + calibration(s, O)[0]
    assert whole.mean().item() == pytest.approx(expected["loss"], rel=1e-4)
    theirs = expected["kto_losses_desirable_first"]
    assert torch.cat([losses[good], losses[~good]]).tolist() == pytest.approx(theirs, rel=1e-3)
    if case["grad"]:
        whole.mean().backward()
        check_gradients(model, case["grad"]["per_parameter_l2_and_probe"])


def pair(**options):
    """The one test input of LOSSES.md as Scores: response tokens 5 and 6, beta given."""
    s = scores([[[0, 0, -10], [0, 0, -12.]]], ref=[[[0, 0, -11], [0, 0, -11.5]]],
               counts=[[[1, 1, 5], [1, 1, 6]]])
    s.mismatch = torch.tensor([0.1, 0.2, 0.3])
    return s, [RESPONSE], SimpleNamespace(**vars(O) | options)


@pytest.mark.parametrize("name, options, value", [
    ("dpo", {"beta": 0.1}, 0.62095705),
    ("ipo", {"beta": 0.1}, 12.25), ("ipo", {"beta": 1.0}, 1.0),
    ("cal-dpo", {"beta": 0.001}, 249250.82641328), ("cal-dpo", {"beta": 1.0}, 0.20141328 + 0.125),
    ("dil", {}, -math.exp(0.2) + math.exp(-1 / 6) / 2),
    ("dil-bce", {}, 0.59813887 + math.log1p(math.exp(-1 / 12))),
    ("pipa-n", {}, 0.78733867), ("pipa-n", {"prior": 0.3}, 0.85077349),
    ("pipa-m", {"prior": 0.3}, 0.20397280 + 0.20084306),
    ("hdpo", {"beta": 1.0}, 0.20141328), ("hdpo", {"beta": 0.0}, math.log1p(math.exp(-2))),
    ("dpo-soft", {"beta": 0.1}, 0.62095705 + 0.25 * 0.15),     # labels 3 to 1, margin 0.15
    ("simpo", {"beta": 2.0, "gamma": 0.5}, 0.97407698),
    ("simpo", {"beta": 2.5, "gamma": 1.375}, 1.60041265),
    ("kto", {"beta": 0.1}, (1 - 1 / (1 + math.exp(-0.07)) + 1 - 1 / (1 + math.exp(-0.08))) / 2),
])
def test_preference_terms_give_the_numbers_worked_by_hand(name, options, value):
    assert PREFS[name].term(*pair(**options)).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("ratios, n, m", [((0, 0), 1.386294, 1.386294),
                                          ((0.4, -0.3), 1.067370, 0.755832),
                                          ((-1, 0.2), 2.111401, 2.636556)])
def test_pipa_gives_the_numbers_worked_by_hand(ratios, n, m):
    s = scores([[[0, 0, r] for r in ratios]], ref=[[[0, 0, 0], [0, 0, 0.]]])
    for name, value in (("pipa-n", n), ("pipa-m", m)):
        assert PREFS[name].term(s, [RESPONSE], O).item() == pytest.approx(value, rel=1e-5)


def test_pipa_m_is_clipped_where_the_policy_says_more_than_it_can():
    s = scores([[[0, 0, 5.0], [0, 0, 5.0]]], ref=[[[0, 0, 0], [0, 0, 0.]]])
    s.logps.requires_grad_()
    loss = PREFS["pipa-m"].term(s, [RESPONSE], O)
    loss.sum().backward()
    assert loss.isfinite().all() and s.logps.grad.abs().sum() == 0


@pytest.mark.parametrize("q", [0.5, 0.7, 0.95])
def test_hdpo_without_a_reference_learns_the_shares_and_dpo_soft_has_them_as_optimum(q):
    """alpha 1, beta 0: over pairs drawn by the shares, the loss is least at odds q / (1 - q)."""
    def at(odds, name, **options):
        s = scores([[[0, 0, odds / 2], [0, 0, -odds / 2]]], ref=[[[0, 0, 3.0], [0, 0, -3.0]]])
        s.pair = torch.tensor([[q, 1 - q]])
        if "beta" in options:
            s.ref = torch.zeros(1, 2, 3)
        return PREFS[name].term(s, [RESPONSE], SimpleNamespace(**vars(O) | options)).item()
    odds = math.log(q / (1 - q))
    hdpo = lambda x: q * at(x, "hdpo", alpha=1.0, beta=0.0) + (1 - q) * at(
        -x, "hdpo", alpha=1.0, beta=0.0)
    soft = lambda x: at(x, "dpo-soft", beta=1.0)
    for loss in (hdpo, soft):
        assert loss(odds) < min(loss(odds - 0.1), loss(odds + 0.1))


def test_simpo_takes_means():
    s, pieces, o = pair(beta=2.0, gamma=0.5)
    s.counts[0, 1, RESPONSE] = 5
    assert PREFS["simpo"].term(s, pieces, o).item() == pytest.approx(0.55435524, rel=1e-6)


@pytest.mark.parametrize("name, beta, value", [
    ("dpo", 0.3, math.log(2)), ("ipo", 0.1, 25.0), ("cal-dpo", 1.0, 0.94314718), ("dil", 1.0, -0.5),
    ("dil-bce", 1.0, 2 * math.log(2)), ("kto", 0.7, 0.5), ("dpo-soft", 0.3, math.log(2)),
    ("pipa-n", 1.0, 2 * math.log(2)), ("pipa-m", 1.0, 2 * math.log(2))])
def test_preference_terms_at_the_reference(name, beta, value):
    s, pieces, o = pair(beta=beta)
    s.ref, s.mismatch = s.logps.clone(), torch.zeros(3)
    assert PREFS[name].term(s, pieces, o).item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("name", PREFS)
def test_every_preference_term_raises_chosen_lowers_rejected_and_reads_no_belief(name):
    """Cal-DPO, IPO and PIPA-M stop or turn around past their targets, so near the reference."""
    s, pieces, o = pair(beta=0.05, prior=0.3)
    s.logps.requires_grad_()
    PREFS[name].term(s, pieces, o).sum().backward()
    assert (s.logps.grad[0, 0, RESPONSE] < 0) and (s.logps.grad[0, 1, RESPONSE] > 0)
    assert s.logps.grad[..., :RESPONSE].abs().sum() == 0


def test_the_anchor_is_the_likelihood_of_the_accepted_response():
    s, _, o = pair(w_anchor=0.0)
    plain, parts = gdpo(s, o)
    assert parts["response_nll"].item() == pytest.approx(10 / 5)
    anchored, _ = gdpo(s, SimpleNamespace(**vars(o) | {"w_anchor": 0.5}))
    assert (anchored - plain).item() == pytest.approx(0.5 * 10 / 5)


def test_sft_kl_is_sft_and_the_kl_term_and_both_kl_adds_the_rejected_response():
    s, _, o = pair(w_kl=5.0)
    kl = kl_to_target(s.class_logps, s.target)
    loss, parts = LOSSES["sft-kl"].objective(s, o)
    assert loss.item() == pytest.approx((sft(s, o)[0] + 5 * kl).item()) and parts["kl"] == kl
    assert (LOSSES["both-kl"].objective(s, o)[0] - loss).item() == pytest.approx(12 / 6)


def test_dil_stays_finite_far_from_the_reference():
    s, pieces, o = pair()
    s.logps = torch.tensor([[[0, 0, 4000.0], [0, 0, 4000.0]]], requires_grad=True)
    loss = PREFS["dil"].term(s, pieces, o)
    loss.sum().backward()
    assert loss.isfinite().all() and s.logps.grad.isfinite().all()


def test_ktos_z0_is_clamped_and_has_the_pieces_of_the_rewards():
    s, _, o = pair(beta=1.0)
    term = PREFS["kto"].term
    assert term(s, ANSWER, o).item() != pytest.approx(term(s, [RESPONSE], o).item())
    s.mismatch = torch.tensor([0.0, 0, -5])
    below = term(s, [RESPONSE], o)
    s.mismatch = torch.zeros(3)
    assert below.item() == term(s, [RESPONSE], o).item()


def test_a_belief_that_both_sides_share_cancels_in_pairs_but_not_in_kto():
    """TRAPS: why GDPO-KTO must leave the belief out of rewards and z0."""
    s, _, o = pair(beta=1.0)
    shared = Scores(**vars(s))
    shared.logps = s.logps + torch.tensor([2.0, 0, 0])
    for name in ("dpo", "ipo"):
        assert PREFS[name].term(s, ANSWER, o).item() == pytest.approx(
            PREFS[name].term(shared, ANSWER, o).item(), rel=1e-6)
    assert PREFS["kto"].term(s, ANSWER, o).item() != pytest.approx(
        PREFS["kto"].term(shared, ANSWER, o).item())
    assert PREFS["kto"].term(s, [RESPONSE], o).item() == PREFS["kto"].term(
        shared, [RESPONSE], o).item()


@pytest.mark.parametrize("sizes", [(1, 1), (1, 1, 1), (2, 3, 1), (4, 4), (1, 5, 2, 2), (3, 1, 2)])
def test_mismatched_pairs_are_a_derangement_over_different_prompts(sizes):
    """Also of odd numbers, and where prompts repeat; every answer is lent once."""
    rows = [ROW | {"prompt": f"p{g}", "accept_response": f"{g}{n}"}
            for g, size in enumerate(sizes) for n in range(size)]
    for seed in range(5):
        items = encode_rows(rows, CharTokenizer(), {"classes": CLASSES}, 96)
        mismatch(items, 96, seed)
        lent = [tuple(i.responses[2]) for i in items]
        assert sorted(lent) == sorted(tuple(i.responses[0]) for i in items)
        by = {tuple(i.responses[0]): i.prompt for i in items}
        assert all(by[other] != i.prompt for other, i in zip(lent, items))


def test_a_mismatched_pair_fits_the_context_and_one_prompt_alone_is_refused():
    rows = [ROW | {"prompt": "p" * 20}, ROW | {"accept_response": "a" * 60}]
    items = encode_rows(rows, CharTokenizer(), {"classes": CLASSES}, 80)
    mismatch(items, 80, 0)
    assert longest(items[0]) == 80 and len(items[0].responses[2]) < 61
    items = encode_rows([ROW, ROW], CharTokenizer(), {"classes": CLASSES}, 80)
    with pytest.raises(ValueError, match="2 of 2 rows have the same prompt"):
        mismatch(items, 80, 0)


def test_dpo_and_gdpo_are_log_2_at_the_reference():
    s = scores([[[-1, -2, -3], [-4, -5, -6.]]])
    assert dpo(s, O)[0].item() == pytest.approx(math.log(2))
    assert gdpo(s, O)[1]["pref"].item() == pytest.approx(math.log(2))


def test_dpo_raises_chosen_and_lowers_rejected():
    s = scores([[[-1, -2, -3], [-4, -5, -6.]]])
    s.logps.requires_grad_()
    dpo(s, O)[0].sum().backward()
    assert (s.logps.grad[0, 0] < 0).all() and (s.logps.grad[0, 1] > 0).all()


def test_gdpo_preference_reads_no_belief_and_dpo_does():
    """Conflicting preferences meet in the belief: DPO pushes it, GDPO's second term does not."""
    s = scores([[[-1, -2, -3], [-4, -5, -6.]]])
    s.logps.requires_grad_()
    LOSSES["gdpo-pref"].objective(s, O)[0].sum().backward()
    assert s.logps.grad[..., :RESPONSE].abs().sum() == 0
    s.logps.grad = None
    dpo(s, O)[0].sum().backward()
    assert (s.logps.grad[..., BELIEF] != 0).all()


def test_a_shared_prefix_cancels_in_the_paired_loss():
    """Belief tokens that chosen and rejected share change nothing, counted or not (TRAPS)."""
    without = scores([[[0, 0, -3], [0, 0, -6.]]], ref=[[[0, 0, -2], [0, 0, -6.5]]])
    shared = scores([[[-1, -2, -3], [-1, -2, -6.]]], ref=[[[-3, -1, -2], [-3, -1, -6.5]]])
    assert dpo(shared, O)[0].item() == pytest.approx(dpo(without, O)[0].item())


def test_kl_is_zero_iff_the_class_probabilities_equal_the_target():
    target = torch.tensor([[0.2, 0.0, 0.8]])
    assert kl_to_target(target.clamp(min=1e-30).log(), target).item() == pytest.approx(0, abs=1e-6)
    leaky = (0.5 * target).clamp(min=1e-30).log()         # half the mass off the class tokens
    assert kl_to_target(leaky, target).item() == pytest.approx(math.log(2))
    other = torch.tensor([[0.3, 0.1, 0.6]]).log()
    assert kl_to_target(other, target).item() > 0.01


def test_a_share_of_zero_gives_a_finite_gradient():
    logits = torch.tensor([[0.0, -200.0, 1.0]], requires_grad=True)
    kl_to_target(logits.log_softmax(-1), torch.tensor([[0.5, 0.0, 0.5]])).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_sft_averages_over_tokens_and_belief_nll_over_belief_without_closing():
    s = scores([[[-6, -5, -9], [0, 0, 0.]]], counts=[[[3, 1, 4], [1, 1, 1]]])
    assert sft(s, O)[0].item() == pytest.approx(20 / 8)
    assert calibration(s, O)[1]["belief_nll"].item() == pytest.approx(2.0)


def test_uniform_sft_is_sft_over_evenly_spread_beliefs():
    """Over all pairs (accepted by the shares, rejected evenly from the rest), the loss is the plain
    mean of the options' NLL, whatever the shares."""
    shares, nll = [0.7, 0.2, 0.1], [1.0, 5.0, 11.0]
    expected = 0.0
    for a, p in enumerate(shares):
        for r in set(range(3)) - {a}:
            s = scores([[[-nll[a], 0, 0], [-nll[r], 0, 0.]]], counts=[[[1, 0, 0], [1, 0, 0]]],
                       n_options=torch.tensor([3.0]))
            expected += p / 2 * uniform_sft(s, O)[0].item()
    assert expected == pytest.approx(sum(nll) / 3)


def test_chunks_give_the_values_and_gradients_of_the_whole():
    torch.manual_seed(0)
    hidden, head = torch.randn(50, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    tokens = torch.randint(30, (50, 3))
    results = []
    for chunk in (1000, 16):                             # 16 does not divide 50
        hidden.grad = head.grad = None
        out = token_logps(hidden, head, tokens, chunk)
        (out * torch.arange(150.).view(50, 3)).sum().backward()
        results.append((out.detach(), hidden.grad, head.grad))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("offset", [0, -60, -100])
def test_the_class_distribution_is_float32_under_bfloat16_autocast(offset):
    """GPT-2's logits lie at -60 to -110, where bfloat16 steps by half a nat."""
    torch.manual_seed(0)
    hidden, head = torch.randn(200, 33), torch.randn(50, 33)
    hidden[:, -1], head[:, -1] = 1, offset
    batch = {"at": torch.arange(200), "tokens": torch.arange(7).expand(200, 7),
             "first": torch.arange(200), "slot": torch.zeros(200, dtype=torch.long),
             "counts": torch.zeros(1, 1, 3), "ids": 0, "paths": 0, "places": 0,
             "target": 0, "pair": 0, "n_options": 0}
    model = lambda *where: hidden
    want = score(model, head, batch).class_logps
    with torch.autocast("cpu", torch.bfloat16):
        got = score(model, head, batch).class_logps
        naive = torch.nn.functional.linear(hidden, head).float().log_softmax(-1)[:, :6]
    assert jsd(got.exp(), want.exp()).max() < 1e-3
    assert offset == 0 or jsd(naive.exp(), want.exp()).mean() > 0.02     # what it would be


def test_every_objective_returns_a_loss_per_row_and_leaves_the_scores_alone():
    s = scores([[[-1, -2, -3], [-4, -5, -6.]]] * 3, counts=[[[2, 1, 3]] * 2] * 3)
    s.mismatch = torch.zeros(3)
    before = s.logps.clone()
    for name, loss in LOSSES.items():
        losses, parts = loss.objective(s, O)
        assert losses.shape == (3,) and torch.isfinite(losses).all(), name
        assert all(v.shape == (3,) for v in parts.values()), name
        assert loss.branches[0] == "chosen"
    assert torch.equal(s.logps, before)
