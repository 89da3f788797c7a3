"""python -m pytest tests/test_data.py"""
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import GOLDEN, SHARED, CharTokenizer, golden, real_data

from data import (BRANCHES, Item, class_ids, collate, cost, encode_rows, epoch_batches, kind_of,
                  load_dataset, question_of)
from losses import BELIEF, CLOSE, RESPONSE, score
from model import Tokenizer, load_model, train_bpe
from train import to_tensors

CLASSES, CLASS_IDS = [str(k) for k in range(6)], range(15, 21)
ROW = {"prompt": "Is it fair?", "options": ["Yes", "No", "DK"], "accept_choice_id": "4",
       "probabilities": [0.1, 0, 0.3, 0, 0.6, 0], "accept_choice": "Yes",
       "accept_response": "Sure.", "reject_choice_id": "2", "reject_choice": "No",
       "reject_response": "Never in my life."}
LONG = ROW | {"prompt": "Or a much longer question?", "accept_response": "Sure it is."}
BPE = train_bpe(["the cat sat on the mat, the cat sat"] * 3 + ["Yes No 4<Yes>"] * 5, 300)


def encode(*rows, max_length=96, tokenizer=CharTokenizer(), **kwargs):
    return encode_rows(rows, tokenizer, {"classes": CLASSES}, max_length, **kwargs)


def test_a_row_becomes_pieces_that_are_laid_down_once_and_each_branch_scores_its_own():
    """A belief that an earlier branch went through is scored there alone."""
    [item] = encode(ROW)
    assert (item.n_options, item.kind, item.question) == (3, "majority", "is it fair")
    assert question_of(ROW | {"prompt": "is it Fair"}) == item.question
    assert question_of(ROW | {"question_id": "7"}) == "7"
    b = collate([item], ("chosen", "own", "given", "flip"), CLASS_IDS)
    assert b["counts"][0].tolist() == [[5, 1, 6], [4, 1, 18], [0, 0, 18], [0, 0, 6]]
    assert np.bincount(b["slot"], minlength=12).tolist() == b["counts"].reshape(-1).tolist()
    (yes, no), (sure, never) = item.beliefs, item.responses
    assert b["ids"].tolist() == item.prompt + yes + sure + no + never + never + sure
    assert b["first"].tolist() == [0] and b["pair"].tolist() == [[np.float32(0.6), np.float32(0.3)]]


@pytest.mark.parametrize("text", ["Not (VOL)", "Same.", 'the "best"', "a > b", "<br>", "No)", None])
@pytest.mark.parametrize("response", ["a > b <i>x</i>", '"Well", y', "> yes", "5 stars", ".", ")>"])
def test_marks_inside_belief_and_response_move_no_border(text, response):
    """The authors search the last `>`; here the pieces are what they are. Reviews have no text."""
    row = ROW | {"accept_choice": text, "accept_response": response}
    [item] = encode(row, tokenizer=BPE)
    b = collate([item], ("chosen", "given"), class_ids(BPE, CLASSES))
    ids, n = b["ids"].tolist(), b["counts"][0, 0].sum()
    assert ids[:len(item.prompt)] == BPE.encode("<Q>Is it fair?<A>")       # as when sampling
    assert b["at"][0] == len(item.prompt) - 1            # the class is read at the prompt's end
    assert b["counts"][0, 0, CLOSE] == (text is not None)
    answer = ids[len(item.prompt):][:b["counts"][0, 0, :RESPONSE].sum()]
    assert BPE.decode(answer) == (f"4<{text}>" if text else "4")       # and "45" never fuses
    assert BPE.decode(b["tokens"][:n, 0][b["slot"][:n] == RESPONSE].tolist()) == response
    assert b["tokens"][n - 1, 0] == BPE.eos


@pytest.mark.parametrize("branches", [("chosen", "given"), ("chosen", "own", "given", "flip")])
def test_paths_make_the_sequences_and_places_lead_back(branches):
    items = encode(ROW, LONG, ROW)
    sequences = [i.prompt + i.beliefs[k] + i.responses[r]
                 for i in items for k, r in (BRANCHES[b] for b in branches)]
    b = collate(items, branches, CLASS_IDS)
    ids, paths, cells = (b[k] for k in ("ids", "paths", "cells"))
    for path, expected in zip(paths, sequences):
        assert ids[path[:len(expected)]].tolist() == expected
        assert (path[len(expected):] == path[len(expected) - 1]).all()
        assert (cells[path] % paths.shape[1] == np.minimum(
            np.arange(len(path)), len(expected) - 1)).all()              # its position
    assert (paths.flat[cells] == np.arange(len(ids))).all()         # each token is in its sequence
    assert len(ids) == sum(cost(i, branches) for i in items) < sum(map(len, sequences))


def labelled(labels):
    return [t for t, y in enumerate(labels) if y != -100]


