"""The language model: GPT-2, Pythia (GPT-NeoX) and the Llama family by hand, in one class.

First in reading order: model.py -> data.py -> losses.py -> train.py -> evaluate.py -> synth.py.
The families differ in the fields of GPTConfig and in nothing else. Module names mirror Hugging
Face's GPT-2, so that loading a checkpoint is one visible table of names.

Left out on purpose: dropout (policy and reference must agree, so it is off in every run) and any
attention kernel of our own (torch's scaled_dot_product_attention is called).

Letters in all files: B rows (pairs), N sequences, T tokens, V vocabulary, K belief classes,
C channels, H heads, D head size, S branches of a row, M scored tokens, R packed sequences.
"""
import hashlib
import json
import math
import mmap
import os
import re
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
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
    parallel: bool = False     # attention and MLP read the same x (Pythia), not one after the other
    tanh_gelu: bool = True     # GPT-2 has the tanh form; Pythia the exact one
    tied: bool = True          # the head is the embedding table; Pythia has its own
    n_kv: int = None           # key and value heads that the heads share (Llama); None: no sharing
    rms_norm: bool = False     # RMSNorm (Llama) instead of LayerNorm
    gated: bool = False        # the MLP is SiLU(gate) * up (Llama) instead of a GELU
    qkv_bias: bool = True      # Qwen2 has no biases but these; Llama has none at all
    out_bias: bool = True      # of attention's output
    mlp_bias: bool = True
    rope_scaling: tuple = ()   # Llama 3: factor, low and high frequency factor, original n_ctx

    def __post_init__(self):
        sizes = (self.vocab_size, self.n_ctx, self.n_layer, self.n_head, self.n_embd, self.n_inner)
        if min(sizes) < 1 or self.n_embd % self.n_head or self.n_head % (self.n_kv or self.n_head):
            raise ValueError(f"sizes must be positive, n_embd must divide into n_head: {self}")


