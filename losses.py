"""The losses: log-probs in, one loss per row out. This file knows torch and nothing else.

Third in reading order. score() turns hidden states into a Scores: summed log-probs by branch and
piece. A loss is a selection from it. To add a preference loss, write one function and give it a
line in PREFS; for any other, write an objective and give it a line in LOSSES.

| equation (of the GDPO paper, arXiv 2412.20299)          | function                     |
|---------------------------------------------------------|------------------------------|
| Eq. 1  DPO                                              | dpo_loss, dpo                |
| Eq. 3  reward margin                                    | margin                       |
| Eq. 5  GDPO = calibration + conditioned preference      | gdpo                         |
| Eq. 6  calibration = KL(belief shares) - log p(b|x)     | calibration                  |
| Eq. 7  preference given the accepted belief             | conditioned                  |
| Eq. 8-11  KTO; Eq. 12  the same given the belief        | kto_loss, kto                |

Letters: B rows, S branches, M scored tokens, K classes, V vocabulary, C channels. All log-probs are
in nats and float32; "logps" are summed over tokens, and where a loss averages it says so.
"""
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BELIEF, CLOSE, RESPONSE = range(3)     # pieces of an answer, as in data.py
ANSWER = slice(0, 3)                   # belief and response together
CHUNK = 4096                           # positions whose logits are held at once


@dataclass
class Scores:
    """What a model says about B rows. Branch 0 is the chosen answer, branch 1 the rejected one."""
    logps: torch.Tensor                # (B, S, 3) summed over the tokens of each branch and piece
    counts: torch.Tensor               # (B, S, 3) how many tokens those are
    class_logps: torch.Tensor          # (B, K) of the class tokens after the prompt, among all V
    target: torch.Tensor               # (B, K) the group's shares
    n_options: torch.Tensor            # (B,) options of the survey question
    ref: torch.Tensor = None           # (B, S, 3) logps under the reference
    mismatch: torch.Tensor = None      # (3,) log-ratio of mismatched pairs, mean over the batch


# ---------------------------------------------------------------------------------------------
# From hidden states to log-probs

def token_logps(hidden, head, tokens, chunk=CHUNK):
    """Log-probs of some vocabulary columns at each position: hidden (M, C), head (V, C), tokens
    (M, J) ids -> (M, J) float32. Up to a chunk of positions the logits are kept for backward; of
    several chunks they are thrown away and made again, so that (M, V) is bounded."""
    if len(hidden) <= chunk:
        return chunk_logps(hidden, head, tokens)
    return torch.cat([checkpoint(chunk_logps, h, head, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), tokens.split(chunk))])


def chunk_logps(hidden, head, tokens):
    return F.linear(hidden, head).float().log_softmax(-1).gather(-1, tokens)


def score(model, head, batch):
    """batch: tensors from data.collate -> Scores. model turns its N packed tokens into hidden
    states (N, C), of which those at batch["at"] alone meet the vocabulary, head (V, C)."""
    hidden = model(*(batch[k] for k in ("ids", "paths", "places")))
    columns = token_logps(hidden[batch["at"]], head, batch["tokens"])                 # (M, 1+K)
    counts = batch["counts"]
    logps = columns.new_zeros(counts.numel()).index_add(0, batch["slot"], columns[:, 0])
    return Scores(logps.view(counts.shape), counts, columns[batch["first"], 1:], batch["target"],
                  batch["n_options"])


# ---------------------------------------------------------------------------------------------
# Pure losses: tensors in, (B,) out

def mean_nll(logps, counts):
    """Mean over tokens of the negative log-prob. logps, counts (..., P) summed over P pieces."""
    return -logps.sum(-1) / counts.sum(-1)


def kl_to_target(class_logps, target):
    """KL(target || model) over the classes (B, K), in nats: GDPO Eq. 6, first term.
    The model's log-probs are those among the whole vocabulary, not renormalised over the classes,
    so mass that leaks off the class tokens is penalised too; a share of 0 contributes 0."""
    # differs: Eq. 6 prints KL(model, target), infinite as soon as a share is 0; the authors' code
    # computes this direction as well.
    return (torch.xlogy(target, target) - target * class_logps).sum(-1)


