"""The language model, its checkpoints and its tokenizer, written by hand. One class covers GPT-2,
Pythia (GPT-NeoX) and the Llama family.

First in reading order: model.py -> data.py -> losses.py -> train.py -> evaluate.py -> synth.py.
The families differ only in the fields of GPTConfig. Left out on purpose: dropout (policy and
reference must agree, so it is off in every run) and custom attention kernels.

Letters in all files: B rows (pairs), N packed tokens, T tokens, V vocabulary, K belief classes,
C channels, H heads, D head size, S branches of a row, M scored tokens, R packed sequences.
"""
import hashlib
import json
import math
import os
import re
import unicodedata
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex                           # comes with tiktoken
import tiktoken
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    vocab_size: int = 50257    # rows of the embedding table, padding included
    n_ctx: int = 1024          # longest sequence
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    n_inner: int = 3072        # width of the MLP
    eps: float = 1e-5          # of every LayerNorm
    rotary: float = 0.0        # share of a head that is rotated; 0: learned positions (GPT-2)
    rotary_base: float = 10000.0
    rope_scaling: tuple = ()   # Llama 3: factor, low and high frequency factor, original n_ctx
    parallel: bool = False     # attention and MLP read the same x (Pythia), not one after the other
    tanh_gelu: bool = True     # GPT-2 has the tanh form; Pythia the exact one
    tied: bool = True          # the head is the embedding table; Pythia has its own
    n_kv: int = None           # key and value heads that the heads share (Llama); None: no sharing
    rms_norm: bool = False     # RMSNorm (Llama) instead of LayerNorm
    gated: bool = False        # the MLP is SiLU(gate) * up (Llama) instead of a GELU
    bias: bool = True          # of every linear layer; Llama has none
    qkv_bias: bool = True      # Qwen2 has these biases alone
    by_head: bool = False      # c_attn gives q, k, v of one head after another (Pythia)

    def __post_init__(self):
        sizes = (self.vocab_size, self.n_ctx, self.n_layer, self.n_head, self.n_embd, self.n_inner)
        if min(sizes) < 1 or self.n_embd % self.n_head or self.n_head % (self.n_kv or self.n_head):
            raise ValueError(f"need sizes > 0, n_embd divisible by n_head, n_head by n_kv: {self}")


