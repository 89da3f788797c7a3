"""python -m pytest tests/test_bench.py"""
import bench
import pytest
import torch

from data import cost
from losses import LOSSES
from model import GPT


@pytest.mark.parametrize("task", bench.TASKS)
@pytest.mark.parametrize("loss", ["gdpo", "gdpo-kto"])
def test_a_step_costs_at_most_a_tenth_more_than_the_floor(task, loss):
    """Operations on GPT-2's shape, counted without computing."""
    items = sorted(bench.some_items(task, 48, 50257), key=lambda i: cost(i, ("chosen", "given")))
    with torch.device("meta"):
        model = bench.our_step(GPT(bench.SHAPES["gpt2"]), items[20:28], loss)
    ratio = bench.count([model]) / bench.floor(items[20:28], LOSSES[loss], bench.SHAPES["gpt2"])
    assert 1 <= ratio < 1.1