def belief_nll(logps, counts):
    """-log p(b | x), the mean over the belief's tokens but its closing one: Eq. 6, second term.
    logps, counts (B, 3) of one branch."""
    # differs: Eq. 6 has the sum; the mean produced the paper's numbers and does not depend on the
    # belief's length.
    return -logps[:, BELIEF] / counts[:, BELIEF]


def dpo_loss(chosen_logratios, rejected_logratios, beta, label_smoothing=0.0):
    """-log sigmoid of the reward margin; log-ratios (B,) policy - reference, summed: Eq. 1, 7.
    label_smoothing: how likely a label is the wrong way round (conservative DPO)."""
    h = margin(chosen_logratios, rejected_logratios, beta)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def kto_loss(logratios, desirable, z0, beta, weight):
    """lambda - v(x, y) of KTO (Ethayarajh et al. 2024): GDPO Eq. 8-12. logratios (B,) are the
    rewards r of Eq. 9, summed, in nats; z0 a number without gradient, not negative; weight is
    lambda."""
    r = logratios - z0 if desirable else z0 - logratios
    return weight * (1 - torch.sigmoid(beta * r))


def margin(chosen_logratios, rejected_logratios, beta):
    """Reward of chosen less that of rejected (B,): Eq. 3."""
    return beta * (chosen_logratios - rejected_logratios)


# ---------------------------------------------------------------------------------------------
# Objectives: (Scores, options) -> (loss (B,), {name: (B,) parts to log})

def sft(s, o):
    """Mean NLL of belief and accepted response."""
    return mean_nll(s.logps[:, 0], s.counts[:, 0]), {}


def uniform_sft(s, o):
    """SFT as if the beliefs were spread evenly. With n options the accepted one is drawn from the
    shares p and the rejected one evenly from the rest, so that the accepted answer with weight 1/n
    and the rejected with (n-1)/n stand for each option with p/n + (1-p)/n = 1/n: even, exactly."""
    nll = mean_nll(s.logps, s.counts)                                                 # (B, 2)
    return nll[:, 0] / s.n_options + nll[:, 1] * (1 - 1 / s.n_options), {}


def calibration(s, o):
    """Eq. 6: the first term of GDPO."""
    kl, belief = kl_to_target(s.class_logps, s.target), belief_nll(s.logps[:, 0], s.counts[:, 0])
    return o.w_kl * kl + o.w_belief * belief, {"kl": kl, "belief_nll": belief}


# ---------------------------------------------------------------------------------------------
# Preference terms: (Scores, pieces, options) -> (B,). pieces: what of each answer is counted

def logratios(s, pieces):
    """log pi(y) - log pi_ref(y) of each branch (B, S), summed over the given pieces."""
    return (s.logps - s.ref)[..., pieces].sum(-1)


def mean_logratios(s, pieces):
    """logratios (B, S), the mean over tokens instead of the sum."""
    return logratios(s, pieces) / s.counts[..., pieces].sum(-1)


def dpo(s, pieces, o):
    """DPO (Rafailov et al. 2024): GDPO Eq. 1 and 7; --label_smoothing."""
    r = logratios(s, pieces)
    return dpo_loss(r[:, 0], r[:, 1], o.beta, o.label_smoothing)


def ipo(s, pieces, o):
    """IPO (arXiv 2310.12036, Eq. 17), with beta for its tau and summed log-ratios; some
    implementations take means, for which the same beta is another strength."""
    r = logratios(s, pieces)
    return (r[:, 0] - r[:, 1] - 1 / (2 * o.beta)) ** 2


def kto(s, pieces, o):
    """KTO on both sides of a pair, half each: GDPO Eq. 8-12. z0, the mean log-ratio of mismatched
    pairs over the whole batch, is clamped at 0."""
    # differs: Eq. 10 is a KL divergence; as in KTO, its estimate from mismatched pairs.
    r, z0 = logratios(s, pieces), s.mismatch[pieces].sum().clamp(min=0)
    return (kto_loss(r[:, 0], True, z0, o.beta, o.lambda_d)
            + kto_loss(r[:, 1], False, z0, o.beta, o.lambda_u)) / 2