def rotate(x, cos, sin):
    """Apply rotary positions to the first D_rot channels of each head: channel i is rotated with
    channel i + D_rot / 2. x (B, T, H, D); cos, sin (B or 1, T, 1, D_rot / 2)."""
    half = cos.shape[-1]                               # D_rot / 2
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        n_kv, D = cfg.n_kv or cfg.n_head, cfg.n_embd // cfg.n_head
        self.heads = [cfg.n_head, n_kv, n_kv]          # q, k and v heads, D channels each
        self.by_head = cfg.by_head
        self.c_attn = nn.Linear(cfg.n_embd, sum(self.heads) * D, bias=cfg.qkv_bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.bias)

    def forward(self, x, rope, mask=None, cache=None, pos=None, paths=None, cells=None):
        """x (B, T, C) -> (B, T, C); packed x (N, C) -> (N, C). The rest: see GPT.forward."""
        qkv = self.c_attn(x)                           # (B, T, 3C), less if heads share k and v
        if paths is not None:                          # packed (N, 3C): gather the R sequences
            qkv = F.embedding(paths, qkv)              # into a right-padded table (R, T, 3C)
        qkv = qkv.unflatten(-1, (sum(self.heads), -1))           # (B, T, 3H, D)
        q, k, v = (qkv.unflatten(2, (-1, 3)).unbind(3) if self.by_head
                   else qkv.split(self.heads, dim=2))
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:                          # (2, B, T_max, H, D), filled at `pos`
            rows = torch.arange(len(q), device=q.device)[:, None]    # (B, 1), against pos (B, T)
            cache[0][rows, pos], cache[1][rows, pos] = k.type_as(cache), v.type_as(cache)
            k, v = cache[:, :, :mask.shape[-1]] if mask is not None else (k, v)  # else prefill
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))         # (B, T, H, D) -> (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads[1] < self.heads[0])
        y = y.transpose(1, 2).flatten(2)                         # (B, T, C)
        if paths is not None:                          # give each packed token its output back
            y = F.embedding(cells, y.flatten(0, 1))             # (N, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gated, self.approximate = cfg.gated, "tanh" if cfg.tanh_gelu else "none"
        self.c_fc = nn.Linear(cfg.n_embd, (1 + cfg.gated) * cfg.n_inner, bias=cfg.bias)
        self.c_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=cfg.bias)

    def forward(self, x):
        x = self.c_fc(x)                               # (B, T, n_inner), or twice that if gated
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = nn.RMSNorm if cfg.rms_norm else nn.LayerNorm
        self.ln_1, self.ln_2 = norm(cfg.n_embd, cfg.eps), norm(cfg.n_embd, cfg.eps)
        self.attn, self.mlp = Attention(cfg), MLP(cfg)
        self.parallel = cfg.parallel

    def forward(self, x, *where):
        y = x + self.attn(self.ln_1(x), *where)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        # from_pretrained skips nn.Embedding's init, which on "meta" triggers a one-second import
        table = lambda n: nn.Embedding.from_pretrained(torch.empty(n, cfg.n_embd), freeze=False)
        self.wte = table(cfg.vocab_size)
        if not cfg.rotary:
            self.wpe = table(cfg.n_ctx)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = (nn.RMSNorm if cfg.rms_norm else nn.LayerNorm)(cfg.n_embd, cfg.eps)
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    @property
    def head(self):
        """The (V, C) matrix that turns hidden states into logits."""
        return self.wte.weight if self.cfg.tied else self.lm_head.weight

    def init_weights(self, seed):
        """GPT-2's initialisation: std 0.02, over sqrt(2 n_layer) for residual projections."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:                           # norm weights are 1, biases 0
                nn.init.constant_(p, float(name.endswith("weight")))
            else:
                depth = math.sqrt(2 * self.cfg.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, 0.0, 0.02 / depth, generator=g)
        return self

    def rope(self, pos):
        """cos and sin of the rotary angles at pos (B or 1, T); None with learned positions."""
        cfg = self.cfg
        n = int(cfg.rotary * (cfg.n_embd // cfg.n_head))                       # D_rot, per head
        if n == 0:
            return None
        freq = cfg.rotary_base ** (-torch.arange(0, n, 2, device=pos.device).float() / n)
        if cfg.rope_scaling:                           # Llama 3 slows the slow rotations further
            factor, low, high, n_ctx = cfg.rope_scaling
            turns = n_ctx * freq / (2 * math.pi)       # full turns over the original context
            fast = ((turns - low) / (high - low)).clamp(0, 1)    # 1: kept, 0: divided by factor
            freq = freq * (fast + (1 - fast) / factor)
        angle = pos[..., None, None].float() * freq                            # (B, T, 1, n / 2)
        return angle.cos(), angle.sin()

    def forward(self, ids, paths=None, cells=None, pos=None, mask=None, cache=None):
        """ids (B, T), or packed (N,) -> hidden states (B, T, C) or (N, C) after the last norm.
        paths (R, T): which packed tokens make up the R sequences. cells (N,): where each token
        sits in that flat table, at position cells % T. pos (B, T): positions, default 0..T-1.
        mask: broadcastable to (B, H, T, T_keys), True = may attend; default causal.
        cache: (2, B, T_max, H, D) per layer, filled in place at `pos` (see generate)."""
        T = ids.shape[-1] if paths is None else paths.shape[-1]
        if T > self.cfg.n_ctx:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.cfg.n_ctx}")
        pos = torch.arange(T, device=ids.device)[None] if pos is None else pos   # (B or 1, T)
        x = self.wte(ids)                                                      # (B, T, C) or (N, C)
        if not self.cfg.rotary:
            x = x + self.wpe(pos if cells is None else cells % T)
        rope = self.rope(pos)                                                  # (cos, sin) or None
        for block, layer in zip(self.h, cache or [None] * len(self.h)):
            where = (rope, mask, layer, pos, paths, cells)
            if self.checkpointing and torch.is_grad_enabled():  # keep only x; backward redoes it
                x = checkpoint(block, x, *where, use_reentrant=False)
            else:
                x = block(x, *where)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop_id=None, seed=0,
                 n_tokens=None):
        """Sample a continuation of each prompt (a list of ids); return only the new ids. A row
        ends at stop_id (included), after max_new_tokens, or when the context is full. temperature
        0 picks the likeliest token. seed: one number, or a list with a number or tuple per prompt.
        A row depends only on its own seed, never on its batch. Ids from n_tokens on only pad the
        embedding table (Pythia's) and are never sampled."""
        if not prompts:
            return []
        lengths, n_ctx, device = [len(p) for p in prompts], self.cfg.n_ctx, self.head.device
        if min(lengths) == 0 or max(lengths) >= n_ctx:
            raise ValueError(f"prompts must have 1 to {n_ctx - 1} tokens (one below the context), "
                             f"got {min(lengths)} to {max(lengths)}: shorten the prompt")
        steps = min(max_new_tokens, n_ctx - min(lengths))
        seeds = seed if isinstance(seed, list) else [(seed, i) for i in range(len(prompts))]
        draws = np.stack([np.random.default_rng(s).random(steps) for s in seeds])  # (B, steps)
        draws, n = torch.tensor(draws, device=device), torch.tensor(lengths, device=device)
        hidden, cache = self.prefill(prompts, steps)                           # hidden (B, C)
        rows, alive = torch.arange(len(n), device=device), n > 0       # rows of `new` in the batch
        new = torch.full((len(n), steps), -1, device=device)           # (B, steps); -1: no token
        for t in range(steps):
            with torch.autocast(device.type, enabled=False):   # bfloat16 is off by 1/4 nat at -100
                logits = F.linear(hidden.float(), self.head[:n_tokens].float())
            token = pick(logits, temperature, draws[:, t])                     # (B,)
            new[rows, t] = torch.where(alive, token, -1)
            alive = alive & (n + t + 1 < n_ctx) & (token != (-1 if stop_id is None else stop_id))
            left = int(alive.sum())
            if t + 1 == steps or left == 0:
                break
            if left <= len(rows) // 2:                 # half are finished: drop those
                rows, n, token, draws = (x[alive] for x in (rows, n, token, draws))
                cache, alive = [c[:, alive] for c in cache], alive[alive]
            pos = (n + t).clamp(max=n_ctx - 1)[:, None]                        # (B, 1)
            slots = torch.arange(min(max(lengths) + t + 1, n_ctx), device=device)
            mask = (slots <= pos)[:, None, None]                               # (B, 1, 1, T_keys)
            hidden = self(token[:, None], pos=pos, mask=mask, cache=cache)[:, 0]   # (B, C)
        return [[i for i in row if i >= 0] for row in new.tolist()]

    def prefill(self, prompts, steps):
        """Return the hidden state (B, C) at each prompt's end and a cache with room for `steps`
        more. Equal prompts are computed once. generate's mask hides pads until overwritten."""
        w, cfg = self.head, self.cfg
        unique = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([unique[tuple(p)] for p in prompts], device=w.device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in unique], batch_first=True)
        room, D = min(ids.shape[1] + steps, cfg.n_ctx), cfg.n_embd // cfg.n_head
        half = torch.is_autocast_enabled(w.device.type)
        dtype = torch.get_autocast_dtype(w.device.type) if half else w.dtype
        cache = [w.new_zeros(2, len(ids), room, cfg.n_kv or cfg.n_head, D, dtype=dtype)
                 for _ in self.h]
        hidden = self(ids.to(w.device), cache=cache)                           # (unique, T, C)
        ends = torch.tensor([len(p) - 1 for p in prompts], device=w.device)
        return hidden[which, ends], [layer[:, which] for layer in cache]


