"""Loading and saving at size, beside safetensors + torch: python tests/bench_load.py [gpt2-large|gpt2]

Random weights in Hugging Face's form; both loaders in alternation, from a warm page cache, into
float32 tensors that own their memory. Run by hand: it wants 3.1 GB of disk and twice that of memory.
"""
import resource
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import GPT, GPTConfig, load_model, save_model  # noqa: E402

SHAPES = {"gpt2": GPTConfig(), "gpt2-large": GPTConfig(n_layer=36, n_head=20, n_embd=1280, n_inner=5120)}


def theirs(folder):
    """safetensors + torch: the file's tensors, copied into a model built once."""
    with torch.device("meta"):
        model = GPT(cfg)
    state = load_file(folder / "model.safetensors")
    fresh = {k: torch.empty_like(v).copy_(v) for k, v in state.items()}
    return model, fresh


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
    pairs = [(timed(load_model, folder), timed(theirs, folder)) for _ in range(5)]
    ours, other = (sorted(x)[2] for x in zip(*pairs))
    print(f"median of 5 in alternation: ours {ours:.2f} s, safetensors + torch {other:.2f} s, "
          f"ratio {ours / other:.2f}")
    print(f"peak memory of the whole script {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