def collated(ids, labels, branch="chosen"):
    """A golden answer as a batch. Its belief ends at its first `>` (29), or is its first token."""
    first, *_, last = labelled(labels)
    answer = ids[first:last + 1]
    end = answer.index(29) + 1 if 29 in answer else 1
    return collate([Item(0, ids[:first], (answer[:end],) * 2, (answer[end:],) * 2, end > 1, [1.0],
                         0, 0, 2, "other", "", "")], (branch,), [15])


@pytest.mark.parametrize("case", golden("05"), ids=lambda c: c["name"])
def test_the_preference_counts_the_tokens_of_golden_05(case):
    for side, branch in (("chosen", "chosen"), ("rejected", "own")):
        for ids, labels, want in zip(*(case[f"{name}_{what}"] for name, what in (
                (side, "input_ids"), (side, "labels"), (f"recommended_{side}", "labels")))):
            b = collated(ids, labels, branch)
            assert (b["at"][b["slot"] == RESPONSE] + 1).tolist() == labelled(want)


@pytest.mark.parametrize("case", golden("04"), ids=lambda c: c["name"])
def test_the_belief_likelihood_agrees_with_golden_04(case):
    for logits, labels, average, total in zip(*(case[k] for k in (
            "logits", "labels", "belief_logp_avg", "belief_logp_sum_including_gt"))):
        b = to_tensors(collated(labels, labels), "cpu")
        s = score(lambda *packed: torch.tensor(logits), torch.eye(32), b)
        assert (s.logps / s.counts)[0, 0, BELIEF].item() == pytest.approx(average, rel=1e-5)
        assert s.logps[0, 0, :RESPONSE].sum().item() == pytest.approx(total, rel=1e-5)


def save(folder, *rows, **meta):
    folder.mkdir()
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "train.jsonl").write_text("\n".join(["", *lines]))
    (folder / "meta.json").write_text(json.dumps({"classes": CLASSES} | meta))
    return str(folder)


def test_datasets_are_mixed_unless_they_contradict_each_other(tmp_path, capsys):
    a = save(tmp_path / "a", ROW, belief_to_class={"Yes": "4"})
    b = save(tmp_path / "b", LONG | {"group": "B"}, belief_to_class={"No": "2"})
    meta, rows = load_dataset(f"{a},{b}", ("train",))
    assert rows == {"train": [ROW, LONG | {"group": "B"}]}
    assert meta["belief_to_class"] == {"Yes": "4", "No": "2"}
    assert capsys.readouterr().err.endswith("prompts do not name their group: see --form\n")
    with pytest.raises(ValueError, match="needs a group in every row"):
        load_dataset(f"{a},{b}", ("train",), "<G>{group}<Q>{prompt}<A>")
    for key, value in ("off_scale", "0"), ("belief_to_class", {"Yes": "5"}):
        with pytest.raises(ValueError, match=f"{key} (differs: None and '0'|of one contradicts)"):
            load_dataset(f"{a},{save(tmp_path / key, ROW, **{key: value})}", ("train",))


@pytest.mark.parametrize("change, problem", [
    ({"prompt": None}, "line 2: field 'prompt' is missing, empty or of the wrong type: None"),
    ({"prompt": 5}, "field 'prompt' is missing"),
    ({"reject_response": " "}, "field 'reject_response' is missing"),
    ({"accept_choice": False}, "field 'accept_choice' is missing"),
    ({"options": []}, "field 'options' is missing"), ({"context": 5}, "field 'context' is missing"),
    ({"accept_choice_id": "7"}, "accept_choice_id '7' is not one of"),
    ({"reject_choice": None}, "give both belief texts or neither"),
    ({"probabilities": ["1", 0, 0, 0, 0, 0]}, "train.jsonl, line 2"),
    ({"probabilities": [0.6, 0.4]}, "a share for each of"),
    ({"probabilities": [0.5, 0.4, 0, 0, 0, 0]}, "with the sum 1"),
    ({"probabilities": [1.5, -0.5, 0, 0, 0, 0]}, "with the sum 1"),
    ({"probabilities": [float("nan"), 1, 0, 0, 0, 0]}, "with the sum 1"),
    ({"classes": [0, 1]}, "meta.json: 'classes' must list two or more"),
    ({"classes": 5}, "'classes' is missing or of the wrong type: 5"),
    ({"stances": None}, "'stances' is missing or of the wrong type"),
    ({"classes": ["1", "1"]}, "meta.json: 'classes' must list two or more"),
    ({"off_scale": "7"}, "meta.json: .*7.* are not among its classes"),
    ({"stances": {"Yes": 4}}, "meta.json: .4. are not among its classes"),
    ({"form": "{group}"}, "needs {prompt} once"), ({"form": "{prompt}{Group}"}, "{prompt} once"),
    ("5", "train.jsonl, line 2"), ('{"prompt": ', "train.jsonl, line 2"), ("", "has no rows")])