def pick(logits, temperature, draw):
    """One token per row: logits (B, V), draw (B,) uniform in [0, 1) -> ids (B,). Sampling inverts
    the cumulative distribution, so that one number decides a token on any device."""
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.double)  # (B, V)
    return torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True)[:, 0]


# =============================================================================================
# Plumbing: checkpoint folders in Hugging Face's format (config.json, model.safetensors, tokenizer)

NAMES = """
ours         gpt2                 gpt_neox                   llama
hf_class     GPT2LMHeadModel      GPTNeoXForCausalLM         LlamaForCausalLM
vocab_size   vocab_size           vocab_size                 vocab_size
n_ctx        n_positions          max_position_embeddings    max_position_embeddings
n_layer      n_layer              num_hidden_layers          num_hidden_layers
n_head       n_head               num_attention_heads        num_attention_heads
n_embd       n_embd               hidden_size                hidden_size
n_inner      n_inner              intermediate_size          intermediate_size
eps          layer_norm_epsilon   layer_norm_eps             rms_norm_eps
tied         tie_word_embeddings  tie_word_embeddings        tie_word_embeddings
rotary       -                    rotary_pct                 -
rotary_base  -                    rotary_emb_base            rope_theta
parallel     -                    use_parallel_residual      -
n_kv         -                    -                          num_key_value_heads
h            transformer.h        gpt_neox.layers            model.layers
wte          transformer.wte      gpt_neox.embed_in          model.embed_tokens
wpe          transformer.wpe      -                          -
ln_1         ln_1                 input_layernorm            input_layernorm
attn.c_attn  attn.c_attn          attention.query_key_value  self_attn.*_proj
attn.c_proj  attn.c_proj          attention.dense            self_attn.o_proj
ln_2         ln_2                 post_attention_layernorm   post_attention_layernorm
mlp.c_fc     mlp.c_fc             mlp.dense_h_to_4h          mlp.*_proj
mlp.c_proj   mlp.c_proj           mlp.dense_4h_to_h          mlp.down_proj
ln_f         transformer.ln_f     gpt_neox.final_layer_norm  model.norm
lm_head      lm_head              embed_out                  lm_head
"""  # GPTConfig's fields and their keys in config.json, then modules; * is q, k, v or gate, up
OURS, *THEIRS = zip(*map(str.split, NAMES.strip().splitlines()))
NAMES = {kind: dict(zip(OURS[1:], names)) for kind, *names in THEIRS}
NAMES["qwen2"] = NAMES["llama"] | {"hf_class": "Qwen2ForCausalLM"}
LLAMA = dict(eps=1e-6, rotary=1.0, tied=False, rms_norm=True, gated=True, bias=False)
NEOX = dict(rotary=0.25, parallel=True, tanh_gelu=False, tied=False, by_head=True)
DEFAULTS = {"gpt2": {}, "gpt_neox": NEOX, "llama": LLAMA | {"qkv_bias": False}, "qwen2": LLAMA}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
KNOWN = {"activation_function": "gelu_new", "scale_attn_weights": True, "type": "default",
         "scale_attn_by_inverse_layer_idx": False, "use_sliding_window": False}
