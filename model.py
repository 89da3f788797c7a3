"""The language model: GPT-2 and Pythia (GPT-NeoX) by hand, in one class.

First in reading order: model.py -> data.py -> losses.py -> train.py -> evaluate.py -> synth.py.
The two families differ in the fields of GPTConfig below and in nothing else. Module names mirror
Hugging Face's GPT-2, so that loading a checkpoint is one visible table of renames.

Left out on purpose: dropout (policy and reference must agree, so it is off in every run), biases
as an option, any attention kernel of our own (torch's scaled_dot_product_attention is called).

Letters in all files: B rows (pairs), N sequences, T tokens, V vocabulary, K belief classes,
C channels, H heads, D head size, S branches of a row, M scored tokens, R packed sequences.
"""
import hashlib
import json
import math
import mmap
import os
import struct
import zipfile
from dataclasses import dataclass
from functools import partial
from operator import index
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import read_json, shards_of, write


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


def rotate(x, cos, sin):
    """Rotary positions on the first 2 * cos.shape[-1] channels of each head, in two halves.
    x (B, T, H, D); cos, sin (B or 1, T, 1, D_rot / 2)."""
    half = cos.shape[-1]
    a, b, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1).type_as(x)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.n_head = cfg.n_head
        self.c_attn = nn.Linear(cfg.n_embd, 3 * cfg.n_embd)
        self.c_proj = nn.Linear(cfg.n_embd, cfg.n_embd)

    def forward(self, x, rope, paths, places, mask, cache, pos):
        """x (B, T, C), or packed (N, C): then q, k, v are gathered into a right-padded table of the
        R sequences, plain causal attention runs there, and each token takes its output back."""
        x = self.c_attn(x)
        if paths is not None:
            x = F.embedding(paths, x)                                          # (R, T, 3C)
        q, k, v = x.unflatten(-1, (3, self.n_head, -1)).unbind(2)              # (B, T, H, D) each
        if rope is not None:
            q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:                           # (2, B, T_max, H, D), filled at `pos`
            rows = torch.arange(len(x), device=x.device)[:, None]
            cache[0][rows, pos], cache[1][rows, pos] = k.type_as(cache), v.type_as(cache)
            k, v = cache[:, :, :mask.shape[-1]] if mask is not None else (k, v)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                       # (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        y = y.transpose(1, 2).flatten(2)                                       # (B, T, C)
        if places is not None:
            y = F.embedding(places, y.flatten(0, 1))                           # (N, C)
        return self.c_proj(y)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.c_fc = nn.Linear(cfg.n_embd, cfg.n_inner)
        self.c_proj = nn.Linear(cfg.n_inner, cfg.n_embd)
        self.approximate = "tanh" if cfg.tanh_gelu else "none"

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate=self.approximate))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.ln_1 = nn.LayerNorm(cfg.n_embd, cfg.eps)
        self.attn = Attention(cfg)
        self.ln_2 = nn.LayerNorm(cfg.n_embd, cfg.eps)
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
        check_config(cfg, neox=bool(cfg.rotary))
        self.cfg, self.checkpointing = cfg, False
        self.wte = nn.Embedding(cfg.vocab_size, cfg.n_embd)
        if not cfg.rotary:
            self.wpe = nn.Embedding(cfg.n_ctx, cfg.n_embd)
        self.h = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        self.ln_f = nn.LayerNorm(cfg.n_embd, cfg.eps)
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
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif "ln_" in name:
                nn.init.ones_(p)
            else:
                depth = math.sqrt(2 * self.cfg.n_layer) if name.endswith("c_proj.weight") else 1
                nn.init.normal_(p, 0.0, 0.02 / depth, generator=g)
        return self

    def rope(self, pos):
        """cos and sin of the rotary angles at pos (B or 1, T); None with learned positions."""
        if not self.cfg.rotary:
            return None
        n = int(self.cfg.rotary * (self.cfg.n_embd // self.cfg.n_head))
        freq = self.cfg.rotary_base ** (-torch.arange(0, n, 2, device=pos.device).float() / n)
        angle = pos[..., None, None].float() * freq                            # (B, T, 1, n / 2)
        return angle.cos(), angle.sin()

    def forward(self, ids, paths=None, places=None, pos=None, mask=None, cache=None):
        """ids (B, T), or packed (N,) -> hidden states (B, T, C) or (N, C) after the last LayerNorm.
        Logits apart: they cost as much as the layers, so only the positions that a loss reads are
        multiplied by `head`.

        paths (R, T), places (N,)  which packed tokens make R sequences: see data.pack; a token's
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
            where = (rope, paths, places, mask, None if cache is None else cache[i], pos)
            if self.checkpointing and torch.is_grad_enabled():  # keep x alone, run the block again
                x = checkpoint(block, x, *where, use_reentrant=False)
            else:
                x = block(x, *where)
        return self.ln_f(x)

    @torch.no_grad()
    def generate(self, prompts, max_new_tokens, temperature=1.0, stop_id=None, seed=0,
                 n_tokens=None):
        """Sample a continuation of each prompt; returns the new ids alone, the stop id included.

        prompts: list of lists of ids, of any lengths. temperature 0: the likeliest token.
        seed: a number, or one number (or tuple of numbers) per prompt: a row's randomness depends
        on its own seed alone, never on its batch. A row ends at stop_id, after max_new_tokens, or
        when the context is full. n_tokens: ids from here on pad the table and are never sampled
        (a tokenizer's n_tokens; Pythia's table is larger). ValueError for an empty prompt or one
        that fills the context.
        """
        if not prompts:
            return []
        lengths = [len(p) for p in prompts]
        if min(lengths) == 0 or max(lengths) >= self.cfg.n_ctx:
            raise ValueError(f"prompts must have 1 to {self.cfg.n_ctx - 1} tokens (the context "
                             f"less one), got {min(lengths)} to {max(lengths)}: shorten the prompt")
        seeds = seed if isinstance(seed, list) else [(seed, i) for i in range(len(prompts))]
        steps = min(max_new_tokens, self.cfg.n_ctx - min(lengths))
        draws = np.stack([np.random.default_rng(s).random(steps) for s in seeds])  # (B, steps)
        device, n = self.wte.weight.device, torch.tensor(lengths)
        draws, n = torch.from_numpy(draws).to(device), n.to(device)

        hidden, cache = self.prefill(prompts, steps)
        rows, alive = torch.arange(len(prompts), device=device), n > 0
        new = torch.full((len(prompts), steps), -1, device=device)
        for t in range(steps):
            token = pick(F.linear(hidden, self.head[:n_tokens]).float(), temperature, draws[:, t])
            new[rows, t] = torch.where(alive, token, -1)
            alive = alive & (n + t + 1 < self.cfg.n_ctx)
            if stop_id is not None:
                alive = alive & (token != stop_id)
            left = int(alive.sum())
            if t + 1 == steps or left == 0:
                break
            if left <= len(rows) // 2:                 # finished rows leave the batch
                rows, n, token, draws = (x[alive] for x in (rows, n, token, draws))
                cache, alive = [c[:, alive] for c in cache], alive[alive]
            pos = (n + t).clamp(max=self.cfg.n_ctx - 1)[:, None]               # (B, 1)
            slots = torch.arange(min(max(lengths) + t + 1, self.cfg.n_ctx), device=device)
            mask = (slots <= pos)[:, None, None]                               # (B, 1, 1, T_keys)
            hidden = self(token[:, None], pos=pos, mask=mask, cache=cache)[:, 0]
        return [[i for i in row if i >= 0] for row in new.tolist()]

    def prefill(self, prompts, steps):
        """(hidden state (B, C) at each prompt's end, cache with room for `steps` more tokens).
        Equal prompts, several samples of a row say, are computed once. Right-padded: a pad's keys
        lie at positions the row has not reached, so that the mask `slot <= position` hides them
        until the row's own tokens overwrite them."""
        device, T = self.wte.weight.device, max(map(len, prompts))
        unique = {p: i for i, p in enumerate(dict.fromkeys(map(tuple, prompts)))}
        which = torch.tensor([unique[tuple(p)] for p in prompts], device=device)
        ids = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in unique], batch_first=True)
        first = self.new_cache(len(unique), T)
        ends = torch.tensor([len(p) - 1 for p in unique], device=device)
        hidden = self(ids.to(device), cache=first)[torch.arange(len(unique), device=device), ends]
        cache = self.new_cache(len(prompts), min(T + steps, self.cfg.n_ctx))
        for layer, keys_and_values in zip(cache, first):
            layer[:, :, :T] = keys_and_values[:, which]
        return hidden[which], cache

    def new_cache(self, B, T):
        """Room for the keys and values of B rows of T tokens, in the dtype of the computation."""
        kind, cfg = self.wte.weight.device.type, self.cfg
        dtype = self.wte.weight.dtype
        if torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        shape = (2, B, T, cfg.n_head, cfg.n_embd // cfg.n_head)
        return [torch.zeros(shape, dtype=dtype, device=self.wte.weight.device) for _ in self.h]


def pick(logits, temperature, draw):
    """One token per row: logits (B, V), draw (B,) uniform in [0, 1) -> ids (B,). Sampling inverts
    the cumulative distribution, so that one number decides a token on any device."""
    if temperature == 0:
        return logits.argmax(-1)
    total = (logits / temperature).softmax(-1).cumsum(-1, dtype=torch.double)  # (B, V)
    return torch.searchsorted(total, draw[:, None] * total[:, -1:], right=True)[:, 0]


# ---------------------------------------------------------------------------------------------
# Checkpoints: folders in Hugging Face's form (config.json, model.safetensors)

NEOX = [  # our name -> GPT-NeoX's, replaced from left to right
    ("wte.", "gpt_neox.embed_in."), ("h.", "gpt_neox.layers."), ("ln_1.", "input_layernorm."),
    ("attn.c_attn.", "attention.query_key_value."), ("attn.c_proj.", "attention.dense."),
    ("ln_2.", "post_attention_layernorm."), ("mlp.c_fc.", "mlp.dense_h_to_4h."),
    ("mlp.c_proj.", "mlp.dense_4h_to_h."), ("ln_f.", "gpt_neox.final_layer_norm."),
    ("lm_head.", "embed_out.")]
BUFFERS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
           ".rotary_emb.inv_freq")  # causal masks and frequencies that old checkpoints carry
TIED = ("lm_head.weight", "embed_out.weight")          # a copy of the embeddings, where tied


def config_from_hf(c):
    """Hugging Face's config.json (a dict; old and new key styles) -> GPTConfig. ValueError for a
    setting that would change the logits and is not implemented."""
    kind = c.get("model_type")
    rope = c.get("rope_parameters") or c.get("rope_scaling") or {}
    plain = {"activation_function": "gelu_new", "hidden_act": "gelu", "scale_attn_weights": True,
             "scale_attn_by_inverse_layer_idx": False, "attention_bias": True}
    odd = {k: c[k] for k, v in plain.items() if c.get(k, v) != v}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        odd["rope"] = rope
    if odd:
        raise ValueError(f"{odd} is not implemented here")
    if kind == "gpt2":
        return GPTConfig(c["vocab_size"], c["n_positions"], c["n_layer"], c["n_head"], c["n_embd"],
                         c.get("n_inner") or 4 * c["n_embd"], c.get("layer_norm_epsilon", 1e-5),
                         tied=c.get("tie_word_embeddings", True))
    if kind == "gpt_neox":
        return GPTConfig(
            c["vocab_size"], c["max_position_embeddings"], c["num_hidden_layers"],
            c["num_attention_heads"], c["hidden_size"], c["intermediate_size"],
            c.get("layer_norm_eps", 1e-5),
            rotary=rope.get("partial_rotary_factor", c.get("rotary_pct", 0.25)),
            rotary_base=rope.get("rope_theta", c.get("rotary_emb_base", 10000)),
            parallel=c.get("use_parallel_residual", True), tanh_gelu=False,
            tied=c.get("tie_word_embeddings", False))
    raise ValueError(f"model_type {kind!r} is not supported: use a gpt2 or gpt_neox checkpoint")


def check_config(cfg, neox):
    """ValueError for sizes that no model can have."""
    sizes = ("vocab_size", "n_ctx", "n_layer", "n_head", "n_embd", "n_inner")
    for name in sizes:
        if type(getattr(cfg, name)) is not int or not 0 < getattr(cfg, name) <= 1 << 20:
            raise ValueError(f"{name} cannot be {getattr(cfg, name)!r}")
    if cfg.n_embd % cfg.n_head:
        raise ValueError(f"n_embd {cfg.n_embd} does not divide into {cfg.n_head} heads")
    if type(cfg.eps) is not float or not 0 < cfg.rotary <= 1 and neox:
        raise ValueError(f"eps {cfg.eps!r} or rotary share {cfg.rotary!r} cannot be")
    return cfg


def config_to_hf(cfg, eos, dtype):
    """The config.json that Hugging Face's classes read. eos: id of the end-of-text token."""
    ids = {"bos_token_id": eos, "eos_token_id": eos, "vocab_size": cfg.vocab_size,
           "tie_word_embeddings": cfg.tied, "dtype": str(dtype).removeprefix("torch.")}
    if not cfg.rotary:
        return {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], **ids,
                "n_positions": cfg.n_ctx, "n_ctx": cfg.n_ctx, "n_layer": cfg.n_layer,
                "n_head": cfg.n_head, "n_embd": cfg.n_embd, "n_inner": cfg.n_inner,
                "layer_norm_epsilon": cfg.eps, "activation_function": "gelu_new"}
    return {"model_type": "gpt_neox", "architectures": ["GPTNeoXForCausalLM"], **ids,
            "max_position_embeddings": cfg.n_ctx, "num_hidden_layers": cfg.n_layer,
            "num_attention_heads": cfg.n_head, "hidden_size": cfg.n_embd,
            "intermediate_size": cfg.n_inner, "layer_norm_eps": cfg.eps, "hidden_act": "gelu",
            "rotary_pct": cfg.rotary, "rotary_emb_base": cfg.rotary_base,
            "use_parallel_residual": cfg.parallel}


