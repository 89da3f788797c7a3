"""Loading and saving at size, beside safetensors + torch:
python tests/bench_load.py [gpt2-large|gpt2]

Random weights in Hugging Face's form; both loaders in alternation, from a warm page cache, into
float32 tensors that own their memory. Run by hand: it wants 3.1 GB of disk and twice that of
memory.
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig, hf_name, load_model, relayout, save_model  # noqa: E402

SHAPES = {"gpt2": GPTConfig(),
          "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280, n_inner=5120)}


def theirs(folder):
    """The same with safetensors for a reader: into a model built once, ready to train."""
    with torch.device("meta"):
        model = GPT(cfg)
    state = load_file(folder / "model.safetensors")
    state = {n: relayout(n, state[hf_name(n, cfg)], cfg, to_hf=False)
             for n, _ in model.named_parameters()}
    model.load_state_dict({n: torch.empty_like(w).copy_(w) for n, w in state.items()}, assign=True)
    return model


def timed(load, folder):
    start = time.perf_counter()
    load(folder)
    return time.perf_counter() - start


cfg = SHAPES[sys.argv[1] if len(sys.argv) > 1 else "gpt2-large"]
with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    model = GPT(cfg)
    size = sum(4 * p.numel() for p in model.parameters())
    start = time.perf_counter()
    save_model(model, folder, eos=50256)
    print(f"{size / 1e9:.2f} GB written in {time.perf_counter() - start:.1f} s")
    del model
    pairs = [(timed(load_model, folder), timed(theirs, folder)) for _ in range(9)]
    ours, other = (sorted(x)[4] for x in zip(*pairs))
    print(f"median of 9 in alternation: ours {ours:.2f} s, safetensors + torch {other:.2f} s, "
          f"ratio {ours / other:.2f}")
    print("peak memory of the whole script "
          f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