RENAMED = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")     # GPT-2 stores these (in, out)
BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", ".inv_freq")   # in old checkpoints
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def family(cfg):
    """Hugging Face's model_type for a GPTConfig."""
    if cfg.rms_norm:
        return "qwen2" if cfg.qkv_bias else "llama"
    return "gpt_neox" if cfg.rotary else "gpt2"


def config_from_hf(c):
    """config.json as transformers 4 or 5 writes it (a dict) -> GPTConfig. Raises ValueError for a
    setting that would change the logits and is not implemented."""
    kind, rope = c["model_type"], c.get("rope_parameters") or c.get("rope_scaling") or {}
    if kind not in NAMES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(NAMES)}")
    c = c | rope                                       # transformers 5 keeps rope_theta in rope
    c |= {old: rope[new] for old, new in RENAMED.items() if new in rope}
    fields = DEFAULTS[kind] | {ours: c[key] for ours, key in NAMES[kind].items()
                               if c.get(key) is not None}
    if c.get("rope_type") == "llama3":
        fields["rope_scaling"] = tuple(c[key] for key in LLAMA3)
    known = KNOWN | {"hidden_act": "silu" if "gated" in fields else "gelu",
                     "head_dim": fields["n_embd"] // fields["n_head"],
                     "rope_type": "llama3" if "rope_scaling" in fields else "default"}
    unknown = {k: c[k] for k, v in known.items() if c.get(k) not in (None, v)}
    if unknown:
        raise ValueError(f"{unknown} is not implemented here")
    return GPTConfig(**{"n_inner": 4 * fields["n_embd"]} | fields)


def config_to_hf(cfg, eos):
    """Build the config.json that Hugging Face's classes read. eos: id of the end-of-text token."""
    kind = family(cfg)
    config = {"model_type": kind, "architectures": [NAMES[kind]["hf_class"]], "bos_token_id": eos,
              "eos_token_id": eos, "dtype": "float32"}
    config |= {key: getattr(cfg, ours) for ours, key in NAMES[kind].items()
               if hasattr(cfg, ours) and key != "-"}
    if cfg.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3, cfg.rope_scaling))}
    assert config_from_hf(config) == cfg, (config, cfg)
    return config