def hf_name(name, cfg):
    """Our parameter's name -> Hugging Face's."""
    if not cfg.rotary:
        return name if name.startswith("lm_head.") else "transformer." + name
    for ours, theirs in NEOX:
        if ours in name and (ours != "h." or name.startswith("h.")):
            name = name.replace(ours, theirs, 1)
    return name


def relayout(name, w, cfg, to_hf):
    """The two layouts on disk that differ from ours: GPT-2 stores its linear weights (in, out);
    Pythia stores query, key and value by head, (H, 3, D, ...), where ours are (3, H, D, ...)."""
    if not cfg.rotary:
        linear = name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
        return w.t() if linear else w
    if ".c_attn." not in name:
        return w
    a, b = (3, cfg.n_head) if to_hf else (cfg.n_head, 3)
    return w.unflatten(0, (a, b, -1)).transpose(0, 1).flatten(0, 2)


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
          "U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """A .safetensors file -> {name: function that maps the tensor}. Nothing is read before the
    call, and what a call mapped is gone from memory with its tensor.
    Layout: 8 bytes header length, JSON header {name: {dtype, shape, data_offsets}}, raw bytes,
    which the tensors must tile without gap or overlap. ValueError for a header that lies."""
    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    size = os.path.getsize(path)
    with open(path, "rb") as f:
        length = struct.unpack("<Q", f.read(8).ljust(8, b"\xff"))[0]
        if 8 + length > size:
            raise ValueError(f"{path}: not a safetensors file, or cut short: fetch it again")
        try:
            header = json.loads(f.read(length), object_pairs_hook=unique)
            header.pop("__metadata__", None)
            spans = sorted((*map(index, t["data_offsets"]), name) for name, t in header.items())
            spans = [(start, end, name) for start, end, name in spans]
            tensors = {n: (DTYPES[t["dtype"]], tuple(map(index, t["shape"])))
                       for n, t in header.items()}
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as e:
            raise ValueError(f"{path}: the header is broken, or has a dtype that is unknown here: "
                             f"{e!r}") from None
    at = 0
    for start, end, name in spans:
        dtype, shape = tensors[name]
        if (start != at or end - start != math.prod(shape) * dtype.itemsize
                or min(shape, default=0) < 0):
            raise ValueError(f"{path}: tensor {name} has a bad dtype, shape or offset: "
                             f"{header[name]}")
        at = end
    if at != size - 8 - length:
        raise ValueError(f"{path}: holds {size - 8 - length} bytes of tensors, its header speaks "
                         f"of {at}")
    return {name: partial(map_tensor, path, *tensors[name], 8 + length + start)
            for start, _, name in spans}


def map_tensor(path, dtype, shape, start):
    """The tensor at byte `start` of a file, as a view of the mapped file."""
    count, page = math.prod(shape), start - start % mmap.ALLOCATIONGRANULARITY
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    with open(path, "rb") as f:
        data = mmap.mmap(f.fileno(), start - page + count * dtype.itemsize, offset=page,
                         access=mmap.ACCESS_COPY)
    return torch.frombuffer(data, dtype=dtype, count=count, offset=start - page).view(shape)


def read_bin(path):
    """pytorch_model.bin, zipped or in the older format -> {name: function}. Weights only: a pickle
    that wants to run code is refused."""
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True,
                            mmap=zipfile.is_zipfile(path))
    except Exception as e:                             # of many kinds, by how the file is broken
        raise ValueError(f"{path}: not a file of weights alone ({type(e).__name__})") from None
    return {name: partial(stored.pop, name) for name in list(stored)}


def read_weights(folder):
    """The weights of a checkpoint folder, in one file or in shards -> {name: function}."""
    for name, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_bin)):
        if (folder / name).is_file():
            return read(folder / name)
        listing = folder / f"{name}.index.json"
        if listing.is_file():
            where, stored = shards_of(listing), {}
            for shard in sorted(set(where.values())):
                if not (folder / shard).is_file():
                    raise ValueError(f"{listing}: shard {shard!r} is not a file of this folder")
                stored |= {k: v for k, v in read(folder / shard).items() if where.get(k) == shard}
            if len(stored) < len(where):
                missing = sorted(set(where) - set(stored))[:3]
                raise ValueError(f"{listing}: no shard holds {missing}")
            return stored
    raise FileNotFoundError(f"no model.safetensors or pytorch_model.bin in {folder}: give a "
                            "checkpoint folder, such as OUT/best of an earlier run")


def write_safetensors(path, shapes, dtype, tensor):
    """Write a .safetensors file under a temporary name, then rename it. shapes: {name: shape};
    tensor(name) is asked for one tensor at a time."""
    kind, header, at = (
        {v: k for k, v in DTYPES.items()}[dtype], {"__metadata__": {"format": "pt"}}, 0)
    for name, shape in shapes.items():
        end = at + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                    # tensors start at a multiple of 8
    temporary = f"{path}.tmp"
    with open(temporary, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in shapes:
            w = tensor(name).detach().to("cpu", dtype).contiguous()
            f.write(w.flatten().view(torch.uint8).numpy())
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def read_config(folder):
    """The GPTConfig of a checkpoint folder."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"no config.json in {folder}: give a checkpoint folder, such as "
                                "OUT/best of an earlier run")
    try:
        hf = read_json(path)
        return check_config(config_from_hf(hf), neox=hf["model_type"] == "gpt_neox")
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path}: a key is missing or of the wrong type: {e}") from None
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None


