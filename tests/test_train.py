"""python -m pytest tests/test_train.py"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import bench
import pytest
import torch
from conftest import GOLDEN, ROOT, SMALL, cli, golden
from test_data import CLASS_IDS, ROW, encode
from test_losses import LOSS_OF, items_of

import train
from data import EVAL_BRANCHES, cost, mismatch
from losses import LOSSES, Loss
from model import GPT, load_model
from train import Config, evaluate, lr_at, optimizer_of, resolve, score_rows, train_step

torch.set_num_threads(1)               # as in the child processes: runs must be equal bit for bit


def lines(out):
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def argv(world, *more):
    return list(map(str, ["--data", world, *SMALL, *more]))


def start(flags, cwd, *launch):
    """The real command in a process of its own."""
    return subprocess.Popen([sys.executable, *launch, str(ROOT / "train.py"), *flags], cwd=cwd,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env={**os.environ, "OMP_NUM_THREADS": "1"})


def refused(call, message, *flags, cwd):
    """The command ends in one line that says so."""
    last = call(train, *flags, cwd=cwd, check=2).stderr.splitlines()[-1]
    assert message in last and last.startswith("train.py: error: ")


def wait_for_lines(out, n, *processes):
    deadline, log = time.time() + 60, out / "metrics.jsonl"
    while not log.exists() or log.read_text().count("\n") < n:
        assert time.time() < deadline and all(p.poll() is None for p in processes)
        time.sleep(0.005)


@pytest.fixture(scope="module")
def sft(world, tmp_path_factory):
    """A folder with a finished SFT run of the tiny world."""
    cwd = tmp_path_factory.mktemp("runs")
    cli("train.py", *argv(world, "--loss", "sft", "--epochs", 8), cwd=cwd)
    return cwd


def run_of(name, items, **options):
    """A run without a folder, from the tiny golden checkpoint; its reference is the golden one."""
    o = Config(loss=name, beta=0.1, device="cpu", optimizer="rmsprop", schedule="constant")
    loss, o = LOSSES[name], resolve(replace(o, **options))
    model, reference = (load_model(GOLDEN / f"gpt2_tiny{x}") for x in ("", "_ref"))
    if loss.mismatch:
        mismatch(items, 96, 0)
    branches = loss.branches + ("mismatch",) * loss.mismatch
    ref = score_rows(reference, items, branches, CLASS_IDS).logps
    return SimpleNamespace(o=o, loss=loss, model=model, policy=model, classes=CLASS_IDS,
                           items={"train": items}, ref={"train": ref},
                           optimizer=optimizer_of(o, model))


def test_an_objective_may_read_any_branch():
    r = run_of("sft", encode(ROW, ROW | {"prompt": "And now?"}))
    r.items = {"eval": r.items["train"]}
    r.branches = {"eval": (*EVAL_BRANCHES, "flip")}
    r.ref = {}
    r.loss = Loss(lambda s, o: (s.logps[:, 1].sum(-1), {}), ("chosen", "flip"))
    s = score_rows(r.model, r.items["eval"], r.branches["eval"], CLASS_IDS)
    assert evaluate(r)["loss"] == pytest.approx(s.logps[:, 3].sum(-1).mean())


def one_step(name, **options):
    """(the run, what train_step returns) after a step on 8 rows of unequal lengths."""
    rows = [ROW | {"prompt": "x" * (n % 4 + 1), "accept_response": "y" * n,
                   "reject_response": "z" * (15 - n)} for n in (3, 9, 1, 14, 5, 2, 7, 11)]
    r = run_of(name, encode(*rows), **{"clip": 1e9, "warmup": 0} | options)
    return r, *train_step(r, list(range(8)))


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_is_the_same_however_it_is_cut(loss):
    """Gradients are those of the mean over rows, all 8 at once or 3 + 3 + 2."""
    (a, sums_a, norm_a), (b, sums_b, norm_b) = (one_step(loss, micro_batch=n) for n in (0, 3))
    assert sums_a == pytest.approx(sums_b, rel=1e-4) and norm_a == pytest.approx(norm_b, rel=1e-4)
    for p, q in zip(a.model.parameters(), b.model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", bench.TASKS)
@pytest.mark.parametrize("loss", ["gdpo", "gdpo-kto"])
def test_a_step_costs_at_most_a_tenth_more_than_the_floor(task, loss):
    """Operations on GPT-2's shape, counted without computing."""
    items = sorted(bench.some_items(task, 48, 50257), key=lambda i: cost(i, ("chosen", "given")))
    with torch.device("meta"):
        step = bench.our_step(GPT(bench.SHAPES["gpt2"]), items[20:28], loss)
    ratio = bench.count([step]) / bench.floor(items[20:28], LOSSES[loss], bench.SHAPES["gpt2"])
    assert 1 <= ratio < 1.1


