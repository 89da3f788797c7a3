"""The losses: log-probs in, one loss per row out. This file depends only on torch.

Third in reading order. score() turns hidden states into Scores: log-probs summed by branch and
piece, from which each loss picks what it needs. To add a preference loss, write one function and
add it to PREFS; to add any other loss, write an objective and add it to LOSSES. Baselines and the
preference terms of other papers are below the ruled line.

| equation (of the GDPO paper, arXiv 2412.20299)          | function                     |
|---------------------------------------------------------|------------------------------|
| Eq. 1  DPO                                              | dpo_loss, dpo                |
| Eq. 3  reward margin                                    | margin                       |
| Eq. 5  GDPO = calibration + conditioned preference      | gdpo                         |
| Eq. 6  calibration = KL(belief shares) - log p(b|x)     | calibration                  |
| Eq. 7  preference given the accepted belief             | preference with CONDITIONED  |
| Eq. 8-11  KTO; Eq. 12  the same given the belief        | kto_loss, kto                |

Letters as in model.py. All log-probs are in nats and float32; "logps" are summed over tokens.
"""
import math
from dataclasses import dataclass
from typing import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

BELIEF, CLOSE, RESPONSE = range(3)     # belief without its closing `>` | the `>` | response
ANSWER = slice(0, 3)                   # belief and response together
CHUNK = 4096                           # positions whose logits are in memory at once


@dataclass
class Scores:
    """A model's log-probs for B rows, with targets. Branch 0 is the chosen answer, 1 rejected."""
    logps: torch.Tensor                # (B, S, 3) summed over the tokens of each branch and piece
    counts: torch.Tensor               # (B, S, 3) number of tokens in each sum
    class_logps: torch.Tensor          # (B, K) of the class tokens after the prompt; softmax over V
    target: torch.Tensor               # (B, K) the group's shares
    pair: torch.Tensor                 # (B, 2) its shares of the accepted and rejected class
    n_options: torch.Tensor            # (B,) number of options of the question
    ref: torch.Tensor = None           # (B, S, 3) logps under the reference
    mismatch: torch.Tensor = None      # (3,) mean log-ratio of mismatched pairs, by piece


# ---------------------------------------------------------------------------------------------
# From hidden states to log-probs

def token_logps(hidden, head, tokens, chunk=CHUNK):
    """Log-probs of some vocabulary columns at each position: hidden (M, C), head (V, C), tokens
    (M, J) ids -> (M, J) float32. With more than one chunk of positions, backward recomputes the
    logits chunk by chunk, which bounds memory."""
    logps = lambda hidden, tokens: F.linear(hidden, head).log_softmax(-1).gather(-1, tokens)
    if len(hidden) <= chunk:
        return logps(hidden, tokens)
    return torch.cat([checkpoint(logps, h, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), tokens.split(chunk))])


def score(model, head, batch):
    """Score a batch -> Scores. batch: tensors from data.collate, perhaps with ref and mismatch."""
    hidden = model(*(batch[k] for k in ("ids", "paths", "cells")))     # (N, C), of packed tokens
    # The head runs in float32 even under autocast: bfloat16 can only step by 0.5 nats near -100,
    # where GPT-2's logits usually are, and GDPO reads a distribution from them.
    with torch.autocast(hidden.device.type, enabled=False):            # head (V, C)
        columns = token_logps(hidden[batch["at"]].float(), head, batch["tokens"])      # (M, 1+K)
    counts = batch["counts"]
    logps = columns.new_zeros(counts.numel()).index_add(0, batch["slot"], columns[:, 0])  # (B*S*3,)
    return Scores(logps.view(counts.shape), counts, columns[batch["first"], 1:],
                  *map(batch.get, ("target", "pair", "n_options", "ref", "mismatch")))


# ---------------------------------------------------------------------------------------------
# Pure losses: tensors in, (B,) out

def mean_nll(logps, counts):
    """Negative log-prob per token. logps, counts (..., P): both are summed over the P pieces."""
    return -logps.sum(-1) / counts.sum(-1)