def load_model(folder, device="cpu"):
    """A checkpoint folder -> GPT with float32 weights. The model is built without memory, and each
    of its tensors is made once, from the file. Every stored tensor is used once; ValueError names
    one that is missing, left over or of another shape."""
    folder, cfg = Path(folder), read_config(folder)
    with torch.device("meta"):
        model = GPT(cfg)
    found = read_weights(folder)
    stored = {k.removeprefix("transformer."): v for k, v in found.items()}
    if len(stored) < len(found):
        raise ValueError(f"{folder}: tensors stand twice, with and without `transformer.`")
    state = {}
    for name, p in model.named_parameters():
        theirs = hf_name(name, cfg).removeprefix("transformer.")
        if theirs not in stored and theirs == "embed_out.weight":
            theirs = "lm_head.weight"                  # as transformers 5 writes it
        if theirs not in stored:
            raise ValueError(f"{folder}: the checkpoint has no tensor {theirs}")
        w = stored.pop(theirs)()
        shape = relayout(name, p, cfg, to_hf=True).shape
        if not isinstance(w, torch.Tensor) or w.shape != shape or not w.is_floating_point():
            raise ValueError(f"{folder}: {theirs} is {getattr(w, 'dtype', type(w))} of shape "
                             f"{tuple(getattr(w, 'shape', ()))}, "
                             f"not numbers of shape {tuple(shape)}")
        w = relayout(name, w, cfg, to_hf=False)
        # one copy, in the order of the file: a transposed GPT-2 matrix stays a transposed view
        state[name] = torch.empty_like(w, dtype=torch.float32, device=device).copy_(w)
    for name in TIED if cfg.tied else ():
        own = stored.pop(name)().float() if name in stored else None
        if own is not None and not torch.equal(own, state["wte.weight"].cpu()):
            raise ValueError(f"{folder}: config.json ties the head to the embeddings, but {name} "
                             "differs from them: set tie_word_embeddings to false")
    extra = [k for k in stored if not k.endswith(BUFFERS)]
    if extra:
        raise ValueError(f"{folder}: tensors that no part of the model takes: {extra[:3]}")
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(True)