def rotate(x, cos, sin):
    """Rotary positions on the first 2 * cos.shape[-1] channels of each head, in two halves.
    x (B, T, H, D); cos, sin (B or 1, T, 1, D_rot / 2)."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        n_kv, D = cfg.n_kv or cfg.n_head, cfg.n_embd // cfg.n_head
        self.heads = [cfg.n_head, n_kv, n_kv]          # of queries, keys, values; D channels each
        self.c_attn = nn.Linear(cfg.n_embd, sum(self.heads) * D, bias=cfg.qkv_bias)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd, bias=cfg.out_bias)

    def forward(self, x, rope, mask=None, cache=None, pos=None, paths=None, places=None):
        """x (B, T, C) -> (B, T, C); packed x (N, C) -> (N, C). See GPT.forward for the others."""
        qkv = self.c_attn(x)                           # (B, T, 3C), less where keys are shared
        if paths is None:
            return self.c_proj(self.attend(qkv, rope, mask, cache, pos))
        # Packed: beginnings that sequences share were computed once. Gather the R sequences into a
        # right-padded table, attend there, and give each packed token its output back.
        table = F.embedding(paths, qkv)                                        # (R, T, 3C)
        y = self.attend(table, rope)                                           # (R, T, C)
        return self.c_proj(F.embedding(places, y.flatten(0, 1)))               # (N, C)

    def attend(self, qkv, rope, mask=None, cache=None, pos=None):
        """Causal attention within each of B sequences: (B, T, 3C) -> (B, T, C)."""
        q, k, v = qkv.unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:                          # (2, B, T_max, H, D), filled at `pos`
            rows = torch.arange(len(q), device=q.device)[:, None]
            cache[0][rows, pos], cache[1][rows, pos] = k.type_as(cache), v.type_as(cache)
            k, v = cache[:, :, :mask.shape[-1]] if mask is not None else (k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))         # (B, T, H, D) -> (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None,
                                           enable_gqa=self.heads[1] < self.heads[0])
        return y.transpose(1, 2).flatten(2)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.gated, self.approximate = cfg.gated, "tanh" if cfg.tanh_gelu else "none"
        self.c_fc = nn.Linear(cfg.n_embd, (1 + cfg.gated) * cfg.n_inner, bias=cfg.mlp_bias)
        self.c_proj = nn.Linear(cfg.n_inner, cfg.n_embd, bias=cfg.mlp_bias)

    def forward(self, x):
        x = self.c_fc(x)
        if self.gated:
            gate, up = x.chunk(2, dim=-1)
            return self.c_proj(F.silu(gate) * up)
        return self.c_proj(F.gelu(x, approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = nn.RMSNorm if cfg.rms_norm else nn.LayerNorm
        self.ln_1 = norm(cfg.n_embd, cfg.eps)
        self.attn = Attention(cfg)
        self.ln_2 = norm(cfg.n_embd, cfg.eps)
        self.mlp = MLP(cfg)
        self.parallel = cfg.parallel

    def forward(self, x, *where):
        a = self.attn(self.ln_1(x), *where)
        if self.parallel:
            return x + a + self.mlp(self.ln_2(x))
        x = x + a
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.cfg, self.checkpointing = cfg, False
        # Given its weights: nn.Embedding's own init imports a second of torch on the meta device
        table = nn.Embedding.from_pretrained
        self.wte = table(torch.empty(cfg.vocab_size, cfg.n_embd), freeze=False)
        if not cfg.rotary:
            self.wpe = table(torch.empty(cfg.n_ctx, cfg.n_embd), freeze=False)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = (nn.RMSNorm if cfg.rms_norm else nn.LayerNorm)(cfg.n_embd, cfg.eps)
        if not cfg.tied:
            self.lm_head = nn.Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    @property
    def head(self):
        """The (V, C) matrix that turns hidden states into logits."""
        return self.wte.weight if self.cfg.tied else self.lm_head.weight

    def init_weights(self, seed):
        """GPT-2's initialisation: normal 0.02, residual projections divided by sqrt(2 L)."""
        g = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if p.dim() == 1:                           # weights of norms, biases
                nn.init.constant_(p, float(name.endswith("weight")))
            else:
                depth = math.sqrt(2 * self.cfg.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, 0.0, 0.02 / depth, generator=g)
        return self

    def rope(self, pos):
        """cos and sin of the rotary angles at pos (B or 1, T); None with learned positions."""
        cfg = self.cfg
        if not cfg.rotary:
            return None
        n = int(cfg.rotary * (cfg.n_embd // cfg.n_head))
        freq = cfg.rotary_base ** (-torch.arange(0, n, 2, device=pos.device).float() / n)
        if cfg.rope_scaling:                           # Llama 3 slows its slow rotations further
            factor, low, high, n_ctx = cfg.rope_scaling
            turns = n_ctx * freq / (2 * math.pi)       # of each frequency in the original context
            fast = ((turns - low) / (high - low)).clamp(0, 1)
            freq = freq * (fast + (1 - fast) / factor)
        angle = pos[..., None, None].float() * freq                            # (B, T, 1, n / 2)
        return angle.cos(), angle.sin()

    def forward(self, ids, paths=None, places=None, pos=None, mask=None, cache=None):
        """ids (B, T), or packed (N,) -> hidden states (B, T, C) or (N, C) after the last norm.
        Logits apart: they cost as much as the layers, so only the positions that a loss reads are
        multiplied by `head`. ValueError for more tokens than the context has.

        paths (R, T), places (N,)  which packed tokens make R sequences: see data.collate; a token's
              position is places % T, its column in that table
        pos   (B, T) positions; default 0..T-1, right for right-padded rows under the causal mask
        mask  boolean, broadcastable to (B, H, T, T_keys), True = may attend; default causal
        cache list of (2, B, T_max, H, D) per layer, filled in place at `pos` (see generate)
        """
        T = ids.shape[-1] if paths is None else paths.shape[-1]
        if T > self.cfg.n_ctx:
            raise ValueError(f"{T} tokens do not fit the model's context of {self.cfg.n_ctx}")
        if pos is None:
            pos = torch.arange(T, device=ids.device)[None]                     # (1, T)
        x = self.wte(ids)                                                      # (B, T, C)
        if not self.cfg.rotary:
            x = x + self.wpe(pos if places is None else places % T)
        rope = self.rope(pos)
        for i, block in enumerate(self.h):
            where = (rope, mask, None if cache is None else cache[i], pos, paths, places)
            if self.checkpointing and torch.is_grad_enabled():  # keep x alone, run the block again
                x = checkpoint(block, x, *where, use_reentrant=False)
            else:
                x = block(x, *where)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop_id=None, seed=0,
                 n_tokens=None):
        """Sample a continuation of each prompt; returns the new ids alone, the stop id included.

        prompts: lists of ids of any lengths; ValueError for an empty one or one that fills the
        context. temperature 0: the likeliest token. seed: a number, or one number (or tuple of
        numbers) per prompt: a row's randomness depends on its own seed alone, never on its batch.
        A row ends at stop_id, after max_new_tokens, or when the context is full. n_tokens: ids
        from here on only pad the embedding table (Pythia's) and are never sampled.
        """
        if not prompts:
            return []
        lengths, n_ctx, device = [len(p) for p in prompts], self.cfg.n_ctx, self.head.device
        if min(lengths) == 0 or max(lengths) >= n_ctx:
            raise ValueError(f"prompts must have 1 to {n_ctx - 1} tokens (the context less one), "
                             f"got {min(lengths)} to {max(lengths)}: shorten the prompt")
        steps = min(max_new_tokens, n_ctx - min(lengths))
        seeds = seed if isinstance(seed, list) else [(seed, i) for i in range(len(prompts))]
        draws = np.stack([np.random.default_rng(s).random(steps) for s in seeds])
        draws, n = torch.tensor(draws, device=device), torch.tensor(lengths, device=device)

        hidden, cache = self.prefill(prompts, steps)                           # hidden (B, C)
        rows, alive = torch.arange(len(n), device=device), n > 0       # rows of `new` still in work
        new = torch.full((len(n), steps), -1, device=device)
        for t in range(steps):
            with torch.autocast(device.type, enabled=False):   # bfloat16 is off by 1/4 nat at -100
                logits = F.linear(hidden.float(), self.head[:n_tokens].float())
            token = pick(logits, temperature, draws[:, t])                     # (B,)
            new[rows, t] = torch.where(alive, token, -1)
            alive = alive & (n + t + 1 < n_ctx)
            if stop_id is not None:
                alive = alive & (token != stop_id)
            left = int(alive.sum())
            if t + 1 == steps or left == 0:
                break
            if left <= len(rows) // 2:                 # finished rows leave the batch
                rows, n, token, draws = (x[alive] for x in (rows, n, token, draws))
                cache, alive = [c[:, alive] for c in cache], alive[alive]
            pos = (n + t).clamp(max=n_ctx - 1)[:, None]                        # (B, 1)
            slots = torch.arange(min(max(lengths) + t + 1, n_ctx), device=device)
            mask = (slots <= pos)[:, None, None]                               # (B, 1, 1, T_keys)
            hidden = self(token[:, None], pos=pos, mask=mask, cache=cache)[:, 0]
        return [[i for i in row if i >= 0] for row in new.tolist()]

    def prefill(self, prompts, steps):
        """(hidden state (B, C) at each prompt's end, cache with room for `steps` more tokens).
        Equal prompts are computed once. Right-padded: a pad's keys lie at positions the row has
        not reached, so that the mask `slot <= position` hides them until the row's own tokens
        overwrite them."""
        w, cfg, T = self.head, self.cfg, max(map(len, prompts))
        unique = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([unique[tuple(p)] for p in prompts], device=w.device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in unique], batch_first=True)
        half = torch.is_autocast_enabled(w.device.type)
        dtype = torch.get_autocast_dtype(w.device.type) if half else w.dtype
        D = cfg.n_embd // cfg.n_head
        shape = (2, len(ids), min(T + steps, cfg.n_ctx), cfg.n_kv or cfg.n_head, D)
        cache = [w.new_zeros(shape, dtype=dtype) for _ in self.h]
        ends = torch.tensor([len(p) - 1 for p in unique], device=w.device)
        hidden = self(ids.to(w.device), cache=cache)[torch.arange(len(ids), device=w.device), ends]
        return hidden[which], [layer[:, which] for layer in cache]