def kl_to_target(class_logps, target):
    """KL(target || model) over the classes (B, K), in nats: GDPO Eq. 6, first term.
    The model's log-probs are normalised over the whole vocabulary, not over the classes, so mass
    that leaks off the class tokens is penalised too; a share of 0 contributes 0."""
    # differs: Eq. 6 prints KL(model, target), infinite as soon as a share is 0; the authors' code
    # computes this direction as well.
    return (torch.xlogy(target, target) - target * class_logps).sum(-1)  # (B,); xlogy(0, 0) = 0


def dpo_loss(chosen_logratios, rejected_logratios, beta, label_smoothing=0.0):
    """-log sigmoid of the reward margin: Eq. 1, 7. Log-ratios (B,) are policy - reference, summed.
    label_smoothing: the probability that a label is flipped (conservative DPO)."""
    h = margin(chosen_logratios, rejected_logratios, beta)
    return -(1 - label_smoothing) * F.logsigmoid(h) - label_smoothing * F.logsigmoid(-h)


def kto_loss(logratios, desirable, z0, beta, weight):
    """KTO (Ethayarajh et al. 2024), GDPO Eq. 8-12, (B,):
        weight * (1 - sigmoid(beta * (logratio - z0)))      for a desirable answer
        weight * (1 - sigmoid(beta * (z0 - logratio)))      for an undesirable one
    logratios (B,) are the rewards r of Eq. 9: policy - reference, summed, in nats. z0 >= 0
    carries no gradient; weight is lambda."""
    r = logratios - z0 if desirable else z0 - logratios
    return weight * (1 - torch.sigmoid(beta * r))


def margin(chosen_logratios, rejected_logratios, beta):
    """Reward margin, chosen minus rejected (B,): Eq. 3."""
    return beta * (chosen_logratios - rejected_logratios)


# ---------------------------------------------------------------------------------------------
# Preference terms: (Scores, pieces, options) -> (B,). pieces: the parts of an answer that count

def logratios(s, pieces):
    """log pi(y) - log pi_ref(y) of each branch (B, S), summed over the given pieces."""
    return (s.logps - s.ref)[..., pieces].sum(-1)


def dpo(s, pieces, o):
    """DPO (Rafailov et al. 2024): GDPO Eq. 1 and 7, with --label_smoothing."""
    chosen, rejected = logratios(s, pieces).unbind(1)
    return dpo_loss(chosen, rejected, o.beta, o.label_smoothing)


def kto(s, pieces, o):
    """KTO on both answers of a pair, half each: GDPO Eq. 8-12. z0 is the mean log-ratio of
    mismatched pairs over the whole batch, clamped at 0."""
    # differs: Eq. 10 is a KL divergence; as in KTO, it is estimated from mismatched pairs.
    chosen, rejected = logratios(s, pieces).unbind(1)
    z0 = s.mismatch[pieces].sum().clamp(min=0)         # one number for the whole batch
    return (kto_loss(chosen, True, z0, o.beta, o.lambda_d)
            + kto_loss(rejected, False, z0, o.beta, o.lambda_u)) / 2


@dataclass(frozen=True)
class Pref:
    term: Callable                     # (Scores, pieces, options) -> (B,)
    mismatch: bool = False             # reads Scores.mismatch


# ---------------------------------------------------------------------------------------------
# Methods. An objective: (Scores, options) -> (loss (B,), {name: (B,) parts to log})

@dataclass(frozen=True)
class Loss:
    """What a loss needs. The rest of the project reads these fields, never a loss's name."""
    objective: Callable                # (Scores, options) -> (loss (B,), {name: (B,) to log})
    branches: tuple = ("chosen",)      # names from data.BRANCHES, chosen first
    reference: bool = False            # starts from an SFT checkpoint, which is its reference
    mismatch: bool = False             # reads Scores.mismatch

    def __post_init__(self):           # calibration and margins read branch 0
        assert self.branches[0] == "chosen", self.branches


def sft(s, o):
    """Mean NLL of belief and accepted response."""
    return mean_nll(s.logps[:, 0], s.counts[:, 0]), {}


def response_nll(s):
    """Mean NLL of each branch's response (B, S)."""
    return -s.logps[..., RESPONSE] / s.counts[..., RESPONSE]