def on_disk(model):
    """{name in the file: view of the parameter in the file's layout}. A checkpoint is read by
    copying into these views and written by copying out of them."""
    names, gpt2, views = NAMES[family(model.cfg)], family(model.cfg) == "gpt2", {}
    for name, p in model.named_parameters():
        layer, module, leaf = re.fullmatch(r"(h\.\d+\.)?(.+)\.(\w+)", name).groups("")
        theirs = f"{layer.replace('h', names['h'])}{names[module]}.{leaf}"
        w = p.detach().t() if gpt2 and name.endswith(LINEAR) else p.detach()
        parts = [("", w)]
        if "*" in theirs and module == "attn.c_attn":
            C, n = model.cfg.n_embd, (len(w) - model.cfg.n_embd) // 2   # n rows each for k and v
            parts = zip("qkv", w.split([C, n, n]))
        elif "*" in theirs:
            parts = zip(("gate", "up"), w.chunk(2))
        views |= {theirs.replace("*", part): view for part, view in parts}
    return views


def read_weights(folder):
    """Map a checkpoint folder's weights, in one file or in shards -> {name: tensor}, views of the
    files that take no memory. A .safetensors file: 8 bytes (the header's length), the header {name:
    {dtype, shape, data_offsets}}, raw bytes."""
    tensors = {}
    for path in [*folder.glob("model.safetensors")] or folder.glob("model-*.safetensors"):
        try:
            raw = torch.from_file(str(path), size=os.path.getsize(path), dtype=torch.uint8)
            start = 8 + int.from_bytes(raw[:8].tolist(), "little")
            header = json.loads(bytes(raw[8:start].numpy()))
            header.pop("__metadata__", None)
            for name, t in header.items():
                at, end = t["data_offsets"]            # a slice never reads outside the file
                part = raw[start + at:start + end]
                tensors[name] = part.view(DTYPES[t["dtype"]]).view(t["shape"])
        except Exception as e:                         # which one depends on the damage
            raise ValueError(f"{path}: not safetensors, or truncated: refetch it ({e})") from None
    if not tensors:
        raise FileNotFoundError(f"no model.safetensors in {folder}: give a checkpoint folder")
    return tensors


def load_model(folder, device="cpu"):
    """A checkpoint folder -> GPT with float32 weights. Every stored tensor is used once; a missing,
    unexpected or wrongly shaped one raises ValueError with its name."""
    folder = Path(folder)
    try:
        text = (folder / "config.json").read_text(encoding="utf-8-sig")
        cfg = config_from_hf(json.loads(text))
    except Exception as e:                             # which one depends on what is wrong
        raise ValueError(f"{folder / 'config.json'}: {type(e).__name__}: {e}: give the folder of a "
                         "checkpoint, such as OUT/best of an earlier run") from None
    head = NAMES[family(cfg)]["lm_head"] + ".weight"   # transformers 5 always calls it lm_head
    stored = {head if k == "lm_head.weight" else k: w for k, w in read_weights(folder).items()
              if not k.endswith(BUFFERS)}
    if cfg.tied:                                       # a copy of the embeddings, if present
        stored.pop(head, None)
    if "wte.weight" in stored:                         # names in the original GPT-2 release
        stored = {f"transformer.{k}": w for k, w in stored.items()}
    with torch.device("meta"):                         # allocate only after checking the shapes
        model = GPT(cfg)
    want, found = ({name: tuple(w.shape) for name, w in tensors.items()}
                   for tensors in (on_disk(model), stored))
    for name in want | found:
        if want.get(name) != found.get(name):
            raise ValueError(f"{folder}: {name}: found {found.get(name, 'no tensor')}, but "
                             f"config.json asks for {want.get(name, 'none')}")
    for name, view in on_disk(model.to_empty(device=device)).items():
        view.copy_(stored[name])
    return model


def fingerprint(model):
    """A short hash that identifies the weights, computed from the start of each tensor."""
    some = torch.cat([p.detach().flatten()[:256].cpu() for p in model.parameters()])
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]


@contextmanager
def replacing(path):
    """Yield a temporary path to write to. It takes the place of `path` once the block succeeds, so
    that no file is ever half-written."""
    temporary = Path(f"{path}.tmp")
    temporary.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as e:                               # a full-disk error names no file
        raise OSError(e.errno, e.strerror, str(path)) from None
    finally:
        temporary.unlink(missing_ok=True)


