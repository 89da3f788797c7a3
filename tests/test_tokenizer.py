"""python -m pytest tests/test_tokenizer.py: the ids are those of Hugging Face's tokenizers."""
import json
import random
import shutil
import unicodedata

import pytest
from conftest import SHARED, real_data

from model import EOS, Tokenizer, train_bpe

WORDS = ["the", "Hello", "  ", " ", "\t", "\n", "   ", " " * 30, "é", "e\u0301", "日本", "🙂",
         "def f(x):", "return", "12345", "3.14", "can't", "'s", "I'LL", "\u00a0", "ﬁ", "<|x|>", ".",
         "...", "!?", "(a > b)>", "\r\n", "\u2028", "½", "٣", "\u3000"]


def strings(n):
    rng = random.Random(0)
    for _ in range(n):
        yield "".join(
            rng.choice(WORDS) + rng.choice(["", " "]) if rng.random() < 0.9
            else chr(rng.choice([rng.randint(32, 0x2ff), rng.randint(0x300, 0xd7ff),
                                 rng.randint(0x1f300, 0x1f6ff)]))
            for _ in range(rng.randint(0, 14)))


BPE = train_bpe([*["the cat sat on the mat, the cat sat"] * 9, *["Yes No 4<Yes>"] * 5,
                 *strings(300)], 500)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": True}
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def steps(*first, use_regex=False):
    last = BYTE_LEVEL | {"use_regex": use_regex}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*first, last]}}


def special(i, text):
    return {"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": text.isspace(), "special": not text.isspace()}


FAMILIES = {
    "gpt2": {},
    "pythia": {"normalizer": {"type": "NFC"}, "added_tokens": [
        special(BPE.eos, EOS), *(special(BPE.n_tokens + n, " " * (24 - n)) for n in range(23))]},
    "llama3": steps(split(LLAMA3)),
    "qwen2": steps(split(LLAMA3.replace("{1,3}", ""))) | {"normalizer": {"type": "NFC"}},
    "smollm2": steps({"type": "Digits", "individual_digits": True}, use_regex=True),
    "deepseek": steps(split(r"\p{N}{1,3}"), split("[一-龥]+"), split(r"\p{L}+| ?[\p{P}\p{S}]+")),
}


def mini(folder, **parts):
    """Our small vocabulary as a tokenizer.json with these parts."""
    vocab = json.loads(BPE.files["vocab.json"])
    t = {"version": "1.0", "truncation": None, "padding": None, "normalizer": None,
         "pre_tokenizer": BYTE_LEVEL, "post_processor": None, "decoder": BYTE_LEVEL,
         "added_tokens": [special(BPE.eos, EOS)],
         "model": {"type": "BPE", "vocab": {t: i for t, i in vocab.items() if t != EOS},
                   "merges": BPE.files["merges.txt"].splitlines()[1:]}} | parts
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "tokenizer.json").write_text(json.dumps(t))
    return folder


def loaded(folder, n):
    """Our tokenizer of a folder, with the ids of Hugging Face's for n strings."""
    tokenizers = pytest.importorskip("tokenizers")
    ours = Tokenizer.load(folder)
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in strings(n):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    return ours


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_cuts_text_as_hugging_face_does(tmp_path, family):
    """And what we save, transformers reads."""
    ours = loaded(mini(tmp_path, **FAMILIES[family]), 3000)
    text = "a   b  é\n" + " " * 40 + "日本🙂 12"
    assert unicodedata.normalize("NFC", ours.decode(ours.encode(text))) == text
    ours.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.files == ours.files and again.eos == ours.eos
    auto = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert auto.eos_token_id == ours.eos
    assert auto(text, add_special_tokens=False)["input_ids"] == ours.encode(text)


@real_data
def test_20000_strings_have_the_ids_of_pythia(tmp_path):
    shutil.copy(SHARED / "gpt_neox/20B_tokenizer.json", tmp_path / "tokenizer.json")
    pythia = loaded(tmp_path, 20000)
    assert (pythia.n_tokens, pythia.eos) == (50277, 0)


@pytest.mark.parametrize("parts", [
    {"post_processor": {"type": "TemplateProcessing", "special_tokens": {}, "pair": [],
                        "single": [{"Sequence": {"id": "A", "type_id": 0}}]}},
    {"truncation": {"max_length": 2, "strategy": "LongestFirst"}},
    {"padding": {"strategy": {"Fixed": 9}, "pad_id": 7}},
    {"added_tokens": [special(BPE.eos, EOS), special(513, "[PAD]"), special(514, "<|im_start|>")]},
], ids=lambda p: [*p][0])
def test_what_transformers_adds_changes_no_id_and_special_tokens_in_data_are_text(tmp_path, parts):
    tokenizer = Tokenizer.load(mini(tmp_path, **parts))
    for text in (*strings(300), f"a <|im_start|> b [PAD] {EOS}"):
        ids = tokenizer.encode(text)
        assert ids == BPE.encode(text) and max(ids, default=0) < BPE.eos
        assert tokenizer.decode([*ids, tokenizer.eos]) == text
    assert tokenizer.n_tokens == (515 if "added_tokens" in parts else BPE.n_tokens)


@pytest.mark.parametrize("files, eos", [
    ({}, 512), ({"config": {"eos_token_id": 513}}, 513),
    ({"config": {"eos_token_id": [513, 9]}}, 513),
    ({"tokenizer_config": {"eos_token": "<|im_end|>"}, "config": {"eos_token_id": 512}}, 513),
    ({"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}}, 513)])
def test_the_end_of_text_is_the_one_that_the_folder_names(tmp_path, files, eos):
    mini(tmp_path, added_tokens=[special(512, EOS), special(513, "<|im_end|>")])
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "saved")
    assert tokenizer.eos == eos and tokenizer.decode([eos]) == ""
    if "config" not in files:                              # which the model's save writes
        assert Tokenizer.load(tmp_path / "saved").eos == eos


def test_learned_merges_survive_saving_and_broken_files_are_one_line(tmp_path):
    BPE.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in strings(300):
        assert again.encode(text) == BPE.encode(text) and again.decode(again.encode(text)) == text
    assert len(BPE.encode("the cat sat")) == 3             # the common words are whole tokens
    head, *lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([head, *reversed(lines)]))
    with pytest.raises(ValueError, match="a merge comes before the merges that make"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="nowhere: no tokenizer.json"):
        Tokenizer.load(tmp_path / "nowhere")


@pytest.mark.parametrize("parts, words", [
    ({"model": {"type": "Unigram", "vocab": []}}, "model Unigram"),
    ({"model": {"type": "WordPiece", "vocab": {}}}, "model WordPiece"),
    ({"pre_tokenizer": {"type": "Metaspace"}}, "pre_tokenizer.*Metaspace"),
    ({"pre_tokenizer": None}, "pre_tokenizer"), (steps(split("(")), "Parsing|missing"),
    (steps({"type": "Metaspace"}), "pre_tokenizer.*Metaspace"), (steps(), "pre_tokenizer"),
    ({"normalizer": {"type": "Lowercase"}}, "normalizer Lowercase"),
    ({"added_tokens": []}, "no end-of-text token")])
def test_a_tokenizer_of_another_kind_is_one_line(tmp_path, parts, words):
    with pytest.raises(ValueError, match=f"that this class can read: .*({words})"):
        Tokenizer.load(mini(tmp_path, **parts))