def calibration(s, o):
    """Eq. 6, the first term of GDPO: KL to the group's shares, plus -log p(b | x) of the accepted
    belief, averaged over its tokens except the closing one."""
    # differs: Eq. 6 has the sum; the mean produced the paper's numbers and does not depend on the
    # belief's length.
    belief = -s.logps[:, 0, BELIEF] / s.counts[:, 0, BELIEF]
    kl = kl_to_target(s.class_logps, s.target)
    return o.w_kl * kl + o.w_belief * belief, {"kl": kl, "belief_nll": belief}


JOINT = ("own", ANSWER)                # Eq. 1: each answer with its own belief; both count
CONDITIONED = ("given", [RESPONSE])    # Eq. 7: both after the accepted belief; responses count


def preference(pref, other, pieces):
    """A preference term alone: the chosen branch against the branch `other`."""
    def objective(s, o):
        loss = pref.term(s, pieces, o)
        return o.w_pref * loss, {"pref": loss}
    return Loss(objective, ("chosen", other), reference=True, mismatch=pref.mismatch)


def gdpo(pref):
    """Eq. 5: calibration plus conditioned preference; conflicting preferences no longer cancel."""
    other, pieces = CONDITIONED

    def objective(s, o):
        calibrate, parts = calibration(s, o)
        prefer = pref.term(s, pieces, o)
        # differs: the paper has no anchor (its weight is 0 by default). It keeps the accepted
        # response likely; the preference term alone may lower it to widen the margin.
        anchor = response_nll(s)[:, 0]
        loss = calibrate + o.w_pref * prefer + o.w_anchor * anchor
        return loss, parts | {"pref": prefer, "response_nll": anchor}
    return Loss(objective, ("chosen", other), reference=True, mismatch=pref.mismatch)


PREFS = {"dpo": Pref(dpo), "kto": Pref(kto, mismatch=True)}
LOSSES = {
    "sft": Loss(sft),
    "gdpo": gdpo(PREFS["dpo"]),
    "gdpo-cal": Loss(calibration, reference=True),     # its first term alone, and its second
    "gdpo-pref": preference(PREFS["dpo"], *CONDITIONED),
}


# =============================================================================================
# Plumbing: baselines, and the preference terms of other papers

def uniform_sft(s, o):
    """SFT as if the beliefs were spread evenly. With n options the accepted one is drawn from the
    shares p and the rejected one evenly from the rest, so that the accepted answer with weight 1/n
    and the rejected with (n-1)/n stand for each option with p/n + (1-p)/n = 1/n: even, exactly."""
    nll = mean_nll(s.logps, s.counts)                                                 # (B, 2)
    return nll[:, 0] / s.n_options + nll[:, 1] * (1 - 1 / s.n_options), {}


def sft_kl(s, o):
    """SFT plus GDPO's KL term: the baseline without any preference term."""
    nll, kl = mean_nll(s.logps[:, 0], s.counts[:, 0]), kl_to_target(s.class_logps, s.target)
    return nll + o.w_kl * kl, {"kl": kl}


def both_kl(s, o):
    """sft_kl plus the NLL of the rejected response after its own belief: it sees the same texts
    as a preference term does, but not which of the two was preferred."""
    loss, parts = sft_kl(s, o)
    return loss + response_nll(s)[:, 1], parts


LOSSES |= {
    "uniform-sft": Loss(uniform_sft, ("chosen", "own")),
    "sft-kl": Loss(sft_kl, reference=True),
    "both-kl": Loss(both_kl, ("chosen", "own"), reference=True),
}


def mean_logratios(s, pieces):
    """Like logratios (B, S), but averaged over tokens instead of summed."""
    return logratios(s, pieces) / s.counts[..., pieces].sum(-1)


def dpo_soft(s, pieces, o):
    """DPO with the group's shares as soft labels: a random member who holds one of the two beliefs
    prefers the accepted answer with probability p_chosen / (p_chosen + p_rejected)."""
    chosen, rejected = logratios(s, pieces).unbind(1)
    share = (s.pair + 1e-6) / (s.pair + 1e-6).sum(1, keepdim=True)     # finite even if both are 0
    return dpo_loss(chosen, rejected, o.beta, label_smoothing=share[:, 1])