def save_model(model, folder, eos):
    """Write config.json and model.safetensors in Hugging Face's format to `folder`, in float32.
    Each file is replaced in one rename; config.json never changes within a run."""
    folder, views, header, at = Path(folder), on_disk(model), {"__metadata__": {"format": "pt"}}, 0
    for name, w in views.items():
        end = at + 4 * w.numel()
        header[name] = {"dtype": "F32", "shape": w.shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                    # tensors start at a multiple of 8
    with replacing(folder / "config.json") as path:
        path.write_text(json.dumps(config_to_hf(model.cfg, eos), indent=2) + "\n")
    with replacing(folder / "model.safetensors") as path, open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for w in views.values():                       # one at a time in memory
            f.write(w.cpu().contiguous().numpy())


# ---------------------------------------------------------------------------------------------
# Tokens: byte-level BPE on top of tiktoken

EOS = "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"    # GPT-2's
SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in SHOWN]
# byte -> the printable character that stands for it in the tokenizer's files
CHARS = {b: chr(b) for b in SHOWN} | {b: chr(256 + n) for n, b in enumerate(HIDDEN)}
BYTES = {c: b for b, c in CHARS.items()}


class Tokenizer:
    """Byte-level BPE: GPT-2, Pythia, Llama 3, Qwen2, SmolLM2, and small ones trained here.

    files {name: text}: tokenizer.json, or vocab.json and merges.txt; plus tokenizer_config.json.
    save() writes these texts unchanged. encode adds no special tokens and treats any in the data as
    plain text. eos: the id in config.json, if any."""

    def __init__(self, files, eos=None):
        t = json.loads(files.get("tokenizer.json", "{}")) or gpt2_form(files)
        *cuts, last = split_patterns(t)
        vocab, added = t["model"]["vocab"], {a["content"]: a["id"] for a in t["added_tokens"]}
        merges = [m.split(" ") if isinstance(m, str) else m for m in t["model"]["merges"]]
        # tiktoken merges by rank and returns ranks. Here ranks follow the merges; self.ids maps a
        # rank to its id. A byte without a token is dropped, as in Hugging Face.
        tokens = list(dict.fromkeys([*BYTES, *map("".join, merges)]))
        rank_of = {token: rank for rank, token in enumerate(tokens)}
        if any(max(rank_of[a], rank_of[b]) > rank_of[a + b] for a, b in merges):
            raise ValueError("a merge comes before the merges that make its parts")
        ranks = {bytes(BYTES[c] for c in token): rank for token, rank in rank_of.items()}
        self.ids = [vocab.get(c) for c in BYTES] + [vocab[token] for token in tokens[256:]]
        every = f"{last}|(?:(?!{last})(?s:.))+"        # tiktoken would drop unmatched text
        self.bpe = tiktoken.Encoding("bpe", pat_str=every, mergeable_ranks=ranks, special_tokens={})
        # Pythia gives runs of spaces their own ids; they are cut out first, longest first.
        self.runs = {text: i for text, i in added.items() if text.isspace()}
        if self.runs:
            cuts.insert(0, "|".join(sorted(self.runs, key=len)[::-1]))
        self.cuts, self.nfc = [regex.compile(cut) for cut in cuts], bool(t.get("normalizer"))
        self.bytes = dict(zip(self.ids, ranks)) | {i: text.encode() for text, i in added.items()}
        self.bytes.pop(None, None)
        self.n_tokens = max(self.bytes) + 1
        named = json.loads(files.get("tokenizer_config.json", "{}")).get("eos_token")
        named = named["content"] if isinstance(named, dict) else named
        self.eos = added.get(named, eos if eos in self.bytes else added.get(EOS))
        if self.eos is None:
            raise ValueError("no end-of-text token: name it as eos_token in tokenizer_config.json")
        end = self.bytes[self.eos].decode()
        kind = "PreTrainedTokenizerFast" if "tokenizer.json" in files else "GPT2Tokenizer"
        self.files = {"tokenizer_config.json": json.dumps({
            "tokenizer_class": kind, "bos_token": end, "eos_token": end, "unk_token": end})} | files

    @classmethod
    def load(cls, folder):
        paths = [Path(folder) / name for name in (
            "tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "config.json")]
        files = {x.name: x.read_text(encoding="utf-8-sig") for x in paths if x.is_file()}
        try:
            eos = json.loads(files.pop("config.json", "{}")).get("eos_token_id")
            return cls(files, eos[0] if isinstance(eos, list) else eos)
        except (LookupError, TypeError, ValueError, AttributeError, regex.error) as e:
            raise ValueError(f"{folder}: no tokenizer.json (or vocab.json and merges.txt) of a "
                             f"byte-level BPE that this class can read: {e}") from None

    def save(self, folder):
        for name, text in self.files.items():
            with replacing(Path(folder) / name) as path:
                path.write_bytes(text.encode())

    def encode(self, text):
        """Text -> ids."""
        pieces = [unicodedata.normalize("NFC", text) if self.nfc else text]
        for cut in self.cuts:
            pieces = [x for piece in pieces for x in isolate(cut, piece)]
        ids = []
        for piece in pieces:
            if piece in self.runs:
                ids.append(self.runs[piece])
            else:
                ids += [self.ids[rank] for rank in self.bpe.encode_ordinary(piece)]
        return [i for i in ids if i is not None]

    def decode(self, ids):
        """Ids -> text, skipping end-of-text and ids without a token."""
        text = b"".join(self.bytes.get(i, b"") for i in ids if i != self.eos)
        return text.decode("utf-8", "replace")


def gpt2_form(files):
    """Convert GPT-2's older two files to the structure of tokenizer.json."""
    vocab, lines = json.loads(files["vocab.json"]), files["merges.txt"].splitlines()
    merges = [line for line in lines if line and not line.startswith("#version")]
    return {"model": {"vocab": vocab, "merges": merges},
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
            "added_tokens": [{"content": EOS, "id": vocab[EOS]}]}


def split_patterns(t):
    """Return the regexes that split text before merging, each applied to the pieces of the last.
    Raises ValueError, naming the part of tokenizer.json, if it is not byte-level BPE."""
    kind, normalizer = t["model"].get("type", "BPE"), (t.get("normalizer") or {}).get("type")
    if kind != "BPE" or normalizer not in (None, "NFC"):
        raise ValueError(f"model {kind}, normalizer {normalizer}")
    splitter, patterns = t.get("pre_tokenizer") or {}, []
    steps = splitter.get("pretokenizers", [splitter])
    for step in steps:
        match step:
            case {"type": "ByteLevel", "add_prefix_space": False}:
                patterns += [PATTERN] * step.get("use_regex", True)
            case {"type": "Digits", "individual_digits": each}:
                patterns.append(r"\p{N}" if each else r"\p{N}+")
            case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
                  "invert": False}:
                patterns.append(pattern)
            case _:
                raise ValueError(f"pre_tokenizer {step}")
    if steps[-1]["type"] != "ByteLevel" or not patterns:      # later steps would see bytes
        raise ValueError(f"pre_tokenizer {splitter}")
    return patterns


def isolate(pattern, text):
    """Cut text before and after every match of a pattern."""
    ends = sorted({0, len(text), *(e for m in pattern.finditer(text) for e in m.span())})
    return [text[a:b] for a, b in zip(ends, ends[1:])]


def train_bpe(texts, vocab_size):
    """Learn merges from texts: the most frequent pair first, on ties the largest bytes, until the
    vocabulary is full or no pair occurs twice. Deterministic."""
    counts = Counter(w for t in texts for w in re.findall(r" ?[^\W\d_]+| ?[^\s\w]+", t))
    words = {w: [bytes([b]) for b in w.encode()] for w in sorted(counts)}      # word -> its tokens
    pairs, where, merges = Counter(), defaultdict(set), []   # where: pair -> words that held it

    def count(word, sign):
        """Add a word's pairs to the counts (sign 1) or subtract them (-1)."""
        for pair in zip(words[word], words[word][1:]):
            pairs[pair] += sign * counts[word]
            where[pair].add(word)

    for word in words:
        count(word, 1)
    while len(merges) < max(1, vocab_size - 257):      # 256 bytes, the merges, <|endoftext|>
        best = max(pairs, key=lambda pair: (pairs[pair], pair), default=None)
        if best is None or pairs[best] < 2:
            break
        merges.append(best)
        for word in where.pop(best):
            count(word, -1)
            words[word] = merge(words[word], best)
            count(word, 1)
        del pairs[best]
    spelled = [["".join(CHARS[b] for b in token) for token in pair] for pair in merges]
    tokens = [*CHARS.values(), *map("".join, spelled), EOS]
    return Tokenizer({
        "vocab.json": json.dumps({t: i for i, t in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, spelled), ""])})


def merge(parts, pair):
    """Join every neighbouring `pair` in a list of byte strings."""
    out = []
    for p in parts:
        if out and (out[-1], p) == pair:
            out[-1] += p
        else:
            out.append(p)
    return out