def test_what_is_wrong_with_a_row_or_meta_json_is_named(tmp_path, change, problem):
    """No field of a row is one of meta.json, so a change can be made to both."""
    change, row = ({}, change) if isinstance(change, str) else (change, ROW | change)
    with pytest.raises(ValueError, match=problem):
        load_dataset(save(tmp_path / "a", row, **change), ("train",))


def test_majority_minority_and_ties():
    assert [kind_of([0.1, 0, 0.3, 0.6], k) for k in (0, 2, 3)] == ["minority", "other", "majority"]
    assert [kind_of([0.4, 0.4, 0.2], k) for k in (0, 1, 2)] == ["other", "other", "minority"]
    assert kind_of([1.0, 0.0], 0) == kind_of([0.5, 0.5], 1) == "other"


def test_a_class_must_be_one_token_also_before_a_belief():
    fused = train_bpe(["<< << << <<"], 258)                # its only merge
    for tokenizer, classes in (CharTokenizer(), ["9", "10"]), (fused, ["<"]):
        with pytest.raises(ValueError, match=f"class '{classes[-1]}' is not a token of its own"):
            class_ids(tokenizer, classes)


def test_rows_too_long_stop_the_run_or_are_left_out_and_counted(capsys):
    long = ROW | {"prompt": "x" * 200}
    with pytest.raises(ValueError, match="data, row 2: its 230 .* raise --max_length, .*drop"):
        encode(ROW, long)
    assert [i.row for i in encode(ROW, long, ROW, overlong="drop")] == [0, 2]
    assert "1 of 3 rows dropped" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no row fits 96 tokens"):
        encode(long, overlong="drop")


@pytest.mark.parametrize("family", ["gpt2", "neox"])
@pytest.mark.parametrize("branches", [("chosen", "given"), ("chosen", "own", "given")])
def test_packing_and_shared_pieces_change_no_number(family, branches):
    """Packed rows, rows packed one by one, and whole right-padded sequences under the plain causal
    mask have the same scores and gradients."""
    items, results = encode(ROW, LONG, ROW), []
    for parts, pad in (([items], False), ([[i] for i in items], False), ([items], True)):
        model = load_model(GOLDEN / f"{family}_tiny")

        def run(ids, paths, cells):
            return model(ids[paths]).flatten(0, 1)[cells] if pad else model(ids, paths, cells)
        found = [score(run, model.head, to_tensors(collate(part, branches, CLASS_IDS), "cpu"))
                 for part in parts]
        logps, classes = (torch.cat([getattr(s, name) for s in found])
                          for name in ("logps", "class_logps"))
        ((logps / 50).square().sum() + classes.sum()).backward()
        results.append([logps, classes, *(p.grad for p in model.parameters())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-4, atol=1e-4)


def test_an_epoch_is_a_pure_function_and_holds_each_row_once():
    lengths = np.random.default_rng(0).integers(5, 90, 203)
    a, b = (epoch_batches(lengths, 8, seed=1, epoch=2) for _ in range(2))
    assert a == b != epoch_batches(lengths, 8, seed=1, epoch=3)
    assert sorted(sum(a, [])) == list(range(203))
    assert sorted(map(len, a)) == [3] + [8] * 25
    assert np.mean([np.ptp(lengths[batch]) for batch in a]) < 10       # rows of like length


@real_data
def test_gpt2_ids_are_gpt2s(tmp_path):
    for openai, hf in (("encoder.json", "vocab.json"), ("vocab.bpe", "merges.txt")):
        shutil.copy(SHARED / "gpt2" / openai, tmp_path / hf)
    gpt2 = Tokenizer.load(tmp_path)
    assert gpt2.encode("hello world") == [31373, 995] and gpt2.eos == 50256
    items = encode(ROW | {
        "prompt": "How do you evaluate the response of the European Union towards global climate "
        "change?", "accept_choice": "Somewhat good",
        "accept_response": "I think they have made some strides."}, tokenizer=gpt2)
    b = collate(items, ("chosen",), class_ids(gpt2, CLASSES))
    assert b["at"][0] == 20 and b["tokens"][:, 0].tolist() == [      # REFERENCE 2: logits 20..35
        19, 27, 50, 28030, 5183, 922, 29, 40, 892, 484, 423, 925, 617, 35002, 13, 50256]
    assert b["counts"][0, 0].tolist() == [6, 1, 9] and (b["tokens"][0, 1:] == CLASS_IDS).all()


def test_compile_makes_one_graph_for_all_batches():
    """Other lengths, other numbers of rows, one row: no batch is compiled anew."""
    model = load_model(GOLDEN / "gpt2_tiny")
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, dynamic=True, backend="aot_eager", fullgraph=True)
        for rows in ([ROW, LONG, ROW], [ROW, ROW], [LONG] * 5, [ROW], [LONG]):
            b = to_tensors(collate(encode(*rows), ("chosen", "given"), CLASS_IDS), "cpu")
            s, plain = score(compiled, model.head, b), score(model, model.head, b)
            torch.testing.assert_close(s.logps, plain.logps, rtol=1e-4, atol=1e-4)
            s.logps.sum().backward()