@pytest.mark.parametrize("case", golden("09"), ids=lambda c: c["name"])
def test_a_few_steps_agree_with_golden_09(case):
    """Appendix G: RMSprop, linear warm-up, clipping, accumulation, on a tiny GPT-2."""
    batch = golden("08_gpt2")["batches"]["gdpo_rows" if case["loss"] == "mpo" else "sft_rows"]
    r = run_of(LOSS_OF.get(case["loss"], case["loss"]), items_of(batch, 4), lr=1e-3, warmup=3,
               clip=1.0, micro_batch=4 // case["accumulation"])
    names = ("losses", "grad_norm_before_clip", "lr", "parameter_l2_after_step")
    for step, (want, norm, lr, l2) in enumerate(zip(*(case[k] for k in names))):
        r.optimizer.param_groups[0]["lr"] = lr_at(r.o, step, 100)
        assert lr_at(r.o, step, 100) == pytest.approx(lr)
        sums, got = train_step(r, [*range(4)])
        assert (sums["loss"] / 4, got) == pytest.approx((want, norm), rel=1e-3)
        whole = sum(p.detach().double().square().sum() for p in r.model.parameters()).sqrt()
        assert whole.item() == pytest.approx(l2, rel=1e-5)


def test_a_step_under_bf16_changes_float32_weights_and_takes_log_probs_in_float32():
    """A step of 5e-7 would vanish in bfloat16 weights; the loss is nearly that of float32."""
    r, a, _ = one_step("gdpo", lr=5e-7, dtype="bfloat16")
    before = load_model(GOLDEN / "gpt2_tiny")
    assert all(p.dtype == torch.float32 for p in r.model.parameters())
    assert not torch.equal(r.model.h[0].attn.c_attn.weight, before.h[0].attn.c_attn.weight)
    _, b, _ = one_step("gdpo")
    assert a["loss"] == pytest.approx(b["loss"], rel=2e-2) and a["loss"] != b["loss"]


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_the_rows():
    r, _, _ = one_step("dpo")
    before = [p.clone() for p in r.model.parameters()]
    r.ref["train"][5, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"lower --lr \(rows \[6\] of train.jsonl\)"):
        train_step(r, list(range(8)))
    assert all(torch.equal(p, q) for p, q in zip(r.model.parameters(), before))


def test_the_learning_rate_falls_after_the_warm_up_by_a_cosine():
    o = Config(lr=1.0, warmup=3, schedule="cosine")
    rates = [lr_at(o, s, 10) for s in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0] and max(rates[4:]) < 1 and rates[-1] < 0.1


def test_a_checkpoint_has_the_papers_defaults_and_a_run_of_the_small_model_its_own(sft, world):
    """Appendix G: beta 0.1, RMSprop, 5e-7, 150 steps of warm-up, then constant. --init tells which
    of the two is meant, and a flag wins over both."""
    o = resolve(Config(loss="gdpo", model="gpt2"))
    assert (o.beta, o.optimizer, o.lr, o.warmup, o.schedule, o.batch_size, o.epochs) == (
        0.1, "rmsprop", 5e-7, 150, "constant", 32, 20)
    o = resolve(Config(loss="sft", model="gpt2"))
    assert (o.batch_size, o.epochs, o.clip) == (128, 40, 10)
    run = sft / f"out/{world.name}-sft-seed0/best"
    assert resolve(Config(loss="gdpo", init=str(run))).beta == 1.0
    o = resolve(Config(loss="gdpo", data="x/a,b/", init="y/checkpoint", lr=1.0))
    assert (o.beta, o.lr, o.out) == (0.1, 1.0, "out/a+b-checkpoint-gdpo-seed0")


@pytest.mark.parametrize("loss, dtype, tolerance", [
    ("dpo", "float32", 1e-5), ("gdpo", "float32", 1e-5), ("gdpo", "bfloat16", 1e-2)])
def test_at_step_0_the_rewards_are_0_and_the_paired_loss_is_log_2(
        sft, world, loss, dtype, tolerance, call):
    flags = argv(world, "--loss", loss, "--epochs", 1, "--dtype", dtype, "--out", loss + dtype)
    call(train, *flags, cwd=sft)
    first = lines(sft / (loss + dtype))[0]["eval"]
    rewards = [v for k, v in first.items() if k.startswith(("joint_", "given_")) and v is not None]
    assert rewards == pytest.approx([0] * len(rewards), abs=tolerance) and len(rewards) > 3
    assert first["pref"] == pytest.approx(0.693147, abs=tolerance)


def test_two_processes_give_the_run_of_one(sft, world, call):
    """The last batch, of 1 row, leaves one process none. KTO's z0 is of the whole batch."""
    flags = argv(world, "--loss", "gdpo-kto", "--epochs", 2, "--batch_size", 13)
    call(train, *flags, "--out", "one", cwd=sft)
    more = ["--shard_optimizer", "--micro_batch", 3, "--out", "two"]
    cli("train.py", *flags, *more, cwd=sft, nproc=2)
    for a, b in zip(lines(sft / "one"), lines(sft / "two"), strict=True):
        assert b.get("eval", b) == pytest.approx(a.get("eval", a), rel=2e-3, abs=2e-3)
    one, two = (torch.load(sft / f"{n}/state.pt")["optimizer"]["state"] for n in ("one", "two"))
    for k in one.keys() | two.keys():
        torch.testing.assert_close(one[k]["square_avg"], two[k]["square_avg"], rtol=5e-2, atol=1e-6)


def test_two_nodes_are_one_run_and_a_dead_process_ends_it(sft, world, call):
    """The other node says so in one line, and one process goes on from the last evaluation."""
    flags = argv(world, "--loss", "gdpo", "--epochs", 40, "--shard_optimizer", "--out", "nodes")
    endpoint = f"localhost:{20000 + os.getpid() % 10000}"
    nodes = [start(flags, sft, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1",
                   "--rdzv_backend=c10d", f"--rdzv_endpoint={endpoint}") for _ in range(2)]
    wait_for_lines(sft / "nodes", 10, *nodes)
    child = f"/proc/{nodes[1].pid}/task/{nodes[1].pid}/children"
    os.kill(int(Path(child).read_text().split()[0]), signal.SIGKILL)
    errors = [p.communicate(timeout=60)[1] for p in nodes]
    assert all(p.returncode for p in nodes)
    assert any("another process of the run is gone" in e for e in errors), errors
    p = call(train, *flags, "--resume", cwd=sft)
    assert re.search(r"resumed at step \d+", p.stderr) and (sft / "nodes/last").is_dir()


def test_a_killed_and_an_interrupted_run_end_like_one_that_was_not(sft, world, call):
    """Bit for bit: weights, losses, data order. kill -9 loses what came after the last evaluation,
    Ctrl-C loses nothing. While a run is at work, no other one may write into its folder."""
    flags = argv(world, "--loss", "gdpo", "--epochs", 30, "--log_every", 3)
    call(train, *flags, "--out", "whole", cwd=sft)
    part = [*flags, "--out", "part"]
    p = start(part, sft)
    wait_for_lines(sft / "part", 1, p)
    refused(call, "another process is using part", *part, "--overwrite", cwd=sft)
    wait_for_lines(sft / "part", 15, p)
    p.kill()
    p.communicate()
    assert p.returncode == -signal.SIGKILL and not (sft / "part/last").exists()
    p = start([*part, "--resume"], sft)
    wait_for_lines(sft / "part", len(lines(sft / "part")) + 10, p)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    stopped = re.search(r"stopped and saved at step (\d+)", err)
    assert p.returncode == 130 and stopped, err
    p = call(train, *part, "--resume", cwd=sft)
    assert f"resumed at step {stopped[1]}" in p.stderr
    assert lines(sft / "part") == lines(sft / "whole")
    for file in ("best/model.safetensors", "last/model.safetensors"):
        assert (sft / "part" / file).read_bytes() == (sft / "whole" / file).read_bytes()
    assert not list((sft / "part").glob("**/*.tmp"))
    p = call(train, *part, "--resume", cwd=sft)                       # nothing left to do: a table
    for text in ("JSD to the group's shares", "margin of the answer given the belief, majority",
                 "the shares of the classes", "next: python evaluate.py part"):
        assert text in p.stdout


def test_a_run_goes_on_only_with_its_own_flags_rows_and_state_and_is_never_lost_unasked(
        world, tmp_path, call, monkeypatch):
    """It starts only from an SFT run with its own flags and rows, which is trained first. What ends
    before its first evaluation begins again."""
    shutil.copytree(world, tmp_path / "d")
    path, out = tmp_path / "d/train.jsonl", tmp_path / "o"
    flags = argv("d", "--epochs", 1, "--out", "o")
    assert "training SFT first" in call(train, *flags, cwd=tmp_path).stderr
    again, new = [*flags, "--resume", "--init", "out/d-sft-seed0/best"], [*flags[:-1], "p"]
    rows, log = path.read_text(), lines(out)
    other = "".join(reversed(rows.splitlines(keepends=True)))
    for text, more, message in (
            (other, again, "the run in o differs from this one: hash_of_rows"),
            (other, new, "the run in out/d-sft-seed0 differs from this one: hash_of_rows"),
            (rows, [*again, "--beta", 0.3], "o differs from this one: beta 1.0 (here: 0.3); use"),
            (rows, [*new, "--form", "{prompt}:"], "form <Q>{prompt}<A> (here: {prompt}:)"),
            (rows, flags, "is in use (best, last, metrics.jsonl, state.pt): --resume"),
            (rows, [*flags[:-1], "o/best"], "best is in use (")):
        path.write_text(text)
        refused(call, message, *more, cwd=tmp_path)
    for name, message in (("state.pt", "damaged or of another version"),
                          ("config.json", "not a JSON object")):
        whole = (out / name).read_bytes()
        (out / name).write_bytes(b"{")
        refused(call, f"o/{name} is {message}", *again, cwd=tmp_path)
        (out / name).write_bytes(whole)
    (out / "metrics.jsonl").write_text("{")                # is made again from the state
    call(train, *again, cwd=tmp_path)
    assert lines(out) == log
    (out / "state.pt").unlink()
    refused(call, "o is in use (best, last, metrics.jsonl)", *again, cwd=tmp_path)
    call(train, *flags, "--overwrite", cwd=tmp_path)
    assert lines(out) == log and (out / "state.pt").is_file()
    with monkeypatch.context() as m:
        m.setattr(train, "evaluate", Mock(side_effect=ValueError("killed")))
        refused(call, "killed", *new, cwd=tmp_path)
    call(train, *new, "--resume", cwd=tmp_path)
    assert lines(tmp_path / "p") == log


def test_two_runs_that_need_an_sft_run_train_it_once_with_their_machine_flags(world, tmp_path):
    flags = argv(world, "--epochs", 1, "--checkpointing", "--micro_batch", 3, "--shard_optimizer")
    both = [start([*flags, "--out", name], tmp_path) for name in "ab"]
    errors = [p.communicate(timeout=100)[1] for p in both]
    assert [p.returncode for p in both] == [0, 0], errors
    folder = tmp_path / f"out/{world.name}-sft-seed0"
    steps = [r["step"] for r in lines(folder) if "lr" in r]
    assert len(steps) == 10 and steps == sorted(set(steps))
    given = {"checkpointing": True, "micro_batch": 3, "shard_optimizer": True}
    assert given.items() <= json.loads((folder / "config.json").read_text()).items()


def test_a_full_disk_is_one_line_and_leaves_the_last_state(sft, world, call, monkeypatch, tmp_path):
    flags = argv(world, "--loss", "sft", "--epochs", 2, "--out", tmp_path / "x")
    save = torch.save

    def full(state, path):
        save(state, path)
        if state["step"]:
            Path(path).write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 64")
    monkeypatch.setattr(torch, "save", full)
    refused(call, "(is the disk full?); --resume continues", *flags, cwd=sft)
    assert not list(tmp_path.rglob("*.tmp"))
    monkeypatch.undo()
    assert call(train, *flags, "--resume", cwd=sft).stdout


def test_a_diverged_run_is_one_line_and_leaves_no_best(sft, world, call, tmp_path):
    flags = argv(world, "--loss", "sft", "--lr", 1e30, "--clip", 1e30, "--warmup", 0)
    refused(call, "lower --lr", *flags, "--out", tmp_path / "x", cwd=sft)
    assert not (tmp_path / "x/best").exists()


@pytest.mark.parametrize("flags, message", [
    (["--loss", "gpdo"], "--loss 'gpdo' is unknown: choose from sft, gdpo, gdpo-cal"),
    (["--beta", "big"], "argument --beta: invalid float value: 'big'"),
    (["--epochs", "nan"], "argument --epochs: nan is not a finite number >= 0"),
    (["--loss", "sft", "--n_layer", "0"], "need sizes > 0"),
    (["--prior", "1"], "--prior must be between 0 and 1"),
    (["--log_every", "0"], "must be more than 0"), (["--out", "/dev/null"], "/dev/null"),
    (["--data", "nowhere"], "no dataset in nowhere (no meta.json): make one with"),
    (["--init", "no/where/"], "no/where"),
    (["--loss", "sft", "--max_length", "12"], "do not fit the context of 12"),
    (["--loss", "sft", "--n_head", "5"], "n_embd divisible by n_head"),
])
def test_bad_input_is_one_line_and_exit_2_and_leaves_nothing(
        world, tmp_path, flags, message, monkeypatch, call):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(call, message, *argv(world), *flags, cwd=tmp_path)
    assert not [*tmp_path.glob("*/*")]