def hdpo(s, pieces, o):
    """H-DPO (arXiv 2411.07595) weights the entropy and cross-entropy parts of DPO's KL separately.
    With alpha = beta it is DPO. Its optimum is ref^(beta/alpha) * p^(1/alpha): with alpha 1 and
    beta 0 it needs no reference and learns the shares p themselves from pairs."""
    chosen, rejected = s.logps[..., pieces].sum(-1).unbind(1)
    ref_chosen, ref_rejected = s.ref[..., pieces].sum(-1).unbind(1)
    return -F.logsigmoid(o.alpha * (chosen - rejected) - o.beta * (ref_chosen - ref_rejected))


def goal(o):
    """1 / (2 beta), where IPO and Cal-DPO pull the log-ratios."""
    if o.beta == 0:
        raise ValueError("--beta must be more than 0 for this loss")
    return 1 / (2 * o.beta)


def ipo(s, pieces, o):
    """IPO (arXiv 2310.12036, Eq. 17), with beta for its tau. Log-ratios are summed; some
    implementations average them, which changes the strength of a given beta."""
    chosen, rejected = logratios(s, pieces).unbind(1)
    return (chosen - rejected - goal(o)) ** 2


def cal_dpo(s, pieces, o):
    """Cal-DPO (arXiv 2412.14516): no beta in the sigmoid; each log-ratio is pulled to +-1/(2 beta).
    The squares are halved, as in the released code; another paper quotes them without the half."""
    chosen, rejected = logratios(s, pieces).unbind(1)
    squares = (chosen - goal(o)) ** 2 + (rejected + goal(o)) ** 2
    return -F.logsigmoid(chosen - rejected) + squares / 2


def dil(s, pieces, o):
    """DIL with LSIF (arXiv 2503.05079): fits the density ratio pi/ref by least squares. No beta.
    Exponents are clamped at 20, beyond which the gradient is 0."""
    # differs: the formula has sums over tokens; the released code, like this one, has means.
    chosen, rejected = mean_logratios(s, pieces).unbind(1)
    return -chosen.clamp(max=20).exp() + (2 * rejected).clamp(max=20).exp() / 2


def dil_bce(s, pieces, o):
    """DIL with binary cross-entropy (arXiv 2503.05079); means over tokens, as in dil."""
    chosen, rejected = mean_logratios(s, pieces).unbind(1)
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def pipa_n(s, pieces, o):
    """PIPA-N (arXiv 2502.05773): binary cross-entropy of "is this answer right?", where wrong
    answers follow the reference and --prior is the share of right ones. No beta. Re-derived from
    the paper's constraints, for whole answers."""
    chosen, rejected = logratios(s, pieces).unbind(1)
    offset = math.log(o.prior / (1 - o.prior))         # the log-odds at pi = ref
    return -F.logsigmoid(chosen + offset) - F.logsigmoid(-rejected - offset)


def pipa_m(s, pieces, o):
    """PIPA-M: like pipa_n, but right and wrong answers together follow the reference, so pi is
    at most ref / prior and is clipped there. Re-derived as well."""
    u = (logratios(s, pieces) + math.log(o.prior)).clamp(max=math.log1p(-1e-6))  # log p(right)
    chosen, rejected = u.unbind(1)
    return -chosen - torch.log(-torch.expm1(rejected))


def simpo(s, pieces, o):
    """SimPO (arXiv 2405.14734): means over tokens, a margin gamma, no reference."""
    chosen, rejected = (-mean_nll(s.logps[..., pieces], s.counts[..., pieces])).unbind(1)
    return -F.logsigmoid(margin(chosen, rejected, o.beta) - o.gamma)


PREFS |= {
    "dpo-soft": Pref(dpo_soft),
    "hdpo": Pref(hdpo),
    "ipo": Pref(ipo),
    "cal-dpo": Pref(cal_dpo),
    "dil": Pref(dil),
    "dil-bce": Pref(dil_bce),
    "pipa-n": Pref(pipa_n),
    "pipa-m": Pref(pipa_m),
    "simpo": Pref(simpo),
}

# Every preference term is a method alone, and another one inside GDPO
LOSSES |= {name: preference(pref, *JOINT) for name, pref in PREFS.items()}
LOSSES |= {f"gdpo-{name}": gdpo(pref) for name, pref in PREFS.items() if name != "dpo"}