def pick(logits, temperature, draw):
    """One token per row: logits (B, V), draw (B,) uniform in [0, 1) -> ids (B,). Sampling inverts
    the cumulative distribution, so that one number decides a token on any device."""
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.double)  # (B, V)
    return torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True)[:, 0]


# =============================================================================================
# Plumbing: checkpoints: folders in Hugging Face's form (config.json, model.safetensors)

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
out_bias     -                    attention_bias             attention_bias
mlp_bias     -                    -                          mlp_bias
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
"""  # fields of GPTConfig and keys of config.json, then modules; * is q, k, v or gate, up
OURS, *THEIRS = zip(*map(str.split, NAMES.strip().splitlines()))
NAMES = {kind: dict(zip(OURS[1:], names)) for kind, *names in THEIRS}
NAMES["qwen2"] = NAMES["llama"] | {"hf_class": "Qwen2ForCausalLM"}
LLAMA = dict(eps=1e-6, rotary=1.0, tied=False, rms_norm=True, gated=True, out_bias=False,
             mlp_bias=False)
DEFAULTS = {  # of a family, where they are not GPT-2's
    "gpt2": {}, "gpt_neox": dict(rotary=0.25, parallel=True, tanh_gelu=False, tied=False),
    "llama": LLAMA, "qwen2": LLAMA}
KNOWN = {"activation_function": "gelu_new", "scale_attn_weights": True,
         "scale_attn_by_inverse_layer_idx": False, "use_sliding_window": False}
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
GIVE = "give a checkpoint folder, such as OUT/best of an earlier run"
LINEAR = ("c_attn.weight", "c_proj.weight", "c_fc.weight")     # GPT-2 stores these (in, out)
BUFFERS = (".attn.bias", ".masked_bias", ".attention.bias", ".inv_freq")   # of old checkpoints
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def family(cfg):
    """Hugging Face's model_type of a GPTConfig."""
    if not cfg.rms_norm:
        return "gpt_neox" if cfg.rotary else "gpt2"
    return "qwen2" if cfg.qkv_bias and not cfg.out_bias else "llama"