def cal_dpo(s, pieces, o):
    """Cal-DPO (arXiv 2412.14516): no beta in the sigmoid; each log-ratio is pulled to +-1/(2 beta).
    The squares count half as in the released code; another paper quotes them in full."""
    r, goal = logratios(s, pieces), 1 / (2 * o.beta)
    return (-F.logsigmoid(r[:, 0] - r[:, 1])
            + ((r[:, 0] - goal) ** 2 + (r[:, 1] + goal) ** 2) / 2)


def dil(s, pieces, o):
    """DIL by LSIF, its main variant (arXiv 2503.05079): the density ratio pi/ref is fitted by least
    squares. No beta. Log-ratios are means over tokens as in the released code (the formula, as it
    is quoted, has sums). Exponents stop at 20, and there the gradient."""
    r = mean_logratios(s, pieces)
    return -r[:, 0].clamp(max=20).exp() + (2 * r[:, 1]).clamp(max=20).exp() / 2


def dil_bce(s, pieces, o):
    """DIL by binary cross-entropy (arXiv 2503.05079); means over tokens, as in dil."""
    r = mean_logratios(s, pieces)
    return -F.logsigmoid(r[:, 0]) - F.logsigmoid(-r[:, 1])


def simpo(s, pieces, o):
    """SimPO (arXiv 2405.14734): means over tokens, a margin gamma, no reference."""
    m = -mean_nll(s.logps[..., pieces], s.counts[..., pieces])                        # (B, 2)
    return -F.logsigmoid(margin(m[:, 0], m[:, 1], o.beta) - o.gamma)


@dataclass(frozen=True)
class Pref:
    """A preference term, and whether it reads Scores.mismatch."""
    term: Callable
    mismatch: bool = False


PREFS = {
    "dpo": Pref(dpo),
    "ipo": Pref(ipo),
    "kto": Pref(kto, mismatch=True),
    "cal-dpo": Pref(cal_dpo),
    "dil": Pref(dil),
    "dil-bce": Pref(dil_bce),
    "simpo": Pref(simpo),
}


# ---------------------------------------------------------------------------------------------
# Methods

@dataclass(frozen=True)
class Loss:
    """What a loss needs. The rest of the project asks this and never looks at a loss's name."""
    objective: Callable                # (Scores, options) -> (loss (B,), {name: (B,) to log})
    branches: tuple = ("chosen",)      # of data.BRANCHES; the chosen one first
    reference: bool = False            # starts from an SFT checkpoint, and measures against it
    mismatch: bool = False             # reads Scores.mismatch


def joint(pref):
    """A preference term by itself, as in Eq. 1: each answer with its own belief, both counted."""
    def objective(s, o):
        loss = pref.term(s, ANSWER, o)
        return loss, {"pref": loss}
    return Loss(objective, ("chosen", "own"), reference=True, mismatch=pref.mismatch)


def conditioned(pref):
    """The second term of GDPO, Eq. 7: both answers after the accepted belief, response counted."""
    def objective(s, o):
        loss = pref.term(s, [RESPONSE], o)
        return o.w_pref * loss, {"pref": loss}
    return Loss(objective, ("chosen", "given"), reference=True, mismatch=pref.mismatch)


def gdpo(pref):
    """Eq. 5: calibration and conditioned preference, so that conflicts no longer cancel."""
    prefer = conditioned(pref)

    def objective(s, o):
        loss, parts = calibration(s, o)
        more, prefs = prefer.objective(s, o)
        # differs: the paper has no anchor (its weight is 0 unless asked for); it keeps the accepted
        # response likely, which the preference term may pay for its margin
        anchor = mean_nll(s.logps[:, 0, [RESPONSE]], s.counts[:, 0, [RESPONSE]])
        return loss + more + o.w_anchor * anchor, parts | prefs | {"response_nll": anchor}
    return Loss(objective, prefer.branches, reference=True, mismatch=pref.mismatch)


LOSSES = {
    "sft": Loss(sft),
    "uniform-sft": Loss(uniform_sft, ("chosen", "own")),
    "gdpo": gdpo(PREFS["dpo"]),
    "gdpo-cal": Loss(calibration, ("chosen",), reference=True),
    "gdpo-pref": conditioned(PREFS["dpo"]),
    **{name: joint(pref) for name, pref in PREFS.items()},
    **{f"gdpo-{name}": gdpo(pref) for name, pref in PREFS.items() if name != "dpo"},
}