def fingerprint(model):
    """A short text that tells one set of weights from another: the hash of some of each tensor."""
    digest = hashlib.sha256()
    for p in model.parameters():
        digest.update(p.detach().flatten()[:256].cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_model(model, folder, eos, dtype=torch.float32):
    """Write config.json and model.safetensors in Hugging Face's form into `folder`. The weights
    are replaced in one rename; config.json is written first and is the same for a whole run."""
    folder, cfg = Path(folder), model.cfg
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "config.json", json.dumps(config_to_hf(cfg, eos, dtype), indent=2) + "\n")
    ours = {hf_name(n, cfg): (n, p) for n, p in model.named_parameters()}
    shapes = {k: relayout(n, p.to("meta"), cfg, to_hf=True).shape for k, (n, p) in ours.items()}
    write_safetensors(folder / "model.safetensors", shapes, dtype,
                      lambda k: relayout(*ours[k], cfg, to_hf=True))


# ---------------------------------------------------------------------------------------------
# A sentence encoder, for the response similarity of evaluate.py: MiniLM, which is a small BERT

class BertLayer(nn.Module):
    """Self-attention over the whole sentence and an MLP, each with its LayerNorm behind it."""
    def __init__(self, c):
        super().__init__()
        C, inner, eps = c["hidden_size"], c["intermediate_size"], c["layer_norm_eps"]
        self.n_head = c["num_attention_heads"]
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.up, self.down = nn.Linear(C, inner), nn.Linear(inner, C)
        self.norm1, self.norm2 = nn.LayerNorm(C, eps), nn.LayerNorm(C, eps)

    def forward(self, x, mask):                        # x (B, T, C), mask (B, 1, 1, T)
        q, k, v = (f(x).unflatten(-1, (self.n_head, -1)).transpose(1, 2)
                   for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(y))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class SentenceEncoder(nn.Module):
    """all-MiniLM-L6-v2: token ids (B, T) and how many count (B,) -> unit vectors (B, C), the mean
    of the last layer over a sentence's tokens."""
    RENAMES = {"attention.self.": "", "attention.output.dense": "out", "output.dense": "down",
               "attention.output.LayerNorm": "norm1", "output.LayerNorm": "norm2",
               "intermediate.dense": "up", "encoder.layer.": "layers.",
               "embeddings.word_embeddings": "words", "embeddings.LayerNorm": "norm",
               "embeddings.position_embeddings": "positions",
               "embeddings.token_type_embeddings": "types"}

    def __init__(self, c):
        super().__init__()
        C = c["hidden_size"]
        self.words = nn.Embedding(c["vocab_size"], C)
        self.positions = nn.Embedding(c["max_position_embeddings"], C)
        self.types = nn.Embedding(c["type_vocab_size"], C)
        self.norm = nn.LayerNorm(C, c["layer_norm_eps"])
        self.layers = nn.ModuleList(BertLayer(c) for _ in range(c["num_hidden_layers"]))

    def forward(self, ids, lengths):
        at = torch.arange(ids.shape[1], device=ids.device)
        real = at < lengths[:, None]                   # (B, T)
        x = self.norm(self.words(ids) + self.positions(at) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, real[:, None, None])
        mean = (x * real[..., None]).sum(1) / lengths[:, None]
        return F.normalize(mean, dim=-1)

    @classmethod
    def load(cls, folder, device="cpu"):
        """From a folder in Hugging Face's form. ValueError for another kind of model."""
        c = read_json(Path(folder) / "config.json")
        if c.get("model_type") != "bert" or c.get("hidden_act") != "gelu":
            raise ValueError(f"{folder} is no BERT with exact GELUs: all-MiniLM-L6-v2 is one")
        model, state = cls(c), {}
        for name, tensor in read_weights(Path(folder)).items():
            name = name.removeprefix("bert.")
            if not name.startswith(("pooler.", "embeddings.position_ids")):
                for theirs, ours in cls.RENAMES.items():
                    name = name.replace(theirs, ours)
                state[name] = tensor().float()
        try:
            model.load_state_dict(state)
        except RuntimeError as e:
            raise ValueError(f"{folder}: {str(e).splitlines()[-1].strip()}") from None
        return model.to(device).eval()