def config_from_hf(c):
    """config.json as transformers 4 or 5 writes it (a dict) -> GPTConfig. ValueError for a setting
    that would change the logits and is not implemented."""
    kind, rope = c.get("model_type"), c.get("rope_parameters") or c.get("rope_scaling") or {}
    if kind not in NAMES:
        raise ValueError(f"model_type {kind!r} is not one of {', '.join(NAMES)}")
    fields = DEFAULTS[kind] | {ours: c[key] for ours, key in NAMES[kind].items()
                               if c.get(key) is not None}
    fields["qkv_bias"] = kind == "qwen2" or fields.get("out_bias", True)
    for ours, key in (("rotary_base", "rope_theta"), ("rotary", "partial_rotary_factor")):
        if key in rope and NAMES[kind][ours] != "-":   # the form of transformers 5
            fields[ours] = rope[key]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type == "llama3":
        fields["rope_scaling"] = tuple(rope[key] for key in LLAMA3)
    known = KNOWN | {"hidden_act": "silu" if "gated" in fields else "gelu",
                     "head_dim": fields["n_embd"] // fields["n_head"],
                     "rope_type": "llama3" if "rope_scaling" in fields else "default"}
    found = {"rope_type": rope_type} | c
    unknown = {k: found[k] for k, v in known.items() if found.get(k) not in (None, v)}
    if unknown:
        raise ValueError(f"{unknown} is not implemented here")
    return GPTConfig(**{"n_inner": 4 * fields["n_embd"]} | fields)


