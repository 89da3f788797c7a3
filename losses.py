"""The losses: log-probs in, one loss per row out. This file knows torch and nothing else.

Third in reading order. score() turns hidden states into a Scores: summed log-probs by branch and
piece. A loss is a selection from it. To add one: write an objective and give it a line in LOSSES.

| equation (of the GDPO paper, arXiv 2412.20299)          | function                     |
|---------------------------------------------------------|------------------------------|
| Eq. 1  DPO                                              | dpo_loss, dpo                |
| Eq. 3  reward margin                                    | margin                       |
| Eq. 5  GDPO = calibration + conditioned preference      | gdpo                         |
| Eq. 6  calibration = KL(belief shares) - log p(b|x)     | calibration                  |
| Eq. 7  preference given the accepted belief             | conditioned_preference       |

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


@dataclass
class Scores:
    """What a model says about B rows. Branch 0 is the chosen answer, branch 1 the rejected one."""
    logps: torch.Tensor                # (B, S, 3) summed over the tokens of each branch and piece
    counts: torch.Tensor               # (B, S, 3) how many tokens those are
    class_logps: torch.Tensor          # (B, K) of the class tokens after the prompt, among all V
    target: torch.Tensor               # (B, K) the group's shares
    n_options: torch.Tensor            # (B,) options of the survey question
    ref: torch.Tensor = None           # (B, S, 3) logps under the reference


# ---------------------------------------------------------------------------------------------
# From hidden states to log-probs

def token_logps(hidden, head, tokens, chunk=1024):
    """Log-probs of some vocabulary columns at each position: hidden (M, C), head (V, C), tokens
    (M, J) ids -> (M, J) float32. Never a (M, V) tensor: the logits of a chunk of positions are
    thrown away and made again in backward (a single chunk is kept)."""
    if len(hidden) <= chunk:
        return chunk_logps(hidden, head, tokens)
    return torch.cat([checkpoint(chunk_logps, h, head, t, use_reentrant=False)
                      for h, t in zip(hidden.split(chunk), tokens.split(chunk))])


def chunk_logps(hidden, head, tokens):
    return F.linear(hidden, head).float().log_softmax(-1).gather(-1, tokens)


def score(hidden, head, batch):
    """hidden (B*S, T, C) of batch["ids"], head (V, C), batch as tensors from data.collate ->
    Scores. Only the positions in batch["at"] meet the vocabulary."""
    columns = token_logps(hidden.flatten(0, 1)[batch["at"]], head, batch["tokens"])   # (M, 1+K)
    counts = batch["counts"]
    logps = columns.new_zeros(counts.numel()).index_add(0, batch["slot"], columns[:, 0])
    return Scores(logps.view(counts.shape), counts, columns[batch["first"], 1:], batch["target"],
                  batch["n_options"])


# ---------------------------------------------------------------------------------------------
# Pure losses: tensors in, (B,) out

def mean_nll(logps, counts):
    """Mean over tokens of the negative log-prob. logps, counts (B, P) summed over P pieces."""
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


def dpo_loss(chosen_logratios, rejected_logratios, beta):
    """-log sigmoid of the reward margin; log-ratios (B,) policy - reference, summed: Eq. 1, 7."""
    return -F.logsigmoid(margin(chosen_logratios, rejected_logratios, beta))


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
    nll = -s.logps.sum(-1) / s.counts.sum(-1)                                         # (B, 2)
    return nll[:, 0] / s.n_options + nll[:, 1] * (1 - 1 / s.n_options), {}


def logratios(s, pieces):
    """log pi(y) - log pi_ref(y) of each branch (B, S), summed over the given pieces."""
    return (s.logps - s.ref)[..., pieces].sum(-1)


def dpo(s, o):
    """Each answer with its own belief, belief and response counted: Eq. 1."""
    r = logratios(s, ANSWER)
    loss = dpo_loss(r[:, 0], r[:, 1], o.beta)
    return loss, {"pref": loss}


def calibration(s, o):
    """Eq. 6: the first term of GDPO."""
    kl, belief = kl_to_target(s.class_logps, s.target), belief_nll(s.logps[:, 0], s.counts[:, 0])
    return o.w_kl * kl + o.w_belief * belief, {"kl": kl, "belief_nll": belief}


def conditioned_preference(s, o):
    """Eq. 7: the second term of GDPO. Both answers after the accepted belief, response counted."""
    r = logratios(s, [RESPONSE])
    loss = dpo_loss(r[:, 0], r[:, 1], o.beta)
    return o.w_pref * loss, {"pref": loss}


def gdpo(s, o):
    """Eq. 5: the sum of both, so that conflicting preferences no longer cancel."""
    calibrate, parts = calibration(s, o)
    prefer, more = conditioned_preference(s, o)
    return calibrate + prefer, parts | more


@dataclass(frozen=True)
class Loss:
    """What a loss needs. The rest of the project asks this and never looks at a loss's name."""
    objective: Callable
    branches: tuple = ("chosen",)      # of data.BRANCHES; the chosen one first
    reference: bool = False            # starts from an SFT checkpoint, and measures against it


LOSSES = {
    "sft": Loss(sft),
    "uniform-sft": Loss(uniform_sft, ("chosen", "own")),
    "dpo": Loss(dpo, ("chosen", "own"), reference=True),
    "gdpo": Loss(gdpo, ("chosen", "given"), reference=True),
    "gdpo-cal": Loss(calibration, ("chosen",), reference=True),
    "gdpo-pref": Loss(conditioned_preference, ("chosen", "given"), reference=True),
}