def config_to_hf(cfg, eos, dtype):
    """The config.json that Hugging Face's classes read. eos: id of the end-of-text token."""
    kind = family(cfg)
    config = {"model_type": kind, "architectures": [NAMES[kind]["hf_class"]], "bos_token_id": eos,
              "eos_token_id": eos, "dtype": str(dtype).removeprefix("torch.")}
    config |= {key: getattr(cfg, ours) for ours, key in NAMES[kind].items()
               if hasattr(cfg, ours) and key != "-"}
    if cfg.rope_scaling:
        config["rope_scaling"] = {"rope_type": "llama3", **dict(zip(LLAMA3, cfg.rope_scaling))}
    assert config_from_hf(config) == cfg, (config, cfg)
    return config


def on_disk(name, w, cfg):
    """Our parameter -> {name in the file: (shape there, view of w in that layout)}. A checkpoint
    is read by copying into these views and written by copying out of them."""
    kind, C = family(cfg), cfg.n_embd
    layer, module, leaf = re.fullmatch(r"(h\.\d+\.)?(.+)\.(\w+)", name).groups("")
    theirs = f"{layer.replace('h', NAMES[kind]['h'])}{NAMES[kind][module]}.{leaf}"
    if kind == "gpt2" and name.endswith(LINEAR):
        return {theirs: (w.t().shape, w.t())}
    if kind == "gpt_neox" and module == "attn.c_attn":           # by head: (H, 3, D), not (3, H, D)
        return {theirs: (w.shape, w.unflatten(0, (3, cfg.n_head, -1)).transpose(0, 1))}
    parts = [("", w)]
    if "*" in theirs and module == "attn.c_attn":
        parts = zip("qkv", w.split([C, (len(w) - C) // 2, (len(w) - C) // 2]))
    elif "*" in theirs:
        parts = zip(("gate", "up"), w.chunk(2))
    return {theirs.replace("*", part): (view.shape, view) for part, view in parts}


def read_config(folder):
    """The GPTConfig of a checkpoint folder."""
    path = Path(folder) / "config.json"
    try:
        return config_from_hf(json.loads(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise FileNotFoundError(f"no config.json in {folder}: {GIVE}") from None
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as e:
        raise ValueError(f"{path}: {type(e).__name__}: {e}") from None


def read_safetensors(path):
    """A .safetensors file -> {name: tensor}, views of the mapped file, so that no memory is taken
    and none is read outside of it. Layout: 8 bytes with the length of a JSON header
    {name: {dtype, shape, data_offsets}}, the header, raw bytes."""
    try:
        with open(path, "rb") as f:
            raw = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        start, tensors = 8 + int.from_bytes(raw[:8], "little"), {}
        header = json.loads(raw[8:start])
        header.pop("__metadata__", None)
        for name, t in header.items():
            dtype, (at, end) = DTYPES[t["dtype"]], t["data_offsets"]
            flat = torch.frombuffer(raw, dtype=dtype, offset=start + at,
                                    count=(end - at) // dtype.itemsize)
            tensors[name] = flat.view(t["shape"])
        return tensors
    except (ValueError, TypeError, AttributeError, LookupError, RuntimeError) as e:
        raise ValueError(f"{path}: cut short or not safetensors, fetch it again ({e})") from None


def read_bin(path):
    """pytorch_model.bin, zipped or in the older format -> {name: tensor}. A pickle that wants to
    run code is refused."""
    try:
        stored = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        return {name: w.detach() for name, w in stored.items()}
    except Exception as e:                             # of many kinds, by how the file is broken
        raise ValueError(f"{path}: not a file of weights alone ({type(e).__name__})") from None


def read_weights(folder):
    """The weights of a checkpoint folder, in one file or in shards -> {name: tensor}, mapped."""
    for name, read in [("model%s.safetensors", read_safetensors),
                       ("pytorch_model%s.bin", read_bin)]:
        paths = [*folder.glob(name % "")] or sorted(folder.glob(name % "-*"))
        if paths:
            shards = [read(path) for path in paths]
            stored = {name: w for shard in shards for name, w in shard.items()}
            if len(stored) < sum(map(len, shards)):
                raise ValueError(f"{folder}: a tensor is in two of the files {paths}")
            return stored
    raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin in {folder}: {GIVE}")


def load_model(folder, device="cpu"):
    """A checkpoint folder -> GPT with float32 weights. The model is built without memory, and each
    of its tensors is made once, from the file. Every stored tensor is used once; ValueError names
    one that is missing, left over or of another shape."""
    folder, cfg, state = Path(folder), read_config(folder), {}
    with torch.device("meta"):
        model = GPT(cfg)
    stored = {k: w for k, w in read_weights(folder).items() if not k.endswith(BUFFERS)}
    if "wte.weight" in stored:                         # as GPT-2 was first published
        stored = {k if k == "lm_head.weight" else f"transformer.{k}": w for k, w in stored.items()}
    head = NAMES[family(cfg)]["lm_head"] + ".weight"
    if "lm_head.weight" in stored:                     # as transformers 5 calls every head
        stored[head] = stored.pop("lm_head.weight")
    for name, p in model.named_parameters():
        flip = family(cfg) == "gpt2" and name.endswith(LINEAR)         # the order of the file
        w = torch.empty(p.shape[::-1] if flip else p.shape, device=device)
        state[name] = w = w.t() if flip else w
        for theirs, (shape, view) in on_disk(name, w, cfg).items():
            found = stored.pop(theirs, None)
            if found is None or found.shape != shape or not found.is_floating_point():
                what = "missing" if found is None else f"{found.dtype} of {tuple(found.shape)}"
                raise ValueError(f"{folder}: {theirs} is {what}, not numbers of {tuple(shape)}")
            view.copy_(found.view_as(view))
    copy = stored.pop(head, None) if cfg.tied else None
    if copy is not None and not torch.equal(copy.float(), state["wte.weight"].cpu()):
        raise ValueError(f"{folder}: config.json ties the head to the embeddings, but {head} "
                         "differs from them: set tie_word_embeddings to false")
    if stored:
        raise ValueError(f"{folder}: tensors that no part of the model takes: {[*stored][:3]}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def fingerprint(model):
    """A short text that tells one set of weights from another: the hash of some of each tensor."""
    some = torch.cat([p.detach().flatten()[:256].cpu() for p in model.parameters()])
    return hashlib.sha256(some.numpy().tobytes()).hexdigest()[:16]


@contextmanager
def writing(path):
    """A file to write: renamed from a temporary name once it is complete and on the disk, removed
    if that fails. OSError names the file."""
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"cannot write {path}: {e.strerror or e}") from None
    finally:
        temporary.unlink(missing_ok=True)


def save_model(model, folder, eos, dtype=torch.float32):
    """Write config.json and model.safetensors in Hugging Face's form into `folder`. The weights
    are replaced in one rename; config.json is written first and is the same for a whole run."""
    folder, header, at = Path(folder), {"__metadata__": {"format": "pt"}}, 0
    folder.mkdir(parents=True, exist_ok=True)
    with writing(folder / "config.json") as f:
        f.write(json.dumps(config_to_hf(model.cfg, eos, dtype), indent=2).encode() + b"\n")
    tensors = {theirs: part for name, p in model.named_parameters()
               for theirs, part in on_disk(name, p.detach(), model.cfg).items()}
    kind = next(k for k, v in DTYPES.items() if v == dtype)
    for name, (shape, w) in tensors.items():
        end = at + w.numel() * dtype.itemsize
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                    # tensors start at a multiple of 8
    with writing(folder / "model.safetensors") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for _, w in tensors.values():                  # one at a time in memory
            f.write(w.to("cpu", dtype).contiguous().flatten().view(torch.uint8).numpy())
